"""Leave out whole residual branches: `y = x + f(x)` becomes `y = x`, or with calibration data `y = a x + b`.

With data the branches go that move the outputs least. One goes at a time: what is lost without a branch, beside those
that are gone already, is the mean square by which the outputs move, relative to their variance. All are measured at
first, then only the few that came out best before. What a sum gave is then fitted in the order in which the sums run,
channel by channel over all samples and places, from what is left to compute it from:

    a_c = cov(x_c, y_c) / var(x_c),    b_c = mean(y_c) - a_c mean(x_c),    x, y: (samples, C, places).

Without data those go whose last layer gives least: the root mean square of its scales (a batch norm) or of the rows of
its weight, with the bias, times the scales behind it. A branch that gives zero goes first, and without loss.

Source: Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", section 4.1
(single blocks of a trained network can be left out); Men et al., "ShortGPT", section 3 (blocks in the order of their
influence on calibration data).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from graphzip.analysis.channels import PRODUCER
from graphzip.analysis.groups import Analysed
from graphzip.analysis.layers import layer_of
from graphzip.analysis.residuals import Residual, residuals
from graphzip.errors import PlanError
from graphzip.graph.batches import leading
from graphzip.graph.interpreter import value_of
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import support
from graphzip.plan.passes import DropBlocks
from graphzip.progress import told
from graphzip.report.outcome import Outcome, Table
from graphzip.report.tables import closest
from graphzip.rewrite.bypass import Affine, Bypass, bypass
from graphzip_passes.base import Decision, PassContext, register_pass
from graphzip_passes.parts.widths import matches

__all__ = ["chosen_blocks", "drop_blocks"]

aten = torch.ops.aten

_MEASURED: Final = 128  # samples that outputs are compared on
_FITTED: Final = 512  # samples that scales and shifts are fitted on
_AGAIN: Final = 4  # branches that are measured again when one has gone

Batches = Sequence[tuple[Any, ...]]


@register_pass(DropBlocks, decides=True, only_reads=True)
def drop_blocks(traced: Traced, options: DropBlocks, context: PassContext) -> Decision:
    """See that there are such branches; which of them go is decided on the weights that the training leaves."""
    chosen_blocks(traced, options, context.where)
    return Decision(_Finish(options))


@dataclass(frozen=True)
class _Finish:
    """Carries it out."""

    options: DropBlocks

    @torch.no_grad()
    def __call__(self, traced: Traced, context: PassContext) -> Outcome:
        blocks = chosen_blocks(traced, self.options, context.where)
        count = len(blocks) - _kept(self.options, len(blocks), context.where)
        data = None if context.calibration is None or traced.tasks else context.calibration.graph_inputs()
        norms = {block.name: _norm(traced, block.branch) for block in blocks}
        if data is None:
            order = sorted(blocks, key=lambda block: norms[block.name])
            losses = norms
        else:
            order, losses = _by_loss(traced, blocks, count, leading(data, _MEASURED), norms)
            agreed = context.processes.agreed([block.name for block in order])
            order.sort(key=lambda block: agreed.index(block.name))
        gone = sorted(order[:count], key=lambda block: blocks.index(block))
        if not gone:
            return Outcome(traced, changed=False, details={"dropped": [], "kept": [each.name for each in blocks]})
        lossy = [block for block in gone if norms[block.name] > 0]
        fitted = [] if data is None else _fitted(traced, lossy, gone, leading(data, _FITTED))
        affine = {each.sum: each for each in fitted}
        result = bypass(traced, [affine.get(block.sum, Bypass(block.sum, block.skip)) for block in gone])
        names = {block.name for block in gone}
        what = "what its branch gives, from its weights" if data is None else "outputs moved without it"
        table = Table(
            ("residual block", what, "left"),
            tuple((each.name, _shown(losses.get(each.name)), str(each.name not in names).lower()) for each in blocks),
        )
        details = {
            "dropped": [block.name for block in gone],
            "kept": [block.name for block in blocks if block.name not in names],
            "fitted": [block.name for block in gone if block.sum in affine],
        }
        loss = "residual branches were left out"
        return Outcome(result, changed=True, lossless=not lossy, loss=loss, tables=(table,), details=details)


def chosen_blocks(traced: Traced, options: DropBlocks, where: str) -> list[Residual]:
    """The branches that may go. Raises `PlanError` where there are none, or a glob matches none."""
    if traced.forms is not None:
        raise PlanError(
            f"{where}: the graph has a training form beside the eval form, and a branch would go from one of them; "
            "compile with mode='eval'"
        )
    found = residuals(traced)
    if not found:
        raise PlanError(
            f"{where}: the model has no residual branches (sums x + f(x) in which f has weights and x its shape); take "
            "the pass out"
        )
    names = [block.name for block in found]
    for number, glob in enumerate(options.blocks):
        if not any(matches(glob, name) for name in names):
            raise PlanError(f"{where}.blocks[{number}]: {glob!r} matches no residual block; {closest(glob, names)}")
    chosen = [b for b in found if not options.blocks or any(matches(glob, b.name) for glob in options.blocks)]
    _kept(options, len(chosen), where)
    return chosen


def _kept(options: DropBlocks, count: int, where: str) -> int:
    """How many of them stay."""
    if isinstance(options.keep, float):
        return math.floor(count * Fraction(repr(options.keep)))  # the decimal that was written
    if options.keep > count:
        raise PlanError(f"{where}.keep: {options.keep} blocks cannot be kept of {count}; write a number up to {count}")
    return options.keep


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3g}"


# ------------------------------------------------------------------------------------------------- without data


def _norm(traced: Traced, node: fx.Node) -> float:
    """The size of what a branch gives, told by its last layer and the scales behind it; zero only if it gives zero."""
    factor = 1.0
    while True:
        args = arguments_of(node) if hasattr(node.target, "_schema") else {}
        layer = layer_of(node)
        if layer is not None:
            rows = [_values(traced, each) for each in (layer.weight, layer.bias) if each is not None]
            squares = [rows[0].flatten(1).square().sum() / layer.shape[0], *(each.square().mean() for each in rows[1:])]
            return factor * math.sqrt(sum(map(float, squares)))
        if node.target in _NORMS and isinstance(args["weight"], fx.Node):
            own = [_values(traced, args[name]) for name in ("weight", "bias") if args.get(name) is not None]
            return factor * math.sqrt(sum(float(each.square().mean()) for each in own))
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        scales = [each for each in node.all_input_nodes if each.op == "get_attr"]
        if node.target is aten.mul.Tensor and len(sources) == len(scales) == 1:
            factor *= math.sqrt(float(_values(traced, scales[0]).square().mean()))
        elif len(sources) != 1 or node.target not in _PASSED:
            return factor
        node = sources[0]


_NORMS: Final = {
    aten.batch_norm.default,
    aten.instance_norm.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
}
_PASSED: Final = {
    aten.dropout.default,
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.clone.default,
}
"""What keeps the size of its input."""


def _values(traced: Traced, node: fx.Node) -> torch.Tensor:
    if node.op != "get_attr":
        return torch.ones(1, 1, dtype=torch.float64)
    return get_tensor(traced.module, str(node.target)).detach().double()


# ------------------------------------------------------------------------------------------------- with data


def _by_loss(
    traced: Traced, blocks: Sequence[Residual], count: int, batches: Batches, norms: Mapping[str, float]
) -> tuple[list[Residual], dict[str, float]]:
    """The blocks in the order in which they go, and what was lost without each when it was measured last."""
    (end,) = traced.graph.find_nodes(op="output")
    wanted = [each for each in end.all_input_nodes if _is_fractional(each)]
    plain = [torch.cat(values) for values in _run(traced, batches, wanted, {})]
    gone: dict[fx.Node, Bypass] = {}
    order: list[Residual] = []
    losses: dict[str, float] = {}

    def measure(block: Residual) -> None:
        if norms[block.name] == 0.0:
            losses[block.name] = 0.0
            return
        values = _run(traced, batches, wanted, gone | {block.sum: Bypass(block.sum, block.skip)})
        losses[block.name] = max(_apart(old, torch.cat(new)) for old, new in zip(plain, values, strict=True))

    left = list(blocks)
    again = left
    while left and len(order) < max(count, 1):
        told(len(order), max(count, 1), "looking for the block that is missed least")
        for block in again:
            measure(block)
        left.sort(key=lambda block: losses[block.name])
        taken = left.pop(0)
        order.append(taken)
        gone[taken.sum] = Bypass(taken.sum, taken.skip)
        again = left[:_AGAIN]
    return order, losses


def _apart(old: torch.Tensor, new: torch.Tensor) -> float:
    """The mean square of a difference, relative to the variance; infinite where it is no number."""
    wanted, found = old.double(), new.double()
    spread = wanted.var(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
    apart = float((wanted - found).square().mean() / spread)
    return apart if math.isfinite(apart) else math.inf


def _fitted(traced: Traced, lossy: Sequence[Residual], gone: Sequence[Residual], batches: Batches) -> list[Bypass]:
    """Scale and shift of every sum whose channels are known, in the order in which the sums run."""
    known = Analysed.of(traced).analysis
    classes = known.fine.classes
    made = np.unique(classes[(known.roles & PRODUCER) > 0])  # channels that some layer makes
    found: dict[fx.Node, Bypass] = {block.sum: Bypass(block.sum, block.skip) for block in gone}
    fits = []
    for block in lossy:
        axes = [
            each for each in known.propagation.axes.get(block.sum, ()) if np.isin(classes[each.ravel()], made).any()
        ]
        dims = {support(each)[0] for each in axes if len(support(each)) == 1}
        if len(dims) != 1:
            continue
        dim = dims.pop()
        before = {node: each for node, each in found.items() if node is not block.sum}
        rows = partial(_rows, dim=dim)
        old = _run(traced, batches, [block.sum], {}, rows)[0]
        new = _run(traced, batches, [block.skip], before, rows)[0]
        affine = _least_squares(new, old, len(block.sum.meta["val"].shape) - 1 - dim)
        found[block.sum] = Bypass(block.sum, block.skip, affine)
        fits.append(found[block.sum])
    return fits


def _rows(value: torch.Tensor, dim: int) -> torch.Tensor:
    return value.movedim(dim, -1).flatten(0, -2)


def _least_squares(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], behind: int) -> Affine:
    """The scale and the shift of every channel, (C, 1, ...) with as many ones as dimensions stand `behind` it."""
    sums = torch.zeros(5, inputs[0].shape[1], dtype=torch.float64, device=inputs[0].device)
    for given, wanted in zip(inputs, outputs, strict=True):
        x, y = given.double(), wanted.double()
        sums += torch.stack([each.sum(0) for each in (torch.ones_like(x), x, y, x * x, x * y)])
    count, x, y, xx, xy = sums
    mean, target = x / count, y / count
    variance = xx / count - mean**2
    noise = 1e-8 * xx / count
    scale = torch.where(variance > noise, (xy / count - mean * target) / variance.clamp(min=1e-300), 1.0)
    shape = (-1, *(1,) * behind)
    return Affine(scale.reshape(shape), (target - scale * mean).reshape(shape))


def _run(
    traced: Traced,
    batches: Batches,
    wanted: Sequence[fx.Node],
    instead: Mapping[fx.Node, Bypass],
    each: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> list[list[torch.Tensor]]:
    """What nodes give on every batch where some sums are bypassed: only what that takes is computed."""
    reads = {node: [instead[node].skip] if node in instead else node.all_input_nodes for node in traced.graph.nodes}
    needed, waiting = set(wanted), list(wanted)
    while waiting:
        for source in reads[waiting.pop()]:
            if source not in needed:
                needed.add(source)
                waiting.append(source)
    order = [node for node in traced.graph.nodes if node in needed]
    last = {source: node for node in order for source in reads[node] if source not in wanted}
    inputs = traced.graph.find_nodes(op="placeholder")
    found: list[list[torch.Tensor]] = [[] for _ in wanted]
    for batch in batches:
        values: dict[fx.Node, Any] = dict(zip(inputs, batch, strict=True))
        for node in order:
            if node in instead:
                affine, value = instead[node].affine, values[instead[node].skip]
                values[node] = value if affine is None else affine(value)
            elif node.op != "placeholder":
                values[node] = value_of(traced.module, node, values)
            for source in reads[node]:
                if last.get(source) is node:
                    values.pop(source, None)
        for held, node in zip(found, wanted, strict=True):
            held.append(each(values[node]))
    return found


def _is_fractional(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
