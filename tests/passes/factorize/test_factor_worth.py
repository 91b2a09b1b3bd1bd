"""Layers that are stored as factors only where the model gets smaller by it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip_passes.factorize.worth import Stored, worth_storing

pytestmark = pytest.mark.usefixtures("seeded")


def net() -> nn.Sequential:
    """Wide layers whose coefficients cost much, and one that is too small for any."""
    return nn.Sequential(nn.Conv2d(2, 24, 3), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 1, 3))


def compiled(options: gz.PassOptions) -> gz.Compiled:
    return gz.compile(net(), gz.Plan([options]), (torch.zeros(2, 2, 16, 16),))


def test_the_set_that_saves_most_is_found() -> None:
    """Against all subsets, on random sizes."""
    rng = random.Random(0)
    for _ in range(200):
        layers = [
            Stored(str(number), rng.randint(1, 99), rng.randint(1, 60), "net", (rng.randint(1, 6), rng.randint(1, 6)))
            for number in range(rng.randint(1, 6))
        ]

        def saved(chosen: tuple[Stored, ...]) -> int:
            if not chosen:
                return 0
            rows, columns = (max(each.corner[dim] for each in chosen) for dim in (0, 1))
            return sum(each.kernel - each.own for each in chosen) - 3 * rows * columns

        sets = [each for size in range(len(layers) + 1) for each in itertools.combinations(layers, size)]
        most = max(map(saved, sets))
        price = {"net": lambda rows, columns: 3 * rows * columns}
        if most <= 0:
            if most < 0 or all(saved(each) < 0 for each in sets if each):
                with pytest.raises(gz.PlanError, match="nothing gets smaller"):
                    worth_storing(layers, price, "here")
            continue
        out = worth_storing(layers, price, "here")
        assert saved(tuple(each for each in layers if each.name not in out)) == most
        assert all(each.factors > each.kernel for each in out.values())


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (gz.AtomFactorize(atoms=8, share="layer"), ["3"]),
        (gz.AtomFactorize(atoms=8, share=None), ["3"]),
        (gz.SliceGenerate(slice=(8, 8, 3, 3), code=16, scopes=["3"]), ["3"]),
        (gz.SliceGenerate(slice=(8, 8, 3, 3), code=64, binary=True), []),
    ],
    ids=lambda each: each.kind if isinstance(each, gz.PassOptions) else "",
)
def test_layers_that_would_grow_stay(options: gz.PassOptions, left_out: list[str]) -> None:
    report = compiled(options).report
    found = report.passes[-1][options.kind]
    assert found.get("left_out", []) == left_out
    assert report.after.bytes < report.before.bytes
    if left_out:
        assert "layer that stays as it is" in str(report)
        assert set(found["layers"]) == {"1", "2"}
        forced = compiled(options.model_copy(update={"force": True})).report
        assert forced.after.bytes > report.after.bytes
        assert "left_out" not in forced.passes[-1][options.kind]


def test_plans_that_only_make_a_model_larger_are_refused() -> None:
    for options in (gz.SliceGenerate(), gz.AtomFactorize(atoms=20)):
        with pytest.raises(gz.PlanError, match=rf"passes\[0\]\.{options.kind}: nothing gets smaller: kernels"):
            compiled(options)
        forced = compiled(options.model_copy(update={"force": True})).report
        assert forced.after.params > forced.before.params


def test_what_grows_keeps_the_layers_that_have_atoms() -> None:
    plan = gz.Plan([gz.AtomFactorize(atoms=7, share="layer")])
    prepared = gz.prepare(net(), plan, (torch.zeros(2, 2, 16, 16),))
    grown = gz.expand(prepared.eval(), atoms=9)
    x = torch.randn(2, 2, 16, 16)
    assert torch.allclose(grown(x), prepared(x), atol=1e-6)
    kinds = [[type(layer).__name__ for layer in each.model] for each in (prepared, grown)]  # type: ignore[arg-type]
    assert kinds[0] == kinds[1] == ["Conv2d", "AtomConv2d", "AtomConv2d", "Conv2d"]
