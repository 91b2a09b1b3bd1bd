"""Where a size is one: is the graph, which was traced with two and more, still the model?

A model may ask for a batch of one (`if x.shape[0] > 1`) and take another path. Then it is traced a second time, with
one, and the graphs are compared operator by operator. Where they differ, inputs of that size are refused.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from graphzip.calls import Call
from graphzip.canonical.squeezes import squeezed
from graphzip.graph.guards import Open, holds
from graphzip.graph.meta import meta_of
from graphzip.graph.torch_private import pytree
from graphzip.tracing.excluded_sizes import admitted
from graphzip.tracing.flatten import Flat, FormOf, flatten
from graphzip.tracing.layout_guards import loosened
from graphzip.tracing.program import TRACED_AS_TWO, automatic, is_free, run_export, separate, untraceable
from graphzip.tracing.retrace import open_dims, placeholders, same_at, tensors_of

__all__ = ["settle"]

logger = logging.getLogger(__name__)


def settle(skeleton: nn.Module, given: Call, flat: Flat, form_of: FormOf | None = None) -> Flat:
    """The graph with the conditions that hold where sizes are one, or one of those sizes, if the example needs it."""
    groups: dict[tuple[str, ...], list[Open]] = {}
    for each in flat.open:
        groups.setdefault(each.places, []).append(each)
    apart = [group for places, group in groups.items() if not same_at(skeleton, flat, _ones(flat, places), form_of)]
    kept = [each for group in apart for each in group]
    flat = admitted(skeleton, loosened(skeleton, _with_conditions(flat, kept)), form_of)
    unfit = _unfit(flat, given)
    if not unfit:
        return flat
    note = f"sizes of one are fixed, as in the example: traced with two, the model would need {unfit}"
    logger.warning("%s: %s", type(skeleton).__name__, note)
    call: Call = separate(given)
    dims = [
        [dim for dim in dims if leaf.shape[dim] > 1]
        for leaf, dims in zip(tensors_of(call), open_dims(flat), strict=True)
    ]
    try:
        program = run_export(skeleton, call, automatic(tensors_of(call), dims))
    except Exception as error:
        raise untraceable(skeleton, error) from error
    return settle(skeleton, given, flatten(replace(program, notes=(note,)), skeleton, form_of), form_of)


def _ones(flat: Flat, places: tuple[str, ...]) -> dict[Any, int]:
    return {symbol: 1 for symbol, place in flat.sizes.names.items() if place in places}


def _with_conditions(flat: Flat, kept: list[Open]) -> Flat:
    """Rule out that these sizes are one."""
    if not kept:
        return flat
    texts = {each.text for each in kept}
    for node in list(flat.module.graph.nodes):
        asked = [flat.sizes.open([branch]) for branch in squeezed(node)]
        if asked and all(found and found[0].text in texts for found in asked):
            meta_of(node)["never_one"] = True
    conditions = tuple(dict.fromkeys([*flat.conditions, *(each.text for each in kept)]))
    notes = tuple(note for note in flat.notes if note != TRACED_AS_TWO)
    return replace(flat, conditions=conditions, asked_at={each.text: each.source for each in kept}, notes=notes)


def _unfit(flat: Flat, given: Call) -> str:
    """Why the example itself could not be given to the result; empty where it can."""
    for node, tensor in zip(placeholders(flat), tensors_of(given), strict=True):
        for dim, (size, has) in enumerate(zip(node.meta["val"].shape, tensor.shape, strict=True)):
            if not is_free(size) and int(size) != has:
                return f"{node.target}.shape[{dim}] == {int(size)}"
    names = [str(node.target) for node in flat.module.graph.nodes if node.op == "placeholder"]
    known = dict(zip(names, pytree.tree_leaves(given), strict=True))
    return next((text for text in flat.conditions if not holds(text, known)), "")
