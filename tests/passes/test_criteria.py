"""Criteria of importance: each against a formula of its own, on the same small network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_nets import ATTENTION_NETS
from nets import NETS
from planting import relative
from residual_net import Residual, residual
from torch import Tensor, nn

import graphzip as gz
from graphzip.plan.criteria import CRITERIA
from graphzip_passes.prune.criteria import BUILT_IN

pytestmark = pytest.mark.usefixtures("seeded")

SAMPLES = 6


def images() -> Tensor:
    return torch.randn(SAMPLES, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def labels() -> Tensor:
    return torch.arange(SAMPLES) % 4


def squared(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - F.one_hot(wanted, 4)).square().sum(1).mean()


def seen(criterion: Any, model: nn.Module | None = None, **how: Any) -> dict[str, Tensor]:
    """The scores by group, as the pass sees them."""
    found: dict[str, Tensor] = {}
    function = CRITERIA[criterion].function if isinstance(criterion, str) else criterion

    def watched(group: gz.GroupView) -> Tensor:
        found[group.name] = torch.as_tensor(function(group))
        return found[group.name]

    how.setdefault("calibration", [images()])
    gz.compile(model or residual(), gz.Plan([gz.PruneChannels(criterion=watched)]), (images(),), **how)
    return found


# ---------------------------------------------------------------------------------------------------- by hand


class Held:
    """What the layers of the network hold, by plain PyTorch."""

    def __init__(self, model: Residual) -> None:
        self.model = model
        with torch.no_grad():
            self.stem = model.norm0(model.stem(images())).relu()  # what `inner` reads
            self.inner = model.norm1(model.inner(self.stem)).relu()  # what `out` reads


def kernels(model: Residual) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            "stem": torch.cat([model.stem.weight.flatten(1), model.out.weight.flatten(1)], 1),
            "inner": model.inner.weight.flatten(1),
        }


def slopes(model: Residual, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    stem, out, inner = torch.autograd.grad(loss(), [model.stem.weight, model.out.weight, model.inner.weight])
    return {"stem": torch.cat([stem.flatten(1), out.flatten(1)], 1), "inner": inner.flatten(1)}


def each_sample(model: Residual) -> list[dict[str, Tensor]]:
    pairs = zip(images().split(1), labels().split(1), strict=True)
    return [slopes(model, lambda x=x, y=y: squared(model(x), y)) for x, y in pairs]  # type: ignore[misc]


def weights_alone(model: Residual) -> dict[str, dict[str, Tensor]]:
    rows = kernels(model)
    squares = {name: each.square().sum(1) for name, each in rows.items()}
    readers = {
        "stem": torch.cat([model.inner.weight.transpose(0, 1).flatten(1), model.head.weight.T], 1),
        "inner": model.out.weight.transpose(0, 1).flatten(1),
    }
    made = {"stem": [model.stem.weight, model.out.weight], "inner": [model.inner.weight]}
    scales = {"stem": [model.norm0.weight], "inner": [model.norm1.weight]}
    coupled = {
        name: torch.cat(
            [each.flatten(1) for each in made[name]] + [readers[name]] + [each[:, None] for each in scales[name]], 1
        ).detach()
        for name in rows
    }
    return {
        "group_l1": {name: each.abs().sum(1) for name, each in coupled.items()},
        "group_l2": {name: each.square().sum(1) for name, each in coupled.items()},
        "l1": {name: each.abs().sum(1) for name, each in rows.items()},
        "l2": {name: each.norm(dim=1) for name, each in rows.items()},
        "bn_scale": {"stem": model.norm0.weight.detach().abs(), "inner": model.norm1.weight.detach().abs()},
        "fpgm": {name: torch.stack([(each - row).norm(dim=1).sum() for row in each]) for name, each in rows.items()},
        "lamp": {name: torch.stack([one / each[each >= one].sum() for one in each]) for name, each in squares.items()},
    }


def values_too(model: Residual) -> dict[str, dict[str, Tensor]]:
    held = Held(model)
    by_group = {"stem": held.stem, "inner": held.inner}
    flat = {name: value.transpose(0, 1).flatten(1) for name, value in by_group.items()}
    readers = {
        "stem": torch.cat([model.inner.weight.transpose(0, 1).flatten(1), model.head.weight.T], 1).detach(),
        "inner": model.out.weight.transpose(0, 1).flatten(1).detach(),
    }
    return {
        "apoz": {name: 1 - (value == 0).double().mean(1) for name, value in flat.items()},
        "activation_norm": {name: value.square().mean(1).sqrt() for name, value in flat.items()},
        "activation_variance": {name: ((v.T - v.mean(1)) ** 2).mean(0) for name, v in flat.items()},
        "wanda": {name: readers[name].abs().sum(1) * value.norm(dim=1) for name, value in flat.items()},
        "hrank": {
            name: torch.linalg.matrix_rank(value, rtol=8 * torch.finfo(torch.float32).eps).double().mean(0)
            for name, value in by_group.items()
        },
    }


def with_a_loss(model: Residual) -> dict[str, dict[str, Tensor]]:
    rows, samples = kernels(model), each_sample(model)
    mean = slopes(model, lambda: squared(model(images()), labels()))
    return {
        "taylor": {name: (rows[name] * mean[name]).sum(1).abs() for name in rows},
        "fisher": {
            name: torch.stack([(rows[name] * one[name]).sum(1) ** 2 for one in samples]).mean(0) / 2 for name in rows
        },
        "hessian": {
            name: (rows[name] ** 2 * torch.stack([one[name] ** 2 for one in samples]).mean(0)).sum(1) / 2
            for name in rows
        },
    }


@pytest.mark.parametrize("name", ["l1", "l2", "group_l1", "group_l2", "bn_scale", "fpgm", "lamp"])
def test_criteria_of_weights(name: str) -> None:
    model = residual()
    torch.testing.assert_close(seen(name, model, calibration=None), weights_alone(model)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["apoz", "activation_norm", "activation_variance", "wanda", "hrank"])
def test_criteria_of_values(name: str) -> None:
    model = residual()
    batches = list(images().split(4))  # the batches do not matter
    torch.testing.assert_close(seen(name, model, calibration=batches), values_too(model)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["taylor", "fisher", "hessian"])
def test_criteria_of_gradients(name: str) -> None:
    model = residual()
    batches = list(zip(images().split(4), labels().split(4), strict=True))
    found = seen(name, model, calibration=batches, loss=squared)
    torch.testing.assert_close(found, with_a_loss(model)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["taylor", "fisher", "hessian"])
def test_without_a_loss_outputs_are_differentiated_in_random_directions(name: str) -> None:
    """On average over directions: `E[(v . J w)^2] = |J w|^2`, summed over outputs, mean over samples."""
    model = residual()
    rows = kernels(model)
    squares = dict.fromkeys(rows, torch.zeros(()))
    for x in images().split(1):
        for output in range(4):
            slope = slopes(model, lambda x=x, output=output: model(x)[0, output])  # type: ignore[misc]
            for group in rows:
                product = rows[group] * slope[group]
                part = (product**2).sum(1) if name == "hessian" else product.sum(1) ** 2
                squares[group] = squares[group] + part / SAMPLES
    expected = {group: each.sqrt() if name == "taylor" else each / 2 for group, each in squares.items()}
    drawn = [seen(name, model, seed=seed, calibration=[images()] * 10) for seed in range(6)]
    for group, wanted in expected.items():
        scores = torch.stack([each[group] for each in drawn])
        mean = scores.square().mean(0).sqrt() if name == "taylor" else scores.mean(0)
        torch.testing.assert_close(mean, wanted, rtol=0.35, atol=0)


def test_thinet_takes_the_channel_whose_loss_moves_the_next_layers_least() -> None:
    model = residual()
    held, weight = Held(model).inner, model.out.weight.detach()[:, :, 0, 0]
    parts = torch.einsum("oc,bchw->cobhw", weight, held).flatten(1)
    gone: list[int] = []
    for _ in range(6):
        left = [channel for channel in range(6) if channel not in gone]
        gone.append(min(left, key=lambda c: float(parts[[*gone, c]].sum(0).square().sum())))
    assert seen("thinet", model)["inner"].argsort().tolist() == gone


def test_obs_is_what_the_next_layer_loses_where_its_other_weights_are_fitted() -> None:
    model = residual()
    held, weight = Held(model).inner, model.out.weight.detach()[:, :, 0, 0]
    rows = held.movedim(1, 3).flatten(0, 2)
    wanted = rows @ weight.T
    losses = []
    for channel in range(6):
        others = [each for each in range(6) if each != channel]
        fitted = torch.linalg.lstsq(rows[:, others], wanted).solution
        losses.append((wanted - rows[:, others] @ fitted).square().sum(1).mean() / 2)
    found = seen("obs", model)["inner"]
    expected = torch.stack(losses)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-3 * float(expected.max()))


def test_chip_is_what_the_nuclear_norm_loses() -> None:
    model = residual()
    rows = Held(model).inner[:2].flatten(2)
    without = [rows[:, [d for d in range(6) if d != c]] for c in range(6)]
    norms = torch.stack([torch.linalg.matrix_norm(each, "nuc").mean() for each in without])
    expected = torch.linalg.matrix_norm(rows, "nuc").mean() - norms
    torch.testing.assert_close(seen("chip", model)["inner"], expected, rtol=1e-9, atol=1e-12)


def test_random_scores_follow_the_seed() -> None:
    one, same, other = (seen("random", seed=seed)["stem"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(seen("random")["stem"][:6], seen("random")["inner"])


# ---------------------------------------------------------------------------------------------------- invariance


def test_what_criteria_do_not_see() -> None:
    """Shifting all kernels of a layer alike moves no distance; scaling a layer moves no share."""
    model = residual()
    before = {name: seen(name, model)["inner"] for name in ("fpgm", "lamp")}
    with torch.no_grad():
        model.inner.weight.add_(shift := torch.randn_like(model.inner.weight[0]))
    torch.testing.assert_close(seen("fpgm", model)["inner"], before["fpgm"])
    with torch.no_grad():
        model.inner.weight.sub_(shift).mul_(7)
    torch.testing.assert_close(seen("lamp", model)["inner"], before["lamp"])


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"random"}))
def test_scores_follow_channels_that_change_places(name: str) -> None:
    model, order = residual(), torch.tensor([3, 0, 5, 1, 4, 2])
    how: dict[str, Any] = {"calibration": [(images(), labels())], "loss": squared}
    before = seen(name, model, **how)["inner"]
    with torch.no_grad():
        norm: Any = model.norm1
        for tensor in (model.inner.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order])
        model.out.weight.copy_(model.out.weight[:, order])
    torch.testing.assert_close(seen(name, model, **how)["inner"], before[order], rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- any model


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize(
    "net", ["cifar_resnet_pad", "grouped_after_cat", "encoder_layer_norm_first", "rotary_halves", "swiglu_mlp", "lstm"]
)
def test_every_criterion_is_for_every_model(name: str, net: str) -> None:
    model, inputs = (NETS | ATTENTION_NETS)[net]()
    plan = gz.Plan([gz.PruneChannels(criterion=name, ranking="global")])
    compiled = gz.compile(model, plan, inputs, calibration=[inputs])
    assert compiled.report.after.params < compiled.report.before.params
    assert compiled.module(*inputs).isfinite().all()
    dropped = compiled.report.passes[0]["prune_channels"]["dropped"]
    assert {each.name: each.before - each.after for each in compiled.report.groups} == {
        group: len(gone) for group, gone in dropped.items()
    }


# ---------------------------------------------------------------------------------------------------- ranking


def kept(model: nn.Module, **options: Any) -> dict[str, int]:
    compiled = gz.compile(model, gz.Plan([gz.PruneChannels(**options)]), (images(),))
    return {group.name: group.after for group in compiled.report.groups}


def test_groups_that_compete_keep_as_many_channels_together() -> None:
    model = residual()
    with torch.no_grad():
        model.inner.weight[:5].mul_(1e-3)
    assert kept(model, keep=0.5) == {"stem": 4, "inner": 3}
    rows = kernels(model)
    sums = {name: each.abs().sum(1).tolist() for name, each in rows.items()}
    scores = [(size * len(each) / sum(each), name) for name, each in sums.items() for size in each]
    lowest = [name for _, name in sorted(scores)[:7]]
    assert kept(model, keep=0.5, ranking="global") == {"stem": 8 - lowest.count("stem"), "inner": 1}
    assert lowest.count("inner") == 5
    assert kept(model, keep=0.5, ranking="global", round_to=2) == {"stem": 6, "inner": 2}


def test_scores_that_mean_the_same_in_every_group_compete_as_they_are() -> None:
    def ten_more(group: gz.GroupView) -> Tensor:
        return torch.arange(group.size) + 10.0 * (group.name == "stem")

    gz.register_criterion("same", ten_more, comparable=True)
    gz.register_criterion("own", ten_more)
    assert kept(residual(), criterion="same", ranking="global") == {"stem": 6, "inner": 1}
    stem, inner = torch.arange(10.0, 18.0) / 13.5, torch.arange(6.0) / 2.5
    limit = torch.cat([stem, inner]).sort().values[6]
    expected = {"stem": int((stem > limit).sum()), "inner": int((inner > limit).sum())}
    assert kept(residual(), criterion="own", ranking="global") == expected


def test_isomorphic_groups_compete_with_each_other_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))
            return found

    model = Two().double().eval()
    with torch.no_grad():
        model.a.weight[:, 0].mul_(1e-6)
        model.b.weight[:6].mul_(1e-6)
        model.c.weight[:6].mul_(1e-6)
    counts = kept(model, ranking="isomorphic", keep=0.5)
    assert counts["a"] + counts["b"] == 8
    assert counts["b"] == 2
    assert counts["c"] == 4  # a linear layer reads it


# ---------------------------------------------------------------------------------------------------- compensation


def moved(model: nn.Module, compensate: str, criterion: str = "l1") -> float:
    plan = gz.Plan([gz.PruneChannels(criterion=criterion, compensate=compensate)])
    data = [torch.randn(64, 3, 8, 8, dtype=torch.float64)]
    compiled = gz.compile(model, plan, (images(),), calibration=data)
    return relative(model(images()), compiled.module(images()))


@pytest.mark.parametrize("criterion", ["l1", "wanda", "random"])
def test_layers_are_fitted_to_what_the_original_gives(criterion: str) -> None:
    model = residual()
    assert moved(model, "data", criterion) < 0.5 * moved(model, "none", criterion)


def test_layers_that_read_what_they_read_before_stay_as_they_are() -> None:
    model = residual().float()
    x = images().float()
    plan = gz.Plan([gz.PruneChannels(keep={"inner": 0.5}, compensate="data")])
    compiled = gz.compile(model, plan, (x,), calibration=[x])
    left = [c for c in range(6) if c not in compiled.report.passes[0]["prune_channels"]["dropped"]["inner"]]
    assert torch.equal(compiled.module.stem.weight, model.stem.weight)
    assert torch.equal(compiled.module.inner.weight, model.inner.weight[left])
    assert torch.equal(compiled.module.norm1.running_mean, model.norm1.running_mean[left])
    assert not torch.equal(compiled.module.out.weight, model.out.weight[:, left])
    assert compiled.report.passes[0]["prune_channels"]["fitted"][0] == "out.weight"


# ---------------------------------------------------------------------------------------------------- one's own


def test_a_criterion_of_ones_own_has_a_name_in_the_plan(tmp_path: Path) -> None:
    @gz.register_criterion("first")
    def first(group: gz.GroupView) -> list[int]:
        assert set(group.weights) <= {"producer", "pointwise", "consumer"}
        assert all(rows.shape[0] == group.size for part in group.weights.values() for rows in part.values())
        assert group.blocks == (tuple(range(group.size)),)
        return [-channel for channel in range(group.size)]

    plan = gz.Plan([gz.PruneChannels(criterion="first")])
    plan.save(tmp_path / "plan.yaml")
    again = gz.Plan.load(tmp_path / "plan.yaml")
    assert again == plan
    compiled = gz.compile(residual(), again, (images(),))
    assert compiled.report.passes[0]["prune_channels"]["dropped"] == {"stem": [4, 5, 6, 7], "inner": [3, 4, 5]}


def last(group: gz.GroupView) -> Tensor:
    return torch.arange(group.size)


def test_a_function_in_place_of_a_name() -> None:
    plan = gz.Plan([gz.PruneChannels(criterion=last)])
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert plan.to_dict()["passes"][0]["prune_channels"]["criterion"].endswith("test_criteria.last")
    compiled = gz.compile(residual(), plan, (images(),))
    assert compiled.report.passes[0]["prune_channels"]["dropped"] == {"stem": [0, 1, 2, 3], "inner": [0, 1, 2]}
    functions = [lambda group: torch.arange(group.size), lambda group: -torch.arange(group.size)]
    names = [gz.PruneChannels(criterion=each).criterion for each in functions]
    assert len(set(names)) == 2
    assert gz.PruneChannels(criterion=functions[0]).criterion == names[0]


def test_the_view_has_the_loss_and_its_gradients() -> None:
    model, found = residual(), []

    def watching(group: gz.GroupView) -> Tensor:
        found.append((group.labelled, group.loss, group.gradients["producer"]))
        return group.kernels.sum(1)

    seen(watching, model, calibration=[(images(), labels())], loss=squared)
    expected = slopes(model, lambda: squared(model(images()), labels()))
    assert [each[0] for each in found] == [True, True]
    assert found[0][1] == pytest.approx(squared(model(images()), labels()).item())
    torch.testing.assert_close(torch.cat([*found[0][2].values()], 1), expected["stem"])


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("l3", r"passes\[0\].prune_channels.criterion: unknown criterion 'l3'; there are: 'l1'"),
        (lambda group: None, r"criterion: '.*' gave None for group 'stem'; return 8 numbers"),
        (
            lambda group: [1.0],
            r"gave the shape \(1,\) for group 'stem'; return a score for each of its 8 channels, \(8,\)",
        ),
        (lambda group: [float("nan")] * group.size, "gave scores that are NaN or infinite for group 'stem'"),
        ("wanda", r"criterion: 'wanda': it looks at calibration data; pass calibration="),
        (lambda group: group.gradients, r"it looks at calibration data|it differentiates a loss; pass loss="),
    ],
)
def test_criteria_that_give_no_scores(criterion: Any, message: str) -> None:
    with pytest.raises(gz.PlanError, match=message):
        gz.compile(residual(), gz.Plan([gz.PruneChannels(criterion=criterion)]), (images(),))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"calibration": [images()], "loss": squared}, "batch 0 has no labels, which loss= is to be given"),
        ({"calibration": None, "loss": squared}, "loss= is given and no data; pass calibration="),
        ({"loss": 3}, r"loss: 3 cannot be called; give a function, loss\(outputs, labels\)"),
        ({"loss": squared, "scope": "inner"}, "loss= is of what one model gives as a whole"),
        ({"calibration": [(images(), labels())], "loss": lambda outputs, y: 1.0}, "loss gave float; return a scalar"),
    ],
)
def test_losses_that_do_not_fit(how: dict[str, Any], message: str) -> None:
    plan = gz.Plan([gz.PruneChannels(criterion="taylor")])
    with pytest.raises(gz.GraphZipError, match=message):
        gz.compile(residual(), plan, (images(),), **({"calibration": [(images(), labels())]} | how))


def test_what_cannot_be_registered() -> None:
    with pytest.raises(gz.PlanError, match="criterion 'l1' is built in and cannot be replaced"):
        gz.register_criterion("l1", last)
    with pytest.raises(gz.PlanError, match="3 is not the name of a criterion"):
        gz.register_criterion(3, last)  # type: ignore[call-overload]
    with pytest.raises(gz.PlanError, match="criterion 'x': 3 cannot be called"):
        gz.register_criterion("x", 3)  # type: ignore[call-overload]
    with pytest.raises(gz.PlanError, match="3 is not a criterion; write a name, such as 'l1'"):
        gz.PruneChannels(criterion=3)
    with pytest.raises(gz.PlanError, match="compensate: 'data' needs calibration data"):
        gz.compile(residual(), gz.Plan([gz.PruneChannels(compensate="data")]), (images(),))


def test_what_a_criterion_raises_is_the_users() -> None:
    class Own(Exception):
        pass

    def raising(group: gz.GroupView) -> Tensor:
        raise Own

    with pytest.raises(Own):
        gz.compile(residual(), gz.Plan([gz.PruneChannels(criterion=raising)]), (images(),))
