"""Which widths the config of a model of `transformers` can say: found out by narrowing what each number decides."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphzip.api import compile
from graphzip.formats.huggingface import has_config, is_sayable, sizes_by_number
from graphzip.plan.passes import ClusterMerge
from graphzip.plan.plan import Plan
from graphzip.progress import counted
from graphzip.study.earlier import Begun
from graphzip.study.narrowing import Narrows
from graphzip.study.units import Units
from graphzip.traces import Trace, trace

__all__ = ["sayable"]

logger = logging.getLogger(__name__)


def sayable(
    units: Units, options: Narrows | None, begun: Begun, source: nn.Module | Trace, view: Mapping[str, Any]
) -> dict[str, int] | None:
    """The groups that may shrink where the result is to be a folder of `transformers`, each with the place of the
    number in the config that says its width, and that of all others of the same number. `None` for other models, and
    for parts of one.

    Of the groups that a number decides one width is tried, and a config looked for that has it and computes the same.
    """
    model, scope = (source.model, source.view["scope"]) if isinstance(source, Trace) else (source, view["scope"])
    if options is None or scope is not None or not has_config(model):
        return None
    given = source if isinstance(source, Trace) else trace(source, **view)
    blind = {"clustering": "even", "compensate": "none", "features": "weights"}
    plain = options.model_copy(update=blind if isinstance(options, ClusterMerge) else {"compensate": "none"})
    sets = _by_number(units, model)
    found: dict[str, int] = {}
    for number, names in counted(list(enumerate(sets)), "looking for a config", [each[0] for each in sets]):
        choices = {units.choices[name] for name in names}
        if len(choices) > 1 or found.keys() & set(names):
            continue
        gone = sorted(choices.pop())
        widths = {name: units.size(name) - gone[len(gone) // 2] for name in names}
        compiled = compile(given, Plan([*begun.passes, units.narrowed(plain, widths)]))
        if is_sayable(compiled, model):
            found |= dict.fromkeys(names, number)
    logger.info("the config says the widths of %d groups; others stay whole", len(found))
    return found


def _by_number(units: Units, model: nn.Module) -> list[list[str]]:
    """The groups with a size that a number of the config decides, for each number that decides any."""
    places = {
        name: {(each.param, each.dim) for each in units.groups[name].params}
        for name in units.choices
        if name not in units.layers
    }
    sets = [[name for name, mine in places.items() if mine & sizes] for sizes in sizes_by_number(model)]
    return [list(names) for names in dict.fromkeys(map(tuple, sets)) if names]
