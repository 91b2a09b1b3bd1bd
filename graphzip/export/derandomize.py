"""Hold random operators still, in a program and in an ONNX model, so that the rest of the two can be compared.

Normal numbers become their mean, uniform ones the middle of their range, a dropout lets everything through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from graphzip.export.optional_packages import require
from graphzip.graph.operators import arguments_of
from graphzip.graph.randomness import random_nodes
from graphzip.graph.source import describe

__all__ = ["described_draws", "is_deterministic", "still_model", "still_program"]

aten = torch.ops.aten

_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


def described_draws(program: ExportedProgram) -> list[str]:
    """The random operators of a program, in words."""
    return [describe(node) for node in random_nodes(program.graph)]


def still_program(program: ExportedProgram) -> fx.GraphModule | None:
    """The program as a module in which no operator is random; `None` where one cannot be held still."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in random_nodes(module.graph):
        hold = _HELD.get(node.target)
        if hold is None:
            return None
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(hold(node))
        module.graph.erase_node(node)
    module.recompile()
    return module


def _let_through(node: fx.Node) -> fx.Node:
    return arguments_of(node)["input"]  # type: ignore[no-any-return]


def _constant(value: float) -> Callable[[fx.Node], fx.Node]:
    def held(node: fx.Node) -> fx.Node:
        size = arguments_of(node)["size"]
        return node.graph.call_function(aten.full.default, (size, value), dict(node.kwargs))

    return held


def _constant_like(value: float) -> Callable[[fx.Node], fx.Node]:
    def held(node: fx.Node) -> fx.Node:
        return node.graph.call_function(aten.full_like.default, (node.args[0], value), dict(node.kwargs))

    return held


def _likely(node: fx.Node) -> fx.Node:
    return node.graph.call_function(_at_least_half, (node.args[0],))


def _at_least_half(chances: torch.Tensor) -> torch.Tensor:
    return (chances >= 0.5).to(chances.dtype)


_HELD: dict[Any, Callable[[fx.Node], fx.Node]] = {
    aten.dropout.default: _let_through,
    aten.randn.default: _constant(0.0),
    aten.rand.default: _constant(0.5),
    aten.randn_like.default: _constant_like(0.0),
    aten.rand_like.default: _constant_like(0.5),
    aten.bernoulli.default: _likely,
}


def is_deterministic(model: Any) -> bool:
    return not any(node.op_type in _RANDOM for graph in model.graphs() for node in graph)


def still_model(model: Any) -> bool:
    """Hold the random operators of an ONNX model still, in place; whether all of them could be."""
    for graph in model.graphs():
        for node in list(graph):
            if node.domain not in ("", "ai.onnx") or node.op_type not in {*_RANDOM, "Dropout"}:
                continue
            made = _replacement(node)
            if made is None:
                return False
            graph.insert_before(node, made)
            node.outputs[0].replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
    return True


def _replacement(node: Any) -> list[Any] | None:
    ir = require("onnx_ir")
    given: Any = node.inputs[0] if node.inputs else None
    attributes = node.attributes
    if node.op_type == "Dropout":
        return [ir.node("Identity", [given])] if not any(out.uses() for out in node.outputs[1:]) else None
    if node.op_type == "Multinomial":
        return None
    dtype = ir.DataType(attributes["dtype"].as_int()) if "dtype" in attributes else None
    dtype = dtype or (given.dtype if given is not None else ir.DataType.FLOAT)
    if dtype is None:
        return None
    if node.op_type == "Bernoulli":
        half = ir.node("Constant", [], {"value": ir.tensor(np.asarray(0.5, given.dtype.numpy()))})
        above = ir.node("GreaterOrEqual", [given, half.outputs[0]])
        return [half, above, ir.node("Cast", [above.outputs[0]], {"to": int(dtype)})]
    value = _middle(node)
    if "shape" in attributes:
        full = np.full(attributes["shape"].as_ints(), value, dtype.numpy())
        return [ir.node("Constant", [], {"value": ir.tensor(full)})]
    shape = ir.node("Shape", [given])
    filled = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": ir.tensor(np.asarray([value], dtype.numpy()))})
    return [shape, filled]


def _middle(node: Any) -> float:
    """The mean of what a `RandomNormal` or `RandomUniform` draws."""
    defaults = {"mean": 0.0, "low": 0.0, "high": 1.0}
    known = {
        name: node.attributes[name].as_float() if name in node.attributes else value for name, value in defaults.items()
    }
    return known["mean"] if "Normal" in node.op_type else (known["low"] + known["high"]) / 2
