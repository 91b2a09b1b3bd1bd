"""Draw the pictures of the manual, from what the analysis finds: `python tools/manual/pictures.py`.

Each is a network of two layers that are added up and one behind them, as its weights stand: a row of a weight is an
output, a column an input, the numbers beside them are channels, and channels have colours.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
from torch import Tensor, nn

from graphzip.analysis.channels import Analysis, analyse
from graphzip.rewrite.merge import merge_channels
from graphzip.tracing.trace import trace

__all__ = ["FOLDER", "pictures"]

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
COLOURS = ("#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc", "#fc9272", "#d9d9d9")
NO_COLOUR = "#ffffff"
CELL, GAP, TOP = 26, 44, 46


class Sum(nn.Module):
    """`head(relu(left(x) + right(x)))`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3) to (n, 2)."""
        logits: Tensor = self.head((self.left(x) + self.right(x)).relu())
        return logits


class Sheet:
    """Rectangles and words, put down one by one."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.width, self.height = 0, 0

    def word(self, x: int, y: int, text: str, size: int = 13, anchor: str = "middle") -> None:
        """Text around a point."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="#222222">{escape(text)}</text>'
        )
        self.width, self.height = max(self.width, x), max(self.height, y + size)

    def cell(self, x: int, y: int, colour: str) -> None:
        """A square of a weight."""
        place = f'x="{x}" y="{y}" width="{CELL}" height="{CELL}"'
        self.parts.append(f'<rect {place} fill="{colour}" stroke="#555555" stroke-width="0.8"/>')
        self.width, self.height = max(self.width, x + CELL), max(self.height, y + CELL)

    def svg(self, told: str) -> str:
        """The whole file; `told` is what a reader hears who cannot see it."""
        width, height = self.width + 20, self.height + 16
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="sans-serif" role="img">',
                f"<title>{escape(told)}</title>",
                f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def grid(
    sheet: Sheet, name: str, left: int, rows: Sequence[int], columns: Sequence[int], colours: Mapping[int, str]
) -> int:
    """A weight with the channels of its rows and columns, coloured by whichever of them has a colour; where it ends."""
    sheet.word(left + len(columns) * CELL // 2, TOP - 26, name)
    for j, channel in enumerate(columns):
        sheet.word(left + j * CELL + CELL // 2, TOP - 6, str(channel), 11)
    for i, row in enumerate(rows):
        sheet.word(left - 10, TOP + i * CELL + CELL // 2 + 4, str(row), 11)
        for j, column in enumerate(columns):
            sheet.cell(left + j * CELL, TOP + i * CELL, colours.get(row, colours.get(column, NO_COLOUR)))
    return left + len(columns) * CELL + GAP


def weights_of(analysis: Analysis) -> dict[str, list[list[int]]]:
    """Of each weight the channels of its rows and of its columns."""
    found: dict[str, list[list[int]]] = {}
    for axis in analysis.propagation.params:
        if axis.param.endswith("weight"):
            found.setdefault(axis.param, []).append(analysis.fine.classes[axis.labels].ravel().tolist())
    return found


def pictures() -> dict[str, str]:
    """The text of each picture, by the name of its file."""
    torch.manual_seed(0)
    traced = trace(Sum(), (torch.randn(2, 3),))
    analysis = analyse(traced.graph)
    every = weights_of(analysis)
    shared = every["left.weight"][0]
    assert shared == every["right.weight"][0] == every["head.weight"][1]
    colours = dict(zip(shared, COLOURS, strict=False))
    labels = Sheet()
    at = 34
    for name, (rows, columns) in every.items():
        at = grid(labels, name, at, rows, columns, colours)
    clusters = ((0, 1), (2,), (3,))
    merged, _ = merge_channels(traced, analysis, [(False, np.asarray(shared), clusters)])
    shapes = {name: tuple(value.shape) for name, value in merged.module.named_parameters()}
    kept = [shared[cluster[0]] for cluster in clusters]
    assert shapes["left.weight"] == (len(kept), 3)
    assert shapes["head.weight"] == (2, len(kept))
    pull = Sheet()
    together = {shared[i]: COLOURS[number] for number, cluster in enumerate(clusters) for i in cluster}
    at = 34
    for name in ("left.weight", "head.weight"):
        rows, columns = every[name]
        at = grid(pull, name, at, rows, columns, together)
        pull.word(at - GAP + 22, TOP + CELL + 4, "\N{RIGHTWARDS ARROW}", 18)
        rows, columns = (kept, columns) if name == "left.weight" else (rows, kept)
        at = grid(pull, "merged", at + 24, rows, columns, together) + 10
    return {
        "labels.svg": labels.svg("The outputs of left and right are the same four channels, and head reads them"),
        "merge.svg": pull.svg(
            "Channels of one cluster become one row of what makes them, one column of what reads them"
        ),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
