"""Names, numbers and tables as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from graphzip.commands.demo import DemoResult, Measured
from graphzip.commands.text import compile_dict, compile_text, demo_dict, demo_text
from graphzip.report.tables import (
    Before,
    Column,
    change,
    closest,
    comparison_table,
    file_size,
    groups_table,
    module_names,
    percent,
    quantity,
    table,
    widths_table,
)


@dataclass(frozen=True)
class Group:
    name: str
    size: int
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    mergeable: bool = True
    exact: bool = True
    reason: str | None = None

    def touched(self, role: str) -> Sequence[str]:
        return {"producer": self.producers, "consumer": self.consumers}[role]


class Groups:
    parameters = 2000
    shrinkable_parameters = 1500

    def __init__(self, *groups: Group) -> None:
        self.groups = groups

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def to_dict(self) -> dict[str, object]:
        return {"groups": [group.name for group in self.groups]}

    def __str__(self) -> str:
        return groups_table(self)


STEM = Group(
    "conv1",
    64,
    ("conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight", "layer1.2.conv2.weight"),
    ("layer1.0.conv1.weight", "layer1.1.conv1.weight"),
)
INNER = Group("layer1.0.conv1", 16, ("layer1.0.conv1.weight", "layer1.0.conv1.bias"), ("layer1.0.conv2.weight",))
HEAD = Group("fc", 10, ("fc.weight",), mergeable=False, reason="an output of the model")


# ------------------------------------------------------------------------------------------------- numbers, names


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (417, "417"),
        (999, "999"),
        (1000, "1.000 k"),
        (9999, "9.999 k"),
        (99_999, "100.0 k"),
        (999_999, "1.000 M"),
        (25_557_032, "25.56 M"),
        (4_089_184_256, "4.089 G"),
        (123_456_789_012, "123.5 G"),
        (3e12, "3.000 T"),
    ],
)
def test_quantity(number: float, text: str) -> None:
    assert quantity(number) == text


def test_sizes_and_shares() -> None:
    assert file_size(812) == "812 B"
    assert file_size(44_674_123) == "44.67 MB"
    assert percent(3, 8) == "37.5 %"
    assert percent(0, 0) == "0.0 %"
    assert change(200, 89.2) == "-55.4 %"
    assert change(4, 5) == "+25.0 %"
    assert change(0, 5) == "+0.0 %"


def test_module_names() -> None:
    params = ("a.conv.weight", "a.conv.bias", "a.scale", "token", "weight", "a.conv.weight")
    assert module_names(params) == ("a.conv", "a.scale", "token", "weight")


def test_closest() -> None:
    assert closest("conv2", ["conv1", "fc"]) == "did you mean 'conv1'?"
    assert closest("zzzz", ["conv1", "fc"]) == "there are: 'conv1', 'fc'"
    assert closest("zzzz", [f"conv{i}" for i in range(12)]).endswith("'conv9', 2 more")
    assert closest("zzzz", []) == "there are none to choose from"


# ------------------------------------------------------------------------------------------------- tables


def test_table() -> None:
    text = table([Column("name"), Column("count", right=True)], [("a[bold]b", "1"), ("c", "1000")])
    assert text.splitlines() == ["name       count", "────────────────", "a[bold]b       1", "c           1000"]


def test_long_cells_are_folded_and_nothing_is_lost() -> None:
    name = "features.denseblock1.denselayer1.conv1"
    text = table([Column("name"), Column("more")], [(name, "x" * 30)], width=40)
    assert all(len(line) <= 40 for line in text.splitlines())
    letters = "".join(text.split())
    assert letters.count("x") == 30
    assert set(name) <= set(letters)


def test_groups_table() -> None:
    head = replace(HEAD, reason="softmax in node softmax_1 (net.py:12 in forward) treats its channels together")
    assert groups_table(Groups(STEM, INNER, head), width=100).splitlines() == [
        "group            channels   producers                consumers               mergeable",
        "─" * 100,
        "conv1                  64   conv1, layer1.0.conv2,   layer1.0.conv1,         yes, exact",
        "                            +2                       layer1.1.conv1",
        "layer1.0.conv1         16   layer1.0.conv1           layer1.0.conv2          yes, exact",
        "fc                     10   fc                                               no: softmax in node",
        "                                                                             softmax_1 (net.py:12 in",
        "                                                                             forward) treats its",
        "                                                                             channels together",
        "",
        "2 of 3 groups can shrink: 88.9 % of the channels, 75.0 % of the parameters",
    ]


def test_a_group_that_merges_but_not_exactly() -> None:
    text = groups_table(Groups(replace(STEM, exact=False)))
    assert text.splitlines()[2].endswith("yes, not exact")
    assert text.endswith("1 of 1 group can shrink: 100.0 % of the channels, 75.0 % of the parameters")


def test_comparison_and_widths() -> None:
    assert comparison_table([Before("MACs", "4.089 G", "1.822 G", "-55.4 %")]).splitlines() == [
        "        before     after    change",
        "──────────────────────────────────",
        "MACs   4.089 G   1.822 G   -55.4 %",
    ]
    assert widths_table([("conv1", 64, 32)]).splitlines()[-1].split() == ["conv1", "64", "32"]


# ------------------------------------------------------------------------------------------------- reports


BEFORE = Measured(accuracy=0.99, params=151_274, macs=5_000_000, bytes=620_000, latency_ms=4.0)
AFTER = Measured(accuracy=0.98, params=38_000, macs=1_250_000, bytes=170_000, latency_ms=2.0)


def demo_result(*files: Path) -> DemoResult:
    return DemoResult(Groups(STEM), BEFORE, AFTER, files)  # type: ignore[arg-type]


def test_demo_text() -> None:
    text = demo_text(demo_result(Path("kept/before.onnx")))
    assert text.startswith("group")
    assert text.endswith("\n\nwrote kept/before.onnx")
    rows = [line.split() for line in text.splitlines()]
    assert ["test", "accuracy", "99.00%", "98.00%", "-1.00", "points"] in rows
    assert ["parameters", "151.3", "k", "38.00", "k", "-74.9", "%"] in rows
    assert ["MACs", "per", "image", "5.000", "M", "1.250", "M", "-75.0", "%"] in rows
    assert ["ONNX", "file", "620.0", "kB", "170.0", "kB", "-72.6", "%"] in rows
    assert ["onnxruntime,", "64", "images", "4.00", "ms", "2.00", "ms", "-50.0", "%"] in rows


def test_demo_dict_is_json() -> None:
    data = json.loads(json.dumps(demo_dict(demo_result())))
    assert data["groups"] == {"groups": ["conv1"]}
    assert data["before"]["accuracy"] == 0.99
    assert data["after"] == {
        "accuracy": 0.98, "params": 38_000, "macs": 1_250_000, "bytes": 170_000, "latency_ms": 2.0, "batch": 64
    }  # fmt: skip
    assert data["files"] == []


class Described:
    """Stands for a report: a text and a dictionary."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, str]:
        return {"text": self.text}


def test_compile_report() -> None:
    compiled = SimpleNamespace(report=Described("halved"))
    exported = Described("slim.onnx: 2 MB")
    assert compile_text(compiled, exported, Path("m.gz")).splitlines() == [  # type: ignore[arg-type]
        "halved", "", "slim.onnx: 2 MB", "", "m.gz: the trainable module; read it with graphzip.load"
    ]  # fmt: skip
    assert compile_text(compiled, None, None) == "halved"  # type: ignore[arg-type]
    assert compile_dict(compiled, exported, Path("m.gz")) == {  # type: ignore[arg-type]
        "report": {"text": "halved"},
        "export": {"text": "slim.onnx: 2 MB"},
        "saved": "m.gz",
    }
    assert compile_dict(compiled, None, None) == {  # type: ignore[arg-type]
        "report": {"text": "halved"}, "export": None, "saved": None
    }  # fmt: skip
