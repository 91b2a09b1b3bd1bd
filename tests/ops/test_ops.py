"""Every operator's rule: exchanging channels wherever the analysis says they stand changes no output.

The cases are in `op_cases_*.py`. Each one is traced once; its groups are compared with what the case expects, channels
of its mergeable groups are exchanged in every parameter slice they own, and planted duplicates are merged.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from op_case_table import CASES, FAMILIES
from planting import plant, relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.groups import ChannelGroup, ChannelGroups
from graphzip.graph.traced import Traced
from graphzip.ops import OPS

COVERED = {target for case in CASES.values() for target in case.targets}

UNREACHABLE: dict[Any, str] = {
    torch.ops.aten.lift_fresh_copy.default: "tracing drops the copies that torch.export makes of constants",
    torch.ops.aten.unbind.int: "tracing makes a select of every part that is read",
}
"""Targets of the table that no model brings into a traced graph, with the reason."""

EXCHANGED = 1e-12
MERGED = 1e-9


@dataclass(frozen=True)
class Probe:
    """A case, built and analysed."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    trace: gz.Trace
    groups: ChannelGroups

    @property
    def traced(self) -> Traced:
        return self.trace.current()

    def free(self) -> list[ChannelGroup]:
        return [group for group in self.groups if group.mergeable]


@cache
def probe(name: str) -> Probe:
    model, inputs = CASES[name].build()
    traced = gz.trace(model, inputs)
    return Probe(model, inputs, traced, gz.channel_groups(traced))


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_operator_has_a_case() -> None:
    missing = sorted(map(str, OPS.keys() - COVERED - UNREACHABLE.keys()))
    assert not missing, "add a case to the op_cases_*.py of its kind"


def test_no_case_is_about_an_unknown_operator() -> None:
    assert not COVERED - OPS.keys()
    assert not UNREACHABLE.keys() - OPS.keys()
    assert not UNREACHABLE.keys() & COVERED
    assert len(CASES) == sum(len(family.CASES) for family in FAMILIES), "two families have a case of the same name"


_BY_AN_OPERATOR = re.compile(r"(?P<operator>\w+) \(node (?P<node>\w+), \w+\.py:\d+ in \w+\) \w+")


@pytest.mark.parametrize("name", CASES)
def test_groups_are_what_the_case_expects(name: str) -> None:
    """Mergeable groups and their sizes; the reason of a pinned one names the operator, its node and its line."""
    case, found = CASES[name], probe(name)
    nodes = {node.name: node for node in found.traced.graph.nodes}
    missing = set(case.targets) - {node.target for node in nodes.values()}
    assert not missing, "the graph lacks them"
    if case.free is not None:
        assert {group.name: group.size for group in found.free()} == dict(case.free), str(found.groups)
    if case.why:
        reason = next(group.reason or "" for group in found.groups if group.name == "make")
        assert case.why in reason
        if "(node" in reason:
            named = _BY_AN_OPERATOR.match(reason)
            assert named is not None, reason
            assert nodes[named["node"]].target.overloadpacket.__name__ == named["operator"]


# --- exchanging channels -------------------------------------------------------------------------------------------


@dataclass
class Moves:
    """Where the slices of one parameter go: `whole[dim]` positions to positions, `columns` for a grouped convolution
    `(first row of the group, column)` to the same.
    """

    whole: dict[int, dict[int, int]] = field(default_factory=dict)
    columns: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    height: int = 0


def moves_of(group: ChannelGroup, order: Sequence[int]) -> dict[str, Moves]:
    """By parameter, what happens when channel `i` takes the place of channel `order[i]`."""
    found: dict[str, Moves] = {}
    for target, source in enumerate(order):
        for to, of in zip(group.slices(target), group.slices(source), strict=True):
            assert (to.param, to.dim, to.role) == (of.param, of.dim, of.role)
            moves = found.setdefault(to.param, Moves())
            if to.rows is None or of.rows is None:
                moves.whole.setdefault(to.dim, {})[of.index] = to.index
            else:
                assert to.dim == 1
                moves.height = to.rows[1] - to.rows[0]
                moves.columns[of.rows[0], of.index] = to.rows[0], to.index
    return found


def moved(tensor: Tensor, moves: Moves) -> Tensor:
    rows = moves.whole.get(0, {})
    result = tensor.clone()
    for (start, column), (other, place) in moves.columns.items():
        height = moves.height
        assert rows.get(start, start) // height == other // height, "columns leave their group without its rows"
        result[start : start + height, place] = tensor[start : start + height, column]
    for dim, places in moves.whole.items():
        sources, targets = torch.tensor(list(places)), torch.tensor(list(places.values()))
        result = result.index_copy(dim, targets, result.index_select(dim, sources))
    return result


def exchanged(traced: Traced, group: ChannelGroup, order: Sequence[int]) -> Any:
    """The outputs after channel `i` of a group has taken the place of channel `order[i]` in every slice it owns."""
    module = copy.deepcopy(traced.module)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, moves in moves_of(group, order).items():
            state[name].copy_(moved(state[name], moves))
        return module(*traced.example_inputs)


def orders(group: ChannelGroup) -> Iterator[list[int]]:
    """The first two channels of a block exchanged, and every block shuffled."""
    swapped = list(range(group.size))
    first, second = next(block for block in group.blocks if len(block) > 1)[:2]
    swapped[first], swapped[second] = second, first
    yield swapped
    shuffled = list(range(group.size))
    generator = torch.Generator().manual_seed(group.size)
    for block in group.blocks:
        for place, other in zip(block, torch.randperm(len(block), generator=generator).tolist(), strict=True):
            shuffled[place] = block[other]
    yield shuffled


FREE = [name for name, case in CASES.items() if case.free != {}]


@pytest.mark.parametrize("name", FREE)
def test_exchanging_channels_changes_no_output(name: str) -> None:
    found = probe(name)
    with torch.no_grad():
        before = found.model(*found.inputs)
    for group in found.free():
        for order in orders(group):
            after = exchanged(found.traced, group, order)
            assert relative(before, after) <= EXCHANGED, f"{group.name}: {order}"


def test_exchanging_notices_a_wrong_group() -> None:
    """Rows of `make` alone, without the columns that read them: the outputs move."""
    found = probe("rectifiers")
    group = found.groups["make"]
    alone = ChannelGroup(
        **{**vars(group), "params": tuple(param for param in group.params if param.role != "consumer")}
    )
    with torch.no_grad():
        before = found.model(*found.inputs)
    assert relative(before, exchanged(found.traced, alone, [1, 0, 2, 3, 4, 5])) > 1e-3


# --- merging channels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FREE)
def test_planted_duplicates_merge(name: str) -> None:
    """With two samples as traced, and with three; several times where the case leaves open what may be merged."""
    found = probe(name)
    model, before = found.model, copy.deepcopy(found.model.state_dict())
    for seed in range(1) if CASES[name].free else range(3):
        clusters = plant(model, found.groups, seed, fraction=(0.5, 0.3, 0.8)[seed])
        compiled = gz.compile(found.trace, gz.Plan([gz.ClusterMerge(clusters=clusters)]))
        more = tuple(torch.cat([x, x.flip(-1)[:1]]) for x in found.inputs)
        with torch.no_grad():
            assert relative(model(*found.inputs), compiled.module(*found.inputs)) <= MERGED, clusters
            assert relative(model(*more), compiled.module(*more)) <= MERGED, clusters
        merged = any(len(members) > 1 for parts in clusters.values() for members in parts)
        assert (_size(compiled.module) < _size(model)) == merged
        model.load_state_dict(before)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- what a person reads -------------------------------------------------------------------------------------------


class Solver(nn.Module):
    """Channels that go through an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(3, 4)
        self.use = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x)
        return self.use(torch.linalg.cross(y[..., :3], y[..., 1:])) if x.is_complex() else self.use(torch.linalg.inv(y))


def test_the_reason_of_an_unknown_operator() -> None:
    groups = gz.channel_groups(Solver(), (torch.randn(2, 4, 3),))
    lines, start = inspect.getsourcelines(Solver.forward)
    line = start + next(number for number, text in enumerate(lines) if "linalg.inv(y)" in text)
    assert groups["make"].reason == (
        f"linalg_inv (node linalg_inv, test_ops.py:{line} in forward) is not understood; "
        "add an OpSpec for it in graphzip/ops/"
    )
    assert not groups["make"].mergeable
    assert "add an OpSpec for it" in " ".join(str(groups).split())
