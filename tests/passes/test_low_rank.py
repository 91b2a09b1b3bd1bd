"""Layers as products of thinner ones: exact at full rank, the best of their rank, cut only where that is cheaper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_nets import ATTENTION_NETS
from nets import NETS
from planting import double, randomize_, relative
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

METHODS = ("svd", "data-svd", "cp-spatial", "tucker")


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 12, 12, dtype=torch.float64)


def network() -> nn.Sequential:
    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding="same", bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 16, (3, 5), padding=(1, 2), stride=(1, 2), dilation=(1, 1)),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4, padding=1),
            nn.Flatten(),
            nn.Linear(16 * 18, 32),
            nn.ReLU(),
            nn.Linear(32, 20),
        )
        .double()
        .eval()
    )


def compiled(model: nn.Module, *, data: bool = True, **options: Any) -> gz.Compiled:
    calibration = [images(16)] if data else None
    return gz.compile(model, gz.Plan([gz.LowRank(**options)]), (images(),), calibration=calibration)


def ranks(result: gz.Compiled) -> dict[str, list[int]]:
    found: dict[str, list[int]] = result.report.passes[0]["low_rank_factors"]["ranks"]
    return found


def plant(layer: Any, rank: int) -> None:
    """The weight has this rank, as a matrix of outputs by the rest."""
    rows = layer.weight.detach().flatten(1)
    with torch.no_grad():
        layer.weight.copy_((rows[:, :rank] @ rows[:rank]).reshape(layer.weight.shape))


@pytest.mark.parametrize("method", ["svd", "data-svd", "tucker"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_rank_that_is_there_is_found_without_loss(method: str, batch: int) -> None:
    model = network()
    plant(model[2], 4)
    plant(model[9], 5)
    result = compiled(model, method=method, energy=1.0)
    found = ranks(result)
    assert found["2"][-1] == 4
    assert found["9"] == [5]
    assert set(found) == {"2", "9"}
    x = images(batch)
    assert relative(model(x), result.module(x)) < 1e-9
    assert result.report.lossless
    assert result.report.after.params < result.report.before.params
    trained = result.module.train()(x)
    assert relative(model.train()(x), trained) < 1e-9


def test_a_spatial_rank_that_is_there_is_found_without_loss() -> None:
    model = network()
    layer: Any = model[2]
    with torch.no_grad():
        sides = torch.randn(3, 16, 3, dtype=torch.float64), torch.randn(24, 3, 3, dtype=torch.float64)
        layer.weight.copy_(torch.einsum("qih,oqw->oihw", *sides))
    result = compiled(model, method="cp-spatial", energy=1.0, include=["2"])
    assert ranks(result) == {"2": [3]}
    x = images(2)
    assert relative(model(x), result.module(x)) < 1e-9
    first, second = result.module.get_submodule("2.0"), result.module.get_submodule("2.1")
    assert (first.weight.shape, second.weight.shape) == ((3, 16, 3, 1), (24, 3, 1, 3))


@pytest.mark.parametrize("method", METHODS)
def test_what_has_full_rank_stays_as_it_is(method: str) -> None:
    model = network()
    for options in ({"energy": 1.0}, {"rank": 1.0}, {"rank": 10_000}):
        result = compiled(model, method=method, **options)
        assert not result.report.changed
        assert all(
            torch.equal(one, other) for one, other in zip(model.parameters(), result.module.parameters(), strict=True)
        )
        assert "and whole" in result.report.passes[0]["low_rank_factors"]["left"]["2"]


@pytest.mark.parametrize(
    "name",
    [
        name if number % 16 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate([*NETS, *ATTENTION_NETS])
    ],
)
def test_all_of_the_energy_is_exact_and_never_refused(name: str) -> None:
    """On any network, of whose weights some have a low rank by construction or by planting."""
    model, inputs = (NETS | ATTENTION_NETS)[name]()
    model = double(model)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    randomize_(model, 0, inputs)
    planted = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and min(layer.weight.flatten(1).shape) > 8:
            plant(layer, 2)
            planted.append(path)
    result = gz.compile(model, gz.Plan([gz.LowRank(energy=1.0)]), inputs)
    assert result.report.lossless
    assert relative(model(*inputs), result.module(*inputs)) < 1e-9
    assert all(found == [2] for layer, found in ranks(result).items() if layer in planted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, (2, 1)])
def test_what_is_cut_is_the_product_of_its_factors(method: str, bias: bool, stride: Any) -> None:
    """The thin layers give what a layer with the product of their weights gives."""
    layer = nn.Conv2d(12, 16, (3, 5), padding=(2, 1), stride=stride, dilation=(1, 2), bias=bias).double()
    x = torch.randn(3, 12, 11, 13, dtype=torch.float64)
    plan = gz.Plan([gz.LowRank(method=method, rank=0.3, compensate="none")])
    result = gz.compile(nn.Sequential(layer), plan, (x,), calibration=[x])
    parts = [each.weight.detach() for each in result.module.get_submodule("0").children()]
    if method == "cp-spatial":
        product = torch.einsum("rih,orw->oihw", parts[0][..., 0], parts[1][:, :, 0])
    elif method == "tucker":
        product = torch.einsum("qi,rqhw,or->oihw", parts[0][:, :, 0, 0], parts[1], parts[2][:, :, 0, 0])
    else:
        product = torch.einsum("rihw,or->oihw", parts[0], parts[1][:, :, 0, 0])
    layer.weight.data.copy_(product)
    assert relative(layer(x), result.module(x)) < 1e-12
    assert [each.bias is not None for each in result.module.get_submodule("0").children()][:-1].count(True) == 0
    assert not result.report.lossless


def test_no_weight_of_the_rank_is_nearer() -> None:
    """Of all weights of a rank, `svd` is nearest to the weight and `data-svd` to what the layer gives."""
    layer = nn.Linear(20, 24, bias=False).double()
    x = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(0, -2, 20, dtype=torch.float64)

    def product(method: str) -> Tensor:
        plan = gz.Plan([gz.LowRank(method=method, rank=6, compensate="none")])
        module = gz.compile(nn.Sequential(layer), plan, (x,), calibration=[x]).module
        found: Tensor = module.get_submodule("0.1").weight.detach() @ module.get_submodule("0.0").weight.detach()
        return found

    weight = layer.weight.detach()
    left, values, right = torch.linalg.svd(weight)
    torch.testing.assert_close(product("svd"), (left[:, :6] * values[:6]) @ right[:6])
    wanted = torch.linalg.svd(x @ weight.T, full_matrices=False)
    nearest = (wanted[0][:, :6] * wanted[1][:6]) @ wanted[2][:6]
    best = float((x @ weight.T - nearest).norm())
    assert best <= float((x @ weight.T - x @ product("data-svd").T).norm()) < (1 + 1e-3) * best
    assert float((x @ weight.T - x @ product("svd").T).norm()) > 1.5 * best


def test_the_energy_says_the_rank() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).double()
    model[0].weight.data.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0] + [0.1] * 60)))
    x = torch.randn(2, 64, dtype=torch.float64)
    for energy, rank in ((0.5, 1), (0.6, 2), (0.9, 3), (0.97, 4)):
        result = gz.compile(model, gz.Plan([gz.LowRank(energy=energy)]), (x,))
        assert ranks(result) == {"0": [rank]}


def test_what_is_left_is_fitted_to_the_original() -> None:
    model = network()
    x = images(64)
    lost = [
        relative(model(x), compiled(model, rank=0.25, compensate=compensate).module(x))
        for compensate in ("none", "data")
    ]
    assert lost[1] < 0.8 * lost[0]


def test_ranks_by_name_and_the_layers_that_are_meant() -> None:
    model = network()
    assert ranks(compiled(model, rank={"2": 3, "9": 0.25})) == {"2": [3], "9": [8]}
    assert set(ranks(compiled(model, rank=4, exclude=["2", "5"]))) == {"0", "9", "11"}
    assert set(ranks(compiled(model, rank=4, include=["2"]))) == {"2"}
    left = compiled(model, rank=4).report.passes[0]["low_rank_factors"]["left"]
    assert left == {"7": "its convolution has groups"}


class Named(nn.Module):
    """Weights that are called something else, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 24, dtype=torch.float64))
        self.shared = nn.Linear(24, 24, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.shared(self.shared(nn.functional.linear(x, self.w)).relu())
        return found


def test_weights_of_other_names_and_shared_ones() -> None:
    model, x = Named(), torch.randn(3, 24, dtype=torch.float64)
    result = gz.compile(model, gz.Plan([gz.LowRank(rank=4)]), (x,))
    assert ranks(result) == {"w": [4]}
    assert set(dict(result.module.named_parameters())) == {
        "w_low_rank.0.weight",
        "w_low_rank.1.weight",
        "shared.weight",
        "shared.bias",
    }


def test_it_is_exported_saved_and_trained(tmp_path: Any) -> None:
    model, x = network().float(), images().float()
    plan = gz.Plan([gz.LowRank(rank=0.25)])
    result = gz.compile(model, plan, (x,), calibration=[x])
    assert result.export(tmp_path / "thin.onnx").verified
    result.save(tmp_path / "thin.graphzip")
    assert torch.equal(gz.load(tmp_path / "thin.graphzip").module(x), result.module(x))
    result.module(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in result.module.parameters())
    again = gz.compile(result.module, gz.Plan([gz.ClusterMerge(keep=0.5)]), (x,))
    assert again.report.after.params < result.report.after.params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"energy": 0},
            "low_rank_factors.energy: 0 is not a share of the energy; write a number above 0 and at most 1",
        ),
        ({"energy": 1.5}, "low_rank_factors.energy: 1.5 is not a share of the energy"),
        ({"rank": 0}, r"low_rank_factors.rank: 0"),
        ({"method": "qr"}, r"low_rank_factors.method"),
        ({"include": ["conv9"]}, r"passes\[0\].low_rank_factors.include: 'conv9' matches no layer; "),
        ({"rank": {"conv9": 3}}, r"passes\[0\].low_rank_factors.rank: 'conv9' matches no layer; "),
        (
            {"method": "data-svd"},
            r"passes\[0\].low_rank_factors.method: 'data-svd' needs calibration data; pass calibration=",
        ),
        ({"compensate": "data"}, r"passes\[0\].low_rank_factors.compensate: 'data' needs calibration data"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError, match=message):
        compiled(network(), data=False, **options)


def test_weights_that_are_not_finite() -> None:
    model = network()
    model[2].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(gz.WeightsError, match="layer '2': there are values that are NaN"):
        compiled(model, data=False, rank=4)
