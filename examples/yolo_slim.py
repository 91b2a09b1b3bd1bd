"""Slim a YOLO of ultralytics and put it back, so that its own `train`, `val` and `export` go on with the slim model.

    python examples/yolo_slim.py yolo11n.pt --keep 0.7 --data coco8.yaml --epochs 10

Layers keep their classes, names and order: each gets the weights that are left. Blocks that halve their channels need
as many in both halves, and attention reads its widths off its settings, so both are kept even or whole (`plan`).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import graphzip as gz


def plan(model: nn.Module, traced: gz.Trace, keep: float) -> gz.Plan:
    """The same share of every group, but for those that are made inside of attention."""
    whole = tuple(f"{name}." for name, module in model.named_modules() if "PSA" in type(module).__name__)
    exclude = [
        group.name
        for group in gz.channel_groups(traced)
        if any(each.role != "consumer" and each.param.startswith(whole) for each in group.slices(0))
    ]
    return gz.Plan([gz.PruneChannels(keep=keep, exclude=exclude)])


def put_back(yolo: YOLO, slim: nn.Module) -> YOLO:
    """A copy of `yolo` whose layers have the weights of the slim module."""
    result = copy.deepcopy(yolo)
    tensors = dict(slim.named_parameters()) | dict(slim.named_buffers())
    for name, module in result.model.named_modules():
        for leaf in [*module._parameters, *module._buffers]:
            value = tensors.get(f"{name}.{leaf}")
            if value is not None:
                old = getattr(module, leaf)
                value = value.detach().clone()
                setattr(module, leaf, nn.Parameter(value, old.requires_grad) if leaf in module._parameters else value)
        if isinstance(module, nn.Conv2d):
            if module.groups == module.out_channels:
                module.groups = module.weight.shape[0]
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = module.running_mean.shape[0]
    for module in result.model.modules():
        if hasattr(module, "c") and hasattr(module, "cv1"):
            module.c = module.cv1.conv.out_channels // 2
    return result


def check(yolo: YOLO, slim: nn.Module, images: torch.Tensor) -> None:
    """What was put back computes what was compiled."""
    with torch.no_grad():
        expected, found = slim(images)[0], yolo.model(images)[0]
    if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise SystemExit("the layers of this YOLO compute something else than the slim model; keep more groups whole")


def trainer_of(yolo: YOLO) -> type[DetectionTrainer]:
    """A trainer that goes on with the model as it is, where that of ultralytics would build a wide one."""

    class SlimTrainer(DetectionTrainer):
        def get_model(self, *_: Any, **__: Any) -> nn.Module:
            model = copy.deepcopy(yolo.model)
            model.requires_grad_(True)
            return model

    return SlimTrainer


def slimmed(yolo: YOLO, keep: float, images: torch.Tensor) -> YOLO:
    """A YOLO with about `keep` of the channels of each layer."""
    model = yolo.model.eval()
    traced = gz.trace(model, (images,))
    compiled = gz.compile(traced, plan(model, traced, keep))
    print(compiled.report)
    result = put_back(yolo, compiled.module)
    check(result, compiled.module, images)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--data", help="train on this data set of ultralytics, and judge the result")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    yolo = slimmed(YOLO(options.weights), options.keep, torch.rand(2, 3, options.size, options.size))
    if options.data:
        yolo.train(trainer=trainer_of(yolo), data=options.data, epochs=options.epochs, imgsz=options.size)
        print(yolo.val(data=options.data, imgsz=options.size).box.map)
    print(yolo.export(format="onnx", imgsz=options.size))


if __name__ == "__main__":
    main()
