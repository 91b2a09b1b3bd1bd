"""Explanations of groups and their picture."""

from __future__ import annotations

import builtins
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from torch import nn

import graphzip as gz
from graphzip.errors import GraphZipError, MissingDependencyError


def residual() -> gz.ChannelGroups:
    """`a` and `c` are coupled by a sum, `b` is inside, and `d` sorts its channels."""

    def run(m: Any, x: torch.Tensor) -> Any:
        x = m.a(x)
        x = x + m.c(m.norm(m.b(x)).relu())
        return m.last(m.d(x).sort(-1).values)

    parts = {name: nn.Linear(*size) for name, size in {"a": (3, 6), "b": (6, 8), "c": (8, 6), "d": (6, 5)}.items()}
    model = Net(run, **parts, norm=nn.BatchNorm1d(8), last=nn.Linear(5, 2)).eval()
    return gz.channel_groups(model, (torch.randn(2, 3),))


def test_every_operator_with_a_parameter_of_the_group() -> None:
    found = residual().explain("b")
    assert found.reason is None
    assert [(step.operator, step.role, step.params) for step in found.steps] == [
        ("linear", "producer", ("b.weight", "b.bias")),
        ("batch_norm", "pointwise", ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")),
        ("linear", "consumer", ("c.weight",)),
    ]
    assert found.passed_on == 1
    assert found.steps[1].module == "norm"


def test_the_way_to_the_operator_that_pins() -> None:
    found = residual().explain("d")
    assert [(step.operator, step.role) for step in found.steps] == [("linear", "producer"), ("sort", "pin")]
    assert found.reason is not None
    assert found.steps[-1].source in found.reason
    assert found.steps[-1].source.endswith("in forward")


def test_the_text() -> None:
    text = str(residual().explain("last"))
    assert text.splitlines()[0] == "last: 2 channels, cannot shrink: is an output of the model"
    assert [line.split("   [")[0].rstrip() for line in text.splitlines()[1:]] == [
        "  1  linear                   makes the channels (last.weight, last.bias)",
        "  2  output                   pins them",
    ]
    assert str(residual().explain("b")).splitlines()[-1] == "     1 other operator in between hands them on"
    assert residual().explain("b").to_dict()["steps"][0]["operator"] == "linear"


def test_an_unknown_group() -> None:
    with pytest.raises(KeyError, match=r"no channel group 'bb'; .*'b'"):
        residual().explain("bb")


def test_parts_of_the_groups_explain_themselves() -> None:
    assert residual()[1:3].explain("b").group == "b"


def test_the_picture_names_every_layer_that_makes_or_reads(tmp_path: Path) -> None:
    path = gz.draw_groups(residual(), tmp_path / "groups.svg")
    texts = [element.text for element in ET.parse(path).iter() if element.tag.endswith("text")]
    assert [text for text in texts if text in {"a", "b", "c", "d", "last", "norm"}] == ["a", "b", "c", "d", "last"]
    assert {"6", "8", "5", "2"} <= set(texts)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_formats(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = gz.draw_groups(residual(), tmp_path / f"groups{suffix}")
    assert path.read_bytes().startswith(start)


def test_the_same_picture_from_run_to_run(tmp_path: Path) -> None:
    first, second = (gz.draw_groups(residual(), tmp_path / f"{name}.svg") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphZipError, match=r"groups.txt is no picture; name a file that ends in .svg, .png, .pdf"):
        gz.draw_groups(residual(), tmp_path / "groups.txt")
    with pytest.raises(GraphZipError, match="does not exist"):
        gz.draw_groups(residual(), tmp_path / "missing" / "groups.svg")
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"pip install 'graphzip\[plot\]'"):
        gz.draw_groups(residual(), tmp_path / "groups.svg")
    assert not list(tmp_path.iterdir())
