"""Whether networks that share weights across domains get faster as multiply-adds get fewer: two VGG in onnxruntime.

    python tools/bench/cost/cross_domain_latency.py --clusters 0.5 0.25

Two networks of convolutions with one linear layer go through CrossDomainShare, without training. Each is exported as it
was and as it is, and both files take turns on one thread of the processor. Time should fall as far as multiply-adds do;
the ratio of both ratios is what is lost to the sums in front of layers, and to numbers of channels that are not whole
blocks of the runtime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import graphzip as gz
from graphzip.analysis.cost import cost_of
from graphzip.rewrite.join_models import task_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.side_by_side import side_by_side

TASKS = ("rgb", "flow")


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def network(options: argparse.Namespace) -> nn.Module:
    """The convolutions of a network, and a linear layer."""
    features = getattr(torchvision.models, options.net)().features
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(512, 101))
    return nn.Sequential(OrderedDict(features=features) | head).eval()


def measured(clusters: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each network: multiply-adds and time after sharing, as shares of those before."""
    torch.manual_seed(0)
    models = {name: network(options) for name in TASKS}
    shape = (options.batch, 3, options.size, options.size)
    data = {name: [torch.randn(8, *shape[1:])] for name in TASKS}
    plan = gz.Plan([gz.CrossDomainShare(clusters=clusters, balanced=options.balanced)])
    examples = {name: (torch.randn(shape),) for name in TASKS}
    compiled = gz.compile(models, plan, examples, calibration=data)
    found = []
    for name, model in models.items():
        x = examples[name][0].numpy()
        alone = gz.compile(model, gz.Plan([]), examples[name])
        macs = cost_of(task_of(compiled.traced, name)).macs / alone.report.before.macs
        with tempfile.TemporaryDirectory() as folder:
            compiled.export(folder, per_task=True, verify=False)
            alone.export(Path(folder) / "before.onnx", verify=False)
            runs = [runner(session(Path(folder) / file), x) for file in ("before.onnx", f"{name}.onnx")]
            for run in runs:
                run()
            before, after, ratio = side_by_side(runs[0], runs[1], options.runs)
        row = {"clusters": clusters, "network": name, "before_ms": before, "after_ms": after}
        found.append(row | {"macs": macs, "time": ratio, "lost": ratio / macs})
        print(found[-1], file=sys.stderr)
    return found


def runner(ready: onnxruntime.InferenceSession, x: Any) -> Any:
    feed = {ready.get_inputs()[0].name: x}

    def run() -> float:
        start = time.process_time()
        ready.run(None, feed)
        return time.process_time() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="vgg11_bn", help="a VGG of torchvision")
    parser.add_argument("--clusters", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = [row for clusters in options.clusters for row in measured(clusters, options)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"two {options.net}, {options.batch} images of {options.size} x {options.size}, one thread")
    for column in ("clusters", "network", "before (ms)", "after (ms)", "MACs", "time", "time / MACs"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(
            f"{row['clusters']:g}",
            row["network"],
            *(f"{row[key]:.1f}" for key in ("before_ms", "after_ms")),
            *(f"{100 * row[key]:.1f} %" for key in ("macs", "time")),
            f"{row['lost']:.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
