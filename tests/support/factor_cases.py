"""Small networks with kernels to factor, and what is looked at in the results."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphzip as gz
from graphzip.graph.layers.factored import AtomConv

IMAGE = (torch.zeros(2, 4, 9, 9),)


def block(ins: int, outs: int, stride: int = 1, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=bias), nn.BatchNorm2d(outs), nn.ReLU())


def small() -> nn.Sequential:
    return nn.Sequential(
        block(4, 8), block(8, 8), block(8, 16, 2, bias=True), block(16, 16), nn.Flatten(), nn.Linear(400, 5)
    )


def prepared(model: nn.Module, inputs: Any = IMAGE, calibration: Any = None, **options: Any) -> gz.Prepared:
    return gz.prepare(model, gz.Plan([gz.AtomFactorize(**{"force": True, **options})]), inputs, calibration=calibration)


def summary(compiled: gz.Compiled) -> dict[str, Any]:
    found: dict[str, Any] = compiled.report.passes[-1]["atom_factorize"]
    return found


def layers(model: nn.Module) -> dict[str, AtomConv]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AtomConv)}


KINDS = [
    (nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2), (2, 4, 20)),
    (nn.Conv2d(4, 6, (3, 1), padding="same", bias=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    (nn.Conv3d(4, 6, 2, padding="valid"), (2, 4, 4, 4, 4)),
]
