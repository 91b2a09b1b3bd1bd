"""How long a layer takes in onnxruntime, and how long what it is cut into, on this machine and for one sample."""

from __future__ import annotations

from collections.abc import Sequence

from graphzip.analysis.cost import batch_of
from graphzip.analysis.layers import Layer
from graphzip.export.latency import RowLayer, row_milliseconds
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.traced import Traced

__all__ = ["times_of"]

Part = tuple[tuple[int, ...], tuple[bool, ...]]
"""A thin layer: the shape of its weight, and which dimensions of the kernel are its own."""


def times_of(traced: Traced, layer: Layer, rows: Sequence[Sequence[Part]]) -> list[float]:
    """Milliseconds of the layer, and of each of the rows of thin layers in its place, measured by turns."""
    samples, (first, *others) = batch_of(traced), concrete_shape(layer.input.meta["val"])
    image = (first // samples if first % samples == 0 else first, *others)
    dense = (layer.shape, (True,) * len(layer.kernel))
    return row_milliseconds(image, [[_stage(layer, part) for part in row] for row in ([dense], *rows)])


def _stage(layer: Layer, part: Part) -> RowLayer:
    shape, own = part
    if layer.is_linear:
        return RowLayer(shape)
    window = layer.window
    kinds = [window.stride, window.pads[::2][::-1], window.pads[1::2][::-1], window.dilation]
    strides, begins, ends, dilations = (
        tuple(number if mine else none for number, mine in zip(numbers, own, strict=True))
        for numbers, none in zip(kinds, (1, 0, 0, 1), strict=True)
    )
    return RowLayer(shape, strides, (*begins, *ends), dilations)
