"""Planted duplicates merge losslessly on every small network of `nets.NETS`."""

from __future__ import annotations

import pytest
import torch
from nets import NETS, REFUSABLE
from planting import Lossless, assert_lossless, choose_clusters, mergeable_share, plant, randomize_, relative, tensors

import graphzip as gz

CONVOLUTIONAL = [
    "bottleneck", "buffers", "cat_with_input", "cat_with_itself", "channel_shuffle_functional",
    "channel_shuffle_module", "channel_shuffle_view", "cifar_densenet", "cifar_resnet_pad",
    "cifar_resnet_projection", "conv1d", "conv3d", "depthwise_multiplier", "depthwise_separable", "expanded_gate",
    "factorized_video", "flatten_norm_linear",
    "flip_channels", "functional_conv_parameter", "glu_chunk", "glu_functional", "inception", "inplace",
    "inverted_residual", "layer_scale", "mlp", "pad_channels", "pad_channels_added", "permuted_channels",
    "pixel_unshuffle", "poolings", "preactivation", "prelu", "roll_channels", "shared_conv", "shufflenet", "siamese",
    "split_uneven", "squeeze_excite", "squeeze_excite_linear", "squeeze_unsqueeze", "swiglu_mlp", "transposed_conv",
    "unet", "unet_transposed", "vgg_flatten", "view_flatten_spatial_first",
]  # fmt: skip
"""Networks in which no channel but those of the output has a reason to be pinned."""


def lossless(name: str, seed: int = 0, fraction: float = 0.5) -> Lossless:
    """The property on one network; parts without an effect on the output may be gone."""
    model, inputs = NETS[name]()
    return assert_lossless(model, inputs, seed, fraction=fraction, unused=lambda key: key.startswith("two."))


@pytest.mark.parametrize("name", sorted(NETS.keys() - REFUSABLE))
def test_planted_duplicates_merge_losslessly(name: str) -> None:
    lossless(name)


@pytest.mark.parametrize("name", sorted(REFUSABLE))
def test_writes_into_views_are_exact_or_refused(name: str) -> None:
    model, inputs = NETS[name]()
    try:
        groups = gz.channel_groups(model, inputs)
    except gz.GraphZipError:
        return
    assert len(groups) > 0
    lossless(name)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_of_convolutional_networks_are_mergeable(name: str) -> None:
    model, inputs = NETS[name]()
    groups = gz.channel_groups(model, inputs)
    assert mergeable_share(groups) >= 0.95, str(groups)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["cifar_resnet_pad", "cifar_densenet", "shufflenet", "inception", "split_hierarchical"]
)
def test_other_clusters_and_other_amounts(name: str, seed: int) -> None:
    assert lossless(name, seed, fraction=(0.2, 0.4, 0.8)[seed - 1]).merged > 0


@pytest.mark.parametrize(
    "name",
    ["channel_shuffle_module", "cifar_resnet_pad", "glu_chunk", "grouped_conv", "pixel_shuffle", "pixel_unshuffle",
     "resnext_block", "shufflenet", "transposed_grouped", "flatten_norm_linear"],
)  # fmt: skip
def test_merging_to_one_channel_in_every_block(name: str) -> None:
    found = lossless(name, fraction=0.01)
    assert all(len(clusters) == len(found.groups[group].blocks) for group, clusters in found.clusters.items())


def test_nothing_planted_moves_the_output() -> None:
    """The property is not vacuous: merging channels that differ changes what the network computes."""
    model, inputs = NETS["cifar_resnet_projection"]()
    model = model.double().eval()
    inputs = tuple(x.double() for x in inputs)
    randomize_(model, 0, inputs)
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in gz.channel_groups(model, inputs) if group.mergeable]
    clusters = {group.name: choose_clusters(group, generator, 0.5) for group in groups}
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), inputs)
    with torch.no_grad():
        assert relative(model(*inputs), compiled.module(*inputs)) > 1e-3


def test_one_group_alone() -> None:
    """Each group of a residual network by itself."""
    for name in [group.name for group in _groups("cifar_resnet_pad") if group.mergeable]:
        model, inputs = NETS["cifar_resnet_pad"]()
        model, inputs = model.double().eval(), tuple(x.double() for x in inputs)
        randomize_(model, 0, inputs)
        groups = gz.channel_groups(model, inputs)
        clusters = plant(model, groups, 0, choose=lambda group, name=name: group.name == name)
        assert list(clusters) == [name]
        compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), inputs)
        with torch.no_grad():
            assert relative(model(*inputs), compiled.module(*inputs)) < 1e-9, name


def _groups(name: str) -> gz.ChannelGroups:
    model, inputs = NETS[name]()
    return gz.channel_groups(model, inputs)


def test_groups_have_the_same_names_from_run_to_run() -> None:
    for name in ("cifar_densenet", "shufflenet", "dict_and_two_inputs"):
        assert _groups(name).to_dict() == _groups(name).to_dict()


def test_structure_and_mode_of_the_outputs() -> None:
    model, inputs = NETS["dict_and_two_inputs"]()
    model.train()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), inputs)
    assert compiled.module.training
    assert model.training
    outputs = compiled.module.eval()(*inputs)
    assert set(outputs) == {"classes", "masks", "more"}
    assert isinstance(outputs["masks"], tuple)
    assert outputs["masks"][0].shape == (2, 2, 8, 8)
    by_name = compiled.module(picture=inputs[0], condition=inputs[1])
    assert all(map(torch.equal, tensors(outputs), tensors(by_name)))
