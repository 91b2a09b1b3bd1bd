"""What the nodes of a graph hold on calibration data, one after the other and no longer than they are read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from graphzip.graph.batches import Given, shared
from graphzip.graph.state import attach, get_tensor, is_persistent, like
from graphzip.graph.traced import Traced

__all__ = ["Values", "stream", "value_of"]


def value_of(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a fetch or a call gives, for `values` of its operands."""
    if node.op == "get_attr":
        return get_tensor(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def stream(
    module: fx.GraphModule,
    order: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    *,
    live: Collection[fx.Node],
    seen: Callable[[fx.Node, Any], Any] | None = None,
) -> Iterator[fx.Node]:
    """Compute nodes one after the other into `values`, each right after it was yielded.

    What none of those that follow reads any more is dropped, but for what is `live` in the end. `seen` is told of each
    value and gives what stands in its place from there on.
    """
    last = {source: node for node in order for source in node.all_input_nodes if source not in live}
    spent: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        spent.setdefault(node, []).append(source)
    for node in order:
        yield node
        value = value_of(module, node, values)
        values[node] = value if seen is None else seen(node, value)
        for source in spent.get(node, ()):
            values.pop(source, None)


class Values:
    """The values of a graph's nodes on batches of inputs: `values[node]` is a list with one value per batch.

    Nodes run in order, when `run` or `up_to` is told to; those that nobody waits for batch by batch, so that no more
    than one batch of what lies between is in memory. A value is dropped once every reader has run, unless it is held.
    `batches` have one entry per placeholder of the graph. Where they are divided among processes, values are those of
    this one: `shared` tells which count, and adds up.
    """

    def __init__(self, traced: Traced, batches: Given) -> None:
        self.traced = traced
        self.shared = shared(batches)
        self.batches = self.shared.run
        self.nodes: list[fx.Node] = list(traced.graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self._inputs = [node for node in self.nodes if node.op == "placeholder"]
        self._readers = Counter({node: len(node.users) for node in self.nodes})
        self._values: dict[fx.Node, list[Any]] = {}
        self._done = 0

    def __getitem__(self, node: fx.Node) -> list[Any]:
        return self._values[node]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    def computed(self, node: fx.Node, given: Mapping[fx.Node, Sequence[Any]] | None = None) -> list[Any]:
        """The values of a node whose operands are there; `given` stands in for some of them. Nothing is kept."""
        operands = {each: (given or {}).get(each) or self[each] for each in node.all_input_nodes}
        return [
            self._on(number, node, {each: values[number] for each, values in operands.items()})
            for number in range(len(self.batches))
        ]

    def _on(self, number: int, node: fx.Node, operands: Mapping[fx.Node, Any]) -> Any:
        """What a node, or an input, is on the batch with this number."""
        if node.op == "placeholder":
            return self.batches[number][self._inputs.index(node)]
        return self._value(node, operands)

    def _value(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> Any:
        """What a node gives on one batch."""
        return value_of(self.traced.module, node, operands)

    @torch.no_grad()
    def run(self, node: fx.Node) -> None:
        """Compute a node, again where it has run before."""
        self._values.pop(node, None)
        self._values[node] = self.computed(node)

    def fork(self, traced: Traced) -> Values:
        """Values of another graph, or of this one, that stand where these stand.

        All that has run here must compute the same there; nodes correspond by name, and what has none to correspond to
        has not run.
        """
        other = Values(traced, self.shared)
        done = {node.name for node in self.nodes[: self._done]}
        other._done = next(
            place for place, node in enumerate(other.nodes) if node.name not in done and node.op != "get_attr"
        )
        here = {node.name: values for node, values in self._values.items()}
        for node in other.nodes[: other._done]:
            left = sum(other.place[user] >= other._done for user in node.users)
            other._readers[node] = left
            if left and node.op == "get_attr":
                other.run(node)
            elif left:
                other._values[node] = list(here[node.name])
        return other

    def steps(self, last: int, stops: Collection[fx.Node] = ()) -> Iterator[fx.Node]:
        """Run the nodes that have not run, up to the one at place `last`, and come by `stops` on the way.

        A node of these has run when it comes, and is finished when the next one is asked for.
        """
        end = min(last + 1, len(self.nodes) - 1)
        for place in sorted(place for each in stops if self._done <= (place := self.place[each]) < end):
            self._pass(place)
            self.run(self.nodes[place])
            yield self.nodes[place]
            self.finish(self.nodes[place])
            self._done += 1
        self._pass(end)

    def _pass(self, end: int) -> None:
        """Run and finish the nodes before place `end`."""
        nodes = self.nodes[self._done : end]
        self._done = max(self._done, end)
        spent: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            self._readers.subtract(node.all_input_nodes)
            spent[node] = [source for source in node.all_input_nodes if self._readers[source] <= 0]
        kept: dict[fx.Node, list[Any]] = {node: [] for node in nodes if self._readers[node] > 0 or node is nodes[-1]}
        for number in range(len(self.batches)):
            self._run_batch(number, spent, kept)
        for source in itertools.chain(*spent.values()):
            self._values.pop(source, None)
        self._values |= kept

    @torch.no_grad()
    def _run_batch(
        self, number: int, spent: Mapping[fx.Node, Sequence[fx.Node]], kept: Mapping[fx.Node, list[Any]]
    ) -> None:
        """Run the nodes that `spent` has, with what they are the last to read, on one batch; add to what is `kept`."""
        made: dict[fx.Node, Any] = {}
        for node, sources in spent.items():
            here = {each: made[each] if each in made else self[each][number] for each in node.all_input_nodes}
            made[node] = self._on(number, node, here)
            for source in sources:
                if made.pop(source, self) is self:
                    self._values[source][number] = None
        for node, values in kept.items():
            values.append(made[node])

    @torch.no_grad()
    def outputs(self) -> list[Any]:
        """Run what is left: what the graph gives on every batch."""
        for _ in self.steps(len(self.nodes)):
            pass
        result = self.nodes[self._done].args[0]
        return [fx.node.map_arg(result, partial(self._of, number)) for number in range(len(self.batches))]

    def _of(self, number: int, node: fx.Node) -> Any:
        return self._values[node][number]

    def finish(self, node: fx.Node) -> None:
        """The node has run for the last time: what nobody reads any more is dropped."""
        for each in node.all_input_nodes:
            self.release(each)

    def up_to(self, node: fx.Node) -> None:
        """Run and finish every node up to this one that has not been."""
        for _ in self.steps(self.place[node]):
            pass

    def run_before(self, node: fx.Node) -> None:
        """Run and finish every node before this one."""
        for _ in self.steps(self.place[node] - 1):
            pass

    @property
    def done(self) -> int:
        """How many nodes have run and are finished."""
        return self._done

    def hold(self, node: fx.Node) -> None:
        """Keep the values of a node until they are released."""
        self._readers[node] += 1

    def release(self, node: fx.Node) -> None:
        """One reader less."""
        self._readers[node] -= 1
        if self._readers[node] <= 0:
            self._values.pop(node, None)

    def set_tensor(self, node: fx.Node, value: torch.Tensor) -> None:
        """Give a parameter or buffer that the node fetches another value, in its dtype and as what it is."""
        name, module = str(node.target), self.traced.module
        made = like(value, get_tensor(module, name))
        attach(module, name, made, persistent=is_persistent(module, name))
        if node in self._values:
            self.run(node)
