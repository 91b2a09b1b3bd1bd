"""Trimmed features: what layers read, small enough to compare channels at every step.

`Trim` (Eq. 6) lays an average pool over the feature map and keeps some of the numbers, drawn at random: for an input of
C channels a matrix (C, m), whose size does not depend on that of the feature map. The numbers kept are the same ones
in all tasks, so that rows of different tasks can be compared: sample i of one belongs to sample i of the others.

Source: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), section 3.3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphzip.errors import ExampleInputError
from graphzip.graph.pickling import Beside
from graphzip_passes.cross_domain.random_state import drawn_so_far, go_on_from, parts_of

__all__ = ["KEPT", "Trimmed", "rows_of_input"]

KEPT: Final = 1024
"""Numbers of a channel that are remembered of the last batches, or of calibration data from the first batch on."""


def rows_of_input(x: Tensor, dims: int, pool: Sequence[int]) -> Tensor:
    """What a layer reads as (channels, numbers), each spatial dimension pooled down to that of `pool` at most.

    `dims` is the number of spatial dimensions: 0 for a linear layer, whose channels are the last dimension of `x`.
    """
    if dims == 0:
        return x.movedim(-1, 0).flatten(1)
    x = x.reshape(-1, *x.shape[-dims - 1 :])
    if dims == 1:
        x = F.adaptive_avg_pool1d(x, min(pool[0] * pool[1], x.shape[2]))
    else:
        x = F.adaptive_avg_pool2d(x, (min(pool[0], x.shape[2]), min(pool[1], x.shape[3])))
    return x.movedim(1, 0).flatten(1)


@dataclass
class _Batch:
    """One layer in one batch: the features of the tasks that have been run, and which numbers are kept of them."""

    count: int
    chosen: Tensor | None
    found: dict[str, Tensor] = field(default_factory=dict)


class Trimmed(Beside):
    """The trimmed features of the layers that are watched, in all tasks, batch by batch.

    A batch is noted when the models run with gradients on, all of them before the features are taken. Inside
    `collecting` all batches of one task may come before those of the next.
    """

    def __init__(self, tasks: Sequence[str], pool: Sequence[int], samples: int, seed: int) -> None:
        self.tasks, self.pool, self.samples = tuple(tasks), tuple(pool), samples
        self._random = np.random.default_rng(seed)
        self._batches: dict[str, list[_Batch]] = defaultdict(list)
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._seen: dict[tuple[str, str], int] = defaultdict(int)
        self._collecting = False
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without the batch of a step that is being taken, which belongs to a graph of autograd."""
        return {**vars(self), "_batches": defaultdict(list)}

    def watch(self, layer: str, modules: Mapping[str, nn.Module], dims: int) -> None:
        """Note what `modules`, this layer in every task, read."""
        for task in self.tasks:
            self._hooks.append(modules[task].register_forward_pre_hook(_Tap(self, layer, task, dims)))

    def leave(self) -> None:
        """Watch no longer, and forget what was seen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._batches.clear()
        self._kept.clear()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, batches are noted with gradients off, and remembered in place of those of the training.

        Raises `ExampleInputError` where one task has fewer batches than another.
        """
        self._batches.clear()
        self._kept.clear()
        self._seen.clear()
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False
        for layer, batches in self._batches.items():
            for batch in batches:
                self._kept[layer].append(self._joined(layer, batch, "calibration: give all tasks as many batches"))
        self._batches.clear()

    def has_enough(self, task: str) -> bool:
        """While collecting: whether more batches of a task would be left out."""
        counts = {layer: seen for (layer, each), seen in self._seen.items() if each == task}
        noted = [sum(min(each.count, self.samples) for each in self._batches[at][:n]) for at, n in counts.items()]
        return bool(noted) and min(noted) >= KEPT

    def take(self, layer: str) -> Tensor:
        """Features (channels of all tasks, m) in the last batch, as part of its graph. Each batch can be taken once.

        Raises `ExampleInputError` where a task has not been run since.
        """
        advice = "run the prepared model on a batch of every task, with gradients, before each call of regularizer()"
        batches = self._batches.pop(layer, [])
        rows = self._joined(layer, batches[0] if batches else _Batch(0, None), advice)
        kept = self._kept[layer]
        kept.append(rows.detach())
        while len(kept) > 1 and sum(each.shape[1] for each in kept) > KEPT:
            kept.pop(0)
        return rows

    def remembered(self, layer: str) -> Tensor | None:
        """Features (channels of all tasks, m) of several batches, without a graph; nothing where there was none."""
        return torch.cat(self._kept[layer], dim=1) if self._kept[layer] else None

    def state(self) -> dict[str, Tensor]:
        """What is remembered of the last batches, and how far the generator is."""
        kept = {
            f"kept.{number}.{layer}": rows for layer, parts in self._kept.items() for number, rows in enumerate(parts)
        }
        return kept | {"random": drawn_so_far(self._random)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises `KeyError`, `TypeError` or `ValueError` for a state that is none."""
        self._batches.clear()
        self._kept.clear()
        numbered = (name.partition(".") for name in parts_of(state, "kept"))
        for number, _, layer in sorted(numbered, key=lambda each: int(each[0])):
            self._kept[layer].append(state[f"kept.{number}.{layer}"].clone())
        go_on_from(self._random, state["random"])

    def note(self, layer: str, task: str, x: Tensor, dims: int) -> None:
        """Take in what a layer reads now."""
        if not (torch.is_grad_enabled() or self._collecting):
            return
        batches, position = self._batches[layer], 0
        if self._collecting:
            position = self._seen[layer, task]
            self._seen[layer, task] += 1
            if sum(min(batch.count, self.samples) for batch in batches[:position]) >= KEPT:
                return
        elif batches and task in batches[0].found:
            batches.clear()
        rows = rows_of_input(x, dims, self.pool)
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if position == len(batches):
            batches.append(_Batch(rows.shape[1], self._choice(rows)))
        batch = batches[position]
        if batch.count != rows.shape[1]:
            raise ExampleInputError(
                f"{layer}: {task!r} has {rows.shape[1]} numbers per channel where another task has {batch.count}; give "
                "all tasks as many batches of the same sizes, sample i of one belonging to sample i of the others"
            )
        batch.found[task] = rows if batch.chosen is None else rows[:, batch.chosen]

    def _choice(self, rows: Tensor) -> Tensor | None:
        count = rows.shape[1]
        if count <= self.samples:
            return None
        return torch.from_numpy(self._random.permutation(count)[: self.samples]).to(rows.device)

    def _joined(self, layer: str, batch: _Batch, advice: str) -> Tensor:
        missing = [task for task in self.tasks if task not in batch.found]
        if missing:
            names = ", ".join(map(repr, missing))
            raise ExampleInputError(f"{layer}: there are no features of {names} for a batch; {advice}")
        return torch.cat([batch.found[task] for task in self.tasks])


@dataclass(frozen=True)
class _Tap:
    """A forward pre-hook; a deep copy of a watched model brings a copy of what it notes."""

    trimmed: Trimmed
    layer: str
    task: str
    dims: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.trimmed.note(self.layer, self.task, args[0], self.dims)
