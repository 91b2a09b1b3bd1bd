"""How long layers take in onnxruntime, on this machine: of atoms and coefficients, in a row, or one among others.

onnxruntime builds a stored kernel `A D` once, when it loads the file; so that way is measured as a dense convolution.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphzip.export.optional_packages import require

__all__ = ["ConvCase", "RowLayer", "kernel_milliseconds", "milliseconds", "row_milliseconds"]

logger = logging.getLogger(__name__)

_Graph = tuple[list[Any], dict[str, tuple[int, ...]]]

_ROUNDS = 7
_ENOUGH = 0.02  # seconds of runs in one round
_KERNELS = {"Conv", "FusedConv", "MatMul"}
_RUNS, _SECONDS = 8, 0.004  # of a kernel among others, at least


@dataclass(frozen=True)
class ConvCase:
    """A convolution to measure: the shape of its input, `(batch, channels, *size)`, and of its kernel, its groups and
    settings; `count` groups of filters have `atoms` atoms each.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    count: int
    atoms: int
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]


def milliseconds(case: ConvCase) -> tuple[float, float]:
    """Median time of one run with the kernel built, and with the atoms first."""
    one, two = (float(np.median(each)) for each in _by_turns(case.image, [_dense(case), _atoms_first(case)]))
    return one, two


@dataclass(frozen=True)
class RowLayer:
    """A convolution or, without `strides`, a linear layer of a row of layers: the shape of its weight, (O, I, *kernel),
    and its settings; `pads` are those in front of every dimension and then those behind.
    """

    weight: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1


def row_milliseconds(image: tuple[int, ...], rows: Sequence[Sequence[RowLayer]]) -> list[float]:
    """Time of one run of each of these rows of layers over an input of that shape, where nothing else delays it."""
    return [min(each) for each in _by_turns(image, [_row(stages) for stages in rows])]


@functools.cache
def kernel_milliseconds(image: tuple[int, ...], layer: RowLayer) -> float:
    """Time of the layer's kernel alone, as it is among other layers: what is done to lay out its input is not counted.

    It is measured once in a process.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = _session(image, *_row([layer]), profile=Path(folder) / "runs")
        x = np.random.default_rng(0).standard_normal(image).astype(np.float32)
        session.run(None, {"x": x})
        start, runs = time.perf_counter(), 0
        while runs < _RUNS or time.perf_counter() - start < _SECONDS:
            session.run(None, {"x": x})
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken = [
        event["dur"]
        for event in events
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] in _KERNELS
    ]
    return 1e-3 * float(np.mean(np.sort(taken[1:])[: max(1, len(taken) // 2)]))


def _row(stages: Sequence[RowLayer]) -> _Graph:
    helper, nodes = require("onnx").helper, []
    weights: dict[str, tuple[int, ...]] = {}
    for number, stage in enumerate(stages):
        names = ["x" if number == 0 else f"x{number}", f"w{number}"]
        output = "y" if number == len(stages) - 1 else f"x{number + 1}"
        if stage.strides:
            settings: dict[str, Any] = {"strides": stage.strides, "pads": stage.pads, "dilations": stage.dilations}
            settings["group"] = stage.groups
            nodes.append(helper.make_node("Conv", names, [output], **settings))
        else:
            nodes.append(helper.make_node("MatMul", names, [output]))
        weights[names[1]] = stage.weight if stage.strides else stage.weight[::-1]
    return nodes, weights


def _by_turns(shape: tuple[int, ...], graphs: Sequence[_Graph]) -> list[list[float]]:
    """Milliseconds of one run of each graph, in several rounds."""
    sessions = [_session(shape, nodes, weights) for nodes, weights in graphs]
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    times: list[list[float]] = [[] for _ in sessions]
    repeats = [_repeats(session, image) for session in sessions]
    for _ in range(_ROUNDS):
        for number, session in enumerate(sessions):  # by turns, so that both see the same machine
            start = time.perf_counter()
            for _ in range(repeats[number]):
                session.run(None, {"x": image})
            times[number].append((time.perf_counter() - start) / repeats[number])
    return [[1e3 * each for each in one] for one in times]


def _repeats(session: Any, image: Any) -> int:
    session.run(None, {"x": image})
    start = time.perf_counter()
    session.run(None, {"x": image})
    return max(1, round(_ENOUGH / max(time.perf_counter() - start, 1e-6)))


def _conv(inputs: Sequence[str], output: str, case: ConvCase, groups: int, *, spatial: bool) -> Any:
    dims = len(case.strides)
    settings: dict[str, Any] = {"strides": [1] * dims, "pads": [0] * (2 * dims), "dilations": [1] * dims}
    if spatial:
        settings = {"strides": case.strides, "pads": [*case.pads, *case.pads], "dilations": case.dilations}
    return require("onnx").helper.make_node("Conv", list(inputs), [output], group=groups, **settings)


def _dense(case: ConvCase) -> _Graph:
    return [_conv(("x", "w"), "y", case, case.groups, spatial=True)], {"w": case.kernel}


def _atoms_first(case: ConvCase) -> _Graph:
    outs, columns, *size = case.kernel
    inputs, repeats = case.image[1], max(case.count // case.groups, 1)
    helper = require("onnx").helper
    nodes = [_conv(("x", "d"), "z", case, inputs, spatial=True)]
    last = "z"
    weights = {
        "d": (inputs * repeats * case.atoms, 1, *size),
        "a": (outs, columns * case.atoms, *[1] * len(size)),
    }
    if repeats > 1:
        parts = [case.image[0], case.groups, columns, repeats, case.atoms, -1]
        nodes += [
            helper.make_node("Shape", ["z"], ["shape"]),
            helper.make_node("Constant", [], ["parts"], value_ints=parts),
            helper.make_node("Reshape", ["z", "parts"], ["parted"]),
            helper.make_node("Transpose", ["parted"], ["swapped"], perm=[0, 1, 3, 2, 4, 5]),
            helper.make_node("Reshape", ["swapped", "shape"], ["shuffled"]),
        ]
        last = "shuffled"
    nodes.append(_conv((last, "a"), "y", case, case.groups if case.count == 1 else case.count, spatial=False))
    return nodes, weights


def _session(
    image: tuple[int, ...], nodes: list[Any], weights: dict[str, tuple[int, ...]], profile: Path | None = None
) -> Any:
    onnx, runtime = require("onnx"), require("onnxruntime")
    random = np.random.default_rng(0)
    constants = [
        onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [onnx.helper.make_tensor_value_info("x", float32, image)],
        [onnx.helper.make_tensor_value_info("y", float32, None)],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
