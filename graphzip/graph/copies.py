"""Copies of a model that share its weights, and what is put back in the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from graphzip.graph.layers.factored import FactoredConv
from graphzip.graph.state import joined
from graphzip.graph.torch_private import TorchDispatchMode

__all__ = [
    "aliased_copy",
    "borrow",
    "computed",
    "deep_copy",
    "eval_copy",
    "flags_kept",
    "follow_modes",
    "in_mode",
    "recomputed",
    "share_copy",
    "switches_by_itself",
    "why_not_copied",
]

Models = TypeVar("Models", nn.Module, dict[str, nn.Module])


def computed(models: Iterable[nn.Module]) -> dict[int, torch.Tensor]:
    """For a deep copy: tensors that modules keep beside their state, and that belong to a graph of autograd.

    `copy.deepcopy` refuses them. They are what the modules computed last from their parameters: the old `weight_norm`,
    `spectral_norm` and `prune` of `torch.nn.utils` do so before every call. A copy has their values alone.
    """
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                found[id(value)] = value.detach().clone()
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            for each in value.values() if isinstance(value, dict) else value:
                look(each)

    for model in models:
        for module in model.modules():
            for name, value in module.__dict__.items():
                if name not in ("_modules", "_parameters"):
                    look(value)
    return found


def recomputed(model: nn.Module) -> list[str]:
    """Names of the tensors that the old `weight_norm`, `spectral_norm` and `prune` compute before every call."""
    return [
        joined(name, leaf)
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)
        and (leaf := getattr(hook, "name", getattr(hook, "_tensor_name", "")))
    ]


def deep_copy(models: Models, shared: Iterable[Any] = ()) -> Models:
    """A deep copy of a model, or of several, in which what they share stays shared; `shared` objects are not copied."""
    each = list(models.values()) if isinstance(models, dict) else [models]
    memo: dict[int, Any] = {id(value): value for value in shared}
    kept = computed(each)
    return copy.deepcopy(models, {**kept, **memo})


def share_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the module structure that shares every parameter and buffer with `model`."""
    return deep_copy(model, [*model.parameters(), *model.buffers()])


def aliased_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are other tensors in the same memory."""
    held = [each for each in (*model.parameters(), *model.buffers()) if type(each) in (torch.Tensor, nn.Parameter)]
    return copy.deepcopy(model, {**computed([model]), **{id(each): _aliased(each) for each in held}})


def _aliased(tensor: torch.Tensor) -> torch.Tensor:
    same = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        same = nn.Parameter(same, tensor.requires_grad)
    same.__dict__.update(tensor.__dict__)
    return same


def borrow(model: Models) -> Models:
    """A deep copy of a model, or of several, with their parameters; what they share stays shared.

    Buffers are copied: it is there to be run, and a model may write to them.
    """
    models = model.values() if isinstance(model, dict) else [model]
    return deep_copy(model, [each for inner in models for each in inner.parameters()])


def switches_by_itself(model: nn.Module) -> bool:
    """Whether a module overrides `train` or `eval`: it may do more there than to set the flag."""
    plain = (nn.Module.train, FactoredConv.train), (nn.Module.eval,)
    return any(type(module).train not in plain[0] or type(module).eval not in plain[1] for module in model.modules())


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
    return deep_copy(model).train(training)


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


def follow_modes(module: nn.Module, source: nn.Module) -> None:
    """Give every submodule the training mode of the one with the same name, or of the nearest one around it."""
    modes = {name: inner.training for name, inner in source.named_modules(remove_duplicate=False)}
    for name, inner in module.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        inner.training = modes[name]


def why_not_copied(what: str, error: Exception) -> str:
    """The message for a model that cannot be copied."""
    return (
        f"{what} cannot be copied ({error}); graphzip works on a copy so that your model stays as it is. Make "
        "copy.deepcopy(model) work first (a lock, a generator or an open file kept as an attribute is the usual cause)"
    )
