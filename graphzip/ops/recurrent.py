"""Recurrent layers: a hidden unit is a row in every gate, a column of the recurrent weight, and an output channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphzip.errors import RewriteError
from graphzip.labels import IntArray, support
from graphzip.ops.linear import scale_activation
from graphzip.ops.rules import opaque, split_axes, weight_labels
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Patch, Result

__all__ = ["SPECS"]

aten = torch.ops.aten


def recurrent(site: Site) -> Result:
    """`x (T, B, I) or (B, T, I), states (1, B, H), W_ih (gates H, I), W_hh (gates H, H) -> outputs, states`.

    With a projection W_hr (P, H), the outputs and the first state have P channels.
    """
    if site.args["num_layers"] > 1 or site.args["bidirectional"]:
        return opaque(site)
    inputs, others = split_axes(site.axes(site.args["input"]), [2])
    for axis in others:
        site.pin(axis, "runs over positions")
    w_ih, w_hh, biases, projection = _weights(site.args)
    states = _states(site.args)
    gates = site.shape(w_ih)[0] // site.shape(states[-1])[2]
    units = site.tie(weight_labels(site, w_ih, 0).reshape(gates, -1), [0])
    for value in (w_hh, *biases):
        site.unify(units, weight_labels(site, value, 0).reshape(gates, -1))
    units = units.ravel()
    hidden = units
    if projection is not None:
        hidden = weight_labels(site, projection, 0)
        site.unify(units, weight_labels(site, projection, 1))
    site.unify(hidden, weight_labels(site, w_hh, 1))
    _read(site, [site.tie(axis, [dim for dim in support(axis) if dim != 2]) for axis in inputs], w_ih)
    for state, labels in zip(states, (hidden, units), strict=False):
        _start(site, state, labels)
    for weight in (w_ih, w_hh, *([projection] if projection is not None else [])):
        _use(site, weight)
    ends = [_along(hidden)] * 2 if len(states) == 1 else [_along(hidden), _along(hidden), _along(units)]
    return [(end,) if support(end) else () for end in ends]


def _weights(args: Any) -> tuple[fx.Node, fx.Node, Sequence[fx.Node], fx.Node | None]:
    w_ih, w_hh, *more = args["params"]
    biases = more[: 2 if args["has_biases"] else 0]
    projection = more[len(biases)] if len(more) > len(biases) else None
    return w_ih, w_hh, biases, projection


def _states(args: Any) -> list[fx.Node]:
    """The hidden state, and the cell state of an LSTM."""
    return list(args["hx"]) if isinstance(args["hx"], (list, tuple)) else [args["hx"]]


def _along(labels: IntArray) -> IntArray:
    return labels.reshape(1, 1, -1)


def _read(site: Site, inputs: list[IntArray], weight: fx.Node) -> None:
    incoming = weight_labels(site, weight, 1)
    if inputs:
        site.unify(inputs[0], _along(incoming))
    elif incoming.size > 1:
        site.pin(incoming, "reads channels that are fixed")


def _start(site: Site, state: fx.Node, labels: IntArray) -> None:
    """The first state has the labels of the units."""
    touching, others = split_axes(site.axes(state), [2])
    for axis in others:
        site.pin(axis, "runs over positions")
    for axis in touching:
        site.unify(site.tie(axis, [dim for dim in support(axis) if dim != 2]), _along(labels))
    if not touching and labels.size > 1:
        site.pin(labels, "starts from a state whose channels are fixed")


def _use(site: Site, weight: fx.Node) -> None:
    rows, columns = weight_labels(site, weight, 0), weight_labels(site, weight, 1)
    if site.is_raw(weight):
        site.produce(rows)
        site.consume(columns)
    else:
        for labels in (rows, columns):
            site.pin(labels, "has weights that are computed")


def macs(site: Site) -> int:
    """Every step multiplies the input, the state and, where there is one, the projection."""
    w_ih, w_hh, _, projection = _weights(site.args)
    steps = math.prod(site.shape(site.args["input"])[:2])
    used = [w_ih, w_hh, *([projection] if projection is not None else [])]
    return steps * sum(math.prod(site.shape(weight)) for weight in used)


def patch_recurrent(patch: Patch) -> None:
    """Weights whose slices were not added up refuse."""
    if patch.args["num_layers"] > 1 or patch.args["bidirectional"]:
        return
    w_ih, w_hh, _, projection = _weights(patch.args)
    states = _states(patch.args)
    gates = int(w_ih.meta["val"].shape[0]) // int(states[-1].meta["val"].shape[2])
    for weight in (w_hh, *([projection] if projection is not None else [])):
        if not patch.consumes(weight, 1) and patch.multiplicity(weight, [1]) is not None:
            raise RewriteError(f"the columns of {weight.target} cannot be added up: it is used elsewhere too")
    if not patch.consumes(w_ih, 1):
        scale_activation(patch, "input", [2])
    left = [patch.size(w_hh, 1), patch.size(w_ih, 0) // gates]
    if projection is not None and left[0] == left[1]:
        raise RewriteError(
            f"{left[0]} hidden units would be left and as many projected channels, which torch takes for a layer "
            f"without a projection; keep more or fewer of one of them"
        )


SPECS = (
    OpSpec(
        (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
        recurrent,
        macs=macs,
        patch=patch_recurrent,
    ),
)
