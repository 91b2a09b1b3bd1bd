"""Copies of a model that share its weights, and what is put back in the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["borrow", "eval_copy", "flags_kept", "in_mode", "share_copy", "switches_by_itself"]

Models = TypeVar("Models", nn.Module, dict[str, nn.Module])


def share_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the module structure that shares every parameter and buffer with `model`."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def borrow(model: Models) -> Models:
    """A deep copy of a model, or of several, with their parameters; what they share stays shared.

    Buffers are copied: it is there to be run, and a model may write to them.
    """
    models = model.values() if isinstance(model, dict) else [model]
    return copy.deepcopy(model, {id(each): each for inner in models for each in inner.parameters()})


def switches_by_itself(model: nn.Module) -> bool:
    """Whether a module overrides `train` or `eval`: it may do more there than to set the flag."""
    plain = (nn.Module.train, nn.Module.eval)
    return any((type(module).train, type(module).eval) != plain for module in model.modules())


def in_mode(model: nn.Module, training: bool, copied: Callable[[nn.Module], nn.Module] = share_copy) -> nn.Module:
    """A copy in another mode, made by `copied`; one with weights of its own where the switch changes weights.

    A layer that merges its adapters for `eval` writes into its weights, which are not the copy's.
    """
    twin = copied(model)
    if not switches_by_itself(model):
        return twin.train(training)
    held = [(tensor, tensor.data) for tensor in [*twin.parameters(), *twin.buffers()]]
    try:
        with flags_kept(model), _Untouched():  # type: ignore[no-untyped-call]
            twin.train(training)
        if all(_same_memory(tensor, data) for tensor, data in held):
            return twin
    except _WritesError:
        pass
    for tensor, data in held:
        tensor.data = data
    return copy.deepcopy(model).train(training)


class _WritesError(Exception):
    """An operator writes into a tensor."""


class _Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No operator that writes is carried out inside."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise _WritesError
        return func(*args, **(kwargs or {}))


def _same_memory(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    return tensor.is_meta or tensor.layout != torch.strided or tensor.data_ptr() == data.data_ptr()


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy to run in eval mode, with the model's parameters, whose flags stay as they are."""
    with flags_kept(model):
        return in_mode(model, False, borrow)


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Undo what an overridden `train` or `eval` of the copy does to the parameters that it shares."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
