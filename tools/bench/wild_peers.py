"""Torch-Pruning, torch-kirigami and graphzip on models of `tools/wild`: what each takes of half the channels.

    python tools/bench/wild_peers.py --out peers.jsonl          # one line per model and method, resumable

Every method is asked by magnitude for half of the channels of each layer (torch-kirigami: of the parameters), and
keeps what makes the outputs. Told is what part of the parameters is left, or why there is no model: it raised, or what
is left does not run, gives outputs of other shapes, or it did not end in time. Each runs in a process of its own. The
libraries of `tools/wild`, `torch-pruning` and `torch-kirigami` are needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from each_model import add_options, child, main_loop  # noqa: E402

NAMES = (
    "bert", "gpt2", "llama", "mixtral", "mamba", "t5", "bart", "hf_vit", "swinv2", "convnextv2", "segformer", "sam",
    "wav2vec2", "patchtst", "conv_gru", "lstm_cells", "smp_unet", "yolo11n", "vit_pytorch", "unet_2d",
)  # fmt: skip


def graphzip(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Half of every group, by magnitude."""
    import graphzip as gz

    return gz.compile(model, gz.Plan([gz.PruneChannels(keep=0.5)]), inputs).module


def torch_pruning(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Half of every group, by magnitude; layers that make outputs are told by their names."""
    import torch_pruning as tp

    importance = tp.importance.GroupMagnitudeImportance(p=2)
    ignored = _last(model)
    tp.pruner.BasePruner(model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=ignored).step()
    return model


def kirigami(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Half of the parameters, chosen greedily by magnitude."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner

    from tools.wild.wrappers import Call

    inner, named = (
        (model.model, dict(zip(model.names, inputs, strict=False))) if isinstance(model, Call) else (model, {})
    )
    options = named | dict(model.options) if isinstance(model, Call) else {}
    graph = DependencyGraph.build(inner, args=() if named else inputs, kwargs=options)
    half = sum(each.numel() for each in model.parameters()) // 2
    pruner, strategy = Pruner(inner, graph=graph), Greedy(GroupMagnitude(p=2))
    pruner.prune(pruner.discover_candidates(), budget=ParameterBudget(half), strategy=strategy)  # in place
    return model


def _last(model: nn.Module) -> list[nn.Module]:
    """The last layer, which makes the outputs of most models."""
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d | nn.Conv1d)]
    return layers[-1:]


METHODS: dict[str, Callable[[nn.Module, tuple[Any, ...]], nn.Module]] = {
    "graphzip": graphzip,
    "torch-pruning": torch_pruning,
    "torch-kirigami": kirigami,
}


def tried(spec: str) -> dict[str, Any]:
    """What a method makes of a model, `MODEL by METHOD`."""
    from graphzip.commands.models import make_inputs, parse_shape
    from tools.wild import MODELS

    name, _, method = spec.partition(" by ")
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    inputs = make_inputs(model, [parse_shape(text) for text in MODELS[name].inputs.split(",")])
    before = sum(each.numel() for each in model.parameters())
    with torch.no_grad():
        expected = _shapes(model(*inputs))
    try:
        slim = METHODS[method](copy.deepcopy(model), inputs).eval()
    except Exception as error:
        return {"failed": "raises", "why": f"{type(error).__name__}: {error}"[:200]}
    try:
        with torch.no_grad():
            found = _shapes(slim(*inputs))
    except Exception as error:
        return {"failed": "does not run", "why": f"{type(error).__name__}: {error}"[:200]}
    if found != expected:
        return {"failed": "other shapes"}
    return {"left": sum(each.numel() for each in slim.parameters()) / before}


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def table(rows: list[dict[str, Any]], methods: list[str]) -> Table:
    """A row for each model, a column for each method: the part of the parameters that is left, or why there is none."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        name, _, method = row["model"].partition(" by ")
        cells.setdefault(name, {})[method] = f"{row['left']:.0%}" if "left" in row else told(row)
    rendered = Table("model", *methods)
    for name, found in cells.items():
        rendered.add_row(name, *(found.get(method, "") for method in methods))
    return rendered


def told(row: dict[str, Any]) -> str:
    """Why there is no slimmer model."""
    return "no end in time" if row.get("error") == "timeout" else str(row.get("failed") or row["error"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=NAMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add_options(parser)
    options = parser.parse_args()
    if options.child:
        return child(options, tried)
    rows = main_loop(
        __file__, options, (f"{name} by {method}" for name in options.models for method in options.methods)
    )
    if options.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        Console(width=120).print(table(rows, options.methods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
