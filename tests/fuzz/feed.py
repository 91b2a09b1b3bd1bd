"""What people feed: plans, weights, calibration data, model specs, inputs. Whatever is wrong, the error is typed."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphzip as gz
from fuzz.compare import Problem
from graphzip.commands.models import find_model, load_calibration, make_inputs, parse_shape
from graphzip.commands.weights import load_weights
from graphzip.plan.passes import PASS_OPTIONS

__all__ = ["feed"]

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
    1e400,
    10**30,
    "",
    "x",
    "*",
    "auto",
    "[",
    "a\nb",
    "\x00",
    [],
    {},
    (),
    [1],
    [[0]],
    [[0, 0]],
    [[]],
    {"*": 0.5},
    {"conv": 2},
    {"": 1},
    {1: 2},
    [None],
    ["x", "y"],
    {"x": {}},
    {"*": None},
    {"*": "x"},
    [[1, 3, 8, 8]],
    [[0]],
    [["a"]],
    b"x",
    1j,
    object(),
    3.0,
    "0.5",
    "kmeans",
    {"a": [[0, 1], [2]]},
)


def feed(seed: int) -> None:
    """Twenty odd things of every kind. Raises `Problem` where something untyped comes out."""
    rng = random.Random(f"feed {seed}")
    for number in range(20):
        name, work = rng.choice(sorted(_FEEDS.items()))
        try:
            work(rng)
        except gz.GraphZipError:
            continue
        except Exception as error:
            raise Problem("untyped", f"{name} ({number}): {type(error).__name__}: {str(error)[:200]}") from error


def _net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def _options(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice([*PASS_OPTIONS.values()])
    known = [*kind.model_fields, "keepp", ""]
    return {kind.kind: {name: rng.choice(ODD) for name in rng.sample(known, min(len(known), rng.randrange(1, 4)))}}


def _plan_dict(rng: random.Random) -> None:
    plan: dict[Any, Any] = {
        "version": rng.choice((1, 1, 1, 1, 2, "1", None, 1.0)),
        "passes": [_options(rng) for _ in range(rng.randrange(3))],
    }
    if rng.random() < 0.3:
        plan["inputs"] = rng.choice(ODD)
    if rng.random() < 0.2:
        plan["passes"] = rng.choice(ODD)
    if rng.random() < 0.1:
        plan[rng.choice(("pases", 1, None))] = 1
    made = gz.Plan.from_dict(plan if rng.random() < 0.95 else rng.choice(ODD))
    str(made), made.to_dict(), gz.Plan.from_dict(made.to_dict())
    if rng.random() < 0.3:
        gz.compile(_net(), made, (torch.randn(4, 6),), calibration=[torch.randn(4, 6)])


def _constructor(rng: random.Random) -> None:
    ((name, given),) = _options(rng).items()
    kind = PASS_OPTIONS[name]
    given = {key or "x": value for key, value in given.items()}
    gz.Plan([kind(**given)] if rng.random() < 0.8 else rng.choice(ODD))


_YAML = "version: 1\ninputs:\n  - [2, 6]\npasses:\n  - cluster_merge: {keep: 0.5, clustering: even}\n  - fold_batch_norm: {}\n"


def _mutated(rng: random.Random, text: bytes) -> bytes:
    made = bytearray(text)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(4)
        if kind == 0 and made:
            del made[at : at + rng.randrange(1, 8)]
        elif kind == 1:
            made[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4)))
        elif kind == 2:
            made[at:at] = rng.choice(
                (
                    b": ",
                    b"- ",
                    b"{",
                    b"]",
                    b"&a ",
                    b"*a",
                    b"!!python/object:os.system ",
                    b"\t",
                    b"'",
                    b"\n\n",
                    b"1e999",
                    b"<<: ",
                )
            )
        elif made:
            made[at:at] = made[rng.randrange(len(made)) :][:20]
    return bytes(made)


def _plan_file(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        path.write_bytes(_mutated(rng, _YAML.encode()))
        made = gz.Plan.load(path if rng.random() < 0.95 else Path(folder))
        made.save(Path(folder) / "again.yaml")
        if gz.Plan.load(Path(folder) / "again.yaml") != made:
            raise Problem("wrong", f"a plan is another one when it was saved and loaded: {made}")
        gz.compile(_net(), made, (torch.randn(4, 6),))


def _weights(rng: random.Random) -> None:
    model = _net()
    state: Any = dict(model.state_dict())
    kind = rng.randrange(9)
    if kind == 0:
        state.pop(rng.choice(list(state)))
    elif kind == 1:
        state[rng.choice(list(state))] = rng.choice(
            (
                torch.randn(3),
                torch.zeros(()),
                torch.randn(8, 6).to_sparse(),
                torch.randn(8, 6).half(),
                torch.zeros(8, 6, dtype=torch.int64),
            )
        )
    elif kind == 2:
        state["more"] = torch.zeros(1)
    elif kind == 3:
        state = {rng.choice(("state_dict", "model", "net")): state}
    elif kind == 4:
        state = {f"module.{name}": value for name, value in state.items()}
    elif kind == 5:
        state = rng.choice(({}, [], torch.zeros(2), {"a": 1}, {"state_dict": 3}, {1: torch.zeros(2)}, None, "x"))
    elif kind == 6:
        state = {name: value.to(torch.complex64) for name, value in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"weights{rng.choice(('.pt', '.pth', '.safetensors', '.bin', '.txt'))}"
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import save_file

                save_file(state, path)
            else:
                torch.save(state, path)
        except Exception:
            return
        if rng.random() < 0.4:
            path.write_bytes(_mutated(rng, path.read_bytes()))
        load_weights(model, path)


def _saved(rng: random.Random) -> None:
    """A saved model that is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.gz"
        gz.compile(_net(), gz.Plan([]), (torch.randn(4, 6),)).save(path)
        path.write_bytes(_mutated(rng, path.read_bytes()))
        gz.load(path).module(torch.randn(2, 6))


def _calibration_file(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        arrays: Any = rng.choice(
            (
                {"x": np.zeros((8, 6), np.float32)},
                {},
                {"x": np.zeros((8, 6)), "y": np.zeros(3)},
                {"x": np.float32(1)},
                {"x": np.array(["a"])},
                {"x": np.zeros((0, 6))},
                {"x": np.zeros((4, 6), np.uint16)},
                {"x": np.array([None, 1], dtype=object)},
                {"x": np.zeros((8, 5), np.float32)},
                {"x": np.full((8, 6), np.nan, np.float32)},
                {"x": np.zeros((8, 6), np.complex64)},
                {"x": np.zeros((8, 6), dtype="M8[s]")},
            )
        )
        np.savez(path, **arrays)
        if rng.random() < 0.4:
            path.write_bytes(_mutated(rng, path.read_bytes()))
        batches = load_calibration(path, rng.choice((4, 64, 1)))
        gz.compile(_net(), gz.Plan([gz.ClusterMerge(compensate="data")]), (torch.randn(4, 6),), calibration=batches)


def _calibration(rng: random.Random) -> None:
    given: Any = rng.choice(
        (
            [],
            [torch.randn(4, 5)],
            [torch.randn(4, 6), torch.randn(4, 5)],
            torch.randn(4, 6),
            iter([torch.randn(4, 6)]),
            [{"x": 1}],
            [None],
            ["abc"],
            [(torch.randn(4, 6), 3)],
            5,
            "x",
            {"a": 1},
            [torch.zeros(0, 6)],
            [torch.full((4, 6), float("nan"))],
            [torch.zeros(4, 6)],
            [torch.randn(1, 6)],
            [torch.randn(4, 6).double()],
            [torch.randint(3, (4, 6))],
            [[]],
            [()],
            [torch.randn(6)],
            [np.zeros((4, 6), np.float32)],
            lambda: 3,
            [torch.full((4, 6), 1e30)],
            [torch.full((4, 6), float("inf"))],
            (torch.randn(4, 6) for _ in range(2)),
            {torch.zeros(1)},
            [torch.randn(4, 6).to_sparse()],
            [torch.randn(4, 6, requires_grad=True)],
        )
    )
    passes: Any = rng.choice(
        (
            [gz.ClusterMerge(compensate="data")],
            [gz.ClusterMerge(clustering="reconstruction")],
            [gz.ClusterMerge(features="activations")],
            [],
            [gz.ClusterMerge(compensate="free")],
        )
    )
    if rng.random() < 0.2:
        gz.plan_for(
            _net(), (torch.randn(4, 6),), macs=rng.choice((0.5, 0, -1, 2.0, "x", None, float("nan"))), calibration=given
        )
    gz.compile(_net(), gz.Plan(passes), (torch.randn(4, 6),), calibration=given)


def _inputs(rng: random.Random) -> None:
    x = torch.randn(4, 6)
    given: Any = rng.choice(
        (
            x,
            (x, x),
            (),
            [x],
            {"input": x},
            None,
            (None,),
            ("x",),
            (x.double(),),
            (x[:, :5],),
            (torch.zeros(0, 6),),
            (x[:1],),
            (torch.randint(3, (4, 6)),),
            (x[0],),
            (x.half(),),
            (x.to_sparse(),),
            (x.to("meta"),),
            (3,),
            (x.numpy(),),
            (x, 3),
            ((x,),),
            ([x],),
            5,
        )
    )
    shapes: Any = rng.choice(
        (
            None,
            None,
            None,
            {},
            ({0: torch.export.Dim.AUTO},),
            ({1: torch.export.Dim("a")},),
            "x",
            ({5: torch.export.Dim.AUTO},),
            (None,),
            3,
            [{0: None}],
            ({"a": 1},),
        )
    )
    call: Any = rng.choice(
        (
            lambda: gz.channel_groups(_net(), given, dynamic_shapes=shapes),
            lambda: gz.compile(_net(), gz.Plan([]), given, dynamic_shapes=shapes),
            lambda: gz.cost(_net(), given),
            lambda: gz.widen(
                _net(), given, rng.choice((2, 1.5, 0, "x", None, {"*": 2}, {"x": 2}, {"0": 9}, -1, float("nan")))
            ),
            lambda: gz.prepare(_net(), gz.Plan([gz.ClusterMerge()]), given),
            lambda: gz.compile(
                rng.choice(
                    (
                        {},
                        {"a": _net()},
                        {"a": _net(), "b": _net()},
                        None,
                        3,
                        {"a": 1, "b": 2},
                        {"a b": _net(), "c": _net()},
                    )
                ),
                gz.Plan([gz.Zip()]),
                rng.choice((given, {"a": (x,), "b": (x,)}, {"a": (x,)})),
            ),
            lambda: gz.compile(_net(), gz.Plan([]), (x,), scope=rng.choice(("0", "x", "", "0.1", 3, "1"))),
            lambda: gz.compile(_net(), rng.choice((None, 3, [], gz.ClusterMerge(), "x")), (x,)),
            lambda: gz.compile(_net(), gz.Plan([]), (x,)).module(rng.choice((x[:, :5], x[0], x.long(), 3, None))),
        )
    )
    call()


def _spec(rng: random.Random) -> None:
    word = rng.choice(
        (
            "torchvision:resnet18",
            "timm:resnet18",
            "torchvision:",
            ":x",
            "",
            "x",
            "timm:nope",
            "torchvision:restnet18",
            "/nowhere.py:f",
            "a.py:",
            "torchvision:resnet18:x",
            "C:\\x.py:f",
            "..py:f",
            "\x00.py:f",
            "torchvision:resnet18 ",
            "file.py:3",
            "é:ü",
        )
    )
    if rng.random() < 0.3:
        word = _mutated(rng, word.encode()).decode("utf-8", "replace")
    if rng.random() < 0.3:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / rng.choice(("m.py", "a b.py", "torch.py"))
            path.write_text(
                rng.choice(
                    (
                        "def f(): return 3",
                        "raise SystemExit(2)",
                        "1/0",
                        "def f(x): pass",
                        "f = 3",
                        "import nothing_here",
                        "",
                        "\x00",
                        "def f(:",
                        "from torch import nn\nf = nn.Linear",
                        "from torch import nn\ndef f(): return nn.Linear(2, 3)",
                        "def f(): raise KeyboardInterrupt" if False else "def f(): raise RuntimeError('x')",
                    )
                )
            )
            find_model(f"{path}:{rng.choice(('f', 'g', '__name__', ''))}").build()
        return
    found = find_model(word)
    if "resnet18" not in word:
        found.build()


def _shapes(rng: random.Random) -> None:
    word = rng.choice(
        (
            "2x6",
            "2x6:int64",
            "0x6",
            "2x",
            "",
            "x",
            "2x6:float",
            "-1x6",
            "2X6",
            "2x6:int64:3",
            "99999999999x6",
            "2x6:bool",
            "²x6",
            "2x6 ",
            "1e3x2",
            "2x6:float64",
        )
    )
    shape = parse_shape(word if rng.random() < 0.7 else _mutated(rng, word.encode()).decode("utf-8", "replace"))
    if np.prod([float(size) for size in shape.sizes]) < 1e6:
        make_inputs(_net(), [shape])
        gz.compile(_net(), gz.Plan([gz.ClusterMerge()], inputs=[shape.sizes]))


def _results(rng: random.Random) -> None:
    """Reports and names of a finished model."""
    compiled = gz.compile(_net(), gz.Plan([gz.ClusterMerge()]), (torch.randn(4, 6),))
    str(compiled.report), json.dumps(compiled.report.to_dict())
    rng.choice(
        (
            lambda: compiled.task("x"),
            lambda: compiled.save("/nowhere/at/all.gz"),
            lambda: compiled.export("/nowhere/at/all.onnx"),
            lambda: gz.load("/nowhere"),
            lambda: gz.load(__file__),
            lambda: compiled.save(""),
            lambda: compiled.export(""),
            lambda: gz.channel_groups(_net(), (torch.randn(4, 6),))["nope"],
            lambda: gz.register_clustering("even")(len),
            lambda: gz.Plan([]).save("/nowhere/x.yaml"),
            lambda: compiled.export("/tmp", per_task=True),
            lambda: gz.load(Path("/tmp")),
            lambda: compiled.module(torch.randn(4, 7)),
        )
    )()


_FEEDS: dict[str, Callable[[random.Random], None]] = {
    "plan": _plan_dict,
    "constructor": _constructor,
    "plan file": _plan_file,
    "weights": _weights,
    "saved": _saved,
    "calibration file": _calibration_file,
    "calibration": _calibration,
    "inputs": _inputs,
    "spec": _spec,
    "shape": _shapes,
    "results": _results,
}
