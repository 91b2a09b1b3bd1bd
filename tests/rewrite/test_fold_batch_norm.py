"""Folding batch norm: exact in float64, and only where nothing else notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import randomize_, relative
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

FOLD = gz.Plan([gz.FoldBatchNorm()])
IMAGE = (3, 4, 8, 8)


def folded(model: nn.Module, shape: tuple[int, ...], expected: list[str]) -> Any:
    """Fold in float64, check the outputs at two batch sizes and which layers took a batch norm in."""
    model = model.double().eval()
    randomize_(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = gz.compile(model, FOLD, (torch.randn(shape, dtype=torch.float64),))
    assert compiled.report.passes == ({"fold_batch_norm": {"folded": expected}},)
    assert compiled.report.changed == bool(expected)
    for batch in (shape[0], 1):
        x = torch.randn(batch, *shape[1:], dtype=torch.float64)
        with torch.no_grad():
            assert relative(model(x), compiled.module(x)) < 1e-12
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    return compiled


def pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(layer, norm, nn.ReLU())


LAYERS: list[tuple[Callable[[bool], nn.Module], Callable[..., nn.Module], int, tuple[int, ...]]] = [
    (lambda bias: nn.Conv1d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm1d, 6, (3, 4, 8)),
    (lambda bias: nn.Conv2d(4, 6, 3, stride=2, padding="valid", bias=bias), nn.BatchNorm2d, 6, IMAGE),
    (lambda bias: nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=bias), nn.BatchNorm2d, 6, IMAGE),
    (lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias), nn.BatchNorm2d, 8, IMAGE),
    (lambda bias: nn.Conv3d(4, 6, 2, bias=bias), nn.BatchNorm3d, 6, (3, 4, 3, 3, 3)),
    (lambda bias: nn.ConvTranspose1d(4, 6, 3, stride=2, bias=bias), nn.BatchNorm1d, 6, (3, 4, 5)),
    (lambda bias: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=bias), nn.BatchNorm2d, 6, IMAGE),
    (lambda bias: nn.ConvTranspose3d(4, 6, 2, bias=bias), nn.BatchNorm3d, 6, (3, 4, 3, 3, 3)),
    (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, 6, (3, 4)),
]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: repr(case[0](True)))
def test_layers_of_every_kind(case: Any, bias: bool, affine: bool) -> None:
    make, norm, width, shape = case
    layer = make(bias)
    compiled = folded(pair(layer, norm(width, affine=affine, eps=1e-2)), shape, ["0"])
    assert list(compiled.module.state_dict()) == ["0.weight", "0.bias"]
    found = compiled.module.get_submodule("0")
    assert type(found) is type(layer)
    assert found.bias is not None
    assert not any(isinstance(inner, nn.modules.batchnorm._BatchNorm) for inner in compiled.module.modules())


def test_names_of_a_network_are_kept() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, momentum=None)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    compiled = folded(Block(), IMAGE, ["conv1", "conv2"])
    assert list(compiled.module.state_dict()) == [
        f"{layer}.{leaf}" for layer in ("conv1", "conv2", "head") for leaf in ("weight", "bias")
    ]
    assert compiled.report.after.params < compiled.report.before.params
    assert compiled.report.after.macs == compiled.report.before.macs


def test_what_is_left_trains() -> None:
    model = pair(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    module = gz.compile(model, FOLD, (torch.randn(IMAGE),)).module
    assert module.training
    module(torch.randn(IMAGE)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    copy.deepcopy(module).load_state_dict(module.state_dict(), strict=True)


def test_dtype_and_frozen_parameters_are_kept() -> None:
    model = pair(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    module = gz.compile(model, FOLD, (torch.randn(IMAGE, dtype=torch.bfloat16),)).module
    for parameter in module.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad


def test_a_weight_that_is_a_buffer_stays_one() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.bn(F.conv2d(x, m.kernel))

    compiled = folded(Net(run, kernel=torch.randn(6, 4, 3, 3), bn=nn.BatchNorm2d(6)), IMAGE, ["kernel"])
    assert dict(compiled.module.named_buffers()).keys() == {"kernel", "kernel_bias"}


def test_functional_batch_norm_at_the_top() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return F.batch_norm(m.conv(x), m.mean, m.var, m.gain, None, m.training)

    parts = {"mean": torch.zeros(6), "var": torch.ones(6), "gain": nn.Parameter(torch.rand(6))}
    compiled = folded(Net(run, conv=nn.Conv2d(4, 6, 3), **parts), IMAGE, ["conv"])
    assert list(compiled.module.state_dict()) == ["conv.weight", "conv.bias"]


def test_a_name_that_is_taken() -> None:
    class Biased(nn.Module):
        """Its `bias` comes after the batch norm."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(6, 1, 1))
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.bn(F.conv2d(x, self.weight)) + self.bias
            return out

    compiled = folded(nn.Sequential(Biased()), IMAGE, ["0"])
    assert compiled.module.get_submodule("0").bias.shape == (6, 1, 1)
    compiled = folded(Biased(), IMAGE, ["weight"])
    assert dict(compiled.module.named_parameters()).keys() == {"weight", "bias", "bias_"}


def test_frozen_statistics_are_folded() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return F.batch_norm(m.conv(x), m.mean, m.var)

    parts = {"mean": torch.zeros(6), "var": torch.ones(6)}
    compiled = folded(Net(run, conv=nn.Conv2d(4, 6, 3), **parts), IMAGE, ["conv"])
    assert list(compiled.module.state_dict()) == ["conv.weight", "conv.bias"]


# --- where it must not -----------------------------------------------------------------------------------------------


def kept(run: Callable[..., Any], shape: tuple[int, ...] = IMAGE, **parts: Any) -> Any:
    compiled = folded(Net(run, **parts), shape, [])
    assert compiled.report.before == compiled.report.after
    return compiled


def test_a_convolution_that_is_read_twice() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return m.bn(y) + y

    kept(run, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))


def test_a_convolution_that_is_an_output() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return m.bn(y), y

    kept(run, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))


def test_a_shared_convolution() -> None:
    kept(lambda m, x: m.one(m.conv(x)) + m.two(m.conv(x + 1)), conv=nn.Conv2d(4, 6, 3), one=nn.BatchNorm2d(6),
         two=nn.BatchNorm2d(6))  # fmt: skip


def test_a_shared_bias() -> None:
    bias = nn.Parameter(torch.randn(6))

    def run(m: Any, x: Tensor) -> Any:
        return m.bn(F.conv2d(x, m.weight, m.shift)) + m.shift.view(6, 1, 1)

    kept(run, weight=nn.Parameter(torch.randn(6, 4, 3, 3)), shift=bias, bn=nn.BatchNorm2d(6))


def test_tied_layers_stay_tied() -> None:
    model = Net(lambda m, x: m.bn(m.one(x)), one=nn.Linear(4, 4), two=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    model.two.weight = model.one.weight
    compiled = folded(model, (3, 4), [])
    assert compiled.module.two.weight is compiled.module.one.weight
    both = Net(lambda m, x: m.two(m.bn(m.one(x))), one=nn.Linear(4, 4), two=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    both.two.weight = both.one.weight
    compiled = folded(both, (3, 4), [])
    assert compiled.module.two.weight is compiled.module.one.weight
    assert isinstance(compiled.module.bn, nn.BatchNorm1d)


def test_batch_statistics() -> None:
    """Those of the batch are not known before it is there."""
    folded(pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), IMAGE, [])
    parts = {"conv": nn.Conv2d(4, 6, 3), "mean": torch.zeros(6), "var": torch.ones(6)}
    model = Net(lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var, training=True), **parts).eval()
    x = torch.randn(IMAGE)
    compiled = gz.compile(model, FOLD, (x,))
    assert not compiled.report.changed
    assert torch.equal(model(x), compiled.module(x))


def test_batch_norm_over_another_dimension() -> None:
    kept(lambda m, x: m.bn(m.linear(x)), (3, 5, 4), linear=nn.Linear(4, 5), bn=nn.BatchNorm1d(5))
    conv = Net(lambda m, x: m.bn(m.conv(x[0])), conv=nn.Conv1d(4, 8, 3, padding=1), bn=nn.BatchNorm1d(8))
    model, x = conv.double().eval(), torch.randn(2, 4, 8, dtype=torch.float64)
    randomize_(model, 0)
    compiled = gz.compile(model, FOLD, (x,))
    assert not compiled.report.changed
    assert torch.equal(model(x), compiled.module(x))


def test_computed_weights() -> None:
    kernel, gain = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.rand(6))
    kept(lambda m, x: m.bn(F.conv2d(x, m.w * 2)), w=kernel, bn=nn.BatchNorm2d(6))

    def run(m: Any, x: Tensor) -> Any:
        return F.batch_norm(F.conv2d(x, m.w), m.mean, m.var, m.gain * 2, None, m.training)

    kept(run, w=nn.Parameter(torch.randn(6, 4, 3, 3)), gain=gain, mean=torch.zeros(6), var=torch.ones(6))


def test_grouped_transposed_convolutions_and_other_operators_between() -> None:
    folded(pair(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE, [])
    folded(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE, [])
    folded(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE, [])


def test_a_shared_batch_norm_is_folded_where_it_follows_a_layer() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.bn(m.one(x)) + m.bn(m.two(x).relu())

    model = Net(run, one=nn.Conv2d(4, 6, 3), two=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    compiled = folded(model, IMAGE, ["one"])
    assert isinstance(compiled.module.bn, nn.BatchNorm2d)
    assert "bn.num_batches_tracked" in compiled.module.state_dict()


# --- with other passes -----------------------------------------------------------------------------------------------


def test_folded_layers_are_merged_and_merged_ones_folded() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    merge = gz.ClusterMerge(clusters={"0": [[0, 1], [2, 3], [4], [5, 6, 7]]})
    model, x = model.double().eval(), torch.randn(IMAGE, dtype=torch.float64)
    randomize_(model, 0)
    with torch.no_grad():
        for kept_channel, gone in ((0, 1), (2, 3), (5, 6), (5, 7)):
            for tensor in (model[0].weight, *model[1].state_dict().values()):
                if tensor.dim():
                    tensor[gone] = tensor[kept_channel]
    for passes in ([merge, gz.FoldBatchNorm()], [gz.FoldBatchNorm(), merge]):
        compiled = gz.compile(model, gz.Plan(passes), (x,))
        assert compiled.module.get_submodule("0").weight.shape == (4, 4, 3, 3)
        assert compiled.module.get_submodule("0").bias.shape == (4,)
        assert list(compiled.module.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
        with torch.no_grad():
            assert relative(model(x), compiled.module(x)) < 1e-12
        assert [next(iter(summary)) for summary in compiled.report.passes] == [options.kind for options in passes]


def test_the_prepared_model_is_the_users_until_convert() -> None:
    model = pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    prepared = gz.prepare(model, FOLD, (torch.randn(IMAGE),))
    assert list(prepared.steps()) == ["fold_batch_norm"]
    fresh = gz.prepare(model, FOLD, (torch.randn(IMAGE),))
    assert isinstance(fresh.model, nn.Sequential)
    assert isinstance(fresh.model[1], nn.BatchNorm2d)
    assert fresh.deviation() == 0.0
    fresh.collapse_()
    fresh.pull_(0.5)
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    trained = fresh.model
    fresh.train()(torch.randn(IMAGE) + 3)
    module = fresh.convert().module.eval()
    x = torch.randn(IMAGE)
    torch.testing.assert_close(module(x), trained.eval()(x))
    assert not torch.allclose(module(x), model.eval()(x))
