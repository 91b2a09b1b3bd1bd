"""Plant duplicate channels in a model, merge them, and demand that nothing changes.

Channels whose producer and pointwise slices are equal compute the same values, so keeping one and adding up the
consumers' slices is lossless. `assert_lossless` checks it in float64, together with what else a compiled module owes:
names, shapes, training mode, gradients, copies, other batch sizes, and the user's model left alone.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphzip as gz

Clusters = dict[str, list[list[int]]]
State = dict[str, Tensor]

TOLERANCE = 1e-9
NOISE = 1e-15
ROUNDS = 20
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_OUTPUT = re.compile(r"\boutputs?\b")


@dataclass(frozen=True)
class Lossless:
    """What `assert_lossless` found: the groups, what was planted, the result, and the worst relative difference."""

    groups: Any
    clusters: Clusters
    compiled: Any
    worst: float

    @property
    def merged(self) -> int:
        """Channels that are gone."""
        return sum(len(members) - 1 for clusters in self.clusters.values() for members in clusters)


# --- the model's state ---------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> State:
    """Every parameter, buffer and plain tensor attribute under each of its names, tied ones under all of them."""
    plain = {
        f"{prefix}.{key}" if prefix else key: value
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {
        **plain,
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _random(generator: torch.Generator, like: Tensor, low: float | None = None, high: float = 1.0) -> Tensor:
    if low is None:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    else:
        values = low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return values.to(like.dtype)


@torch.no_grad()
def randomize_(model: nn.Module, seed: int, inputs: Sequence[Tensor] | None = None) -> None:
    """Random statistics and affine parameters for every normalisation, random biases, no constant parameter.

    Convolution and linear weights keep their values and with them their scale. Where `inputs` are given, the batch
    norms' statistics lie near those of the inputs, so that deep networks neither explode nor fade.
    """
    generator = torch.Generator().manual_seed(seed)
    affine = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if id(parameter) in affine:
            scale = name.endswith("weight")
            values = _random(generator, parameter, 0.5, 1.5) if scale else 0.2 * _random(generator, parameter)
            parameter.copy_(values)
        elif parameter.dim() < 2 or bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * _random(generator, parameter))
    if inputs is not None:
        _calibrate(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            assert module.running_mean is not None
            spread = module.running_var.sqrt()
            module.running_mean.add_(0.2 * spread * _random(generator, module.running_mean))
            module.running_var.mul_(_random(generator, module.running_var, 0.6, 1.6)).clamp_(min=1e-3)


def _calibrate(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give every batch norm the statistics of `inputs`, each one taken behind the calibrated ones before it.

    A copy is run, for a forward may leave more behind than statistics: detectors keep what they drew for its sizes.
    """
    ran = copy.deepcopy(model).eval()
    norms = {
        name: norm
        for name, norm in ran.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    }
    for norm in norms.values():
        norm.train()
        norm.momentum = 1.0
    ran(*inputs)
    for name, norm in norms.items():
        model.get_submodule(name).load_state_dict(norm.state_dict())


def double(model: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode, plain tensor attributes included."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[key] = value.double()
    return model


# --- planting ------------------------------------------------------------------------------------------------------


def choose_clusters(group: Any, generator: torch.Generator, fraction: float) -> list[list[int]]:
    """Random clusters inside the group's blocks; every block keeps the same number of channels."""
    smallest = min(len(block) for block in group.blocks)
    kept = min(max(1, round(smallest * fraction)), smallest)
    clusters: list[list[int]] = []
    for block in group.blocks:
        order = [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]
        members = [[channel] for channel in order[:kept]]
        for channel in order[kept:]:
            members[int(torch.randint(kept, (), generator=generator))].append(channel)
        clusters += members
    return clusters


def _owned(group: Any) -> set[tuple[str, int, int]]:
    return {(s.param, s.dim, s.index) for channel in range(group.size) for s in group.slices(channel)}


def plant(
    model: nn.Module,
    groups: Any,
    seed: int,
    *,
    fraction: float = 0.5,
    choose: Callable[[Any], bool] = lambda group: True,
    whole: float = 0.0,
) -> Clusters:
    """Copy slices inside random clusters of every mergeable, exact group, and return the clusters.

    Of two groups that overlap only one is shrunk: with probability `whole` the one of whole blocks, else the first. A
    group that a constant in `forward` acts on is left alone: no state holds it. Copies are repeated until none changes
    anything, because a parameter's dimensions may belong to different groups; that they settle is asserted.
    """
    generator = torch.Generator().manual_seed(seed)
    first = {
        group.name for group in groups if group.whole_blocks and float(torch.rand((), generator=generator)) < whole
    }
    groups = sorted(groups, key=lambda group: group.name not in first)
    state = state_of(model)
    clusters: Clusters = {}
    taken: set[tuple[str, int, int]] = set()
    steps: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for group in groups:
        if not (group.mergeable and group.exact and choose(group)):
            continue
        owned = _owned(group)
        if owned & taken or not {param for param, _, _ in owned} <= state.keys():
            continue
        taken |= owned
        clusters[group.name] = choose_clusters(group, generator, fraction)
        steps += _copies(state, group, clusters[group.name])
    for _ in range(ROUNDS):
        if not _copy(steps):
            return clusters
    raise AssertionError(f"the planted copies do not settle after {ROUNDS} rounds: slices contradict each other")


def _copies(state: State, group: Any, clusters: list[list[int]]) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
    """(tensor, dim, target indices, source indices) for the slices that a cluster's members share with its first."""
    pairs: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    for members in clusters:
        first = group.slices(members[0])
        for member in members[1:]:
            own = group.slices(member)
            assert [(s.param, s.dim, s.role) for s in own] == [(s.param, s.dim, s.role) for s in first], (
                f"{group.name}: slices of channels {members[0]} and {member} do not correspond"
            )
            for target, source in zip(own, first, strict=True):
                if target.role != "consumer":
                    targets, sources = pairs.setdefault((target.param, target.dim), ([], []))
                    targets.append(target.index)
                    sources.append(source.index)
    for (name, dim), (targets, sources) in pairs.items():
        yield state[name], dim, torch.tensor(targets), torch.tensor(sources)


@torch.no_grad()
def _copy(steps: Sequence[tuple[Tensor, int, Tensor, Tensor]]) -> bool:
    """Do all copies once; whether anything changed."""
    changed = False
    for tensor, dim, targets, sources in steps:
        values = tensor.index_select(dim, sources)
        if not torch.equal(tensor.index_select(dim, targets), values):
            tensor.index_copy_(dim, targets, values)
            changed = True
    return changed


# --- comparing -----------------------------------------------------------------------------------------------------


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a tree of outputs, detached."""
    return [leaf.detach().clone() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def relative(before: Any, after: Any) -> float:
    """The worst difference of two trees of outputs, each tensor relative to its largest magnitude."""
    assert pytree.tree_structure(before) == pytree.tree_structure(after)
    worst = 0.0
    for left, right in zip(tensors(before), tensors(after), strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        assert torch.isfinite(left).all(), "the model's own output is not finite; nothing can be compared"
        scale = max(float(left.abs().max()), 1e-300) if left.numel() else 1.0
        worst = max(worst, float((left - right).abs().max()) / scale if left.numel() else 0.0)
    return worst


def assert_alive(outputs: Any) -> None:
    """The two images of the batch give different outputs: a network that ignores its input proves nothing."""
    apart = [
        float((leaf[0] - leaf[1]).abs().max()) / float(leaf.abs().max()) for leaf in tensors(outputs) if leaf.any()
    ]
    assert max(apart, default=0.0) > 1e-6, "the outputs do not depend on the inputs"


def _noisy(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(x * (1 + NOISE * _random(generator, x)) if x.is_floating_point() else x for x in inputs)


def _computes_in_float32(compiled: gz.Compiled) -> bool:
    """Whether a model casts to float32 inside, whatever its own dtype is."""
    values = [node.meta.get("val") for node in compiled.traced.graph.nodes if node.op == "call_function"]
    return any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values)


def _nudged(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters differ as much as rounding to float32 makes them."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(1 + 6e-8 * _random(generator, parameter))
    return model


def _other_batch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([x, x.flip(-1)[:1] if x.dim() > 1 else x[:1]]) for x in inputs)


def mergeable_share(groups: Any, aside: re.Pattern[str] = _OUTPUT) -> float:
    """Channels that can shrink over all channels, without those that are pinned for a reason in which `aside` is found.

    A channel of a group that cannot shrink alone counts where it goes as a part of the blocks of another group, as that
    of split attention does.
    """
    free = {each for group in groups if group.mergeable for each in _made(group, range(group.size))}
    counted = [group for group in groups if group.mergeable or not aside.search(group.reason or "")]
    shrink = sum(
        group.size if group.mergeable else sum(free.issuperset(_made(group, [each])) for each in range(group.size))
        for group in counted
    )
    return shrink / max(sum(group.size for group in counted), 1)


def _made(group: Any, channels: Iterable[int]) -> set[tuple[str, int, int]]:
    """What makes channels: slices of weights, and what acts on each."""
    slices = (each for channel in channels for each in group.slices(channel))
    return {(each.param, each.dim, each.index) for each in slices if each.role != "consumer"}


# --- the whole property --------------------------------------------------------------------------------------------


def assert_lossless(
    model: nn.Module,
    inputs: Sequence[Tensor],
    seed: int = 0,
    *,
    fraction: float = 0.5,
    unused: Callable[[str], bool] = lambda name: False,
    trains: bool = True,
    alive: bool = True,
    choose: Callable[[Any], bool] = lambda group: True,
    whole: float = 0.0,
) -> Lossless:
    """Randomise `model`, plant duplicates, compile, and compare outputs in float64 at two batch sizes.

    `unused` says which parameters exist only in training (auxiliary heads) and may be gone; with `trains=False` the
    compiled module is not trained for a step, which is the costly part on large models. `alive` demands outputs that
    depend on the inputs, which a random network may fail to have. `choose` and `whole` are those of `plant`.
    """
    model = double(model)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    randomize_(model, seed, inputs)
    traced = gz.trace(model, inputs)
    groups = gz.channel_groups(traced)
    clusters = plant(model, groups, seed, fraction=fraction, choose=choose, whole=whole)
    snapshot = {name: tensor.detach().clone() for name, tensor in state_of(model).items()}
    more, ran = _other_batch(inputs), copy.deepcopy(model)
    with torch.no_grad():
        before, control, before_more = ran(*inputs), ran(*_noisy(inputs)), ran(*more)
    del ran
    if alive:
        assert_alive(before)
    compiled = gz.compile(traced, gz.Plan([gz.ClusterMerge(clusters=clusters)]))
    _assert_untouched(model, snapshot)
    with torch.no_grad():
        after, after_more = compiled.module(*inputs), compiled.module(*more)
    tolerance = max(TOLERANCE, 100 * relative(before, control))
    worst = max(relative(before, after), relative(before_more, after_more))
    if _computes_in_float32(compiled):
        tolerance = max(tolerance, 10 * relative(before, _nudged(model, seed)(*inputs)))
    assert worst <= tolerance, f"outputs differ by {worst:.3g} (tolerance {tolerance:.3g}) after merging {clusters}"
    assert not compiled.module.training
    assert_sizes(model, compiled.module, groups, clusters, unused)
    if trains:
        assert_trains(model, compiled.module, inputs, tolerance)
        assert_copies(compiled.module, inputs)
    return Lossless(groups, clusters, compiled, worst)


def _assert_untouched(model: nn.Module, snapshot: State) -> None:
    assert not any(module.training for module in model.modules()), "compile changed the mode of the user's model"
    now = state_of(model)
    assert now.keys() == snapshot.keys()
    for name, tensor in snapshot.items():
        assert torch.equal(now[name], tensor), f"compile changed {name} of the user's model"


def assert_sizes(
    model: nn.Module, merged: nn.Module, groups: Any, clusters: Mapping[str, Sequence[Sequence[int]]], unused: Any
) -> None:
    """Original names, and along every dimension as many positions as the clusters keep."""
    gone: dict[tuple[str, int], set[int]] = {}
    shrunk: set[tuple[str, int]] = set()
    for name, members in clusters.items():
        group = groups[name]
        for channel in (channel for cluster in members for channel in cluster[1:]):
            for place in group.slices(channel):
                gone.setdefault((place.param, place.dim), set()).add(place.index)
                if len(group.blocks) > 1 and place.role == "consumer":
                    shrunk.add((place.param, place.dim))
    old, new = dict(model.named_parameters()), dict(merged.named_parameters())
    assert new.keys() <= old.keys(), f"new names: {sorted(new.keys() - old.keys())}"
    assert all(map(unused, old.keys() - new.keys())), f"lost parameters: {sorted(old.keys() - new.keys())}"
    for name, parameter in new.items():
        assert parameter.requires_grad == old[name].requires_grad
        assert parameter.dtype == old[name].dtype
        for dim, size in enumerate(old[name].shape):
            left = size - len(gone.get((name, dim), ()))
            if (name, dim) in shrunk:
                assert parameter.shape[dim] < size, f"{name} keeps its size along {dim}"
            else:
                assert parameter.shape[dim] == left, f"{name} has {parameter.shape[dim]} along {dim}, not {left}"


def _loss(outputs: Any) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(
        [(leaf * torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape)).sum() for leaf in leaves]
    ).sum()


def _drops(model: nn.Module) -> bool:
    return any(
        "Drop" in type(module).__name__ or "StochasticDepth" in type(module).__name__ for module in model.modules()
    )


def assert_trains(model: nn.Module, merged: nn.Module, inputs: Sequence[Tensor], tolerance: float) -> None:
    """In training mode every parameter gets a gradient, and without dropout outputs and statistics stay equal."""
    model, merged = copy.deepcopy(model), copy.deepcopy(merged)
    model.train()
    merged.train()
    assert merged.training
    torch.manual_seed(0)
    outputs = merged(*inputs)
    _loss(outputs).backward()
    missing = [name for name, p in merged.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"
    if _drops(model):
        return
    with torch.no_grad():
        expected = model(*inputs)
        if pytree.tree_structure(expected) != pytree.tree_structure(outputs):
            return
        assert relative(expected, outputs) <= 100 * tolerance, "outputs differ in training mode"
        model.eval()
        merged.eval()
        assert relative(model(*inputs), merged(*inputs)) <= 100 * tolerance, "training left other statistics behind"


def assert_copies(merged: nn.Module, inputs: Sequence[Tensor]) -> None:
    """A deep copy computes the same, alone; a state dict goes out to bytes and in again."""
    twin = copy.deepcopy(merged)
    with torch.no_grad():
        expected = merged(*inputs)
        assert relative(expected, twin(*inputs)) == 0.0
        buffer = io.BytesIO()
        torch.save(merged.state_dict(), buffer)
        for parameter in twin.parameters():
            parameter.add_(1.0)
        assert not any(torch.equal(p, q) for p, q in zip(merged.parameters(), twin.parameters(), strict=True))
        buffer.seek(0)
        twin.load_state_dict(torch.load(buffer, weights_only=True))
        assert relative(expected, twin(*inputs)) == 0.0
