"""The similarity graph: what is computed from features alone equals what the formed matrix gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from graphzip_passes.cross_domain.embedding import NODES, Embedding, Learned, orthogonal, spectral_embedding
from graphzip_passes.cross_domain.similarity import degrees, factor_of, growl, simple_loss, spectral_loss
from graphzip_passes.parts.clustering import cluster


def features(seed: int = 0, *, signed: bool = False, channels: int = 12, numbers: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(channels, numbers, dtype=torch.float64, generator=generator)
    return values if signed else values.relu()


def similarity(rows: Tensor) -> Tensor:
    """Eq. 5 as it is printed."""
    length = rows.norm(dim=1)
    return rows @ rows.t() / (length[:, None] * length[None, :])


def planted(channels: int = 60, clusters: int = 5, noise: float = 0.15) -> tuple[Tensor, np.ndarray]:
    """Features of channels that follow one of a few patterns, and which one."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(clusters, 80, dtype=torch.float64, generator=generator).relu()
    owner = torch.arange(channels) % clusters
    return patterns[owner] + noise * torch.rand(channels, 80, dtype=torch.float64, generator=generator), owner.numpy()


def test_the_factor_gives_the_similarity() -> None:
    rows = features()
    factor = factor_of(rows)
    torch.testing.assert_close(factor @ factor.t(), similarity(rows))
    torch.testing.assert_close(degrees(factor, factor), similarity(rows).sum(1))


def test_signed_features_keep_similarities_in_range() -> None:
    rows = features(signed=True)
    factor = factor_of(rows)
    torch.testing.assert_close(factor @ factor.t(), (1 + similarity(rows)) / 2)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_spectral_term_is_the_sum_over_pairs(normalized: bool) -> None:
    rows, embedding = features(), features(1, signed=True, numbers=3)
    weights = similarity(rows)
    spread = embedding / weights.sum(1)[:, None] if normalized else embedding
    pairs = (spread[:, None] - spread[None]).square().sum(2)
    expected = (weights * pairs).sum() / len(rows) ** 2
    torch.testing.assert_close(spectral_loss(factor_of(rows), embedding, normalized=normalized), expected)


def test_its_gradient_is_that_of_the_formed_matrix() -> None:
    rows, embedding = features().requires_grad_(), features(1, signed=True, numbers=3)
    pairs = (embedding[:, None] - embedding[None]).square().sum(2)
    (expected,) = torch.autograd.grad((similarity(rows) * pairs).sum() / len(rows) ** 2, rows)
    (found,) = torch.autograd.grad(spectral_loss(factor_of(rows), embedding, normalized=False), rows)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_dead_channel_is_like_none_and_has_no_gradient(normalized: bool) -> None:
    rows = features()
    rows[4] = 0.0
    rows.requires_grad_()
    factor = factor_of(rows)
    assert float(degrees(factor, factor)[4].detach()) == 1.0
    loss = spectral_loss(factor, features(1, signed=True, numbers=3), normalized=normalized)
    loss.backward()
    assert rows.grad is not None
    assert bool(rows.grad.isfinite().all())
    assert float(rows.grad[4].abs().max()) == 0.0


def at_angles(*degrees_: float) -> tuple[Tensor, Tensor]:
    """Angles, and features at these angles in a plane."""
    angles = torch.tensor(degrees_, dtype=torch.float64).deg2rad().requires_grad_()
    return angles, torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_simple_term_is_small_for_like_channels_and_for_unlike_ones() -> None:
    _, rows = at_angles(0.0, 60.0, 80.0)
    near, far, side = np.cos(np.deg2rad([60.0, 80.0, 20.0]))
    assert float(simple_loss(factor_of(rows.detach()))) == pytest.approx(2 * ((1 - near) + far + (1 - side)) / 9)


@pytest.mark.parametrize(("apart", "opens"), [(80.0, True), (40.0, False)])
def test_the_simple_term_draws_like_channels_together_and_others_apart(apart: float, opens: bool) -> None:
    angles, rows = at_angles(0.0, apart)
    simple_loss(factor_of(rows)).backward()
    assert angles.grad is not None
    assert (float(angles.grad[1]) < 0.0) == opens


def test_growl_weighs_the_largest_norms_most() -> None:
    rows = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(growl(rows)) == pytest.approx(4 * 3 / 3 + 3 * 2 / 3 + 1 / 3)
    zero = torch.zeros(3, 2, requires_grad=True)
    growl(zero).backward()
    assert zero.grad is not None
    assert bool((zero.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_columns_of_an_embedding_are_orthogonal(dtype: torch.dtype) -> None:
    y = features(signed=True, channels=40, numbers=6).to(dtype)
    z = orthogonal(y)
    torch.testing.assert_close(z.t() @ z / 40, torch.eye(6, dtype=dtype), atol=1e-6, rtol=0)
    assert int(torch.linalg.matrix_rank(torch.cat([y, z], dim=1).double(), rtol=1e-5)) == 6


def test_columns_that_are_alike_can_be_made_orthogonal() -> None:
    column = features(signed=True, channels=40, numbers=1)
    assert bool(orthogonal(torch.cat([column, column], dim=1)).isfinite().all())


def test_the_network_learns_the_spectral_embedding() -> None:
    """Its loss comes down to that of the eigenvectors, and k-means on it finds the planted clusters."""
    rows, owner = planted()
    factor = factor_of(rows)
    network = Embedding(len(rows), 5, torch.Generator().manual_seed(0)).double()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    first = float(spectral_loss(factor, network(factor), normalized=False).detach())
    for _ in range(150):
        optimizer.zero_grad()
        spectral_loss(factor, network(factor), normalized=False).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    z = network(factor).detach()
    weights = factor @ factor.t()
    values = torch.linalg.eigvalsh(torch.diag(weights.sum(1)) - weights)
    best = float(2 * values[:5].sum() / len(rows))
    assert best <= float(spectral_loss(factor, z, normalized=False)) < best + 0.2 * (first - best)
    parts = cluster("kmeans", z.numpy(), 5)
    found = np.empty(len(rows), dtype=int)
    for number, part in enumerate(parts):
        found[part] = number
    assert adjusted_rand_score(owner, found) > 0.95


def test_the_same_seed_gives_the_same_network() -> None:
    factor = factor_of(features())
    first, second = (Embedding(12, 3, torch.Generator().manual_seed(7)).double()(factor) for _ in range(2))
    assert torch.equal(first, second)


def test_a_sample_of_the_channels_is_embedded_as_it_is_among_all() -> None:
    factor = factor_of(planted()[0])
    network = Embedding(60, 3, torch.Generator().manual_seed(0)).double()
    chosen = torch.arange(0, 60, 2)
    z = network(factor, chosen)
    torch.testing.assert_close(z.t() @ z / 30, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_term_of_a_network_moves_the_features_and_the_network_moves_itself() -> None:
    factor = factor_of(planted()[0]).requires_grad_()
    learned = Learned(60, 3, normalized=False, seed=0, like=factor)
    before = [each.clone() for each in learned.network.parameters()]
    found = []
    for _ in range(30):
        term = learned.term(factor)
        found.append(float(term.detach()))
    assert found[-1] < found[0]
    term.backward()
    assert factor.grad is not None
    assert float(factor.grad.abs().max()) > 0.0
    assert not any(torch.equal(*each) for each in zip(before, learned.network.parameters(), strict=True))
    assert not any(each.requires_grad for each in learned.network.parameters())


def test_of_many_channels_a_sample_is_looked_at() -> None:
    factor = factor_of(features(channels=NODES + 500, numbers=4))
    wide = Learned(NODES + 500, 3, normalized=True, seed=0, like=factor)
    seen: list[int] = []
    wide.network.register_forward_hook(lambda _, given, result: seen.append(len(result)))
    wide.term(factor)
    assert seen == [NODES, NODES]


def test_spectral_clustering_is_that_of_scikit_learn() -> None:
    rows, owner = planted()
    factor = factor_of(rows)
    parts = cluster("kmeans", spectral_embedding(factor, 5, seed=0).numpy(), 5)
    found = np.empty(len(rows), dtype=int)
    for number, part in enumerate(parts):
        found[part] = number
    theirs = SpectralClustering(5, affinity="precomputed", random_state=0).fit_predict((factor @ factor.t()).numpy())
    assert adjusted_rand_score(theirs, found) == 1.0
    assert adjusted_rand_score(owner, found) == 1.0
