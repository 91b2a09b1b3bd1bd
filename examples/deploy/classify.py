"""Run an exported file with onnxruntime and numpy alone: neither torch nor graphzip is needed where it runs.

    python examples/deploy/classify.py slim.onnx images.npy

`images.npy` has samples in the shape that the model takes, batch first. It prints the class of each.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime

__all__ = ["classify"]


def classify(file: str, images: np.ndarray, batch: int = 32) -> np.ndarray:
    """The class of each image: the index of its highest score."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 0  # as many as there are cores
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [images[start : start + batch].astype(np.float32) for start in range(0, len(images), batch)]
    return np.concatenate([session.run(None, {name: part})[0].argmax(1) for part in parts])


if __name__ == "__main__":
    print("\n".join(map(str, classify(sys.argv[1], np.load(sys.argv[2])))))
