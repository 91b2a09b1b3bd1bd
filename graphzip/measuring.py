"""Figures of a model before and after: what the card shows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphzip.analysis.cost import Cost
from graphzip.errors import GraphZipError
from graphzip.graph.source import first_line
from graphzip.progress import counted, step
from graphzip.report.card import Card, Figures
from graphzip.runtime.inference import latencies_of, machine, memory_of

__all__ = ["MeasuredState", "measured"]


@dataclass(frozen=True)
class MeasuredState:
    """A model to measure: its name on the card, bytes of its weights, its cost, and what writes its ONNX file, not
    verified, to a path, and tells its bytes.
    """

    name: str
    bytes: int
    cost: Cost
    write: Callable[[Path], int]
    drift: float | None = None


def measured(states: Sequence[MeasuredState], leaves: Sequence[torch.Tensor], batches: Sequence[int]) -> Card:
    """A card of these states, whose times are taken by turns.

    `leaves` are the tensors of the example inputs in the order of the files' inputs. A model of which no file can be
    written, or that onnxruntime does not run, has no time and no memory, and a note says why.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        sizes: dict[str, int] = {}
        for number, state in enumerate(counted(states, "writing", [state.name for state in states])):
            file = Path(folder) / f"{number}.onnx"
            try:
                sizes[state.name] = state.write(file)
                files[state.name] = file
            except GraphZipError as error:
                notes.append(f"{state.name}: no time in onnxruntime, for no file can be written: {first_line(error)}")
        step("measuring latency and memory in onnxruntime")
        times = _times(files, leaves, batches, notes)
        memory = {name: memory_of(files[name], leaves) for name in times}
    figures = [
        Figures(
            state.name,
            state.cost.params,
            state.cost.macs,
            state.bytes,
            sizes.get(state.name),
            memory.get(state.name),
            times.get(state.name, ()),
            state.drift,
        )
        for state in states
    ]
    return Card(tuple(figures), machine(), (*notes, *slower(figures)))


def slower(figures: Sequence[Figures]) -> list[str]:
    """What is to be said where the last state computes less than the first and takes longer."""
    first, last = figures[0], figures[-1]
    longer = any(
        new.low > old.high for old, new in zip(first.latencies, last.latencies, strict=False) if old.batch == new.batch
    )
    if not longer or last.macs >= first.macs:
        return []
    return [
        f"{last.name} computes less and takes longer: onnxruntime is fast where widths are multiples of 8; "
        "target='onnxruntime-cpu' or round_to=8 finds such ones"
    ]


def _times(
    files: Mapping[str, Path], leaves: Sequence[torch.Tensor], batches: Sequence[int], notes: list[str]
) -> dict[str, Any]:
    try:
        return dict(zip(files, latencies_of(list(files.values()), leaves, batches=batches), strict=True))
    except Exception as error:  # onnxruntime's, which have no class of their own; or of a type that numpy has not
        notes.append(f"no time in onnxruntime: {first_line(error)}")
        return {}
