"""What the commands print: text for people, dictionaries for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphzip.report.tables import Before, change, comparison_table, file_size, quantity

if TYPE_CHECKING:
    from graphzip import Compiled, ExportReport
    from graphzip.commands.demo import DemoResult, Measured

__all__ = ["compile_dict", "compile_text", "demo_dict", "demo_text"]


def compile_text(compiled: Compiled, exported: ExportReport | None, saved: Path | None) -> str:
    """The report of a compilation and one line per file written."""
    lines = [str(compiled.report)]
    if exported is not None:
        lines += ["", str(exported)]
    if saved is not None:
        reader = "transformers" if saved.is_dir() else "graphzip.load"
        lines += ["", f"{saved}: the trainable module; read it with {reader}"]
    return "\n".join(lines)


def compile_dict(compiled: Compiled, exported: ExportReport | None, saved: Path | None) -> dict[str, Any]:
    """JSON-ready: the report, what was exported and where the module was saved (`None` where it was not)."""
    return {
        "report": compiled.report.to_dict(),
        "export": exported.to_dict() if exported is not None else None,
        "saved": str(saved) if saved is not None else None,
    }


def demo_text(result: DemoResult) -> str:
    """The channel groups of the demo's network, and what merging half of them changed."""
    lines = [str(result.groups), "", comparison_table(_compared(result.before, result.after))]
    if result.files:
        lines += ["", *(f"wrote {file}" for file in result.files)]
    return "\n".join(lines)


def demo_dict(result: DemoResult) -> dict[str, Any]:
    """JSON-ready: channel groups, the figures before and after, and the files that were kept."""
    return {
        "groups": result.groups.to_dict(),
        "before": result.before.to_dict(),
        "after": result.after.to_dict(),
        "files": [str(file) for file in result.files],
    }


def _compared(before: Measured, after: Measured) -> Sequence[Before]:
    points = 100 * (after.accuracy - before.accuracy)
    return [
        Before("test accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", f"{points:+.2f} points"),
        Before("parameters", *_counts(before.params, after.params)),
        Before("MACs per image", *_counts(before.macs, after.macs)),
        Before("ONNX file", file_size(before.bytes), file_size(after.bytes), change(before.bytes, after.bytes)),
        Before(
            f"onnxruntime, {before.batch} images",
            f"{before.latency_ms:.2f} ms",
            f"{after.latency_ms:.2f} ms",
            change(before.latency_ms, after.latency_ms),
        ),
    ]


def _counts(before: int, after: int) -> tuple[str, str, str]:
    return quantity(before), quantity(after), change(before, after)
