"""Ways to make a network slimmer without training, at the same multiply-accumulates, for `compare.py`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import accuracy, augmented, drawn
from common.attention import heads_of, narrow_heads
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphzip as gz

__all__ = [
    "METHODS",
    "TORCH_PRUNING",
    "Bench",
    "Contestant",
    "counted",
    "evenly",
    "pruned_at",
    "re_estimated",
    "torch_pruned",
    "widest",
]

JUDGED = 1000  # test images on which the best variant of torch-pruning is chosen
STEPS = 7
HESSIAN = 16  # images of a batch: each one is differentiated alone
TORCH_PRUNING = ("magnitude-l1", "magnitude-l2", "bn-scale", "taylor", "hessian")


@dataclass(kw_only=True)
class Contestant:
    """A trained network, and unlabelled inputs in batches: images, or tuples of several inputs.

    The even methods narrow the groups that match `groups`, and Torch-Pruning the layers of the same names.
    """

    name: str
    model: nn.Module
    images: list[Any]
    groups: str

    @property
    def example(self) -> tuple[Tensor, ...]:
        first = self.images[0]
        return tuple(each[:2] for each in (first if isinstance(first, tuple) else (first,)))

    @property
    def macs(self) -> int:
        return gz.cost(self.model, self.example).macs


@dataclass(kw_only=True)
class Bench(Contestant):
    """One that is judged on test images."""

    test: tuple[Tensor, Tensor]
    cache: Path


def graphzip(
    bench: Bench,
    share: float,
    effort: str = "thorough",
    tune: gz.Tune | None = None,
    passes: Sequence[gz.PassOptions] = (),
) -> tuple[str, nn.Module]:
    how: dict[str, Any] = {"cache": bench.cache, "effort": effort, "passes": passes}
    plan = gz.plan_for(bench.model, bench.example, macs=share, calibration=bench.images, **how)
    compiled = gz.compile(bench.model, plan, bench.example, calibration=bench.images, tune=tune)
    return str(compiled.report.tuning or ""), compiled.module


def moved(images: Tensor) -> Tensor:
    """Every image mirrored or not, and moved; drawn as PyTorch draws."""
    return augmented(images, torch.default_generator)


def fold(bench: Bench, share: float) -> tuple[str, nn.Module]:
    found = evenly(bench.model, bench.example, share, lambda keep: gz.ClusterMerge(keep={bench.groups: keep}))
    return "", re_estimated(found.module, bench.images)


def l1(bench: Bench, share: float) -> tuple[str, nn.Module]:
    found = evenly(bench.model, bench.example, share, lambda keep: gz.PruneChannels(keep={bench.groups: keep}))
    return "", re_estimated(found.module, bench.images)


def torch_pruning(bench: Bench, share: float) -> tuple[str, nn.Module]:
    test = drawn(bench.test, JUDGED)
    found = {}
    for name in TORCH_PRUNING:
        for scope in ("local", "global"):
            module = re_estimated(torch_pruned(bench, share, name, scope == "global"), bench.images)
            found[f"{name}, {scope}"] = accuracy(module, *test), module
            print(f"  torch-pruning {name}, {scope}: {found[f'{name}, {scope}'][0]:.2f}", file=sys.stderr)
    best = max(found, key=lambda each: found[each][0])
    return best, found[best][1]


METHODS: dict[str, Callable[[Bench, float], tuple[str, nn.Module]]] = {
    "graphzip": graphzip,
    "graphzip-normal": partial(graphzip, effort="normal"),
    "graphzip-ranks": partial(graphzip, effort="normal", passes=[gz.LowRank()]),
    "graphzip-mixed": partial(graphzip, effort="normal", passes=[gz.ClusterMerge(), gz.LowRank()]),
    "graphzip-tuned": partial(graphzip, effort="normal", tune=gz.Tune(augment=moved)),
    "torch-pruning": torch_pruning,
    "fold": fold,
    "l1": l1,
}


def evenly(model: nn.Module, example: tuple[Tensor, ...], share: float, options: Callable[[float], Any]) -> gz.Compiled:
    """The widest even plan that fits the share of the multiply-accumulates."""
    return widest(lambda keep: gz.compile(model, gz.Plan([options(keep)]), example), share)[1]


def widest(compiled: Callable[[float], gz.Compiled], share: float) -> tuple[float, gz.Compiled]:
    """The largest share of channels whose result fits the share of the multiply-accumulates, and that result."""
    low, high, found = 0.01, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        result = compiled(middle)
        fits = result.report.after.macs <= share * result.report.before.macs
        low, high, found = (middle, high, (middle, result)) if fits else (low, middle, found)
    assert found is not None
    return found


def torch_pruned(bench: Contestant, share: float, importance: str, everywhere: bool) -> nn.Module:
    """The least pruned model that fits the share. Of ResNets inner widths alone: padded shortcuts break it."""
    low, high, found = 0.0, 0.98, None
    whole = counted(bench.model, bench.example)
    for _ in range(STEPS):
        middle = (low + high) / 2
        model = pruned_at(bench, middle, importance, everywhere)
        fits = counted(model, bench.example) <= share * whole
        low, high, found = (low, middle, model) if fits else (middle, high, found)
    assert found is not None
    return found


def counted(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Twice the multiply-accumulates of a sample, without tracing: for many models in a row."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(each[:1] for each in example))
    return counter.get_total_flops()


def pruned_at(bench: Contestant, ratio: float, importance: str, everywhere: bool) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(bench.model).eval()
    kinds = {
        "magnitude-l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "magnitude-l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn-scale": tp.importance.BNScaleImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }
    kind = kinds[importance]()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    last = next(reversed(layers))
    kept = [layer for name, layer in layers.items() if name == last or not fnmatchcase(name, bench.groups)]
    pruner = tp.pruner.BasePruner(
        model,
        bench.example,
        importance=kind,
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=kept,
        max_pruning_ratio=0.98,
        num_heads=heads_of(model),
    )
    if importance in {"taylor", "hessian"}:
        for x in bench.images[:2]:
            logits = model(x)
            losses = F.cross_entropy(logits, logits.argmax(1), reduction="none")
            if importance == "taylor":
                losses.sum().backward()
                continue
            for loss in losses[:HESSIAN]:
                model.zero_grad()
                loss.backward(retain_graph=True)
                kind.accumulate_grad(model)
    pruner.step()
    narrow_heads(model)
    return model


@torch.no_grad()
def re_estimated(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """The running statistics of every batch norm, taken anew."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for x in images:
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
