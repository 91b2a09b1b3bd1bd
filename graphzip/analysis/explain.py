"""Why a channel group is what it is: the operators along which its channels run, and the one that pins them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from torch import fx

from graphzip.analysis.channels import Analysis
from graphzip.labels import IntArray, Reason
from graphzip.report import tables

__all__ = ["Explanation", "Step", "explain"]

_VERBS = {
    "producer": "makes the channels",
    "consumer": "sums over them",
    "pointwise": "acts on each of them",
    "pass": "hands them on",
    "pin": "pins them",
}


@dataclass(frozen=True)
class Step:
    """One operator: its node in the traced graph, where in the source and in which module it is called.

    `role` is `"producer"`, `"pointwise"`, `"consumer"`, `"pass"` or `"pin"`; `params` are the parameters of the group
    that it reads.
    """

    node: str
    operator: str
    module: str
    source: str
    role: str
    params: tuple[str, ...]

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.source) if part)
        read = f" ({', '.join(self.params)})" if self.params else ""
        return f"{self.operator:<24} {_VERBS[self.role]}{read}{f'   [{place}]' if place else ''}"


@dataclass(frozen=True)
class Explanation:
    """What `ChannelGroups.explain` found of a `group` of `size` channels; `str()` is for a person. `reason` is why they
    are pinned, if they are.

    For a pinned group `steps` is a shortest path from what makes the channels to what pins them, for another one every
    operator with a parameter of the group, in execution order; `passed_on` counts the operators without one.
    """

    group: str
    size: int
    reason: str | None
    steps: tuple[Step, ...]
    passed_on: int

    def __str__(self) -> str:
        plural = "" if self.size == 1 else "s"
        verdict = f"cannot shrink: {self.reason}" if self.reason else "can shrink"
        lines = [f"{self.group}: {self.size} channel{plural}, {verdict}"]
        lines += [f"{number:>3}  {step}" for number, step in enumerate(self.steps, 1)]
        if self.passed_on:
            count = f"{self.passed_on} other operator{'' if self.passed_on == 1 else 's'}"
            lines.append(f"     {count} in between hand{'s' if self.passed_on == 1 else ''} them on")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class ExplainedGroup(tables.ListedGroup, Protocol):
    """What is asked about a channel group."""

    @property
    def channels(self) -> IntArray: ...
    @property
    def whole_blocks(self) -> bool: ...
    @property
    def why(self) -> Reason | None: ...


def explain(graph: fx.Graph, analysis: Analysis, group: ExplainedGroup, roles: Mapping[str, str]) -> Explanation:
    """Follow the channels of a group; `roles` gives the role of each of its parameters, as the graph names them."""
    level = analysis.coarse if group.whole_blocks and analysis.coarse is not None else analysis.fine
    carries = [node for node, axes in analysis.propagation.axes.items() if _holds(axes, level.classes, group.channels)]
    read = {
        node: tuple(name for name in _params(node) if name in roles) if node.op == "call_function" else ()
        for node in graph.nodes
    }
    carriers = {node for node in carries if node.op != "get_attr"} | {node for node, names in read.items() if names}
    pin = None if group.why is None else next((node for node in graph.nodes if node.name == group.why.node), None)
    path = None if pin is None else _path(carriers, read, roles, pin)
    shown = path if path is not None else [node for node in graph.nodes if node in carriers and read[node]]
    steps = tuple(_step(node, read[node], roles, pinned=node is pin) for node in shown)
    return Explanation(group.name, group.size, group.reason, steps, 0 if path else len(carriers) - len(shown))


def _holds(axes: Any, classes: IntArray, channels: IntArray) -> bool:
    found = [axis for each in axes for axis in each] if isinstance(axes, list) else axes
    return any(bool(np.isin(classes[axis], channels).any()) for axis in found)


def _params(node: fx.Node) -> list[str]:
    """Parameters that an operator reads."""
    return [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]


def _path(
    carriers: set[fx.Node], read: Mapping[fx.Node, tuple[str, ...]], roles: Mapping[str, str], pin: fx.Node
) -> list[fx.Node] | None:
    """A shortest way from a producer to the pin along nodes that carry the channels, against the data flow, too."""
    start = [node for node in carriers if any(roles[name] == "producer" for name in read[node])] or [
        node for node in carriers if read[node]
    ]
    before: dict[fx.Node, fx.Node | None] = dict.fromkeys(start)
    waiting = deque(start)
    while waiting:
        node = waiting.popleft()
        if node is pin:
            path = [node]
            while (previous := before[path[-1]]) is not None:
                path.append(previous)
            return path[::-1]
        for other in _neighbours(node):
            if other not in before and (other in carriers or other is pin):
                before[other] = node
                waiting.append(other)
    return None


def _neighbours(node: fx.Node) -> Iterable[fx.Node]:
    return [*node.users, *node.all_input_nodes]


def _step(node: fx.Node, params: tuple[str, ...], roles: Mapping[str, str], *, pinned: bool) -> Step:
    found = {roles[name] for name in params}
    role = next((each for each in ("producer", "consumer", "pointwise") if each in found), "pass")
    target = node.target if isinstance(node.target, str) else getattr(node.target, "overloadpacket", node.target)
    return Step(
        node=node.name,
        operator=getattr(target, "__name__", str(target)),
        module=node.meta.get("owner") or "",
        source=node.meta.get("source") or "",
        role="pin" if pinned else role,
        params=params,
    )
