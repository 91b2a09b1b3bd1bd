"""Which channels share a cluster: the registry of clusterings.

A clustering divides n channels into exactly k non-empty clusters, one cluster per channel that is kept (C-SGD,
section 3.2). It is given one feature vector per channel (the flattened kernels of the group's producers, for k-means)
and need not look at it:

- `kmeans` looks for clusters with a small sum of squared distances to their centres;
- `even` makes runs of neighbours whose sizes differ by at most one: 6 channels in 4 clusters are {0, 1} {2, 3} {4} {5};
- `imbalanced` puts the first n - k + 1 channels into one cluster: {0, 1, 2} {3} {4} {5}.

A new clustering is a function and a line: `@register_clustering("name")`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from graphzip.boundary import call_user
from graphzip.errors import PlanError, WeightsError
from graphzip.numeric.solvers import pivoted_cholesky
from graphzip.report.tables import closest

__all__ = [
    "BUILT_IN",
    "Clustering",
    "check_clustering",
    "cluster",
    "cluster_view",
    "clustering_of",
    "clusterings",
    "is_viewing",
    "register_clustering",
]

Features = NDArray[np.floating[Any]]
Labels = NDArray[np.intp]

Clustering = Callable[..., Iterable[Iterable[int]]]
"""`(features (n, d), k, seed) -> k lists of channels`, every channel of `range(n)` in exactly one of them; or that of a
view, `(group, channels, k, seed)`.
"""

_Function = TypeVar("_Function", bound=Clustering)

_MANY: Final = 8192  # rows; the inner products of more are not held
_STARTS: Final = 10  # of Lloyd's algorithm, of which the one with the nearest centres counts
_STARTED: Final = 4096  # rows in all of them: of many rows the starts are fewer
_ROUNDS: Final = 30  # of Lloyd's algorithm over many rows

BUILT_IN: Final = ("kmeans", "even", "imbalanced")
_CLUSTERINGS: Final[dict[str, Clustering]] = {}
_VIEWING: Final[set[str]] = set()


def register_clustering(name: str, *, view: bool = False) -> Callable[[_Function], _Function]:
    """Decorator that makes a function available to plans as `clustering: name`. A later one replaces an earlier one.

    It is `(features (n, d), k, seed) -> k lists of rows`, every row in one of them. With `view` it is `(group,
    channels, k, seed) -> k lists of channels`: it sees a `graphzip.GroupView`, and divides those channels of the group.

    Raises `PlanError` for the name of a clustering that graphzip brings.
    """
    if not isinstance(name, str) or not name:
        raise PlanError(f"{name!r} is not the name of a clustering; a name is text")
    if name in BUILT_IN and name in _CLUSTERINGS:
        raise PlanError(f"clustering {name!r} is built in and cannot be replaced; register under another name")

    def register(function: _Function) -> _Function:
        if not callable(function):
            raise PlanError(
                f"clustering {name!r}: {function!r} cannot be called; register a function (features, k, seed)"
            )
        _CLUSTERINGS[name] = function
        (_VIEWING.add if view else _VIEWING.discard)(name)
        return function

    return register


def clusterings() -> tuple[str, ...]:
    """The names that a plan can give as `clustering`."""
    return tuple(_CLUSTERINGS)


def clustering_of(name: str) -> Clustering | None:
    """The function that is registered under a name."""
    return _CLUSTERINGS.get(name)


def is_viewing(name: str) -> bool:
    """Whether the clustering of this name is given a `GroupView`."""
    return name in _VIEWING


def cluster_view(name: str, view: Any, channels: Sequence[int], k: int, *, seed: int, what: str) -> list[list[int]]:
    """Divide channels of a group that is seen through a `GroupView` into exactly `k` clusters; as `cluster`."""
    found = call_user(_CLUSTERINGS[name], view, tuple(channels), k, seed)
    place = {channel: number for number, channel in enumerate(channels)}
    try:
        rows: Any = [[place[channel] for channel in each] for each in found]
    except KeyError as error:
        raise PlanError(
            f"{what}: clustering {name!r} returned channel {error}; it is to divide {', '.join(map(str, channels))}"
        ) from None
    except TypeError:
        rows = found
    return [
        [channels[row] for row in each] for each in _checked(rows, len(channels), k, f"{what}: clustering {name!r}")
    ]


def check_clustering(name: str, where: str = "clustering") -> None:
    """Raises `PlanError`, which names the plan key `where` and the closest names, for an unknown clustering."""
    if name not in _CLUSTERINGS:
        raise PlanError(f"{where}: unknown clustering {name!r}; {closest(name, _CLUSTERINGS)}")


def cluster(name: str, features: Features, k: int, *, seed: int = 0, what: str = "the group") -> list[list[int]]:
    """Divide the n rows of `features` (n, d) into exactly `k` non-empty clusters by the clustering `name`.

    Clusters are sorted, and ordered by their smallest member. The same arguments give the same clusters. `what` is
    what messages call the rows' owner, such as "group 'layer1.0.conv1'".

    Raises `PlanError` for an unknown name, for k outside [1, n], and when a registered clustering returns anything but
    k clusters with every channel once; `WeightsError` when a feature is NaN or infinite.
    """
    check_clustering(name)
    n = len(features)
    if not 1 <= k <= n:
        raise PlanError(f"{what}: {n} channels cannot be divided into {k} clusters; keep between 1 and {n}")
    if not np.isfinite([features.min(initial=0.0), features.max(initial=0.0)]).all():
        finite = np.isfinite(features).all(axis=1)
        raise WeightsError(
            f"{what}: {n - int(finite.sum())} of {n} channels have NaN or infinite weights, the first is channel "
            f"{int(np.argmin(finite))}; load weights that are finite"
        )
    if k == n:
        return [[channel] for channel in range(n)]
    view = features.view()
    view.flags.writeable = False
    found = call_user(_CLUSTERINGS[name], view, k, seed)
    return _checked(found, n, k, f"{what}: clustering {name!r}")


def _checked(clusters: Iterable[Iterable[int]], n: int, k: int, what: str) -> list[list[int]]:
    """The clusters in canonical order. Raises `PlanError` unless they are k and hold each of n channels once."""
    try:
        listed = [list(each) for each in clusters]
        kinds = {type(channel) for each in listed for channel in each}
        plain = all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds)
        members = [np.asarray(each, dtype=np.int64 if plain else None) for each in listed]
    except (TypeError, ValueError):
        raise PlanError(f"{what} returned no list of lists of channels, such as [[0, 3], [1], [2]]") from None
    if len(members) != k or not all(each.size for each in members):
        kept = sum(bool(each.size) for each in members)
        raise PlanError(f"{what} returned {kept} non-empty clusters of {len(members)}; it must return exactly {k}")
    if not plain and not all(each.ndim == 1 and np.issubdtype(each.dtype, np.integer) for each in members):
        raise PlanError(f"{what} returned clusters that do not hold ints; a cluster is a list of channels")
    channels = np.concatenate(members)
    outside = channels[(channels < 0) | (channels >= n)]
    if outside.size:
        raise PlanError(f"{what} returned channel {outside[0]}; the channels are 0 to {n - 1}")
    counts = np.bincount(channels, minlength=n)
    if counts.max() > 1:
        raise PlanError(f"{what} returned channel {counts.argmax()} more than once; every channel is in one cluster")
    if counts.min() < 1:
        raise PlanError(f"{what} left out channel {counts.argmin()}; every channel is in one cluster")
    return sorted(sorted(each.tolist()) for each in members)


def _members(labels: Labels, k: int) -> list[list[int]]:
    return [np.flatnonzero(labels == label).tolist() for label in range(k)]


@register_clustering("even")
def _even(features: Features, k: int, seed: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(len(features)), k)]


@register_clustering("imbalanced")
def _imbalanced(features: Features, k: int, seed: int) -> list[list[int]]:
    n = len(features)
    return [list(range(n - k + 1)), *([channel] for channel in range(n - k + 1, n))]


@register_clustering("kmeans")
def _kmeans(features: Features, k: int, seed: int) -> list[list[int]]:
    """k-means of the distinct rows, each weighted by how often it occurs: identical channels stay together.

    Where there are at most k distinct rows no cluster mixes different ones.
    """
    dtype = np.float64 if features.dtype == np.float64 else np.float32
    first, owner = _distinct(features)
    if len(first) <= k:
        return _split_largest(_members(owner, len(first)), k)
    rows: Features = np.asarray(features if len(first) == len(features) else features[first], dtype=dtype)
    largest = max(rows.max(), -rows.min())
    rows = rows / largest  # clusters do not change with scale, and squares neither overflow nor vanish
    rows -= rows.mean(axis=0)
    with _controller().limit(limits=1):  # deterministic sums, and small problems lose by waiting for other threads
        if len(rows) > _MANY:
            return _members(_lloyd_of_many(rows, np.bincount(owner).astype(dtype), k, seed)[owner], k)
        gram: Features = rows @ rows.T
        labels = _lloyd(_short(rows, gram), gram, np.bincount(owner).astype(dtype), k, seed)
    return _members(labels[owner], k)


@functools.cache
def _controller() -> ThreadpoolController:
    """Finding the libraries that hold threads takes longer than most clusterings, so they are looked up once."""
    import sklearn.cluster  # noqa: F401  (loads the libraries that it computes with)

    return ThreadpoolController()


def _short(rows: Features, gram: Features) -> Features:
    """Rows (u, at most min(u, d)) at the same distances from each other, by the pivoted Cholesky factor of `gram`.

    `gram = L L^T` is the matrix of the rows' inner products, and the rows of `L` have the same ones.
    """
    if rows.shape[1] <= len(rows):
        return rows
    return pivoted_cholesky(gram)


def _distinct(features: Features) -> tuple[Labels, Labels]:
    """The first channel of every distinct row (u,), and for every channel the position of its row there (n,)."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    owner = np.empty(len(features), dtype=np.intp)
    for channel, row in enumerate(features + 0.0):  # -0.0 equals 0.0
        key = row.tobytes()
        owner[channel] = seen.setdefault(key, len(first))
        if owner[channel] == len(first):
            first.append(channel)
    return np.asarray(first, dtype=np.intp), owner


def _split_largest(clusters: list[list[int]], k: int) -> list[list[int]]:
    """k clusters, made by taking channels off the largest ones, whose members are all alike."""
    clusters = [list(each) for each in clusters]
    while len(clusters) < k:
        clusters.append([max(clusters, key=len).pop()])
    return clusters


def _lloyd(rows: Features, gram: Features, weights: Features, k: int, seed: int) -> Labels:
    """Labels (u,) of k-means on distinct rows (u, d), u > k, with inner products `gram` (u, u)."""
    from sklearn.cluster import KMeans

    random = np.random.RandomState(seed)
    found = []
    for _ in range(min(_STARTS, max(_STARTED // len(rows), 1))):
        solver = KMeans(k, init=rows[_spread(gram, weights, k, random)], n_init=1, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer clusters than asked for: repaired below
            found.append(solver.fit(rows, sample_weight=weights))
    best = min(found, key=lambda each: float(each.inertia_))
    return _repaired(rows, best.labels_.astype(np.intp), k)


def _lloyd_of_many(rows: Features, weights: Features, k: int, seed: int) -> Labels:
    """Labels (u,) of k-means on so many distinct rows (u, d) that their inner products would not fit."""
    from sklearn.cluster import KMeans

    solver = KMeans(k, init="k-means++", n_init=1, max_iter=_ROUNDS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few more rounds would not change much; empty clusters are repaired
        labels = solver.fit(rows, sample_weight=weights).labels_
    return _repaired(rows, labels.astype(np.intp), k)


def _spread(gram: Features, weights: Features, k: int, random: np.random.RandomState) -> list[int]:
    """Rows that are far from each other: the seeds of greedy k-means++ (Arthur and Vassilvitskii, 2007).

    Every next seed is the best of some rows drawn in proportion to their squared distance from the nearest seed. All
    pairs' distances are taken once, from the inner products, which makes many clusters of long rows affordable.
    """
    square = np.diagonal(gram)
    distances = square[:, None] + square[None, :] - 2.0 * gram
    np.maximum(distances, 0.0, out=distances)
    np.fill_diagonal(distances, 0.0)
    trials = 2 + int(math.log(k))
    share: NDArray[np.float64] = np.asarray(weights, dtype=np.float64) / float(weights.sum())
    seeds = [int(random.choice(len(gram), p=share))]
    nearest = distances[seeds[0]]
    while len(seeds) < k:
        potential = np.cumsum(nearest * weights, dtype=np.float64)
        draws = np.searchsorted(potential, random.random_sample(trials) * potential[-1])
        candidates = np.minimum(draws, len(gram) - 1)
        options = np.minimum(distances[candidates], nearest)
        best = int(np.argmin(options @ weights))
        seeds.append(int(candidates[best]))
        nearest = options[best]
    return seeds


def _repaired(rows: Features, labels: Labels, k: int) -> Labels:
    """Labels 0 to k - 1, all in use: while some are not, the row farthest from its centre gets a cluster of its own."""
    _, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(-1).astype(np.intp)
    for missing in range(int(labels.max()) + 1, k):
        counts = np.bincount(labels, minlength=missing)
        centres = np.zeros((missing, rows.shape[1]), dtype=np.float64)
        np.add.at(centres, labels, rows)
        centres /= counts[:, None]
        distance = np.square(rows - centres[labels]).sum(axis=1)
        distance[counts[labels] == 1] = -1.0
        labels[int(distance.argmax())] = missing
    return labels
