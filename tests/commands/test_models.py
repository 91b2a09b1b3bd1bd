"""Models, weights and inputs by name, and the message of everything that can be wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip.commands.models import InputShape, find_model, load_calibration, load_model, make_inputs, parse_shape
from graphzip.errors import ExampleInputError, GraphZipError, MissingDependencyError

NETWORK = """
import torch
from torch import nn
from sizes_beside import WIDTH


def small():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH))


class Whole(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)


def broken():
    raise RuntimeError("no such layer\\nsecond line")


def leaves():
    raise SystemExit(3)


def not_a_module():
    return 7


def _private():
    return None


constant = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sizes_beside.py").write_text("WIDTH = 4\n")
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return path


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


# ------------------------------------------------------------------------------------------------- models


def test_factory_of_a_file(file: Path) -> None:
    model = load_model(f"{file}:small")
    assert isinstance(model, nn.Sequential)
    assert model[0].out_channels == 4
    assert find_model(f"{file}:small").inputs(model) is None


def test_class_of_a_file(file: Path) -> None:
    assert load_model(f"{file}:Whole").in_features == 2


def test_torchvision_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads weights"))
    spec = find_model("torchvision:lraspp_mobilenet_v3_large")
    model = spec.build()
    assert sum(parameter.numel() for parameter in model.parameters()) > 3_000_000
    assert spec.inputs(model) == (InputShape((2, 3, 224, 224)),)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet50", (2, 3, 224, 224)),
        ("inception_v3", (2, 3, 299, 299)),
        ("r3d_18", (2, 3, 16, 112, 112)),
        ("s3d", (2, 3, 16, 224, 224)),
    ],
)
def test_usual_inputs_of_torchvision(name: str, sizes: tuple[int, ...]) -> None:
    pytest.importorskip("torchvision")
    assert find_model(f"torchvision:{name}").inputs(nn.Identity()) == (InputShape(sizes),)


def test_two_image_models_have_no_usual_input() -> None:
    pytest.importorskip("torchvision")
    assert find_model("torchvision:raft_small").inputs(nn.Identity()) is None


class FakeTimm:
    """The part of timm that is used; the real one is an extra."""

    @staticmethod
    def is_model(name: str) -> bool:
        return name in FakeTimm.list_models()

    @staticmethod
    def list_models() -> list[str]:
        return ["vit_tiny", "resnet10t"]

    @staticmethod
    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        assert not pretrained
        model = nn.Identity()
        model.default_cfg = {"input_size": (3, 176, 176)}
        return model


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm)
    spec = find_model("timm:resnet10t")
    assert spec.inputs(spec.build()) == (InputShape((2, 3, 176, 176)),)
    assert spec.inputs(nn.Identity()) is None
    with pytest.raises(GraphZipError, match=r"^timm has no model 'resnet10'; did you mean 'resnet10t'\?$"):
        find_model("timm:resnet10")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_missing_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as error:
        load_model(f"{package}:resnet18")
    assert str(error.value) == (
        f'{package} is not installed, and models named {package}:NAME come from it; run: pip install "graphzip[models]"'
    )


def test_package_that_is_broken_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("importlib.import_module", lambda _: (_ for _ in ()).throw(ModuleNotFoundError(name="inner")))
    with pytest.raises(ModuleNotFoundError) as error:
        load_model("timm:resnet18")
    assert error.value.name == "inner"


FORMS = "torchvision:NAME, timm:NAME, hf:FOLDER, model.onnx, program.pt2 or path/to/file.py:factory"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", f"'resnet18' is not a model; write {FORMS}"),
        (
            "keras:resnet18",
            f"'keras:resnet18' is not a model: 'keras' is not torchvision, timm or a .py file; write {FORMS}",
        ),
        ("no/such.py:f", "no/such.py does not exist or is not a file; give the path of the file that builds the model"),
    ],
)
def test_unknown_model(spec: str, message: str) -> None:
    with pytest.raises(GraphZipError) as error:
        find_model(spec)
    assert str(error.value) == message


def test_unknown_torchvision_model() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(GraphZipError, match=r"^torchvision has no model 'resnet51'; did you mean 'resnet50' or"):
        find_model("torchvision:resnet51")


@pytest.mark.parametrize("name", ["medium", "constant"])
def test_missing_factory(file: Path, name: str) -> None:
    with pytest.raises(GraphZipError) as error:
        find_model(f"{file}:{name}")
    listed = "small, Whole, broken, leaves, not_a_module"
    assert str(error.value) == f"{file} has no function {name!r}; it has {listed}"


def test_missing_factory_among_many(tmp_path: Path) -> None:
    path = tmp_path / "many.py"
    path.write_text("\n".join(f"def f{i}(): ..." for i in range(23)))
    with pytest.raises(GraphZipError, match=r"it has f0, f1, .*, f19 and 3 more$"):
        find_model(f"{path}:g")


def test_file_without_functions(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(GraphZipError, match=r"has no function 'g'; it has none at all$"):
        find_model(f"{path}:g")


def test_file_that_cannot_be_imported(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("import a_package_that_is_not_there")
    with pytest.raises(GraphZipError) as error:
        find_model(f"{path}:g")
    assert str(error.value) == (
        f"{path} cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'; "
        "fix the file and try again"
    )
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("name", "message", "cause"),
    [
        ("broken", "could not be built: RuntimeError: no such layer; it is called without arguments", RuntimeError),
        ("leaves", "could not be built: SystemExit: 3; it is called without arguments", SystemExit),
        ("not_a_module", "returned int; it must return an nn.Module", type(None)),
    ],
)
def test_factory_that_fails(file: Path, name: str, message: str, cause: type) -> None:
    spec = find_model(f"{file}:{name}")
    with pytest.raises(GraphZipError) as error:
        spec.build()
    assert str(error.value) == f"{file}:{name} {message}"
    assert isinstance(error.value.__cause__, cause)


# ------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1x3x224x224", InputShape((1, 3, 224, 224))),
        ("16", InputShape((16,))),
        ("2x16:int64", InputShape((2, 16), torch.int64)),
        ("2x16:bfloat16", InputShape((2, 16), torch.bfloat16)),
        ("2:bool", InputShape((2,), torch.bool)),
    ],
)
def test_parse_shape(text: str, shape: InputShape) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "x", "1x", "1,3", "-1x3", "1x3:", "1x3:int7", "1x3:Tensor", "ax3", "1 x 3"])
def test_wrong_shape(text: str) -> None:
    with pytest.raises(ExampleInputError) as error:
        parse_shape(text)
    assert str(error.value) == (
        f"{text!r} is not an input shape; write 1x3x224x224, or with a dtype 1x16:int64 (one of float32, float64, "
        "float16, bfloat16, int64, int32, int16, int8, uint8, bool), or by name input_ids=1x16:int64"
    )


def test_empty_dimension() -> None:
    with pytest.raises(ExampleInputError, match="'1x0x2' has an empty dimension; every size must be at least 1"):
        parse_shape("1x0x2")


def test_inputs_follow_the_model() -> None:
    shapes = [parse_shape("2x3"), parse_shape("2x4:int64"), parse_shape("2:bool"), parse_shape("2:float16")]
    made = make_inputs(nn.Linear(1, 1).double(), shapes)
    assert [value.dtype for value in made] == [torch.float64, torch.int64, torch.bool, torch.float16]
    assert [tuple(value.shape) for value in made] == [(2, 3), (2, 4), (2,), (2,)]
    assert set(made[1].unique().tolist()) <= {0, 1}
    assert made[0].std() > 0


def test_inputs_are_reproducible() -> None:
    shapes = [parse_shape("2x3")]
    first, again, other = (make_inputs(nn.Identity(), shapes, seed=seed)[0] for seed in (1, 1, 2))
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("damage", [slice(-40, None), slice(0, 4), slice(60, 90)], ids=["directory", "head", "values"])
def test_damaged_calibration_data(tmp_path: Path, damage: slice) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((8, 6), np.float32))
    data = bytearray(path.read_bytes())
    data[damage] = bytes(len(data[damage]))
    path.write_bytes(data)
    with pytest.raises(ExampleInputError, match="cannot be read as calibration data"):
        load_calibration(path)


def test_shapes_of_inputs_are_the_free_sizes_of_an_onnx_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    compiled = gz.compile(net, gz.Plan([]), (torch.randn(2, 3, 16, 16),), dynamic_shapes="height,width")
    compiled.export(tmp_path / "free.onnx", verify=False)
    found = find_model(str(tmp_path / "free.onnx"))
    spec = found.asked([parse_shape("1x3x10x14")], None)
    module = spec.build()
    assert spec.inputs(module)[0].sizes[1:] == (3, 10, 14)
    named = found.asked([parse_shape(f"{spec.inputs(module)[0].name}=1x3x9x7")], None)
    assert named.inputs(named.build())[0].sizes[1:] == (3, 9, 7)


def test_only_folders_of_transformers_have_tasks() -> None:
    with pytest.raises(GraphZipError, match="--task is for folders of transformers"):
        find_model("torchvision:resnet18").asked([], "text-generation")
    assert find_model("hf:folder").asked([], "text-generation").name == "folder"
