"""Where a model is measured: `device=` of `compile` and `plan_for`, and batches that fit its memory.

A copy of the model is moved there, and its batches as they are read; the user's model stays where it is, and so does
what comes back. Where the memory of the device is not enough, the work begins anew with batches of half the size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from graphzip.arguments import check_module, re_iterable
from graphzip.errors import ExampleInputError, GraphZipError, PlanError
from graphzip.graph.batches import samples_in
from graphzip.graph.copies import deep_copy, why_not_copied
from graphzip.graph.torch_private import pytree
from graphzip.plan.problems import show

__all__ = ["device_in", "device_of", "fitting", "moved", "moved_model", "on_device"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def device_of(given: Any) -> torch.device | None:
    """The device that an argument `device` names.

    Raises `PlanError` for one that there is not, or that nothing can be measured on.
    """
    if given is None:
        return None
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError, ValueError):
        raise PlanError(f"device: {show(given)} is no device; write 'cuda', 'cuda:1' or 'cpu'") from None
    if device.type == "meta":
        raise PlanError("device: 'meta' has no numbers to measure; write 'cuda' or 'cpu', or leave it out")
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise PlanError(f"device: {str(device)!r} cannot be used here for float64 ({text}); leave it out") from None
    return device


def device_in(model: Any) -> torch.device:
    """Where the first tensor of a model, or of several, is."""
    each = list(model.values()) if isinstance(model, Mapping) else [model]
    found = (tensor.device for inner in each for tensor in (*inner.parameters(), *inner.buffers()))
    return next(found, torch.device("cpu"))


def moved_model(model: Any, device: torch.device) -> Any:
    """A copy of the model, or of several, on the device; the model itself where it is there already.

    Raises `GraphZipError` where it cannot be copied, or is on several devices.
    """
    if not isinstance(model, Mapping):
        check_module(model)
    elif not all(isinstance(each, nn.Module) for each in model.values()):
        raise PlanError("device: a Trace has its model where that is; give the model, or leave device out")
    each = list(model.values()) if isinstance(model, Mapping) else [model]
    places = {tensor.device for inner in each for tensor in (*inner.parameters(), *inner.buffers())}
    if places <= {device}:
        return model
    if len(places) > 1:
        raise PlanError(
            f"device: the model is on {', '.join(sorted(map(str, places)))}, and its result can be only on one of "
            "them; move it to one device first"
        )
    try:
        copies: Any = deep_copy(dict(model) if isinstance(model, Mapping) else model)
    except Exception as error:
        raise GraphZipError(why_not_copied("the model", error)) from error
    for inner in copies.values() if isinstance(copies, dict) else [copies]:
        inner.to(device)
    return copies


def moved_inputs(values: T, device: torch.device) -> T:
    """Tensors of a batch, or of example inputs, on the device."""
    return pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), values)  # type: ignore[no-any-return]


def moved(model: Any, example_inputs: Any, device: torch.device | None) -> tuple[Any, Any]:
    """Both on the device, where one is given. Raises as `moved_model` does."""
    if device is None:
        return model, example_inputs
    return moved_model(model, device), moved_inputs(example_inputs, device)


def fitting(
    work: Callable[[Any], T],
    calibration: Any,
    device: torch.device | None,
    *,
    splits: bool = True,
    again: bool = True,
) -> T:
    """What `work(calibration)` gives, with batches on the device that its memory is enough for.

    Where it is not, `work` begins `again`, as if batches of at most half as many samples had been given.
    Raises `GraphZipError` where batches are not to be split (`splits`), cannot be, or have one sample.
    """
    data, most = calibration, 0
    while True:
        try:
            return work(data if device is None and not most else _parts(data, most, device))
        except ExampleInputError as error:
            if not most:
                raise
            raise GraphZipError(
                f"the memory is not enough for the batches of calibration, and the model takes no batches of {most} "
                f"({error}); give smaller ones that it takes, or use a device with more memory"
            ) from error
        except Exception as error:
            if not _is_out_of_memory(error) or data is None or not again or _has_others():
                raise
            largest = most or max(map(_samples, _batches(data)))
            if not splits or largest < 2:
                why = "loss= is the mean over a batch" if not splits else "it has one sample"
                raise GraphZipError(
                    f"the memory is not enough for a batch of calibration of {largest}, which is not split, for {why}; "
                    "give smaller batches, or use a device with more memory"
                ) from error
            most = largest // 2
        logger.warning("out of memory with batches of %d samples; going on with %d", largest, most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def on_device(calibration: Any, device: torch.device | None) -> Any:
    """The batches, moved there as they are read, where a device is given.

    Raises `ExampleInputError` where they can be read only once.
    """
    return calibration if device is None else _parts(calibration, 0, device)


def _parts(data: Any, most: int, device: torch.device | None) -> Any:
    if isinstance(data, Mapping):
        return {name: _parts(each, most, device) for name, each in data.items()}
    return None if data is None else _Parts(re_iterable(data, "calibration"), most, device)


def _batches(data: Any) -> Iterator[Any]:
    for each in data.values() if isinstance(data, Mapping) else [data]:
        yield from each


def _samples(batch: Any) -> int:
    return samples_in(pytree.tree_leaves(batch))


def _has_others() -> bool:
    """Whether other processes compute along, which would wait for one that begins anew."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it is an error of a device's memory, or was raised because of one."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


@dataclass(frozen=True)
class _Parts:
    """Batches on a device, in parts of at most so many samples; 0 leaves them as they are."""

    batches: Iterable[Any]
    most: int
    device: torch.device | None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            plain = dict(batch) if isinstance(batch, Mapping) else batch
            for part in self._parts_of(plain):
                yield part if self.device is None else moved_inputs(part, self.device)

    def _parts_of(self, batch: Any) -> Iterator[Any]:
        leaves, spec = pytree.tree_flatten(batch)
        count = samples_in(leaves)
        if not self.most or count <= self.most:
            yield batch
            return
        for start in range(0, count, self.most):
            yield pytree.tree_unflatten(
                [
                    leaf[start : start + self.most]
                    if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == count
                    else leaf
                    for leaf in leaves
                ],
                spec,
            )
