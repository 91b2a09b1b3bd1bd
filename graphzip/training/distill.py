"""A short fine-tune with the original model as teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from graphzip.arguments import check_module, number, re_iterable, whole
from graphzip.boundary import public, user_data
from graphzip.calls import Call
from graphzip.errors import ExampleInputError, GraphZipError, NotFoundError
from graphzip.global_lock import ALONE
from graphzip.graph.batches import run_batch
from graphzip.graph.torch_private import pytree
from graphzip.progress import Progress, told, watched
from graphzip.report.tables import closest

__all__ = ["distill"]

_LABELS: Final = "labels"  # their name in a batch by name


@public
def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    rate: float = 0.01,
    temperature: float = 4.0,
    labels: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    scope: str | None = None,
    progress: Progress = None,
) -> list[float]:
    """Train `student`, in place, to answer as `teacher` does: `distill(compiled.module, model, loader)`.

    Both map a batch to logits (n, classes), or give a mapping or an object that holds them as `logits` (.., classes),
    as models of transformers do. The loss is the divergence of softened answers (Hinton et al., "Distilling
    the Knowledge in a Neural Network", 2015, section 2.1),

        T^2 KL(softmax(teacher / T) || softmax(student / T)),

    with T the `temperature`, mixed with the cross entropy of labels at the share `labels` (0 to 1). A batch is `x`, a
    tuple that begins with it and ends with the labels where they count, or a mapping of inputs by name with the labels
    under "labels". `batches`, a list or a DataLoader, is gone through `epochs` times. `optimizer` is by default SGD
    with momentum whose rate falls from `rate` to zero; one that is given is used as it is.

    With a `scope`, only the parameters of that submodule are trained, to give what the teacher's gives: the loss is the
    mean square of what its floating-point outputs are apart, relative to their variance, and labels are not looked at.

    `progress` is told of every step, as that of `compile`.

    Gives the mean loss of every epoch. Raises `ExampleInputError` where labels are asked for and not given, and for
    batches that a model does not take.
    """
    _check(student, teacher, optimizer, scope)
    if scope is not None and labels:
        raise GraphZipError("labels: with a scope the outputs of a submodule are compared, not classes; leave it out")
    epochs = whole(epochs, "epochs", least=1)
    rate, temperature = number(rate, "rate", above=0.0), number(temperature, "temperature", above=0.0)
    labels = number(labels, "labels", least=0.0, most=1.0)
    data = re_iterable(batches, "batches")
    steps = epochs * sum(1 for _ in user_data(data))
    if not steps:
        raise ExampleInputError("batches: there are none; give at least one")
    part, falls = student.get_submodule(scope or ""), rate if optimizer is None else None
    optimizer = optimizer or torch.optim.SGD(part.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    modes = {module: module.training for module in (*student.modules(), *teacher.modules())}
    student.train(scope is None)
    part.train()
    teacher.eval()
    loss_of = partial(_loss, student, teacher, temperature=temperature, labels=labels)
    if scope is not None:
        loss_of = partial(_apart, student, teacher, scope=scope)
    try:
        with ALONE.released(), watched(progress):
            return _descend(loss_of, data, optimizer, epochs, steps, falls)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _descend(
    loss_of: Callable[[Any], torch.Tensor],
    data: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    steps: int,
    falls: float | None,
) -> list[float]:
    """The mean loss of every epoch; the rate `falls` from there to zero, where it is given."""
    losses: list[float] = []
    step = 0
    for _ in range(epochs):
        total = count = 0.0
        for batch in user_data(data):
            loss = loss_of(batch)
            if falls is not None:
                for group in optimizer.param_groups:
                    group["lr"] = falls * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            told(step, steps, f"distilling, epoch {len(losses) + 1} of {epochs}")
            total, count = total + float(loss.detach()), count + 1
        losses.append(total / max(count, 1))
    return losses


def _check(student: nn.Module, teacher: nn.Module, optimizer: Any, scope: str | None) -> None:
    for what, model in (("student", student), ("teacher", teacher)):
        check_module(model, what)
        known = [name for name, _ in model.named_modules() if name]
        if scope is not None and scope not in known:
            raise NotFoundError(f"scope: {what} has no submodule {scope!r}; {closest(str(scope), known)}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise GraphZipError(f"optimizer: expected one of torch.optim, already made, got {type(optimizer).__name__}")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise GraphZipError(f"student: {type(student).__name__} has no parameter that can be trained")


def _apart(student: nn.Module, teacher: nn.Module, batch: Any, scope: str) -> torch.Tensor:
    """How far the outputs of a submodule are from the teacher's, relative to the variance of these."""
    call, _ = _parted(batch, with_labels=False)
    with torch.no_grad():
        wanted = _seen(teacher, call, scope)
    found = _seen(student, call, scope)
    if [each.shape for each in found] != [each.shape for each in wanted] or not wanted:
        raise ExampleInputError(f"scope: {scope!r} gives other outputs in the student than in the teacher, or none")
    apart = sum(((one - two).square().sum() for one, two in zip(found, wanted, strict=True)), found[0].new_zeros(()))
    spread = sum(float((each - each.mean()).square().sum()) for each in wanted)
    return apart / max(spread, torch.finfo(apart.dtype).tiny)


def _seen(model: nn.Module, call: Call, scope: str) -> list[torch.Tensor]:
    """The floating-point outputs of a submodule while the model runs on a batch."""
    seen: list[torch.Tensor] = []

    def remember(module: nn.Module, inputs: Any, outputs: Any) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        seen.extend(leaf for leaf in leaves if leaf.is_floating_point())

    hook = model.get_submodule(scope).register_forward_hook(remember)
    try:
        run_batch(model, *call, what="batches")
    finally:
        hook.remove()
    return seen


def _loss(student: nn.Module, teacher: nn.Module, batch: Any, temperature: float, labels: float) -> torch.Tensor:
    """Raises `ExampleInputError` for a batch or for answers that cannot be used."""
    call, y = _parted(batch, with_labels=labels > 0)
    with torch.no_grad():
        wanted = _logits(teacher, call)
    logits = _logits(student, call)
    if logits.shape != wanted.shape:
        raise ExampleInputError(
            f"{type(student).__name__} gives {list(logits.shape)} and {type(teacher).__name__} {list(wanted.shape)}; "
            "both models have to give logits (n, classes) alike"
        )
    loss = temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(wanted / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    if labels > 0:
        try:
            flat = y.flatten() if isinstance(y, torch.Tensor) and not y.is_floating_point() else y
            loss = (1 - labels) * loss + labels * F.cross_entropy(logits, flat)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ExampleInputError(
                f"batches: the labels do not fit the logits ({error}); give class numbers"
            ) from error
    return loss


def _logits(model: nn.Module, call: Call) -> torch.Tensor:
    """The answers (n, classes); of each place of a sequence, where they are `logits` (.., classes)."""
    found = run_batch(model, *call, what="batches")
    held = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(held, torch.Tensor) and held.dim() >= 2:
        return held.flatten(0, -2)
    if not isinstance(found, torch.Tensor) or found.dim() != 2:
        shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ExampleInputError(f"{type(model).__name__} gives {shape}; both models have to give logits (n, classes)")
    return found


def _parted(batch: Any, *, with_labels: bool) -> tuple[Call, Any]:
    """What the models are called with, and the labels."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != _LABELS}
        if with_labels and _LABELS not in batch:
            raise ExampleInputError(f"labels are asked for, but a batch has none under {_LABELS!r}; or use labels=0")
        return Call((), inputs), batch.get(_LABELS)
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if with_labels and len(parts) < 2:
        raise ExampleInputError("labels are asked for, but a batch has none; give batches (x, y) or labels=0")
    if not parts:
        raise ExampleInputError("batches: one of them is empty; give tensors, or tuples that begin with one")
    return Call(parts[:1], {}), parts[-1]
