"""What widths and ranks are chosen for: groups of channels, and layers that may be stored as two thin ones.

Of either so much may be gone. What is left is a width or a rank; a layer of which nothing is gone is dense.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphzip.analysis.groups import Analysed
from graphzip.analysis.stacked_experts import row_steps
from graphzip.errors import PlanError
from graphzip.graph.batches import Given
from graphzip.graph.traced import Traced
from graphzip.plan.passes import LowRank
from graphzip.study.allocation import Curve
from graphzip.study.cost_model import prices_of
from graphzip.study.narrowing import Narrows, RankedLayer
from graphzip.study.widths import Kinds, WidthRules
from graphzip_passes.low_rank.low_rank import cuttable
from graphzip_passes.parts.widths import WidthOptions, resolve

__all__ = ["Units", "ranked_layers"]

logger = logging.getLogger(__name__)


def ranked_layers(
    traced: Traced, options: LowRank | None, rules: WidthRules, batches: Given, where: str
) -> dict[str, RankedLayer]:
    """The layers whose ranks are found, by what they are called beside groups."""
    if options is None:
        return {}
    known = [
        RankedLayer(each, tuple(rules.ranks(each.full, each.most)))
        for each in cuttable(traced, options, where, batches)
    ]
    return {layer.name: layer for layer in known if layer.ranks}


class Units:
    """The groups that may shrink and the layers whose rank may fall. `choices` are how much may be gone, ascending.

    `options` are those of the pass whose widths are found, if any. Where it is given which groups one number decides,
    groups `by_number` keep the same width, and others stay whole. Raises `PlanError` where there is nothing to choose.
    """

    def __init__(
        self,
        traced: Traced,
        known: Analysed,
        options: Narrows | None,
        layers: Mapping[str, RankedLayer],
        rules: WidthRules,
        *,
        by_number: Mapping[str, int] | None = None,
    ) -> None:
        self.by_number = by_number
        self.may_shrink: list[str] = []
        self.traced, self.analysis, self.groups, self.layers = traced, known.analysis, known.groups, layers
        self.has_widths = options is not None
        found = {} if options is None else self._of_groups(options, rules)
        if not found and not layers:
            raise PlanError("no layer costs less at any rank that it may have; add ClusterMerge() to the passes")
        self.choices: dict[str, tuple[int, ...]] = found | {name: layer.gone for name, layer in layers.items()}
        chosen = [self.groups[name] for name in found]
        self.prices = prices_of(traced, known.analysis, chosen, [layer.thin for layer in layers.values()])
        self.kinds = Kinds(chosen, list(layers.values()), uniform=rules.uniform, by_number=self.by_number or {})

    def _of_groups(self, options: Narrows, rules: WidthRules) -> dict[str, tuple[int, ...]]:
        try:
            self.may_shrink = names = [*resolve(WidthOptions(1e-9, options.exclude), self.groups)]
            if self.by_number is not None and not self.by_number.keys() & set(names):
                raise PlanError(
                    "uniform: the model's config says no width of what may shrink; leave uniform out, and save the "
                    "slim model as one file"
                )
            mine = (self.groups[n] for n in names if self.by_number is None or n in self.by_number)
            return rules.choices(mine, self._steps() if rules.uniform else {})
        except PlanError as error:
            if not self.layers:
                raise
            logger.warning("widths stay as they are: %s", error)
            return {}

    def _steps(self) -> dict[str, int]:
        """Of what number the widths of groups are multiples where the model's own class is to compute them."""
        steps = row_steps(self.traced.graph)
        found: dict[str, int] = {}
        for name in self.may_shrink:
            own = [steps.get(self.traced.local(each.param), 1) for each in self.groups[name].params if each.dim]
            found[name] = max(own, default=1)
        return found

    def size(self, name: str) -> int:
        """How much there is of a group or a layer."""
        return self.layers[name].size if name in self.layers else self.groups[name].size

    def widths(self, gone: NDArray[np.int64]) -> dict[str, int]:
        """What is left, by name."""
        return {name: self.size(name) - int(count) for name, count in zip(self.choices, gone, strict=True)}

    @property
    def smallest(self) -> str:
        """In words: what is as small as it may be where a budget is out of reach."""
        sides = ["group at its smallest width"] if self.has_widths else []
        sides += ["layer at its lowest rank"] if self.layers else []
        return " and every ".join(sides)

    @cached_property
    def order(self) -> list[int] | None:
        """Where groups and layers stand in the order in which they run; nothing where they are listed in it."""
        if not self.layers:
            return None
        first: dict[str, int] = {}
        for number, node in enumerate(self.traced.graph.nodes):
            for source in node.all_input_nodes:
                first.setdefault(str(source.target), number)
        tensors = {name: [layer.found.layer.name] for name, layer in self.layers.items()}
        for name in self.choices.keys() - tensors.keys():
            tensors[name] = [self.traced.local(each.param) for each in self.groups[name].params]
        return [min(first[each] for each in tensors[name]) for name in self.choices]

    def alone(self, curves: Sequence[Curve]) -> list[list[Curve]]:
        """The curves; where there are both groups and layers, also those of which either stay as they are."""
        is_layer = [name in self.layers for name in self.choices]
        if all(is_layer) or not any(is_layer):
            return [list(curves)]
        some = [
            [
                curve if each is moves else Curve(curve.gone[:1], curve.loss[:1])
                for curve, each in zip(curves, is_layer, strict=True)
            ]
            for moves in (False, True)
        ]
        return [list(curves), *some]

    def faster(self, curves: Sequence[Curve], fast: Mapping[str, Sequence[int]]) -> list[Curve]:
        """The curves of layers with only so much gone as `fast` has for them."""
        found = []
        for name, curve in zip(self.choices, curves, strict=True):
            may = np.isin(curve.gone, [0, *fast[name]]) if name in fast else np.ones(curve.gone.size, dtype=bool)
            found.append(Curve(curve.gone[may], curve.loss[may]))
        return found

    def narrowed(self, options: Narrows, widths: Mapping[str, int]) -> Narrows:
        """Every group that may shrink by name, those with a `#n` first, for a name without one matches them too."""
        mine = [name for name in self.choices if name not in self.layers]
        if self.by_number is not None:  # others are named too, for the name of one may be the beginning of another's
            mine = self.may_shrink
        names = sorted(mine, key=lambda name: "#" not in name)
        keep = {name: widths.get(name, self.groups[name].size) for name in names}
        return options.model_copy(update={"keep": keep, "round_to": 1})

    def thinned(self, options: LowRank, widths: Mapping[str, int]) -> LowRank:
        """Every layer that is not dense by name."""
        ranks = {layer.found.name: widths.get(name, layer.size) for name, layer in self.layers.items()}
        full = {layer.found.name: layer.size for layer in self.layers.values()}
        return options.model_copy(update={"rank": {name: rank for name, rank in ranks.items() if rank < full[name]}})
