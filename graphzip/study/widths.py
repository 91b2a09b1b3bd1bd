"""Which widths a plan may choose from: multiples, floors, and groups that keep the same number.

A runtime computes channels in blocks, and a width that fills none of them costs what the next multiple costs.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphzip.analysis.groups import ChannelGroup
from graphzip.arguments import check_flag, whole
from graphzip.errors import PlanError
from graphzip.report.tables import closest
from graphzip.study.allocation import Budget, Curve, allocate
from graphzip.study.cost_model import Price
from graphzip.study.narrowing import Narrows, RankedLayer

__all__ = ["TARGETS", "Kinds", "WidthRules"]

logger = logging.getLogger(__name__)

TARGETS: Final[Mapping[str, int]] = {"onnxruntime-cpu": 8, "tensorrt": 8, "arm": 4}
"""What widths are multiples of where a runtime is named: channels in a block of onnxruntime's convolutions with AVX2
(two of them with AVX-512), what tensor cores take of float16 numbers, and float32 numbers in a NEON register.
"""

_NAMED: Final = 5  # groups that one message names


@dataclass(frozen=True)
class WidthRules:
    """What every width has to keep to.

    `round_to`: a multiple of this many channels in every block, or of what a sixteenth of the width is, 8 at most,
    where none is given. `min_width`: channels that a group keeps at least. `uniform`: groups of the same kind keep the
    same number (`Kinds`).
    """

    round_to: int | None = None
    min_width: int = 1
    uniform: bool = False

    @classmethod
    def of(cls, options: Narrows | None, *, round_to: Any, min_width: Any, target: Any, uniform: Any) -> WidthRules:
        """The rules that arguments and a plan give. Raises `PlanError` where two of them say the same thing."""
        check_flag(uniform, "uniform")
        said = {"round_to": round_to is not None, "target": target is not None}
        own = None if options is None or "round_to" not in options.model_fields_set else options.round_to
        said[f"the plan's {type(options).__name__}(round_to=...)"] = own is not None
        twice = [name for name, given in said.items() if given]
        if len(twice) > 1:
            raise PlanError(
                f"{twice[0]}: what widths are multiples of is said by {twice[1]} too; leave one of them out"
            )
        if target is not None and target not in TARGETS:
            raise PlanError(f"target: {target!r} is no runtime that is known; {closest(str(target), TARGETS)}")
        multiple = TARGETS[target] if target is not None else round_to
        multiple = multiple if own is None else own
        return cls(
            None if multiple is None else whole(multiple, "round_to", least=1),
            getattr(options, "min_width", 1) if min_width is None else whole(min_width, "min_width", least=1),
            uniform,
        )

    def widths(self, group: ChannelGroup, multiple: int = 1) -> list[int]:
        """What a group may keep, less than all of it and a `multiple`, ascending."""
        blocks = len(group.blocks)
        step = math.lcm(multiple, blocks * (_usual_step(group) if self.round_to is None else self.round_to))
        found = [*range(step, group.size, step)]
        least = max(group.least, self.min_width)
        if self.round_to is None and not found and multiple == 1:
            found = [max(least, blocks)]
        return [width for width in found if least <= width < group.size]

    def ranks(self, full: int, most: int) -> list[int]:
        """The ranks up to `most` that a layer may have, ascending, of a full rank `full`."""
        step = _usual_share(full) if self.round_to is None else self.round_to
        found = {*range(step, most + 1, step)} | ({most} if self.round_to is None else set())
        return sorted(rank for rank in found if rank >= self.min_width)

    def choices(self, groups: Iterable[ChannelGroup], multiples: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """How many channels may go of each group: 0 first, ascending. Widths of those in `multiples` are ones of these.

        Raises `PlanError` where nothing may go of any.
        """
        found, stuck = {}, []
        for group in groups:
            name, widths = group.name, self.widths(group, multiples.get(group.name, 1))
            if widths:
                found[name] = (0, *(group.size - width for width in reversed(widths)))
            elif not group.whole_blocks:
                stuck.append(f"{name} ({group.size} channels)")
        rules = f"round_to={self.round_to or 1} and min_width={self.min_width}"
        if not found and stuck:
            raise PlanError(f"no group has a smaller width that {rules} allow, such as {stuck[0]}; ask for less")
        if not found:
            raise PlanError("no group of the model may shrink; look at graphzip.channel_groups(model, example_inputs)")
        if stuck:
            more = f" and {len(stuck) - _NAMED} more" if len(stuck) > _NAMED else ""
            logger.warning(
                "%s leave no smaller width for %s%s: they stay whole", rules, ", ".join(stuck[:_NAMED]), more
            )
        return found


def _usual_step(group: ChannelGroup) -> int:
    return _usual_share(group.size // len(group.blocks))


def _usual_share(width: int) -> int:
    """onnxruntime computes convolutions in blocks of 8 or 16 channels, and matrix products likewise."""
    return min(8, max(1, 1 << max(width // 16, 1).bit_length() - 1))


class Kinds:
    """Groups that keep the same number: of one size, made and read by tensors that differ in numbers of their names
    alone, such as that of a layer, or which the same number of a config decides (`by_number`); and layers that get the
    same rank, whose names differ so. Curves and prices of the kinds follow from those of the groups, exactly.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        layers: Sequence[RankedLayer] = (),
        *,
        uniform: bool,
        by_number: Mapping[str, int],
    ) -> None:
        kinds = {group.name: by_number.get(group.name, _kind(group)) for group in groups}
        keys: list[Any] = [kinds[group.name] if uniform else group.name for group in groups]
        keys += [(_numberless(each.name), each.found.full, each.ranks) if uniform else each.name for each in layers]
        found = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.of_group = np.array([found[key] for key in keys], dtype=np.int64)
        self.count = len(found)

    def allocate(self, curves: Sequence[Curve], budgets: Sequence[Budget]) -> NDArray[np.int64] | None:
        """How many channels go of every group, or None where the budgets cannot be met."""
        found = allocate(self._curves(curves), [Budget(self._price(each.price), each.most) for each in budgets])
        if found is None:
            return None
        gone: NDArray[np.int64] = found[self.of_group]
        return gone

    def _curves(self, curves: Sequence[Curve]) -> list[Curve]:
        """Losses of a kind add up."""
        found: list[Curve | None] = [None] * self.count
        for kind, curve in zip(self.of_group.tolist(), curves, strict=True):
            known = found[kind]
            found[kind] = curve if known is None else Curve(curve.gone, known.loss + curve.loss)
        return [curve for curve in found if curve is not None]

    def _price(self, price: Price) -> Price:
        """What a channel of every group of a kind costs together."""
        along = []
        for fractions in price.along:
            total = np.zeros((len(fractions), self.count))
            np.add.at(total.T, self.of_group, fractions.T)
            along.append(total)
        return replace(price, along=tuple(along))


def _kind(group: ChannelGroup) -> tuple[Any, ...]:
    params = sorted((_numberless(each.param), each.dim, each.role) for each in group.params)
    return group.size, len(group.blocks), tuple(params)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
