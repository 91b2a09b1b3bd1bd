"""Is an output what it should be, and could it have shown that it is not?

How far two correct implementations may differ is measured, not guessed. An output is judged as a whole, or, where its
entries have very different scales along one dimension, by the index in that dimension. Over all calls,

    noise     = max |f(x) - f64(x)|             f in its own precision, f64 the same module in float64
    scale     = max |f(x)|
    tolerance = 8 * noise + 16 * eps * scale

`noise` is what rounding does to the module itself: onnxruntime sums in another order and folds batch norms, so it
makes an error of its own of the same kind; 8 leaves room for that (measured: at most 1.7 on torchvision's models).
The second term, about 2e-6 of the output in float32, stands for functions such as tanh or erf that two libraries
approximate differently by some units in the last place; it also serves where the module happens to round nothing.

A tolerance says nothing by itself: `y + 1e6` rounds by more than `y` is worth. So an output counts as a check only
where its tolerance is below a hundredth of what other inputs change in it (`CEILING`), and where a change of all
weights and inputs by a thousandth (`CHANGE`) would have been found in more than a few of the entries that other inputs
move that far. Entries that rounding alone moves beyond the ceiling, such as those of a sorted or rounded result, may
differ, and up to eight times as many others; of integers these are all that may differ. NaN and infinities must appear
at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from graphzip.errors import VerificationError

__all__ = ["CHANGE", "Judged", "Reference", "judge"]

NOISE_FACTOR = 8.0
EPS_FACTOR = 16.0
CEILING = 1e-2
CHANGE = 1e-3

_SPREAD = 100.0
_BY_CHANCE = 0.02
_VALUES = 6
_NOTICED = 0.05
_UNSTABLE = 0.1
_DOUBT = 32.0
_COARSE, _LITTLE = 64.0, 0.1
_TINY = 1e-300


@dataclass(frozen=True)
class Reference:
    """What one output should be: in every call, in the same calls exactly, and in the first one with all changed.

    `noisy` holds the first call with inputs and weights that are off by a unit in the last place, in place of `exact`.
    `eps` is the unit roundoff of the coarsest type at work. `given` tells whether the output depends on the inputs'
    values at all, `tails` whether the program has functions that come ever closer to zero.
    """

    name: str
    wanted: Sequence[torch.Tensor]
    exact: Sequence[torch.Tensor] | None
    noisy: Sequence[torch.Tensor]
    changed: torch.Tensor
    eps: float
    given: bool
    calls: Sequence[str]
    tails: bool = False


@dataclass
class Judged:
    """The outcome for one output: `strong` where it could have shown an error; `unchecked` are sentences on why not.

    `shows` tells it of each part that was judged by itself, which lie along `dim`; `finite` whether nothing was NaN.
    """

    name: str
    difference: float
    tolerance: float
    strong: bool
    exact_only: bool = False
    unchecked: list[str] = field(default_factory=list)
    shows: tuple[bool, ...] = ()
    dim: int | None = None
    finite: bool = True


def judge(reference: Reference, found: Sequence[torch.Tensor]) -> Judged:
    """Compare what a file gave in every call with what it should. Raises `VerificationError` where it is another."""
    for want, got, call in zip(reference.wanted, found, reference.calls, strict=True):
        _check_kind(reference.name, want, got, call)
    return _Judge(reference, found).outcome()


def _check_kind(name: str, want: torch.Tensor, got: torch.Tensor, call: str) -> None:
    where = f"output {name!r} of the file differs from the module {call}"
    if got.shape != want.shape:
        raise VerificationError(f"{where}: shape {list(got.shape)} instead of {list(want.shape)}")
    if got.dtype != want.dtype:
        raise VerificationError(f"{where}: {got.dtype} instead of {want.dtype}")
    patterns: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.isnan, torch.isposinf, torch.isneginf)
    if want.is_floating_point() and any(not torch.equal(pattern(got), pattern(want)) for pattern in patterns):
        raise VerificationError(f"{where}: NaN or infinity at other positions")


class _Judge:
    """All calls of an output side by side: a row for every part that is judged by itself."""

    def __init__(self, reference: Reference, found: Sequence[torch.Tensor]) -> None:
        self.reference = reference
        self.floating = reference.wanted[0].is_floating_point()
        self.dim = _uneven_dim(reference.wanted) if self.floating else None
        self.wanted = self.side_by_side(reference.wanted)
        self.off = _distance(self.wanted, self.side_by_side(found))
        self.first = self.rows(reference.wanted[0])
        self.moved = self.movement()
        self.variation = _largest(self.moved)
        self.scale = _largest(self.wanted.abs())
        self.limit = max(CEILING, 64 * reference.eps) * self.variation
        self.constant = self.variation == 0
        noise = self.noise()
        self.unstable = (noise > self.limit[:, None]) & ~self.constant[:, None] if self.floating else noise > 0
        self.whole, self.tolerance = self.tolerances(noise)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.double()
        return values.reshape(1, -1) if self.dim is None else values.movedim(self.dim, 0).flatten(1)

    def side_by_side(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.rows(tensor) for tensor in tensors], 1)

    def movement(self) -> torch.Tensor:
        """How far other values of the inputs move the entries of the first call."""
        first = self.reference.wanted[0]
        others = [each[: len(first)] if first.dim() else each for each in self.reference.wanted[1:]]
        alike = [_distance(self.first, self.rows(each)) for each in others if each.shape == first.shape]
        return torch.stack(alike).amax(0) if alike else torch.zeros_like(self.first)

    def noise(self) -> torch.Tensor:
        """How far rounding alone moves each entry."""
        exact, noisy = self.reference.exact, self.reference.noisy
        if exact is not None:
            return _distance(self.wanted, self.side_by_side(exact))
        apart = [
            _distance(self.first, self.rows(each)) for each in noisy if each.shape == self.reference.wanted[0].shape
        ]
        known = torch.stack(apart).amax(0) if apart else torch.zeros_like(self.first)
        return torch.nn.functional.pad(known, (0, self.wanted.shape[1] - known.shape[1]))

    def tolerances(self, noise: torch.Tensor) -> tuple[float, torch.Tensor]:
        """That of the output as a whole, and that of each row; a row that never moves has no scale of its own."""
        if not self.floating:
            return 0.0, torch.zeros_like(self.scale)
        quiet = _largest(noise.masked_fill(self.unstable, 0.0))
        alive = self.scale > 0
        if bool(alive.any()):
            quiet = torch.maximum(quiet, (quiet[alive] / self.scale[alive]).median() * self.scale)
        tolerance = NOISE_FACTOR * quiet + EPS_FACTOR * self.reference.eps * self.scale
        whole = float(tolerance.max()) if tolerance.numel() else 0.0
        return whole, torch.where(self.constant, whole, tolerance)

    def outcome(self) -> Judged:
        judged = Judged(self.reference.name, 0.0, self.whole, strong=False, exact_only=not self.floating)
        exceeds = self.off > self.tolerance[:, None]
        allowed = NOISE_FACTOR * self.unstable.sum(1)
        doubtful = {row: self.excess(row) for row in (exceeds.sum(1) > allowed).nonzero().flatten().tolist()}
        within = self.off.masked_fill(exceeds, 0.0)
        share = _largest(within) / self.tolerance.clamp(min=_TINY)
        if share.numel():
            worst = int(share.argmax())
            judged.difference, judged.tolerance = float(within[worst].max()), float(self.tolerance[worst])
        shows = self.weigh(judged)
        judged.strong, judged.shows, judged.dim = bool(shows.any()), tuple(shows.tolist()), self.dim
        judged.finite = not bool(self.wanted.isnan().any())
        judged.unchecked += [sentence for row, sentence in doubtful.items() if not shows[row]]
        return judged

    def excess(self, row: int) -> str:
        """Widen the tolerance of a small part that is off by no more than what the large ones round, and say so.

        Raises `VerificationError` where it is off by more.
        """
        worst, tolerance = float(self.off[row].max()), float(self.tolerance[row])
        explained = f"where rounding explains at most {tolerance:.3g}"
        widened = min(self.whole, _DOUBT * tolerance)
        if len(self.tolerance) > 1 and worst <= max(widened, self.tail(row)):
            self.tolerance[row] = max(widened, worst)
            return (
                f"{self.part([row])} differs by {worst:.3g}, {explained}; beside the rest of the output that is little"
            )
        place = int(self.off[row].argmax())
        widths = [self.rows(each).shape[1] for each in self.reference.wanted]
        call = next(at for at in range(len(widths)) if place < sum(widths[: at + 1]))
        raise VerificationError(
            f"{self.part([row])} of the file differs from the module {self.reference.calls[call]}: by {worst:.3g}, "
            f"{explained}"
        )

    def tail(self, row: int) -> float:
        """What a small part may be off by where the program has sigmoids and the like.

        onnxruntime computes these to within 1.4e-7, however small they are: `x * sigmoid(x)` is off by 2e-6 near -14, a
        sixth of what it is, and is nothing but that error further out.
        """
        if not self.reference.tails:
            return 0.0
        rounded = _COARSE * self.reference.eps * float(self.scale.max())
        own = float(self.scale[row])
        return rounded if own <= rounded else min(rounded, _LITTLE * own)

    def weigh(self, judged: Judged) -> torch.Tensor:
        """Which rows could have shown an error? What speaks against it goes to `unchecked`."""
        name, nan = self.reference.name, float(self.wanted.isnan().double().mean()) if self.wanted.numel() else 0.0
        if nan > 0:
            judged.unchecked.append(f"{nan:.0%} of output {name!r} is NaN" if nan < 1 else f"output {name!r} is NaN")
        if not self.reference.given:
            return torch.full_like(self.constant, nan < 1)
        if not bool(self.wanted.isfinite().any()) or bool(self.constant.all()):
            if nan < 1:
                judged.unchecked.append(f"output {name!r} is the same for all inputs that were tried")
            return torch.zeros_like(self.constant)
        if not self.floating:
            return torch.zeros_like(self.constant)
        restless = self.unstable.double().mean(1) > _UNSTABLE
        loud = ~self.constant & ((self.tolerance > self.limit) | restless)
        if bool(loud.any()):
            row = int((self.tolerance / self.limit.clamp(min=_TINY)).masked_fill(~loud, 0.0).argmax())
            part, moves = self.part(loud.nonzero().flatten().tolist()), f"by {float(self.variation[row]):.2g}"
            judged.unchecked.append(
                f"rounding moves many entries of {part} as far as other inputs do, {moves}"
                if bool(restless[row])
                else f"rounding explains differences of {float(self.tolerance[row]):.2g} in {part}, which other inputs "
                f"move {moves}"
            )
        blunt = ~self.constant & ~loud & ~self.notices()
        if bool(blunt.any()):
            judged.unchecked.append(
                f"{self.part(blunt.nonzero().flatten().tolist())} hardly shows a change of all weights and inputs by "
                f"{max(CHANGE, 128 * self.reference.eps):.2g}"
            )
        return ~self.constant & ~loud & ~blunt

    def notices(self) -> torch.Tensor:
        """Which rows show the change in more than a few of the entries that other inputs move far."""
        if self.reference.changed.shape != self.reference.wanted[0].shape:
            return torch.ones_like(self.constant)
        changed = self.rows(self.reference.changed)
        change = _distance(self.first, changed)
        change = change.masked_fill(self.first.isfinite() & ~changed.isfinite(), torch.inf)
        shown = change > self.tolerance[:, None]
        far = self.moved * CEILING > self.tolerance[:, None]
        return shown.sum(1) >= (_NOTICED * (shown | far).sum(1)).clamp(min=1)

    def part(self, rows: list[int]) -> str:
        name = f"output {self.reference.name!r}"
        if self.dim is None or len(rows) == len(self.scale):
            return name
        shown = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        return f"{name} at {shown} of dimension {self.dim}"


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Absolute differences; 0 where one of the two is not finite."""
    return torch.where(one.isfinite() & other.isfinite(), one - other, 0.0).abs()


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest finite number of every row."""
    finite = torch.where(values.isfinite(), values, 0.0)
    return finite.amax(1) if finite.shape[1] else finite.new_zeros(len(finite))


def _uneven_dim(wanted: Sequence[torch.Tensor]) -> int | None:
    """The dimension, behind the first, along which the largest entries differ most, if these are of unlike scale."""
    found, spread = None, _SPREAD
    for dim in range(1, wanted[0].dim()):
        count = wanted[0].shape[dim]
        if count < 2 or any(each.dim() <= dim or each.shape[dim] != count for each in wanted):
            continue
        values = torch.cat([each.movedim(dim, 0).flatten(1) for each in wanted], 1).double().abs()
        if values.shape[1] < _VALUES:
            continue
        scales = _largest(values)
        alive = scales[scales > 0]
        here = float(alive.max() / alive.min()) if len(alive) else 1.0
        small = float((alive * _SPREAD < alive.max()).double().mean()) if len(alive) else 0.0
        if here > spread and (small > _BY_CHANCE or here > _SPREAD**2):
            found, spread = dim, here
    return found
