"""Slices from codes: the fit, generators, and what comes out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import relative
from torch import nn

import graphzip as gz
from graphzip.graph.layers.factored import SliceConv, pack_signs, unpack_signs

pytestmark = pytest.mark.usefixtures("seeded")

IMAGE = (torch.zeros(2, 4, 9, 9),)
SLICE = (8, 8, 3, 3)


def block(ins: int, outs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU())


def small() -> nn.Sequential:
    return nn.Sequential(block(4, 8), block(8, 8), block(8, 20, 2), block(20, 16), nn.Flatten(), nn.Linear(400, 5))


def prepared(model: nn.Module, **options: Any) -> gz.Prepared:
    return gz.prepare(model, gz.Plan([gz.SliceGenerate(**{"slice": SLICE, "force": True, **options})]), IMAGE)


def summary(compiled: gz.Compiled) -> dict[str, Any]:
    found: dict[str, Any] = compiled.report.passes[-1]["slice_generate"]
    return found


def layers(model: nn.Module) -> dict[str, SliceConv]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SliceConv)}


# ---------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("options", [{"code": 10}, {"code": 40}, {"code": 10, "slice": (5, 7, 2, 3)}])
def test_full_codes_are_exact(options: dict[str, Any]) -> None:
    """Three layers have ten slices of 8 x 8 x 3 x 3 and some reach over the edge, or more of a smaller slice."""
    model, x = small().eval(), torch.randn(3, 4, 9, 9)
    if "slice" in options:
        options = {**options, "code": 210}
    compiled = prepared(model, **options).convert()
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-6
    assert max(summary(compiled)["relative_error"].values()) < 1e-6


def test_codes_per_layer() -> None:
    found = layers(prepared(small(), code=6).model)
    assert {name: tuple(layer.codes.shape) for name, layer in found.items()} == {
        "1.0": (1, 6),
        "2.0": (3, 6),
        "3.0": (6, 6),
    }
    assert len({id(layer.generator) for layer in found.values()}) == 1
    assert tuple(found["1.0"].generator.shape) == (8 * 8 * 9, 6)


def test_slices_tile_the_kernel_in_row_major_order() -> None:
    layer = layers(prepared(small(), code=6).model)["3.0"]
    pieces = [(layer.generator @ code).reshape(SLICE) for code in layer.codes]
    rows = [torch.cat(pieces[start : start + 3], dim=1) for start in (0, 3)]
    assert torch.allclose(layer.weight, torch.cat(rows, dim=0)[:16, :20], atol=1e-6)


def test_the_fit_is_the_truncated_svd() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 1, 1))
    found = layers(prepared(model, code=5).model)
    slices = [
        model.get_parameter(f"{name}.weight").detach().double()[8 * o : 8 * o + 8, 8 * i : 8 * i + 8].reshape(-1)
        for name, ins in (("1", 1), ("2", 8))
        for o in range(8)
        for i in range(ins)
    ]
    best = torch.linalg.svdvals(torch.stack(slices))[5:].square().sum()
    error = sum(
        (layer.weight - model.get_parameter(f"{name}.weight")).double().square().sum() for name, layer in found.items()
    )
    assert float(torch.as_tensor(error).detach()) == pytest.approx(float(best), rel=1e-4)


def test_what_reaches_over_the_edge_is_free() -> None:
    """A kernel of one slice that is cut in half: filling in finds the generator that zeros would spoil."""
    true = torch.randn(6 * 4 * 9, 2)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 60, 3, 1, 1), nn.Conv2d(60, 3, 3, 1, 1))
    with torch.no_grad():
        for name in ("1", "2"):
            weight = model.get_parameter(f"{name}.weight")
            outs, ins = (-(-size // step) for size, step in zip(weight.shape[:2], (6, 4), strict=True))
            tiles = (torch.randn(outs, ins, 2) @ true.t()).reshape(outs, ins, 6, 4, 3, 3)
            weight.copy_(tiles.permute(0, 2, 1, 3, 4, 5).reshape(outs * 6, ins * 4, 3, 3)[: len(weight)])
    errors = summary(prepared(model, slice=(6, 4, 3, 3), code=2).convert())["relative_error"]
    assert max(errors.values()) < 1e-3


def test_the_random_start_has_the_spread_of_kaiming() -> None:
    model = nn.Sequential(block(4, 64), block(64, 64), block(64, 64))
    for binary in (False, True):
        for layer in layers(prepared(model, init="random", binary=binary, code=64).model).values():
            assert float(layer.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.15)


# ---------------------------------------------------------------------------------------------------- generators


def test_only_codes_and_the_generator_are_trained_and_all_of_them() -> None:
    for options in ({}, {"binary": True}, {"scopes": ["2.*"]}):
        model = prepared(small(), code=4, **options).train()
        model(torch.randn(8, 4, 9, 9)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name
        names = {name.rpartition(".")[2] for name, _ in model.model.named_parameters() if name[0] in "123"}
        assert names == {"codes", "weight", "bias"} | (set() if "binary" in options else {"generator"})


def test_a_binary_generator_is_fixed_and_takes_a_bit_per_number(tmp_path: Path) -> None:
    ready = prepared(small(), binary=True, code=64)
    layer = layers(ready.model)["1.0"]
    assert (layer.generator.dtype, layer.generator.shape) == (torch.uint8, (576, 8))
    signs = unpack_signs(layer.generator, 64, torch.zeros(()))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(pack_signs(signs), layer.generator)
    compiled = ready.convert()
    after = compiled.report.after
    assert after.bytes == layer.generator.numel() + 4 * (after.params + 2 * 52) + 8 * 4  # with batch norms' statistics
    assert "stored" in str(compiled.report)
    report = compiled.export(tmp_path / "model.onnx")
    assert report.verified
    assert report.bytes < after.bytes + 20_000
    compiled.save(tmp_path / "model.graphzip")
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(gz.load(tmp_path / "model.graphzip").module(x), compiled.module.eval()(x))


def test_scopes_have_generators_of_their_own() -> None:
    ready = prepared(small(), code=3, scopes=["1.*"])
    found = layers(ready.model)
    assert found["2.0"].generator is found["3.0"].generator
    assert found["1.0"].generator is not found["2.0"].generator
    assert summary(ready.convert())["shared"] == [["1.0"], ["2.0", "3.0"]]


def test_a_generator_is_saved_and_started_from(tmp_path: Path) -> None:
    first = prepared(small(), code=10)
    path = tmp_path / "generator.safetensors"
    gz.save_generator(first, path)
    generator = layers(first.model)["1.0"].generator.detach()
    for frozen in (False, True):
        other = prepared(small(), code=10, generator=str(path), frozen=frozen)
        layer = layers(other.model)["2.0"]
        assert torch.allclose(layer.generator, generator, atol=1e-6)
        assert isinstance(layer.generator, nn.Parameter) is not frozen
        assert other.convert().report.changed
    same = prepared(small(), code=10, generator=str(path), init="random")
    assert torch.allclose(layers(same.model)["2.0"].generator, generator, atol=1e-6)


def test_a_given_generator_gets_the_best_codes(tmp_path: Path) -> None:
    model = small()
    gz.save_generator(prepared(model, code=10).convert().module, tmp_path / "g")
    errors = summary(prepared(model, code=10, generator=str(tmp_path / "g")).convert())["relative_error"]
    assert max(errors.values()) < 1e-5


def test_generators_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(gz.GraphZipError, match=r"no layer that matches '\*' has a generator; pass a model that Slice"):
        gz.save_generator(small(), tmp_path / "g")
    ready = prepared(small(), code=3, scopes=["1.*"])
    with pytest.raises(gz.GraphZipError, match=r"have 2 generators; name one of them with layer="):
        gz.save_generator(ready.model, tmp_path / "g")
    gz.save_generator(ready.model, tmp_path / "g", layer="1.*")
    with pytest.raises(gz.ArchiveError, match=r"cannot write"):
        gz.save_generator(ready.model, tmp_path / "none" / "g", layer="1.*")


# ---------------------------------------------------------------------------------------------------- the result


def test_the_result_is_an_ordinary_module(tmp_path: Path) -> None:
    compiled = prepared(small(), code=4).convert()
    module, x = compiled.module.eval(), torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        expected = module(x)
        again = copy.deepcopy(module)
        assert torch.equal(again(x), expected)
        assert len({id(layer.generator) for layer in layers(again).values()}) == 1
        again.load_state_dict(module.state_dict())
    compiled.save(tmp_path / "model.graphzip")
    loaded = gz.load(tmp_path / "model.graphzip")
    with torch.no_grad():
        assert torch.equal(loaded.module(x), expected)
    assert sum(parameter.numel() for parameter in loaded.module.parameters()) == compiled.report.after.params
    report = compiled.export(tmp_path / "model.onnx")
    assert report.verified
    assert report.bytes < 4 * compiled.report.after.params + 15_000


def test_the_result_trains_on() -> None:
    module = prepared(small(), code=4).convert().module.train()
    module(torch.randn(3, 4, 9, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_pointwise_layers_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)).eval()
    compiled = prepared(model, slice=(8, 8, 1, 1), code=8, include=["1", "2"]).convert()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slice": (8, 8, 3)}, "slice: [8, 8, 3] has 3 dimensions and the kernel of '1.0' has 4"),
        ({"scopes": ["9.*"]}, "scopes[0]: '9.*' matches no layer that is generated"),
        ({"frozen": True}, "frozen: only a generator that is given can be frozen; name its file"),
        ({"generator": "x", "binary": True}, "generator: a binary generator is not read from a file"),
        ({"exclude": ["*"]}, "no convolution is left to factor"),
    ],
)
def test_plans_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError) as caught:
        prepared(small(), **options)
    assert f"passes[0].slice_generate.{message}" in str(caught.value) or message in str(caught.value)


def test_generators_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(gz.WeightsError, match=r"generator: there is no file .*; pass what save_generator wrote"):
        prepared(small(), generator=str(tmp_path / "none"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(gz.WeightsError, match=r"text holds no generator"):
        prepared(small(), generator=str(tmp_path / "text"))
    gz.save_generator(prepared(small(), code=3), tmp_path / "g")
    with pytest.raises(gz.PlanError, match=r"is \(576, 3\); slices of \[8, 8, 3, 3\] with codes of 4 need \(576, 4\)"):
        prepared(small(), code=4, generator=str(tmp_path / "g"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slice": 3}, "slice: 3 is not the shape of a slice; write its out channels, in channels and kernel size"),
        ({"slice": (8, 0, 3, 3)}, "slice: (8, 0, 3, 3) is not the shape of a slice"),
        ({"code": 0}, "code: 0 is not a number of entries of a code; write an int of at least 1"),
        ({"generator": ""}, "generator: '' is not the path of a file that graphzip.save_generator wrote"),
        ({"init": "svd"}, "init: 'svd' is not one of 'fit', 'random'"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError) as caught:
        gz.SliceGenerate(**options)
    assert str(caught.value).startswith(f"slice_generate.{message}")
