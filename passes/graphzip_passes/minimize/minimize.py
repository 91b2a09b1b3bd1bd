"""Take out of a network what it holds for nothing; no output changes.

In turns, until nothing is found: channels that are constant, dead, proportional or identical (`redundant`) are merged
into others by what merges identical channels without loss, or dropped where norms count them, so that what made them
and nothing else becomes dead in its turn; and layers in a row become one (`chains`).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from torch import fx

from graphzip.analysis.groups import Analysed
from graphzip.graph.interpreter import Values
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.plan.passes import Minimize
from graphzip.plan.problems import plan_error
from graphzip.report.outcome import Outcome, Table
from graphzip.rewrite.layout import Layout
from graphzip.rewrite.merge import drop_channels, merge_channels
from graphzip_passes.base import PassContext, register_pass
from graphzip_passes.minimize.chains import joined_chains
from graphzip_passes.minimize.redundant import Redundant, examine, partition_of, reparametrized, wanted
from graphzip_passes.minimize.region import regions_of
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
    """What is redundant now, all groups at once, and the graph without it; what is dropped goes first."""
    groups = [
        group
        for group in known.groups
        if group.mergeable and group.exact and not any(matches(g, group.name) for g in options.exclude)
    ]
    regions = {region.group.name: region for region in regions_of(traced, known, groups)}
    values = _values(traced, set[fx.Node]().union(*(wanted(traced, region) for region in regions.values())))
    found, taken = list[Redundant](), set[str]()
    for group in sorted(groups, key=lambda each: not each.whole_blocks):
        if group.name not in taken:
            redundant = examine(traced, group, regions.get(group.name), values, options.tolerance)
            found += redundant
            taken.update(group.overlaps if redundant else ())
    found = [each for each in found if each.drops] or found
    if not found:
        return traced, []
    changed = traced.copy()
    for each in found:
        reparametrized(changed, each)
        counts = Counter(each.kinds.values())
        logger.info("%s: %s", each.group.name, ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    analysis = known.of_copy(changed).analysis
    parts = [(each.group.whole_blocks, each.group.channels, partition_of(each)) for each in found]
    if found[0].drops:
        return drop_channels(changed, Layout.of(analysis, parts, drops=True)), found
    return merge_channels(changed, analysis, parts)[0], found


def _values(traced: Traced, nodes: set[fx.Node]) -> Values:
    """What operators hold on the example; nothing runs where none are asked for."""
    leaves = tuple(pytree.tree_leaves((traced.example_inputs, traced.example_kwargs)))
    values = Values(traced, [leaves])
    for node in nodes:
        values.hold(node)
    for _ in values.steps(max((values.place[node] for node in nodes), default=-1)):
        pass
    return values
