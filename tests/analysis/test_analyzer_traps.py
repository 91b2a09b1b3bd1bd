"""Networks that invite a wrong grouping, and the groups that a few well-known networks must have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import CHANGES, NETS, CifarResNet, Example, Net, between, conv, head, image, unit
from planting import assert_lossless
from torch import Tensor, nn

import graphzip as gz

Middle = Callable[[Tensor], Tensor]


def weave(x: Tensor) -> Tensor:
    """Channels and rows scrambled by views that do not respect them."""
    return x.flatten(1).view(-1, 8, 4, 16).transpose(1, 2).reshape(-1, 8, 8, 8)


def write_through_transpose(x: Tensor) -> Tensor:
    y = x.clone()
    y.transpose(1, 2)[:, :3].mul_(2)
    return y


def gather_by_data(x: Tensor) -> Tensor:
    return torch.gather(x, 1, x.argsort(1))


def scattered(x: Tensor) -> Tensor:
    index = torch.tensor([1, 1, 3, 0, 2, 2, 2, 7]).view(1, 8, 1, 1).expand_as(x)
    return torch.zeros_like(x).scatter_add(1, index, x)


def complex_pairs(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.view(-1, 4, 2, 8, 8).permute(0, 1, 3, 4, 2).contiguous())
    return torch.view_as_real(pairs * pairs).permute(0, 1, 4, 2, 3).reshape(-1, 8, 8, 8)


def self_attention(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    weights = torch.softmax(flat @ flat.transpose(1, 2) / math.sqrt(flat.shape[1]), -1)
    return (weights @ flat).view_as(x)


TRAPS: dict[str, Middle] = {
    "arange_scale": lambda x: x * torch.arange(8, dtype=x.dtype).view(1, 8, 1, 1),
    "arange_added_to_rows": lambda x: x + torch.arange(8, dtype=x.dtype).view(1, 1, 8, 1),
    "size_in_arithmetic": lambda x: x / math.sqrt(x.shape[1]) + x.shape[1],
    "sum_divided_by_size": lambda x: x - x.sum(1, keepdim=True) / x.shape[1],
    "hard_coded_view": lambda x: x.view(-1, 8, 64).mul(2).view(-1, 8, 8, 8),
    "zeros_of_fixed_size": lambda x: x + torch.zeros(1, 8, 8, 8, dtype=x.dtype),
    "pool_over_channels": lambda x: F.max_pool2d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "pool3d_over_channels": lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 1, 1)).squeeze(1).repeat(1, 2, 1, 1),
    "max_pool_pairs_of_channels": lambda x: F.max_pool3d(x, (2, 1, 1)).repeat_interleave(2, 1),
    "interpolate_over_channels": lambda x: F.interpolate(x.transpose(1, 2), scale_factor=1.0).transpose(1, 2),
    "difference": lambda x: torch.cat([x[:, :1], x.diff(dim=1)], 1),
    "weave": weave,
    "rotate_channels_into_rows": lambda x: torch.rot90(x, 1, (1, 2)),
    "swap_channels_and_rows": lambda x: x.transpose(1, 2),
    "triangle_over_channels_and_rows": lambda x: x.transpose(1, 3).triu().transpose(1, 3),
    "roll_channels_and_rows": lambda x: torch.roll(x, (1, 3), (1, 2)),
    "roll_flat": lambda x: torch.roll(x, 5),
    "flip_everything": lambda x: x.flip(1, 2, 3),
    "argmax": lambda x: x * x.argmax(1, keepdim=True),
    "topk": lambda x: torch.topk(x, 4, 1).values.repeat(1, 2, 1, 1),
    "gather_by_data": gather_by_data,
    "scattered": scattered,
    "one_hot": lambda x: x + F.one_hot(x.argmax(1), 8).permute(0, 3, 1, 2),
    "compare_with_neighbour": lambda x: torch.where(x > x.roll(1, 1), x, -x),
    "gram": lambda x: torch.einsum("bchw,bdhw->bcd", x, x).unsqueeze(-1) + x.mean(3, keepdim=True) + x,
    "self_attention": self_attention,
    "cosine": lambda x: x * F.cosine_similarity(x, x.roll(1, 2), dim=1).unsqueeze(1),
    "fft_over_channels": lambda x: torch.fft.fft(x, dim=1).real,
    "fft_over_space": lambda x: torch.fft.fft2(x).real,
    "complex_pairs": complex_pairs,
    "write_through_transpose": write_through_transpose,
    "cumulative_product": lambda x: torch.cumprod(1 + 0.1 * x, 1),
    "logsumexp": lambda x: x - torch.logsumexp(x, 1, keepdim=True),
    "standardised_over_channels": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1),
    "median": lambda x: x - x.median(1, keepdim=True).values,
    "channel_dropout_like_mask": lambda x: x * (torch.arange(8) % 2).view(1, 8, 1, 1),
    "batch_mixing": lambda x: x + x.mean(0, keepdim=True),
    "batch_flip": lambda x: 2 * x + x.flip(0),
    "channels_of_two_images": lambda x: x + x.transpose(0, 1).reshape(8, -1).mean(1).view(1, 8, 1, 1),
    "min_of_halves": lambda x: torch.minimum(x[:, :4], x[:, 4:]).repeat(1, 2, 1, 1),
    "stack_of_halves_crosswise": lambda x: torch.stack([x[:, :4], x[:, 4:].flip(1)], 2).flatten(1, 2),
    "overlapping_slices": lambda x: torch.cat([x[:, :5] * 2, x[:, 2:5].flip(2)], 1),
    "sum_of_overlapping_slices": lambda x: torch.cat([x[:, :6] + x[:, 2:], x[:, :2]], 1),
    "unfold_over_channels": lambda x: torch.cat([x.unfold(1, 2, 2).sum(-1), x[:, :4]], 1),
    "constant_in_the_middle": lambda x: torch.cat([x[:, :3], torch.full_like(x[:, :2], 0.5), x[:, 5:]], 1),
    "einsum_over_rows": lambda x: torch.einsum("bchw,bcvw->bchv", x, x) / 8,
    "three_orders": lambda x: x + x[:, [1, 2, 3, 0, 5, 6, 7, 4]] * x[:, [3, 0, 1, 2, 6, 7, 4, 5]],
}


def _own_weights() -> dict[str, Callable[[], Example]]:
    """Traps that need parameters of their own."""

    def transposed_twin(m: Any, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(m.first(x), m.kernel, padding=1))
        return m.head(F.conv2d(y, m.kernel.transpose(0, 1), padding=1))

    def sliced_parameter(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(F.relu(F.conv2d(x[:, :4], m.kernel[:, :4])) + F.conv2d(x[:, 4:], m.kernel[:, 4:]))

    def position_table(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x) + m.table[:, :, :8, :8].flip(1)))

    def returned_parameter(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.head(m.first(x)), m.first[1].weight * 2

    def named_code(m: Any, x: Tensor) -> Tensor:
        return m.head(m.graph(F.relu(F.conv2d(m.first(x), m.code.weight))))

    def norm_of_the_weight(m: Any, x: Tensor) -> Tensor:
        return m.head(F.conv2d(m.first(x), m.kernel / m.kernel.norm()))

    def scaled(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x) * m.table))

    def plain_attribute() -> Example:
        """A tensor that is an attribute, but neither a parameter nor a buffer."""
        model = Net(scaled, first=unit(3, 8), second=unit(8, 6), head=head(6))
        model.table = torch.rand(1, 8, 1, 1)
        return model, (image(),)

    def literal(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x) * torch.tensor([1.0, 2.0, 3.0, 4.0] * 2, dtype=x.dtype).view(1, 8, 1, 1)))

    def kernel(outer: int, inner: int, size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(outer, inner, size, size) / 5)

    return {
        "transposed_twin": lambda: (
            Net(transposed_twin, first=unit(3, 8), kernel=kernel(6, 8, 3), head=head(8)), (image(),)
        ),
        "sliced_parameter": lambda: (
            Net(sliced_parameter, first=unit(3, 8), kernel=kernel(6, 8, 1), head=head(6)), (image(),)
        ),
        "position_table": lambda: (
            Net(position_table, first=unit(3, 8), table=nn.Parameter(torch.randn(1, 8, 9, 9)), second=unit(8, 6),
                head=head(6)), (image(),)
        ),
        "returned_parameter": lambda: (Net(returned_parameter, first=unit(3, 8), head=head(8)), (image(),)),
        "named_code": lambda: (
            Net(named_code, first=unit(3, 8), code=conv(8, 6, 1), graph=unit(6, 6), head=head(6)), (image(),)
        ),
        "norm_of_the_weight": lambda: (
            Net(norm_of_the_weight, first=unit(3, 8), kernel=kernel(6, 8, 1), head=head(6)), (image(),)
        ),
        "plain_attribute": plain_attribute,
        "literal": lambda: (Net(literal, first=unit(3, 8), second=unit(8, 6), head=head(6)), (image(),)),
    }  # fmt: skip


OWN = _own_weights()
REFUSABLE_TRAPS = {"write_through_transpose", "named_code"}


def trap(name: str) -> Example:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OWN[name]() if name in OWN else between(TRAPS[name])


@pytest.mark.parametrize("name", [*TRAPS, *OWN])
def test_exact_or_pinned_or_refused(name: str) -> None:
    """Never wrong: whatever the analyzer calls mergeable merges losslessly; a refusal is a typed error."""
    model, inputs = trap(name)
    try:
        gz.channel_groups(model, inputs)
    except gz.GraphZipError:
        assert name in REFUSABLE_TRAPS
        return
    for seed in range(2):
        assert_lossless(model, inputs, seed, trains=seed == 0, unused=lambda key: key.startswith("code."))


REASONS = {
    "cumsum_over_channels": "cumsum", "sort_over_channels": "sort",
    "unfinished_tail": "output",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REASONS))
def test_the_reason_names_the_operator(name: str) -> None:
    model, inputs = NETS[name]()
    reasons = [group.reason for group in gz.channel_groups(model, inputs) if not group.mergeable]
    assert any(REASONS[name] in (reason or "") for reason in reasons), reasons


# --- golden groups -------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> gz.ChannelGroups:
    return gz.channel_groups(model, inputs)


def places(group: Any, channel: int, param: str, dim: int) -> list[int]:
    """Positions of a channel along one dimension of a parameter."""
    return sorted({s.index for s in group.slices(channel) if (s.param, s.dim) == (param, dim)})


def weights(group: Any, role: str) -> set[str]:
    """Modules whose weights (of two dimensions or more) have slices of this role."""
    return {s.param.removesuffix(".weight") for s in group.slices(0) if s.role == role and s.param.endswith("weight")}


def table(groups: Any) -> dict[str, tuple[int, bool]]:
    return {group.name: (group.size, group.mergeable) for group in groups}


def test_cifar_resnet_with_padded_shortcuts() -> None:
    groups = groups_of(*NETS["cifar_resnet_pad"]())
    assert table(groups) == {
        "conv1": (4, True), "layer1.0.conv1": (4, True), "layer1.1.conv1": (4, True), "layer2.0.conv1": (8, True),
        "layer2.0.conv2": (4, True), "layer2.1.conv1": (8, True), "layer3.0.conv1": (16, True),
        "layer3.0.conv2": (8, True), "layer3.1.conv1": (16, True), "linear": (10, False),
    }  # fmt: skip
    stream = groups["conv1"]
    assert weights(stream, "producer") == {"conv1"} | {f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1)}
    assert [places(stream, c, "layer2.0.conv2.weight", 0) for c in range(4)] == [[2], [3], [4], [5]]
    assert [places(stream, c, "layer3.1.conv2.weight", 0) for c in range(4)] == [[6], [7], [8], [9]]
    assert [places(groups["layer2.0.conv2"], c, "layer2.0.bn2.weight", 0) for c in range(4)] == [[0], [1], [6], [7]]
    assert "output" in (groups["linear"].reason or "")


def test_resnet56_has_three_streams() -> None:
    groups = groups_of(CifarResNet(9), (torch.zeros(2, 3, 32, 32),))
    streams = {group.name: group.size for group in groups if len(weights(group, "producer")) > 1}
    assert streams == {"conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}


def test_bottleneck_with_projection() -> None:
    groups = groups_of(*NETS["bottleneck"]())
    assert table(groups) == {
        "stem.0": (6, True), "reduce.0": (4, True), "middle.0": (5, True), "expand": (12, True),
        "again.0.0": (4, True), "again.1.0": (4, True), "head.2": (5, False),
    }  # fmt: skip
    assert weights(groups["expand"], "producer") == {"expand", "shortcut", "again.2"}
    assert weights(groups["expand"], "consumer") == {"again.0.0", "head.2"}


def test_densenet_concatenates() -> None:
    groups = groups_of(*NETS["cifar_densenet"]())
    sizes = {group.name: group.size for group in groups if group.mergeable}
    assert sizes == {
        "stem": 8, "block1.0.2": 4, "block1.1.2": 4, "block1.2.2": 4, "transition.2": 20, "block2.0.2": 4,
        "block2.1.2": 4, "block2.2.2": 4,
    }  # fmt: skip
    second = groups["block1.1.2"]
    assert [places(second, c, "transition.2.weight", 1) for c in range(4)] == [[12], [13], [14], [15]]


def test_inception_and_unet_offsets() -> None:
    inception = groups_of(*NETS["inception"]())
    assert places(inception["five.1.0"], 3, "last.0.weight", 1) == [4 + 6 + 3]
    unet = groups_of(*NETS["unet"]())
    assert places(unet["down1.0"], 2, "up1.0.weight", 1) == [2]
    assert places(unet["middle.0"], 2, "up1.0.weight", 1) == [8]


def test_squeeze_excite_gate_is_coupled() -> None:
    groups = groups_of(*NETS["squeeze_excite"]())
    assert weights(groups["stem.0"], "producer") == {"stem.0", "up"}
    assert weights(groups["stem.0"], "consumer") == {"down", "last.0"}


def test_flatten_owns_a_run_of_columns() -> None:
    groups = groups_of(*NETS["vgg_flatten"]())
    assert places(groups["3.0"], 5, "7.weight", 1) == [20, 21, 22, 23]
    nhwc = groups_of(*NETS["view_flatten_spatial_first"]())
    assert places(nhwc["first.0"], 5, "last.weight", 1) == [5, 13, 21, 29]


def test_glu_and_pixel_shuffle_pair_rows() -> None:
    glu = groups_of(*NETS["glu_chunk"]())["stem"]
    assert glu.size == 8
    assert places(glu, 3, "stem.weight", 0) == [3, 11]
    shuffled = groups_of(*NETS["pixel_shuffle"]())["1"]
    assert shuffled.size == 4
    assert places(shuffled, 1, "1.weight", 0) == [4, 5, 6, 7]


def test_depthwise_follows_its_input() -> None:
    single = groups_of(*NETS["depthwise_separable"]())["0.0"]
    assert single.size == 8
    assert places(single, 5, "1.0.weight", 0) == [5]
    double = groups_of(*NETS["depthwise_multiplier"]())["0.0"]
    assert double.size == 6
    assert places(double, 2, "1.0.weight", 0) == [4, 5]


def test_channel_shuffle_leaves_every_channel_free() -> None:
    for name in ("channel_shuffle_view", "roll_channels", "flip_channels", "permuted_channels"):
        assert table(groups_of(*NETS[name]()))["first.0"] == (8, True), name
    shuffled = groups_of(*NETS["channel_shuffle_view"]())["first.0"]
    assert [places(shuffled, c, "second.0.weight", 1)[0] for c in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_halves_that_differ_are_two_groups(change: str) -> None:
    groups = groups_of(*NETS[f"halves_differ_{change}"]())
    halves = [group for group in groups if "first.0" in weights(group, "producer")]
    assert {group.name for group in halves} == {"first.0", "first.0#2"}
    assert sorted(places(halves[0], c, "first.0.weight", 0)[0] for c in range(4)) == [0, 1, 2, 3]


def test_shared_weights_have_both_roles() -> None:
    group = groups_of(*NETS["shared_conv"]())["stem.0"]
    assert {(s.dim, s.role) for s in group.slices(0) if s.param == "shared.weight"} == {
        (0, "producer"),
        (1, "consumer"),
    }


def test_names_follow_execution_and_tied_names_the_first() -> None:
    two = groups_of(*NETS["dict_and_two_inputs"]())
    assert places(two["condition"], 1, "condition.weight", 0) == [1, 9]
    assert places(two["condition"], 1, "stem.0.weight", 0) == [1]
    tied = groups_of(*NETS["tied_weights"]())
    assert all(s.param != "4.weight" for group in tied for s in group.slices(0))


def test_slices_of_two_channels_correspond() -> None:
    for name in ("cifar_resnet_pad", "shufflenet", "pixel_shuffle", "resnext_block", "unet"):
        for group in groups_of(*NETS[name]()):
            kinds = {tuple((s.param, s.dim, s.role) for s in group.slices(c)) for c in range(group.size)}
            assert len(kinds) == 1, group.name
            assert sorted(c for block in group.blocks for c in block) == list(range(group.size))


def test_groups_are_a_sequence_by_name_too() -> None:
    groups = groups_of(*NETS["bottleneck"]())
    assert groups[0].name == "stem.0"
    assert groups["expand"] in list(groups)
    assert len(groups) == 7
    assert json.loads(json.dumps(groups.to_dict())) == groups.to_dict()
    assert all(group.name in str(groups) for group in groups)
    assert groups["stem.0"].reason is None
    assert groups["stem.0"].exact
    with pytest.raises((KeyError, gz.GraphZipError)):
        groups["steam.0"]
