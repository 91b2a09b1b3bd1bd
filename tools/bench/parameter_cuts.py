"""How many parameters half the width takes away, beside Torch-Pruning, on every classifier of torchvision.

    pip install torch-pruning
    python tools/bench/parameter_cuts.py --out cuts.jsonl
    python tools/bench/parameter_cuts.py resnet50 vit_b_16

graphzip compiles with `ClusterMerge(keep=0.5, clustering="even")` and no other help. Torch-Pruning runs with a ratio of
0.5 and what its own benchmark on torchvision gives it: the classifier and the output projections of
`nn.MultiheadAttention` left out, widths of vision transformers rounded to their number of heads, and their `hidden_dim`
set afterwards. Its result counts where a forward pass still gives the 1,000 finite outputs, for two images as for one.
Each model has a process of its own; one that fails in either is listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from each_model import add_options, child, main_loop
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphzip as gz

CLASSES = 1000
SIZES = {"inception_v3": 96, "alexnet": 96, "vit_": 224, "maxvit_t": 224, "swin_": 96, "swin_v2": 128}
"""Height and width of the image by the start of the name, 64 for the others: the parameters are the same."""


def ours(model: nn.Module, x: Tensor) -> nn.Module:
    return gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even")]), (x,)).module


def torch_pruning(model: nn.Module, x: Tensor) -> nn.Module:
    import torch_pruning as tp
    from torchvision.models import VisionTransformer

    projections = nn.modules.linear.NonDynamicallyQuantizableLinear
    whole = [
        layer
        for layer in model.modules()
        if isinstance(layer, projections)
        or (isinstance(layer, nn.Linear) and layer.out_features == CLASSES)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == CLASSES)
    ]
    heads = model.encoder.layers[0].num_heads if isinstance(model, VisionTransformer) else None
    pruner = tp.pruner.MagnitudePruner(
        model,
        x[:1],
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        round_to=heads,
        ignored_layers=whole,
    )
    pruner.step()
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels
    return model


METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {"graphzip": ours, "torch-pruning": torch_pruning}


def examine(name: str) -> dict[str, Any]:
    """The share of the parameters that each method takes away, and its seconds, or why it does not run."""
    import torchvision

    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    size = max(((start, size) for start, size in SIZES.items() if name.startswith(start)), default=("", 64))[1]
    x = torch.randn(2, 3, size, size)
    before = sum(parameter.numel() for parameter in model.parameters())
    row: dict[str, Any] = {}
    for method, shrink in METHODS.items():
        start = time.perf_counter()
        try:
            slim = shrink(copy.deepcopy(model), x)
            taken = time.perf_counter() - start
            cut = 1 - sum(parameter.numel() for parameter in slim.parameters()) / before
            row[method] = {"cut": cut, "seconds": taken, "wrong": wrong(slim, x)}
        except Exception as error:
            row[method] = {"wrong": f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0][:160]}"}
    return row


def wrong(model: nn.Module, x: Tensor) -> str:
    """What is not as it was before, if anything."""
    for count in (1, 2):
        with torch.no_grad():
            found = model.eval()(x[:count])
        if found.shape != (count, CLASSES) or not found.isfinite().all():
            return f"outputs of shape {tuple(found.shape)}, finite: {bool(found.isfinite().all())}"
    return ""


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(caption="ahead: percentage points more of the parameters taken away than by Torch-Pruning")
    result.add_column("model")
    for heading in ("graphzip", "torch-pruning", "ahead", "seconds", "seconds, torch-pruning"):
        result.add_column(heading, justify="right")
    result.add_column("wrong", overflow="fold")
    for row in rows:
        if "error" in row:
            result.add_row(row["model"], *[""] * 5, f"{row['error']}: {row['reason']}")
            continue
        found = [row[method] for method in METHODS]
        cuts = [f"{each['cut']:.2%}" if not each["wrong"] else "fails" for each in found]
        times = [f"{each['seconds']:.1f}" if "seconds" in each else "" for each in found]
        both = not any(each["wrong"] for each in found)
        ahead = f"{100 * (found[0]['cut'] - found[1]['cut']):+.2f}" if both else ""
        reasons = [f"{method}: {row[method]['wrong']}" for method in METHODS if row[method]["wrong"]]
        result.add_row(row["model"], *cuts, ahead, *times, "\n".join(reasons))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of torchvision models; all classifiers if none is given")
    add_options(parser)
    options = parser.parse_args()
    if options.child:
        return child(options, examine)
    import torchvision

    names = options.models or torchvision.models.list_models(module=torchvision.models)
    rows = main_loop(__file__, options, names)
    if options.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        Console(width=150).print(table(rows))
    return 1 if any("error" in row or row["graphzip"]["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
