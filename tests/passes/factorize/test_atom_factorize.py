"""Atoms and coefficients: the fit, what is trained, and what comes out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cifar_nets import CIFAR, VGG16, resnet20
from factor_cases import IMAGE, KINDS, block, layers, prepared, small, summary
from planting import relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.graph.layers.factored import AtomConv
from graphzip_passes.factorize.atom_fit import fit_atoms

pytestmark = pytest.mark.usefixtures("seeded")


# ---------------------------------------------------------------------------------------------------- the fit


def test_coefficients_do_not_cancel_where_kernels_hardly_differ() -> None:
    """Large coefficients that cancel compute the same, but no training holds them together."""
    basis = torch.linalg.qr(torch.randn(54, 54))[0]
    alike = (torch.randn(16, 16, 54) * torch.logspace(0, -3, 54)) @ basis
    kernels = [*(torch.randn(8, 8, 9) for _ in range(6)), *alike.split(9, 2)]
    coefficients, atoms = fit_atoms(kernels, 54)
    size = torch.stack([kernel.norm() for kernel in kernels]).norm()
    made = [coefficients[: len(kernel), : kernel.shape[1]] @ each for kernel, each in zip(kernels, atoms, strict=True)]
    missed = torch.stack([(one - other).norm() for one, other in zip(kernels, made, strict=True)]).norm()
    assert missed < 0.06 * size
    assert coefficients.norm() < size


def test_a_weighted_fit_refuses_data_that_is_not_finite() -> None:
    images = torch.randn(IMAGE[0].shape)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(gz.WeightsError, match="reads or gives values that are NaN or infinite"):
        prepared(small(), calibration=[images], weighted=True)


@pytest.mark.parametrize(("share", "atoms"), [(None, 9), ("layer", 12), ("net", 27), ("block", 18)])
def test_enough_atoms_are_exact(share: str | None, atoms: int) -> None:
    model, x = small().eval(), torch.randn(3, 4, 9, 9)
    compiled = prepared(model, share=share, atoms=atoms).convert()
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-6
    assert max(summary(compiled)["relative_error"].values()) < 1e-6


def test_unshared_is_the_truncated_svd() -> None:
    model = small()
    found = summary(prepared(model, share=None, atoms=4).convert())["relative_error"]
    for name in ("1.0", "2.0", "3.0"):
        kernel = model.get_parameter(f"{name}.weight").detach().double().flatten(0, 1).flatten(1).numpy()
        values = np.linalg.svd(kernel, compute_uv=False)
        assert found[name] == pytest.approx(np.sqrt((values[4:] ** 2).sum() / (values**2).sum()), rel=1e-5)


def test_shared_coefficients_are_found_again() -> None:
    """Kernels that are of the form `A[:c, :c'] D_n` are fitted without error, from a start that does not know them."""
    model = small()
    coefficients = torch.randn(16, 16, 4)
    with torch.no_grad():
        for name, (outs, ins) in {"1.0": (8, 8), "2.0": (16, 8), "3.0": (16, 16)}.items():
            kernel = coefficients[:outs, :ins] @ torch.randn(4, 9)
            model.get_parameter(f"{name}.weight").copy_(kernel.reshape(outs, ins, 3, 3))
    assert max(summary(prepared(model, atoms=4).convert())["relative_error"].values()) < 0.02


def test_sharing_costs_accuracy_in_order() -> None:
    model = small()
    errors = [
        sum(summary(prepared(model, share=share, atoms=4).convert())["relative_error"].values())
        for share in (None, "block", "net")
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] < errors[2]


def test_weights_of_the_calibration_data_lower_the_error_of_the_output() -> None:
    """Inputs of very unequal size: the weighted fit spends its atoms on the channels that are loud."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(0, 3, 8)[:, None, None, None])
    data = [torch.randn(8, 4, 9, 9) for _ in range(2)]
    errors = []
    for weighted in (False, True):
        options = {"weighted": weighted, "compensate": "none", "include": ["1"]}
        module = prepared(model, calibration=data, atoms=4, **options).convert().module
        with torch.no_grad():
            errors.append(relative(model[:2](data[0]), nn.Sequential(*list(module.children())[:2])(data[0])))
    assert errors[1] < 0.75 * errors[0]


def test_without_calibration_data_weights_are_left_out() -> None:
    model = small()
    one, two = (summary(prepared(model, weighted=weighted).convert())["relative_error"] for weighted in (False, True))
    assert one == two


def test_the_random_start_has_the_spread_of_kaiming() -> None:
    model = prepared(nn.Sequential(block(4, 64), block(64, 64), block(64, 128)), init="random", atom_drop=0.0).model
    for layer in layers(model).values():
        assert float(layer.weight.detach().std()) == pytest.approx((2 / (layer.in_channels * 9)) ** 0.5, rel=0.1)
        rows = layer.atoms.detach().flatten(2)[0]
        gram = rows @ rows.t()
        assert torch.allclose(gram, torch.eye(8) * gram[0, 0], atol=1e-5)


def test_the_seed_decides() -> None:
    plan = gz.Plan([gz.AtomFactorize(init="random", force=True)])
    one, two, three = (gz.prepare(small(), plan, IMAGE, seed=seed).state_dict() for seed in (1, 1, 2))
    name = "model.1.0.coefficients"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], three[name])


# ---------------------------------------------------------------------------------------------------- what is trained


def test_shared_coefficients_are_one_parameter() -> None:
    found = layers(prepared(small(), share="net").model)
    assert list(found) == ["1.0", "2.0", "3.0"]
    assert len({id(layer.coefficients) for layer in found.values()}) == 1
    assert found["1.0"].coefficients.shape == (16, 16, 8)
    blocks = layers(prepared(small(), share="block").model)
    assert blocks["1.0"].coefficients.shape == (8, 8, 8)
    assert blocks["2.0"].coefficients is blocks["3.0"].coefficients
    assert blocks["1.0"].coefficients is not blocks["2.0"].coefficients
    apart = layers(prepared(small(), share=None).model)
    assert len({id(layer.coefficients) for layer in apart.values()}) == 3


def test_only_factors_are_trained_and_all_of_them() -> None:
    for options in ({}, {"share": "block"}, {"group_size": 4}, {"group_size": 8, "share": None}):
        model = prepared(small(), atom_drop=0.0, **options).train()
        names = {name for name, _ in model.named_parameters()}
        assert not [name for name in names if name.endswith(("1.0.weight", "2.0.weight", "3.0.weight"))]
        model(torch.randn(8, 4, 9, 9)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if name.endswith(("coefficients", "atoms")):
                assert (parameter.grad != 0).float().mean() > 0.99, name


def test_an_optimizer_step_reaches_every_layer_that_shares() -> None:
    model = prepared(small(), atom_drop=0.0)
    before = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 4, 9, 9)).square().sum().backward()
    optimizer.step()
    for name, layer in layers(model).items():
        assert not torch.equal(layer.weight, before[name])
    compiled = model.convert()
    x = torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), compiled.module.eval()(x), atol=1e-6)


def test_atoms_drop_in_training_with_their_scale() -> None:
    layer = layers(prepared(small(), share=None, atoms=8, atom_drop=0.4).model)["1.0"].train()
    whole = layer.kernel(training=False)
    kernels = torch.stack([layer.weight.detach() for _ in range(4000)])
    assert relative(whole.detach(), kernels.mean(0)) < 0.1
    dropped = layer.coefficients[:8, :8].flatten(0, 1), layer.atoms.flatten(2)[0]
    parts = torch.einsum("pm,ml->mpl", *dropped).reshape(8, 8, 8, 3, 3) / 0.6
    rest = kernels[0].flatten() @ torch.linalg.pinv(parts.flatten(1).detach())
    assert torch.allclose(rest, rest.round(), atol=1e-3)
    assert set(rest.round().int().tolist()) <= {0, 1}
    assert torch.equal(layer.eval().weight, whole)


def test_dropping_goes_on_in_the_result() -> None:
    module = prepared(small(), atom_drop=0.5).convert().module
    assert all(layer.drop == 0.5 for layer in layers(module).values())
    layer = layers(module.train())["1.0"]
    assert not torch.equal(layer.weight, layer.weight)


def test_the_users_model_is_left_alone() -> None:
    model = small()
    state = copy.deepcopy(model.state_dict())
    prepared(model).convert()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_frozen_layers_stay_frozen() -> None:
    model = small().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in prepared(model).parameters())


# ---------------------------------------------------------------------------------------------------- groups


def grouped(x: Tensor, layer: AtomConv, size: int) -> Tensor:
    """Section 3.4 by its words: every group of filters is convolved on its own, then the channels are shuffled."""
    outs, ins = layer.out_channels, layer.in_channels
    count, parts = max(1, outs // size), max(1, ins // size)
    made = []
    for number in range(count):
        own = layer.coefficients if layer.coefficients.dim() == 3 else layer.coefficients[number]
        columns = ins // parts
        kernel = (own[: outs // count, :columns] @ layer.atoms[number].flatten(1)).unflatten(2, (3, 3))
        feeding = number * parts // count
        read = x[:, feeding * columns : (feeding + 1) * columns]
        made.append(torch.conv2d(read, kernel, None, layer.stride, 1))  # type: ignore[arg-type]
    return torch.stack(made, dim=2).flatten(1, 2)


@pytest.mark.parametrize("share", ["net", "layer", None])
@pytest.mark.parametrize(("ins", "outs", "size"), [(8, 8, 4), (4, 8, 4), (8, 8, 8), (4, 16, 4), (4, 4, 8)])
def test_groups_of_filters(share: str | None, ins: int, outs: int, size: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, ins, 1), nn.Conv2d(ins, outs, 3, 2, 1, bias=False)).eval()
    ready = prepared(model, share=share, group_size=size, atoms=5)
    layer = layers(ready.model)["1"]
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        expected = grouped(model[0](x), layer, size)
        assert torch.allclose(ready.eval()(x), expected, atol=1e-5)
        assert torch.allclose(ready.convert().module.eval()(x), expected, atol=1e-5)


def test_fewer_groups_of_outputs_than_of_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 3, 1, 1)).eval()
    compiled = prepared(model, group_size=4).convert()
    assert compiled.module.get_submodule("1").groups == 2
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert compiled.module(x).shape == model(x).shape


def test_groups_that_read_everything_keep_the_function() -> None:
    """Filters in groups that all read the whole input are put back in order by the shuffle, and so is the bias."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 12, 3, padding=1)).eval()
    compiled = prepared(model, group_size=4, share=None, atoms=9).convert()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-6


def test_the_report_says_that_a_fit_in_groups_is_a_start() -> None:
    assert "start for training" in summary(prepared(small(), group_size=4).convert())["note"]
    assert "note" not in summary(prepared(small()).convert())
    assert "note" not in summary(prepared(small(), group_size=4, init="random").convert())


# ---------------------------------------------------------------------------------------------------- every convolution


@pytest.mark.parametrize(("conv", "shape"), KINDS, ids=lambda value: repr(value)[:40])
def test_convolutions_of_every_kind(conv: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    model = nn.Sequential(conv, nn.ReLU()).eval()
    compiled = prepared(model, (x,), share=None, atoms=32, include=["0"]).convert()
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-5
    assert list(layers(compiled.module)) == ["0"]
    compiled.save(tmp_path / "model.graphzip")
    with torch.no_grad():
        assert torch.equal(gz.load(tmp_path / "model.graphzip").module(x), compiled.module(x))


def test_a_convolution_alone() -> None:
    model, x = nn.Conv2d(4, 6, 3).eval(), torch.randn(2, 4, 9, 9)
    ready = prepared(model, share=None, atoms=9, include=["*"])
    with torch.no_grad():
        assert relative(model(x), ready(x)) < 1e-6
        assert relative(model(x), ready.convert().module(x)) < 1e-6


def test_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(self.conv(self.stem(x)).relu())
            return out

    model, x = Twice().eval(), torch.randn(2, 4, 9, 9)
    compiled = prepared(model, share=None, atoms=9).convert()
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-6
    assert list(layers(compiled.module)) == ["conv"]


def test_a_scope() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = small(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x))
            return out

    model, x = Whole().eval(), torch.randn(2, 4, 9, 9)
    plan = gz.Plan([gz.AtomFactorize(force=True, share=None, atoms=9, include=["body.1.*"])])
    compiled = gz.compile(model, plan, (x,), scope="body")
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-6
    assert list(layers(compiled.module)) == ["body.1.0"]


# ---------------------------------------------------------------------------------------------------- the result


def test_the_result_is_an_ordinary_module() -> None:
    module = prepared(small(), atom_drop=0.0).convert().module.eval()
    x = torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        expected = module(x)
        again = copy.deepcopy(module)
        assert torch.equal(again(x), expected)
        assert len({id(layer.coefficients) for layer in layers(again).values()}) == 1
        for parameter in again.parameters():
            parameter.zero_()
        assert not torch.equal(again(x), expected)
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(x), expected)
    assert sum(parameter.numel() for parameter in again.double().parameters()) == sum(
        parameter.numel() for parameter in module.parameters()
    )
    module.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_kernels_are_built_once_in_eval_and_never_stale() -> None:
    module = prepared(small(), atom_drop=0.0).convert().module.eval()
    layer = layers(module)["1.0"]
    with torch.no_grad():
        kept = layer.weight
        assert layer.weight is kept
        layer.atoms.mul_(2)
        assert torch.allclose(layer.weight, 2 * kept)
        module.half()
        assert layer.weight.dtype == torch.float16
        module.float()
        kept = layer.weight
        layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()})
        assert torch.allclose(layer.weight, 4 * kept, rtol=1e-2)
    assert layer.weight.requires_grad
    with torch.inference_mode():
        assert torch.equal(layer.weight, layer.kernel(training=False))


def test_files_stay_slim(tmp_path: Path) -> None:
    """Small shared factors: without care the exporter multiplies them out."""
    compiled = prepared(resnet20(), CIFAR).convert()
    compiled.save(tmp_path / "model.graphzip")
    report = compiled.export(tmp_path / "model.onnx")
    assert report.verified
    size = 4 * compiled.report.after.params
    dense = 4 * compiled.report.before.params
    assert report.bytes < size + 20_000
    assert report.bytes < dense / 6
    assert (tmp_path / "model.graphzip").stat().st_size < dense / 4
    again = gz.load(tmp_path / "model.graphzip")
    assert again.report.after == compiled.report.after
    with torch.no_grad():
        x = torch.randn(3, 3, 32, 32)
        assert torch.equal(again.module(x), compiled.module.eval()(x))


def test_vgg16_is_written_in_the_bytes_of_its_parameters(tmp_path: Path) -> None:
    compiled = prepared(VGG16(), CIFAR, init="random").convert()
    report = compiled.export(tmp_path / "vgg.onnx")
    assert report.verified
    assert report.bytes == pytest.approx(4 * compiled.report.after.params, rel=0.03)


def test_the_file_of_a_shuffled_network(tmp_path: Path) -> None:
    compiled = prepared(small(), group_size=4).convert()
    assert compiled.export(tmp_path / "model.onnx").verified
    assert 4 * compiled.report.after.params < compiled.export(tmp_path / "model.onnx").bytes


# ---------------------------------------------------------------------------------------------------- plans


def test_merged_first_and_factored_then() -> None:
    model, x = small().eval(), torch.randn(3, 4, 9, 9)
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.AtomFactorize(force=True, share=None, atoms=9)])
    ready = gz.prepare(model, plan, IMAGE)
    stages = list(ready.steps())
    assert stages == ["cluster_merge", "atom_factorize"]
    merged = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), IMAGE)
    compiled = ready.convert()
    with torch.no_grad():
        assert relative(merged.module(x), compiled.module(x)) < 1e-6
    assert layers(compiled.module)["3.0"].atoms.shape == (1, 9, 3, 3)
    assert [next(iter(entry)) for entry in compiled.report.passes] == ["cluster_merge", "atom_factorize"]


def test_what_is_trained_between_the_passes_counts() -> None:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.AtomFactorize(atom_drop=0.0, force=True)])
    ready = gz.prepare(small(), plan, IMAGE)
    seen = []
    for stage in ready.steps():
        seen.append((stage, sorted(layers(ready.model))))
        with torch.no_grad():
            for parameter in ready.parameters():
                parameter.mul_(0.5)
        expected = ready.eval()(IMAGE[0] + 1)
    assert seen == [("cluster_merge", []), ("atom_factorize", ["1.0", "2.0", "3.0"])]
    assert torch.allclose(ready.convert().module.eval()(IMAGE[0] + 1), expected, atol=1e-6)


def test_batch_norm_is_folded_before() -> None:
    model, x = small().eval(), torch.randn(3, 4, 9, 9)
    plan = gz.Plan([gz.FoldBatchNorm(), gz.AtomFactorize(force=True, share=None, atoms=9)])
    with torch.no_grad():
        assert relative(model(x), gz.compile(model, plan, IMAGE).module(x)) < 1e-5


def test_atoms_and_slices_in_one_plan() -> None:
    model, x = small().eval(), torch.randn(3, 4, 9, 9)
    plan = gz.Plan(
        [
            gz.AtomFactorize(force=True, share=None, atoms=9, include=["1.*"]),
            gz.SliceGenerate(force=True, slice=(8, 8, 3, 3), code=8, include=["2.*", "3.*"]),
        ]
    )
    with torch.no_grad():
        assert relative(model(x), gz.compile(model, plan, IMAGE).module(x)) < 1e-5


def test_a_plan_file(tmp_path: Path) -> None:
    plan = gz.Plan(
        [
            gz.AtomFactorize(force=True, atoms=4, share=None, exclude=["fc"]),
            gz.SliceGenerate(force=True, slice=[8, 8, 3, 3]),
        ]
    )
    plan.save(tmp_path / "plan.yaml")
    assert gz.Plan.load(tmp_path / "plan.yaml") == plan


def test_unreachable_coefficients_are_counted() -> None:
    model = nn.Sequential(block(4, 8), block(8, 16), block(16, 4))
    assert summary(prepared(model, atoms=2).convert())["unused_coefficients"] == 2 * 12 * 8
    assert "unused_coefficients" not in summary(prepared(small()).convert())


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(self.stem(x)) * self.one.weight.mean()
        return out


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (small, {"include": ["9.*"]}, "include[0]: '9.*' matches no convolution; "),
        (small, {"exclude": ["conv"]}, "exclude[0]: 'conv' matches no convolution; "),
        (small, {"exclude": ["*"]}, "no convolution is left to factor; name some in include"),
        (small, {"group_size": 3}, "group_size: 3 does not divide both widths of '1.0' (8 to 8 channels)"),
        (ReadTwice, {"include": ["one"]}, "include: 'one' cannot be factored: its kernel is read by other operators"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2)),
            {"group_size": 2},
            "group_size: '1' has groups already; choose another size or exclude it",
        ),
    ],
)
def test_plans_that_do_not_fit(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError) as caught:
        prepared(model(), **options)
    assert message in str(caught.value)
    assert "passes[0].atom_factorize" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atoms": 0}, "atoms: 0 is not a number of atoms; write an int of at least 1"),
        ({"share": "nets"}, "share: 'nets' is not one of 'net', 'block', 'layer', null (None)"),
        ({"group_size": True}, "group_size: True is not a number of channels; write an int of at least 1"),
        ({"atom_drop": 1.0}, "atom_drop: 1.0 is not a share of the atoms; write a number from 0 to below 1"),
        ({"include": "conv"}, "include: 'conv' is one glob; write a list: ['conv']"),
        ({"exclude": [3]}, "exclude: 3 is not a glob; a glob is text"),
        ({"weighted": 1}, "weighted: 1 is neither true nor false"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError) as caught:
        gz.AtomFactorize(**options)
    assert str(caught.value) == f"atom_factorize.{message}"


def test_the_order_is_checked() -> None:
    with pytest.raises(gz.PlanError) as caught:
        gz.Plan([gz.AtomFactorize(), gz.ClusterMerge()])
    assert str(caught.value) == (
        "passes[1].cluster_merge: stands behind atom_factorize, after which no kernels are whole; put it before"
    )


def test_torch_compile_takes_the_result() -> None:
    module = prepared(small()).convert().module.eval()
    x = torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        expected = module(x)
        assert torch.allclose(torch.compile(module, backend="eager")(x), expected, atol=1e-6)
