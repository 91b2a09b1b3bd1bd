"""A model for every pass, on which it finds something to do; where it can be lossless, on which it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import graphzip as gz
from graphzip.graph.traced import Traced
from graphzip.plan.passes import options_of
from graphzip_passes.registry import BUILT_IN

__all__ = ["PassCase", "ZeroSmall", "case_of", "zero_small"]


@dataclass(frozen=True)
class PassCase:
    """Options, what makes the model or the models, and inputs with the calibration data."""

    options: gz.PassOptions
    model: Callable[[], Any]
    inputs: Any
    calibration: Any

    def prepare(self, model: Any, **how: Any) -> gz.Prepared:
        return gz.prepare(model, gz.Plan([self.options]), self.inputs, calibration=self.calibration, **how)

    def compile(self, model: Any, **how: Any) -> gz.Compiled:
        return gz.compile(model, gz.Plan([self.options]), self.inputs, calibration=self.calibration, **how)

    def outputs(self, model: Any) -> torch.Tensor:
        """Of all tasks: of a mapping of models, of a joint model, or of one model."""
        with torch.no_grad():
            if not isinstance(self.inputs, dict):
                value: torch.Tensor = model(*self.inputs)
                return value
            if isinstance(model, dict):
                return torch.cat([model[name](*each) for name, each in self.inputs.items()])
            found = model(**{name: each[0] for name, each in self.inputs.items()})
            return torch.cat([found[name] for name in self.inputs])


# ------------------------------------------------------------------------------------------------- a pass of one's own


class ZeroSmall(gz.PassOptions):
    """Set weights that are small to zero."""

    kind: ClassVar[str] = "zero_small"

    below: float = 1e-3


def zero_small(traced: Traced, options: ZeroSmall, context: gz.PassContext) -> gz.Outcome:
    counts = {}
    for name, parameter in traced.module.named_parameters():
        small = parameter.detach().abs() < options.below
        parameter.detach()[small] = 0.0
        if bool(small.any()):
            counts[name] = int(small.sum())
    table = gz.Table(("parameter", "zeros"), tuple(counts.items()), title=context.where)
    return gz.Outcome(
        traced,
        changed=bool(counts),
        lossless=not counts,
        loss="small weights are zero",
        tables=(table,),
        details={"zeros": counts},
    )


# ------------------------------------------------------------------------------------------------- models


def network(*, twins: bool = False) -> nn.Module:
    """Convolutions with batch norms and linear layers; with `twins` every two channels are equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 48),
            nn.ReLU(),
            nn.Linear(48, 48),
            nn.ReLU(),
            nn.Linear(48, 4),
        )
        for norm in (model[1], model[4]):
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    if twins:
        with torch.no_grad():
            for layer in list(model)[:-1]:
                for tensor in (*layer.parameters(), *layer.buffers()):
                    if tensor.dim():
                        tensor[1::2] = tensor[::2]
    return model.eval()


def thin(name: str) -> nn.Module:
    """With a linear layer of rank 4."""
    model = network()
    layer: Any = model.get_submodule(name)
    left, right = layer.weight.detach()[:, :4].clone(), layer.weight.detach()[:4].clone()
    with torch.no_grad():
        layer.weight.copy_(left @ right)
    return model


class Added(nn.Module):
    """`x + f(x)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = x + self.inner(x)
        return total


def residual() -> nn.Module:
    """Three residual branches, of which the first and the last give zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        branches = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(3)]
        for norm in (branches[0][1], branches[2][1]):
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.zeros_(norm.weight)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *map(Added, branches), *head).eval()


def alike() -> dict[str, nn.Module]:
    """A model twice."""
    return {"a": network(), "b": network()}


ONE = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)
DATA = [(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)),) for seed in (2, 3)]
TWO = {"a": ONE, "b": copy.deepcopy(ONE)}
DATA_OF_TWO = {"a": DATA, "b": DATA}

CASES: dict[str, PassCase] = {
    "cluster_merge": PassCase(gz.ClusterMerge(keep=0.5), lambda: network(twins=True), ONE, DATA),
    "atom_factorize": PassCase(gz.AtomFactorize(atoms=9, share=None, atom_drop=0.0, force=True), network, ONE, DATA),
    "slice_generate": PassCase(gz.SliceGenerate(slice=(4, 4, 3, 3), code=36, force=True), network, ONE, DATA),
    "cross_domain_share": PassCase(
        gz.CrossDomainShare(clusters={"3": 8}, regularizer="simple", pool=[2, 2]), alike, TWO, DATA_OF_TWO
    ),
    "minimize": PassCase(gz.Minimize(), lambda: network(twins=True), ONE, DATA),
    "drop_blocks": PassCase(gz.DropBlocks(keep=1), residual, ONE, DATA),
    "low_rank_factors": PassCase(gz.LowRank(rank={"10": 5}), lambda: thin("10"), ONE, DATA),
    "zip": PassCase(gz.Zip(metric="euclidean"), alike, TWO, DATA_OF_TWO),
    "zero_small": PassCase(ZeroSmall(below=0.05), network, ONE, DATA),
}


def case_of(kind: str) -> PassCase:
    """The case of a pass. One that has none is tried with the options that are its defaults, on one model or on two."""
    if kind in CASES:
        return CASES[kind]
    options = options_of(kind)
    assert options is not None, f"{kind} is in no table: {list(BUILT_IN)}"
    return PassCase(options(), alike, TWO, DATA_OF_TWO) if options.joins else PassCase(options(), network, ONE, DATA)
