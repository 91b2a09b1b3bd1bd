"""A short fine-tune with the original model as teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graphzip.errors import ExampleInputError

__all__ = ["distill"]


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

    Gives the mean loss of every epoch. Raises `ExampleInputError` where labels are asked for and not given.
    """
    steps = epochs * sum(1 for _ in batches)
    falls = optimizer is None
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    modes = {module: module.training for module in (*student.modules(), *teacher.modules())}
    student.train()
    teacher.eval()
    losses, step = [], 0
    for _ in range(epochs):
        total = count = 0.0
        for batch in batches:
            x, y = _parted(batch, with_labels=labels > 0)
            with torch.no_grad():
                wanted = F.log_softmax(teacher(x) / temperature, 1)
            logits = student(x)
            given = F.log_softmax(logits / temperature, 1)
            loss = temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
            if labels > 0:
                loss = (1 - labels) * loss + labels * F.cross_entropy(logits, y)
            if falls:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            total, count = total + float(loss.detach()), count + 1
        losses.append(total / max(count, 1))
    for module, mode in modes.items():
        module.training = mode
    return losses


def _parted(batch: Any, *, with_labels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if with_labels and len(parts) < 2:
        raise ExampleInputError("labels are asked for, but a batch has none; give batches (x, y) or labels=0")
    return parts[0], parts[-1]
