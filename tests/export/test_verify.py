"""A file is verified where the check could have failed: every change is found, and what no check sees is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import graphzip as gz
from graphzip.export import weights

EMPTY = gz.Plan([])


class Fn(nn.Module):
    """Layers by name, and a forward given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


class One(Fn):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def rows(count: int = 4, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def compiled(module: nn.Module, *inputs: torch.Tensor, **options: Any) -> gz.Compiled:
    return gz.compile(module, EMPTY, inputs or (rows(),), **options)


def mlp(function: Callable[..., Any]) -> nn.Module:
    return seeded(lambda: One(function, a=nn.Linear(8, 16), o=nn.Linear(16, 3)))


def logits(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.o(net.a(x).relu())  # type: ignore[no-any-return]


def alter(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def alter_tensor(tensor: onnx.TensorProto, change: Callable[[np.ndarray], Any]) -> None:
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


def zero_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) and np.prod(tensor.dims) > 1:
            alter_tensor(tensor, lambda array: array.fill(0))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[gz.Compiled, Path]:
    module = seeded(torchvision.models.resnet18)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    path = tmp_path_factory.mktemp("resnet") / "resnet.onnx"
    result = compiled(module, torch.randn(2, 3, 64, 64))
    report = result.export(path)
    assert report.verified, report
    return result, path


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_one_weight_off_by_a_thousandth_is_found_in_every_layer(
    step: int, resnet: tuple[gz.Compiled, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, source = resnet
    remember_builds(monkeypatch)
    assert result.verify(source).verified
    model = onnx.load(source)
    names = [tensor.name for tensor in model.graph.initializer if np.prod(tensor.dims) > 16]
    assert len(names) > 40
    for name in names[::step]:
        changed = onnx.load(source)

        def nudge(array: np.ndarray) -> None:
            array.flat[array.size // 3] *= 1.001

        alter_tensor(initializer(changed, name), nudge)
        path = tmp_path / "changed.onnx"
        onnx.save(changed, path)
        with pytest.raises(gz.VerificationError, match=r"1 of \d+ numbers of"):
            result.verify(path)


def remember_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert a module once for many checks of files of it."""
    from graphzip.export import onnx as exporter

    build, made = exporter.build, {}

    def once(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(module) not in made:
            made[id(module)] = build(module, *args, **kwargs)
        return made[id(module)]

    monkeypatch.setattr(exporter, "build", once)


def swap(model: onnx.ModelProto) -> None:
    one, other = (initializer(model, f"layer1.0.conv{k}.weight") for k in (1, 2))
    first, second = numpy_helper.to_array(one), numpy_helper.to_array(other)
    one.CopyFrom(numpy_helper.from_array(second, one.name))
    other.CopyFrom(numpy_helper.from_array(first, other.name))


def set_attribute(kind: str, name: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == kind)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def bypass(kind: str) -> Callable[[onnx.ModelProto], None]:
    """Take the first operator of a kind out."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == kind)
        for other in model.graph.node:
            for place, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[place] = node.input[0]
        model.graph.node.remove(node)

    return change


def rewire(model: onnx.ModelProto) -> None:
    """Let a convolution read another layer's kernel of the same shape."""
    convs = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1].startswith("layer1")]
    convs[1].input[1] = convs[0].input[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zero_weights, r"numbers of"),
        (swap, r"numbers of"),
        (rewire, "resnet"),
        (set_attribute("Conv", "strides", [1, 1]), r"attribute 'strides' of Conv .* is \[1, 1\], not \[2, 2\]"),
        (set_attribute("BatchNormalization", "epsilon", 2e-5), "attribute 'epsilon' of BatchNormalization"),
        (set_attribute("MaxPool", "ceil_mode", 1), "attribute 'ceil_mode' of MaxPool"),
        (bypass("Relu"), "where Relu .* should be"),
        (bypass("MaxPool"), "where MaxPool .* should be"),
    ],
)
def test_every_change_of_a_file_is_found(
    change: Callable[[onnx.ModelProto], None],
    message: str,
    resnet: tuple[gz.Compiled, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, source = resnet
    remember_builds(monkeypatch)
    path = tmp_path / "resnet.onnx"
    path.write_bytes(source.read_bytes())
    alter(path, change)
    before = path.read_bytes()
    with pytest.raises(gz.VerificationError, match=message):
        result.verify(path)
    assert path.read_bytes() == before


class Blind(nn.Module):
    """Outputs that show no error: random, NaN, dead, saturated, constant, integers, or beside a huge constant."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.o(self.a(x).relu()))


BLIND: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "random": (lambda y: y + torch.randn_like(y), "random operators were held still.*randn_like"),
    "dropout": (lambda y: F.dropout(y, 0.5), "random operators were held still.*dropout"),
    "drawn": (lambda y: y * torch.multinomial(y.softmax(1), 1), r"not compared: they are random \(multinomial"),
    "nan": (lambda y: y * torch.nan, "output 'output' is NaN"),
    "dead": (lambda y: (y - 100).relu(), "'output' is the same for all inputs"),
    "saturated": (lambda y: (y * 1e6).sigmoid(), "'output' hardly shows a change|rounding explains"),
    "integers": (lambda y: y.argmax(1), "outputs of integers|'output' is the same for all inputs"),
    "constant": (lambda y: y * 0 + 3, "'output' is the same for all inputs"),
    "offset": (lambda y: y + 1e6, "rounding (explains|moves) .*output 'output'"),
}


@pytest.mark.parametrize("name", BLIND)
def test_what_an_output_cannot_show_is_said_and_weights_are_compared_all_the_same(name: str, tmp_path: Path) -> None:
    function, sentence = BLIND[name]
    result = compiled(seeded(lambda: Blind(function)))
    path = tmp_path / "blind.onnx"
    report = result.export(path)
    assert report.verified is False
    assert len(report.unchecked) == 1
    assert report.to_dict()["unchecked"] == list(report.unchecked)
    assert re.search(sentence, report.unchecked[0])
    for change in (zero_weights, lambda model: alter_tensor(initializer(model, "a.weight"), nudge_one)):
        path.unlink()
        result.export(path)
        alter(path, change)
        with pytest.raises(gz.VerificationError, match="numbers of"):
            result.verify(path)


def nudge_one(array: np.ndarray) -> None:
    array.flat[5] *= 1.001


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ([0.0, -torch.inf, 0.0], True),
        ([-torch.inf, 0.0, -torch.inf], True),
        ([1.0, 0.0, 1.0], True),
        ([0.0, torch.finfo(torch.float32).min, 0.0], True),
        ([0.0, -torch.inf, -torch.inf], False),
        ([0.5, 0.0, 0.5], False),
        ([0.0, -torch.inf, 1.0], False),
    ],
)
def test_masks_in_numbers_are_traced_to_truth_values(values: list[float], same: bool) -> None:
    assert weights._masks(torch.tensor(values), torch.tensor([True, False, True])) is same
