"""Scaling and squeezing: wider layers that compute the same, and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_nets import ATTENTION_NETS
from nets import NETS, CifarResNet, Net
from planting import relative
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def double(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, inputs = (NETS | ATTENTION_NETS)[name]()
    return model.double().eval(), tuple(x.double() if x.is_floating_point() else x for x in inputs)


def back(wide: nn.Module, original: gz.ChannelGroups, inputs: tuple[Tensor, ...]) -> gz.Compiled:
    return gz.compile(wide, gz.Plan([gz.ClusterMerge(keep=original.widths())]), inputs)


SPREAD = [
    "cifar_resnet_pad", "cifar_resnet_projection", "cifar_densenet", "vgg_flatten", "grouped_after_cat",
    "pixel_shuffle_flatten", "channel_shuffle_view", "split_uneven", "pad_channels", "gathered_channels",
    "roll_channels",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        pytest.param(name, factor, marks=[pytest.mark.slow] * (number % 5 != 4))
        for number, (name, factor) in enumerate((name, factor) for name in SPREAD for factor in (2, 1.5))
    ],
)
def test_a_wide_model_computes_the_same_and_comes_back(name: str, factor: float) -> None:
    model, inputs = double(name)
    groups = gz.channel_groups(model, inputs)
    wide = gz.widen(model, inputs, factor)
    grown = gz.channel_groups(wide, inputs)
    assert grown.names == groups.names
    for before, after in zip(groups, grown, strict=True):
        grows = before.mergeable and not before.whole_blocks
        each = before.size // len(before.blocks)
        expected = len(before.blocks) * max(each, int(each * factor + 0.5)) if grows else before.size
        assert after.size == expected, before.name
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert relative(model(*inputs), wide(*inputs)) < 1e-12
        module = back(wide, groups, inputs).module
        assert relative(model(*inputs), module(*inputs)) < 1e-9
    assert {name: value.shape for name, value in module.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items() if name in module.state_dict()
    }


def test_scaling_and_squeezing() -> None:
    """Section 3.7: widen, train, bring together while training on; the result fits the original class."""
    model = CifarResNet(1, (4, 8, 16))
    inputs = (torch.randn(4, 3, 16, 16),)
    groups = gz.channel_groups(model, inputs)
    wide = gz.widen(model, inputs, 1.25)
    assert wide.training
    assert wide.get_parameter("layer2.0.conv1.weight").shape[0] == 10
    plan = gz.Plan([gz.ClusterMerge(keep=groups.widths(), strength="auto")])
    prepared = gz.prepare(wide, plan, inputs)
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, steps=12)
    for _ in range(12):
        loss = (prepared(torch.randn(4, 3, 16, 16)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module = prepared.convert().module
    again = CifarResNet(1, (4, 8, 16))
    again.load_state_dict(module.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(*inputs), module.eval()(*inputs))


def test_copies_part_in_training() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = (torch.randn(5, 3, dtype=torch.float64),)
    wide = gz.widen(model, inputs, 2)
    weight = wide.get_parameter("0.weight")
    assert torch.equal(weight[0], weight[1])
    wide(*inputs).square().sum().backward()
    assert float((weight.grad[0] - weight.grad[1]).abs().max()) > 1e-3
    reader = wide.get_parameter("2.weight")
    torch.testing.assert_close(reader.view(2, 4, 2).sum(2), model[2].weight)


def test_a_seed_gives_the_same_model() -> None:
    model, inputs = double("cifar_resnet_pad")
    first, second, third = (gz.widen(model, inputs, 2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_a_fresh_model() -> None:
    model, inputs = double("cifar_resnet_pad")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wide = gz.widen(model, inputs, 2, init="fresh", seed=3)
    weight = wide.get_parameter("layer1.0.conv1.weight")
    assert weight.shape == (8, 8, 3, 3)
    assert len(torch.unique(weight)) == weight.numel()
    assert torch.equal(weight, gz.widen(model, inputs, 2, init="fresh", seed=3).get_parameter("layer1.0.conv1.weight"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_widths_by_name() -> None:
    model, inputs = double("cifar_resnet_projection")
    wide = gz.widen(model, inputs, {"layer1.0.conv1": 7, "layer[12].*": 1.5}, exclude=["layer2.0.conv2"])
    sizes = {group.name: group.size for group in gz.channel_groups(wide, inputs)}
    before = {group.name: group.size for group in gz.channel_groups(model, inputs)}
    assert sizes["layer1.0.conv1"] == 7
    assert sizes["layer1.1.conv1"] == 6
    changed = {name for name, size in sizes.items() if size != before[name]}
    assert changed == {name for name in sizes if name.startswith(("layer1", "layer2"))} - {"layer2.0.conv2"}


def layers(x: Tensor | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    return model.eval(), (torch.randn(5, 3, dtype=torch.float64),)


def test_a_norm_over_channels() -> None:
    """Statistics stay what they are where every channel is copied as often; else the model can only start anew."""
    model, inputs = layers()
    assert relative(model(*inputs), gz.widen(model, inputs, 2)(*inputs)) < 1e-12
    with torch.no_grad():
        model[2].weight.mul_(1e-6)  # so little depends on it that the outputs would look the same
    with pytest.raises(gz.RewriteError, match=r"layer_norm.* is a norm over channels of which some .*init='fresh'"):
        gz.widen(model, inputs, 1.5)
    assert gz.widen(model, inputs, 1.5, init="fresh").get_parameter("1.weight").shape == (6,)
    assert gz.widen(model, inputs, 1.5, exclude=["0"]).get_parameter("2.weight").shape == (9, 4)


def test_outputs_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphzip.training.widen.drift", lambda *_: 0.5)
    with pytest.raises(gz.RewriteError, match=r"outputs of the widened model differ by 5.0e-01 .*init='fresh'"):
        gz.widen(*layers(), 2)


def heads(x: Tensor, number: int = 2) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def attended(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def own_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    return (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)


COUNTING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": attended,
    "attention with a scale": lambda m, x: attended(m, x, scale=0.4),
    "attention that looks back": lambda m, x: attended(m, x, is_causal=True),
    "attention of its own": own_attention,
    "products": lambda m, x: torch.einsum("bst,btd->bsd", torch.einsum("bsc,btc->bst", m.q(x), m.k(x)), m.v(x)),
    "softmax": lambda m, x: m.q(x).softmax(-1) + m.k(x).log_softmax(-1),
    "sums": lambda m, x: m.v(x) * m.q(x).sum(-1, keepdim=True) + m.q(x).logsumexp(-1, keepdim=True),
    "moments": lambda m, x: m.v(x) / m.q(x).std(-1, keepdim=True) + m.q(x).mean(-1, keepdim=True),
    "lengths": lambda m, x: F.normalize(m.v(x), dim=-1) + m.q(x).norm(p=1, dim=-1, keepdim=True),
    "cosines": lambda m, x: m.v(x) * F.cosine_similarity(m.q(x), m.k(x), dim=-1).unsqueeze(-1),
    "a count": lambda m, x: m.v(x) * torch.ones_like(m.q(x)).sum(-1, keepdim=True),
    "a computed weight": lambda m, x: F.linear(m.q(x), m.v.weight.repeat(1, 2) * m.k.weight[:, :1]),
    "states": lambda m, x: m.units(m.q(x))[0],
}
"""What counts the channels between `q`, `k`, `v` and what reads the result."""


def counting(name: str) -> nn.Module:
    layers = {each: nn.Linear(8, 16) for each in "qkv"}
    units = nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True)
    run = COUNTING[name]
    return Net(lambda m, x: m.o(run(m, x)), o=nn.Linear(16, 3), units=units, **layers).double().eval()


@pytest.mark.parametrize("factor", [2, 1.5])
@pytest.mark.parametrize("name", COUNTING)
def test_channels_that_are_counted(name: str, factor: float) -> None:
    """Copies stand for one channel together, wherever no parameter that is split among them reads them."""
    model, inputs = counting(name), (torch.randn(4, 5, 8, dtype=torch.float64),)
    groups = gz.channel_groups(model, inputs)
    wide = gz.widen(model, inputs, factor)
    assert wide.get_parameter("q.weight").shape[0] == 16 * factor
    other = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        for x in (*inputs, other):
            assert relative(model(x), wide(x)) < 1e-12
        slim = back(wide, groups, inputs).module
        assert relative(model(other), slim(other)) < 1e-9
    assert {key: value.shape for key, value in slim.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items() if key in slim.state_dict()
    }


def test_a_default_scale_is_written_out() -> None:
    model, inputs = counting("attention"), (torch.randn(2, 5, 8, dtype=torch.float64),)
    wide = gz.widen(model, inputs, 2)
    scales = [node.kwargs["scale"] for node in wide.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert scales == pytest.approx([0.5 / 8**0.5])
    fresh = gz.widen(model, inputs, 2, init="fresh")
    scales = [node.kwargs["scale"] for node in fresh.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert scales == pytest.approx([1 / 8**0.5])


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (0.5, {}, "factor: 0.5 is below 1; to make a group narrower use ClusterMerge"),
    ("2", {}, "factor: '2' is not a factor; write a number of at least 1"),
    ({"0": 3}, {}, "factor['0']: group '0' has 4 channels in 1 blocks; give a larger number"),
    ({"9": 2.0}, {}, "'9' matches no channel group"),
    ({"4": 2.0}, {}, "factor['4']: group '4' cannot grow: is an output of the model"),
    (2, {"exclude": ["x"]}, "'x' matches no channel group"),
    (2, {"init": "new"}, "init: 'new' is unknown; write 'preserve' or 'fresh'"),
]


@pytest.mark.parametrize(("factor", "options", "message"), REFUSALS)
def test_refusals(factor: Any, options: dict[str, Any], message: str) -> None:
    model, inputs = layers()
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        gz.widen(model, inputs, factor, **options)
