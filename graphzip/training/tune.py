"""Fit the outputs of a slim model to the original's by gradient descent, without labels: what `tune=` asks for.

With the outputs `y_k` of the slim model and `t_k` of the original for the same inputs, both in eval mode, where batch
norms keep their statistics, the loss is the mean over all floating-point outputs of

    mean((y_k - t_k)^2) / var(t_k).

Adam makes it smaller, at a rate that rises over the first epoch and falls to zero along half a cosine (Loshchilov and
Hutter, "SGDR", ICLR 2017, Eq. 5). What counts is a running average of the weights, over about an eighth of all steps:
few samples make steps that go back and forth (Polyak and Juditsky, "Acceleration of Stochastic Approximation by
Averaging", 1992, with weights that fall exponentially). Some of the calibration data is held out before anything is
fitted to it, closed-form fits of passes included: after every epoch the loss on it judges, and the weights that did
best stay, those that tuning began with included. So it is never worse than before on what was held out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import nn

from graphzip.arguments import check_callable, number, whole
from graphzip.boundary import call_user
from graphzip.calibration import place_of, placed
from graphzip.calls import Call, Signature
from graphzip.errors import ExampleInputError, PlanError, WeightsError
from graphzip.graph.batches import each_batch, run_batch, samples_in
from graphzip.graph.copies import eval_copy
from graphzip.graph.source import first_line
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.plan.problems import show
from graphzip.progress import told
from graphzip.report.report import Tuning
from graphzip.tracing.results import Way, tensors_by_way

__all__ = ["Divided", "Tune", "divided", "held_out", "tune_"]

logger = logging.getLogger(__name__)

_MOST_EPOCHS: Final = 10_000
_EXACT: Final = 4  # bytes of a number in which small steps do not vanish
_AVERAGED: Final = 0.125  # of all steps, that the average of the weights goes back

_NOTHING: Final = 1e-12  # a variance that is none, relative to the mean square

Results = dict[Way, torch.Tensor]
"""Floating-point outputs by the way to them."""


@dataclass(frozen=True)
class Tune:
    """How the outputs of a slim model are fitted to the original's on the calibration data (`graphzip.compile`).

    - `epochs`: how often the calibration data is gone through, at most.
    - `rate`: the learning rate of Adam where it is highest, after the first epoch.
    - `batch`: samples in a step. Where samples cannot be told apart (the batch of the model is not free) a step takes
      one of the given batches.
    - `held_out`: the share of the samples that judge, and that nothing is fitted to.
    - `patience`: it ends after so many epochs in a row without a better one. The first ones are often worse than none,
      and more is gained where the rate falls.
    - `augment`: a function of a batch's positional inputs, `augment(x)` or `augment(x, mask)`, that gives inputs to
      train on in their place, such as mirrored images; the original says what is right for them. It may draw from
      PyTorch's random generator, which is seeded for it.

    Raises `GraphZipError` for a value that is out of range.
    """

    epochs: int = 40
    rate: float = 1e-3
    batch: int = 64
    held_out: float = 0.125
    patience: int = 20
    augment: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        whole(self.epochs, "tune.epochs", least=1, most=_MOST_EPOCHS)
        number(self.rate, "tune.rate", above=0.0)
        whole(self.batch, "tune.batch", least=1)
        number(self.held_out, "tune.held_out", above=0.0, most=0.9)
        whole(self.patience, "tune.patience", least=1, most=_MOST_EPOCHS)
        check_callable(self.augment, "tune.augment", "augment(x), which gives inputs like x")

    @classmethod
    def of(cls, given: Any) -> Tune | None:
        """What an argument `tune` asks for: the options themselves, a number of epochs, or true or false.

        Raises `PlanError` for anything else.
        """
        if isinstance(given, cls):
            return given
        if given is None or isinstance(given, bool):
            return cls() if given else None
        if isinstance(given, int):
            return cls(epochs=given)
        raise PlanError(f"tune: {show(given)} says nothing; write True, a number of epochs, or graphzip.Tune(epochs=5)")


# ------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Divided:
    """Calibration data of every task, that of a single model under an empty name: what is fitted to, and what judges.

    Batches are as they were given, with all that models do not take, such as labels; `signatures` tell what they do.
    `splits` says whether the models take batches of any size.
    """

    options: Tune
    signatures: Mapping[str, Signature]
    training: Mapping[str, list[Any]]
    judging: Mapping[str, list[Any]]
    splits: bool

    @property
    def everything(self) -> dict[str, list[Any]]:
        """All of it."""
        return {name: [*batches, *self.judging[name]] for name, batches in self.training.items()}


def held_out(data: Any, options: Tune | None, traced: Traced, signatures: Mapping[str, Signature], *, seed: int) -> Any:
    """Calibration data, of which some is held out where tuning was asked for: then it is `Divided`.

    Raises `PlanError` where there is none, or too little of it.
    """
    if options is None:
        return data
    if data is None:
        raise PlanError("tune needs calibration data: pass calibration=, a list of batches, or leave tune out")
    splits = traced.batch_dynamic and not traced.conditions
    return divided(data if traced.tasks else {"": data}, signatures, options, splits=splits, seed=seed)


def divided(
    data: Mapping[str, Iterable[Any]], signatures: Mapping[str, Signature], options: Tune, *, splits: bool, seed: int
) -> Divided:
    """Hold out some samples of every task, drawn at random; `signatures` say what a task is called with.

    Raises `PlanError` where there is only one sample, or only one batch that cannot be split.
    """
    generator = torch.Generator().manual_seed(seed)
    training, judging = {}, {}
    with torch.inference_mode(False):
        for name, batches in data.items():
            samples = _Samples([_own(batch, signatures[name]) for batch in each_batch(batches)], splits)
            kept = min(max(round(options.held_out * len(samples)), 1), len(samples) - 1)
            if not kept:
                lead = f"task {name!r}: " if name else ""
                what = "batch" if samples.pool is None else "sample"
                raise PlanError(f"{lead}tune holds out some of calibration, which has one {what}; give more of them")
            order = torch.randperm(len(samples), generator=generator)
            size = _count(samples.batches[0])
            judging[name] = samples.dealt(order[:kept], min(size, options.batch))
            training[name] = samples.dealt(order[kept:].sort().values, size)
    return Divided(options, signatures, training, judging, splits)


def _own(batch: Any, signature: Signature) -> Any:
    """A batch as copies that gradients can be computed for, whatever mode it was made in."""
    signature.call(batch)  # raises an error where it is none
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, plain)


def _count(batch: Any) -> int:
    """How many samples it has."""
    return samples_in(pytree.tree_leaves(batch))


class _Samples:
    """Inputs of one task: samples that can be dealt anew, or batches that stay as they were given."""

    def __init__(self, batches: Sequence[Any], splits: bool) -> None:
        self.batches = batches
        leaves, specs = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
        self.spec = specs[0]
        self.pool = _pooled(leaves) if splits and all(spec == self.spec for spec in specs) else None

    def __len__(self) -> int:
        return len(self.batches) if self.pool is None else samples_in(self.pool)

    def dealt(self, order: torch.Tensor, size: int) -> list[Any]:
        """Batches of so many of the samples with these numbers; or the given batches with these numbers."""
        if self.pool is None:
            return [self.batches[place] for place in order.tolist()]
        return [
            pytree.tree_unflatten(
                [leaf[part.to(leaf.device)] if isinstance(leaf, torch.Tensor) else leaf for leaf in self.pool],
                self.spec,
            )
            for part in torch.split(order, size)
        ]


def _pooled(batches: Sequence[Sequence[Any]]) -> list[Any] | None:
    """All batches in one, where the first dimension of every tensor counts the same samples."""
    for leaves in batches:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len({leaf.shape[:1] for leaf in tensors}) != 1 or not tensors[0].dim():
            return None
    found: list[Any] = []
    for column in zip(*batches, strict=True):
        kinds = {
            (each.shape[1:], each.dtype, each.device) if isinstance(each, torch.Tensor) else None for each in column
        }
        if len(kinds) > 1 or (kinds == {None} and any(each != column[0] for each in column)):
            return None
        found.append(column[0] if kinds == {None} else torch.cat(column))
    return found


# ------------------------------------------------------------------------------------------------- the loss


class _Task:
    """One model, its original, and the data; where samples are many or augmented, the original is asked every time."""

    def __init__(self, student: nn.Module, teacher: nn.Module, data: Divided, name: str) -> None:
        self.student, self.teacher = eval_copy(student), eval_copy(teacher)
        self.places = place_of(self.teacher), place_of(self.student)
        call = data.signatures[name].call
        training, judging = ([call(each) for each in part[name]] for part in (data.training, data.judging))
        self.samples, self.size = _Samples(training, data.splits), data.options.batch
        self.judging = [(batch, self.wanted(batch)) for batch in judging]
        self.counts = sum(map(_count, training)), sum(map(_count, judging))
        asked = (self.wanted(batch) for batch in training)
        spreads = _spreads(chain((wanted for _, wanted in self.judging), asked))
        with torch.no_grad():  # outputs that do not matter are not among the student's
            given = _outputs(self.student, placed(self.judging[0][0], *self.places))
        self.spreads = {way: spread for way, spread in spreads.items() if way in given}
        if not self.spreads:
            raise PlanError("tune: the original's outputs are no floating-point numbers that differ on calibration")

    def dealt(self, generator: torch.Generator) -> list[Call]:
        """The batches of an epoch."""
        return self.samples.dealt(torch.randperm(len(self.samples), generator=generator), self.size)

    @torch.no_grad()
    def wanted(self, batch: Call) -> Results:
        """What the original gives."""
        return _outputs(self.teacher, batch)

    def loss(self, batch: Call, wanted: Results) -> torch.Tensor:
        """How far the outputs are from those that are wanted; where the original's are not finite, nothing is."""
        given = _outputs(self.student, placed(batch, *self.places))
        terms = []
        for way, spread in self.spreads.items():
            left, right = given[way], wanted[way].to(given[way].device, given[way].dtype)
            apart = torch.where(right.isfinite(), left - right, 0.0)
            terms.append(apart.abs().square().mean().cpu() / spread)
        return torch.stack(terms).mean()

    @torch.no_grad()
    def judged(self) -> float:
        """The loss on what was held out."""
        losses = [(float(self.loss(batch, wanted)), _count(batch)) for batch, wanted in self.judging]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def _outputs(model: nn.Module, batch: Call) -> Results:
    found = tensors_by_way(run_batch(model, *batch))
    return {way: leaf for way, leaf in found.items() if leaf.is_floating_point() or leaf.is_complex()}


def _spreads(outputs: Iterable[Results]) -> dict[Way, float]:
    """The variance of every output that has one, over all that is finite of it."""
    sums: dict[Way, torch.Tensor] = {}
    for results in outputs:
        for way, leaf in results.items():
            values = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            values = values[values.isfinite()].double().cpu()
            moments = torch.stack([torch.tensor(float(values.numel())), values.sum(), values.square().sum()])
            sums[way] = sums.get(way, 0.0) + moments
    found = {}
    for way, moments in sums.items():
        count, total, squares = moments.tolist()
        spread = squares / count - (total / count) ** 2 if count else 0.0
        if spread > _NOTHING * squares / max(count, 1):
            found[way] = spread
    return found


# ------------------------------------------------------------------------------------------------- the loop


def tune_(student: nn.Module, teacher: nn.Module, data: Divided, *, scope: str = "", seed: int = 0) -> Tuning:
    """Tune `student`, in place, to answer as `teacher` does; both stay in their modes, and flags of parameters stay.

    Parameters inside of `scope` are tuned, also those that are frozen; each once, under however many names. Raises
    `PlanError` where no output depends on them, `WeightsError` where outputs are not finite before.
    """
    devices = {each.device for each in student.parameters() if each.device.type not in ("cpu", "meta")}
    with torch.inference_mode(False), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        tasks = [_Task(student.get_submodule(name), teacher.get_submodule(name), data, name) for name in data.training]
        return _Tuner(tasks, _parameters(student.get_submodule(scope), tasks), data.options, seed).run()


def _parameters(student: nn.Module, tasks: Sequence[_Task]) -> list[nn.Parameter]:
    """Those that are tuned: what the copies that run have in common with the model."""
    run = {id(each) for task in tasks for each in task.student.parameters()}
    found = [each for each in student.parameters() if each.is_floating_point() and id(each) in run]
    if not found:
        raise PlanError("tune: the model has no parameters that it computes with in eval mode; leave tune out")
    return found


class _Tuner:
    """Goes through the data of all tasks and keeps the weights that did best on what was held out."""

    def __init__(self, tasks: Sequence[_Task], parameters: Sequence[nn.Parameter], options: Tune, seed: int) -> None:
        self.tasks, self.parameters, self.options = tasks, parameters, options
        self.generator = torch.Generator().manual_seed(seed)
        self.exact = [each if each.dtype.itemsize >= _EXACT else each.detach().float() for each in parameters]
        self.averages = [each.detach().clone() for each in self.exact]
        self.optimizer = torch.optim.Adam(self.exact, lr=options.rate, betas=(0.9, 0.99))

    def run(self) -> Tuning:
        """Train, and leave the best weights."""
        best = before = self._judged()
        if not math.isfinite(before):
            raise WeightsError("tune: outputs of the slim model are NaN or infinite on calibration; check its weights")
        kept, state = 0, [each.clone() for each in self.averages]
        flags = [each.requires_grad for each in self.parameters]
        every = {each: each.grad for task in self.tasks for each in task.student.parameters()}
        try:
            for each in self.parameters:
                each.requires_grad_(True)
            for epoch in range(1, self.options.epochs + 1) if before > 0 else ():
                self._epoch(epoch)
                found = self._judged()
                logger.info("tuning: epoch %d, loss %.4g on samples that were held out", epoch, found)
                if found < best:
                    best, kept, state = found, epoch, [each.clone() for each in self.averages]
                told(epoch, self.options.epochs, f"tuning: loss {best:.3g} on held-out samples, {before:.3g} before")
                if epoch - kept >= self.options.patience or not math.isfinite(found):
                    break
        finally:
            self._restore(state)
            for each, flag in zip(self.parameters, flags, strict=True):
                each.requires_grad_(flag)
            for each, slope in every.items():
                each.grad = slope
        samples, held_out = (sum(task.counts[part] for task in self.tasks) for part in (0, 1))
        return Tuning(before, best, kept, samples, held_out)

    @torch.enable_grad()
    def _epoch(self, epoch: int) -> None:
        """Every batch of every task once."""
        steps = [(task, batch) for task in self.tasks for batch in task.dealt(self.generator)]
        for done, chosen in enumerate(torch.randperm(len(steps), generator=self.generator).tolist(), 1):
            task, batch = steps[chosen]
            loss = task.loss(*self._asked(task, batch))
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(epoch - 1 + done / len(steps))
            self._step(loss, 1.0 / max(_AVERAGED * self.options.epochs * len(steps), 1.0))

    def _rate(self, epoch: float) -> float:
        """After so much of the epochs."""
        return self.options.rate * min(epoch, 1.0) * (1 + math.cos(math.pi * epoch / self.options.epochs)) / 2

    def _asked(self, task: _Task, batch: Call) -> tuple[Call, Results]:
        """A batch, augmented, and what the original gives for it."""
        if self.options.augment is None:
            return batch, task.wanted(batch)
        given: Any = call_user(self.options.augment, *batch.args)
        batch = Call(tuple(given) if isinstance(given, tuple | list) else (given,), batch.kwargs)
        try:
            return batch, task.wanted(batch)
        except ExampleInputError as error:
            raise PlanError(
                f"tune.augment: the model does not take what it gives ({first_line(error.__cause__ or error)}); return "
                "inputs like those that it is given"
            ) from error

    def _step(self, loss: torch.Tensor, share: float) -> None:
        """A step, of which the averages take this share."""
        if not loss.requires_grad:
            raise PlanError("tune: no output has a gradient by the model's parameters; leave tune out")
        for each in self.parameters:
            each.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        for each, exact in zip(self.parameters, self.exact, strict=True):
            if exact is not each:
                exact.grad = None if each.grad is None else each.grad.to(exact.dtype)
        self.optimizer.step()
        with torch.no_grad():
            for each, exact in zip(self.parameters, self.exact, strict=True):
                if exact is not each:
                    each.copy_(exact)
            for average, exact in zip(self.averages, self.exact, strict=True):
                average.lerp_(exact.detach(), share)

    def _judged(self) -> float:
        """The loss of the averages on what was held out."""
        now = [each.detach().clone() for each in self.parameters]
        self._restore(self.averages)
        found = sum(task.judged() for task in self.tasks) / len(self.tasks)
        self._restore(now)
        return found

    @torch.no_grad()
    def _restore(self, state: Sequence[torch.Tensor]) -> None:
        for each, value in zip(self.parameters, state, strict=True):
            each.copy_(value)
