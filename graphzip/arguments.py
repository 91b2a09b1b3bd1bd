"""Arguments of the public functions: what they have to be, said before any work is done."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphzip.errors import ExampleInputError, GraphZipError, PlanError, TraceError
from graphzip.graph.torch_private import pytree
from graphzip.limits import MOST_EXAMPLE_NUMBERS, SEEDS, SIZES
from graphzip.numeric.sharded import is_sharded

__all__ = [
    "by_task",
    "check_callable",
    "check_examples",
    "check_flag",
    "check_module",
    "check_name",
    "check_room",
    "check_seed",
    "check_traceable",
    "number",
    "re_iterable",
    "whole",
]

_MOST_DIMENSIONS = 25  # that torch's operators take


def by_task(given: Any, models: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A mapping with the keys of `models`, in their order. Raises `ExampleInputError` for anything else."""
    wanted = ", ".join(map(repr, models))
    if not isinstance(given, Mapping):
        raise ExampleInputError(
            f"{what} is a {type(given).__name__}, but several models were given; pass a mapping with the keys {wanted}"
        )
    if set(given) != set(models):
        keys = ", ".join(map(repr, given)) or "none"
        raise ExampleInputError(f"{what} has the keys {keys}, the models have {wanted}; give one entry per task")
    return {name: given[name] for name in models}


def check_module(model: Any, what: str = "") -> None:
    """Raises `TraceError` unless `model` is one `nn.Module` that has its parameters; `what` is what it is given as."""
    lead = f"{what}: " if what else ""
    if isinstance(model, Mapping):
        raise TraceError(
            f"{lead}expected a torch.nn.Module, got a {type(model).__name__} of {len(model)}; give one model at a time"
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TraceError(f"{lead}expected a torch.nn.Module, got the class {model.__name__}; make one of it first")
    if isinstance(model, torch.export.ExportedProgram):
        raise TraceError(
            f"{lead}expected a torch.nn.Module, got an ExportedProgram; make a module of it first: "
            "graphzip.from_exported(program)"
        )
    if not isinstance(model, nn.Module):
        raise TraceError(f"{lead}expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{lead}{type(model).__name__} is TorchScript, which hides its source; pass the nn.Module it is from, or "
            "build that and load the weights: model.load_state_dict(script.state_dict())"
        )
    lazy = [name for name, held in _state(model) if is_lazy(held)]
    if lazy:
        raise TraceError(
            f"{lead}{type(model).__name__} has no {lazy[0]!r} yet, for its layers are lazy; run it on a batch first"
        )


def check_traceable(model: Any, what: str = "") -> None:
    """Raises `TraceError` as `check_module` does, and for what runs but cannot be worked on.

    These are wrappers, which would be run as they are (compiled by `torch.compile`, spread over devices), and tensors
    that no pass can compute with.
    """
    check_module(model, what)
    lead = f"{what}: " if what else ""
    for name, module in model.named_modules():
        wrapped = _wrapped(module)
        if wrapped:
            raise TraceError(f"{lead}{repr(name) if name else 'the model'} is {wrapped}")
    for name, tensor in _state(model):
        if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
            raise TraceError(
                f"{lead}{name!r} is {str(tensor.dtype).removeprefix('torch.')}, in which weights are stored and not "
                "computed with; convert it to float32, float16 or bfloat16 first (with its scales, where it has some)"
            )
        if is_sharded(tensor):
            raise TraceError(
                f"{lead}{name!r} is spread over processes (a DTensor), and a graph computes with whole tensors; load "
                "them: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True))"
            )
        if tensor.is_inference():
            raise TraceError(
                f"{lead}{name!r} was made inside torch.inference_mode(), and cannot be traced; make or load the model "
                "outside of it (torch.no_grad() does no harm), or pass copy.deepcopy(model)"
            )


def _wrapped(module: nn.Module) -> str:
    """What a module is that stands for another one, and what to pass instead; empty for any other."""
    bases = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    if "torch._dynamo.eval_frame.OptimizedModule" in bases:
        return "made by torch.compile; pass what it was made of (its _orig_mod), and compile what graphzip gives back"
    if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        return "given a forward made by torch.compile; pass the model without it, and compile what graphzip gives back"
    kinds = {base.rpartition(".")[2] for base in bases if base.startswith(("torch.nn.parallel.", "torch.distributed."))}
    if "FSDPModule" in kinds:
        return "sharded by fully_shard; pass the model before it is, and call fully_shard on what graphzip gives back"
    found = kinds & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
    if found:
        return f"a {found.pop()}; pass the model inside it (its module), and wrap what graphzip gives back"
    return ""


def _state(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_examples(example_inputs: Any) -> None:
    """Raises `ExampleInputError` unless they are a tuple or a mapping of arguments with at least one sample."""
    if not isinstance(example_inputs, tuple | Mapping):
        raise ExampleInputError(
            f"example_inputs must be a tuple of positional arguments, got {type(example_inputs).__name__}; "
            "for a single input write (x,), by name {'x': x}"
        )
    values = list(example_inputs.values()) if isinstance(example_inputs, Mapping) else example_inputs
    first = next((leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)), None)
    if first is not None and first.dim() and first.shape[0] == 0:
        raise ExampleInputError(
            f"example_inputs have a batch of the shape {tuple(first.shape)}; give at least one sample"
        )


def check_room(shapes: Iterable[tuple[int, ...]]) -> None:
    """Raises `ExampleInputError` for shapes of inputs that no memory is meant to be filled with."""
    total = 0
    for shape in shapes:
        if len(shape) > _MOST_DIMENSIONS:
            raise ExampleInputError(f"an input of {len(shape)} dimensions is too much; no operator takes it")
        total += math.prod(shape)
        if total > MOST_EXAMPLE_NUMBERS:
            size = reprlib.repr("x".join(map(str, shape))).strip("'")
            raise ExampleInputError(
                f"an input of {size} is too large: example inputs have at most {MOST_EXAMPLE_NUMBERS:,} numbers "
                "together; give a smaller batch"
            )


def check_seed(seed: Any) -> None:
    """Raises `PlanError` unless it is a number that seeds every random source."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < SEEDS:
        raise PlanError(f"seed: {reprlib.repr(seed)} is not a seed; write an int from 0 to {SEEDS - 1}")


def check_callable(value: Any, name: str, example: str) -> None:
    """Raises `PlanError` unless it is `None` or can be called as in the example."""
    if value is not None and not callable(value):
        raise PlanError(f"{name}: {reprlib.repr(value)} cannot be called; give a function, {example}")


def check_flag(value: Any, name: str) -> None:
    """Raises `GraphZipError` unless it is true or false."""
    if not isinstance(value, bool):
        raise GraphZipError(f"{name}: {reprlib.repr(value)} is neither True nor False")


def check_name(value: Any, name: str) -> None:
    """Raises `GraphZipError` unless it is text."""
    if not isinstance(value, str):
        raise GraphZipError(f"{name}: {reprlib.repr(value)} is not a name; a name is text")


def number(
    value: Any, name: str, *, above: float | None = None, least: float = -math.inf, most: float = math.inf
) -> float:
    """A finite number in a range. Raises `GraphZipError` where it is none."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most or (above is not None and not value > above):
        low = f"above {above:g}" if above is not None else f"of at least {least:g}" if least > -math.inf else ""
        high = f"of at most {most:g}" if most < math.inf else ""
        wanted = " and ".join(each for each in (low, high) if each)
        raise GraphZipError(f"{name}: {reprlib.repr(value)} is out of range; write a number {wanted}".rstrip())
    return float(value)


def whole(value: Any, name: str, *, least: int = 0, most: int = SIZES) -> int:
    """An int in a range. Raises `GraphZipError` where it is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise GraphZipError(f"{name}: {reprlib.repr(value)} is out of range; write an int from {least} to {most}")
    return int(value)


def re_iterable(data: Any, name: str) -> Iterable[Any]:
    """Data that can be gone through again and again. Raises `ExampleInputError` where it cannot."""
    kind = type(data).__name__
    iterable = isinstance(data, Iterable) or hasattr(type(data), "__getitem__")
    if not iterable or isinstance(data, torch.Tensor | Mapping | str | bytes | nn.Module):
        raise ExampleInputError(f"{name} is a {kind}; pass a list of batches or a DataLoader")
    if isinstance(data, Iterator):
        raise ExampleInputError(
            f"{name} is a {kind}, which can be gone through only once; pass a list of batches or a DataLoader"
        )
    return data  # type: ignore[no-any-return]
