"""Centripetal SGD in a plain PyTorch loop: train a network on scikit-learn's digits, halve it while it trains on.

    python examples/csgd_digits.py --net residual --plot curves.png

The loop in `train` is all there is to it; copy it. The plot needs matplotlib (`pip install "graphzip[plot]"`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphzip as gz

PLAN = gz.Plan([gz.ClusterMerge(keep=0.5, strength="auto")])


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int, *, lr: float = 0.05) -> None:
    """Train a network, or a prepared one: then its clusters grow together."""
    steps = epochs * len(loader)
    options = {"lr": lr, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    if isinstance(model, gz.Prepared):
        optimizer = model.optimizer(torch.optim.SGD, steps=steps, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if isinstance(model, gz.Prepared):
            model.record(loss)
    model.eval()


def unit(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())


class Plain(nn.Sequential):
    """Convolutions one after the other."""

    def __init__(self) -> None:
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(unit(1, 24), unit(24, 32, 2), unit(32, 48), *pool, nn.Linear(48, 10))


class Residual(nn.Module):
    """Two blocks with shortcuts: the convolutions that are added up shrink together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = unit(1, 24), unit(24, 32, 2)
        self.inner1, self.outer1 = unit(24, 24), nn.Conv2d(24, 24, 3, padding=1)
        self.inner2, self.outer2 = unit(32, 32), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) to (n, 10)."""
        x = self.stem(x)
        x = self.down((x + self.outer1(self.inner1(x))).relu())
        x = (x + self.outer2(self.inner2(x))).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Dense(nn.Module):
    """Every layer reads all before it; a batch norm follows each producer at its place in the concatenation."""

    def __init__(self, growth: int = 12, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        widths = [16 + growth * layer for layer in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, growth, 3, 1, 1, bias=False) for width in widths[:-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) to (n, 10)."""
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        logits: Tensor = self.head(self.norms[-1](x).relu().mean((2, 3)))
        return logits


NETS = {"residual": Residual, "dense": Dense, "plain": Plain}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images (n, 1, 8, 8) in [0, 1] and labels: 1347 to train on, 450 to test on."""
    found = load_digits()
    images, labels = torch.tensor(found.images / 16).float()[:, None], torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return TensorDataset(images[:-450], labels[:-450]), TensorDataset(images[-450:], labels[-450:])


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of right answers."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    """Train, prepare, train, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="residual")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="draw the deviation and the loss into this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    training, test = digits()
    loader = DataLoader(training, batch_size=64, shuffle=True, drop_last=True)
    model = NETS[options.net]()
    train(model, loader, options.epochs)
    print(f"trained:  {accuracy(model, test):.2%}")
    prepared = gz.prepare(model, PLAN, (test.tensors[0][:2],))
    train(prepared, loader, options.epochs)
    print(f"C-SGD:    {accuracy(prepared, test):.2%}, deviation {prepared.deviation():.1e}")
    compiled = prepared.convert()
    print(f"merged:   {accuracy(compiled.module, test):.2%}\n\n{compiled.report}")
    if options.plot is not None:
        prepared.history.plot(options.plot)


if __name__ == "__main__":
    main()
