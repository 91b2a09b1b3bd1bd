"""Models and inputs by the names that a command line gives them.

A model is `torchvision:NAME`, `timm:NAME`, `hf:FOLDER`, an ONNX file, a `.pt2` of `torch.export.save` or
`path/to/file.py:factory`, and nothing is downloaded; an input is a shape such as `2x3x224x224`, with a dtype where it
is not the model's own: `2x16:int64`, and with a name where it is given by that: `input_ids=2x16:int64`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor, nn

from graphzip.arguments import check_room
from graphzip.errors import ExampleInputError, GraphZipError, MissingDependencyError
from graphzip.files import is_file
from graphzip.report.tables import closest

__all__ = [
    "InputShape",
    "ModelSpec",
    "find_model",
    "import_file",
    "load_calibration",
    "load_model",
    "make_inputs",
    "parse_shape",
]

_FUNCTIONS = 20
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_FORMS = "torchvision:NAME, timm:NAME, hf:FOLDER, model.onnx, program.pt2 or path/to/file.py:factory"


@dataclass(frozen=True)
class InputShape:
    """One tensor input, in elements per dimension, batch first; `dtype` is `None` where the model's own is meant.

    It is given by `name` where it has one.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None
    name: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """A model that was found but not built. `inputs(module)` are its usual input shapes, `None` where unknown.

    `sized` makes it for given shapes, where building it depends on them, `tasked` for a task that `transformers` names.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], tuple[InputShape, ...] | None]
    sized: Callable[[Sequence[InputShape]], ModelSpec] | None = None
    tasked: Callable[[str], ModelSpec] | None = None

    def asked(self, shapes: Sequence[InputShape], task: str | None) -> ModelSpec:
        """The same for what was asked for. Raises `GraphZipError` where a model has no task."""
        if task is not None:
            if self.tasked is None:
                raise GraphZipError(f"--task is for folders of transformers (hf:FOLDER), and {self.name!r} is none")
            return self.tasked(task)
        return self.sized(shapes) if self.sized is not None and shapes else self


def load_model(spec: str) -> nn.Module:
    """Build the model that `spec` names, with random weights.

    Raises `GraphZipError` where there is no such model or it cannot be built, `MissingDependencyError` where the
    package that has it is not installed.
    """
    return find_model(spec).build()


def find_model(spec: str) -> ModelSpec:
    """Look `spec` up without building the model. Raises as `load_model` does."""
    if spec.startswith("hf:") and spec != "hf:":
        return _huggingface(spec.removeprefix("hf:"))
    if spec.endswith((".pt2", ".onnx")):
        return _from_program(Path(spec))
    if spec.endswith((".pt", ".pth", ".torchscript", ".safetensors")):
        raise GraphZipError(
            f"{spec!r} is not a model: weights have no code, and TorchScript hides it; give what builds the model, "
            f"file.py:factory, and the weights with --weights (of TorchScript: torch.jit.load(path).state_dict())"
        )
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise GraphZipError(f"{spec!r} is not a model; write {_FORMS}")
    if source == "torchvision":
        return _torchvision(name)
    if source == "timm":
        return _timm(name)
    if source.endswith(".py"):
        return _from_file(Path(source), name)
    raise GraphZipError(f"{spec!r} is not a model: {source!r} is not torchvision, timm or a .py file; write {_FORMS}")


# ------------------------------------------------------------------------------------------------- model libraries


def _library(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingDependencyError(
            f"{package} is not installed, and models named {package}:NAME come from it; "
            'run: pip install "graphzip[models]"',
            name=package,
        ) from None


def _torchvision(name: str) -> ModelSpec:
    models: Any = _library("torchvision").models
    known = models.list_models()
    if name not in known:
        raise GraphZipError(f"torchvision has no model {name!r}; {closest(name, known)}")
    builder = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False

    def inputs(module: nn.Module) -> tuple[InputShape, ...] | None:
        home = builder.__module__
        if ".video" in home:
            side = 112 if ".resnet" in home else 224
            return (InputShape((2, 3, 16, side, side)),)
        if ".optical_flow" in home:
            return None
        side = 299 if name == "inception_v3" else 224
        return (InputShape((2, 3, side, side)),)

    return ModelSpec(name, lambda: _built(f"torchvision:{name}", lambda: builder(**options)), inputs)


def _timm(name: str) -> ModelSpec:
    timm: Any = _library("timm")
    if not timm.is_model(name):
        raise GraphZipError(f"timm has no model {name!r}; {closest(name, timm.list_models())}")

    def inputs(module: nn.Module) -> tuple[InputShape, ...] | None:
        config = getattr(module, "default_cfg", None) or {}
        size = config.get("input_size")
        return None if size is None else (InputShape((2, *size)),)

    return ModelSpec(name, lambda: _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False)), inputs)


def _from_program(path: Path, shapes: Sequence[InputShape] = ()) -> ModelSpec:
    """A program of `torch.export` or an ONNX file, with its own weights; its free sizes are those of `shapes`."""
    import graphzip as gz

    if not is_file(path):
        raise GraphZipError(
            f"{path} does not exist or is not a file; give the path of an ONNX file or a program of torch.export.save"
        )
    examples: list[Any] = []

    def build() -> nn.Module:
        is_onnx = path.suffix == ".onnx"
        module, example = gz.from_onnx(path, sizes=_sizes(path, shapes)) if is_onnx else gz.from_exported(path)
        examples.append(example)
        return module

    def inputs(_: nn.Module) -> tuple[InputShape, ...] | None:
        example = examples[-1]
        named = example.items() if isinstance(example, dict) else [("", value) for value in example or ()]
        if not named or not all(isinstance(value, Tensor) for _, value in named):
            return None
        return tuple(InputShape(tuple(value.shape), value.dtype, name) for name, value in named)

    return ModelSpec(str(path), build, inputs, sized=lambda given: _from_program(path, given))


def _sizes(path: Path, shapes: Sequence[InputShape]) -> dict[str, int]:
    """The sizes of the free dimensions of an ONNX file but for the batch, where inputs have these shapes."""
    if not shapes:
        return {}
    import onnx

    try:
        inputs = onnx.load(str(path), load_external_data=False).graph.input
    except Exception:
        return {}  # what is wrong with the file is said where it is converted
    known = {re.sub(r"\W", "_", each.name): each.type.tensor_type.shape.dim for each in inputs}
    found: dict[str, int] = {}
    for place, shape in enumerate(shapes):
        dims = known.get(shape.name, ()) if shape.name else [*known.values(), ()][min(place, len(known))]
        for dim, size in [*zip(dims, shape.sizes, strict=False)][1:]:
            if dim.dim_param:
                found[dim.dim_param] = size
    return found


def _huggingface(folder: str, task: str | None = None) -> ModelSpec:
    """A folder of `transformers`, with its own weights."""
    import graphzip as gz

    def inputs(module: Any) -> tuple[InputShape, ...] | None:
        main, config = getattr(module, "main_input_name", None), getattr(module, "config", None)
        side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if main == "pixel_values" and isinstance(side, int):
            return (InputShape((2, channels, side, side), None, main),)
        if main != "input_ids":
            return None
        decoder = ("decoder_input_ids",) if getattr(config, "is_encoder_decoder", False) else ()
        return tuple(InputShape((2, 16), torch.int64, name) for name in (main, "attention_mask", *decoder))

    return ModelSpec(
        folder, lambda: gz.from_pretrained(folder, task), inputs, tasked=lambda named: _huggingface(folder, named)
    )


# ------------------------------------------------------------------------------------------------- a user's file


def _from_file(path: Path, name: str) -> ModelSpec:
    if not is_file(path):
        raise GraphZipError(f"{path} does not exist or is not a file; give the path of the file that builds the model")
    module = import_file(path)
    factory = getattr(module, name, None)
    if not callable(factory):
        found = _callables(module)
        listed = ", ".join(found[:_FUNCTIONS]) + (f" and {len(found) - _FUNCTIONS} more" * (len(found) > _FUNCTIONS))
        raise GraphZipError(f"{path} has no function {name!r}; it has {listed or 'none at all'}")

    def build() -> nn.Module:
        return _built(f"{path}:{name}", factory)

    return ModelSpec(name, build, lambda _: None)


def import_file(path: Path) -> ModuleType:
    """Run the file as `python file.py` would: its own folder comes first in the search path.

    Raises `GraphZipError` where there is none, or it fails.
    """
    if not is_file(path):
        raise GraphZipError(f"{path} does not exist or is not a file; give the path of a Python file")
    name = "_graphzip_model_" + re.sub(r"\W", "_", str(path.resolve().with_suffix("")))
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise GraphZipError(f"{path} cannot be imported: {_cause(error)}; fix the file and try again") from error
    return module


def _callables(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def _built(what: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        model = factory()
    except GraphZipError:
        raise
    except (Exception, SystemExit) as error:
        raise GraphZipError(f"{what} could not be built: {_cause(error)}; it is called without arguments") from error
    if not isinstance(model, nn.Module):
        raise GraphZipError(f"{what} returned {type(model).__name__}; it must return an nn.Module")
    return model


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------- inputs


def parse_shape(text: str) -> InputShape:
    """`2x3x224x224`, with a dtype `2x16:int64`, by name `mask=2x16`. Raises `ExampleInputError` where it is neither."""
    name, _, shape_text = text.rpartition("=")
    sizes, _, dtype = shape_text.partition(":")
    fits = re.fullmatch(r"[0-9]{1,15}(x[0-9]{1,15})*", sizes) and (":" not in shape_text or dtype in _DTYPES)
    if not fits or ("=" in text and not name.isidentifier()):
        known = ", ".join(_DTYPES)
        raise ExampleInputError(
            f"{reprlib.repr(text)} is not an input shape; write 1x3x224x224, or with a dtype 1x16:int64 "
            f"(one of {known}), or by name input_ids=1x16:int64"
        )
    shape = tuple(int(size) for size in sizes.split("x"))
    if not all(shape):
        raise ExampleInputError(f"{reprlib.repr(text)} has an empty dimension; every size must be at least 1")
    return InputShape(shape, getattr(torch, dtype) if dtype else None, name)


def make_inputs(
    module: nn.Module, shapes: Sequence[InputShape], *, seed: int = 0
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Random inputs on the model's device, by name where they have one: normal floats, integers 0 and 1.

    Raises `ExampleInputError` where they are larger than any example needs to be, or only some have a name.
    """
    check_room(shape.sizes for shape in shapes)
    names = [shape.name for shape in shapes if shape.name]
    if names and (len(names) < len(shapes) or len(set(names)) < len(names)):
        raise ExampleInputError("give a name to every input, each another, or to none: input_ids=1x16:int64")
    generator = torch.Generator().manual_seed(seed)
    values = [*module.parameters(), *module.buffers()]
    floating = next((value.dtype for value in values if value.is_floating_point()), torch.float32)
    device = values[0].device if values else torch.device("cpu")
    made = tuple(_random(shape.sizes, shape.dtype or floating, generator).to(device) for shape in shapes)
    return dict(zip(names, made, strict=True)) if names else made


def _random(sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator, dtype=torch.float32).to(dtype)
    return (torch.rand(math.prod(sizes), generator=generator) < 0.5).reshape(sizes).to(dtype)


# ------------------------------------------------------------------------------------------------- calibration data


def load_calibration(
    path: str | Path, batch: int = 64, *, by_name: bool = False
) -> list[tuple[Tensor, ...]] | list[dict[str, Tensor]]:
    """Batches of the arrays in an `.npz` file: one array per input, in their order or by name, samples first.

    An `.npy` file has the array of one input. Raises `ExampleInputError` where the file cannot be read, is empty, or
    its arrays hold different numbers of samples.
    """
    path = Path(path)
    advice = "write it with numpy.savez(path, x=images)"
    if not is_file(path):
        raise ExampleInputError(f"{path} cannot be read as calibration data: it is no file; {advice}")
    try:
        data = np.load(path, allow_pickle=False)
        with contextlib.closing(data) if isinstance(data, NpzFile) else contextlib.nullcontext():
            named = dict(data) if isinstance(data, NpzFile) else {"": data}
            arrays = [_tensor(array) for array in named.values()]
    except Exception as error:  # a damaged archive fails in many ways
        raise ExampleInputError(f"{path} cannot be read as calibration data ({_cause(error)}); {advice}") from error
    counts = {len(array) if array.dim() else 0 for array in arrays}
    if len(counts) != 1 or 0 in counts:
        raise ExampleInputError(
            f"{path} holds arrays of {sorted(counts)} samples; give one array per input, all with the same samples"
        )
    batches = list(zip(*(torch.split(array, batch) for array in arrays), strict=True))
    return [dict(zip(named, each, strict=True)) for each in batches] if by_name and "" not in named else batches


def _tensor(array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise TypeError("it holds something that is no array")
    found = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if not found.isfinite().all():
        raise ValueError("it holds NaN or infinite numbers")
    return found
