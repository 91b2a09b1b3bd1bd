"""Scaling: the same architecture with wider layers, to be squeezed back by Centripetal SGD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from graphzip.analysis.channels import analyse
from graphzip.analysis.groups import ChannelGroup, ChannelGroups, channel_groups_of
from graphzip.arguments import check_name, check_seed
from graphzip.boundary import public
from graphzip.calibration import drift, with_submodule
from graphzip.calls import Signature
from graphzip.errors import PlanError, RewriteError
from graphzip.graph.copies import follow_modes
from graphzip.graph.restore_modules import to_module
from graphzip.report.tables import closest
from graphzip.rewrite.widen import grow_channels
from graphzip.tracing.trace import trace
from graphzip_passes.parts.widths import matches

__all__ = ["widen"]

_MOST = 1 << 20  # times as wide
_SAME = 1e-4  # outputs of a widened model may differ by the rounding of float32, relative to the largest


@public
def widen(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    factor: float | Mapping[str, float | int],
    *,
    exclude: Sequence[str] = (),
    init: Literal["preserve", "fresh"] = "preserve",
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
) -> nn.Module:
    """The same architecture with every channel group `factor` times as wide: the model to train and squeeze back.

    Scaling and Squeezing (C-SGD, section 3.7): train the wide model, then bring it back to the widths that it had with
    `ClusterMerge(keep=channel_groups(model, example_inputs).widths())`; the result's state dict fits the original
    class. Coupled channels grow together, and names stay. Branches that exist only in training are not in the result.

    `factor` is a number of at least 1, or a mapping from group-name globs to one (a float) or to a number of channels
    (an int); the first match wins and groups that no key matches stay as they are. Widths are rounded to the nearest
    number that all blocks of a group can share. Groups that cannot be merged, and those that `exclude` names by globs,
    stay as wide as they are.
    With a `scope` only that submodule grows, and the result is the whole model with it. `seed` fixes what is drawn at
    random, `dynamic_shapes` are those of `prepare`.

    `init="preserve"` repeats channels and splits what reads them, so that the outputs are those of `model`; that is
    checked. `"fresh"` then initialises every layer anew by its `reset_parameters`.

    Raises `PlanError` for a factor or a name that does not fit, `RewriteError` where the widths cannot be had or the
    outputs cannot be preserved (a norm over channels of which some have more copies than others), `TraceError`,
    `ExampleInputError`.
    """
    check_seed(seed)
    if isinstance(exclude, str) or not isinstance(exclude, Sequence) or not all(isinstance(g, str) for g in exclude):
        raise PlanError(f"exclude: {exclude!r} is not a list of globs on names")
    if init not in ("preserve", "fresh"):
        raise PlanError(f"init: {init!r} is unknown; write 'preserve' or 'fresh'")
    with torch.inference_mode(False), torch.no_grad():
        traced = trace(model, example_inputs, scope=scope, dynamic_shapes=dynamic_shapes)
        analysis = analyse(traced.graph)
        groups = channel_groups_of(traced, analysis)
        copies = {
            int(group.channels[channel]): count
            for group, width in _widths(groups, factor, exclude)
            for channel, count in _copies(group, width)
        }
        grown: nn.Module = to_module(grow_channels(traced, analysis, copies, seed=seed, preserves=init == "preserve"))
        if init == "fresh":
            _reset(grown, seed)
        wide = with_submodule(model, traced.scope, grown)
        follow_modes(wide, model)
        if init == "fresh":
            return wide
        apart = drift(model, wide, [example_inputs], Signature.of(model, example_inputs))
    if apart is not None and not apart <= _SAME:
        raise RewriteError(
            f"the outputs of the widened model differ by {apart:.1e} of the largest; use a whole factor, exclude some "
            "groups, or start anew with init='fresh'"
        )
    return wide


def _widths(
    groups: ChannelGroups, factor: float | Mapping[str, float | int], exclude: Sequence[str]
) -> list[tuple[ChannelGroup, int]]:
    """The groups that grow, and how wide they get."""
    given = factor if isinstance(factor, Mapping) else {"*": factor}
    for key in given:
        check_name(key, f"factor[{key!r}]")
    for key in (*given, *exclude):
        if key != "*" and not any(matches(key, group.name) for group in groups):
            raise PlanError(f"{key!r} matches no channel group; {closest(key, groups.names)}")
    found = []
    for group in groups:
        keys = [key for key in given if matches(key, group.name)]
        if not keys or any(matches(glob, group.name) for glob in exclude):
            continue
        key = keys[0]
        if key == group.name and not group.exact:
            why = group.reason or "copies of channels that the data pick from would be picked apart"
            raise PlanError(f"factor[{key!r}]: group {group.name!r} cannot grow: {why}")
        width = _width(group, given[key], f"factor[{key!r}]" if isinstance(factor, Mapping) else "factor")
        if group.exact and not group.whole_blocks and width > group.size:
            found.append((group, width))
    return found


def _width(group: ChannelGroup, amount: float | int, where: str) -> int:
    blocks = len(group.blocks)
    if isinstance(amount, int | float) and amount > _MOST:
        raise PlanError(f"{where}: {amount:g} is too large for any layer; write a factor such as 2.0")
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not math.isfinite(amount):
        raise PlanError(f"{where}: {amount!r} is not a factor; write a number of at least 1")
    if where != "factor" and isinstance(amount, int):
        if amount < group.size or amount % blocks:
            raise PlanError(
                f"{where}: group {group.name!r} has {group.size} channels in {blocks} blocks; give a larger number "
                "that the blocks can share, or a float as a factor"
            )
        return amount
    if amount < 1:
        raise PlanError(f"{where}: {amount} is below 1; to make a group narrower use ClusterMerge")
    return blocks * max(group.size // blocks, math.floor(group.size // blocks * amount + 0.5))


def _copies(group: ChannelGroup, width: int) -> list[tuple[int, int]]:
    """How often each channel stands in the wide group: as evenly as can be, the first ones of each block once more."""
    found = []
    for block in group.blocks:
        whole, rest = divmod(width // len(group.blocks), len(block))
        found += [(channel, whole + (place < rest)) for place, channel in enumerate(block)]
    return found


def _reset(module: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
