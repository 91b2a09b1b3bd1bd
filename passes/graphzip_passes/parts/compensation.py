"""Re-fit layers by least squares, so that those of a slimmer model give what the original's give.

Layer after layer, in the order in which they run: a layer reads the rows `X` in the slim model and gives `P` where the
original gives `T` for the same channels. The change of its weight is the damped least-squares solution

    dW = (X^T X + lambda I)^-1 X^T (T - P) / s,

with a column of ones in `X` where the layer has a bias, or a batch norm behind it whose running mean can take one in;
`s` is the scale of that batch norm. `X` is what the layers before give, fitted already, so errors do not pile up; where
a layer is the last term of a residual sum, `T` and `P` are the sums. Where a ReLU follows, values that are negative on
both sides are right as they are: `T` is replaced by `min(P, 0)` where it is negative, and the fit is repeated. So it is
with every activation that is constant below or above a value (`ReLU6`, `Hardtanh`, `Hardswish`, `clamp`).

Queries and keys of attention are fitted to what serves their scores best (`score_pairs`), where that is asked for.

A batch norm that has no fitted layer of its own before it gets the statistics of what it reads now. Where nothing
moved, `T - P` is zero and nothing changes.

Sources: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017), section 3.1; Zhang et al.,
"Accelerating Very Deep Convolutional Networks" (TPAMI 2016), section 3.2, for the ReLU; Jordan et al., "REPAIR" (ICLR
2023) for the statistics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from graphzip.analysis.layers import Layer, has_statistics, left_alone, norm_behind, only_reader, own_layers
from graphzip.graph.interpreter import Values
from graphzip.graph.layers.factored import kernel_nodes
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.solvers import Fit, RowParts, centred, check_finite
from graphzip.progress import told
from graphzip.rewrite.layout import Layout
from graphzip_passes.parts.score_pairs import ScorePair, score_pairs, turned

__all__ = ["Effort", "Kernels", "Narrowed", "Refit", "refit", "sampled_rows"]

logger = logging.getLogger(__name__)

aten = torch.ops.aten

_FLAT = {
    aten.relu.default: (0.0, math.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardswish.default: (-3.0, math.inf),
    aten.hardsigmoid.default: (-3.0, 3.0),
}
_BETWEEN = {
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min", ""),
    aten.clamp_max.default: ("", "max"),
}
"""The names of the arguments between which an operator is not constant."""
_NUMBERS = 1 << 27  # in the rows that one layer is fitted on, at most
_LARGE = 1e3  # times the weight itself: a change above that may be a fit to the rounding of a constant
_ROUNDING = 16.0  # steps to the next number


@dataclass(frozen=True)
class Narrowed:
    """A slimmer model, and which channels are left: those of `means` stand for the mean of their cluster.

    With `turns` it does not matter which channels of queries and keys are left: their basis is changed.
    """

    traced: Traced
    layout: Layout
    means: Layout
    turns: bool = False


class Kernels(Protocol):
    """Kernels that are computed from other tensors, such as factors."""

    def layers(self, traced: Traced) -> dict[fx.Node, Layer]:
        """The layers whose kernels these are, by their calls."""
        ...

    def bring(self, call: str, wanted: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor) -> None:
        """Bring the kernel of a call as near to `wanted` (G, I * K, O) as it goes: change what it is computed from.

        What a row of the output is off by is measured by `moments` (G, I * K, I * K) and multiplied by `scale`
        (G, 1, O).
        """
        ...


@dataclass(frozen=True)
class Refit:
    """The names of the weights that were fitted, and for those that could not be the reason."""

    fitted: tuple[str, ...]
    left: Mapping[str, str]


@dataclass(frozen=True)
class _Target:
    """Where the slim model is compared with the original: behind `norm` and `sum`, where the layer has these.

    What follows gives the same for all values below the first and for all above the second number of `flat`.
    """

    layer: Layer
    norm: fx.Node | None
    sum: fx.Node | None
    flat: tuple[float, float] | None

    @property
    def node(self) -> fx.Node:
        return self.sum or self.layer.node

    @property
    def other(self) -> fx.Node:
        """The other term of the sum."""
        assert self.sum is not None
        mine = self.norm or self.layer.node
        return next(each for each in self.sum.all_input_nodes if each is not mine)


@dataclass(frozen=True)
class Effort:
    """How many rows a layer is fitted on, and how often the fit is repeated behind a ReLU."""

    rows: int = 1 << 16
    rounds: int = 3


def refit(
    old: Values,
    new: Values,
    found: Narrowed,
    *,
    only: Collection[str] | None = None,
    effort: Effort | None = None,
    kernels: Kernels | None = None,
) -> Refit:
    """Fit the layers of the graph of `new`, in place, to what `old` gives; both run as far as they have to.

    `found` says what is left of the original. With `only`, the layers whose weights have these names in the original
    are fitted and nothing else. Layers whose kernels are computed are fitted as far as `kernels` can.
    """
    return _Walk(old, new, found, only, effort or Effort(), kernels).run()


class _Walk:
    def __init__(
        self,
        old: Values,
        new: Values,
        found: Narrowed,
        only: Collection[str] | None,
        effort: Effort,
        kernels: Kernels | None,
    ) -> None:
        self.old, self.new, self.effort, self.kernels = old, new, effort, kernels
        self.processes = new.shared.processes
        self.layout, self.means = found.layout, found.means
        twins = {node.name: node for node in self.old.nodes}
        layers, before = own_layers(new.traced), own_layers(old.traced)
        layers |= {} if kernels is None else kernels.layers(new.traced)
        self.targets: dict[fx.Node, _Target] = {}
        self.norms: set[fx.Node] = set()
        self.estimated: set[fx.Node] = set()
        self.twin: dict[fx.Node, fx.Node] = {}
        for node in self.new.nodes:
            twin = twins.get(node.name)
            if twin is None or (only is not None and (twin not in before or before[twin].name not in only)):
                continue
            if node in layers:
                target = self.targets[node] = _target_of(layers[node], self.new.place)
                self.twin[target.node] = twins[target.node.name]
                self.old.hold(self.twin[target.node])
                self.norms |= {target.norm} if target.norm is not None else set()
            elif has_statistics(node) and node not in self.norms:
                self.estimated.add(node)
                self.twin[node] = arguments_of(twins[node.name])["input"]
                self.old.hold(self.twin[node])
        self.fitted: list[str] = []
        self.turns = _Turns(old, self.layout, [*self.targets], self.twin) if found.turns else None

    @torch.no_grad()
    def run(self) -> Refit:
        last = max((self.new.place[node] for node in (*self.targets, *self.estimated)), default=-1)
        done = 0
        for node in self.new.steps(last, {*self.targets, *self.estimated}):
            if node in self.targets:
                told(done, len(self.targets), f"fitting {self.targets[node].layer.name}")
                done += 1
                self._fit(self.targets[node])
            else:
                self._estimate(node)
            self.new.run(node)
        left = left_alone(self.new.traced)
        for name, reason in left.items():
            logger.info("%s is not fitted: it %s", name, reason)
        return Refit(tuple(self.fitted), left)

    def _original(self, node: fx.Node) -> list[torch.Tensor]:
        """What the original has there, with all its channels."""
        twin = self.twin[node]
        self.old.up_to(twin)
        values = self.old[twin]
        self.old.release(twin)
        return values

    def _left(self, node: fx.Node, dim: int, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of values (.., channels, ..) of the original's twin, whose channels lie along `dim`: those that are left.

        The channels of `values` are their second dimension.
        """
        twin = self.twin[node]
        kept = torch.from_numpy(self.layout.kept(twin, dim))
        if kept.numel() == values[0].shape[1]:
            return values
        if not self.means.unchanged:
            values = [_cluster_means(value, self.means.heirs_along(twin, dim), 1) for value in values]
        return [value.index_select(1, kept.to(value.device)) for value in values]

    def _fit(self, target: _Target) -> None:
        layer, new = target.layer, self.new
        if self.turns is not None and layer.node in self.turns.pairs:
            self._begin_turned(layer, self.turns)
        rows = sampled_rows(layer, new, self.effort.rows)
        wanted, given = self._rows(target, rows)
        if self._are_equal(wanted, given):
            return
        x = layer.read(new[layer.input], rows)
        t, p = (layer.parted(torch.cat(each)) for each in (wanted, given))
        check_finite(layer.name, x, t, p)
        intercept = layer.bias is not None or target.norm is not None
        scale = torch.ones(1, dtype=t.dtype, device=t.device) if target.norm is None else self._scale(target.norm)
        scale = scale.expand(layer.shape[0]).reshape(layer.groups, 1, -1)
        rounds = self.effort.rounds if target.flat else 0
        weight = self._rows_of(layer)
        lie = RowParts([len(chosen) for chosen in rows], self.processes)
        fit = _solved(layer.name, x, t, p, weight, scale, intercept=intercept, rounds=rounds, flat=target.flat, lie=lie)
        if layer.weight.op != "get_attr":
            self._bring(layer, fit, weight, scale)
        change = torch.cat([fit.weights, fit.offset], 1) if intercept else fit.weights
        self._apply(target, self.processes.agreed(change), intercept=intercept)
        self.fitted.append(layer.name)

    def _bring(self, layer: Layer, fit: Fit, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Let a computed kernel follow, and the fit hold what it came to: the intercept makes up for the mean."""
        assert self.kernels is not None
        lower = fit.factor.lower
        self.kernels.bring(layer.node.name, weight.double() + fit.weights, lower @ lower.mT, scale)
        built = kernel_nodes(layer.node)[::-1]
        for node in built:
            self.new.hold(node)
            self.new.run(node)
        for node in built:
            self.new.release(node)
        fit.weights = self._rows_of(layer).double() - weight.double()

    def _rows_of(self, layer: Layer) -> torch.Tensor:
        """The weight as it multiplies rows, (G, I * K, O)."""
        weight = layer.plain(self.new[layer.weight][0])
        return weight.reshape(layer.groups, layer.shape[0] // layer.groups, -1).transpose(1, 2)

    def _are_equal(self, wanted: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
        """Whether nothing moved, in any process."""
        return self.processes.every(all(torch.equal(one, other) for one, other in zip(wanted, given, strict=True)))

    def _rows(self, target: _Target, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the original gives and what the slim model gives in those rows of every batch, (R, G * O)."""
        layer, norm, new = target.layer, target.norm, self.new

        def picked(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [layer.picked(value, chosen) for value, chosen in zip(values, rows, strict=True)]

        original = self._original(target.node)
        if self.turns is not None and layer.node in self.turns.pairs:
            turn = self.turns.matrix(layer.node)
            return [each @ turn.to(each) for each in picked(original)], picked(new[layer.node])
        wanted = self._left(target.node, layer.dim % original[0].dim(), picked(original))
        given = picked(new[layer.node])
        if norm is not None:
            given = new.computed(norm, {layer.node: given})
            if target.sum is None:
                wanted = new.computed(norm, {layer.node: wanted})
        if target.sum is not None:
            given = [one + other for one, other in zip(given, picked(new[target.other]), strict=True)]
        return wanted, given

    def _begin_turned(self, layer: Layer, turns: _Turns) -> None:
        """Let a layer of queries or keys give what is wanted of what the original's reads."""
        turn, (pair, side) = turns.matrix(layer.node), turns.pairs[layer.node]
        twin = pair.layers[side]
        for mine, its in ((layer.weight, twin.weight), (layer.bias, twin.bias)):
            if mine is not None and its is not None:
                tensor = get_tensor(self.old.traced.module, str(its.target)).detach().double()
                self.new.set_tensor(mine, turn.to(tensor).mT @ tensor)
        self.new.run(layer.node)

    def _scale(self, norm: fx.Node) -> torch.Tensor:
        args = arguments_of(norm)
        scale = torch.rsqrt(self.new[args["running_var"]][0] + args["eps"])
        return scale if args["weight"] is None else scale * self.new[args["weight"]][0]

    def _apply(self, target: _Target, change: torch.Tensor, *, intercept: bool) -> None:
        """Add a change (G, I * K [+ 1], O) to the weight, and to the bias or the running mean."""
        layer, new = target.layer, self.new
        if layer.weight.op == "get_attr":
            moved = change[:, : change.shape[1] - intercept].transpose(1, 2).reshape(layer.shape)
            new.set_tensor(layer.weight, new[layer.weight][0] + layer.plain(moved))
        if intercept and layer.bias is not None:
            new.set_tensor(layer.bias, new[layer.bias][0] + change[:, -1].reshape(-1))
        elif intercept:
            assert target.norm is not None
            mean = arguments_of(target.norm)["running_mean"]
            new.set_tensor(mean, new[mean][0] - change[:, -1].reshape(-1))

    def _estimate(self, norm: fx.Node) -> None:
        """Give a batch norm the statistics that stand to its inputs as the original's stand to the original's."""
        args = arguments_of(norm)
        wanted, given = self._left(norm, 1, self._original(norm)), self.new[args["input"]]
        if self._are_equal(wanted, given):
            return
        (mean, var), (new_mean, new_var) = (self._statistics(values) for values in (wanted, given))
        ratio = torch.where(var > 0, new_var / var, 1.0)
        running_mean, running_var = (self.new[args[key]][0] for key in ("running_mean", "running_var"))
        self.new.set_tensor(args["running_mean"], new_mean - ratio.sqrt() * (mean - running_mean))
        self.new.set_tensor(args["running_var"], running_var * ratio)

    def _statistics(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance per channel, in float64."""
        rows = [value.movedim(1, -1).flatten(0, -2)[None] for value in values]
        lie = RowParts([each.shape[1] for each in rows[: len(self.new.shared.here)]] or [0], self.processes)
        counted = torch.cat(self.new.shared.counted(rows) or [rows[0][:, :0]], 1).double()
        mean = centred(counted, lie)[0, 0]
        return mean, lie.sum(lambda each: each.square().sum(1), counted)[0] / max(lie.count(), 1)


class _Turns:
    """What the layers of queries and keys are fitted to, by their calls in the slim model."""

    def __init__(
        self, old: Values, layout: Layout, targets: Sequence[fx.Node], twins: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.old, self.layout = old, layout
        nodes = {twins[node]: node for node in targets if node in twins}
        self.pairs: dict[fx.Node, tuple[ScorePair, int]] = {}
        self._known: dict[ScorePair, tuple[torch.Tensor, torch.Tensor]] = {}
        for pair in score_pairs(old.traced, layout.analysis):
            both = [layer.node for layer in pair.layers]
            if not pair.narrows(layout) or not all(each in nodes for each in both):
                continue
            for side, each in enumerate(both):
                self.pairs[nodes[each]] = pair, side
                old.hold(each)

    def matrix(self, node: fx.Node) -> torch.Tensor:
        """(outputs of the original, outputs of the slim layer)."""
        pair, side = self.pairs[node]
        if pair not in self._known:
            for layer in pair.layers:
                self.old.up_to(layer.node)
            here = self.old.shared.counted
            values = here(self.old[pair.query.node]), here(self.old[pair.key.node])
            self._known[pair] = turned(pair, self.layout, values, self.old.shared.processes)
            for layer in pair.layers:
                self.old.release(layer.node)
        return self._known[pair][side]


def _target_of(layer: Layer, place: Mapping[fx.Node, int]) -> _Target:
    """Follow the layer's output through its batch norm into a residual sum whose other term is known by then."""
    norm, total = norm_behind(layer.node), None
    last = norm or layer.node
    following = only_reader(last)
    if following is not None and following.target is aten.add.Tensor and arguments_of(following)["alpha"] == 1:
        others = [each for each in following.all_input_nodes if each is not last]
        if len(others) == 1 and place[others[0]] < place[layer.node] and _alike(others[0], last):
            total = last = following
            following = only_reader(last)
    return _Target(layer, norm, total, None if following is None else _flat(following))


def _flat(node: fx.Node) -> tuple[float, float] | None:
    """The value up to which and the value from which an activation is constant; None where it is so nowhere."""
    if node.target in _FLAT:
        return _FLAT[node.target]
    if node.target not in _BETWEEN:
        return None
    low, high = (arguments_of(node).get(name) for name in _BETWEEN[node.target])
    numbers = all(each is None or isinstance(each, (int, float)) for each in (low, high))
    return (-math.inf if low is None else low, math.inf if high is None else high) if numbers else None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    left, right = one.meta.get("val"), other.meta.get("val")
    return isinstance(left, torch.Tensor) and left.shape == right.shape  # type: ignore[union-attr]


def _cluster_means(value: torch.Tensor, heirs: IntArray, dim: int) -> torch.Tensor:
    place = torch.from_numpy(heirs).to(value.device)
    counts = torch.bincount(place, minlength=len(heirs)).clamp(min=1).to(value.dtype)
    total = torch.zeros_like(value).index_add(dim, place, value)
    return total / counts.reshape([-1 if each == dim else 1 for each in range(value.dim())])


def sampled_rows(layer: Layer, values: Values, most: int) -> list[torch.Tensor]:
    """The numbers of the rows that a layer is looked at on, per batch: all, or an even random share of `most`.

    Of batches that are divided among processes those that one process with all of them would take.
    """
    outputs = values[layer.node]
    every = list(values.shared.sizes([layer.places(output) for output in outputs]))
    total = sum(places for places, _ in every)
    limit = min(most, max(_NUMBERS // (layer.groups * torch.Size(layer.shape[1:]).numel()), 1))
    generator = torch.Generator().manual_seed(0)
    found = [torch.arange(0) for _ in outputs]
    for places, here in every:
        chosen = torch.randperm(places, generator=generator)[: -(-places * limit // total)] if total > limit else None
        if here is not None:
            found[here] = torch.arange(places) if chosen is None else chosen.sort().values
    return [chosen.to(output.device) for chosen, output in zip(found, outputs, strict=True)]


def _solved(
    layer: str,
    x: torch.Tensor,
    t: torch.Tensor,
    p: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    intercept: bool,
    rounds: int,
    flat: tuple[float, float] | None = None,
    lie: RowParts | None = None,
) -> Fit:
    """The fit of the change, for rows read (G, R, I * K) and wanted and given ones (G, R, O).

    `weight` (G, I * K, O) is that of now. The rows read are changed. Those of a layer that reads a constant, as behind
    a pooling of a norm over one channel alone, are the rounding of it: then only the intercept is fitted.
    """
    x, t, p = (each if each.dtype == torch.float64 else each.float() for each in (x, t, p))
    fit = Fit(x, t.shape[2], intercept=intercept, what=f"layer {layer!r}", rows=lie)
    usable = scale.abs() > 1e-6 * scale.abs().max()
    for turn in range(1 + rounds):
        now = p + fit.given() * scale if turn else p
        goal = _as_good(t, now, *flat) if turn and flat else t
        fit.improve(torch.where(usable, (goal - now) / scale, 0.0))
        if _is_rounding(fit, weight, t):
            fit.weights.zero_()
    return fit


def _is_rounding(fit: Fit, weight: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a large change was fitted to rows that move the outputs by no more than the rounding of these, or makes
    the rounding of the rows' mean, which a norm in front may have magnified, a part of them.
    """
    if float(fit.weights.abs().max()) <= _LARGE * float(weight.abs().max()):
        return False
    eps, size = torch.finfo(fit.x.dtype).eps, fit.rows.sum(_squares, wanted)
    moved = fit.rows.sum(_squares, fit.x @ weight.to(fit.x.dtype))
    carried = (fit.mean.abs() @ fit.weights.abs()).max()
    mean = size / max(fit.count * wanted.shape[0] * wanted.shape[2], 1)
    return bool(moved <= (_ROUNDING * eps) ** 2 * size or eps * carried.square() > mean)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(dtype=torch.float64)


def _as_good(wanted: torch.Tensor, now: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """What is nearest to `now` of all that an activation which is constant below and above takes for `wanted`."""
    goal = torch.where(wanted > low, wanted, now.clamp(max=low))
    return goal if high == math.inf else torch.where(wanted < high, goal, now.clamp(min=high))
