"""Store layers as products of thinner ones: two or three plain layers in place of one (`factors`).

A layer is cut where that costs fewer multiply-accumulates, and stays as it is elsewhere. With calibration data the last
of the thin layers is re-fitted to what the original gave (`graphzip_passes.parts.compensation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from graphzip.analysis.groups import Analysed
from graphzip.analysis.layers import Layer, own_layers
from graphzip.errors import PlanError
from graphzip.graph.batches import Given, shared
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.interpreter import Values
from graphzip.graph.operators import arguments_of, set_argument
from graphzip.graph.state import attach, get_tensor, joined, like
from graphzip.graph.traced import Traced
from graphzip.numeric.im2col import per_dimension
from graphzip.numeric.moments import mean_products
from graphzip.numeric.solvers import check_finite, checked
from graphzip.plan.passes import LowRank
from graphzip.plan.problems import plan_error
from graphzip.progress import counted, told
from graphzip.report.outcome import Outcome, Table
from graphzip.report.tables import closest
from graphzip.rewrite.edit import Edit, before
from graphzip.rewrite.layout import Layout
from graphzip_passes.base import ByTensor, PassContext, Weights, by_tensor, register_pass
from graphzip_passes.low_rank.factors import Factors, Spectrum, factorised_by, rank_of, spectrum_by
from graphzip_passes.low_rank.times import Part, times_of
from graphzip_passes.parts.by_tensor import refitted, streams
from graphzip_passes.parts.compensation import Narrowed, refit, sampled_rows

__all__ = ["Cuttable", "cuttable", "factorised", "low_rank"]

LOST: Final = "layers are products of thinner ones, of a lower rank than they had"

_ROWS: Final = 1 << 15


@dataclass(frozen=True)
class _Cut:
    """A layer, what becomes of it, and what a place of its output costs before and, for each thin layer, after."""

    layer: Layer
    factors: Factors
    before: int
    parts: tuple[int, ...]

    @property
    def after(self) -> int:
        return sum(self.parts)


@register_pass(LowRank, only_reads=True)
def low_rank(traced: Traced, options: LowRank, context: PassContext) -> Outcome:
    """Carry `LowRank` out."""
    batches = _batches(options, context)
    cuts, left = _cuts(traced, options, context.where, batches)
    if not cuts:
        return Outcome(traced, changed=False, proven=True, details={"ranks": {}, "left": left})
    result, _ = _rewritten(traced, cuts)
    if batches and options.compensate != "none":
        nothing = Layout.of((context.known or Analysed.of(traced)).analysis, [])
        refit(Values(traced, batches), Values(result, batches), Narrowed(result, nothing, nothing))
    times = [_milliseconds(traced, cut) for cut in cuts] if options.timed else []
    return _outcome(traced, result, cuts, left, times)


@by_tensor(LowRank, other_layers=True)
def low_rank_by_tensor(traced: Traced, options: LowRank, context: PassContext, weights: Weights) -> ByTensor:
    """Cut a layer at a time, and re-fit a layer at a time."""
    assert context.workspace is not None
    batches, kept = _batches(options, context), context.workspace.kept()
    layers, left = _selected(traced, options, context.where)
    found: Iterable[tuple[Layer, Tensor | None]] = ((layer, None) for layer in layers)
    if options.method == "data-svd":
        found = _products(traced, layers, streams(context, weights)(traced, batches))
    cuts = []
    for number, (layer, outputs) in enumerate(found):
        told(number, len(layers), f"finding factors: {_name(traced, layer)}")
        weight = weights(layer.name)
        cut = _cut(traced, layer, weight, options, outputs)
        if not _is_cheaper(traced, cut, left):
            continue
        for place, part in enumerate(cut.factors.weights):
            kept[f"{layer.name}/{place}"] = part.to(weight.dtype)
        bare = tuple(part.to("meta") for part in cut.factors.weights)
        cuts.append(replace(cut, factors=replace(cut.factors, weights=bare)))
    if not cuts:
        return ByTensor(Outcome(traced, changed=False, proven=True, details={"ranks": {}, "left": left}), weights)
    result, came_from = _rewritten(traced, cuts)
    source = kept.over(weights)

    def thin(name: str) -> Tensor:
        return source(came_from.get(name, name))

    slim: Weights = thin
    if batches and options.compensate != "none":
        nothing = Layout.of((context.known or Analysed.of(traced)).analysis, [])
        _, slim = refitted(traced, Narrowed(result, nothing, nothing), (weights, slim), context, batches)
    times = [_milliseconds(traced, cut) for cut in cuts] if options.timed else []
    return ByTensor(_outcome(traced, result, cuts, left, times), slim)


def _batches(options: LowRank, context: PassContext) -> Given:
    """The calibration data. Raises `PlanError` where there is none and the options ask for it."""
    batches = context.graph_inputs()
    if not batches and (options.method == "data-svd" or options.compensate == "data"):
        asks = "method: 'data-svd'" if options.method == "data-svd" else "compensate: 'data'"
        raise PlanError(
            f"{context.where}.{asks} needs calibration data; pass calibration=, a list of batches, or use method='svd'"
        )
    return batches


def _milliseconds(traced: Traced, cut: _Cut) -> tuple[float, float]:
    """Of the layer as it was, and of what it is cut into."""
    shapes = [tuple(part.shape) for part in cut.factors.weights]
    dense, thin = times_of(traced, cut.layer, [list(zip(shapes, cut.factors.own, strict=True))])
    return dense, thin


def factorised(traced: Traced, options: LowRank, where: str, batches: Given) -> Traced:
    """The graph with thin layers, before anything is re-fitted; `traced` stays as it is, and may be what is given."""
    cuts, _ = _cuts(traced, options, where, batches)
    return _rewritten(traced, cuts)[0] if cuts else traced


@dataclass(frozen=True)
class Cuttable:
    """A layer that a method with one rank stores as two thinner ones, each of which costs in proportion to the rank.

    `full` is the largest rank, `macs` what each of the two takes of the layer's own multiply-accumulates for each part
    of the rank, `params` its numbers for that.
    """

    name: str
    layer: Layer
    full: int
    spectrum: Spectrum
    macs: tuple[float, float]
    params: tuple[int, int]

    @property
    def most(self) -> int:
        """The largest rank that makes sense: at which it costs less, and the weight has as much."""
        return min(self.spectrum.rank, math.ceil(1.0 / sum(self.macs)) - 1)

    def faster(self, traced: Traced, method: str, ranks: Sequence[int]) -> tuple[int, ...]:
        """Those of ascending ranks at which it is measured to be faster than dense: all up to one."""
        low, high = 0, len(ranks)
        while low < high:
            middle = (low + high + 1) // 2
            dense, thin = times_of(traced, self.layer, [self._parts(method, ranks[middle - 1])])
            low, high = (middle, high) if thin < dense else (low, middle - 1)
        return tuple(ranks[:low])

    def _parts(self, method: str, rank: int) -> list[Part]:
        outs, ins, *kernel = self.layer.shape
        if method == "cp-spatial":
            return [((rank, ins, kernel[0], 1), (True, False)), ((outs, rank, 1, kernel[1]), (False, True))]
        ones = [1] * len(kernel)
        return [((rank, ins, *kernel), (True,) * len(kernel)), ((outs, rank, *ones), (False,) * len(kernel))]


def cuttable(traced: Traced, options: LowRank, where: str, batches: Given) -> list[Cuttable]:
    """The layers that `options` mean, in the order in which they run, but for those that no rank makes cheaper."""
    layers, _ = _selected(traced, options, where)
    outputs = _outputs(traced, layers, options, batches)
    found = []
    for layer in layers:
        weight, what = _held(traced, layer.weight).cpu(), f"layer {_name(traced, layer)!r}"
        spectrum = spectrum_by(options.method, checked(weight, what), outputs.get(layer.node), what)
        macs, params = _per_rank(layer, options.method)
        one = Cuttable(_name(traced, layer), layer, len(spectrum.energies), spectrum, macs, params)
        found += [one] if one.most >= 1 else []
    return found


def _per_rank(layer: Layer, method: str) -> tuple[tuple[float, float], tuple[int, int]]:
    """What the two thin layers cost for each part of the rank: shares of the layer's own operations, and numbers."""
    inside, outside = _sizes(layer)
    outs, ins, *kernel = layer.shape
    first, second, between = ins * math.prod(kernel), outs, outside
    if method == "cp-spatial":
        first, second, between = ins * kernel[0], outs * kernel[1], (outside[0], inside[1])
    whole = math.prod(layer.shape) * math.prod(outside)
    return (first * math.prod(between) / whole, second * math.prod(outside) / whole), (first, second)


def _cuts(traced: Traced, options: LowRank, where: str, batches: Given) -> tuple[list[_Cut], dict[str, str]]:
    """The layers that are cut, and why the others that are meant are not."""
    layers, left = _selected(traced, options, where)
    outputs = _outputs(traced, layers, options, batches)
    cuts: list[_Cut] = []
    for layer in counted(layers, "finding factors", [_name(traced, layer) for layer in layers]):
        cut = _cut(traced, layer, _held(traced, layer.weight), options, outputs.get(layer.node))
        cut = replace(cut, factors=shared(batches).processes.agreed(cut.factors))
        cuts += [cut] if _is_cheaper(traced, cut, left) else []
    return cuts, left


def _is_cheaper(traced: Traced, cut: _Cut, left: dict[str, str]) -> bool:
    """Whether it is; else `left` has the reason why the layer stays."""
    if cut.after < cut.before:
        return True
    ranks = " and ".join(map(str, cut.factors.ranks))
    left[_name(traced, cut.layer)] = f"at rank {ranks} it costs {cut.after:,} and whole {cut.before:,}"
    return False


def _outcome(
    traced: Traced,
    result: Traced,
    cuts: Sequence[_Cut],
    left: Mapping[str, str],
    times: Sequence[tuple[float, float]],
) -> Outcome:
    rows: list[tuple[str, ...]] = [
        (
            _name(traced, cut.layer),
            " x ".join(map(str, cut.layer.shape)),
            ", ".join(map(str, cut.factors.ranks)),
            f"{cut.after / cut.before:.1%}",
            f"{cut.factors.lost:.2e}",
        )
        for cut in cuts
    ]
    columns: tuple[str, ...] = ("layer", "weight", "rank", "MACs", "energy lost")
    details: dict[str, Any] = {
        "ranks": {_name(traced, cut.layer): list(cut.factors.ranks) for cut in cuts},
        "left": dict(left),
    }
    note = ""
    if times:
        columns += ("ms before", "after")
        rows = [(*row, f"{dense:.3f}", f"{thin:.3f}") for row, (dense, thin) in zip(rows, times, strict=True)]
        details["milliseconds"] = {row[0]: list(each) for row, each in zip(rows, times, strict=True)}
        slower = [row[0] for row, (dense, thin) in zip(rows, times, strict=True) if thin > dense]
        note = f"slower in onnxruntime here than they were: {', '.join(slower)}" if slower else ""
    return Outcome(
        result,
        changed=True,
        lossless=all(cut.factors.exact for cut in cuts),
        loss=LOST,
        proven=True,
        tables=(Table(columns, tuple(rows), note=note),),
        details=details,
    )


def _name(traced: Traced, layer: Layer) -> str:
    return traced.qualified(layer.module)


# ------------------------------------------------------------------------------------------------- which layers


def _selected(traced: Traced, options: LowRank, where: str) -> tuple[list[Layer], dict[str, str]]:
    """The layers that are meant and can be cut, and why the others that are meant cannot.

    Raises `PlanError` where a glob matches no layer.
    """
    layers = {_name(traced, layer): layer for layer in own_layers(traced).values()}
    globs = {"include": options.include, "exclude": options.exclude}
    globs |= {"rank": tuple(options.rank)} if isinstance(options.rank, Mapping) else {}
    problems = [
        f"{where}.{key}: {glob!r} matches no layer; {closest(glob, layers)}"
        for key, found in globs.items()
        for glob in found
        if not any(fnmatchcase(name, glob) for name in layers)
    ]
    if problems:
        raise plan_error(problems)
    chosen, left = [], {}
    for name, layer in layers.items():
        meant = not options.include or any(fnmatchcase(name, glob) for glob in options.include)
        if not meant or any(fnmatchcase(name, glob) for glob in options.exclude):
            continue
        reason = _reason(layer, options)
        if reason is None and _wanted(options, name) != "no":
            chosen.append(layer)
        elif reason is not None:
            left[name] = reason
    return chosen, left


def _reason(layer: Layer, options: LowRank) -> str | None:
    if layer.groups > 1:
        return "its convolution has groups"
    if layer.transposed:
        return "its convolution is transposed"
    if options.method == "cp-spatial" and len(layer.kernel) != 2:
        return "its kernel has not two dimensions"
    return None


def _wanted(options: LowRank, name: str) -> float | str | None:
    """The rank that a layer is to have; `None` where the energy says, "no" where no key of the ranks matches."""
    if not isinstance(options.rank, Mapping):
        return options.rank
    return next((amount for glob, amount in options.rank.items() if fnmatchcase(name, glob)), "no")


# ------------------------------------------------------------------------------------------------- factors


def _outputs(traced: Traced, layers: Sequence[Layer], options: LowRank, batches: Given) -> dict[fx.Node, Tensor]:
    """What the method has to know of what layers give."""
    if options.method != "data-svd":
        return {}
    return {layer.node: products for layer, products in _products(traced, layers, Values(traced, batches))}


def _products(traced: Traced, layers: Sequence[Layer], values: Values) -> Iterator[tuple[Layer, Tensor]]:
    """Mean products (O, O) of what layers give, without their bias, in the order in which they run."""
    wanted = {layer.node: layer for layer in layers}
    with torch.no_grad():
        for node in values.steps(max((values.place[node] for node in wanted), default=-1), wanted):
            layer, outputs = wanted[node], values[node]
            check_finite(layer.name, *outputs)
            rows = sampled_rows(layer, values, _ROWS)
            bias = 0.0 if layer.bias is None else values[layer.bias][0].double()
            given = [layer.picked(value, chosen).double() - bias for value, chosen in zip(outputs, rows, strict=True)]
            yield layer, mean_products(given, layer.shape[0], values.shared.processes)


def _cut(traced: Traced, layer: Layer, weight: Tensor, options: LowRank, outputs: Tensor | None) -> _Cut:
    name = _name(traced, layer)
    checked(weight, f"layer {name!r}")
    wanted: Any = _wanted(options, name)
    factors = factorised_by(
        options.method,
        weight.cpu(),
        outputs,
        lambda spectrum: rank_of(spectrum, wanted=wanted, energy=options.energy),
        f"layer {name!r}",
    )
    inside, outside = _sizes(layer)
    done, parts = [False] * len(outside), []
    for part, own in zip(factors.weights, factors.own, strict=True):
        done = [earlier or now for earlier, now in zip(done, own, strict=True)]
        sizes = [out if there else size for out, size, there in zip(outside, inside, done, strict=True)]
        parts.append(part.numel() * math.prod(sizes))
    return _Cut(layer, factors, weight.numel() * math.prod(outside), tuple(parts))


def _sizes(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes that a kernel slides over, of the input and of the output, on the example; none for a linear layer."""
    dims = len(layer.kernel)
    read, given = (concrete_shape(node.meta["val"]) for node in (layer.input, layer.node))
    return read[len(read) - dims :], given[len(given) - dims :]


def _held(traced: Traced, node: fx.Node) -> Tensor:
    return get_tensor(traced.module, str(node.target)).detach()


# ------------------------------------------------------------------------------------------------- the graph


def _rewritten(traced: Traced, cuts: Sequence[_Cut]) -> tuple[Traced, dict[str, str]]:
    """The graph with several layers in place of each one; the last of them is the node that was there. By the names of
    new tensors where they came from: the weight and the number of the factor, or the bias.
    """
    edit = Edit(traced)
    twins = edit.twins
    came_from: dict[str, str] = {}
    for cut in cuts:
        came_from |= _rewrite(edit, cut, twins[cut.layer.node])
    return edit.done(unread=True), came_from


def _rewrite(edit: Edit, cut: _Cut, node: fx.Node) -> dict[str, str]:
    layer, types, module = cut.layer, edit.traced.module_types, edit.module
    base, kind = _base(layer, module), types.pop(layer.module, "")
    build, given = before(node), arguments_of(node)
    flowing, last = given["input"], len(cut.factors.weights) - 1
    came_from = {}
    for number, (part, own) in enumerate(zip(cut.factors.weights, cut.factors.own, strict=True)):
        name = joined(base, str(number))
        attach(module, joined(name, "weight"), like(part, get_tensor(module, layer.name)))
        came_from[joined(name, "weight")] = f"{layer.name}/{number}"
        if kind:
            types[name] = kind
        call = _call(build.fetch(joined(name, "weight")), given, own)
        if number < last:
            flowing = build(node.target, flowing, **call)
            continue
        if layer.bias is not None:
            bias = get_tensor(module, str(layer.bias.target))
            attach(module, joined(name, "bias"), like(bias.detach().clone(), bias))
            came_from[joined(name, "bias")] = str(layer.bias.target)
            call["bias"] = build.fetch(joined(name, "bias"))
        for key, value in ({"input": flowing} | call).items():
            set_argument(node, key, value)
    return came_from


def _base(layer: Layer, module: nn.Module) -> str:
    """The name of what holds the thin layers: that of the layer, where it has one of its own."""
    owner, _, leaf = layer.name.rpartition(".")
    if leaf == "weight" and not module.get_submodule(owner)._modules:
        return owner
    name = joined(owner, "low_rank" if leaf == "weight" else f"{leaf}_low_rank")
    while hasattr(module.get_submodule(owner), name.rpartition(".")[2]):
        name = f"{name}_"
    return name


def _call(weight: fx.Node, given: Mapping[str, Any], own: Sequence[bool]) -> dict[str, Any]:
    """The arguments of one of the layers, which slides along the dimensions that are its own."""
    call: dict[str, Any] = {"weight": weight, "bias": None}
    if not own:
        return call
    for key, none in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given[key]
        if isinstance(value, str):
            call[key] = value  # a kernel of one place needs no padding, of either kind
            continue
        numbers = per_dimension(value, len(own))
        call[key] = [number if mine else none for number, mine in zip(numbers, own, strict=True)]
    return call | {"groups": 1}
