"""Least squares and factorisations hold where moments are nearly singular, dead, far from zero or rounded."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import graphzip as gz
from graphzip.numeric import solvers
from graphzip.numeric.solvers import (
    Fit,
    factorised,
    leading_left,
    pivoted_cholesky,
    products,
    pseudo_inverse,
    singular,
    squared,
    symmetric_eigen,
)

ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH, OUTS = 4096, 12, 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fitted(x: Tensor, y: Tensor, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Weights (F, O) and intercept (O,) for rows (R, F) and (R, O), the rows left as they are."""
    fit = Fit(x.clone()[None], y.shape[1], intercept=intercept, what="layer 'fc'")
    fit.improve(y[None])
    return fit.weights[0], fit.offset[0, 0]


def missed(x: Tensor, y: Tensor, weights: Tensor, offset: Tensor) -> float:
    """The mean square of what is missing of `y`, relative to its variance."""
    given = x.double() @ weights + offset
    return float((y.double() - given).square().mean() / y.double().var())


# ------------------------------------------------------------------------------------------------- least squares


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_is_ridge_regression(dtype: torch.dtype, intercept: bool) -> None:
    x, y = normal(ROWS, WIDTH, dtype=dtype), normal(ROWS, OUTS, seed=1, dtype=dtype)
    weights, offset = fitted(x, y, intercept=intercept)
    wide, wanted = x.double().numpy(), y.double().numpy()
    damping = np.sqrt(1e-4 * np.square(wide).sum(0).mean())
    ones = np.ones((ROWS, 1)) if intercept else np.zeros((ROWS, 0))
    rows = np.concatenate([np.concatenate([wide, ones], 1), np.eye(WIDTH, WIDTH + ones.shape[1]) * damping])
    best = np.linalg.lstsq(rows, np.concatenate([wanted, np.zeros((WIDTH, OUTS))]), rcond=None)[0]
    close = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(weights.numpy(), best[:WIDTH], rtol=0, atol=close)
    np.testing.assert_allclose(offset.numpy(), best[WIDTH] if intercept else np.zeros(OUTS), rtol=0, atol=close)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_means_do_not_spoil_a_fit(mean: float, dtype: torch.dtype) -> None:
    """In float32 a mean of 1e6 leaves steps of 1/16 to what varies by one: that much can be had."""
    x = (normal(ROWS, WIDTH) + mean * normal(WIDTH, seed=2).abs().add(1)).to(dtype)
    weights = normal(WIDTH, OUTS, seed=1)
    y = ((x.double() - x.double().mean(0)) @ weights + 3.0).to(dtype)
    found, offset = fitted(x, y)
    rounded = dtype == torch.float32 and mean == 1e6
    assert missed(x, y, found, offset) < (2e-2 if rounded else 1e-4)
    assert float((found - weights).norm() / weights.norm()) < (3e-2 if rounded else 1e-2)


def test_a_channel_far_from_zero_does_not_damp_the_others() -> None:
    x = normal(ROWS, WIDTH, dtype=torch.float32)
    y = (x.double() @ normal(WIDTH, OUTS, seed=1)).float()
    x[:, 0] += 1e4
    assert missed(x, y, *fitted(x, y)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_and_saturated_channels_are_left_alone(dtype: torch.dtype) -> None:
    x, y = normal(ROWS, WIDTH, dtype=dtype), normal(ROWS, OUTS, seed=1, dtype=dtype)
    alone, level = fitted(x[:, 2:], y)
    x[:, 0], x[:, 1] = 0.0, 6.0
    weights, offset = fitted(x, y)
    assert bool((weights[0] == 0.0).all())
    assert float(weights[1].abs().max()) < 1e-6
    np.testing.assert_allclose(weights[2:].numpy(), alone.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(offset.numpy(), level.numpy(), rtol=0, atol=1e-4)


def test_a_layer_that_reads_nothing_but_zeros_gets_an_intercept_alone() -> None:
    x, y = torch.zeros(ROWS, WIDTH), normal(ROWS, OUTS, dtype=torch.float32) + 2.0
    weights, offset = fitted(x, y)
    assert not weights.any()
    np.testing.assert_allclose(offset.numpy(), y.double().mean(0).numpy(), atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-7, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_that_repeat_each_other_are_fitted(noise: float, dtype: torch.dtype) -> None:
    basis = normal(ROWS, 4)
    x = (basis @ normal(4, 64, seed=1) + noise * normal(ROWS, 64, seed=2)).to(dtype)
    y = (basis @ normal(4, OUTS, seed=3)).to(dtype)
    weights, offset = fitted(x, y)
    assert bool(weights.isfinite().all())
    assert missed(x, y, weights, offset) < 1e-6
    assert float(weights.norm()) < 10.0, "nothing cancels"


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
def test_a_fit_has_no_unit(size: float) -> None:
    """Squares of float32 overflow above 1e19 and vanish below 1e-19."""
    x, y = normal(ROWS, WIDTH, dtype=torch.float32), normal(ROWS, OUTS, seed=1, dtype=torch.float32)
    weights, _ = fitted(x, y)
    scaled, _ = fitted((x.double() * size).float(), y)
    np.testing.assert_allclose((scaled * size).numpy(), weights.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, WIDTH])
def test_fewer_rows_than_unknowns_are_enough(rows: int) -> None:
    x, y = normal(rows, WIDTH, dtype=torch.float32), normal(rows, OUTS, seed=1, dtype=torch.float32)
    weights, offset = fitted(x, y)
    assert bool(weights.isfinite().all())
    assert bool(offset.isfinite().all())


def test_steps_of_a_fit_end_where_the_first_one_did() -> None:
    x, y = normal(1, ROWS, WIDTH), normal(1, ROWS, OUTS, seed=1)
    fit = Fit(x, OUTS, intercept=True, what="layer 'fc'")
    fit.improve(y)
    first = fit.weights
    fit.improve(y - fit.given())
    torch.testing.assert_close(fit.weights, first, rtol=1e-10, atol=1e-12)


def test_products_are_added_up_in_float64() -> None:
    x = normal(2, 1 << 15, 5, dtype=torch.float32) + 100.0
    exact = x.double().transpose(1, 2) @ x.double()
    torch.testing.assert_close(squared(x), exact, rtol=3e-6, atol=0)
    torch.testing.assert_close(products(x, x[:, :, :2]), exact[:, :, :2], rtol=3e-6, atol=0)


# ------------------------------------------------------------------------------------------------- positive definite


def test_a_well_conditioned_matrix_gets_what_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    x = normal(50, 6)
    matrix = x.t() @ x
    kept = matrix.clone()
    with caplog.at_level(logging.WARNING):
        factor = factorised(matrix, 0.5, what="layer 'fc'")
    damped = kept + 0.5 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(factor.lower @ factor.lower.t(), damped)
    torch.testing.assert_close(factor.inverse() @ damped, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(damped @ factor.solve(x.t()), x.t())
    half = factor.halved(x.t())
    torch.testing.assert_close(half.t() @ half, x @ factor.solve(x.t()))
    assert torch.equal(matrix, kept)
    assert not caplog.text


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(4, 4, dtype=torch.float64),
        torch.ones(4, 4, dtype=torch.float64),
        torch.diag(torch.tensor([1e20, 1.0, 1e-20, 0.0], dtype=torch.float64)),
        torch.ones(4, 4, dtype=torch.float64) * 1e300,
        torch.ones(4, 4, dtype=torch.float64) * 1e-300,
        torch.ones(4, 4, dtype=torch.float64) - 1e-3 * torch.eye(4, dtype=torch.float64),
    ],
    ids=["zero", "rank one", "scales", "large", "small", "indefinite by rounding"],
)
def test_moments_that_have_no_factor_are_damped_until_they_have(matrix: Tensor) -> None:
    kept = matrix.clone()
    factor = factorised(matrix, what="layer 'fc'")
    assert bool(factor.lower.isfinite().all())
    assert float(factor.damping.min()) >= 0.0
    assert torch.equal(matrix, kept)
    damped = kept + torch.diag(factor.damping)
    torch.testing.assert_close(factor.lower @ factor.lower.t(), damped, rtol=1e-12, atol=0)


def test_no_more_is_added_than_rounding_demands() -> None:
    x = normal(3, 300, 40, dtype=torch.float32) @ normal(1, 40, 40, seed=1, dtype=torch.float32)
    x = torch.cat([x, x], 2)
    factor = factorised(squared(x), what="layer 'fc'")
    square = squared(x).diagonal(dim1=1, dim2=2)
    assert float((factor.damping / square).max()) < 1e-5


def test_each_matrix_of_several_is_damped_as_it_needs() -> None:
    good = torch.eye(3, dtype=torch.float64)
    bad = torch.ones(3, 3, dtype=torch.float64)
    factor = factorised(torch.stack([good, bad, good]), what="layer 'fc'")
    assert not factor.damping[0].any()
    assert not factor.damping[2].any()
    assert bool((factor.damping[1] > 0).all())


def test_units_far_apart_in_size_are_damped_each_by_its_own() -> None:
    column = normal(100, 1)
    x = torch.cat([column * 1e6, column * 1e-6], 1)
    factor = factorised(x.t() @ x, what="layer 'fc'")
    assert float(factor.damping[1]) < 1e-6 * float((x.t() @ x)[1, 1])


def test_a_factor_can_be_differentiated() -> None:
    x = normal(20, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: factorised(each.t() @ each, 0.1, what="it").halved(each.t()), x)
    twice = torch.cat([x, x], 1)
    slope = torch.autograd.grad(factorised(twice.t() @ twice, what="it").lower.sum(), x)[0]
    assert bool(slope.isfinite().all())


def test_what_is_no_matrix_of_moments_is_refused() -> None:
    with pytest.raises(gz.WeightsError, match="layer 'fc': no damping makes its second moments positive"):
        factorised(-torch.eye(3, dtype=torch.float64) - 1e9 * torch.ones(3, 3).double().tril(-1), what="layer 'fc'")


# ------------------------------------------------------------------------------------------------- what is not finite


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "factorised": lambda x: factorised(x, what="layer 'fc'"),
    "singular": lambda x: singular(x, what="layer 'fc'"),
    "singular_values": lambda x: solvers.singular_values(x, what="layer 'fc'"),
    "symmetric_eigen": lambda x: symmetric_eigen(x, what="layer 'fc'"),
    "pseudo_inverse": lambda x: pseudo_inverse(x, what="layer 'fc'"),
    "hermitian": lambda x: pseudo_inverse(x, hermitian=True, what="layer 'fc'"),
    "orthonormal": lambda x: solvers.orthonormal(x, what="layer 'fc'"),
    "leading_left": lambda x: leading_left(x, 2, seed=0, what="layer 'fc'"),
    "fit": lambda x: Fit(x[None].clone(), 1, intercept=False, what="layer 'fc'"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[2, 1] = matrix[1, 2] = value
    with pytest.raises(gz.WeightsError, match="layer 'fc': there are values that are NaN or infinite"):
        FUNCTIONS[name](matrix)


def test_large_values_are_not_taken_for_infinite() -> None:
    assert solvers.all_finite(torch.full((4, 4), 1.7e308, dtype=torch.float64))
    assert solvers.all_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert not solvers.all_finite(torch.tensor([1.0, float("inf"), -float("inf")]))


# ------------------------------------------------------------------------------------------------- other factorisations


def test_decompositions_are_those_of_lapack() -> None:
    x = normal(3, 7, 4)
    left, values, right = singular(x, what="it")
    torch.testing.assert_close((left * values[:, None, :]) @ right, x)
    torch.testing.assert_close(pseudo_inverse(x, what="it"), torch.linalg.pinv(x))
    torch.testing.assert_close(pseudo_inverse(x[0], rtol=0.5, what="it"), torch.linalg.pinv(x[0], rtol=0.5))
    gram = x.mT @ x
    found = pseudo_inverse(gram, hermitian=True, what="it")
    torch.testing.assert_close(found, torch.linalg.pinv(gram, hermitian=True))
    assert pseudo_inverse(x[:, :0], what="it").shape == (3, 4, 0)
    wide = normal(30, 10)
    vectors = leading_left(wide, 10, seed=0, what="it")
    torch.testing.assert_close(vectors @ (vectors.t() @ wide), wide)
    rows = pivoted_cholesky((wide @ wide.t()).numpy())
    assert rows.shape == (30, 10)
    np.testing.assert_allclose(rows @ rows.T, (wide @ wide.t()).numpy(), atol=1e-10)


def failing(*_: Any, **__: Any) -> Any:
    raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 1, 3, 3)])
def test_a_slower_algorithm_takes_over_where_one_does_not_converge(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(*shape)
    gram = x.mT @ x
    wanted = [singular(x, what="it")[1], symmetric_eigen(gram, what="it")[0], pseudo_inverse(x, what="it")]
    for name in ("svd", "svdvals", "eigh"):
        monkeypatch.setattr(torch.linalg, name, failing)
    found = [singular(x, what="it")[1], symmetric_eigen(gram, what="it")[0], pseudo_inverse(x, what="it")]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(solvers.singular_values(x, what="it"), wanted[0])


def test_where_none_converges_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", failing)
    monkeypatch.setattr(scipy.linalg, "svd", never)
    with pytest.raises(gz.WeightsError, match="layer 'fc': its matrix cannot be factorised"):
        singular(normal(3, 3), what="layer 'fc'")


# ------------------------------------------------------------------------------------------------- one place for all


OF_TORCH = {
    *("cholesky", "cholesky_inverse", "cholesky_solve", "det", "eig", "geqrf", "inverse", "lobpcg", "logdet", "lu"),
    *("lu_solve", "lu_unpack", "matrix_exp", "orgqr", "pca_lowrank", "pinverse", "qr", "slogdet", "svd", "svd_lowrank"),
    *("symeig", "triangular_solve"),
}
METHODS = {"cholesky", "cholesky_solve", "geqrf", "lu_solve", "pinverse", "qr", "slogdet", "svd", "triangular_solve"}


def uses(source: str) -> set[str]:
    """Linear algebra that a source text calls: all of a `linalg` module but norms, and factorisations of `torch`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and "aten" not in ast.unparse(node).split("."):
            base = ast.unparse(node.value)
            inside = base.rpartition(".")[2] == "linalg"
            norm = node.attr == "vector_norm"
            if (inside and not norm) or node.attr in METHODS or (base == "torch" and node.attr in OF_TORCH):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found |= {name for name in names if "linalg" in name.split(".") or name.endswith("svd")}
    return found


MODULES = sorted(path for folder in ("graphzip", "passes", "tools") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_no_other_module_factorises(path: Path) -> None:
    if path != ROOT / "graphzip" / "numeric" / "solvers.py":
        assert not uses(path.read_text(encoding="utf-8")), "call graphzip.numeric.solvers instead"


@pytest.mark.parametrize(
    "source",
    [
        "torch.linalg.cholesky(x)",
        "np.linalg.lstsq(a, b)",
        "numpy.linalg.norm(a)",
        "import scipy.linalg",
        "from scipy.linalg import lu",
        "from torch import linalg",
        "torch.cholesky_solve(a, b)",
        "torch.svd(a)",
        "x.pinverse()",
        "from sklearn.utils.extmath import randomized_svd",
    ],
)
def test_a_factorisation_elsewhere_is_found(source: str) -> None:
    assert uses(source)


@pytest.mark.parametrize("source", ["aten.linalg_vector_norm.default", "space.solve()", "torch.ops.aten.inverse"])
def test_what_is_none_is_not_taken_for_one(source: str) -> None:
    assert not uses(source)
