"""What the layers of a task read on its calibration data, in rows of samples.

A row is the input of a linear layer, or the patch that a convolution's kernel is laid on at one place, `(channels,
positions of the kernel)` in that order, as the kernel's own rows are laid out (MTZ, section 3.5). Places are drawn at
random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from graphzip.errors import ExampleInputError
from graphzip.graph.operators import CONVOLUTIONS
from graphzip.graph.state import get_tensor
from graphzip.graph.torch_private import pytree
from graphzip.graph.trace import Traced
from graphzip_passes.layer_rows import sliding

__all__ = ["Feed", "Kept", "rows_of", "values_of"]

Feed = Callable[[], Iterable[tuple[Any, ...]]]
"""Gives the calibration batches of a task, as positional inputs, from the start."""

_KEPT_BYTES = 2 << 30
_CHUNK = 8  # samples whose patches are gathered at once


@dataclass
class Kept:
    """Values from which the next layers of a task continue, for each batch by the names of nodes, and what is done."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def clear(self) -> None:
        self.batches, self.done = [], set()


@torch.no_grad()
def values_of(
    traced: Traced, nodes: Sequence[fx.Node], task: str, feed: Feed, kept: Kept
) -> Iterator[list[torch.Tensor]]:
    """The values of `nodes` of a joint graph for each batch of a task; nothing else of the graph is computed.

    Goes on from `kept` where it has values, without reading batches anew, and leaves there what later nodes need, up
    to two gigabytes.
    """
    order = _missing(traced, nodes, kept.done)
    given = _placeholders(traced, task)  # later nodes may be the first that read one
    done = kept.done | {node.name for node in (*given, *order) if node.op != "get_attr"}
    live = {node.name for node in nodes}
    for node in traced.graph.nodes:
        if node.name in done and any(user.name not in done for user in node.users):
            live.add(node.name)
    fresh: list[dict[str, Any]] = []
    held = 0
    for known in list(kept.batches) if kept.done else (_inputs(given, batch) for batch in feed()):
        values = _run(traced, order, known, live, task)
        yield [values[node.name] for node in nodes]
        held += sum(value.nbytes for value in values.values() if isinstance(value, torch.Tensor))
        if held <= _KEPT_BYTES:
            fresh.append(values)
    kept.clear()
    if held <= _KEPT_BYTES:
        kept.batches, kept.done = fresh, done


def _missing(traced: Traced, nodes: Sequence[fx.Node], done: set[str]) -> list[fx.Node]:
    """What has to be computed for `nodes`, in order; parameters are fetched anew."""
    wanted = {node for node in nodes if node.name not in done}
    for node in reversed(list(traced.graph.nodes)):
        if node in wanted:
            wanted.update(source for source in node.all_input_nodes if source.name not in done)
    return [node for node in traced.graph.nodes if node in wanted]


def _placeholders(traced: Traced, task: str) -> list[fx.Node]:
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    names = [each.name for each in traced.tasks]
    start = sum(each.in_spec.num_leaves for each in traced.tasks[: names.index(task)])
    return placeholders[start : start + traced.tasks[names.index(task)].in_spec.num_leaves]


def _inputs(placeholders: Sequence[fx.Node], batch: tuple[Any, ...]) -> dict[str, Any]:
    return {node.name: leaf for node, leaf in zip(placeholders, pytree.tree_leaves(batch), strict=True)}


def _run(traced: Traced, order: Sequence[fx.Node], known: dict[str, Any], live: set[str], task: str) -> dict[str, Any]:
    """Values by the names of nodes: `known` ones and those of `order`, as far as they are `live` in the end."""
    values = dict(known)
    last = {source.name: node for node in order for source in node.all_input_nodes if source.name not in live}
    spent: dict[fx.Node, list[str]] = {}
    for name, node in last.items():
        spent.setdefault(node, []).append(name)
    for node in order:
        if node.op == "get_attr":
            values[node.name] = get_tensor(traced.module, str(node.target)).detach()
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source.name])
            try:
                values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception as error:
                raise ExampleInputError(
                    f"calibration: task {task!r} fails on a batch at {node.name} ({error}); make it yield batches of "
                    "the shape of the example inputs"
                ) from error
        for name in spent.get(node, ()):
            values.pop(name, None)
    return {name: value for name, value in values.items() if name in live}


def rows_of(
    call: fx.Node, x: torch.Tensor, kernel: Sequence[int], places: int, generator: torch.Generator
) -> torch.Tensor:
    """Rows that the layer `call` reads: `(samples, channels, positions)`; `kernel` is the shape of its weight."""
    if call.target not in CONVOLUTIONS:
        flat = x.reshape(-1, x.shape[-1])
        count = places * x.shape[0]
        if flat.shape[0] > count:
            flat = flat[torch.randperm(flat.shape[0], generator=generator)[:count].to(x.device)]
        return flat.unsqueeze(2)
    return torch.cat([_patches(call, part, kernel, places, generator) for part in torch.split(x, _CHUNK)])


def _patches(
    call: fx.Node, x: torch.Tensor, kernel: Sequence[int], places: int, generator: torch.Generator
) -> torch.Tensor:
    pads, stride, dilation = sliding(call, kernel[2:])
    dims = len(kernel) - 2
    x = F.pad(x, pads)
    for dim, (size, step, gap) in enumerate(zip(kernel[2:], stride, dilation, strict=True)):
        x = x.unfold(2 + dim, (size - 1) * gap + 1, step)
    gaps: Any = (..., *(slice(None, None, gap) for gap in dilation))
    view = x[gaps]
    grid = view.shape[2 : 2 + dims]
    whole = math.prod(grid)
    chosen = torch.arange(whole) if whole <= places else torch.randperm(whole, generator=generator)[:places]
    index: Any = (slice(None), slice(None), *(part.to(x.device) for part in torch.unravel_index(chosen, tuple(grid))))
    picked = view[index]
    return picked.transpose(1, 2).reshape(-1, x.shape[1], math.prod(kernel[2:]))
