"""Class activation maps at every layer of a network whose layers share coefficients, as one picture.

    python tools/activation_maps.py MODEL.graphzip IMAGE -o maps.png [--class 3]

`MODEL.graphzip` is what `Compiled.save` wrote, after `AtomFactorize(share="net")` or another way of sharing. The
weights of a class in the linear layer that ends the network weigh the channels of its last convolutions (Zhou et al.
2016). Layers that share coefficients have channels in correspondence, so the same weights, as many as a layer has
channels, make a map of that layer ("A Joint Subspace View to Convolutional Neural Networks", section 5). A map is laid
over the image, from the first layer, top left, to the last; bright is for the class.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import graphzip as gz
from graphzip.graph.layers.factored import AtomConv

EDGE = 192
"""Pixels of the longer edge of one map in the picture."""


@torch.no_grad()
def activation_maps(model: nn.Module, x: Tensor, label: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The class (by default the one that the model says) and a map of the size of its features for every atom layer.

    `x` is `(1, channels, height, width)`. Raises `gz.GraphZipError` for a model without atom layers or without a linear
    layer at its end.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AtomConv)}
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise gz.GraphZipError("the model has no layers of atoms; apply AtomFactorize with lower='reconstruct' to it")
    if not heads:
        raise gz.GraphZipError("the model has no linear layer, so no class has weights")
    features: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        layers[name].register_forward_hook(lambda _, __, output: features.__setitem__(name, output[0]))

    for name in layers:
        keep(name)
    scores = model.eval()(x)
    chosen = int(scores[0].argmax()) if label is None else label
    weights = heads[-1].weight[chosen]
    maps = {}
    for name, feature in features.items():
        width = min(len(weights), len(feature))
        maps[name] = torch.einsum("c,chw->hw", weights[:width], feature[:width].relu())
    return chosen, maps


def picture(image: Image.Image, maps: dict[str, Tensor]) -> Image.Image:
    """The image under every map, in rows."""
    scale = EDGE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    under = np.asarray(image.convert("L").resize(size), dtype=np.float32)[:, :, None] / 255
    columns = max(1, round(len(maps) ** 0.5))
    rows = -(-len(maps) // columns)
    canvas = np.ones((rows * (size[1] + 4), columns * (size[0] + 4), 3), dtype=np.float32)
    for place, values in enumerate(maps.values()):
        wide = F.interpolate(values[None, None], size=(size[1], size[0]), mode="bilinear", align_corners=False)[0, 0]
        span = float(wide.max() - wide.min())
        heat = ((wide - wide.min()) / span if span else torch.zeros_like(wide)).numpy()
        colours = np.stack([heat, 4 * heat * (1 - heat), 1 - heat], axis=2)
        top, left = place // columns * (size[1] + 4), place % columns * (size[0] + 4)
        canvas[top : top + size[1], left : left + size[0]] = 0.4 * under + 0.6 * colours
    return Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("maps.png"))
    parser.add_argument("--class", dest="label", type=int, default=None, help="by default what the model says")
    parser.add_argument("--mean", type=float, nargs=3, default=(0.485, 0.456, 0.406))
    parser.add_argument("--std", type=float, nargs=3, default=(0.229, 0.224, 0.225))
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        compiled = gz.load(options.model)
        height, width = compiled.example_inputs[0].shape[2:]
        image = Image.open(options.image).convert("RGB").resize((width, height))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (options.mean, options.std))
        chosen, maps = activation_maps(compiled.module, (pixels - mean) / std, options.label)
        picture(image, maps).save(options.output)
    except (gz.GraphZipError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.output}: class {chosen}, {', '.join(maps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
