"""What the layers of a task read on its calibration data, in rows of samples.

A row is the input of a linear layer, or the patch that a convolution's kernel is laid on at one place, `(channels,
positions of the kernel)` in that order, as the kernel's own rows are laid out (MTZ, section 3.5). Places are drawn at
random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from graphzip.errors import ExampleInputError
from graphzip.graph.operators import CONVOLUTIONS
from graphzip.graph.state import get_tensor
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind

__all__ = ["Feed", "rows_of", "values_of"]

Feed = Callable[[], Iterable[tuple[Any, ...]]]
"""Gives the calibration batches of a task, as positional inputs, from the start."""

_CHUNK = 8  # samples whose patches are gathered at once


@torch.no_grad()
def values_of(traced: Traced, nodes: Sequence[fx.Node], task: str, feed: Feed) -> Iterator[list[torch.Tensor]]:
    """The values of `nodes` of a joint graph for each batch of a task; nothing else of the graph is computed."""
    wanted = set(nodes)
    for node in reversed(list(traced.graph.nodes)):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    order = [node for node in traced.graph.nodes if node in wanted]
    last = {source: node for node in order for source in node.all_input_nodes}
    spent: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        if source not in nodes:
            spent.setdefault(node, []).append(source)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    start = 0
    for each in traced.tasks:
        if each.name == task:
            break
        start += each.in_spec.num_leaves
    for batch in feed():
        leaves = pytree.tree_leaves(batch)
        values: dict[fx.Node, Any] = dict(zip(placeholders[start : start + len(leaves)], leaves, strict=True))
        for node in order:
            if node.op == "get_attr":
                values[node] = get_tensor(traced.module, str(node.target)).detach()
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = node.target(*args, **kwargs)
                except Exception as error:
                    raise ExampleInputError(
                        f"calibration: task {task!r} fails on a batch at {node.name} ({error}); make it yield batches "
                        "of the shape of the example inputs"
                    ) from error
            for source in spent.get(node, ()):
                values.pop(source, None)
        yield [values[node] for node in nodes]


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
    args = bind(call)
    dims = len(kernel) - 2
    stride, dilation = (_spread(args[key], dims) for key in ("stride", "dilation"))
    if args["padding"] == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel[2:], strict=True)]
        pads = [side for whole in reversed(total) for side in (whole // 2, whole - whole // 2)]
    elif args["padding"] == "valid":
        pads = [0] * (2 * dims)
    else:
        pads = [size for size in reversed(_spread(args["padding"], dims)) for _ in range(2)]
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


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    numbers = tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers
