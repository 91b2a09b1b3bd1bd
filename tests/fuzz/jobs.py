"""What is done with a random model: random plans of all passes, and what must hold of each result."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from planting import plant
from torch import Tensor, nn

import graphzip as gz
from fuzz.compare import NotApplicable, Problem, apart, leaves, run, same_gradients
from fuzz.context import Context
from fuzz.onnx_check import exports

__all__ = ["JOBS"]

JOBS: dict[str, tuple[Callable[[Context], None], float]] = {}


def job(weight: float) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Register what is done under the name of the function."""

    def register(work: Callable[[Context], None]) -> Callable[[Context], None]:
        JOBS[work.__name__] = work, weight
        return work

    return register


Clusters = Mapping[str, Sequence[Sequence[int]]]


def _planted(c: Context) -> tuple[nn.Module, gz.ChannelGroups, dict[str, list[list[int]]]]:
    """A copy with duplicates in every group that can be merged losslessly."""
    groups = c.groups(c.model)
    c.stage = "plant"
    model = copy.deepcopy(c.model)
    clusters = plant(model, groups, c.seed, fraction=c.rng.choice((0.3, 0.5, 0.7)), whole=c.rng.choice((0.0, 0.5)))
    clusters = {name: sorted(sorted(part) for part in parts) for name, parts in clusters.items()}
    c.merged = sum(len(part) - 1 for parts in clusters.values() for part in parts)
    return model, groups, clusters


@job(6)
def merge(c: Context) -> None:
    """Planted duplicates are merged, alone or among passes that change nothing."""
    model, groups, clusters = _planted(c)
    passes: list[Any] = [gz.ClusterMerge(clusters=clusters)]
    folds = c.rng.random() < 0.2
    if folds:
        passes.insert(c.rng.randrange(2), gz.FoldBatchNorm())
    plan = gz.Plan(passes)
    c.stage = "compile"
    if c.rng.random() < 0.2:
        prepared = gz.prepare(model, plan, c.inputs, **c.options)
        c.same(model, _as_compiled(prepared), "prepared, ")
        compiled = prepared.convert()
    else:
        compiled = c.compile(model, plan)
    c.stage = "merged"
    if not folds and not compiled.report.lossless and not c.program.random:
        raise Problem("note", "merging identical channels is not exact by the report")
    c.same(model, compiled, "merged, ")
    mapped = None if folds else _mapping(groups, clusters)
    lossless(c, model, compiled, mapped, lambda cast: c.compile(cast(model), plan), trains=not folds)


def lossless(
    c: Context, model: nn.Module, compiled: gz.Compiled, mapped: Any, remake: Any, *, trains: bool = True
) -> None:
    """What else must hold of a result that computes what `model` does."""
    if c.program.random:
        return
    c.stage = "gradients"
    same_gradients(model, compiled.module, c.inputs, mapped, "")
    if trains:
        c.trains_alike(model, compiled)
    if c.onnx:
        exports(c, model, remake)
    elif c.rng.random() < 0.5:
        c.comes_back(compiled)


def _as_compiled(prepared: gz.Prepared) -> Any:
    """A prepared model, looked at like a result."""

    class View:
        module = prepared
        report = type("Report", (), {"notes": prepared._progress.traced.notes})
        traced = prepared._progress.traced

    return View


def _mapping(groups: gz.ChannelGroups, clusters: Clusters) -> Callable[[str, Tensor], Tensor]:
    """What is left of the gradient of a parameter: those of the slices that make channels are added up."""
    moves: dict[str, dict[int, dict[int, tuple[int, bool]]]] = {}
    twice: set[tuple[str, int]] = set()
    for name, parts in clusters.items():
        group = groups[name]
        for part in parts:
            first = group.slices(part[0])
            for member in part[1:]:
                for keep, gone in zip(first, group.slices(member), strict=True):
                    along = moves.setdefault(gone.param, {}).setdefault(gone.dim, {})
                    if gone.index in along or keep.index == gone.index or len(group.blocks) > 1:
                        twice.add((gone.param, gone.dim))
                    along[gone.index] = keep.index, keep.role == "consumer"

    def mapped(name: str, gradient: Tensor) -> Tensor:
        if any(param == name for param, _ in twice):
            return gradient[:0]
        for dim, along in moves.get(name, {}).items():
            gradient = gradient.clone()
            for gone, (keep, consumed) in along.items():
                if not consumed:
                    gradient.select(dim, keep).add_(gradient.select(dim, gone))
            left = [i for i in range(gradient.shape[dim]) if i not in along]
            gradient = gradient.index_select(dim, torch.tensor(left))
        return gradient

    return mapped


@job(0.7)
def nothing(c: Context) -> None:
    """An empty plan: what tracing alone makes of the model."""
    c.stage = "compile"
    compiled = c.compile(c.model, gz.Plan([]))
    c.stage = "untouched"
    c.same(c.model, compiled, "untouched, ")
    remake = lambda cast: c.compile(cast(c.model), gz.Plan([]))  # noqa: E731
    lossless(c, c.model, compiled, lambda name, gradient: gradient, remake)


@job(0.7)
def merge_again(c: Context) -> None:
    """What was merged is a model like any other."""
    model, _, clusters = _planted(c)
    c.stage = "compile"
    first = c.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]))
    c.stage = "compile again"
    again = gz.compile(first.module, gz.Plan([gz.ClusterMerge(keep=1.0), gz.FoldBatchNorm()]), c.inputs, **c.options)
    c.stage = "merged again"
    c.same(model, again, "merged again, ")


@job(0.5)
def inside(c: Context) -> None:
    """Only a submodule is compiled."""
    model, _, clusters = _planted(c)
    outer = _Outer(model)
    clusters = {f"inner.{name}": parts for name, parts in clusters.items()}
    c.stage = "compile inside"
    options = {} if c.dynamic is None else c.options
    compiled = gz.compile(outer, gz.Plan([gz.ClusterMerge(clusters=clusters)]), c.inputs, scope="inner", **options)
    c.stage = "inside"
    c.same(outer, compiled, "inside, ")


class _Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, *inputs: Tensor) -> Any:
        found = self.inner(*[x * 0.5 if x.is_floating_point() else x for x in inputs])
        return found, 1


# --- lossy plans -------------------------------------------------------------------------------------------------


def _names(c: Context, groups: gz.ChannelGroups) -> list[Any]:
    found = [group for group in groups if group.mergeable]
    if not found:
        raise NotApplicable("nothing can shrink")
    return found


def random_merge(c: Context, groups: gz.ChannelGroups) -> gz.ClusterMerge:
    """`ClusterMerge` with random options."""
    r = c.rng
    found = _names(c, groups)
    options: dict[str, Any] = {"keep": r.choice((0.3, 0.5, 0.5, 0.75, 1.0, {"*": 0.5}, {r.choice(found).name: 0.5}))}
    options["clustering"] = r.choice(("kmeans", "kmeans", "even", "imbalanced", "reconstruction"))
    if options["clustering"] == "kmeans":
        options["features"] = r.choice(("weights", "weights", "activations", "both"))
    if r.random() < 0.2:
        options["round_to"] = r.choice((2, 3, 4))
    if r.random() < 0.2 and len(found) > 1:
        options["exclude"] = [r.choice(found).name]
    options["norms"] = r.choice(("exact", "exact", "exact", "plain"))
    options["compensate"] = r.choice(("none", "none", "free", "data"))
    if r.random() < 0.2:
        options["strength"] = r.choice(("auto", 0.1, 3e-3))
    return gz.ClusterMerge(**options)


def data(c: Context, count: int = 2) -> list[tuple[Tensor, ...]]:
    """Calibration data, mostly of the example's batch size, which some models fix."""
    size = 4 if c.seed % 4 else 6
    return [c.make(size, 10 + number) for number in range(count)]


@job(2)
def lossy(c: Context) -> None:
    """After `collapse_` a prepared model computes what its conversion does."""
    groups = c.groups(c.model)
    options = random_merge(c, groups)
    c.stage = "prepare"
    prepared = gz.prepare(c.model, gz.Plan([options]), c.inputs, calibration=data(c), seed=c.seed, **c.options)
    if c.rng.random() < 0.4 and options.strength != "auto":
        c.stage = "step"
        _step(c, prepared)
    c.stage = "collapse"
    prepared.collapse_()
    still = copy.deepcopy(prepared.model).eval()
    c.stage = "convert"
    compiled = prepared.convert()
    compiled.module.eval()
    c.stage = "converted"
    if not c.program.random and not drops(compiled):
        c.same(still, compiled, "collapsed, ", tolerance=1e-7)
    consistent(c, compiled, gz.Plan([options]))


def drops(compiled: gz.Compiled) -> bool:
    """Whether a pass left anything out; outputs that moved because unequal channels became one do not count."""
    return any(not loss.startswith("outputs moved") for loss in compiled.report.losses)


def _step(c: Context, prepared: gz.Prepared) -> None:
    if not _differentiable(c):
        return
    optimizer = prepared.optimizer(torch.optim.SGD, lr=1e-3)
    found = run(prepared, c.inputs, grad=True)
    used = [leaf for leaf in leaves(found) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if used:
        (sum(leaf.double().square().mean() for leaf in used) + prepared.regularizer()).backward()
        optimizer.step()


def _differentiable(c: Context) -> bool:
    """Whether the model itself can be trained: its own gradient may need what it writes over, or be infinite."""
    model = copy.deepcopy(c.model)
    found = run(model, c.inputs, grad=True)
    used = [leaf for leaf in leaves(found) if isinstance(leaf, Tensor) and leaf.requires_grad]
    try:
        sum(leaf.double().square().mean() for leaf in used).backward() if used else None  # type: ignore[union-attr]
    except RuntimeError:
        return False
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def consistent(c: Context, compiled: gz.Compiled, plan: gz.Plan | None = None) -> None:
    """What must hold of any result: it runs where the original does, with outputs of the same form, and is the same
    when loaded and as a file.
    """
    c.stage = "run"
    _same_form(c, c.model, compiled, c.places())
    if c.onnx and plan is not None:
        exports(c, None, lambda cast: c.compile(cast(c.model), plan, calibration=data(c), seed=c.seed))
    elif c.rng.random() < 0.5:
        c.comes_back(compiled)


def _same_form(c: Context, original: nn.Module, compiled: gz.Compiled, places: Any) -> None:
    for number, (batch, grown) in enumerate(places):
        inputs = c.make(batch, 0, grown)
        try:
            expected = run(original, inputs)
        except Exception:
            continue
        try:
            found = run(compiled.module, inputs)
        except gz.InputShapeError as error:
            if number and c.told(compiled):
                continue
            raise Problem("unannounced", f"batch {batch} is refused without a note: {error}") from error
        shapes = [
            [(tuple(leaf.shape), leaf.dtype) for leaf in leaves(tree) if isinstance(leaf, Tensor)]
            for tree in (expected, found)
        ]
        if shapes[0] != shapes[1] and not _sized_by_data(c):
            raise Problem("shape", f"at batch {batch} outputs are {shapes[1]}, not {shapes[0]}")


def _sized_by_data(c: Context) -> bool:
    return "sized_by_data" in c.program.rules


@job(1.5)
def prune(c: Context) -> None:
    """Channels that nothing reads, or that are zero, are dropped without a change."""
    if re.search(r" (==|!=|<=?|>=?) |\.(ne|eq|gt|ge|lt|le)\(", c.program.source()):
        raise NotApplicable("comparisons are constant almost everywhere: that a channel has no influence does not show")
    if "expand" in c.program.source():
        raise NotApplicable("a number that is spread over the channels tells how many there are")
    groups = c.groups(c.model)
    c.stage = "plant zeros"
    model, gone = _plant_zeros(c, groups)
    named = sorted(gone, key=lambda name: "#" not in name)  # the first glob that matches wins, and `a` matches `a#2`
    keep = {name: groups[name].size - len(gone[name]) for name in named}
    plan = gz.Plan([gz.PruneChannels(keep=keep)])
    c.stage = "compile"
    compiled = c.compile(model, plan)
    dropped = compiled.report.passes[0]["prune_channels"].get("dropped", {})
    if {name: sorted(channels) for name, channels in dropped.items()} != {n: sorted(g) for n, g in gone.items()}:
        raise NotApplicable("other channels are smaller")
    c.merged = sum(map(len, gone.values()))
    c.stage = "pruned"
    c.same(model, compiled, "pruned, ")
    if not c.program.random:
        same_gradients(model, compiled.module, c.inputs, None, "pruned, ")
        consistent(c, compiled)


def _plant_zeros(c: Context, groups: gz.ChannelGroups) -> tuple[nn.Module, dict[str, list[int]]]:
    """A copy in which some channels have small kernels and no influence, whatever their values are."""
    taken: set[tuple[str, int, int]] = set()
    gone: dict[str, list[int]] = {}
    model = c.model
    for group in _names(c, groups):
        slices = [s for channel in range(group.size) for s in group.slices(channel)]
        owned = {(s.param, s.dim, s.index) for s in slices}
        roles = {s.role for s in slices}
        if (
            owned & taken
            or group.size < 2 * len(group.blocks)
            or not {"producer", "consumer"} <= roles
            or not group.exact
        ):
            continue
        share = c.rng.randrange(1, min(len(block) for block in group.blocks))
        channels = sorted(channel for block in group.blocks for channel in c.rng.sample(list(block), share))
        trial = _silenced(model, group, channels, 1e-3)
        expected = run(trial, c.inputs)
        others = (
            _silenced(model, group, channels, scale) for scale in (3.0, 0.0)
        )  # a comparison with zero may see them
        if any(apart(expected, run(other, c.inputs)) > 1e-12 for other in others):
            continue
        taken |= owned
        gone[group.name] = channels
        model = trial
    if not gone:
        raise NotApplicable("no group has channels without influence")
    return copy.deepcopy(model), gone


def _silenced(model: nn.Module, group: Any, channels: Sequence[int], scale: float) -> nn.Module:
    """The channels' kernels times a scale (and turned), what reads them zero."""
    model = copy.deepcopy(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for channel in channels:
            for place in group.slices(channel):
                target = state[place.param].select(place.dim, place.index)
                if place.role == "consumer":
                    target.zero_()
                elif not place.param.endswith("running_var"):
                    target.mul_(scale)
                    if scale > 1:
                        target.add_(0.3)
    return model


@job(1)
def several(c: Context) -> None:
    """Several lossy passes in a row; the result agrees with itself."""
    groups = c.groups(c.model)
    passes: list[Any] = []
    for _ in range(c.rng.randrange(1, 4)):
        kind = c.rng.choice(("merge", "prune", "fold", "merge"))
        if kind == "merge":
            passes.append(
                random_merge(c, groups).model_copy(update={"keep": c.rng.choice((0.5, 0.7, 1.0)), "exclude": ()})
            )
        elif kind == "prune":
            passes.append(gz.PruneChannels(keep=c.rng.choice((0.5, 0.8)), strength=c.rng.choice((0.0, 0.1))))
        else:
            passes.append(gz.FoldBatchNorm())
    c.stage = "compile"
    compiled = c.compile(c.model, gz.Plan(passes), calibration=data(c), seed=c.seed)
    if c.rng.random() < 0.5:
        c.stage = "steps"
        prepared = gz.prepare(c.model, gz.Plan(passes), c.inputs, calibration=data(c), seed=c.seed, **c.options)
        for _ in prepared.steps():
            pass
        again = prepared.convert()
        if not c.program.random and not apart(run(compiled.module, c.inputs), run(again.module, c.inputs)) <= 1e-12:
            raise Problem("wrong", "compile and prepare, steps, convert give different models")
    consistent(c, compiled, gz.Plan(passes))
