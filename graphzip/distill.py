"""A short fine-tune with the original model as teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graphzip.alone import ALONE
from graphzip.arguments import check_module, number, re_iterable, whole
from graphzip.errors import ExampleInputError, GraphZipError
from graphzip.graph.batches import run_batch
from graphzip.guard import public, user_data

__all__ = ["distill"]


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
) -> list[float]:
    """Train `student`, in place, to answer as `teacher` does: `distill(compiled.module, model, loader)`.

    Both map a batch to logits (n, classes). The loss is the divergence of softened answers (Hinton et al., "Distilling
    the Knowledge in a Neural Network", 2015, section 2.1),

        T^2 KL(softmax(teacher / T) || softmax(student / T)),

    mixed with the cross entropy of labels at the share `labels` (0 to 1), which takes batches `(x, y)`; without it, a
    batch is `x` or begins with it. `batches`, a list or a DataLoader, is gone through `epochs` times. The optimizer is
    by default SGD with momentum whose rate falls from `rate` to zero; one that is given is used as it is.

    Gives the mean loss of every epoch. Raises `ExampleInputError` where labels are asked for and not given, and for
    batches that a model does not take.
    """
    _check(student, teacher, optimizer)
    epochs = whole(epochs, "epochs", least=1)
    rate, temperature = number(rate, "rate", above=0.0), number(temperature, "temperature", above=0.0)
    labels = number(labels, "labels", least=0.0, most=1.0)
    data = re_iterable(batches, "batches")
    steps = epochs * sum(1 for _ in user_data(data))
    if not steps:
        raise ExampleInputError("batches: there are none; give at least one")
    falls = optimizer is None
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    modes = {module: module.training for module in (*student.modules(), *teacher.modules())}
    student.train()
    teacher.eval()
    losses, step = [], 0
    try:
        with ALONE.released():
            for _ in range(epochs):
                total = count = 0.0
                for batch in user_data(data):
                    loss = _loss(student, teacher, batch, temperature, labels)
                    if falls:
                        for group in optimizer.param_groups:
                            group["lr"] = rate * (1 - step / steps)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    step += 1
                    total, count = total + float(loss.detach()), count + 1
                losses.append(total / max(count, 1))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return losses


def _check(student: nn.Module, teacher: nn.Module, optimizer: Any) -> None:
    check_module(student, "student")
    check_module(teacher, "teacher")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise GraphZipError(f"optimizer: expected one of torch.optim, already made, got {type(optimizer).__name__}")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise GraphZipError(f"student: {type(student).__name__} has no parameter that can be trained")


def _loss(student: nn.Module, teacher: nn.Module, batch: Any, temperature: float, labels: float) -> torch.Tensor:
    """Raises `ExampleInputError` for a batch or for answers that cannot be used."""
    x, y = _parted(batch, with_labels=labels > 0)
    with torch.no_grad():
        wanted = run_batch(teacher, (x,), "batches")
    logits = run_batch(student, (x,), "batches")
    for model, found in ((teacher, wanted), (student, logits)):
        if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.shape != wanted.shape:
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ExampleInputError(
                f"{type(model).__name__} gives {shape}; both models have to give logits (n, classes)"
            )
    loss = temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(wanted / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    if labels > 0:
        try:
            loss = (1 - labels) * loss + labels * F.cross_entropy(logits, y)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ExampleInputError(
                f"batches: the labels do not fit the logits ({error}); give class numbers"
            ) from error
    return loss


def _parted(batch: Any, *, with_labels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if with_labels and len(parts) < 2:
        raise ExampleInputError("labels are asked for, but a batch has none; give batches (x, y) or labels=0")
    if not parts:
        raise ExampleInputError("batches: one of them is empty; give tensors, or tuples that begin with one")
    return parts[0], parts[-1]
