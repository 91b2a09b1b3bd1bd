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
from torch import fx

from graphzip.analysis.layers import Layer
from graphzip.errors import ExampleInputError
from graphzip.graph.interpreter import stream
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.numeric.im2col import Window
from graphzip_passes.parts.streamed import Workspace

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
    traced: Traced, nodes: Sequence[fx.Node], task: str, feed: Feed, kept: Kept, workspace: Workspace | None = None
) -> Iterator[list[torch.Tensor]]:
    """The values of `nodes` of a joint graph for each batch of a task; nothing else of the graph is computed.

    Goes on from `kept` where it has values, without reading batches anew, and leaves there what later nodes need, up
    to two gigabytes, or in files of the `workspace`.
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
        values = _run(traced, order, known, live, task, workspace)
        yield [values[node.name] for node in nodes]
        if workspace is None or workspace.spill is None:
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


def _run(
    traced: Traced,
    order: Sequence[fx.Node],
    known: dict[str, Any],
    live: set[str],
    task: str,
    workspace: Workspace | None,
) -> dict[str, Any]:
    """Values by the names of nodes: `known` ones and those of `order`, as far as they are `live` in the end."""

    def seen(node: fx.Node, value: Any) -> Any:
        if workspace is None or node.op == "get_attr":
            return value
        if any(source.op == "get_attr" for source in node.all_input_nodes):
            workspace.files.rest()
        return workspace.spilled(value)

    kept = {node for node in traced.graph.nodes if node.name in live}
    values = {node: known[node.name] for node in traced.graph.nodes if node.name in known}
    steps = [node for node in order if node.op != "placeholder"]
    at: fx.Node | None = None
    try:
        for node in stream(traced.module, steps, values, live=kept, seen=seen):
            at = node
    except Exception as error:
        raise ExampleInputError(
            f"calibration: task {task!r} fails on a batch at {at} ({error}); make it yield batches of the shape of the "
            "example inputs"
        ) from error
    return {node.name: value for node, value in values.items() if node in kept}


def rows_of(layer: Layer, x: torch.Tensor, places: int, generator: torch.Generator) -> torch.Tensor:
    """Rows that a call of a layer reads: `(samples, channels, positions)`."""
    if layer.is_linear:
        flat = x.reshape(-1, x.shape[-1])
        count = places * x.shape[0]
        if flat.shape[0] > count:
            flat = flat[torch.randperm(flat.shape[0], generator=generator)[:count].to(x.device)]
        return flat.unsqueeze(2)
    return torch.cat([_patches(layer.window, part, places, generator) for part in torch.split(x, _CHUNK)])


def _patches(window: Window, x: torch.Tensor, places: int, generator: torch.Generator) -> torch.Tensor:
    whole = math.prod(window.outputs(x.shape[-window.dims :]))
    chosen = torch.arange(whole) if whole <= places else torch.randperm(whole, generator=generator)[:places]
    rows = torch.arange(len(x))[:, None] * whole + chosen
    return window.gathered(x, rows.flatten().to(x.device)).permute(2, 0, 1).contiguous()
