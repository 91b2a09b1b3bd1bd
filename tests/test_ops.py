"""Every operator's rule: exchanging channels wherever the analysis says they stand changes no output.

The cases are in `op_cases_*.py`. Each one is traced once; its groups are compared with what the case expects, channels
of its mergeable groups are exchanged in every parameter slice they own, and planted duplicates are merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import op_cases_linear
import op_cases_movement
import op_cases_norm
import op_cases_pointwise
import op_cases_positions
import op_cases_uneven
import pytest
import torch
from op_cases import Case
from planting import plant, relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.channels import analyse
from graphzip.analysis.groups import ChannelGroup, ChannelGroups, channel_groups_of
from graphzip.graph.trace import Traced, trace
from graphzip.ops import OPS

FAMILIES = (op_cases_pointwise, op_cases_movement, op_cases_linear, op_cases_norm, op_cases_positions, op_cases_uneven)
CASES: dict[str, Case] = {name: case for family in FAMILIES for name, case in family.CASES.items()}

UNREACHABLE: dict[Any, str] = {
    torch.ops.aten.lift_fresh_copy.default: "every graph is traced without the copies that torch.export lifts",
}
"""Targets of the table that no model brings into a traced graph, with the reason."""

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Probe:
    """A case, built and analysed."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    traced: Traced
    groups: ChannelGroups

    def free(self) -> list[ChannelGroup]:
        return [group for group in self.groups if group.mergeable]


@lru_cache(maxsize=None)
def probe(name: str) -> Probe:
    model, inputs = CASES[name].build()
    traced = trace(model, inputs)
    return Probe(model, inputs, traced, channel_groups_of(traced, analyse(traced.graph)))


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_operator_has_a_case() -> None:
    covered = {target for case in CASES.values() for target in case.targets} | UNREACHABLE.keys()
    assert not OPS.keys() - covered, "add a case to the op_cases_*.py of its kind"


def test_no_case_is_about_an_unknown_operator() -> None:
    assert not {target for case in CASES.values() for target in case.targets} - OPS.keys()
    assert not UNREACHABLE.keys() - OPS.keys()
    assert len(CASES) == sum(len(family.CASES) for family in FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_groups_are_what_the_case_expects(name: str) -> None:
    case, found = CASES[name], probe(name)
    missing = set(case.targets) - {node.target for node in found.traced.graph.nodes}
    assert not missing, "the graph lacks them"
    assert {group.name: group.size for group in found.free()} == dict(case.free), str(found.groups)
    if case.why:
        reasons = [group.reason or "" for group in found.groups if group.name == "make"]
        assert case.why in reasons[0], reasons


# --- exchanging channels -------------------------------------------------------------------------------------------


def exchanged(traced: Traced, group: ChannelGroup, order: Sequence[int]) -> Any:
    """The outputs after channel `i` of a group has taken the place of channel `order[i]` in every slice it owns."""
    module = copy.deepcopy(traced.module)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, moves in moves_of(group, order).items():
            state[name].copy_(_move(state[name], moves))
        return module(*traced.example_inputs)


@dataclass
class Moves:
    """Where the slices of one parameter go: `whole[dim]` positions to positions, `columns` for a grouped convolution
    `(first row of the group, column)` to the same.
    """

    whole: dict[int, dict[int, int]] = field(default_factory=dict)
    columns: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    height: int = 0


def moves_of(group: ChannelGroup, order: Sequence[int]) -> dict[str, Moves]:
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


def _move(tensor: Tensor, moves: Moves) -> Tensor:
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


FREE = [name for name, case in CASES.items() if case.free]


@pytest.mark.parametrize("name", FREE)
def test_exchanging_channels_changes_no_output(name: str) -> None:
    found = probe(name)
    with torch.no_grad():
        before = found.model(*found.inputs)
    assert found.free()
    for group in found.free():
        for order in orders(group):
            after = exchanged(found.traced, group, order)
            assert relative(before, after) <= TOLERANCE, f"{group.name}: {order}"


# --- merging channels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FREE)
def test_planted_duplicates_merge(name: str) -> None:
    found = probe(name)
    model = copy.deepcopy(found.model)
    clusters = plant(model, found.groups, 1)
    assert clusters
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), found.inputs)
    more = tuple(torch.cat([x, x.flip(-1)[:1]]) for x in found.inputs)
    with torch.no_grad():
        assert relative(model(*found.inputs), compiled.module(*found.inputs)) <= 1e-9
        assert relative(model(*more), compiled.module(*more)) <= 1e-9
    assert sum(p.numel() for p in compiled.module.parameters()) < sum(p.numel() for p in model.parameters())
