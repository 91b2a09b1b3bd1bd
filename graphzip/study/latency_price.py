"""What a model takes in onnxruntime as a function of the widths of its groups, from measurements of its layers alone.

onnxruntime computes channels in blocks, so the time of a layer goes up in steps. A convolution or a linear layer is
measured at some widths of its own and of what it reads, once for all layers that are alike. What else multiplies takes
as much for each multiplication as these layers do on the average, and the rest of what the model takes is spread over
the numbers that all other operators give.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.cost import batch_of
from graphzip.analysis.layers import Layer, calls_of_layers
from graphzip.export.latency import RowLayer, kernel_milliseconds
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.operators import is_view
from graphzip.progress import counted
from graphzip.runtime.inference import machine
from graphzip.study.cost_model import Axes, Dims, Price, WidthTable, operations, price_of
from graphzip.study.measurements import Measurements, beside_others
from graphzip.study.units import Units

__all__ = ["latency_price", "layer_times"]

logger = logging.getLogger(__name__)

aten = torch.ops.aten

_BLOCK: Final = 16  # float32 numbers in a register of AVX-512, which convolutions and matrix products fill
_EACH: Final = 128  # channels up to which every multiple of a block is measured
_SHARES: Final = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
_FINE: Final = 8  # numbers of channels that are measured of a layer with few
_FUSED: Final = {aten.relu.default, aten.clamp.default, aten.hardtanh.default, aten.batch_norm.default}


Times = Callable[[tuple[int, ...], RowLayer], float]


def layer_times(path: str | os.PathLike[str]) -> Times:
    """What measures a layer once on this machine: a file of measurements keeps it for other models, too."""
    with beside_others():
        kept = Measurements(path, f"layers on {machine()}")

    def measured(image: tuple[int, ...], layer: RowLayer) -> float:
        name = f"{layer} of {image}"
        taken = kept.get(name, 1)
        if taken is None:
            taken = kernel_milliseconds(image, layer)
            kept.put(name, 1, taken)
        return taken

    return measured


def latency_price(units: Units, whole: float, measured: Times | None = None) -> Price:
    """Milliseconds for one sample, `whole` of them before anything is narrowed; of a layer alone as `measured`."""
    measured = measured or kernel_milliseconds
    traced, columns = units.traced, len(units.choices)
    groups = [units.groups[name] for name in units.choices]
    layers = {layer.node: layer for layer in calls_of_layers(traced) if _is_measured(layer)}
    found, others = list[tuple[float, Dims, WidthTable]](), list[tuple[float, Dims]]()
    told = list(operations(traced, units.analysis, groups, columns))
    timed = 0.0
    for each in counted(told, "measuring layers in onnxruntime", (each.node.name for each in told)):
        layer = layers.get(each.node)
        if layer is None:
            others.append((each.macs, each.dims))
            continue
        table, taken = _table(layer, batch_of(traced), measured)
        found.append((taken, {0: each.dims.get(0, np.zeros(columns)), 1: each.dims.get(1, np.zeros(columns))}, table))
        timed += each.macs
    rate = sum(taken for taken, *_ in found) / timed if timed else whole / max(sum(macs for macs, _ in others), 1.0)
    others = [(macs * rate, dims) for macs, dims in others]
    left = max(whole - sum(taken for taken, *_ in found) - sum(taken for taken, _ in others), 0.0)
    written = list(_written(units, Axes(units.analysis, groups, columns)))
    numbers = sum(count for count, _ in written)
    rest = price_of([*others, *((count * left / numbers, dims) for count, dims in written)], columns)
    layered = price_of([(taken, dims) for taken, dims, _ in found], columns)
    price = Price.total([(1.0, replace(layered, tables=dict(enumerate(table for *_, table in found)))), (1.0, rest)])
    logger.info("%d layers take %.3g of %.3g ms in onnxruntime", len(found), layered.whole, whole)
    return Price.total([(whole / price.whole, price)])


def _is_measured(layer: Layer) -> bool:
    """Whether the groups of a convolution are one or as many as there are channels."""
    return not layer.transposed and (layer.groups == 1 or (layer.depthwise and layer.shape[0] == layer.groups))


def _table(layer: Layer, samples: int, measured: Times) -> tuple[WidthTable, float]:
    """What a layer takes at some of its widths, and milliseconds at all of them."""
    outs, ins = (layer.shape[0], 1) if layer.depthwise else layer.shape[:2]
    grids = _grid(outs), _grid(ins)
    cases = [[_case(layer, out, in_, samples) for in_ in grids[1]] for out in grids[0]]
    taken = np.array([[measured(*case) for case in row] for row in cases])
    taken = np.minimum.accumulate(np.minimum.accumulate(taken[::-1, ::-1], 0), 1)[::-1, ::-1]  # no more for less
    return WidthTable((_places(outs, grids[0]), _places(ins, grids[1])), taken / taken[-1, -1]), float(taken[-1, -1])


def _grid(count: int) -> list[int]:
    """The numbers of channels that are measured, ascending."""
    if count <= _EACH:
        step = max(count // _FINE, 1)
        return sorted({*range(step, count, step), *range(_BLOCK, count, _BLOCK), count})
    return sorted({*(min(math.ceil(share * count / _BLOCK) * _BLOCK, count) for share in _SHARES), count})


def _places(count: int, grid: list[int]) -> NDArray[np.float64]:
    """Where every number of channels is in the grid: what does not fill a block takes what a full one takes."""
    each = np.arange(count + 1)
    if count <= _EACH:
        return np.searchsorted(grid, each).astype(np.float64)
    return np.interp(np.minimum(-(-each // _BLOCK) * _BLOCK, count), grid, np.arange(len(grid)))


def _case(layer: Layer, outs: int, ins: int, samples: int) -> tuple[tuple[int, ...], RowLayer]:
    """The input and the layer that are measured for so many channels."""
    first, *others = concrete_shape(layer.input.meta["val"])
    first = first // samples if first % samples == 0 else first
    if layer.is_linear:
        return (math.prod([first, *others[:-1]]), ins), RowLayer((outs, ins))
    window, groups = layer.window, outs if layer.depthwise else 1
    pads = (*window.pads[::2][::-1], *window.pads[1::2][::-1])
    shape = (outs, 1 if layer.depthwise else ins, *layer.kernel)
    image = (first, outs if layer.depthwise else ins, *others[1:])
    return image, RowLayer(shape, window.stride, pads, window.dilation, groups)


def _written(units: Units, axes: Axes) -> Iterator[tuple[float, Dims]]:
    """How many numbers the other operators give, which are neither views nor part of the layer in front of them."""
    computed = {each.node for each in operations(units.traced, units.analysis, [])}
    for node in units.traced.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if node not in computed and not is_view(node) and not _is_fused(node, computed):
            yield float(math.prod(concrete_shape(value))), axes.of([node])


def _is_fused(node: fx.Node, computed: set[fx.Node]) -> bool:
    source: Any = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and source.target in _FUSED:
        source = source.args[0]
    return node.target in _FUSED and source in computed
