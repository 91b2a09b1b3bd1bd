"""Take out of a network what it holds for nothing; no output changes.

In turns, until nothing is found: channels that are constant, dead, proportional or identical (`redundant`) are merged
into others by what merges identical channels without loss, so that what made them and nothing else becomes dead in its
turn; and linear layers in a row become one (`chains`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

from graphzip.analysis.groups import Analysed
from graphzip.graph.interpreter import Values
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.plan.passes import Minimize
from graphzip.plan.problems import plan_error
from graphzip.report.outcome import Outcome, Table
from graphzip.rewrite.merge import merge_channels
from graphzip_passes.base import PassContext, register_pass
from graphzip_passes.minimize.chains import joined_chains
from graphzip_passes.minimize.redundant import Redundant, examine, partition_of, reparametrized, unfed
from graphzip_passes.minimize.region import Region, regions_of
from graphzip_passes.parts.widths import excluded_by, matches

__all__ = ["minimize"]

logger = logging.getLogger(__name__)

LOST: Final = "channels that differ by no more than the tolerance were made identical"

_TURNS: Final = 100
"""More than any network is deep in layers that are dead one after the other."""

_KINDS: Final = ("dead", "constant", "proportional", "identical")


@register_pass(Minimize, only_reads=True)
def minimize(traced: Traced, options: Minimize, context: PassContext) -> Outcome:
    """Carry `Minimize` out."""
    known = context.known or Analysed.of(traced)
    problems: list[str] = []
    excluded_by(options.exclude, {group.name: group for group in known.groups}, f"{context.where}.exclude", problems)
    if problems:
        raise plan_error(problems)
    before = {group.name: group.size for group in known.groups}
    counts: dict[str, Counter[str]] = {}
    chains: list[tuple[str, str]] = []
    result = traced
    for _ in range(_TURNS):
        result, joined = joined_chains(result) if options.chains else (result, [])
        chains += joined
        result, found = _turn(result, options, Analysed.of(result) if result is not traced else known)
        for each in found:
            counts.setdefault(each.group.name, Counter()).update(each.kinds.values())
        if not found and not joined:
            break
    widths = {
        name: (before[name], before[name] - kinds.total())
        for name, kinds in counts.items()
        if kinds.total() < before.get(name, 0)
    }
    rows = tuple((name, *(str(counts[name][kind] or "") for kind in _KINDS)) for name in counts)
    tables = (Table(("group", *_KINDS), rows),) if rows else ()
    details = {"channels": {name: dict(kinds) for name, kinds in counts.items()}, "joined": [list(c) for c in chains]}
    return Outcome(
        result,
        changed=bool(counts or chains),
        lossless=not options.tolerance or not counts,
        loss=LOST,
        proven=True,
        widths=widths,
        tables=tables,
        details=details,
    )


def _turn(traced: Traced, options: Minimize, known: Analysed) -> tuple[Traced, list[Redundant]]:
    """What is redundant now, all groups at once, and the graph without it."""
    groups = [
        group
        for group in known.groups
        if group.mergeable and not group.whole_blocks and not any(matches(g, group.name) for g in options.exclude)
    ]
    regions = {region.group.name: region for region in regions_of(traced, known)}
    values = _values(traced, [region for region in regions.values() if unfed(traced, region)])
    found = [examine(traced, group, regions.get(group.name), values, options.tolerance) for group in groups]
    found = [each for each in found if each.follows]
    if not found:
        return traced, []
    changed = traced.copy()
    for each in found:
        reparametrized(changed, each)
        logger.info(
            "%s: %s", each.group.name, ", ".join(f"{n} {kind}" for kind, n in Counter(each.kinds.values()).items())
        )
    merges = [(False, each.group.channels, partition_of(each)) for each in found]
    result, _ = merge_channels(changed, known.of_copy(changed).analysis, merges)
    return result, found


def _values(traced: Traced, regions: Sequence[Region]) -> Values:
    """What layers read on the example, of those that read these regions; nothing runs where there are none."""
    leaves = tuple(pytree.tree_leaves((traced.example_inputs, traced.example_kwargs)))
    values = Values(traced, [leaves])
    nodes = {layer.input for region in regions for layer, _ in region.readers}
    for node in nodes:
        values.hold(node)
    for _ in values.steps(max((values.place[node] for node in nodes), default=-1)):
        pass
    return values
