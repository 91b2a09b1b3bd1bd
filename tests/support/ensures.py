"""What a pass requires and ensures, checked around its function; no cost where models are compiled."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pass_cases import PassCase

from graphzip.graph.state import named_state
from graphzip.graph.traced import Traced
from graphzip.report.outcome import Outcome
from graphzip_passes.base import PASSES, Decision, PassContext, pass_of

__all__ = ["ensures"]


def ensures(case: PassCase, monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """From here on the pass of `case` is checked where it is carried out; what it gave is put into the list."""
    known, seen = pass_of(case.options, "here"), []

    def carried_out(finish: Any, traced: Traced, *rest: Any) -> Outcome:
        given = _sound(traced)
        outcome: Outcome = finish(traced, *rest)
        _check(case, given, outcome)
        seen.append(outcome)
        return outcome

    def decided(traced: Traced, options: Any, context: PassContext) -> Decision:
        _sound(traced)
        decision: Decision = known.function(traced, options, context)
        return replace(decision, finish=lambda graph, later: carried_out(decision.finish, graph, later))

    def simple(traced: Traced, options: Any, context: PassContext) -> Outcome:
        return carried_out(known.function, traced, options, context)

    monkeypatch.setitem(PASSES, type(case.options), replace(known, function=decided if known.decides else simple))
    return seen


def _sound(traced: Traced) -> dict[str, Any]:
    """What has to be true of a graph, and what a pass leaves as it is."""
    traced.graph.lint()
    fakes = {node.name: node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"}
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    state = dict(named_state(traced.module))
    assert targets <= set(state), f"the graph reads what the module does not have: {sorted(targets - set(state))}"
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            assert tuple(node.meta["val"].shape) == tuple(state[str(node.target)].shape), (
                f"{node.target} is out of date"
            )
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    shapes = [tuple(map(str, each.meta["val"].shape)) for each in output.all_input_nodes]
    return {
        "inputs": [tuple(map(str, fake.shape)) for fake in fakes.values()],
        "shapes": shapes,
        "owners": {name.rpartition(".")[0] for name in state},
        "names": set(state),
    }


def _check(case: PassCase, given: dict[str, Any], outcome: Outcome) -> None:
    after = _sound(outcome.traced)
    assert (after["inputs"], after["shapes"]) == (given["inputs"], given["shapes"])
    strangers = {name for name in after["owners"] if name not in given["owners"] and not _inside(name, given["owners"])}
    assert not strangers, "a parameter belongs to a module that the model did not have, and to no part of one"
    assert json.loads(json.dumps(outcome.details)) is not None
    assert all(0 < now <= before for before, now in outcome.widths.values())
    assert outcome.changed or not outcome.widths


def _inside(name: str, owners: set[str]) -> bool:
    """Whether a module lies inside one that the model had: layers may be divided."""
    return any(name.startswith(f"{owner}.") for owner in owners if owner)
