"""Clusterings: always a partition into exactly k clusters, the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphzip.errors import PlanError, WeightsError
from graphzip_passes.parts import clustering
from graphzip_passes.parts.clustering import check_clustering, cluster, clusterings, register_clustering


def spread(features: Any, clusters: list[list[int]]) -> float:
    return float(sum(np.square(features[each] - features[each].mean(axis=0)).sum() for each in clusters))


def test_the_papers_example() -> None:
    features = np.zeros((6, 1))
    assert cluster("even", features, 4) == [[0, 1], [2, 3], [4], [5]]
    assert cluster("imbalanced", features, 4) == [[0, 1, 2], [3], [4], [5]]


@pytest.mark.parametrize(("n", "k"), [(7, 3), (16, 5), (10, 10), (9, 1)])
def test_even_clusters_have_at_most_the_ceiling(n: int, k: int) -> None:
    sizes = [len(each) for each in cluster("even", np.zeros((n, 1)), k)]
    assert max(sizes) == -(-n // k)
    assert max(sizes) - min(sizes) <= 1


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, int]:
    """Features with few distinct values, so that rows repeat and distances tie, and a number of clusters."""
    n, d = draw(st.integers(1, 24)), draw(st.integers(0, 4))
    scale = draw(st.sampled_from([1.0, 1e-30, 1e30, -1e-3]))
    values = draw(st.lists(st.integers(-1, draw(st.integers(-1, 3))), min_size=n * d, max_size=n * d))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return np.array(values, dtype=dtype).reshape(n, d) * dtype(scale), draw(st.integers(1, n))


@settings(deadline=None)
@given(name=st.sampled_from(["kmeans", "even", "imbalanced"]), problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_every_clustering_is_a_partition_into_k(name: str, problem: tuple[Any, int], seed: int) -> None:
    features, k = problem
    clusters = cluster(name, features, k, seed=seed)
    assert len(clusters) == k
    assert all(clusters)
    assert sorted(channel for each in clusters for channel in each) == list(range(len(features)))
    assert clusters == sorted(sorted(each) for each in clusters)
    assert clusters == cluster(name, features.copy(), k, seed=seed)


@settings(deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_kmeans_keeps_identical_channels_together(problem: tuple[Any, int], seed: int) -> None:
    features, k = problem
    clusters = cluster("kmeans", features, k, seed=seed)
    distinct = len({tuple(row) for row in (features + 0.0).tolist()})
    if distinct <= k:
        assert all(len({tuple(row) for row in (features[each] + 0.0).tolist()}) == 1 for each in clusters)
    else:
        owner = {channel: number for number, each in enumerate(clusters) for channel in each}
        for first in range(len(features)):
            for second in range(first):
                if (features[first] == features[second]).all():
                    assert owner[first] == owner[second]


def test_kmeans_finds_planted_clusters() -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, 30))
    owner = np.concatenate([np.arange(40), random.integers(0, 40, 60)])
    features = (centres[owner] + 1e-3 * random.standard_normal((100, 30))).astype(np.float32)
    clusters = cluster("kmeans", features, 40, seed=1)
    assert clusters == sorted(np.flatnonzero(owner == number).tolist() for number in range(40))


def test_kmeans_beats_even_clusters_and_depends_on_the_seed_only() -> None:
    features = np.random.default_rng(1).standard_normal((64, 9))
    found = cluster("kmeans", features, 16, seed=3)
    assert spread(features, found) < 0.8 * spread(features, cluster("even", features, 16))
    assert found == cluster("kmeans", features, 16, seed=3)
    assert found != cluster("kmeans", features, 16, seed=4)
    assert found == cluster("kmeans", 1e-30 * features, 16, seed=3)


def test_kmeans_does_not_disturb_the_global_generator_or_the_features() -> None:
    features = np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)
    before, state = features.copy(), np.random.get_state()[1].tolist()  # type: ignore[index]
    cluster("kmeans", features, 5)
    assert (features == before).all()
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]


def test_labels_that_lack_clusters_are_repaired() -> None:
    rows = np.array([[0.0], [0.1], [5.0], [9.0]])
    labels = clustering._repaired(rows, np.array([7, 7, 7, 7]), 3)
    assert labels.tolist() == [0, 0, 2, 1]
    assert clustering._repaired(rows, np.array([2, 0, 1, 1]), 3).tolist() == [2, 0, 1, 1]


def test_keeping_every_channel_does_not_ask_the_clustering() -> None:
    @register_clustering("never")
    def never(features: Any, k: int, seed: int) -> list[list[int]]:
        raise AssertionError

    assert cluster("never", np.ones((3, 2)), 3) == [[0], [1], [2]]


# ---------------------------------------------------------------------------------------------------- the registry


def test_a_registered_clustering_is_used_and_put_in_order() -> None:
    @register_clustering("odd")
    def odd(features: Any, k: int, seed: int) -> Any:
        assert features.shape == (5, 2)
        assert (k, seed) == (2, 7)
        return ({3, 1}, np.array([4, 2, 0]))

    assert clusterings() == ("even", "imbalanced", "kmeans", "odd")
    assert cluster("odd", np.zeros((5, 2)), 2, seed=7) == [[0, 2, 4], [1, 3]]


def test_a_registered_clustering_cannot_write_to_the_features() -> None:
    @register_clustering("writer")
    def writer(features: Any, k: int, seed: int) -> list[list[int]]:
        features -= features.mean()
        return [[0, 1]]

    with pytest.raises(ValueError, match="read-only"):
        cluster("writer", np.ones((2, 2)), 1)


def test_built_in_clusterings_stay() -> None:
    with pytest.raises(PlanError, match="clustering 'even' is built in and cannot be replaced"):
        register_clustering("even")


def test_unknown_clusterings_get_the_closest_names() -> None:
    with pytest.raises(PlanError, match=r"^clustering: unknown clustering 'kmean'; did you mean 'kmeans'\?$"):
        cluster("kmean", np.zeros((2, 2)), 1)
    with pytest.raises(
        PlanError, match=r"^passes\[0\]\.cluster_merge\.clustering: unknown clustering 'q'; there are: "
    ):
        check_clustering("q", "passes[0].cluster_merge.clustering")
    check_clustering("kmeans")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, "returned no list of lists of channels"),
        ([0, 1, 2, 3], "returned no list of lists of channels"),
        ([[0, [1]], [2, 3]], "returned no list of lists of channels"),
        ([[0, 1, 2, 3]], "returned 1 non-empty clusters of 1; it must return exactly 2"),
        ([[0, 1], [2, 3], []], "returned 2 non-empty clusters of 3; it must return exactly 2"),
        ([[0, 1, 2, 3], []], "returned 1 non-empty clusters of 2; it must return exactly 2"),
        ([[0.0, 1.0], [2.0, 3.0]], "returned clusters that do not hold ints"),
        ([[[0], [1]], [[2], [3]]], "returned clusters that do not hold ints"),
        ([[0, 1], [2, 4]], "returned channel 4; the channels are 0 to 3"),
        ([[0, -1], [2, 1]], "returned channel -1; the channels are 0 to 3"),
        ([[0, 1], [1, 2, 3]], "returned channel 1 more than once"),
        ([[0, 1], [3]], "left out channel 2"),
    ],
)
def test_what_a_registered_clustering_returns_is_checked(answer: Any, expected: str) -> None:
    register_clustering("mine")(lambda features, k, seed: answer)
    with pytest.raises(PlanError, match=r"^group 'a': clustering 'mine' ") as caught:
        cluster("mine", np.zeros((4, 2)), 2, what="group 'a'")
    assert expected in str(caught.value)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_impossible_numbers_of_clusters(k: int) -> None:
    with pytest.raises(PlanError, match=rf"^group 'a': 3 channels cannot be divided into {k} clusters; keep between"):
        cluster("even", np.zeros((3, 1)), k, what="group 'a'")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["kmeans", "even"])
def test_weights_that_are_not_finite(name: str, bad: float) -> None:
    features = np.zeros((5, 3), dtype=np.float32)
    features[2, 1] = features[4, 0] = bad
    with pytest.raises(WeightsError, match=r"^group 'a': 2 of 5 channels have NaN or infinite weights, the first is"):
        cluster(name, features, 2, what="group 'a'")


def test_many_rows_are_divided_without_their_inner_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphzip_passes.parts.clustering._MANY", 10)
    rng = np.random.default_rng(0)
    owner = np.arange(60) % 4
    rows = np.eye(4)[owner] + 0.05 * rng.standard_normal((60, 4))
    found = cluster("kmeans", rows, 4)
    assert sorted(map(tuple, found)) == sorted(tuple(np.flatnonzero(owner == number).tolist()) for number in range(4))
    assert len(cluster("kmeans", rows, 50)) == 50


def test_kmeans_starts_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clusters with the nearest centres of all starts count; the first start is what a single one is."""

    def spread(rows: Any, parts: Any) -> float:
        return float(sum(np.square(rows[part] - rows[part].mean(0)).sum() for part in parts))

    random = np.random.default_rng(0)
    problems = [random.standard_normal((24, 18)) for _ in range(6)]
    several = [spread(rows, cluster("kmeans", rows, 8, seed=1)) for rows in problems]
    monkeypatch.setattr(clustering, "_STARTS", 1)
    once = [spread(rows, cluster("kmeans", rows, 8, seed=1)) for rows in problems]
    assert all(one <= other + 1e-9 for one, other in zip(several, once, strict=True))
    assert sum(several) < 0.97 * sum(once)
