"""Widths: the options of ClusterMerge against a model's groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphzip.errors import PlanError
from graphzip.plan.passes import ClusterMerge
from graphzip_passes.parts.widths import Clusters, Width, WidthOptions, matches, resolve


@dataclass(frozen=True)
class Group:
    name: str
    size: int
    blocks: tuple[tuple[int, ...], ...]
    mergeable: bool = True
    reason: str | None = None
    whole_blocks: bool = False
    overlaps: tuple[str, ...] = ()
    least: int = 1


def group(name: str, size: int, *, blocks: int = 1, reason: str | None = None) -> Group:
    each = size // blocks
    parts = tuple(tuple(range(start, start + each)) for start in range(0, size, each))
    return Group(name, size, parts, mergeable=reason is None, reason=reason)


MODEL = [
    group("conv1", 16),
    group("layer1.conv1", 10),
    group("layer1.conv1#2", 10),
    group("layer2.grouped", 12, blocks=3),
    group("fc", 10, reason="the model's output"),
]


def asked(made: ClusterMerge | None = None, **options: Any) -> WidthOptions:
    """What `ClusterMerge` of these options, or as it is `made`, asks for."""
    made = ClusterMerge(**options) if made is None else made
    return WidthOptions(made.keep, made.exclude, made.round_to, made.clusters, made.min_width)


def widths(groups: list[Group] = MODEL, **options: Any) -> dict[str, int]:
    return {name: kept.count for name, kept in resolve(asked(**options), groups).items()}


def message(groups: list[Group] = MODEL, **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        resolve(asked(**options), groups)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- shares, counts


def test_half_of_everything_that_can_be_merged() -> None:
    kept = resolve(asked(), MODEL)
    assert kept == {
        "conv1": Width(8),
        "layer1.conv1": Width(5),
        "layer1.conv1#2": Width(5),
        "layer2.grouped": Width(6),
    }
    assert list(kept) == [each.name for each in MODEL[:4]]


@pytest.mark.parametrize(
    ("size", "keep", "expected"),
    [(10, 0.7, 7), (10, 0.3, 3), (10, 0.29, 2), (100, 0.29, 29), (100, 0.57, 57), (64, 0.01, 1), (3, 1e-9, 1)],
)
def test_a_share_is_the_decimal_that_was_written(size: int, keep: float, expected: int) -> None:
    assert widths([group("a", size)], keep=keep) == {"a": expected}


def test_groups_that_keep_everything_are_not_listed() -> None:
    assert widths(keep=1.0) == {}
    assert widths([group("a", 10)], keep=10) == {}
    assert widths([group("a", 1)], keep=0.5) == {}
    assert widths(clusters={}) == {}
    assert widths([]) == {}


def test_one_is_a_count() -> None:
    assert widths([group("a", 10)], keep=1) == {"a": 1}


def test_the_first_key_that_matches_wins_and_the_rest_stays_whole() -> None:
    assert widths(keep={"conv1": 2, "*conv1": 0.5}) == {"conv1": 2, "layer1.conv1": 5, "layer1.conv1#2": 5}
    assert widths(keep={"*conv1": 0.5, "conv1": 2}) == {"conv1": 8, "layer1.conv1": 5, "layer1.conv1#2": 5}
    assert widths(keep={"*#2": 3, "layer1.conv1": 4}) == {"layer1.conv1": 4, "layer1.conv1#2": 3}


def test_a_glob_matches_names_without_their_number() -> None:
    assert matches("layer1.conv1", "layer1.conv1#2")
    assert matches("layer1.conv1#2", "layer1.conv1#2")
    assert matches("*.conv1", "layer1.conv1#12")
    assert not matches("layer1.conv1#2", "layer1.conv1")
    assert not matches("Layer1.*", "layer1.conv1")


def test_excluded_groups_stay_whole() -> None:
    assert widths(exclude=["layer1.conv1", "layer2.*"]) == {"conv1": 8}
    assert widths(keep={"fc": 0.5, "conv1": 0.5}, exclude=["fc"]) == {"conv1": 8}


def test_groups_that_cannot_be_merged_stay_whole_under_a_wider_key() -> None:
    assert "fc" not in widths(keep={"*": 0.5})
    assert "fc" not in widths(keep=9)
    assert widths(keep={"fc": 1.0, "conv1": 0.5}) == {"conv1": 8}
    assert widths(keep={"fc": 10, "conv1": 0.5}) == {"conv1": 8}


def test_a_group_that_cannot_be_merged_is_refused_by_name() -> None:
    assert message(keep={"fc": 0.5}) == (
        "cluster_merge.keep['fc']: group 'fc' cannot be merged: the model's output; take the key out"
    )
    pinned = [group("head.a", 4, reason="softmax over channels"), group("head.b", 4, reason="output"), *MODEL]
    assert message(pinned, keep={"head.*": 2}) == (
        "cluster_merge.keep['head.*']: group 'head.a' (and 1 more) cannot be merged: softmax over channels; "
        "take the key out"
    )


def test_unknown_names_get_the_closest() -> None:
    assert message(keep={"layer1.conv7": 0.5}) == (
        "cluster_merge.keep['layer1.conv7']: matches no channel group; did you mean 'layer1.conv1' or 'layer1.conv1#2'?"
    )
    assert message(exclude=["conv1", "layer2.groupd"]).startswith(
        "cluster_merge.exclude[1]: 'layer2.groupd' matches no channel group; did you mean 'layer2.grouped'?"
    )
    assert message(clusters={"convv1": [[0]]}).startswith(
        "cluster_merge.clusters['convv1']: no channel group has this name; did you mean 'conv1'"
    )


BLOCKS = "cannot be kept of group 'layer2.grouped', whose 3 blocks keep the same number each"


def test_counts_above_the_size() -> None:
    assert message(keep=11).splitlines()[1:] == [
        "  - cluster_merge.keep: 11 channels cannot be kept of group 'layer1.conv1', which has 10",
        "  - cluster_merge.keep: 11 channels cannot be kept of group 'layer1.conv1#2', which has 10",
        f"  - cluster_merge.keep: 11 channels {BLOCKS}; keep 9 or 12",
    ]
    assert message(keep={"conv1": 17}) == (
        "cluster_merge.keep['conv1']: 17 channels cannot be kept of group 'conv1', which has 16"
    )


def test_all_problems_are_said_with_the_place_in_the_plan() -> None:
    with pytest.raises(PlanError) as caught:
        resolve(asked(keep={"q": 1}, exclude=["z"]), [group("a", 2)], where="passes[1].cluster_merge")
    assert str(caught.value).splitlines() == [
        "the plan: 2 problems",
        "  - passes[1].cluster_merge.exclude[0]: 'z' matches no channel group; there are: 'a'",
        "  - passes[1].cluster_merge.keep['q']: matches no channel group; there are: 'a'",
    ]


# ---------------------------------------------------------------------------------------------------- blocks, rounding


def test_every_block_keeps_the_same_share() -> None:
    blocked = [group("a", 12, blocks=3)]
    assert widths(blocked, keep=0.5) == {"a": 6}
    assert widths(blocked, keep=0.7) == {"a": 6}
    assert widths(blocked, keep=0.1) == {"a": 3}
    assert widths(blocked, keep=9) == {"a": 9}


@pytest.mark.parametrize(("count", "nearest"), [(1, "keep 3"), (7, "keep 6 or 9"), (11, "keep 9 or 12")])
def test_counts_that_do_not_divide_by_the_blocks(count: int, nearest: str) -> None:
    assert message([group("a", 12, blocks=3)], keep=count) == (
        f"cluster_merge.keep: {count} channels cannot be kept of group 'a', whose 3 blocks keep the same number "
        f"each; {nearest}"
    )


@pytest.mark.parametrize(
    ("size", "blocks", "keep", "round_to", "expected"),
    [
        (64, 1, 0.3, 8, 24),  # 19 rounds up
        (64, 1, 0.25, 8, 16),
        (64, 1, 17, 8, 24),
        (10, 1, 0.9, 8, 10),  # 16 is above the size
        (48, 3, 0.3, 4, 12),  # 4 per block
        (48, 3, 0.35, 4, 24),  # 5 per block, rounds up to a multiple of 12
        (12, 3, 0.7, 8, 12),
    ],
)
def test_rounding_goes_up_and_stops_at_the_size(
    size: int, blocks: int, keep: Any, round_to: int, expected: int
) -> None:
    kept = widths([group("a", size, blocks=blocks)], keep=keep, round_to=round_to)
    assert kept.get("a", size) == expected


@given(
    each=st.integers(1, 40),
    blocks=st.integers(1, 6),
    keep=st.floats(0, 1, exclude_min=True) | st.integers(1, 40),
    round_to=st.integers(1, 20),
)
def test_widths_fit_the_blocks_and_are_the_smallest(each: int, blocks: int, keep: float, round_to: int) -> None:
    size = each * blocks
    if isinstance(keep, int):
        keep = blocks * min(keep, each)
        least = keep
    else:
        least = blocks * max(1, math.floor(each * Fraction(repr(keep))))
    width = widths([group("a", size, blocks=blocks)], keep=keep, round_to=round_to).get("a", size)
    assert least <= width <= size
    assert width % blocks == 0
    assert width == size or width % round_to == 0
    assert not any(other % blocks == 0 and other % round_to == 0 for other in range(least, width))


# ---------------------------------------------------------------------------------------------------- clusters by hand

SMALL = [group("a", 4), group("b", 4), group("g", 4, blocks=2), group("fc", 3, reason="the model's output")]


def test_clusters_by_hand_are_put_in_order_and_leave_the_rest_whole() -> None:
    assert resolve(asked(clusters={"a": [[3], [2, 0], [1]]}), SMALL) == {"a": Clusters(((0, 2), (1,), (3,)))}
    assert Clusters(((0, 2), (1,), (3,))).count == 3


def test_keep_applies_to_the_groups_without_clusters() -> None:
    kept = resolve(asked(clusters={"a": [[0, 1, 2, 3]]}, keep=0.5), SMALL)
    assert kept == {"a": Clusters(((0, 1, 2, 3),)), "b": Width(2), "g": Width(2)}
    assert list(kept) == ["a", "b", "g"]


def test_clusters_of_one_channel_change_nothing() -> None:
    assert resolve(asked(clusters={"a": [[0], [1], [2], [3]], "fc": [[2], [1], [0]]}), SMALL) == {}
    assert widths(SMALL, clusters={"a": [[0], [1], [2], [3]]}, keep=0.5) == {"b": 2, "g": 2}


def test_clusters_inside_blocks() -> None:
    assert widths(SMALL, clusters={"g": [[2, 3], [0, 1]]}) == {"g": 2}
    unequal = [Group("g", 4, ((0, 2), (1, 3)))]
    assert resolve(asked(clusters={"g": [[2, 0], [3, 1]]}), unequal) == {"g": Clusters(((0, 2), (1, 3)))}


@pytest.mark.parametrize(
    ("clusters", "expected"),
    [
        ({"a": [[0, 1], [2]]}, "['a']: channel 3 is in no cluster; name every one of the 4 channels once"),
        ({"a": [[0]]}, "['a']: channels 1, 2, 3 are in no cluster; name every one of the 4 channels once"),
        ({"a": [[0, 1], [2, 3, 9]]}, "['a']: channel 9 is outside the group, whose 4 channels are 0 to 3"),
        ({"g": [[0, 2], [1, 3]]}, "['g']: the cluster [0, 2] spans blocks 0 and 1; keep it inside one block"),
        ({"g": [[0, 1], [2], [3]]}, "['g']: block 1 has 2 clusters and block 0 has 1; give every block the same num"),
        ({"fc": [[0, 1], [2]]}, "['fc']: the group cannot be merged: the model's output"),
    ],
)
def test_clusters_that_do_not_fit(clusters: Any, expected: str) -> None:
    assert message(SMALL, clusters=clusters).startswith(f"cluster_merge.clusters{expected}")


def test_repeated_channels_are_named_even_when_the_options_did_not_check() -> None:
    options = ClusterMerge.model_construct(clusters={"a": ((0, 1), (1, 2, 3, 3))}, keep={}, exclude=(), round_to=1)
    with pytest.raises(PlanError, match="channels 1, 3 are in more than one place; name every channel once"):
        resolve(asked(options), SMALL)


def test_at_most_a_handful_of_channels_is_named() -> None:
    assert "channels 1, 2, 3, 4, 5 and 4 more are in no cluster" in message(clusters={"layer1.conv1": [[0]]})


def test_clusters_of_an_excluded_group_contradict() -> None:
    assert message(SMALL, clusters={"a": [[0, 1, 2, 3]]}, exclude=["a"]) == (
        "cluster_merge.clusters['a']: the group is excluded too; take it out of one of the two"
    )


def heads() -> list[Group]:
    width = group("q", 32, blocks=4)
    return [
        Group(width.name, width.size, width.blocks, overlaps=("q#2",)),
        Group("q#2", 4, ((0, 1, 2, 3),), whole_blocks=True, overlaps=("q",)),
    ]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.5, {"q": Width(16)}),
        (8, {"q": Width(8)}),
        ({"q": 8}, {"q": Width(8)}),
        ({"q#2": 2}, {"q#2": Width(2)}),
        ({"*": 0.5}, {"q": Width(16)}),
    ],
)
def test_the_width_inside_blocks_shrinks_unless_whole_blocks_are_named(
    keep: float | dict[str, float], expected: dict[str, Width]
) -> None:
    assert resolve(asked(keep=keep), heads()) == expected


def test_a_plan_may_not_shrink_both_of_two_overlapping_groups() -> None:
    with pytest.raises(PlanError, match=r"groups 'q#2' and 'q' overlap; a plan may shrink one of them"):
        resolve(asked(keep={"q": 0.5, "q#2": 0.5}), heads())
