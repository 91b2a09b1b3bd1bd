"""Attention, norms over channels, gates and computed weights: planted duplicates merge losslessly, heads included."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_nets import ATTENTION_NETS, HEADS, INNER, STREAM, WIDTH
from planting import TOLERANCE, Lossless, assert_lossless, double, plant, relative
from torch import nn

import graphzip as gz

TRAINS_OTHERWISE = {"spectral_norm"}
"""Networks that compute something else in training mode than in evaluation mode."""

PLAIN = [
    "attention_scores_as_output", "causal_made_in_forward", "causal_tril", "convolution_on_scores",
    "cross_attention", "einsum_attention", "explicit_attention", "learned_positions", "mask_as_an_input",
    "packed_3_h_d",
    "packed_3_h_d_indexed", "packed_chunk", "packed_h_3_d", "packed_h_3_d_selected", "packed_h_d_3",
    "packed_key_value", "position_embedding_table", "query_key_norm_all_heads", "relative_position_bias",
    "scale_per_head", "sdpa", "slope_per_head", "tied_embedding_functional", "tied_embedding_module", "windows",
    "windows_masked", "windows_packed", "multihead_attention", "multihead_attention_bias_kv", "encoder_layer",
    "encoder_layer_norm_first",
]  # fmt: skip
"""Networks with `HEADS` heads in which widths and heads can shrink."""

NO_ONE_IS_PINNED = [
    "spectral_norm", "lstm", "gru",
    *PLAIN, "folded_into_the_batch", "folded_sequence_first", "values_of_another_width", "packed_split_unequal",
    "grouped_query_interleave", "grouped_query_sdpa", "encoder_stack", "decoder_layer", "geglu", "swiglu",
    "swiglu_packed", "glu", "query_key_norm", "query_key_rms_norm", "query_key_cosine", "stream_layer_norm",
    "stream_rms_norm", "stream_own_rms_norm", "stream_own_layer_norm", "stream_group_norm", "stream_group_norm_one",
    "stream_instance_norm", "stream_normalize", "stream_normalize_last", "rotary_halves", "rotary_pairs",
    "multihead_attention_with_weights", "grouped_query_expand", "grouped_query_five_dims", "multi_query_broadcast",
    "multi_query_expand", "multi_query_repeat", "rotary_of_a_part", "channel_attention", "channel_attention_groups",
    "linear_attention", "heads_innermost", "packed_folded_into_the_batch", "latent_keys_and_values",
    "rotary_of_a_part_packed",
]  # fmt: skip
"""Networks in which only what the output or the vocabulary fixes is pinned."""


def lossless(name: str, seed: int = 0, **options: Any) -> Lossless:
    """The property on one network."""
    model, inputs = ATTENTION_NETS[name]()
    options.setdefault("trains", name not in TRAINS_OTHERWISE)
    return assert_lossless(model, inputs, seed, **options)


@pytest.mark.parametrize("name", sorted(ATTENTION_NETS))
def test_planted_duplicates_merge_losslessly(name: str) -> None:
    lossless(name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(ATTENTION_NETS))
def test_other_clusters(name: str, seed: int) -> None:
    lossless(name, seed, whole=0.5, fraction=(0.5, 0.3, 0.8)[seed - 1])


@pytest.mark.parametrize(
    "name",
    ["attention_scores_as_output", "cross_attention", "encoder_layer", "grouped_projections", "grouped_query_sdpa",
     "norm_after_attention", "packed_h_d_3", "relative_position_bias", "trap_unflatten_mean", "windows_packed"],
)  # fmt: skip
def test_merging_to_one_channel_in_every_block(name: str) -> None:
    """All but the residual stream, whose norm has nothing left to tell apart when one channel is."""
    found = lossless(name, fraction=0.01, choose=lambda group: len(group.blocks) > 1 or group.whole_blocks)
    assert all(len(clusters) == len(found.groups[group].blocks) for group, clusters in found.clusters.items())


def _has_whole_blocks(name: str) -> bool:
    model, inputs = ATTENTION_NETS[name]()
    return any(group.whole_blocks and group.mergeable for group in gz.channel_groups(model.eval(), inputs))


WHOLE_HEADS = [
    *PLAIN, "grouped_query_interleave", "grouped_query_sdpa", "grouped_query_expand", "encoder_stack", "rotary_halves",
    "rotary_pairs", "rotary_of_a_part", "query_key_norm", "query_key_rms_norm", "channel_attention", "linear_attention",
    "heads_innermost", "packed_d_h",
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_whole_heads_merge_losslessly(name: str) -> None:
    assert lossless(name, choose=lambda group: group.whole_blocks).merged > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ATTENTION_NETS))
def test_whole_blocks_merge_losslessly(name: str) -> None:
    if _has_whole_blocks(name):
        for seed in (1, 2):
            assert lossless(name, seed, whole=1.0).merged > 0


@pytest.mark.parametrize("name", PLAIN)
def test_widths_and_heads_are_groups_of_their_own(name: str) -> None:
    model, inputs = ATTENTION_NETS[name]()
    groups = gz.channel_groups(model.eval(), inputs)
    widths = [group for group in groups if len(group.blocks) == HEADS]
    heads = [group for group in groups if group.whole_blocks]
    assert [group.size for group in widths] == [INNER, INNER], str(groups)
    assert [group.size for group in heads] == [HEADS], str(groups)
    assert all(len(block) == WIDTH for group in widths for block in group.blocks)
    assert all(group.mergeable and group.exact for group in (*widths, *heads))
    assert set(heads[0].overlaps) == {group.name for group in widths}


@pytest.mark.parametrize("name", NO_ONE_IS_PINNED)
def test_nothing_is_pinned_without_need(name: str) -> None:
    model, inputs = ATTENTION_NETS[name]()
    for group in gz.channel_groups(model.eval(), inputs):
        fixed = re.search(r"is an output of the model|is indexed by the data", group.reason or "")
        assert group.mergeable or fixed, f"{group.name}: {group.reason}"


@pytest.mark.parametrize(
    ("name", "group", "keep", "shapes"),
    [
        ("sdpa", "q", 8, {"q.weight": (8, STREAM), "k.bias": (8,), "v.weight": (INNER, STREAM)}),
        ("sdpa", "v", 8, {"q.weight": (INNER, STREAM), "v.weight": (8, STREAM), "out.weight": (STREAM, 8)}),
        ("sdpa", "q#2", 3, {"q.weight": (18, STREAM), "v.bias": (18,), "out.weight": (STREAM, 18)}),
        ("packed_3_h_d", "qkv", 8, {"qkv.weight": (8 + 8 + 24, STREAM)}),
        ("packed_3_h_d", "qkv#2", 1, {"qkv.weight": (18, STREAM), "out.weight": (STREAM, 6)}),
        ("packed_3_h_d", "qkv#3", 16, {"qkv.weight": (24 + 24 + 16, STREAM), "out.weight": (STREAM, 16)}),
        ("grouped_query_sdpa", "q", 4, {"q.weight": (8, STREAM), "k.weight": (4, STREAM), "v.weight": (12, STREAM)}),
        ("grouped_query_sdpa", "q#2", 1, {"q.weight": (12, STREAM), "k.weight": (6, STREAM), "v.weight": (6, STREAM)}),
        ("swiglu", "gate", 5, {"gate.weight": (5, 8), "up.bias": (5,), "down.weight": (8, 5)}),
        ("geglu", "both", 5, {"both.weight": (10, 8), "down.weight": (8, 5)}),
        ("tied_embedding_module", "embed#2", 7, {"embed.weight": (11, 7), "positions": (9, 7), "norm1.weight": (7,)}),
        ("relative_position_bias", "q#2", 2, {"table": (9, 2), "k.weight": (12, STREAM)}),
        ("relative_position_embedding", "table#2", 2, {"table.weight": (9, 2), "k.weight": (12, STREAM)}),
        ("multihead_attention", "attention.in_proj_weight#2", 2, {"attention.in_proj_weight": (36, INNER)}),
        ("encoder_layer", "1.linear1", 5, {"1.linear1.weight": (5, INNER), "1.linear2.weight": (INNER, 5)}),
    ],
)
def test_sizes_after_a_merge(name: str, group: str, keep: int, shapes: dict[str, tuple[int, ...]]) -> None:
    model, inputs = ATTENTION_NETS[name]()
    others = [other.name for other in gz.channel_groups(model.eval(), inputs) if other.name.startswith(f"{group}#")]
    plan = gz.Plan([gz.ClusterMerge(keep={group: keep}, exclude=others)])
    compiled = gz.compile(model.eval(), plan, inputs)
    state = compiled.module.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    compiled.module(*inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sdpa", "windows_packed", "stream_own_rms_norm", "tied_embedding_module"])
def test_half_precision_has_the_same_groups(name: str, dtype: torch.dtype) -> None:
    assert_same_groups(name, lambda model: model.to(dtype), dtype)


@pytest.mark.parametrize("name", ["sdpa", "windows_packed", "stream_own_rms_norm", "tied_embedding_functional"])
def test_inspection_needs_no_weights(name: str) -> None:
    assert_same_groups(name, lambda model: model.to("meta"), None)


def assert_same_groups(name: str, change: Callable[[nn.Module], nn.Module], dtype: torch.dtype | None) -> None:
    """The changed model has the groups of the one in double precision."""
    model, inputs = ATTENTION_NETS[name]()
    expected = gz.channel_groups(
        double(model), tuple(x.double() if x.is_floating_point() else x for x in inputs)
    ).to_dict()
    example = tuple(x.to(dtype) if dtype is not None and x.is_floating_point() else x for x in inputs)
    if dtype is None:
        example = tuple(x.to("meta") for x in inputs)
    assert gz.channel_groups(change(model.eval()), example).to_dict() == expected


@pytest.mark.parametrize(
    "name", ["stream_layer_norm", "stream_group_norm_one", "stream_normalize", "channel_attention"]
)
def test_the_result_merges_again(name: str) -> None:
    """Norms that count channels by their weights count those weights again."""
    once = lossless(name, fraction=0.7, trains=False).compiled.module
    inputs = tuple(x.double() for x in ATTENTION_NETS[name]()[1])
    groups = gz.channel_groups(once, inputs)
    clusters = plant(once, groups, 1, fraction=0.6)
    twice = gz.compile(once, gz.Plan([gz.ClusterMerge(clusters=clusters)]), inputs)
    assert {group.name for group in groups if not group.mergeable} == {"last"}
    assert relative(once(*inputs), twice.module(*inputs)) <= TOLERANCE
    assert sum(p.numel() for p in twice.module.parameters()) < sum(p.numel() for p in once.parameters())
