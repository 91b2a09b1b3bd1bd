"""Cross-domain weight sharing in a plain PyTorch loop: scikit-learn's digits and their edges, seen by two networks.

    python examples/domains_digits.py

Sample i of one domain is sample i of the other, and both networks answer together. The plan is
`examples/plans/cross_domain_digits.yaml`; the loop in `train` is all there is to it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from csgd_digits import digits
from torch import Tensor, nn

import graphzip as gz

PLAN = Path(__file__).parent / "plans" / "cross_domain_digits.yaml"


def domains(images: Tensor) -> dict[str, Tensor]:
    """Two images (n, 1, 8, 8) of every digit: as it is, and how it changes from pixel to pixel."""
    return {"grey": images, "edges": (images - images.roll(1, 3)).abs()}


def network() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def fused(scores: dict[str, Tensor]) -> Tensor:
    """The mean of what both say."""
    return torch.stack(list(scores.values())).mean(0)


def train(
    model: Callable[..., dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    steps: int,
    term: Callable[[], Tensor] | None = None,
) -> None:
    """Steps on 64 images; `term` is added to the loss."""
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (64,))
        scores, labels = model(**domains(data[0][chosen])), data[1][chosen]
        loss = sum(nn.functional.cross_entropy(each, labels) for each in (*scores.values(), fused(scores)))
        if term is not None:
            loss = loss + term()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: Callable[..., dict[str, Tensor]], data: tuple[Tensor, Tensor]) -> float:
    """The share of right answers of both together."""
    return float((fused(model(**domains(data[0]))).argmax(1) == data[1]).double().mean())


def main() -> tuple[float, float, gz.Compiled]:
    """Train, regularize, share, fine-tune; accuracies before and after, and the result."""
    torch.manual_seed(0)
    training, test = (data.tensors for data in digits())
    pair = {"grey": network(), "edges": network()}

    def apart(**images: Tensor) -> dict[str, Tensor]:
        return {name: pair[name](each) for name, each in images.items()}

    train(apart, torch.optim.Adam(nn.ModuleDict(pair).parameters(), 2e-3), training, 200)
    before, unlabelled = accuracy(apart, test), domains(training[0][:256])
    examples = {name: (images[:2],) for name, images in unlabelled.items()}
    data = {name: [images] for name, images in unlabelled.items()}
    prepared = gz.prepare(pair, gz.Plan.load(PLAN), examples, calibration=data)
    for stage in prepared.steps():
        term = prepared.regularizer if stage == "regularize" else None
        train(prepared, prepared.optimizer(torch.optim.Adam, lr=1e-3), training, 60, term)
    compiled = prepared.convert()
    after = accuracy(compiled.module, test)
    print(f"apart:  {before:.2%}\nshared: {after:.2%}\n\n{compiled.report}")
    return before, after, compiled


if __name__ == "__main__":
    main()
