"""Batches of a user's data, here and in other processes, and a model that is run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from graphzip.boundary import user_data
from graphzip.errors import ExampleInputError, GraphZipError, InputShapeError, ProcessesError
from graphzip.graph.inputs import InputSpec, check_input
from graphzip.process_groups import ALONE, Processes

__all__ = ["Batches", "Given", "check_batches", "each_batch", "leading", "run_batch", "samples_in", "shared"]


class Batches:
    """Batches of all processes, of which some are `here`: rank r of w has the batches r, r + w, ...

    Of several processes it cannot be gone through: what is computed from data says whether it is of the batches that
    are `here`, and is added up over the `processes` then, or of some that every process has (`leading`).
    """

    def __init__(self, here: Sequence[tuple[Any, ...]], processes: Processes = ALONE) -> None:
        self.here, self.processes = list(here), processes
        self._known: dict[int, list[tuple[Any, ...]]] = {}
        self._counts = processes.gathered([samples_in(batch) for batch in self.here])
        self._run = self.here
        if not all(self._counts) and any(self._counts):
            source = next(rank for rank, counts in enumerate(self._counts) if counts)
            first = processes.agreed(self.here[0] if self.here else (), source)
            self._run = self.here or [first]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The batches of one process. Raises `ProcessesError` where there are several."""
        if self.processes.size > 1:
            raise ProcessesError(
                "calibration is divided among several ranks, and something goes through a share as if it were all: let "
                "it go through batches.here, and add up what it finds with batches.processes.summed(...)"
            )
        return iter(self.here)

    def __len__(self) -> int:
        """How many there are in all processes."""
        return sum(map(len, self._counts))

    @property
    def samples(self) -> int:
        """How many of them all batches have."""
        return sum(map(sum, self._counts))

    @property
    def run(self) -> list[tuple[Any, ...]]:
        """Those that a graph is run on: the ones that are here; where there are none another process's first, so that
        shapes are known, of which nothing counts.
        """
        return self._run

    @property
    def order(self) -> list[tuple[int, int]]:
        """All batches in order: the rank of the process that has it, and which of its batches it is."""
        numbered = [
            (rank + place * len(self._counts), rank, place)
            for rank, counts in enumerate(self._counts)
            for place in range(len(counts))
        ]
        return [(rank, place) for _, rank, place in sorted(numbered)]

    def sizes(self, sizes: Sequence[Any]) -> Iterator[tuple[Any, int | None]]:
        """`sizes` of the batches that are run here, for all batches in order, and which of those here each one is."""
        every = self.processes.gathered(self.counted(sizes))
        for rank, place in self.order:
            yield every[rank][place], place if rank == self.processes.rank else None

    def counted(self, values: Sequence[Any]) -> list[Any]:
        """Of values on the batches that are run those that count."""
        return list(values[: len(self.here)])

    def mapped(self, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Batches:
        """The same batches, each changed."""
        changed = [change(batch) for batch in self._run]
        return self._with(self.counted(changed), changed, self._counts)

    def leading(self, samples: int, beside: Sequence[tuple[Any, ...]] | None = None) -> list[tuple[Any, ...]]:
        """The first batches of all, as many as have so many samples together, or all: the same in every process.

        With what lies `beside` the batches that are here, such as labels, that in their place.
        """
        if beside is None and samples in self._known:
            return self._known[samples]
        own, first = self.here if beside is None else beside, self._first(samples)
        every = self.processes.gathered([own[place] for rank, place in first if rank == self.processes.rank])
        found = [every[rank][place] for rank, place in first]
        if beside is None:
            self._known[samples] = found
        return found

    def cut(self, samples: int, behind: int = 0) -> Batches:
        """Those of the same batches that are here; with `behind` those that come after so many samples."""
        passed = self._first(behind) if behind else []
        chosen = self._first(samples, len(passed))
        here = [self.here[place] for rank, place in chosen if rank == self.processes.rank]
        counts = [[each[place] for owner, place in chosen if owner == rank] for rank, each in enumerate(self._counts)]
        return self._with(here, here or self._run[:1], counts)

    def _first(self, samples: int, passed: int = 0) -> list[tuple[int, int]]:
        found, count = [], 0
        for rank, place in self.order[passed:]:
            if count >= samples:
                break
            found.append((rank, place))
            count += self._counts[rank][place]
        return found

    def _with(self, here: list[tuple[Any, ...]], run: list[tuple[Any, ...]], counts: list[list[int]]) -> Batches:
        found = Batches.__new__(Batches)
        found.here, found.processes, found._counts, found._run, found._known = here, self.processes, counts, run, {}
        return found


Given: TypeAlias = "Batches | Sequence[tuple[Any, ...]]"
"""Inputs of a graph: batches that are divided among processes, or some that every process has."""


def shared(batches: Given) -> Batches:
    """Those that every process has are as one process has them."""
    return batches if isinstance(batches, Batches) else Batches(batches)


def each_batch(calibration: Iterable[Any], *, may_be_empty: bool = False) -> Iterator[Any]:
    """The batches of calibration data. Raises `ExampleInputError` where there are none, or none are left."""
    empty = not may_be_empty
    for batch in user_data(calibration):
        empty = False
        yield batch
    if empty:
        raise ExampleInputError(
            "calibration yields no batch; pass at least one, in a list or a DataLoader, which can be gone through again"
        )


def samples_in(batch: Sequence[Any]) -> int:
    """How many samples a batch has, by the first of its tensors with a dimension."""
    return next((len(leaf) for leaf in batch if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)


def leading(batches: Given, samples: int) -> list[tuple[Any, ...]]:
    """The first batches, as many as have so many samples together, or all of them: every process has them then."""
    return shared(batches).leading(samples)


def check_batches(inputs: Sequence[InputSpec], batches: Sequence[tuple[Any, ...]]) -> None:
    """Raises `ExampleInputError` unless a graph with these inputs takes each of the batches."""
    for number, leaves in enumerate(batches):
        if len(leaves) != len(inputs):
            raise ExampleInputError(
                f"calibration: the traced model takes {len(inputs)} inputs, a batch brings {len(leaves)}; give batches "
                "of the structure of example_inputs"
            )
        for leaf, spec in zip(leaves, inputs, strict=True):
            if spec.dtype is None:
                continue
            try:
                check_input(leaf, spec.name, spec.shape, spec.dtype)
            except InputShapeError as error:
                raise ExampleInputError(f"calibration: batch {number}: {error}") from None
            if 0 in leaf.shape and not any(size == 0 for size in spec.shape):
                raise ExampleInputError(
                    f"calibration: batch {number}: input {spec.name!r} has the shape {tuple(leaf.shape)}, which holds "
                    "nothing; leave the batch out"
                )


def run_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, what: str = "calibration"
) -> Any:
    """The output for one batch of the data that `what` names.

    Raises `ExampleInputError` for a batch that the model does not accept.
    """
    try:
        return model(*args, **(kwargs or {}))
    except (GraphZipError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        values = (*args, *(kwargs or {}).values())
        shapes = ", ".join(str(tuple(arg.shape)) if isinstance(arg, torch.Tensor) else repr(arg) for arg in values)
        raise ExampleInputError(
            f"{what}: {type(model).__name__} fails on a batch ({shapes}): {error}; make it yield batches that "
            "model(*batch) accepts"
        ) from error
