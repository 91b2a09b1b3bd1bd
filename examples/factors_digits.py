"""Kernels as factors in a plain PyTorch loop, trained on scikit-learn's digits: atoms (ACDC), or codes (CSG).

    python examples/factors_digits.py --plan csg

The plans are `examples/plans/acdc_digits.yaml` and `csg_digits.yaml`. What is prepared is trained as any other module;
the loop is that of `examples/csgd_digits.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from csgd_digits import accuracy, digits, train, unit
from torch import nn
from torch.utils.data import DataLoader

import graphzip as gz

PLANS = Path(__file__).parent / "plans"


def network() -> nn.Sequential:
    """Four convolutions."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    return nn.Sequential(unit(1, 48), unit(48, 48), unit(48, 48, 2), unit(48, 48), *head)


def factored(plan: str, epochs: int) -> tuple[float, float, float, gz.Compiled]:
    """Train, store the kernels as factors, train these; accuracies of the three, and the result."""
    torch.manual_seed(0)
    training, test = digits()
    loader = DataLoader(training, batch_size=64, shuffle=True, drop_last=True)
    model = network()
    train(model, loader, epochs)
    images = training.tensors[0]
    prepared = gz.prepare(model, gz.Plan.load(PLANS / f"{plan}_digits.yaml"), (images[:2],), calibration=[images[:256]])
    scores = [accuracy(model, test), accuracy(prepared.eval(), test)]
    train(prepared, loader, epochs, lr=0.02)
    compiled = prepared.convert()
    return scores[0], scores[1], accuracy(compiled.module, test), compiled


def main() -> None:
    """Print what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=("acdc", "csg"), default="acdc")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    dense, fitted, trained, compiled = factored(options.plan, options.epochs)
    print(f"dense:   {dense:.2%}\nfitted:  {fitted:.2%}\ntrained: {trained:.2%}\n\n{compiled.report}")


if __name__ == "__main__":
    main()
