"""Which of a plan's passes a budget finds widths or ranks for."""

from __future__ import annotations

from collections.abc import Sequence

from graphzip.errors import PlanError
from graphzip.plan.options import PassOptions
from graphzip.plan.passes import ClusterMerge, DropBlocks, LowRank, PruneChannels
from graphzip.plan.plan import Plan
from graphzip.study.narrowing import Narrows

__all__ = ["open_depth", "planned_passes"]


def planned_passes(
    passes: Sequence[PassOptions], *, has_data: bool
) -> tuple[list[PassOptions], Narrows | None, LowRank | None]:
    """The plan's passes, with what data does best, and those of them whose widths and whose ranks are found.

    Raises `PlanError` where there are none, and where one says a width or a rank itself.
    """
    listed = list(Plan(passes).passes) or [ClusterMerge()]
    _check_depth(listed)
    widths = next((n for n, options in enumerate(listed) if isinstance(options, Narrows)), None)
    open_ranks = (n for n, each in enumerate(listed) if isinstance(each, LowRank) and not _fixed_ranks(each))
    ranks = next(open_ranks, None)
    if widths is None and ranks is None:
        thin = next((n for n, options in enumerate(listed) if isinstance(options, LowRank)), None)
        if thin is not None:
            raise PlanError(
                f"passes[{thin}].{LowRank.kind}.{_fixed_ranks(listed[thin])}: ranks are found here; leave it out"
            )
        raise PlanError(
            "passes: none of them is a ClusterMerge, a PruneChannels or a LowRank, whose widths or ranks could be "
            "found; add ClusterMerge()"
        )
    if widths is not None and ranks is not None and ranks < widths:
        raise PlanError(
            f"passes[{ranks}].{LowRank.kind}: ranks are found of layers that have their widths; put it behind "
            f"passes[{widths}].{listed[widths].kind}"
        )
    narrows = None if widths is None else _with_data(listed[widths], f"passes[{widths}]", has_data=has_data)
    low_rank = None if ranks is None else _ranked(listed[ranks], f"passes[{ranks}]", has_data=has_data)
    for number, options in ((widths, narrows), (ranks, low_rank)):
        if number is not None and options is not None:
            listed[number] = options
    return listed, narrows, low_rank


def open_depth(passes: Sequence[PassOptions]) -> int | None:
    """The place of the pass whose number of residual branches is found, if there is one."""
    open_ = (n for n, each in enumerate(passes) if isinstance(each, DropBlocks) and "keep" not in each.model_fields_set)
    return next(open_, None)


def _check_depth(listed: Sequence[PassOptions]) -> None:
    """Raises `PlanError` where blocks would go behind widths, or nobody says how many."""
    found = next((n for n, options in enumerate(listed) if isinstance(options, Narrows | LowRank)), len(listed))
    behind = next((n for n in range(found, len(listed)) if isinstance(listed[n], DropBlocks)), None)
    if behind is not None:
        raise PlanError(
            f"passes[{behind}].{DropBlocks.kind}: widths and ranks are found for the blocks that stay; put it in front "
            f"of passes[{found}].{listed[found].kind}"
        )
    if (place := open_depth(listed)) is not None:
        raise PlanError(
            f"passes[{place}].{DropBlocks.kind}.keep: only plan_for finds it, for one such pass; say how many blocks "
            "stay"
        )


def _fixed_ranks(options: PassOptions) -> str | None:
    """The option that says ranks itself."""
    return min({"rank", "energy"} & options.model_fields_set, default=None)


def _with_data(given: PassOptions, where: str, *, has_data: bool) -> Narrows:
    assert isinstance(given, Narrows)
    fixed = {"keep", "clusters", "ranking"} & given.model_fields_set
    if fixed:
        raise PlanError(f"{where}.{given.kind}.{min(fixed)}: widths are found here; leave it out")
    if isinstance(given, PruneChannels):
        return PruneChannels(**({"compensate": "data" if has_data else "free"} | given.to_dict()))
    return given.for_data() if has_data else ClusterMerge(**({"compensate": "free"} | given.to_dict()))


def _ranked(given: PassOptions, where: str, *, has_data: bool) -> LowRank:
    assert isinstance(given, LowRank)
    if given.method == "tucker":
        raise PlanError(
            f"{where}.{given.kind}.method: 'tucker' has two ranks, and a budget finds one; use 'svd', 'data-svd' or "
            "'cp-spatial'"
        )
    needs = "compensate: 'data'" if given.compensate == "data" else "method: 'data-svd'"
    if not has_data and (given.compensate == "data" or given.method == "data-svd"):
        raise PlanError(f"{where}.{given.kind}.{needs} needs calibration data; pass calibration=, a list of batches")
    return given.for_data() if has_data else given
