"""The algebra of labels, and views of label arrays against views of tensors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from graphzip.labels import IntArray, LabelSpace, Reason, collapse, mix, ranks, support
from graphzip.ops.views import regroup, reshape_axis

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, max_side=4)


def labelled(shape: Any = SHAPES, classes: int = 4) -> st.SearchStrategy[IntArray]:
    return arrays.arrays(np.int64, shape, elements=st.integers(0, classes - 1))


# --- single axes ---------------------------------------------------------------------------------------------------


@given(SHAPES)
def test_support_names_dimensions_with_several_positions(shape: tuple[int, ...]) -> None:
    assert support(np.zeros(shape, np.int64)) == tuple(dim for dim in range(len(shape)) if shape[dim] != 1)


def test_support_of_a_scalar_is_empty() -> None:
    assert support(np.zeros((), np.int64)) == ()
    assert support(np.zeros((1, 1), np.int64)) == ()


@given(labelled(), st.data())
def test_collapse_undoes_broadcasting(axis: IntArray, data: st.DataObject) -> None:
    """What it gives broadcasts back to the axis, varies along every dimension left, and is the same once spread."""
    small = collapse(axis)
    assert small.ndim == axis.ndim
    assert np.array_equal(np.broadcast_to(small, axis.shape), axis)
    for dim in support(small):
        assert not np.array_equal(small, np.broadcast_to(small.take([0], dim), small.shape))
    wide = tuple(data.draw(st.integers(1, 3)) if size == 1 else size for size in small.shape)
    assert np.array_equal(collapse(np.broadcast_to(small, wide)), small)


def test_collapse_keeps_what_varies() -> None:
    column = np.array([[0, 0], [1, 1]])
    assert collapse(column).tolist() == [[0], [1]]
    assert collapse(column.T).tolist() == [[0, 1]]
    both = np.array([[0, 1], [1, 0]])
    assert collapse(both) is both


@given(labelled())
def test_ranks_number_the_occurrences_of_every_class(classes: IntArray) -> None:
    found = ranks(classes)
    flat = classes.ravel().tolist()
    expected = [flat[:place].count(label) for place, label in enumerate(flat)]
    if found is None:
        assert not any(expected)
    else:
        assert any(expected)
        assert found.shape == classes.shape
        assert found.ravel().tolist() == expected


def test_ranks_of_nothing_and_of_one() -> None:
    assert ranks(np.empty(0, np.int64)) is None
    assert ranks(np.array([[7]])) is None
    assert ranks(np.array([5, 2, 5, 5])).tolist() == [0, 0, 1, 2]  # type: ignore[union-attr]


# --- hashes --------------------------------------------------------------------------------------------------------


def test_mix_tells_values_and_their_order_apart() -> None:
    rows, columns = np.arange(50).reshape(-1, 1), np.arange(60)
    found = mix(rows, columns)
    assert found.shape == (50, 60)
    assert found.dtype == np.uint64
    assert np.unique(found).size == found.size
    assert int(mix(1, 2)) != int(mix(2, 1)) != int(mix(1, 2, 0))
    assert int(mix(0)) != int(mix(0, 0)) != 0
    assert int(found[3, 4]) == int(mix(3, 4))


def test_mix_takes_negative_numbers_and_overflows_quietly() -> None:
    assert int(mix(-1)) != int(mix(1))
    with np.errstate(all="raise"):
        assert mix(np.full(3, 2**62), -5).shape == (3,)


@given(labelled(shape=st.integers(1, 6)), st.randoms(use_true_random=False))
def test_sums_of_hashes_do_not_depend_on_order(parts: IntArray, random: Any) -> None:
    """Signatures are sums over a multiset: equal for equal multisets, different where one count differs."""
    shuffled = parts.tolist()
    random.shuffle(shuffled)

    def total(values: Any) -> int:
        with np.errstate(over="ignore"):
            return int(mix(np.asarray(values)).sum())

    assert total(shuffled) == total(parts)
    assert total([*shuffled, shuffled[0]]) != total(parts)
    assert total([*shuffled[1:], shuffled[0] + 1]) != total(parts)


# --- equalities ----------------------------------------------------------------------------------------------------


def partition(classes: IntArray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(classes == channel).tolist()) for channel in np.unique(classes)}


def test_fresh_labels_are_new_and_alone() -> None:
    space = LabelSpace()
    first, second = space.fresh(3), space.fresh(2)
    assert first.tolist() + second.tolist() == [0, 1, 2, 3, 4]
    solution = space.solve()
    assert solution.count == 5
    assert partition(solution.classes) == {frozenset({label}) for label in range(5)}
    assert solution.pins == {}
    assert solution.containers == []


def test_an_empty_space_has_no_channels() -> None:
    assert LabelSpace().solve().count == 0


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=8))
def test_unify_closes_equalities(pairs: list[tuple[int, int]]) -> None:
    space = LabelSpace()
    labels = space.fresh(8)
    for left, right in pairs:
        space.unify(labels[[left]], labels[[right]])
    leader = list(range(8))
    for left, right in pairs:
        old, new = leader[left], leader[right]
        leader = [new if found == old else found for found in leader]
    solution = space.solve()
    assert partition(solution.classes) == partition(np.array(leader))
    assert solution.count == len(set(leader))


def test_unify_broadcasts() -> None:
    space = LabelSpace()
    heads, width = space.fresh(6).reshape(2, 3), space.fresh(3)
    space.unify(heads, width)
    space.unify(heads, heads)
    classes = space.solve().classes
    assert np.array_equal(classes[heads], np.broadcast_to(classes[width], (2, 3)))
    assert np.unique(classes).size == 3


def test_unify_refuses_shapes_that_do_not_meet() -> None:
    space = LabelSpace()
    with pytest.raises(ValueError, match="broadcast"):
        space.unify(space.fresh(2), space.fresh(3))


def test_a_pin_holds_the_whole_channel_and_the_first_reason_counts() -> None:
    space = LabelSpace()
    labels = space.fresh(5)
    space.unify(labels[:2], labels[2:4])
    space.pin(labels[[0]], Reason(None, "first"))
    space.pin(labels[2:].reshape(1, 3), Reason("add", "second"))
    solution = space.solve()
    reason = [solution.pins.get(int(channel)) for channel in solution.classes]
    assert [str(each) for each in reason] == ["first", "second", "first", "second", "second"]


# --- containers ----------------------------------------------------------------------------------------------------


def test_a_container_of_several_channels_stays_apart() -> None:
    space = LabelSpace()
    heads, width = space.fresh(2).reshape(2, 1), space.fresh(6).reshape(2, 3)
    space.contain(heads, width)
    solution = space.solve()
    assert solution.count == 8
    assert len(solution.containers) == 1
    outer, inner = solution.containers[0][:2]
    held = {int(channel): set(inner[outer == channel].tolist()) for channel in np.unique(outer)}
    assert held == {
        int(solution.classes[head]): set(solution.classes[row].tolist())
        for head, row in zip(heads.ravel(), width, strict=True)
    }


def test_a_container_of_one_channel_joins_it() -> None:
    space = LabelSpace()
    heads, width = space.fresh(2).reshape(2, 1), space.fresh(6).reshape(2, 3)
    space.contain(heads, width)
    space.unify(width[:1, :1], width[:1])
    solution = space.solve()
    assert np.unique(solution.classes[[*width[0], heads[0, 0]]]).size == 1
    assert solution.count == 1 + 4
    assert {int(label) for label in np.unique(solution.containers[0][0])} == {int(solution.classes[heads[1, 0]])}


def test_containers_close_one_after_another() -> None:
    """Each container holds the one before; closing the innermost closes them all."""
    space = LabelSpace()
    inner = space.fresh(2)
    chain = [space.fresh(2) for _ in range(4)]
    space.contain(chain[0][[0, 0]], inner)
    for small, large in pairwise(chain):
        space.contain(large[[0, 0]], small[[0, 0]])
    assert space.solve().count == 2 + 1 + 4, "containers of one container are that container"
    space.unify(inner[:1], inner[1:])
    solution = space.solve()
    assert np.unique(solution.classes[[*inner, *(labels[0] for labels in chain)]]).size == 1
    assert solution.containers == []


def test_one_container_with_contents_from_two_operators() -> None:
    """Contents of the same container count together within one statement, and each statement on its own."""
    space = LabelSpace()
    outer, left, right = space.fresh(1), space.fresh(1), space.fresh(1)
    space.contain(outer, left)
    space.contain(outer, right)
    classes = space.solve().classes
    assert classes[outer[0]] == classes[left[0]] == classes[right[0]]


@given(labelled(shape=st.tuples(st.integers(1, 3), st.integers(1, 4)), classes=3))
def test_only_containers_with_one_class_join(content: IntArray) -> None:
    space = LabelSpace()
    classes = space.fresh(3)
    outer = space.fresh(content.shape[0])
    space.contain(outer[:, None], classes[content])
    solution = space.solve()
    for row, container in zip(content, outer, strict=True):
        joined = bool((solution.classes[classes[row]] == solution.classes[container]).all())
        assert joined == (np.unique(solution.classes[classes[row]]).size == 1)


@given(labelled(shape=st.tuples(st.integers(1, 3), st.integers(1, 4)), classes=3))
def test_coarse_channels_are_whole_containers(content: IntArray) -> None:
    space = LabelSpace()
    classes = space.fresh(3)
    outer = space.fresh(content.shape[0])
    space.contain(outer[:, None], classes[content])
    space.pin(outer[:1], Reason(None, "kept"))
    solution = space.solve(coarse=True)
    for row, container in zip(content, outer, strict=True):
        assert (solution.classes[classes[row]] == solution.classes[container]).all()
    assert solution.containers == []
    assert set(map(str, solution.pins.values())) == {"kept"}


# --- views of labels -----------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of as many elements, ones included."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 5]), max_size=5))

    def shape() -> tuple[int, ...]:
        sizes: list[int] = []
        rest = list(factors)
        while rest:
            take = draw(st.integers(1, len(rest)))
            sizes.append(math.prod(rest[:take]))
            rest = rest[take:]
        for _ in range(draw(st.integers(0, 2))):
            sizes.insert(draw(st.integers(0, len(sizes))), 1)
        return tuple(sizes)

    return shape(), shape()


@given(views())
def test_runs_of_a_view_are_minimal_and_complete(view: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before, after = view
    runs = regroup(before, after)
    assert [dim for left, _ in runs for dim in left] == list(range(len(before)))
    assert [dim for _, right in runs for dim in right] == list(range(len(after)))
    for left, right in runs:
        sizes, wanted = [before[dim] for dim in left], [after[dim] for dim in right]
        assert math.prod(sizes) == math.prod(wanted)
        inner = {math.prod(sizes[:count]) for count in range(1, len(sizes))}
        assert not inner & {math.prod(wanted[:count]) for count in range(1, len(wanted))} - {1, math.prod(sizes)}


@given(views(), st.data())
def test_labels_are_reshaped_like_tensors(view: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject) -> None:
    """The axis broadcasts to what `torch.reshape` makes of the index tensor, and spells out no run it need not."""
    before, after = view
    spread = [data.draw(st.booleans()) for _ in before]
    shape = tuple(size if kept else 1 for size, kept in zip(before, spread, strict=True))
    axis = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    found = reshape_axis(axis, before, after)
    whole = torch.from_numpy(np.broadcast_to(axis, before).copy()).reshape(after).numpy()
    assert found.ndim == len(after)
    assert np.array_equal(np.broadcast_to(found, after), whole)
    for left, right in regroup(before, after):
        if not any(shape[dim] > 1 for dim in left):
            assert all(found.shape[dim] == 1 for dim in right)


def test_the_runs_of_well_known_views() -> None:
    assert regroup((2, 6, 5), (2, 30)) == [([0], [0]), ([1, 2], [1])]
    assert regroup((2, 5, 6), (2, 5, 2, 3)) == [([0], [0]), ([1], [1]), ([2], [2, 3])]
    assert regroup((2, 6, 4), (2, 4, 6)) == [([0], [0]), ([1, 2], [1, 2])]
    assert regroup((), ()) == []
    assert regroup((1,), ()) == [([0], [])]
    assert regroup((), (1, 1)) == [([], [0]), ([], [1])]
    assert regroup((6, 1), (6,)) == [([0], [0]), ([1], [])]
