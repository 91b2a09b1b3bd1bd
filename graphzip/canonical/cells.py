"""Single steps of recurrent layers, and unpooling, as the operators that they are made of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphzip.graph.builder import Builder, rank_of, size_of

__all__ = ["CELLS"]

aten = torch.ops.aten


def _simple(activation: Any) -> Callable[..., fx.Node]:
    """`h' = f(W x + b + U h + c)`."""

    def rule(
        build: Builder, x: fx.Node, h: fx.Node, w_ih: fx.Node, w_hh: fx.Node, b_ih: Any = None, b_hh: Any = None
    ) -> fx.Node:
        return build(activation, _sum(build, x, h, w_ih, w_hh, b_ih, b_hh))

    return rule


def _sum(build: Builder, x: fx.Node, h: fx.Node, w_ih: fx.Node, w_hh: fx.Node, b_ih: Any, b_hh: Any) -> fx.Node:
    incoming = build(aten.linear.default, x, w_ih, b_ih)
    return build(aten.add.Tensor, build(aten.linear.default, h, w_hh, b_hh), incoming)


def _gates(build: Builder, values: fx.Node, count: int) -> list[fx.Node]:
    parts = build(aten.chunk.default, values, count, rank_of(values) - 1)
    return [build(operator.getitem, parts, number) for number in range(count)]


def _gru(
    build: Builder, x: fx.Node, h: fx.Node, w_ih: fx.Node, w_hh: fx.Node, b_ih: Any = None, b_hh: Any = None
) -> fx.Node:
    """`h' = (h - n) z + n`, with the new state `n` that a reset gate computes of the old one."""
    from_x = _gates(build, build(aten.linear.default, x, w_ih, b_ih), 3)
    from_h = _gates(build, build(aten.linear.default, h, w_hh, b_hh), 3)
    reset, update = (build(aten.sigmoid.default, build(aten.add.Tensor, from_h[gate], from_x[gate])) for gate in (0, 1))
    kept = build(aten.mul.Tensor, from_h[2], reset)
    new = build(aten.tanh.default, build(aten.add.Tensor, from_x[2], kept))
    moved = build(aten.mul.Tensor, build(aten.sub.Tensor, h, new), update)
    return build(aten.add.Tensor, moved, new)


def _lstm(
    build: Builder, x: fx.Node, state: Any, w_ih: fx.Node, w_hh: fx.Node, b_ih: Any = None, b_hh: Any = None
) -> None:
    """`c' = f c + i g` and `h' = o tanh(c')`."""
    h, c = state
    gates = _gates(build, _sum(build, x, h, w_ih, w_hh, b_ih, b_hh), 4)
    entry, forget, out = (build(aten.sigmoid.default, gates[gate]) for gate in (0, 1, 3))
    fresh = build(aten.mul.Tensor, entry, build(aten.tanh.default, gates[2]))
    cell = build(aten.add.Tensor, build(aten.mul.Tensor, forget, c), fresh)
    results = build(aten.mul.Tensor, out, build(aten.tanh.default, cell)), cell
    for part in list(build.place.users):
        part.replace_all_uses_with(results[part.args[1]])  # type: ignore[index]
        build.graph.erase_node(part)
    build.graph.erase_node(build.place)


def _unpool(spatial: int) -> Callable[..., fx.Node]:
    """Every value to its place in a plane of zeros; places are counted along all `spatial` dimensions."""

    def rule(build: Builder, x: fx.Node, places: fx.Node, size: Any, *_: Any) -> fx.Node:
        lead = [size_of(build, x, dim) for dim in range(rank_of(x) - spatial)]
        count = size[0]
        for other in size[1:]:
            count = _product(build, count, other)
        values, places = (
            build(aten.reshape.default, each, [*(size_of(build, each, dim) for dim in range(len(lead))), -1])
            for each in (x, places)
        )
        plane = build(aten.new_zeros.default, x, [*lead, count])
        filled = build(aten.scatter.src, plane, len(lead), places, values)
        return build(aten.reshape.default, filled, [*lead, *size])

    return rule


def _product(build: Builder, left: Any, right: Any) -> Any:
    is_open = isinstance(left, fx.Node) or isinstance(right, fx.Node)
    return build(operator.mul, left, right) if is_open else left * right


CELLS: dict[Any, Callable[..., fx.Node | None]] = {
    aten.rnn_tanh_cell.default: _simple(aten.tanh.default),
    aten.rnn_relu_cell.default: _simple(aten.relu.default),
    aten.gru_cell.default: _gru,
    aten.lstm_cell.default: _lstm,
    aten.max_unpool2d.default: _unpool(2),
    aten.max_unpool3d.default: _unpool(3),
}
