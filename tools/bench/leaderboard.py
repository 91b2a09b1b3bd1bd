"""Every criterion of importance on trained networks, at the same multiply-accumulates: what it keeps, without training.

    python tools/bench/leaderboard.py --net resnet20 --cells leaderboard.json --picture leaderboard.svg

A criterion chooses channels in each group alone (`local`) or of all groups together (`global`); the widest result that
fits the budget counts. It is measured as it is (`raw`), corrected without data (`free`), with the batch norms
re-estimated on 512 unlabelled images (`norms`), and with its layers re-fitted on the same images (`compensated`).
Criteria that look at gradients differentiate the outputs in random directions. Torch-Pruning's criteria stand beside
them where it is installed: the model's own answers are the labels of those that need some. Accuracy is the share of
right answers on the test images, in percent. Groups are the inner ones of ResNets, all of other networks.

With `--agree 0.66` that share of every group stays, and a table says in how many layers criteria of the same formula
choose the same channels as Torch-Pruning's, and how accurate both are as they are.

Cells that are in the file `--cells` are not measured again. Needs the data of the folder GRAPHZIP_DATA (default:
../shared/data beside the repository), as `compare.py` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import accuracy, data_folder
from compare import UNLABELLED, add_options, load
from compare_methods import TORCH_PRUNING, Bench, pruned_at, re_estimated, torch_pruned, widest
from rich.console import Console
from rich.table import Table
from torch import nn

import graphzip as gz
from graphzip.plan.criteria import CRITERIA
from graphzip_passes.prune import criteria  # noqa: F401 (registers those that graphzip brings)

REPAIRS = ("raw", "free", "norms", "compensated")
RANKINGS = ("local", "global")


@dataclass(frozen=True)
class Entry:
    """Who chooses the channels, by what, and in competition with whom."""

    tool: str
    criterion: str
    ranking: str

    def key(self, net: str, repair: str, share: float, images: int) -> str:
        return f"{net} {self.tool} {self.criterion} {self.ranking} {repair} {share} {images}"

    @property
    def repairs(self) -> tuple[str, ...]:
        return REPAIRS if self.tool == "graphzip" else ("raw", "norms")


def entries(options: argparse.Namespace) -> Iterator[Entry]:
    """All that is compared."""
    for criterion in options.criterion:
        yield from (Entry("graphzip", criterion, ranking) for ranking in options.ranking)
    if not options.alone:
        for criterion in TORCH_PRUNING:
            yield from (Entry("torch-pruning", criterion, ranking) for ranking in options.ranking)


def slim(bench: Bench, entry: Entry, share: float) -> Callable[[str], nn.Module]:
    """The network at that share of its MACs, by how it is repaired."""
    if entry.tool == "torch-pruning":
        module = torch_pruned(bench, share, entry.criterion, entry.ranking == "global")
        return lambda repair: re_estimated(copy.deepcopy(module), bench.images) if repair == "norms" else module
    trace = gz.trace(bench.model, bench.example)

    def compiled(keep: float, repair: str = "raw", criterion: str = entry.criterion) -> gz.Compiled:
        compensate = {"compensated": "data", "free": "free"}.get(repair, "none")
        options: Any = {"criterion": criterion, "ranking": entry.ranking, "compensate": compensate}
        plan = gz.Plan([gz.PruneChannels(keep={bench.groups: keep}, **options)])
        return gz.compile(
            trace, plan, calibration=bench.images if repair == "compensated" or criterion != "l1" else None
        )

    if entry.ranking == "local":  # the widths are alike for all criteria, so the cheapest finds them
        keep = widest(lambda each: compiled(each, criterion="l1"), share)[0]
        raw = compiled(keep).module
    else:
        keep, found = widest(compiled, share)
        raw = found.module
    made = {
        "raw": lambda: raw,
        "free": lambda: compiled(keep, "free").module,
        "norms": lambda: re_estimated(copy.deepcopy(raw), bench.images),
        "compensated": lambda: compiled(keep, "compensated").module,
    }
    return lambda repair: made[repair]()


def run(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Measure the cells that are not in the file yet."""
    cells: dict[str, float] = json.loads(options.cells.read_text()) if options.cells.exists() else {}
    for net in options.net:
        bench = load(net, folder, options)
        for entry in entries(options):
            for share in options.share:
                keys = {repair: entry.key(net, repair, share, options.images) for repair in entry.repairs}
                missing = {repair: key for repair, key in keys.items() if key not in cells}
                if missing:
                    module = slim(bench, entry, share)
                    cells |= {key: accuracy(module(repair), *bench.test) for repair, key in missing.items()}
                    options.cells.write_text(json.dumps(cells, indent=1))
                    print({key: cells[key] for key in missing.values()}, file=sys.stderr)
    return cells


def table(cells: dict[str, float], net: str, options: argparse.Namespace) -> Table:
    """A row for each criterion, a column for each budget and repair."""
    rendered = Table("criterion", title=net)
    columns = [(share, repair) for share in options.share for repair in REPAIRS]
    for share, repair in columns:
        rendered.add_column(f"{round(100 * (1 - share))} % fewer\n{repair}", justify="right")
    for entry in entries(options):
        found = [cells.get(entry.key(net, repair, share, options.images)) for share, repair in columns]
        name = f"{entry.criterion}, {entry.ranking}" + (" (Torch-Pruning)" * (entry.tool != "graphzip"))
        rendered.add_row(name, *("" if cell is None else f"{cell:.2f}" for cell in found))
    return rendered


TWINS = {"group_l1": "magnitude-l1", "group_l2": "magnitude-l2", "bn_scale": "bn-scale"}
"""Criteria, and those of Torch-Pruning that have the same formula."""


def agreement(bench: Bench, keep: float) -> Table:
    """A row for each pair of criteria."""
    rendered = Table(
        "criterion", "of Torch-Pruning", "layers alike", "raw", "raw, theirs", title=f"{bench.name}, {keep}"
    )
    trace = gz.trace(bench.model, bench.example)
    for ours, theirs in TWINS.items():
        plan = gz.Plan([gz.PruneChannels(keep={bench.groups: keep}, criterion=ours)])
        found, other = gz.compile(trace, plan).module, pruned_at(bench, 1 - keep, theirs, False)
        twins = dict(other.named_parameters())
        weights = [name for name, each in found.named_parameters() if each.dim() > 2]
        alike = sum(
            found.get_parameter(name).shape == twins[name].shape and torch.equal(found.get_parameter(name), twins[name])
            for name in weights
        )
        scores = (f"{accuracy(each, *bench.test):.2f}" for each in (found, other))
        rendered.add_row(ours, theirs, f"{alike} of {len(weights)}", *scores)
    return rendered


def draw(cells: dict[str, float], options: argparse.Namespace) -> None:
    """A line for each criterion from raw over norms to compensated, a panel for each network and budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(options.share), 4 * len(options.net)), layout="constrained")
    axes = figure.subplots(len(options.net), len(options.share), squeeze=False, sharey="row")
    for row, net in zip(axes, options.net, strict=True):
        for panel, share in zip(row, options.share, strict=True):
            for entry in entries(options):
                found = [cells.get(entry.key(net, repair, share, options.images)) for repair in entry.repairs]
                style = "o-" if entry.tool == "graphzip" else "x--"
                panel.plot(entry.repairs, found, style, alpha=0.5, label=f"{entry.criterion}, {entry.ranking}")
            panel.set_title(f"{net}, {round(100 * (1 - share))} % fewer MACs")
        row[0].set_ylabel("right, percent")
    figure.savefig(options.picture)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, nets=["resnet20"], cells="leaderboard.json")
    parser.add_argument("--criterion", nargs="+", choices=[*CRITERIA], default=[*CRITERIA])
    parser.add_argument("--ranking", nargs="+", choices=RANKINGS, default=list(RANKINGS))
    parser.add_argument("--alone", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--agree", type=float, help="share of channels at which choices are compared, and nothing else")
    parser.add_argument("--picture", type=Path, help="a file to draw (.svg, .png)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    if options.agree is not None:
        for net in options.net:
            console.print(agreement(load(net, data_folder(), options), options.agree))
        return 0
    cells = run(options, data_folder())
    console.print(f"CIFAR-10, {options.images:,} test images, {UNLABELLED} unlabelled images, no training")
    for net in options.net:
        console.print(table(cells, net, options))
    if options.picture is not None:
        draw(cells, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
