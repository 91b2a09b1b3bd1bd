"""The oracle: what the original computes, at every size at which it runs. A refusal must have been announced."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import graphzip as gz

__all__ = [
    "NotApplicable",
    "Problem",
    "apart",
    "control",
    "leaves",
    "quiet_dropout",
    "run",
    "same_at",
    "same_gradients",
]

LOOSE = 1e-9
COARSE = 1e-14  # of a result in float64, and as many times as much as what is computed with is coarser
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Problem(Exception):
    """Something that must hold does not. `kind` is one word."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class NotApplicable(Exception):
    """Nothing can be checked: the model itself fails, is not finite, or has nothing that the plan could act on."""


def leaves(outputs: Any) -> list[Any]:
    return pytree.tree_leaves(outputs)


def run(model: nn.Module, inputs: Sequence[Tensor], *, grad: bool = False) -> Any:
    """The outputs for copies of the inputs, with the random numbers of seed 0."""
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        return model(*[x.detach().clone() if not grad else x for x in inputs])


def apart(one: Any, two: Any) -> float:
    """The largest difference of two trees of outputs, each tensor relative to its largest entry."""
    if pytree.tree_structure(one) != pytree.tree_structure(two):
        raise Problem("structure", f"outputs are {pytree.tree_structure(two)}, not {pytree.tree_structure(one)}")
    worst = 0.0
    for left, right in zip(leaves(one), leaves(two), strict=True):
        if not isinstance(left, Tensor):
            if left != right:
                raise Problem("structure", f"an output is {right!r}, not {left!r}")
            continue
        if left.shape != right.shape or left.dtype != right.dtype:
            raise Problem("shape", f"{tuple(right.shape)} {right.dtype}, not {tuple(left.shape)} {left.dtype}")
        worst = max(worst, _apart(left.detach(), right.detach()))
    return worst


def _apart(left: Tensor, right: Tensor) -> float:
    if not left.numel():
        return 0.0
    if not (left.is_floating_point() or left.is_complex()):
        return float((left != right).any())
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()):
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(left[finite].abs().max())
    return float((left - right)[finite].abs().max()) / max(scale, 1e-300) if scale else float(right[finite].abs().max())


def _nudged(inputs: Sequence[Tensor], size: float, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(
        x * (1 + size * torch.randn(x.shape, generator=g, dtype=x.dtype)) if x.is_floating_point() else x
        for x in inputs
    )


class _Precision(TorchDispatchMode):
    """Sees the coarsest dtype that something is computed in."""

    eps = torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves(found):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.eps = max(self.eps, torch.finfo(each.dtype).eps)
        return found


def rounding(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """How many times as coarse as float64 the model computes somewhere, whatever its inputs are."""
    with _Precision() as seen:
        run(model, inputs)
    return float(seen.eps / torch.finfo(torch.float64).eps)


def control(model: nn.Module, inputs: Sequence[Tensor], expected: Any) -> float:
    """How far outputs may lie apart: a multiple of what a nudge of the inputs by a rounding error does to them."""
    nudged = copy.deepcopy(model)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in nudged.parameters():
            if p.is_floating_point():
                p.mul_(1 + 1e-15 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    moved = max(apart(expected, run(model, _nudged(inputs, 1e-15, 1))), apart(expected, run(nudged, inputs)))
    least = LOOSE if rounding(model, inputs) == 1 else COARSE * rounding(model, inputs)
    return max(least, 1000 * moved) if math.isfinite(moved) else math.inf


def _try(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    try:
        return run(model, inputs)
    except Exception as error:
        raise NotApplicable(f"the model itself fails: {error}") from error


Make = Callable[[int, int, int], Sequence[Tensor]]
"""Inputs of a batch size, a seed, and how much larger the dynamic dimensions are."""


def same_at(
    original: nn.Module,
    module: nn.Module,
    make: Make,
    places: Sequence[tuple[int, int]],
    told: Sequence[str],
    *,
    what: str = "",
    tolerance: float | None = None,
) -> None:
    """Outputs are equal at every (batch, growth) at which `original` runs; the first place is the example's.

    A place that is refused must be one that `told`, the notes and the conditions, announces.
    """
    loose: float | None = tolerance
    for number, (batch, grown) in enumerate(places):
        inputs = make(batch, 0, grown)
        try:
            expected = run(original, inputs)
        except Exception:
            continue
        where = f"{what}at batch {batch}" + (f", sizes + {grown}" if grown else "")
        if loose is None:
            loose = control(original, inputs, expected)
        try:
            found = run(module, inputs)
        except gz.InputShapeError as error:
            if number and told:
                continue
            kind = "unannounced" if number else "own example"
            raise Problem(kind, f"{where}: refused without a note: {error}") from error
        try:
            if apart(expected, found) <= loose or not _confirmed(original, module, make, (batch, grown), tolerance):
                continue
            raise Problem("wrong", f"{where}: off by {apart(expected, found):.2g} (tolerance {loose:.2g})")
        except Problem as problem:
            raise Problem(problem.kind, f"{where}: {problem}" if where not in str(problem) else str(problem)) from None


def _confirmed(
    original: nn.Module, module: nn.Module, make: Make, place: tuple[int, int], tolerance: float | None
) -> bool:
    """With two of three other inputs outputs are apart, too: no tie that a rounding error decides."""
    wrong = 0
    for seed in (1, 2, 3):
        inputs = make(place[0], seed, place[1])
        expected = _try(original, inputs)
        loose = control(original, inputs, expected) if tolerance is None else tolerance
        wrong += apart(expected, run(module, inputs)) > loose
    return wrong >= 2


def quiet_dropout(module: nn.Module) -> nn.Module:
    """A copy in training mode whose dropouts drop nothing."""
    module = copy.deepcopy(module).train()
    for each in module.modules():
        if isinstance(each, DROPOUTS):
            each.p = 0.0
    return module


def _loss(outputs: Any) -> Tensor | None:
    found = [each for each in leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]
    terms = [(each * torch.linspace(0.5, 1.5, each.numel(), dtype=each.dtype).view(each.shape)).sum() for each in found]
    return torch.stack([term.double() for term in terms]).sum() if terms else None


def _gradients(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]] | None:
    own = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad()
    loss = _loss(run(model, [x * 1 if x.is_floating_point() else x for x in own], grad=True))
    if loss is None:
        return None
    loss.backward()
    zero = [torch.zeros_like(x) if x.grad is None else x.grad for x in own if x.is_floating_point()]
    held = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return zero, held


Mapped = Callable[[str, Tensor], Tensor]


def same_gradients(
    original: nn.Module, module: nn.Module, inputs: Sequence[Tensor], mapped: Mapped | None, what: str
) -> None:
    """Gradients by the inputs are equal, and those by parameters where `mapped` knows what is left of them."""
    original, module = copy.deepcopy(original), copy.deepcopy(module)
    try:
        expected = _gradients(original, inputs)
        moved = _gradients(original, _nudged(inputs, 1e-15, 1))
    except Exception:
        return  # the model cannot be differentiated
    if expected is None or moved is None or not all(g.isfinite().all() for g in expected[0]):
        return
    found = _gradients(module, inputs)
    if found is None:
        raise Problem("gradient", f"{what}the outputs do not depend on parameters or inputs any more")
    coarse = COARSE * rounding(original, inputs)
    scale = max([float(g.abs().max()) for g in [*expected[0], *expected[1].values()] if g.numel()], default=1.0)
    for number, (left, again, right) in enumerate(zip(expected[0], moved[0], found[0], strict=True)):
        loose = max(1e-8 * scale, coarse * scale, 1e4 * float((left - again).abs().max()) if left.numel() else 0.0)
        if left.numel() and not float((left - right).abs().max()) <= loose:
            apart_by = float((left - right).abs().max())
            raise Problem(
                "gradient", f"{what}by input {number}: off by {apart_by:.2g} of {float(left.abs().max()):.2g}"
            )
    if mapped is None:
        return
    for name, right in found[1].items():
        if name not in expected[1]:
            continue
        left, again = mapped(name, expected[1][name]), mapped(name, moved[1][name])
        if left.shape != right.shape or not left.numel() or not left.isfinite().all():
            continue
        loose = max(1e-8 * scale, coarse * scale, 1e4 * float((left - again).abs().max()))
        if not float((left - right).abs().max()) <= loose:
            apart_by = float((left - right).abs().max())
            raise Problem("gradient", f"{what}by {name}: off by {apart_by:.2g} of {float(left.abs().max()):.2g}")


def batches(dynamic: bool) -> Iterator[tuple[int, int]]:
    """The places at which a result is compared: the example's first."""
    yield 4, 0
    yield 1, 0
    yield 3, 0
    yield 9, 0
    if dynamic:
        yield 4, 2
        yield 2, 4
