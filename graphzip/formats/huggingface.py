"""Models in folders of `transformers`: a config.json and safetensors, read without running code that lies there.

A slim model goes back into such a folder where the config can say its widths: which numbers of the config decide which
sizes is found out by building the model, without memory, with another number. What no number says (layers of different
widths, where the config has one for all) is refused, and nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphzip.analysis.stacked_experts import uneven_rows
from graphzip.arguments import check_module
from graphzip.boundary import public
from graphzip.calls import Call, call_of
from graphzip.compiled import Compiled
from graphzip.errors import ArchiveError, MissingDependencyError
from graphzip.files import as_path, check_target, scratch, settle, unwritable
from graphzip.graph.source import first_line
from graphzip.graph.torch_private import pytree
from graphzip.report.tables import closest
from graphzip.tracing.results import tensors_by_way

__all__ = [
    "ADVICE",
    "TASKS",
    "companions",
    "computed_buffers",
    "copy_files",
    "fitting",
    "from_pretrained",
    "has_config",
    "is_sayable",
    "listed",
    "names_in_files",
    "new_folder",
    "of_config",
    "save_pretrained",
    "sizes_by_number",
    "without_weights",
]

logger = logging.getLogger(__name__)

TASKS: Final = {
    "feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}
"""The names of tasks that `transformers` uses, and the classes that its models of these are built by."""

_CONFIG: Final = "config.json"
_WEIGHTS: Final = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pt", ".pth", ".index.json", ".py")
_SAME: Final = 1e-4  # of the largest number of an output
_STEPS: Final = 8  # or so many steps to the next number, in 16 bits
_LISTED: Final = 5
_TRIED: Final = 64  # in place of a number that a config leaves to its model


@public
def from_pretrained(folder: str | os.PathLike[str], task: str | None = None) -> nn.Module:
    """The model of `transformers` in `folder`, with a config.json and safetensors (one file, or sharded), in eval mode.

    `task` is one of those that `transformers` names ("text-generation"); without it the model is of the class that the
    config names. Code that lies in the folder is not run, files that are unpickled are not read, and nothing is loaded
    from the network.

    Raises `ArchiveError` for a folder that holds no such model, `MissingDependencyError` where `transformers` is
    missing.
    """
    path = Path(folder)
    kind = _class_in(path, task)
    _know_caches()
    try:
        model = kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, use_safetensors=True)
    except Exception as error:
        raise ArchiveError(f"{path} cannot be loaded by transformers: {first_line(error)}") from error
    loaded: nn.Module = model.eval()
    return loaded


def without_weights(path: Path, task: str | None) -> nn.Module:
    """The same without its weights, on the meta device. Raises `ArchiveError` as `from_pretrained` does."""
    return _built(path, task, torch.device("meta")).eval()


def computed_buffers(path: Path, task: str | None) -> dict[str, torch.Tensor]:
    """What the class computes by itself, and keeps in no file, by name: frequencies, masks. Weights get no memory."""
    model = _built(path, task, _WeightsOnMeta())
    stored = model.state_dict(keep_vars=True)
    return {name: value for name, value in model.named_buffers() if name not in stored and not value.is_meta}


class _WeightsOnMeta(TorchFunctionMode):
    """Inside, tensors that begin with no value, or a random one, get no memory, as weights do."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function in (torch.empty, torch.rand, torch.randn)
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if made else {}))


def _built(path: Path, task: str | None, mode: Any) -> nn.Module:
    kind = _class_in(path, task)
    _know_caches()
    try:
        config = _transformers().AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        with mode:
            model = of_config(kind, config)
    except Exception as error:
        raise ArchiveError(f"{path} cannot be loaded by transformers: {first_line(error)}") from error
    return model


def names_in_files(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """By the name that the class has for a tensor the name that stands in the files, as `transformers` renames them.

    What is put together from several tensors of the files is left out.
    """
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # a version that reads names as they are
        return {name: name for name in files}
    renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in mapping if not isinstance(each, loading.WeightRenaming)]
    state, prefix = model.state_dict(keep_vars=True), getattr(model, "base_model_prefix", None)
    found = {}
    for name in files:
        own, converted = loading.rename_source_key(name, renamings, converters, prefix, state)
        if converted is None:
            found[own] = name
    return found


def of_config(kind: Any, config: Any) -> nn.Module:
    """A model of a class, with the dtype that the config names as `from_pretrained` gives it."""
    make = getattr(kind, "from_config", None) or getattr(kind, "_from_config", kind)
    made: nn.Module = make(config)
    return made


def _class_in(path: Path, task: str | None) -> Any:
    """The class of the model in a folder, or the one that makes models for a task."""
    described = _described(path)
    transformers = _transformers()
    if task is not None and task not in TASKS:
        raise ArchiveError(f"task: {task!r} is unknown; {closest(str(task), list(TASKS))}")
    named = (described.get("architectures") or [None])[0]
    kind = getattr(transformers, TASKS[task] if task is not None else named or "AutoModel", None)
    if kind is None:
        raise ArchiveError(
            f"{path}: transformers {transformers.__version__} has no {named!r}, which {_CONFIG} names, and code that "
            "lies in the folder is not run; give task=, or a version of transformers that has it"
        )
    return kind


def _described(path: Path) -> dict[str, Any]:
    """What the config says."""
    if not path.is_dir():
        raise ArchiveError(
            f"{path} is no folder; give one with {_CONFIG} and safetensors, as save_pretrained writes it"
        )
    if not (path / _CONFIG).is_file():
        raise ArchiveError(f"{path} has no {_CONFIG}; give a folder that save_pretrained of transformers wrote")
    try:
        found = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path / _CONFIG} cannot be read: {error}") from error
    if not any(path.glob("*.safetensors")):
        raise ArchiveError(
            f"{path} has no .safetensors; other files of weights may run code when they are read, so write it anew "
            "with save_pretrained"
        )
    return found


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            'transformers is not installed; run: pip install "graphzip[huggingface]"', name="transformers"
        ) from error


def _know_caches() -> None:
    """Let `torch.export` know what decoders return beside their logits, as `transformers` does for its own exports."""
    _know_pairs()
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        importlib.import_module("transformers.integrations.executorch").register_dynamic_cache_export_support()


def _know_pairs() -> None:
    """Of decoders that read an encoder's states: a cache of their own and one of those."""
    with contextlib.suppress(ImportError, AttributeError, ValueError):  # a version without it, or one that knows it
        pair = importlib.import_module("transformers.cache_utils").EncoderDecoderCache
        pytree.register_pytree_node(
            pair,
            lambda cache: ([cache.self_attention_cache, cache.cross_attention_cache], None),
            lambda parts, _: pair(*parts),
            serialized_type_name=f"{pair.__module__}.{pair.__name__}",
            flatten_with_keys_fn=lambda cache: (
                [
                    (pytree.GetAttrKey("self_attention_cache"), cache.self_attention_cache),
                    (pytree.GetAttrKey("cross_attention_cache"), cache.cross_attention_cache),
                ],
                None,
            ),
        )


# ------------------------------------------------------------------------------------------------- and back


@public
def save_pretrained(compiled: Compiled, model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Write what was `compiled` of `model` into a new `folder` that `transformers` loads, and give the model in it.

    `model` is the model of `transformers` that was compiled. Tokenizers and other files of the folder that it came from
    are copied, code and weights are not. The model that is given is of the class of `model`, in eval mode, and was
    compared with `compiled.module` on the example inputs.

    Raises `ArchiveError` where the config cannot say the widths, which is so where layers differ for which it has one
    number; then nothing is written, and `compiled.save` is the way. An existing folder is not written to.
    """
    check_module(model)
    if not has_config(model):
        raise ArchiveError(
            f"{type(model).__name__} is not a model of transformers; save what was compiled with .save()"
        )
    if compiled.tasks or compiled.traced.scope:
        raise ArchiveError(
            "save_pretrained takes a whole model; put a part back first (put_back), or use compiled.save"
        )
    target = new_folder(folder)
    slim = _rebuilt(compiled, model)
    try:
        with scratch(target) as fresh:
            slim.save_pretrained(fresh, safe_serialization=True)  # type: ignore[operator]
            copy_files(companions(Path(str(getattr(model, "name_or_path", "") or ""))), fresh)
            fresh.rename(target)
    except OSError as error:
        raise unwritable(target, error, ArchiveError) from error
    return slim


def has_config(model: nn.Module) -> bool:
    """Whether it is a model of `transformers`, whose widths a config says."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def is_sayable(compiled: Compiled, model: nn.Module) -> bool:
    """Whether a config of `model` has the widths of what was compiled of it, as `save_pretrained` needs it."""
    try:
        _rebuilt(compiled, model)
    except ArchiveError as error:
        logger.debug("%s", error)
        return False
    return True


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """Where a folder is going to be. Raises `ArchiveError` where there is something, or nothing can be written."""
    if as_path(folder, ArchiveError).exists():
        raise ArchiveError(f"{folder} exists; give the name of a new folder")
    return check_target(folder, ArchiveError)


def companions(source: Path) -> Iterator[Path]:
    """What lies beside the weights in the folder that a model came from: tokenizers, notes, poolings."""
    for file in sorted(source.iterdir()) if str(source) != "." and source.is_dir() else ():
        if file.name not in (_CONFIG, "generation_config.json") and not file.name.endswith(_WEIGHTS):
            yield file


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder, and what lies in folders among them; all are on the disk then."""
    listed = list(files)
    for file in listed:
        if file.is_file():
            shutil.copy2(file, folder / file.name)
    settle(folder)
    for inner in listed:
        if inner.is_dir():
            (folder / inner.name).mkdir()
            copy_files((file for file in inner.iterdir() if not file.name.endswith(_WEIGHTS)), folder / inner.name)


def _rebuilt(compiled: Compiled, model: Any) -> nn.Module:
    """A model of the class of `model` with the weights of what was compiled, which computes the same."""

    def build(config: Any) -> nn.Module:
        slim = _filled(compiled, model, config)
        _check_same(compiled, slim, model)
        return slim

    return fitting(model, {name: tuple(value.shape) for name, value in compiled.module.state_dict().items()}, build)


def _filled(compiled: Compiled, model: Any, config: Any) -> nn.Module:
    """A model of that config with the weights of what was compiled, and what it left out as it was."""
    state = dict(compiled.module.state_dict())
    slim: nn.Module = type(model)(config).eval().to(next(iter(model.parameters())).dtype)
    own, old = slim.state_dict(), model.state_dict()
    unknown = [name for name in state if name not in own]
    if unknown:
        raise ArchiveError(
            f"{type(model).__name__} has no {listed(unknown)}, which the slim model has: its layers compute otherwise "
            f"than those of the class; {ADVICE}"
        )
    for name, value in own.items():
        source = state.get(name, old.get(name))
        if source is None:
            raise ArchiveError(f"a model of this config has {name!r}, which {type(model).__name__} has lost; {ADVICE}")
        if source.shape != value.shape:
            raise ArchiveError(f"{name!r} is not part of what was compiled and has the old widths; {ADVICE}")
        value.copy_(source)
    return slim


ADVICE: Final = (
    "save it as one file (compiled.save, or a target that ends in '.graphzip'), or find widths that a config can say "
    "with plan_for(..., uniform=True)"
)


def _check_same(compiled: Compiled, slim: nn.Module, model: nn.Module) -> None:
    """Raises `ArchiveError` where the model that was built anew gives something else than the compiled one."""
    call: Call = call_of(model, compiled.example_inputs)
    mode = compiled.module.training
    try:
        with torch.no_grad():
            expected = tensors_by_way(compiled.module.eval()(*call.args, **call.kwargs))
            found = tensors_by_way(slim(*call.args, **call.kwargs))
    except Exception as error:
        uneven = uneven_rows(compiled.traced.graph)
        why = "".join(
            f" ({name!r} has a width that is no multiple of {step}; give the plan round_to={step})"
            for name, step in list(uneven.items())[:1]
        )
        raise ArchiveError(f"the model that the config describes fails: {first_line(error)}{why}; {ADVICE}") from error
    finally:
        compiled.module.train(mode)
    for way, value in expected.items():
        other = found.get(way)
        scale = float(value.abs().max()) if value.numel() else 0.0
        limit = max(_SAME, _STEPS * torch.finfo(value.dtype).eps) if value.is_floating_point() else _SAME
        if other is None or other.shape != value.shape or not float((other - value).abs().max()) <= limit * scale:
            name = ".".join(map(str, way))
            raise ArchiveError(
                f"the model that the config describes gives another {name!r} than the slim one (a norm that was "
                f"narrowed may weigh its channels, which norms='plain' leaves out); {ADVICE}"
            )


# ------------------------------------------------------------------------------------------------- the config


def fitting(model: Any, wanted: Mapping[str, tuple[int, ...]], build: Callable[[Any], nn.Module]) -> nn.Module:
    """What `build` makes of the config with the numbers for these shapes.

    Several numbers of a config may explain the same sizes (heads, and the width of heads), so they are tried in turn.
    Raises `ArchiveError` where no config has them, or `build` raises it for each.
    """
    refusal: ArchiveError | None = None
    for backwards in (False, True):
        try:
            return build(_config_of(model, wanted, backwards=backwards))
        except ArchiveError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _config_of(model: Any, wanted: Mapping[str, tuple[int, ...]], *, backwards: bool) -> Any:
    """The config with the numbers for these shapes. Raises `ArchiveError` where there are none."""
    config = copy.deepcopy(model.config)
    shapes = _shapes(model, config)
    assert shapes is not None
    numbers = list(_numbers(config))
    for part, field in reversed(numbers) if backwards else numbers:
        if _misfit(shapes, wanted) is None:
            return config
        number = getattr(part, field)
        share = _share(model, config, part, field, shapes, wanted)
        if share is not None:
            setattr(part, field, share)
            changed = _shapes(model, config)
            if changed is None:
                setattr(part, field, number)
            else:
                shapes = changed
    wrong = _misfit(shapes, wanted)
    if wrong is None:
        return config
    raise ArchiveError(
        f"{_CONFIG} cannot say the widths of the slim model: {wrong!r} is {_shown(wanted[wrong])}, where the nearest "
        f"config has {_shown(shapes[wrong])}; {ADVICE}"
    )


def _numbers(config: Any) -> Iterator[tuple[Any, str]]:
    """The numbers of a config, and of the configs in it, that may decide a width; those that it leaves open last."""
    unsaid = []
    for field, value in list(vars(config).items()):
        if field.startswith("_") or isinstance(value, bool) or field.endswith(("_id", "vocab_size")):
            continue
        if isinstance(value, int) and value > 1:
            yield config, field
        elif value is None:
            unsaid.append((config, field))
        elif hasattr(value, "to_dict"):
            yield from ((part, name) for part, name in _numbers(value))
    yield from unsaid


def _share(
    model: Any,
    config: Any,
    part: Any,
    field: str,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> int | None:
    """What a number of the config has to be for what it decides alone to have the wanted sizes; `None` if nothing."""
    said = getattr(part, field)
    found = {
        number * wanted[name][dim] / size
        for name, dim, size, number in _decided(model, config, part, field, shapes)
        if name in wanted and len(wanted[name]) == len(shapes[name])
    }
    share = found.pop() if len(found) == 1 else 0.0
    return int(share) if share >= 1 and share == int(share) and share != said else None


def _decided(
    model: Any, config: Any, part: Any, field: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, int, int]]:
    """The sizes that grow in proportion to a number: the parameter, its dimension, its size, and for which number."""
    said = getattr(part, field)
    number = _TRIED if said is None else int(said)
    once, twice = (shapes if said == each else _with(model, config, part, field, each) for each in (number, 2 * number))
    if once is None or twice is None or not once.keys() == twice.keys() == shapes.keys():
        return
    for name, shape in once.items():
        for dim, size in enumerate(shape):
            if len(twice[name]) == len(shape) and twice[name][dim] == 2 * size:
                yield name, dim, size, number


def sizes_by_number(model: Any) -> list[set[tuple[str, int]]]:
    """For each number of the config of a model the sizes that it decides: parameters, and their dimensions."""
    config = copy.deepcopy(model.config)
    shapes = _shapes(model, config)
    if shapes is None:
        return []
    numbers = list(_numbers(config))
    return [{(name, dim) for name, dim, *_ in _decided(model, config, *each, shapes)} for each in numbers]


def _with(model: Any, config: Any, part: Any, field: str, value: int) -> dict[str, tuple[int, ...]] | None:
    """The shapes with another number in the config, which is left as it was; `None` where it takes none."""
    said = getattr(part, field)
    try:
        setattr(part, field, value)
    except Exception:  # of the kinds that the configs' own checks raise
        return None
    try:
        return _shapes(model, config)
    finally:
        setattr(part, field, said)


def _shapes(model: Any, config: Any) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a model of this config, which is built without memory; `None` where it cannot be built."""
    try:
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in type(model)(config).state_dict().items()}
    except Exception:
        logger.debug("no model of this config", exc_info=True)
        return None


def _misfit(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    return next((name for name, shape in shapes.items() if name in wanted and wanted[name] != shape), None)


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name) for name in names[:_LISTED]) + more
