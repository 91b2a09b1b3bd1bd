"""Conditions that only torch asked for while it traced, to choose how tensors lie in memory, and that no result needs.

`torch.export` runs every operator on sizes that are open, and wherever its own code compares them, it holds on to the
answer: whether a tensor is contiguous, whether a size is one. The operators of the graph ask again when they run.
Comparisons of the model itself are another matter, they choose its path; and where something is written in place, how
tensors lie decides what shares memory. So without writes, inequalities that no line of the model asked for are given
up, once the model and the graph were run at sizes that they exclude, and gave the same.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from graphzip.canonical.memory import writes
from graphzip.graph.guards import Term, parse, value_of
from graphzip.graph.torch_private import pytree
from graphzip.tracing.flatten import Flat, stated
from graphzip.tracing.program import is_free, run_model
from graphzip.tracing.retrace import length_at, placeholders, resized, tensors_of

__all__ = ["loosened"]

logger = logging.getLogger(__name__)

_SMALL = (1, 2, 3, 4, 6, 8, 16, 32)
"""Sizes that are tried besides that of the example."""

_SEARCHED = 1024
_TRIED = 4


def loosened(skeleton: nn.Module, flat: Flat) -> Flat:
    """The graph without conditions that only torch asked for, if it is the model at sizes that they exclude."""
    gone = flat.sizes.inequalities() - flat.asked.keys() - stated(skeleton, flat)
    gone &= {*flat.conditions}
    if not gone or _has_writes(flat):
        return flat
    open_ = {each.text for each in flat.open}
    asked = {text: line for text, line in flat.asked.items() if text not in open_}
    kept = tuple(dict.fromkeys([*(text for text in flat.conditions if text not in gone), *asked]))
    outcomes = [_same_results(skeleton, flat, sizes) for sizes in _spread(list(_excluded(flat, kept, gone)))]
    if False in outcomes or True not in outcomes:
        return flat
    return replace(flat, conditions=kept, asked_at={**asked, **flat.asked_at})


def _has_writes(flat: Flat) -> bool:
    graphs = [each.graph for each in flat.program.exported.graph_module.modules() if isinstance(each, fx.GraphModule)]
    return any(writes(node) for graph in graphs for node in graph.nodes)


def _excluded(flat: Flat, kept: tuple[str, ...], gone: set[str]) -> Iterator[dict[Any, int]]:
    """Sizes that fit all conditions that are kept and not all that go."""
    environment: Any = flat.sizes.environment
    symbols = list(flat.sizes.names)
    choices = [dict.fromkeys([int(environment.backed_var_to_val[symbol]), *_SMALL]) for symbol in symbols]
    inner, outer = ([parse(text) for text in texts] for texts in (kept, gone))
    for sizes in itertools.islice(itertools.product(*choices), _SEARCHED):
        chosen = dict(zip(symbols, sizes, strict=True))
        known = _inputs(flat, chosen)
        if known and all(map(known.fit, inner)) and not all(map(known.fit, outer)):
            yield chosen


@dataclass(frozen=True)
class _Inputs:
    """Inputs of which the sizes are known, by name."""

    known: dict[str, Any]

    def fit(self, term: Term) -> bool:
        try:
            return bool(value_of(term, self.known))
        except (ZeroDivisionError, KeyError):
            return False


def _inputs(flat: Flat, sizes: dict[Any, int]) -> _Inputs | None:
    known: dict[str, Any] = {}
    for node in placeholders(flat):
        shape = [length_at(size, sizes) if is_free(size) else int(size) for size in node.meta["val"].shape]
        if None in shape:
            return None
        known[str(node.target)] = SimpleNamespace(shape=shape)
    return _Inputs(known)


def _spread(found: list[dict[Any, int]]) -> list[dict[Any, int]]:
    """The smallest sizes, and some of the others."""
    smallest = sorted(found, key=lambda sizes: math.prod(sizes.values()))
    return [*smallest[:1], *smallest[1 :: max(1, len(found) // _TRIED)][:_TRIED]]


def _same_results(skeleton: nn.Module, flat: Flat, sizes: dict[Any, int]) -> bool | None:
    """Whether the graph gives what the model gives; nothing where the model itself fails."""
    call = resized(flat, sizes)
    if call is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wanted = tensors_of(run_model(skeleton, call))
    except Exception:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            found = tensors_of(fx.Interpreter(flat.module).run(*pytree.tree_leaves(call)))
    except Exception as error:
        logger.info("%s: the graph fails where the model runs: %s", type(skeleton).__name__, error)
        return False
    return len(found) == len(wanted) and all(map(_close, found, wanted))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same but for the order of sums."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    scale = other.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if other.numel() else 0.0
    unit = 64 * torch.finfo(one.dtype).eps
    return bool(torch.allclose(one, other, rtol=unit**0.75, atol=scale * unit**0.75, equal_nan=True))
