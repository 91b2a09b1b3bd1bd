"""What was written, and what of it was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    `opset` is that of the file, and `ir_version` the version of its format. `bytes` counts every file; with
    `external_data` the weights lie in a file `<name>.<number>.data` beside the model, under another name at each
    export. `inputs` has the shape of every input in the file, with names for free sizes; `dynamic_batch` tells whether
    a first size is free.

    `verified` is true where the check could have failed: stored weights were compared with the module's, the graph with
    what the module gives, and every output on its own scale. What stands against that is in `unchecked`, a sentence
    each: an output that is the same for all inputs, a random operator, a weight that the file holds in no form that
    can be compared. `notes` are sentences on where the file is right: sizes that are fixed in it or that the module
    refuses, which a file cannot.

    `max_abs_diff` and its `tolerance` are those of the output that came closest to its tolerance, over the calls whose
    input shapes are in `shapes` and whose batches in `batches`; `None` and empty where no output was compared. Where
    every task has a file of its own, `tasks` has the report of each and `path` is their directory. A file that was
    `quantized` (`"int8"`, `"fp16"`) was verified in float first; `max_abs_diff` is then of the quantized one on the
    calibration data, and `tolerance` what is allowed there.
    """

    path: Path
    bytes: int
    opset: int
    external_data: bool
    max_abs_diff: float | None
    tolerance: float | None
    batches: tuple[int, ...]
    dynamic_batch: bool
    tasks: tuple[ExportReport, ...] = ()
    inputs: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    unchecked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quantized: str | None = None
    ir_version: int = 0

    @property
    def verified(self) -> bool:
        """Whether an output was compared and nothing stands against the check."""
        return self.max_abs_diff is not None and not self.unchecked

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {name: value for name, value in vars(self).items() if name != "tasks"}
        return {
            **own,
            "path": str(self.path),
            "verified": self.verified,
            "batches": list(self.batches),
            "inputs": {name: list(sizes) for name, sizes in self.inputs.items()},
            "shapes": [{name: list(sizes) for name, sizes in shapes.items()} for shapes in self.shapes],
            "unchecked": list(self.unchecked),
            "notes": list(self.notes),
            **({"tasks": [report.to_dict() for report in self.tasks]} if self.tasks else {}),
        }

    def __str__(self) -> str:
        files = f" in {len(self.tasks) + 1} files" if self.tasks else " in two files" if self.external_data else ""
        size = f"{self.bytes / 1e6:.2f} MB{files}"
        batch = "any batch" if self.dynamic_batch else "a fixed batch"
        lines = [f"{self.path}: {size}, opset {self.opset}, {batch}, {self._checked()}"]
        lines += [f"not checked: {sentence}" for sentence in self.unchecked]
        return "\n".join([*lines, *self.notes])

    def _checked(self) -> str:
        if self.max_abs_diff is None:
            return "not verified"
        if self.quantized is not None:
            return f"{self.quantized}, off by at most {self.max_abs_diff:.2g} (allowed {self.tolerance:.2g})"
        sizes = ", ".join(str(size) for size in self.batches)
        where = f" at batch {sizes}" if sizes else ""
        how = "verified" if self.verified else "compared, though not with certainty,"
        return (
            f"{how} in onnxruntime{where}: largest difference {self.max_abs_diff:.2g} (tolerance {self.tolerance:.2g})"
        )
