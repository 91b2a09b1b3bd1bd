"""What makes up for dropped channels, what draws them to zero, and zeros that go without a trace."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import relative
from residual_net import residual
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


class Over(nn.Module):
    """Channels, some of them zero, that something reads which is taken over all of them."""

    def __init__(self, over: Callable[[Tensor], Tensor], size: int = 12, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.make, self.over = nn.Conv2d(3, size, 1), over
        self.norm = norm or nn.Identity()
        self.head = nn.Conv2d(size, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.make(x))
        return self.head(y) + self.over(y)


def last(y: Tensor, norm: nn.Module) -> Tensor:
    return norm(y.movedim(1, -1)).movedim(-1, 1)


class Normed(nn.Module):
    """Channels, some of them zero, that are normalised, and what reads them."""

    def __init__(self, norm: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.make, self.norm, self.head = nn.Conv2d(3, 12, 1), norm, nn.Conv2d(12, 5, 1)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x)
        return self.head(last(y, self.norm) if self.channels_last else self.norm(y))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: Normed(nn.LayerNorm(12), channels_last=True),
    "rms_norm": lambda: Normed(nn.RMSNorm(12), channels_last=True),
    "group_norm": lambda: Normed(nn.GroupNorm(3, 12), channels_last=False),
    "group_norm_one": lambda: Normed(nn.GroupNorm(1, 12), channels_last=False),
    "mean": lambda: Over(lambda y: y.mean(1, keepdim=True)),
    "mean_of_all": lambda: Over(lambda y: y.mean((1, 2, 3))[:, None, None, None]),
    "sum": lambda: Over(lambda y: y.sum(1, keepdim=True)),
    "var": lambda: Over(lambda y: y.var(1, keepdim=True)),
    "std": lambda: Over(lambda y: y.std((1, 2), correction=0, keepdim=True)),
    "norm": lambda: Over(lambda y: torch.linalg.vector_norm(y, dim=1, keepdim=True)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_zeros_go_without_a_trace(name: str, batch: int) -> None:
    """Also where the mean of the others is far from zero; what scales and shifts a zero is zero, too."""
    model: Any = NORMS[name]().double().eval()
    gone = [0, 3, 4, 9, 11]
    with torch.no_grad():
        model.make.bias.add_(1.0)
        for parameter in model.norm.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        gone = [3, 7, 11] if name == "group_norm" else gone
        for parameter in (*model.make.parameters(), *model.norm.parameters()):
            parameter[gone] = 0.0
    x = torch.randn(batch, 3, 4, 6, dtype=torch.float64)
    (group,) = [each.name for each in gz.channel_groups(model, (x,)) if each.size == 12]
    plan = gz.Plan([gz.PruneChannels(keep={group: 12 - len(gone)})])
    compiled = gz.compile(model, plan, (x,))
    assert compiled.report.passes[0]["prune_channels"]["dropped"] == {group: gone}
    for rows in (1, 2):
        x = torch.randn(rows, 3, 4, 6, dtype=torch.float64)
        assert relative(model(x), compiled.module(x)) < 1e-12


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "std"])
def test_norms_that_count_zeros_are_exported_and_saved(name: str, tmp_path: Path) -> None:
    model: Any = NORMS[name]().eval()
    x = torch.randn(2, 3, 4, 6)
    compiled = gz.compile(model, gz.Plan([gz.PruneChannels(keep=0.5)]), (x,))
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.save(tmp_path / "slim.graphzip")
    assert torch.equal(gz.load(tmp_path / "slim.graphzip").module(x), compiled.module(x))


def test_plain_norms_are_taken_of_what_is_left() -> None:
    model: Any = NORMS["layer_norm"]().double().eval()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    slim = gz.compile(model, gz.Plan([gz.PruneChannels(norms="plain")]), (x,)).module
    assert isinstance(slim.get_submodule("norm"), nn.LayerNorm)
    exact = gz.compile(model, gz.Plan([gz.PruneChannels()]), (x,)).module
    assert relative(slim(x), exact(x)) > 1e-3


# ---------------------------------------------------------------------------------------------------- without data


def normal_net() -> nn.Sequential:
    """Its batch norms have the statistics of what they read."""
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 16, 3, bias=False), nn.BatchNorm2d(16), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.2, 1.5)
            module.momentum = None
    for _ in range(8):
        model(torch.randn(64, 3, 10, 10))
    return model.eval()


def test_free_makes_up_for_means_and_variances() -> None:
    model, x = normal_net(), torch.randn(256, 3, 10, 10)
    lost = {}
    for compensate in ("none", "free"):
        plan = gz.Plan([gz.PruneChannels(keep=0.5, compensate=compensate)])
        compiled = gz.compile(model, plan, (x[:2],))
        with torch.no_grad():
            lost[compensate] = relative(model(x), compiled.module(x))
    assert compiled.report.passes[0]["prune_channels"]["corrected"] == ["3.weight", "8.weight"]
    assert lost["free"] < 0.6 * lost["none"]


def test_free_by_hand() -> None:
    """A constant channel, whose batch norm has no scale, is dropped without loss where nothing is padded."""
    model = normal_net().double()
    norm: Any = model[1]
    with torch.no_grad():
        norm.weight[:8], norm.bias[:8] = 0.0, 2.0
        norm.weight[8:].add_(1.0)
    x = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    plan = gz.Plan([gz.PruneChannels(keep={"0": 16}, criterion="bn_scale", compensate="free")])
    compiled = gz.compile(model, plan, (x,))
    before: Any = copy.deepcopy(model)
    weight, later, behind = before[3].weight.detach(), before[4], compiled.module.get_submodule("4")
    shift = 2.0 * weight[:, :8].sum((1, 2, 3))
    torch.testing.assert_close(behind.running_mean, later.running_mean - shift)
    torch.testing.assert_close(behind.running_var, later.running_var)
    assert relative(model(x), compiled.module(x)) < 1e-9


def test_free_leaves_what_read_nothing_else_and_needs_no_data() -> None:
    model = normal_net()
    plan = gz.plan_for(model, (torch.randn(2, 3, 10, 10),), macs=0.6, passes=[gz.PruneChannels()])
    (options,) = plan.passes
    assert isinstance(options, gz.PruneChannels)
    assert options.compensate == "free"
    given = {name: value.clone() for name, value in model.state_dict().items()}
    gz.compile(model, plan, (torch.randn(2, 3, 10, 10),))
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- in training


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def prepared(**options: Any) -> gz.Prepared:
    return gz.prepare(residual().train(), gz.Plan([gz.PruneChannels(keep=0.5, **options)]), (image(),))


def test_weights_of_channels_that_go_decay_faster_and_faster() -> None:
    ready = prepared(regularizer="growing", strength=4.0)
    assert float(ready.regularizer()) == 0.0
    before = {name: value.clone() for name, value in ready.model.state_dict().items()}
    optimizer = ready.optimizer(torch.optim.SGD, lr=0.1, steps=4)
    for parameter in ready.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    left = 1.0
    for step in range(4):
        if step == 2:  # an optimizer that goes on from a checkpoint
            state = optimizer.state_dict()
            optimizer = ready.optimizer(torch.optim.SGD, lr=0.1, steps=4)
            optimizer.load_state_dict(state)
        optimizer.step()
        left *= 1 - 0.1 * 4.0 * step / 4
    after = {name: value.clone() for name, value in ready.model.state_dict().items()}
    gone = ready.convert().report.passes[0]["prune_channels"]["dropped"]["inner"]
    for name in ("inner.weight", "norm1.weight", "norm1.bias"):
        now, then = after[name], before[name]
        stays = [channel for channel in range(6) if channel not in gone]
        torch.testing.assert_close(now[gone], left * then[gone])
        assert torch.equal(now[stays], then[stays])


def test_scales_are_drawn_to_zero_and_decide_in_the_end() -> None:
    ready = prepared(criterion="bn_scale", regularizer="bn_scale", strength=0.5)
    model: Any = ready.model
    expected = model.norm0.weight.abs().sum() + model.norm1.weight.abs().sum()
    assert float(ready.regularizer()) == pytest.approx(0.5 * float(expected))
    with torch.no_grad():
        model.norm1.weight.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    assert ready.convert().report.passes[0]["prune_channels"]["dropped"]["inner"] == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": "none"}, "prune_channels.norms: 'none' is not a way to treat norms; write 'exact' or 'plain'"),
        ({"regularizer": "l3"}, "prune_channels.regularizer"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        prepared(**options)


def test_growing_needs_the_number_of_steps() -> None:
    with pytest.raises(gz.PlanError, match=re.escape("passes[0].prune_channels.regularizer: 'growing' depends on how")):
        prepared(regularizer="growing", strength=1.0).optimizer(torch.optim.SGD, lr=0.1)


def test_scales_need_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = gz.Plan([gz.PruneChannels(regularizer="bn_scale", strength=1.0)])
    with pytest.raises(gz.PlanError, match=re.escape("'bn_scale': no normalisation with scales acts on the groups")):
        gz.prepare(model, plan, (torch.randn(2, 3),))
