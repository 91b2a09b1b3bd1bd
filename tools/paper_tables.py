"""The tables of the five papers that follow from arithmetic: what is printed beside what graphzip counts.

    python tools/paper_tables.py --only 'vgg_*' --json
    python tools/paper_tables.py --only 'csg_*'

The MAC and parameter cuts of C-SGD's tables 1 and 3 to 6 come from compiling each plan on a freshly built network;
those of ACDC, CSG, MTZ and Cross-Domain from `tools/paper_counts.py`. Source of the first: Ding et al., "Manipulating
Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN"; the plans are in `examples/plans`.
Multiply-accumulates are for one image. Cuts do not depend on which channels share a cluster, so even clusters stand in
for k-means. A printed figure that the printed widths do not give is said to differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import paper_nets as nets
import torch
from paper_counts import COUNTED, Counted
from rich.console import Console
from rich.table import Table
from torch import nn

import graphzip as gz

PLANS = Path(__file__).resolve().parent.parent / "examples" / "plans"
CLOSE = 0.025  # points: the printed figures have two digits, some cut off and not rounded
CLOSE_PARAMS = 0.5  # points: what is counted besides kernels differs


@dataclass(frozen=True)
class Printed:
    """A row of the paper: cuts in percent, as printed, and what is to be said where ours differ."""

    plan: str
    result: str
    build: Callable[[], nn.Module]
    macs: float
    params: float
    remark: str = ""


@dataclass(frozen=True)
class Found:
    """Our figures for one row, in percent less than the original."""

    plan: str
    result: str
    macs: float
    macs_paper: float
    params: float
    params_paper: float
    follows: bool
    remark: str


def torchvision(name: str) -> Callable[[], nn.Module]:
    """A factory of a torchvision network with random weights."""

    def build() -> nn.Module:
        import torchvision.models

        model: nn.Module = getattr(torchvision.models, name)(weights=None)
        return model

    return build


_VGG_B = "the widths of table 2 give this; 75.15 needs narrower ones"
_DENSE40 = "with stem and transitions whole; no choice for them gives both printed figures"

ROWS = (
    Printed("vgg_a", "VGG-A", nets.CifarVgg, 61.69, 86.28),
    Printed("vgg_b", "VGG-B", nets.CifarVgg, 75.15, 90.09, _VGG_B),
    Printed("vgg_c", "VGG-C", nets.CifarVgg, 85.02, 96.54),
    Printed("vgg_d", "VGG-D", nets.CifarVgg, 90.12, 97.95),
    Printed("resnet56_10_20_40", "Res56-10-20-40", lambda: nets.CifarResNet(9), 60.85, 60.90),
    Printed("resnet110_10_20_40", "Res110-10-20-40", lambda: nets.CifarResNet(18), 60.89, 60.92),
    Printed("resnet164_12_24_46", "Res164-12-24-46", lambda: nets.CifarResNet(27), 45.24, 54.75),
    Printed("resnet164_10_20_40", "Res164-10-20-40", lambda: nets.CifarResNet(27), 60.91, 60.93),
    Printed("densenet40_5_8_10", "Dense40-5-8-10", nets.DenseNet40, 60.05, 36.16, _DENSE40),
    Printed("resnet50_70", "Res50-70", nets.ResNet50, 36.75, 33.38),
    Printed("resnet50_60", "Res50-60", nets.ResNet50, 46.24, 42.83),
    Printed("resnet50_50", "Res50-50", nets.ResNet50, 55.76, 51.50),
    Printed("resnet50_70", "Res50B-70", torchvision("resnet50"), 36.38, 33.38),
    Printed("resnet50_60", "Res50B-60", torchvision("resnet50"), 46.51, 42.83),
    Printed("resnet50_50", "Res50B-50", torchvision("resnet50"), 55.44, 51.50),
    Printed("densenet121_a", "Dense121-A", torchvision("densenet121"), 34.65, 21.53),
    Printed("densenet121_b", "Dense121-B", torchvision("densenet121"), 42.28, 29.89),
)


def compute(row: Printed) -> Found:
    """Compile the row's plan and count."""
    plan = gz.Plan.load(PLANS / f"{row.plan}.yaml")
    options = plan.passes[0].model_copy(update={"clustering": "even"})
    assert plan.inputs is not None
    inputs = tuple(torch.zeros(shape) for shape in plan.inputs)
    report = gz.compile(row.build().eval(), gz.Plan([options]), inputs).report
    macs, params = (
        100 * (1 - after / before)
        for before, after in (
            (report.before.macs, report.after.macs),
            (report.before.params, report.after.params),
        )
    )
    follows = abs(macs - row.macs) < CLOSE
    remark = "" if follows else row.remark or "the printed MACs do not follow from the printed widths"
    if follows and abs(params - row.params) > CLOSE_PARAMS:
        remark = "the printed parameters do not follow from the printed widths"
    return Found(row.plan, row.result, macs, row.macs, params, row.params, follows, remark)


def found(pattern: str) -> Iterator[Found]:
    """Figures of the rows whose plan matches."""
    for row in ROWS:
        if fnmatchcase(row.plan, pattern):
            print(row.result, file=sys.stderr)
            yield compute(row)


def counted(row: Counted) -> dict[str, Any]:
    """Ours and what is printed, under the names that C-SGD's rows have; sizes are no cuts, which `unit` says."""
    ours = row.count()
    follows = row.follows(ours)
    remark = "" if follows else row.remark or "does not follow"
    named = {"paper": row.paper, "table": row.table, "result": row.result, "unit": row.unit}
    figures = {"macs": None, "macs_paper": None, "params": ours, "params_paper": row.printed}
    return {**named, **figures, "digits": row.digits, "follows": follows, "remark": remark}


def other(rows: list[dict[str, Any]]) -> Table:
    """The sizes of the other papers."""
    rendered = Table(title="sizes")
    for column in ("paper", "table", "result", "ours", "paper", "unit", ""):
        rendered.add_column(column, justify="right" if column == "ours" else "left")
    for row in rows:
        numbers = (f"{row[name]:,.{row['digits']}f}" for name in ("params", "params_paper"))
        rendered.add_row(row["paper"], row["table"], row["result"], *numbers, row["unit"], row["remark"])
    return rendered


def table(rows: list[Found]) -> Table:
    """Ours beside the paper's."""
    rendered = Table(title="less than the original (%)")
    for column in ("result", "MACs", "paper", "parameters", "paper"):
        rendered.add_column(column, justify="left" if column == "result" else "right")
    rendered.add_column("")
    for row in rows:
        numbers = (row.macs, row.macs_paper, row.params, row.params_paper)
        rendered.add_row(row.result, *(f"{number:.2f}" for number in numbers), row.remark)
    return rendered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob of plan names, or of acdc_*, csg_*, mtz_*, cross-domain_*")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows, sizes = list(found(options.only)), []
    for row in COUNTED:
        if fnmatchcase(row.key, options.only):
            print(f"{row.paper}: {row.result}", file=sys.stderr)
            sizes.append(counted(row))
    if options.json:
        print(json.dumps([*({"paper": "C-SGD", **asdict(row)} for row in rows), *sizes], indent=2))
    else:
        console = Console(width=130)
        if rows:
            console.print(table(rows))
        if sizes:
            console.print(other(sizes))


if __name__ == "__main__":
    main()
