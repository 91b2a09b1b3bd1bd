"""Archives from a stranger, checksums correct: none runs code, opens a file, changes the process or takes memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from graphzip.export.archive import sealed

ROOT = Path(__file__).resolve().parents[2]
GOOD = ROOT / "tests" / "data" / "format_2.graphzip"

Change = Callable[[dict[str, Any]], object]


def node(data: dict[str, Any], operator: str = "aten.relu.default") -> dict[str, Any]:
    """The first call of an operator."""
    found: dict[str, Any] = next(each for each in data["graph"]["nodes"] if each["target"] == operator)
    return found


def deep(levels: int, make: Callable[[Any], Any]) -> Any:
    """Something nested this often."""
    value: Any = 1
    for _ in range(levels):
        value = make(value)
    return value


def call(target: str, *args: Any, **kwargs: Any) -> Change:
    """Another operator in place of one of the model."""
    return lambda data: node(data).update(target=target, args=list(args), kwargs=kwargs)


def output_type(name: str | None, context: str | None) -> Change:
    """Another kind of result."""
    return lambda data: data["graph"]["outputs"][1].update(type=name, context=context)


def example(**changes: Any) -> Change:
    """Another description of the first example input."""
    return lambda data: data["example"]["leaves"][0]["random"].update(changes)


def state(number: int, **changes: Any) -> Change:
    """Another description of a parameter."""
    return lambda data: data["state"][number].update(changes)


def weight(**changes: Any) -> Change:
    """Another description of the kernel of the first convolution."""
    return lambda data: next(each for each in data["state"] if each["name"] == "stem.weight").update(changes)


def fetch(target: str) -> Change:
    """A node that reads some other attribute."""

    def change(data: dict[str, Any]) -> None:
        next(each for each in data["graph"]["nodes"] if each["op"] == "get_attr").update(target=target)

    return change


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(data: dict[str, Any]) -> None:
        for each in changes:
            each(data)

    return change


def without(*path: str | int) -> Change:
    """A part is missing."""

    def change(data: Any) -> None:
        *way, last = path
        for step in way:
            data = data[step]
        del data[last]

    return change


def replaced(value: Any, *path: str | int) -> Change:
    """A part is something else."""

    def change(data: Any) -> None:
        *way, last = path
        for step in way:
            data = data[step]
        data[last] = value

    return change


X = {"node": "image"}
ENUM = '{"__enum__": true, "fqn": "antigravity", "name": "x"}'
LEAF = {"type": None, "context": None, "children_spec": []}

CRAFTED: dict[str, Change] = {
    # code behind names
    "enum": output_type("builtins.dict", ENUM),
    "enum escaped": output_type("builtins.dict", ENUM.replace("_", "\\u005f")),
    "enum in a list": output_type("builtins.dict", f"[{ENUM}, 1]".replace("_", "\\u005f")),
    "enum of a module path": output_type(
        "builtins.dict", '["a", {"\\u005f_enum__": true, "fqn": "os:system", "name": "a.b"}]'
    ),
    "defaultdict": output_type(
        "collections.defaultdict",
        '{"default_factory_module": "os", "default_factory_name": "system", "dict_context": ["a", "b"]}',
    ),
    "namedtuple": output_type("collections.namedtuple", '"os.stat_result"'),
    "deque": output_type("collections.deque", "3"),
    "no name": output_type("NO_SERIALIZED_TYPE_NAME_FOUND", "null"),
    "torch size": output_type("torch.Size", "null"),
    "unknown type": output_type("os.system", "null"),
    "type is a number": replaced(3, "graph", "outputs", 1, "type"),
    "sequence with keys": output_type("builtins.tuple", '["logits", "masked"]'),
    "keys are missing": output_type("builtins.dict", "null"),
    "keys are too few": output_type("builtins.dict", '["a"]'),
    "keys are the same": output_type("builtins.dict", '["a", "a"]'),
    "keys are lists": output_type("builtins.dict", '[["a"], ["b"]]'),
    "keys are fractions": output_type("builtins.dict", "[0.5, 1.5]"),
    "context is no json": output_type("builtins.dict", "__import__('os')"),
    "context is deep": output_type("builtins.dict", "[" * 100_000),
    "structure is deep": replaced(
        [1, deep(2_000, lambda inner: {"type": "builtins.tuple", "context": "null", "children_spec": [inner]})],
        "graph",
        "outputs",
    ),
    "structure of another version": replaced(2, "graph", "outputs", 0),
    "leaf with children": replaced([1, {**LEAF, "children_spec": [LEAF]}], "graph", "outputs"),
    # operators
    "manual_seed": call("aten.manual_seed.default", 1),
    "set_grad_enabled": call("aten.set_grad_enabled.default", False),
    "save": call("aten.save.default", X, "graphzip_was_here"),
    "from_file": call("aten.from_file.default", "/etc/passwd", False, 10),
    "warn": call("aten.warn.default", "hello"),
    "print": call("aten._print.default", "hello"),
    "in place": call("aten.relu_.default", X),
    "set_": call("aten.set_.source_Tensor", X, X),
    "out": call("aten.add.out", X, X, out=X),
    "other namespace": call("prim.device.default", X),
    "attribute of an operator": call("aten.relu.__class__", X),
    "module of torch": call("torch.load", "x"),
    "builtin": call("builtins.eval", "1"),
    "power": call("operator.pow", 7, 30_000_000),
    "power of a node": call("operator.pow", 7, X),
    "huge integer": call("operator.mul", 10**4000, 2),
    "target is a list": replaced(["aten", "relu"], "graph", "nodes", 12, "target"),
    "call of a module": lambda data: node(data).update(op="call_module", target="norm"),
    "call of a method": lambda data: node(data).update(op="call_method", target="__reduce__"),
    # names
    "node with code": lambda data: node(data).update(name="x; import os"),
    "node with a line break": lambda data: node(data).update(name="x\nimport os"),
    "node called as a keyword": lambda data: node(data).update(name="class"),
    "node twice": lambda data: node(data).update(name="image"),
    "keyword argument with code": lambda data: node(data).update(kwargs={"a=print()": 1}),
    "keyword argument that is a keyword": lambda data: node(data).update(kwargs={"lambda": 1}),
    "argument with code": replaced("image, x=print()", "graph", "arguments", 0),
    "input with code": lambda data: node(data, "image").update(target="image=print()"),
    "class with code": both(replaced("A: pass\nimport os\nclass B", "class_name"), fetch("stem")),
    "fetch of a method": fetch("forward.__globals__"),
    "fetch of a private attribute": fetch("_modules"),
    "fetch of nothing": fetch("no.such"),
    "fetch with a quote": fetch("a' + b + '"),
    "state with a quote": state(-1, name='a".__class__'),
    "state over an attribute": state(-1, name="forward", same_as="stem.weight"),
    "state over a module": state(-1, name="stem", same_as="stem.weight"),
    "state below a tensor": state(-1, name="stem.weight.x", same_as="stem.weight"),
    "state in private": state(-1, name="_buffers.x", same_as="stem.weight"),
    "state that is deep": state(-1, name=".".join("a" * 5_000), same_as="stem.weight"),
    "state that is long": state(-1, name="a" * 1_000_000, same_as="stem.weight"),
    "state tied in a circle": weight(same_as="stem.weight"),
    "control characters": state(-1, name="a\u0000b", same_as="stem.weight"),
    "surrogates": lambda data: node(data).update(name="\ud800"),
    # memory and time
    "large example": example(shape=[2, 3, 12_000, 12_000]),
    "larger example": example(shape=[2, 3, 2**31 - 1, 2**31 - 1]),
    "negative example": example(shape=[-1, 3, 6, 6]),
    "example of many dimensions": example(shape=[1] * 100),
    "strides with gaps": weight(strides=[10**9, 10**6, 10**3, 1]),
    "strides of zero": weight(strides=[0, 0, 0, 0]),
    "strides of another rank": weight(strides=[1]),
    "conditions that compute": replaced(["image.shape[0] ** 999999999 > 1"], "conditions"),
    "conditions that nest": replaced(["(" * 9_000 + "1" + ")" * 9_000], "conditions"),
    "conditions with code": replaced(["__import__('os').system('true') == 0"], "conditions"),
    "conditions that are long": replaced(["1 + " * 100_000 + "1 > 0"], "conditions"),
    "conditions on nothing": replaced(["nobody.shape[0] > 1"], "conditions"),
    "arguments that nest": lambda data: node(data).update(args=[deep(150, lambda inner: [inner])]),
    "document that nests": replaced(deep(5_000, lambda inner: [inner]), "report", "passes"),
    "document of many values": replaced([[]] * 2_500_000, "report", "passes"),
    # wrong kinds
    "no report": replaced({}, "report"),
    "report is a list": replaced([], "report"),
    "report of text": replaced("text", "report", "before"),
    "report with odd passes": replaced([1], "report", "passes"),
    "dtype": example(dtype="nn"),
    "dtype of an integer": example(dtype="int64"),
    "mean is not a number": example(mean="x"),
    "range of one": example(range=[1]),
    "input of another dtype": replaced("Tensor", "inputs", 0, 2),
    "input of another rank": replaced([None, 3], "inputs", 0, 1),
    "an input less": without("inputs", 0),
    "an example less": without("example", "leaves", 0),
    "no nodes": replaced([], "graph", "nodes"),
    "no output": without("graph", "nodes", -1),
    "two outputs": lambda data: data["graph"]["nodes"].append(data["graph"]["nodes"][-1]),
    "a later node": lambda data: node(data).update(args=[{"node": "output"}]),
    "itself": lambda data: node(data).update(args=[{"node": node(data)["name"]}]),
    "numbers of a call": lambda data: data["numbers"].append(node(data)["name"]),
    "aliases": replaced({"a": 1}, "aliases"),
    "module types": replaced({"stem": ["Conv2d"]}, "module_types"),
    "true is a text": replaced("true", "batch_dynamic"),
    "task with a keyword": replaced(
        [{"name": "class", "arguments": [], "inputs": [1, LEAF], "outputs": None}], "tasks"
    ),
}
"""Each must be refused with an `ArchiveError`."""


def craft(change: Change, target: Path) -> Path:
    with safetensors.safe_open(GOOD, framework="pt") as file:
        metadata = file.metadata()
    document = json.loads(metadata["document"])
    change(document)
    tensors = load_file(GOOD)
    text = json.dumps(document)
    save_file(tensors, target, metadata=sealed({**metadata, "document": text}))
    return target


def test_none_of_the_crafted_archives_does_anything(tmp_path: Path) -> None:
    sys.setrecursionlimit(20_000)
    try:
        paths = {name: craft(change, tmp_path / f"{number}") for number, (name, change) in enumerate(CRAFTED.items())}
    finally:
        sys.setrecursionlimit(1_000)
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "workers" / "archive_sandbox.py"),
        str(GOOD),
        *map(str, paths.values()),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["grown"] < 200e6
    assert found["files"].pop(str(GOOD)) | {"seconds": 0} == {"error": None, "seconds": 0, "did": [], "changed": False}
    for name, path in paths.items():
        result = found["files"][str(path)]
        assert result["error"] is not None, name
        assert result["error"][0] == "ArchiveError", (name, result["error"])
        assert result["did"] == [], name
        assert not result["changed"], name
        assert result["seconds"] < 5, name
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_of_a_weight_is_noticed(seed: int, tmp_path: Path) -> None:
    from graphzip.errors import ArchiveError
    from graphzip.export.archive import load_archive

    data = bytearray(GOOD.read_bytes())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in load_file(GOOD).values())
    generator = torch.Generator().manual_seed(seed)
    place = len(data) - 1 - int(torch.randint(weights, (), generator=generator))
    data[place] ^= 1 << int(torch.randint(8, (), generator=generator))
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(ArchiveError, match="does not match its checksum"):
        load_archive(tmp_path / "flipped")


def test_random_damage_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("fuzz_archives", ROOT / "tools" / "fuzz_archives.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["fuzz_archives.py", "--cases", "120", "--seed", "7"])
    assert tool.main() == 0
    assert "'ArchiveError': " in capsys.readouterr().out
