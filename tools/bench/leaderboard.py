"""Every criterion of importance on trained networks, at the same multiply-accumulates: what it keeps, without training.

    python tools/bench/leaderboard.py --net resnet20 --cells leaderboard.json --picture leaderboard.svg

A criterion chooses channels in each group alone (`local`) or of all groups together (`global`); the widest result that
fits the budget counts. It is measured as it is (`raw`), corrected without data (`free`), with the batch norms
re-estimated on unlabelled samples (`norms`), and with its layers re-fitted on the same samples (`compensated`).
Torch-Pruning's criteria stand beside them where it is installed. Criteria that look at gradients, of both, get the
network's own answers as labels; of an encoder's outputs they differentiate random directions. Networks are those of
`planning.py`, with as many unlabelled samples, and two that are trained first. What counts is the share of right
answers on test images, or of embeddings the mean cosine with the original's, in percent. Groups are the inner ones of
ResNets, all of other networks.

With `--agree 0.66` that share of every group stays, and a table says in how many layers criteria of the same formula
choose the same channels as Torch-Pruning's, and how accurate both are as they are.

Cells that are in the file `--cells` are not measured again. Needs the data of the folder GRAPHZIP_DATA (default:
../shared/data beside the repository), as `compare.py` does.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import add_options
from compare_methods import TORCH_PRUNING, Contestant, pruned_at, re_estimated, torch_pruned, widest
from compare_nets import NETS
from planning import SUBJECTS, Kind, cifar_resnet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphzip as gz
from graphzip.plan.criteria import CRITERIA
from graphzip_passes.prune import criteria  # noqa: F401 (registers those that graphzip brings)

REPAIRS = ("raw", "free", "norms", "compensated")
RANKINGS = ("local", "global")
TRAINED_FIRST = ("vgg16-half", "mobilenet-v2")
BOARDS: dict[str, Kind] = {
    **{name: kind for name, kind in SUBJECTS.items() if kind.tests},
    **{name: Kind(functools.partial(cifar_resnet, name), 512, 10_000) for name in TRAINED_FIRST},
}
ENCODER = "all-minilm-l6-v2"
BY_GRADIENTS = ("taylor", "fisher", "hessian")


@dataclass(kw_only=True)
class Ring(Contestant):
    """One in which criteria compete: how good a slimmer one is, in percent, and what is found once for all of them."""

    score: Callable[[nn.Module], float]
    keeps: dict[float, float] = field(default_factory=dict)

    @functools.cached_property
    def trace(self) -> Any:
        return gz.trace(self.model, self.example)

    @property
    def normed(self) -> bool:
        return any(isinstance(each, nn.BatchNorm2d) for each in self.model.modules())

    def keep(self, share: float) -> float:
        """The part of every group that fits the share: widths are alike for all criteria that rank each group alone."""
        if share not in self.keeps:
            self.keeps[share] = widest(lambda keep: self.pruned(keep), share)[0]
        return self.keeps[share]

    @torch.no_grad()
    def answered(self) -> list[tuple[Tensor, Tensor]]:
        """The images, each with the class that the network gives it."""
        return [(x, self.model(x).argmax(1)) for x in self.images]

    def pruned(self, keep: float, data: Any = None, loss: Any = None, **options: Any) -> gz.Compiled:
        plan = gz.Plan([gz.PruneChannels(keep={self.groups: keep}, **options)])
        return gz.compile(self.trace, plan, calibration=data, loss=loss)


@dataclass(frozen=True)
class Entry:
    """Who chooses the channels, by what, and in competition with whom."""

    tool: str
    criterion: str
    ranking: str

    def key(self, net: str, repair: str, share: float, images: int) -> str:
        return f"{net} {self.tool} {self.criterion} {self.ranking} {repair} {share} {images}"

    def repairs(self, ring: Ring) -> tuple[str, ...]:
        possible = REPAIRS if self.tool == "graphzip" else ("raw", "norms")
        return tuple(each for each in possible if each != "norms" or ring.normed)


class Remembered:
    """A criterion that scores each group of a network once, however many results are made of the scores."""

    def __init__(self, ring: Ring, criterion: str) -> None:
        own = CRITERIA[criterion]
        self.function, self.scores = own.function, dict[str, Tensor]()
        gz.register_criterion(f"{criterion}, remembered", self, comparable=own.comparable)
        by_answers = criterion in BY_GRADIENTS and ring.name != ENCODER
        given = (ring.answered(), F.cross_entropy) if by_answers else (ring.images,)
        ring.pruned(0.5, *given, criterion=f"{criterion}, remembered")

    def __call__(self, group: Any) -> Tensor:
        if group.name not in self.scores:
            self.scores[group.name] = torch.as_tensor(self.function(group))
        return self.scores[group.name]


def entries(options: argparse.Namespace, net: str) -> Iterator[Entry]:
    """All that is compared."""
    for criterion in options.criterion:
        yield from (Entry("graphzip", criterion, ranking) for ranking in options.ranking)
    if not options.alone:
        theirs = [each for each in TORCH_PRUNING if net != ENCODER or each.startswith("magnitude")]
        for criterion in theirs:
            yield from (
                Entry("torch-pruning", criterion, each) for each in options.ranking if net != ENCODER or each == "local"
            )


def slim(ring: Ring, entry: Entry, share: float) -> Callable[[str], nn.Module]:
    """The network at that share of its MACs, by how it is repaired; its criterion was remembered before."""
    if entry.tool == "torch-pruning":
        module = torch_pruned(ring, share, entry.criterion, entry.ranking == "global")
        return lambda repair: re_estimated(copy.deepcopy(module), ring.images) if repair == "norms" else module
    how: dict[str, Any] = {"criterion": f"{entry.criterion}, remembered", "ranking": entry.ranking}
    keep = ring.keep(share) if entry.ranking == "local" else widest(lambda each: ring.pruned(each, **how), share)[0]
    raw = ring.pruned(keep, **how).module
    made = {
        "raw": lambda: raw,
        "free": lambda: ring.pruned(keep, compensate="free", **how).module,
        "norms": lambda: re_estimated(copy.deepcopy(raw), ring.images),
        "compensated": lambda: ring.pruned(keep, ring.images, compensate="data", **how).module,
    }
    return lambda repair: made[repair]()


def ring_of(name: str, options: argparse.Namespace) -> Ring:
    subject = BOARDS[name].make(BOARDS[name].samples, options.images, options.cells.with_suffix(f".{name}"))
    if name == ENCODER:
        subject.model.transformer.pooler = None  # embeddings are means of hidden states, which it does not make
    assert subject.score is not None
    judge, groups = subject.score, NETS[name].groups if name in NETS else "*"

    def score(net: nn.Module) -> float:
        found = judge(net.eval())
        return found["accuracy"] if "accuracy" in found else 100 * found["cosine"]

    return Ring(name=name, model=subject.model, images=subject.batches, groups=groups, score=score)


def run(options: argparse.Namespace) -> dict[str, float]:
    """Measure the cells that are not in the file yet."""
    cells: dict[str, float] = json.loads(options.cells.read_text()) if options.cells.exists() else {}
    for net in options.net:
        ring, remembered = ring_of(net, options), ""
        for entry in entries(options, net):
            for share in options.share:
                keys = {repair: entry.key(net, repair, share, options.images) for repair in entry.repairs(ring)}
                missing = {repair: key for repair, key in keys.items() if key not in cells}
                if not missing:
                    continue
                if entry.tool == "graphzip" and entry.criterion != remembered:
                    Remembered(ring, remembered := entry.criterion)
                module = slim(ring, entry, share)
                cells |= {key: ring.score(module(repair)) for repair, key in missing.items()}
                options.cells.write_text(json.dumps(cells, indent=1))
                print({key: cells[key] for key in missing.values()}, file=sys.stderr)
    return cells


def rows(cells: dict[str, float], net: str, options: argparse.Namespace) -> Iterator[list[str]]:
    """The heads of the columns, then a row for each criterion: its name, and a cell for each budget and repair."""
    columns = [
        (share, repair)
        for share in options.share
        for repair in REPAIRS
        if any(entry.key(net, repair, share, options.images) in cells for entry in entries(options, net))
    ]
    yield ["criterion", *(f"{round(100 * (1 - share))} % fewer, {repair}" for share, repair in columns)]
    for entry in entries(options, net):
        found = [cells.get(entry.key(net, repair, share, options.images)) for share, repair in columns]
        name = f"{entry.criterion}, {entry.ranking}" + (" (Torch-Pruning)" * (entry.tool != "graphzip"))
        yield [name, *("" if cell is None else f"{cell:.2f}" for cell in found)]


def table(cells: dict[str, float], net: str, options: argparse.Namespace) -> Table:
    """To be printed."""
    heads, *found = rows(cells, net, options)
    rendered = Table(heads[0], title=net)
    for head in heads[1:]:
        rendered.add_column(head.replace(", ", "\n"), justify="right")
    for row in found:
        rendered.add_row(*row)
    return rendered


def markdown(cells: dict[str, float], net: str, options: argparse.Namespace) -> str:
    """The same as a table of a page."""
    heads, *found = rows(cells, net, options)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *found]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TWINS = {"group_l1": "magnitude-l1", "group_l2": "magnitude-l2", "bn_scale": "bn-scale"}
"""Criteria, and those of Torch-Pruning that have the same formula."""


def agreement(ring: Ring, keep: float, rankings: list[str]) -> Table:
    """A row for each pair of criteria and each ranking."""
    heads = ("criterion", "of Torch-Pruning", "layers alike", "raw", "raw, theirs")
    rendered = Table(*heads, title=f"{ring.name}, {keep}")
    for (ours, theirs), ranking in itertools.product(TWINS.items(), rankings):
        found = ring.pruned(keep, criterion=ours, ranking=ranking).module
        other = pruned_at(ring, 1 - keep, theirs, ranking == "global")
        twins = dict(other.named_parameters())
        weights = [name for name, each in found.named_parameters() if each.dim() > 2]
        alike = sum(
            found.get_parameter(name).shape == twins[name].shape and torch.equal(found.get_parameter(name), twins[name])
            for name in weights
        )
        scores = (f"{ring.score(each):.2f}" for each in (found, other))
        rendered.add_row(f"{ours}, {ranking}", theirs, f"{alike} of {len(weights)}", *scores)
    return rendered


COLOURS = {"raw": "#999999", "free": "#e69f00", "norms": "#56b4e9", "compensated": "#009e73"}


def draw(cells: dict[str, float], options: argparse.Namespace) -> None:
    """A line for each criterion and a dot for each repair, hollow where groups compete; a panel per network, budget."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(4 * len(options.share), 1 + 6 * len(options.net)), layout="constrained")
    axes = figure.subplots(len(options.net), len(options.share), squeeze=False, sharey="row")
    for row, net in zip(axes, options.net, strict=True):
        for panel, share in zip(row, options.share, strict=True):
            lines = [
                (each, each.criterion + ", Torch-Pruning" * (each.tool != "graphzip")) for each in entries(options, net)
            ]
            for repair, ranking in itertools.product(REPAIRS, options.ranking):
                mine = [
                    (each.key(net, repair, share, options.images), line)
                    for each, line in lines
                    if each.ranking == ranking
                ]
                if dots := [(cells[key], line) for key, line in mine if key in cells]:
                    face = COLOURS[repair] if ranking == "local" else "none"
                    panel.scatter(*zip(*dots, strict=True), 30, facecolor=face, edgecolor=COLOURS[repair])
            panel.set_title(f"{net}, {round(100 * (1 - share))} % fewer MACs")
            panel.grid(axis="y", alpha=0.3)
        row[0].invert_yaxis()
    filled = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in COLOURS.items()]
    hollow = [Line2D([], [], marker="o", linestyle="", color="black", fillstyle="none", label="global ranking")]
    figure.legend(handles=[*filled, *hollow], loc="outside lower center", ncols=5)
    figure.savefig(options.picture)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, nets=["resnet20"], cells="leaderboard.json", choices=BOARDS)
    parser.add_argument("--criterion", nargs="+", choices=[*CRITERIA], default=[*CRITERIA])
    parser.add_argument("--ranking", nargs="+", choices=RANKINGS, default=list(RANKINGS))
    parser.add_argument("--alone", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--agree", type=float, help="share of channels at which choices are compared, and nothing else")
    parser.add_argument("--markdown", action="store_true", help="print tables of a page")
    parser.add_argument("--picture", type=Path, help="a file to draw (.svg, .png)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    if options.agree is not None:
        for net in options.net:
            console.print(agreement(ring_of(net, options), options.agree, options.ranking))
        return 0
    cells = run(options)
    console.print(f"{options.images:,} test samples, no training")
    for net in options.net:
        print(markdown(cells, net, options)) if options.markdown else console.print(table(cells, net, options))
    if options.picture is not None:
        draw(cells, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
