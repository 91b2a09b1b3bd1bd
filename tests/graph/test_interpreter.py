"""Values on calibration data: batch by batch between stops, and no longer than they are read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from nets import NETS
from planting import randomize_
from torch import fx, nn

from graphzip.graph.interpreter import Values
from graphzip.graph.traced import Traced
from graphzip.tracing.trace import trace


@pytest.fixture(scope="module")
def traced() -> Traced:
    model, x = NETS["cifar_resnet_projection"]()
    randomize_(model, 0)
    return trace(model.eval(), x)


def batches(traced: Traced, count: int = 3) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    (x,) = traced.example_inputs
    return [(torch.randn(x.shape, generator=generator),) for _ in range(count)]


def computed(traced: Traced) -> list[fx.Node]:
    """The operators that give tensors."""
    nodes = traced.graph.nodes
    return [each for each in nodes if each.op == "call_function" and isinstance(each.meta["val"], torch.Tensor)]


def test_stops_have_the_values_that_the_graph_has_there(traced: Traced) -> None:
    data = batches(traced)
    wanted: dict[str, list[torch.Tensor]] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                wanted.setdefault(n.name, []).append(value)
            return value

    with torch.no_grad():
        for batch in data:
            Noting(traced.module).run(*batch)
    tensors = set(computed(traced))
    stops = computed(traced)[::3]
    values = Values(traced, data)
    seen = []
    for node in values.steps(len(values.nodes), stops):
        seen.append(node)
        for each in (node, *node.all_input_nodes):
            if each in tensors:
                assert all(map(torch.equal, values[each], wanted[each.name]))
    assert seen == stops
    assert values.done == len(values.nodes) - 1


@pytest.mark.parametrize("held", [False, True])
def test_what_was_read_last_is_gone_unless_it_is_held(traced: Traced, held: bool) -> None:
    nodes = computed(traced)
    values = Values(traced, batches(traced))
    early, late = nodes[1], nodes[-2]
    if held:
        values.hold(early)
    values.up_to(late)
    assert (early in values) == held
    assert late in values
    if held:
        assert len(values[early]) == 3
        values.release(early)
        assert early not in values


def test_what_was_asked_for_is_there_though_nobody_reads_it(traced: Traced) -> None:
    copy = traced.copy()
    read = next(node for node in copy.graph.nodes if node.target is torch.ops.aten.relu.default)
    with copy.graph.inserting_after(read):
        unread = copy.graph.call_function(torch.ops.aten.neg.default, (read,))
    values = Values(copy, batches(copy))
    values.up_to(unread)
    assert len(values[unread]) == 3


def test_no_more_than_one_batch_of_what_lies_between_is_alive(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(module: nn.Module, node: fx.Node, operands: Any) -> Any:
        nonlocal most
        value = original(module, node, operands)
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            most = max(most, sum(each() is not None for each in alive))
            alive.append(weakref.ref(value))
        return value

    import graphzip.graph.interpreter as interpreter

    original: Any = interpreter.value_of
    monkeypatch.setattr(interpreter, "value_of", watched)
    values = Values(traced, batches(traced, 6))
    values.up_to(computed(traced)[-1])
    assert most <= 6 + 4  # what is kept at the end of six batches, and what one of them needs on the way


def test_a_fork_that_goes_on_leaves_the_values_where_they_are(traced: Traced) -> None:
    nodes = computed(traced)
    middle = nodes[len(nodes) // 2]
    values = Values(traced, batches(traced))
    values.run_before(middle)
    before = _copies(values)
    fork = values.fork(traced)
    fork.outputs()
    assert before
    for node, tensors in before.items():
        assert all(map(torch.equal, values[node], tensors))
    first, again = values.fork(traced).outputs(), values.outputs()
    assert all(map(torch.equal, _leaves(first), _leaves(again)))


def _copies(values: Values) -> dict[fx.Node, Sequence[torch.Tensor]]:
    nodes = [node for node in computed(values.traced) if node in values]
    return {node: [each.clone() for each in values[node]] for node in nodes}


def _leaves(outputs: Sequence[Any]) -> list[torch.Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(list(outputs)) if isinstance(each, torch.Tensor)]
