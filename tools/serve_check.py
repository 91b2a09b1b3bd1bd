"""Load an ONNX file as a server would, send it random batches for a while, and compare each answer with the module.

    python tools/serve_check.py slim.graphzip slim.onnx --seconds 60

`slim.graphzip` is what `Compiled.save` or `--save` wrote, `slim.onnx` what was exported of it. Batches have between one
and `--most` samples. It prints how many were answered, how long they took, and how far the answers were off; it ends
with 1 where one is off by more than `--error` of the largest output (give 0.1 for an int8 file).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree

import graphzip as gz

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 where every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what Compiled.save wrote")
    parser.add_argument("file", type=Path, help="its ONNX file")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--most", type=int, default=16, help="samples of the largest batch")
    parser.add_argument("--error", type=float, default=1e-3, help="of the largest output")
    given = parser.parse_args(arguments)
    compiled, served = gz.load(given.model), gz.OnnxModule(given.file)
    module = compiled.module.eval()
    example = compiled.example_inputs
    leaves = list(example.values()) if isinstance(example, dict) else list(example)
    names = list(example) if isinstance(example, dict) else None
    rng, times, worst, scale = random.Random(0), [], 0.0, 0.0
    end = time.monotonic() + given.seconds
    while time.monotonic() < end or not times:
        size = rng.randint(1, given.most)
        batch = [_random(leaf, size) for leaf in leaves]
        start = time.perf_counter()
        found = served(*batch) if names is None else served(**dict(zip(names, batch, strict=True)))
        times.append(1e3 * (time.perf_counter() - start))
        with torch.no_grad():
            wanted = module(*batch) if names is None else module(**dict(zip(names, batch, strict=True)))
        for one, other in zip(pytree.tree_leaves(found), _tensors(wanted), strict=True):
            worst = max(worst, float((one.double() - other.double()).abs().max()))
            scale = max(scale, float(other.double().abs().max()))
    share = worst / scale if scale else worst
    middle, late = np.percentile(times, [50, 99])
    print(f"{len(times)} batches answered; median {middle:.2f} ms, 99 % within {late:.2f} ms")
    print(f"answers are off by at most {share:.2g} of the largest output ({given.error:g} allowed)")
    return int(not share <= given.error)


def _random(leaf: torch.Tensor, size: int) -> torch.Tensor:
    """So many samples like those of the example: normal numbers, or rows of it where they are integers."""
    if leaf.is_floating_point():
        return torch.randn(size, *leaf.shape[1:], dtype=leaf.dtype)
    return leaf[torch.randint(len(leaf), (size,))]


def _tensors(outputs: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    sys.exit(main())
