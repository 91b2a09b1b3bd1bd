"""Plans for a budget of latency beside plans whose multiply-accumulates are bisected until they are as fast.

    python tools/bench/latency_budget.py --net resnet20 resnet56 --share 0.7 0.5

`gz.WidthStudy.plan(latency=...)` is steered by what layers are measured to take at some of their widths; the other plan
is the one for a share of the multiply-accumulates, the largest that is measured to meet the same latency. Both are of
one study, and are timed in onnxruntime by turns after they are compiled; what they keep is the accuracy on the test
images of CIFAR-10. Data is that of the folder GRAPHZIP_DATA (default: ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from planning import SUBJECTS, Subject, told
from rich.console import Console
from rich.table import Table

import graphzip as gz
from graphzip.runtime.inference import latencies_of

TRIES = 7


def milliseconds(files: dict[str, Path], subject: Subject) -> dict[str, float]:
    """Medians for one sample, all by turns."""
    found = latencies_of(list(files.values()), list(subject.example), batches=(1,))
    return {name: times[0].median for name, times in zip(files, found, strict=True)}


def exported(model: Any, file: Path, subject: Subject) -> Path:
    """The file of a model."""
    compiled = gz.compile(model, gz.Plan([gz.FoldBatchNorm()]), subject.example)
    compiled.export(file, verify=False)
    return file


def shape_of(subject: Subject, plan: gz.Plan) -> Any:
    """A model of the plan's widths, whose weights are of no matter."""
    (merge,) = plan.passes
    assert isinstance(merge, gz.ClusterMerge)
    even = gz.Plan([gz.ClusterMerge(keep=merge.keep, clustering="even")])
    return gz.compile(subject.model, even, subject.example).module


def by_macs(study: gz.WidthStudy, subject: Subject, share: float, folder: Path) -> gz.Plan:
    """The plan for the most multiply-accumulates that is measured to meet the latency."""
    whole, low, high, best = exported(subject.model, folder / "whole.onnx", subject), 0.0, 1.0, None
    for _ in range(TRIES):
        middle = (low + high) / 2
        try:
            plan = study.plan(macs=middle)
        except gz.PlanError:
            low = middle
            continue
        files = {"whole": whole, "slim": exported(shape_of(subject, plan), folder / "slim.onnx", subject)}
        taken = milliseconds(files, subject)
        fits = taken["slim"] <= share * taken["whole"]
        low, high, best = (middle, high, plan) if fits else (low, middle, best)
    if best is None:
        raise SystemExit(f"no share of the multiply-accumulates has {share} of the latency")
    return best


def row(subject: Subject, plans: dict[str, gz.Plan], folder: Path) -> dict[str, dict[str, float]]:
    """By plan its share of the latency and of the multiply-accumulates, and its accuracy."""
    files = {"whole": exported(subject.model, folder / "whole.onnx", subject)}
    found: dict[str, dict[str, float]] = {}
    for name, plan in plans.items():
        compiled = gz.compile(subject.model, plan, subject.example, calibration=subject.batches)
        files[name] = folder / f"{name}.onnx"
        compiled.export(files[name], verify=False)
        cost = compiled.report
        assert subject.score is not None
        found[name] = {"macs": cost.after.macs / cost.before.macs} | subject.score(compiled.module.eval())
    taken = milliseconds(files, subject)
    return {name: each | {"latency": taken[name] / taken["whole"]} for name, each in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=["resnet20", "resnet56"], default=["resnet20"])
    parser.add_argument("--share", nargs="+", type=float, default=[0.7, 0.5], help="of the latency")
    parser.add_argument("--tests", type=int, default=10_000)
    options = parser.parse_args()
    table = Table("network", "latency", "plan", "latency measured", "MACs", "% right")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.net:
            kind = SUBJECTS[name]
            subject = kind.make(kind.samples, options.tests, Path(f"planning.{name}"))
            study = gz.WidthStudy(subject.model, subject.example, calibration=subject.batches, effort="fast")
            study.measure(told)
            for share in options.share:
                plans = {
                    "measured layers": study.plan(told, latency=share),
                    "multiply-accumulates": by_macs(study, subject, share, Path(folder)),
                }
                for plan, found in row(subject, plans, Path(folder)).items():
                    cells = (f"{found['latency']:.3f}", f"{found['macs']:.3f}", f"{found['accuracy']:.2f}")
                    table.add_row(name, f"{share:g}", plan, *cells)
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(main())
