"""Which operators of a graph draw random numbers, and along which dimensions they draw independently.

PyTorch tags every operator that may draw. Many have a switch: a dropout draws where its call says that it trains. What
is drawn while a user's model is looked at is given back to the process's generators.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.graph.operators import arguments_of
from graphzip.graph.source import describe

__all__ = ["drop_dead", "generators_kept", "is_dropout", "is_random", "random_nodes", "random_notes", "shared_dims"]

_Arguments = Mapping[str, Any]


def _is_open(chance: Any) -> bool:
    """Whether a chance leaves anything open; one that is computed may."""
    return not isinstance(chance, int | float) or 0.0 < chance < 1.0


def _drops(args: _Arguments) -> bool:
    return args["train"] is not False and _is_open(args["p"])


def _slopes(args: _Arguments) -> bool:
    return bool(args["training"]) and args["lower"] != args["upper"]


def _attends(args: _Arguments) -> bool:
    return bool(args["dropout_p"] != 0.0)


def _recurs(args: _Arguments) -> bool:
    return bool(args["train"]) and args["dropout"] != 0.0 and args["num_layers"] > 1


def _tosses(args: _Arguments) -> bool:
    return _is_open(args.get("p"))


_SWITCHES: dict[str, Callable[[_Arguments], bool]] = {
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"), _drops),
    **dict.fromkeys(("rrelu", "rrelu_with_noise", "rrelu_with_noise_functional"), _slopes),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurs),
    "scaled_dot_product_attention": _attends,
    "bernoulli": _tosses,
}
"""Operators that draw only where their arguments say so, by name without the mark of in-place ones."""


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    draws = _SWITCHES.get(_name(node))
    return draws is None or draws(arguments_of(node))


def is_dropout(node: fx.Node) -> bool:
    """Whether a random operator is one that regularises training, and can be switched off."""
    return is_random(node) and _name(node) in _SWITCHES.keys() - {"bernoulli"}


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The operators that draw random numbers which reach an output, in execution order."""
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in read or _writes(node):
            read.update(node.all_input_nodes)
    return [node for node in graph.nodes if (node in read or _writes(node)) and is_random(node)]


def drop_dead(graph: fx.Graph) -> None:
    """Take out operators that nobody reads, those that could draw random numbers among them, and nothing that writes.

    PyTorch leaves the latter in place, with all that they read: attention, whose dropout is off, is one of them.
    """
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))


def random_notes(graph: fx.Graph) -> Iterator[str]:
    """Sentences on the operators of an eval graph that are random."""
    for node in random_nodes(graph):
        yield f"{describe(node)} draws random numbers in eval mode, too; no two runs are the same"


def shared_dims(node: fx.Node, rank: int) -> range:
    """The dimensions of an operand of `rank` along which one draw of a random operator serves all positions."""
    name = _name(node)
    if name in {"feature_dropout", "feature_alpha_dropout"}:
        return range(2, rank)
    return range(rank - 1, rank) if name == "scaled_dot_product_attention" else range(0)


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name.partition("::")[2].removesuffix("_"))  # type: ignore[union-attr]


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


@contextmanager
def generators_kept(drawn: list[str] | None = None) -> Iterator[None]:
    """Put back the generators of Python, numpy and PyTorch; `drawn` names those of the first two that moved."""
    drawn = [] if drawn is None else drawn
    python, numbers = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        if random.getstate() != python:
            drawn.append("random")
            random.setstate(python)
        if not _same(np.random.get_state(), numbers):
            drawn.append("numpy.random")
            np.random.set_state(numbers)


def _same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
