"""Multi-Task Zipping in a plain PyTorch loop: two networks for scikit-learn's digits become one, layer by layer.

    python examples/zip_digits.py

One network reads digits, the other one tells odd from even on digits that are black on white. The plan is
`examples/plans/mtz_digits.yaml`; the loop in `main` is all there is to it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from csgd_digits import digits
from torch import Tensor, nn

import graphzip as gz

PLAN = Path(__file__).parent / "plans" / "mtz_digits.yaml"


def tasks() -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Images (n, 64) and labels of both tasks, to train on and to test on."""
    parts = [{}, {}]
    for part, data in zip(parts, digits(), strict=True):
        images, labels = data.tensors
        part.update(digit=(images.flatten(1), labels), odd=(1 - images.flatten(1), labels % 2))
    return parts[0], parts[1]


def network(classes: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, classes))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, tuple[Tensor, Tensor]], steps: int
) -> None:
    """Steps on 64 images of every task; `model` is called with all of them, and gives the scores of each."""
    for _ in range(steps):
        chosen = {name: torch.randint(len(labels), (64,)) for name, (_, labels) in data.items()}
        scores = model(**{name: data[name][0][chosen[name]] for name in data})
        losses = [nn.functional.cross_entropy(scores[name], data[name][1][chosen[name]]) for name in data]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()


class Apart(nn.ModuleDict):
    """Networks that share nothing, called as those that are zipped."""

    def forward(self, **images: Tensor) -> dict[str, Tensor]:
        """By task: (n, 64) to (n, classes)."""
        return {name: self[name](each) for name, each in images.items()}


@torch.no_grad()
def accuracies(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The share of right answers of every task."""
    scores = model(**{name: images for name, (images, _) in data.items()})
    return {name: float((scores[name].argmax(1) == labels).double().mean()) for name, (_, labels) in data.items()}


def main() -> tuple[dict[str, float], dict[str, float], gz.Compiled]:
    """Train, zip with a little training behind every layer, convert; accuracies before and after, and the result."""
    torch.manual_seed(0)
    training, test = tasks()
    apart = Apart({"digit": network(10), "odd": network(2)})
    train(apart, torch.optim.Adam(apart.parameters(), 3e-3), training, 300)
    before = accuracies(apart, test)
    unlabelled = {name: [images[:256]] for name, (images, _) in training.items()}
    examples = {name: (images[:2],) for name, (images, _) in training.items()}
    prepared = gz.prepare(dict(apart), gz.Plan.load(PLAN), examples, calibration=unlabelled)
    for layer in prepared.steps():
        print(f"zipped {layer}")
        train(prepared, prepared.optimizer(torch.optim.Adam, lr=1e-3), training, 30)
    compiled = prepared.convert()
    after = accuracies(compiled.module, test)
    print(f"apart:  {before}\nzipped: {after}\n\n{compiled.report}")
    return before, after, compiled


if __name__ == "__main__":
    main()
