"""Weights that one task has alone are fitted to what it gave; `paper=True` is Algorithm 1 of MTZ and no more."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.numeric.moments import Moments
from graphzip_passes.zip.solve import LeastSquares


def nets_of(*widths: int) -> dict[str, nn.Module]:
    """Two networks of these widths that have nothing in common."""
    made = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for one, two in itertools.pairwise(widths):
            layers += [nn.Linear(one, two), nn.ReLU()]
        made[name] = nn.Sequential(*layers[:-1]).double().eval()
    return made


def data_of(count: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(count, width, generator=generator, dtype=torch.float64) for name in "ab"}


def zipped(nets: dict[str, nn.Module], data: dict[str, Tensor], **options: Any) -> gz.Compiled:
    inputs = {name: (x[:2],) for name, x in data.items()}
    calibration = {name: [x] for name, x in data.items()}
    return gz.compile(nets, gz.Plan([gz.Zip(**options)]), inputs, calibration=calibration)


@torch.no_grad()
def error(result: gz.Compiled, nets: dict[str, nn.Module], data: dict[str, Tensor]) -> float:
    return sum(float((result.task(name)(x) - nets[name](x)).square().mean()) for name, x in data.items())


def test_a_head_is_the_least_squares_fit_to_what_the_task_gave() -> None:
    nets, data = nets_of(6, 8, 3), data_of(200, 6)
    plain, fitted = (zipped(nets, data, refit=refit) for refit in (False, True))
    for name, x in data.items():
        hidden = plain.task(name).get_submodule("0")(x).relu()
        torch.testing.assert_close(fitted.task(name).get_submodule("0")(x).relu(), hidden, rtol=1e-12, atol=1e-12)
        read = torch.cat([hidden, torch.ones(200, 1, dtype=torch.float64)], 1)
        lack = (nets[name](x) - plain.task(name)(x)).T @ read / 200
        hessian = read.T @ read / 200
        hessian += 0.03 * hessian.diagonal().mean() * torch.eye(9, dtype=torch.float64)
        change = torch.linalg.solve(hessian, lack.T).T
        old, new = (each.task(name).get_submodule("2") for each in (plain, fitted))
        torch.testing.assert_close(new.weight, old.weight + change[:, :-1], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(new.bias, old.bias + change[:, -1], rtol=1e-8, atol=1e-10)
    assert fitted.report.passes[0]["zip"]["refitted"] == ["a.2", "b.2"]
    assert fitted.report.after.params == plain.report.after.params


@pytest.mark.parametrize("share", [0.5, 1.0, {"0": 1.0}, {"2": 0.5, "0": 0.5}])
def test_outputs_move_less(share: Any) -> None:
    nets, data = nets_of(6, 12, 10, 3), data_of(200, 6)
    plain, fitted = (zipped(nets, data, refit=refit, share=share) for refit in (False, True))
    assert error(fitted, nets, data) < 0.7 * error(plain, nets, data)
    assert fitted.report.after.params == plain.report.after.params


def test_once_networks_are_trained_nothing_is_fitted_behind_what_is_shared() -> None:
    nets, data = nets_of(6, 12, 10, 3), data_of(200, 6)
    heads: list[Tensor] = []

    def train(prepared: gz.Prepared, stage: str) -> None:
        optimizer = prepared.optimizer(torch.optim.SGD, lr=1e-3)
        torch.stack([each.square().mean() for each in prepared(**data).values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        heads[:] = [prepared.task(name).get_submodule("4").weight.detach().clone() for name in nets]

    inputs = {name: (x[:2],) for name, x in data.items()}
    calibration = {name: [x] for name, x in data.items()}
    trained = gz.compile(nets, gz.Plan([gz.Zip()]), inputs, calibration=calibration, train=train)
    for name, head in zip(nets, heads, strict=True):
        assert torch.equal(trained.task(name).get_submodule("4").weight, head)
    assert trained.report.passes[0]["zip"]["refitted"] == []
    assert zipped(nets, data).report.passes[0]["zip"]["refitted"] == ["a.4", "b.4"]


@pytest.mark.parametrize("count", [1, 20, 60])
def test_few_samples_make_nothing_worse(count: int) -> None:
    nets, unseen = nets_of(16, 24, 16, 3), data_of(2000, 16)
    few = {name: x[:count] for name, x in unseen.items()}
    plain, fitted = (zipped(nets, few, refit=refit, share=0.75) for refit in (False, True))
    assert error(fitted, nets, unseen) < 1.02 * error(plain, nets, unseen)


def test_zeros_of_layers_that_are_not_shared_stay_zero() -> None:
    nets, data = nets_of(6, 12, 10, 3), data_of(200, 6)
    for net in nets.values():
        for layer in (net[2], net[4]):  # type: ignore[index]
            layer.weight.data *= torch.rand_like(layer.weight) < 0.5
    result = zipped(nets, data, share={"0": 1.0})
    for name, net in nets.items():
        zeros = [int((each.weight == 0).sum()) for each in (net[2], net[4])]  # type: ignore[index]
        found = [int((result.task(name).get_submodule(each).weight == 0).sum()) for each in "24"]
        assert found == zeros
        assert all(zeros)
    plain = zipped(nets, data, share={"0": 1.0}, refit=False)
    assert error(result, nets, data) < error(plain, nets, data)


def test_rows_with_bound_weights_are_solved_on_their_free_ones() -> None:
    torch.manual_seed(0)
    rows, missed = torch.randn(40, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    free = torch.rand(5, 7) < 0.6
    free[0] = True
    moments = Moments(7)
    moments.add(rows)
    fit = LeastSquares(moments, damping=1e-3, what="a layer")
    hessian = rows.T @ rows / 40
    hessian += 1e-3 * hessian.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    expected = torch.zeros_like(missed)
    for row, own in enumerate(free):
        expected[row, own] = torch.linalg.solve(hessian[own][:, own], missed[row, own])
    torch.testing.assert_close(fit.change(missed, free), expected, rtol=1e-8, atol=1e-10)


def test_a_change_serves_if_it_helps_samples_that_it_is_not_fitted_to() -> None:
    torch.manual_seed(0)
    rows, noise = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 40, dtype=torch.float64)
    missed = rows @ torch.randn(5, 40, dtype=torch.float64) * 0.3 + noise
    moments = Moments(5)
    moments.add(rows)
    fit = LeastSquares(moments, damping=1e-2, what="a layer")
    change = fit.change((missed.T @ rows) / 30, torch.ones(40, 5, dtype=torch.bool))
    damping = 1e-2 * rows.square().mean() * torch.eye(5, dtype=torch.float64) * 30
    left = torch.zeros(40, dtype=torch.float64)
    for own in torch.arange(30).split(3):
        others = torch.ones(30, dtype=torch.bool).index_fill(0, own, False)
        fitted = torch.linalg.solve(rows[others].T @ rows[others] + damping, rows[others].T @ missed[others])
        left += (missed[own] - rows[own] @ fitted).square().sum(0)
    expected = left < missed.square().sum(0)
    assert torch.equal(fit.serves(change, rows.reshape(10, 3, 5), missed.reshape(10, 3, 40)), expected)
    assert 0 < int(expected.sum()) < 40


def algorithm_1(nets: dict[str, nn.Module], data: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """What two networks give whose hidden units are all shared, as the paper says it, with greedy pairs (Eq. 7 to 12).

    The units of b are never moved: `order` says which of them is a's partner.
    """
    read, order = dict(data), torch.arange(next(iter(data.values())).shape[1])
    layers = {name: [each for each in net.children() if isinstance(each, nn.Linear)] for name, net in nets.items()}
    for one, two in zip(layers["a"][:-1], layers["b"][:-1], strict=True):
        rows = {name: torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) for name, x in read.items()}
        hessians = []
        for x in rows.values():
            hessian = 0.5 * x.T @ x / len(x)
            hessians.append(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=x.dtype))
        a = torch.cat([one.weight, one.bias[:, None]], 1).detach()
        b = torch.cat([two.weight[:, order], two.bias[:, None]], 1).detach()
        parallel = hessians[0] @ torch.linalg.solve(sum(hessians), hessians[1])
        apart = a[:, None] - b[None]
        cost = torch.einsum("ijf,fg,ijg->ij", apart, parallel, apart) / 2
        partner = torch.zeros(len(a), dtype=torch.int64)
        for _ in range(len(a)):
            row, column = divmod(int(cost.argmin()), len(b))
            partner[row] = column
            cost[row], cost[:, column] = torch.inf, torch.inf
        joined = a + torch.linalg.solve(sum(hessians), hessians[1] @ (b[partner] - a).T).T
        read = {name: (x @ joined.T).relu() for name, x in rows.items()}
        order = partner
    heads = {name: own[-1] for name, own in layers.items()}
    places = {"a": torch.arange(len(order)), "b": order}
    return {name: read[name] @ head.weight[:, places[name]].T + head.bias for name, head in heads.items()}


def test_the_papers_own_algorithm() -> None:
    nets, data = nets_of(6, 9, 7, 3), data_of(60, 6)
    result = zipped(nets, data, paper=True)
    for name, expected in algorithm_1(nets, data, damping=0.03).items():
        torch.testing.assert_close(result.task(name)(data[name]), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("options", "told"), [({"refit": True}, "refit"), ({"pairing": "optimal"}, "pairing")])
def test_what_the_paper_does_not_do_is_refused_beside_it(options: dict[str, Any], told: str) -> None:
    nets, data = nets_of(6, 4, 3), data_of(20, 6)
    with pytest.raises(gz.PlanError, match=rf"passes\[0\]\.zip\.{told}: .* is not what Algorithm 1 does"):
        zipped(nets, data, paper=True, **options)
