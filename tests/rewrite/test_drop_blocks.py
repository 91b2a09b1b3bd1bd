"""DropBlocks: which residual branches there are, what goes, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_cases import Added, residual
from torch import nn
from torchvision import models

import graphzip as gz
from graphzip.analysis.residuals import residuals
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

X = torch.randn(4, 3, 16, 16, dtype=torch.float64)


def names(model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    return [block.name for block in residuals(trace(model.eval(), inputs))]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and an MLP, each with a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.scale * self.mlp(x)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Parallel(nn.Module):
    """Attention and MLP beside each other, and a GELU written out, which is no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.left(x) + self.right(x)
        x = 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044 * x**3)))
        return self.head(x)  # type: ignore[no-any-return]


def test_the_branches_of_known_networks() -> None:
    image = torch.randn(2, 3, 32, 32)
    assert names(models.resnet18(weights=None), image) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    assert names(Transformer(), torch.randn(2, 5, 3)) == [
        f"layers.{number}.{part}" for number in range(3) for part in ("attn", "mlp")
    ]
    assert names(Parallel(), torch.randn(2, 6)) == ["left", "right"]
    assert names(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)) == []


class Bottleneck(nn.Module):
    """A block of a ResNet, with a projection where `stride` is two."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.downsample = None if stride == 1 else nn.Conv2d(8, 8, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out += x if self.downsample is None else self.downsample(x)
        return out.relu()  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    """A block of a ConvNeXt: a depthwise convolution, an MLP with channels last, a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.wide, self.thin = nn.Linear(8, 16), nn.Linear(16, 8)
        self.layer_scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.thin(nn.functional.gelu(self.wide(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + self.layer_scale * inner.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def stacked(*blocks: nn.Module) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *head).double().eval()


def zero_resnet() -> tuple[nn.Module, torch.Tensor, list[str]]:
    blocks = [Bottleneck(stride) for stride in (1, 1, 2, 1)]
    for block in (blocks[1], blocks[3]):
        nn.init.zeros_(block.bn2.weight)
    return stacked(*blocks), X, ["2", "4"]


def zero_transformer() -> tuple[nn.Module, torch.Tensor, list[str]]:
    model = Transformer().double()
    first, last = model.layers[0], model.layers[2]
    assert isinstance(first, Layer)
    assert isinstance(last, Layer)
    for tensor in (first.attn.out.weight, first.attn.out.bias, last.scale):
        nn.init.zeros_(tensor)
    return model, torch.randn(4, 5, 3, dtype=torch.float64), ["layers.0.attn", "layers.2.mlp"]


def zero_convnext() -> tuple[nn.Module, torch.Tensor, list[str]]:
    blocks = [ConvNeXt() for _ in range(3)]
    nn.init.zeros_(blocks[1].layer_scale)
    return stacked(*blocks), X, ["2"]


@pytest.mark.parametrize("make", [zero_resnet, zero_transformer, zero_convnext])
@pytest.mark.parametrize("with_data", [False, True])
def test_a_branch_that_gives_zero_goes_without_loss(make: Callable[[], Any], with_data: bool) -> None:
    model, x, zero = make()
    model.eval()
    count = len(names(model, x))
    data = [x, x + 1] if with_data else None
    plan = gz.Plan([gz.DropBlocks(keep=count - len(zero))])
    compiled = gz.compile(model, plan, (x,), calibration=data)
    assert compiled.report.passes[0]["drop_blocks"]["dropped"] == zero
    assert compiled.report.lossless
    assert compiled.report.after.params < compiled.report.before.params
    for batch in (x, x[:1], torch.randn_like(x)):
        torch.testing.assert_close(compiled.module(batch), model(batch), rtol=1e-9, atol=1e-9)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in compiled.module.state_dict().items())
    rest = gz.compile(model, gz.Plan([*plan.passes, gz.ClusterMerge(keep=0.5)]), (x,), calibration=data)
    assert rest.report.after.macs < compiled.report.after.macs


def small() -> nn.Module:
    """Three branches of very different size."""
    model = residual().double()
    with torch.no_grad():
        for number, size in ((1, 0.5), (2, 2.0), (3, 0.01)):
            norm: Any = model.get_submodule(f"{number}.inner.1")
            norm.weight.fill_(size)
            norm.bias.fill_(size)
    return model


def test_without_data_the_branch_with_the_smallest_weights_goes_and_training_may_change_that() -> None:
    model = small()
    dropped = [
        gz.compile(model, gz.Plan([gz.DropBlocks(keep=keep)]), (X,)).report.passes[0]["drop_blocks"]["dropped"]
        for keep in (3, 2, 1, 0, 0.5, 1.0)
    ]
    assert dropped == [[], ["3"], ["1", "3"], ["1", "2", "3"], ["1", "3"], []]

    def train(prepared: gz.Prepared, stage: str) -> None:
        assert stage == "drop_blocks"
        norm: Any = prepared.get_submodule("model.2.inner.1")
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)

    trained = gz.compile(model, gz.Plan([gz.DropBlocks(keep=2)]), (X,), train=train)
    assert trained.report.passes[0]["drop_blocks"]["dropped"] == ["2"]


def test_with_data_the_branch_goes_that_moves_the_outputs_least() -> None:
    model = small()
    head: Any = model[-1]
    with torch.no_grad():
        for number in (1, 2, 3):
            norm: Any = model.get_submodule(f"{number}.inner.1")
            norm.weight[:4], norm.bias[:4] = 0.0, 0.0  # what the head reads does not change by the second one
        big: Any = model.get_submodule("2.inner.1")
        big.weight[:4], big.weight[4:] = 0.0, 50.0
        head.weight[:, 4:] = 0.0
        for number in (1, 3):
            norm = model.get_submodule(f"{number}.inner.1")
            norm.weight[:4] = 1.0
        last: Any = model.get_submodule("3.inner.0")
        last.weight[:4, 4:] = 0.0
    data = [torch.randn(16, 3, 16, 16, dtype=torch.float64) for _ in range(3)]
    plan = gz.Plan([gz.DropBlocks(keep=2)])
    with_data = gz.compile(model, plan, (X,), calibration=data)
    assert with_data.report.passes[0]["drop_blocks"]["dropped"] == ["2"]
    assert gz.compile(model, plan, (X,)).report.passes[0]["drop_blocks"]["dropped"] != ["2"]
    assert not with_data.report.lossless
    assert "residual branches were left out" in str(with_data.report)
    torch.testing.assert_close(with_data.module(X), model(X))


class Scaled(nn.Module):
    """A branch that is an affine map of every channel, which a scale and a shift stand for exactly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.diag(torch.randn(channels))[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def test_scale_and_shift_are_fitted_to_what_the_sum_gave(tmp_path: Any) -> None:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Added(Scaled(6)), Added(Scaled(6)), *head).double().eval()
    data = [torch.randn(8, 3, 16, 16, dtype=torch.float64) for _ in range(2)]
    compiled = gz.compile(model, gz.Plan([gz.DropBlocks(keep=0)]), (X,), calibration=data)
    torch.testing.assert_close(compiled.module(X), model(X), rtol=1e-6, atol=1e-6)
    assert compiled.report.passes[0]["drop_blocks"]["fitted"] == ["2", "3"]
    state = compiled.module.state_dict()
    assert state["2.bypass_scale"].shape == state["3.bypass_shift"].shape == (6, 1, 1)
    compiled.save(tmp_path / "slim.graphzip")
    torch.testing.assert_close(gz.load(tmp_path / "slim.graphzip").module(X), compiled.module(X))
    merged = gz.compile(model, gz.Plan([gz.DropBlocks(keep=0), gz.ClusterMerge(keep=0.5)]), (X,), calibration=data)
    assert merged.module.state_dict()["2.bypass_scale"].shape == (3, 1, 1)


def test_the_channels_of_a_transformer_are_the_last_dimension() -> None:
    model = Transformer().double().eval()
    x = torch.randn(8, 5, 3, dtype=torch.float64)
    compiled = gz.compile(model, gz.Plan([gz.DropBlocks(keep=1, blocks=["*.mlp"])]), (x,), calibration=[x])
    details = compiled.report.passes[0]["drop_blocks"]
    assert len(details["dropped"]) == 2
    assert details["fitted"] == details["dropped"]
    assert {value.shape for name, value in compiled.module.named_parameters() if "bypass" in name} == {(8,)}


WRONG: dict[str, tuple[gz.DropBlocks, Callable[[], nn.Module], str]] = {
    "glob": (
        gz.DropBlocks(blocks=["layer9.*"]),
        residual,
        r"passes\[0\].drop_blocks.blocks\[0\]: 'layer9.\*' matches no residual block",
    ),
    "too many": (gz.DropBlocks(keep=4), residual, r"drop_blocks.keep: 4 blocks cannot be kept of 3; write a number up"),
    "none": (gz.DropBlocks(), lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "the model has no residual branches .* take"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_fits_no_branch_is_refused_at_once(name: str) -> None:
    options, make, message = WRONG[name]
    with pytest.raises(gz.PlanError, match=message):
        gz.prepare(make(), gz.Plan([options]), (X.float(),))


@pytest.mark.parametrize("keep", [-1, 1.5, True, "half", float("nan")])
def test_a_number_of_blocks_that_is_none_is_refused(keep: Any) -> None:
    with pytest.raises(gz.PlanError, match=r"drop_blocks\.keep: .*(blocks|keep)"):
        gz.Plan.from_dict({"version": 1, "passes": [{"drop_blocks": {"keep": keep}}]})


class Deep(nn.Module):
    """A branch that is dropped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        x = x + self.inner(x)
        return (self.head(x), x) if self.training else self.head(x)


def test_both_forms_at_once_are_refused() -> None:
    with pytest.raises(gz.PlanError, match="a branch would go from one of them; compile with mode='eval'"):
        gz.compile(Deep(), gz.Plan([gz.DropBlocks(keep=0)]), (torch.randn(2, 4),), mode="train")


class Attending(nn.Module):
    """`x + attention(x)`, whose dropout is off."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def test_attention_that_is_left_out_is_gone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Attending(), nn.Linear(8, 3)).eval()
    compiled = gz.compile(model, gz.Plan([gz.DropBlocks(keep=0)]), (torch.randn(2, 5, 6),))
    assert not [name for name in compiled.module.state_dict() if "qkv" in name or "out" in name]
    assert compiled.report.after.macs == 5 * (6 * 8 + 8 * 3)


def test_attention_in_an_output_that_is_left_out_is_gone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(6, 8), Attending()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": self.first(x), "b": self.attention(self.first(x))}

    compiled = gz.compile(Two().eval(), gz.Plan([]), (torch.randn(2, 5, 6),), outputs=["a"])
    assert compiled.report.after.macs == 5 * 6 * 8
