"""Read the weights that people hold into a model: state dicts, wrapped and prefixed as training frameworks write them.

What was taken out of a checkpoint is said in the log. Where a checkpoint holds several state dicts (the weights and
their moving average), or prefixes do not settle what is meant, the choice is asked for and never made silently.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphzip.errors import WeightsError
from graphzip.files import is_file
from graphzip.report.tables import closest

__all__ = ["load_weights"]

logger = logging.getLogger(__name__)

_LISTED = 5
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "params_ema",
    "ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "generator",
    "student",
    "teacher",
    "module",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "_model.", "network.", "encoder.")
_COUNTERS = "num_batches_tracked"


def load_weights(
    module: nn.Module, path: str | Path, *, key: str | None = None, strip_prefix: str | None = None
) -> list[str]:
    """Load a state dict into `module`, in place; every name, shape and kind of number must fit.

    `.pt`, `.pth` and `.bin` files hold a state dict, or a checkpoint that has one under a key such as `state_dict`,
    `model` or `ema`; nothing but tensors is unpickled. `key` names the one that is meant (`"a.b"` for one inside
    another). A prefix that wrappers put before every name (`module.`) is taken off where the model's own names have
    none; `strip_prefix` names another one. Returns what was taken and what was done to it, in sentences, which are
    logged as well.

    Raises `WeightsError` where the file cannot be read, holds several state dicts and no `key` was given, or its names,
    shapes or numbers do not fit the model; then the model is as it was.
    """
    path = Path(path)
    said: list[str] = []
    state = _chosen(_read(path), path, key, said)
    own = module.state_dict()
    state = _without_prefix(state, own, path, strip_prefix, said)
    _check_fit(state, own, path)
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the model: {type(error).__name__}: {_first_line(error)}") from error
    counters = own.keys() - state.keys()
    if counters:
        said.append(f"{len(counters)} counters of batch norms ({_COUNTERS}) are not in the file and stay as they are")
    for sentence in said:
        logger.info("%s: %s", path, sentence)
    return said


def _read(path: Path) -> Any:
    if not is_file(path):
        raise WeightsError(f"{path} does not exist or is not a file; give a .pt, .pth or .safetensors file")
    if path.suffix not in {".pt", ".pth", ".bin", ".safetensors"}:
        raise WeightsError(f"{path} is not a weights file; weights are .pt, .pth or .safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged or holds more than tensors; "
            "write it with torch.save(model.state_dict(), ...) or safetensors"
        ) from error


# ------------------------------------------------------------------------------------------------- which state dict


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _chosen(found: Any, path: Path, key: str | None, said: list[str]) -> dict[str, Tensor]:
    if key is not None:
        return _named(_under(found, path, key))
    if _is_state(found):
        return _named(found)
    candidates = _candidates(found)
    if not candidates:
        raise WeightsError(
            f"{path} holds no state dict; it must hold names and tensors, as torch.save(model.state_dict(), ...) "
            f"writes, itself or under a key such as {', '.join(_WRAPPERS[:3])}{_others(found)}"
        )
    if len(candidates) > 1:
        listed = ", ".join(f"{name} ({len(state)} tensors)" for name, state in candidates.items())
        raise WeightsError(
            f"{path} holds several state dicts: {listed}; say which one is meant with --weights-key "
            f"{next(iter(candidates))} (in Python key={next(iter(candidates))!r})"
        )
    ((name, state),) = candidates.items()
    said.append(f"took the {len(state)} tensors under {name!r}")
    return _named(state)


def _candidates(found: Any) -> dict[str, Mapping[str, Tensor]]:
    """State dicts under keys that are known, and those elsewhere that are like one of them, such as an average."""
    known = {name: found[name] for name in _known_keys(found) if _is_state(found[name])}
    if not known:
        return known
    others = {str(name): value for name, value in found.items()}
    for name, value in found.items():
        inner = value if isinstance(value, Mapping) else {}
        others |= {f"{name}.{key}": each for key, each in inner.items()}
    alike = {
        name: value
        for name, value in others.items()
        if name not in known and _is_state(value) and any(_are_alike(value, each) for each in known.values())
    }
    return known | alike


def _are_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts may be of the same model: half of the names are the same, or their ends are."""
    ends = [{_without_known(str(name)) for name in each} for each in (one, other)]
    return 2 * len(ends[0] & ends[1]) >= max(map(len, ends))


def _without_known(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _known_keys(found: Any) -> list[str]:
    return [name for name in _WRAPPERS if name in found] if isinstance(found, Mapping) else []


def _others(found: Any) -> str:
    """What a checkpoint holds instead, for somebody who has to name a key."""
    inside = [str(name) for name in found if isinstance(found[name], Mapping)] if isinstance(found, Mapping) else []
    return f"; name the right one of {', '.join(inside[:_LISTED])} with --weights-key" if inside else ""


def _under(found: Any, path: Path, key: str) -> Mapping[str, Tensor]:
    here: Any = found
    for part in [key] if isinstance(found, Mapping) and key in found else key.split("."):
        if not isinstance(here, Mapping) or part not in here:
            names = [str(name) for name in here] if isinstance(here, Mapping) else []
            raise WeightsError(f"{path} has nothing under the key {key!r} (--weights-key); {closest(part, names)}")
        here = here[part]
    if not _is_state(here):
        raise WeightsError(
            f"{path} holds no state dict under the key {key!r} (--weights-key), but a {type(here).__name__}"
        )
    state: Mapping[str, Tensor] = here
    return state


def _named(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    return {str(name): value for name, value in state.items()}


# ------------------------------------------------------------------------------------------------- names and numbers


def _without_prefix(
    state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path, given: str | None, said: list[str]
) -> dict[str, Tensor]:
    if given is not None:
        without = [name for name in state if not name.startswith(given)]
        if without:
            raise WeightsError(
                f"{path}: {len(without)} names do not begin with {given!r} (--strip-prefix): "
                f"{', '.join(without[:_LISTED])}; give a prefix that all have"
            )
        return {name.removeprefix(given): value for name, value in state.items()}
    taken = ""
    while prefix := _common_prefix(state, own):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        taken += prefix
    if taken:
        said.append(f"took the prefix {taken!r} off every name")
    return state


def _common_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """A known prefix that all names of the file have and those of the model have not."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            return prefix
    return ""


def _is_finite(value: Tensor, mine: Tensor) -> bool:
    """Whether nothing is NaN or infinite in the model's type, but for what is infinite in the model itself: masks."""
    if mine.shape != value.shape or not mine.is_floating_point():
        return True
    cast = value.to(mine.dtype)
    fine = cast.isfinite()
    return bool(fine.all()) or (mine.device == cast.device and bool((fine | (cast == mine)).all()))


def _check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    packed = [f"{name}: {how}" for name, value in state.items() if name in own and (how := _packed(value))]
    both = [(name, value, own[name]) for name, value in state.items() if name in own and not _packed(value)]
    shapes = [
        f"{name}: {_shape(value)} in the file, {_shape(mine)} in the model"
        for name, value, mine in both
        if mine.shape != value.shape
    ]
    kinds = [
        f"{name}: {_dtype(value)} in the file, {_dtype(mine)} in the model"
        for name, value, mine in both
        if _kind(value) != _kind(mine)
    ]
    infinite = [name for name, value, mine in both if value.is_floating_point() and not _is_finite(value, mine)]
    wrong = {
        "other shapes": shapes,
        "other kinds of numbers": kinds,
        "not dense": packed,
        "not finite": infinite,
        "missing": [name for name in own if name not in state and not name.endswith(_COUNTERS)],
        "unexpected": [name for name in state if name not in own],
    }
    if any(wrong.values()):
        raise WeightsError(_misfit(path, {what: names for what, names in wrong.items() if names}))


def _packed(value: Tensor) -> str:
    """How a tensor is stored that is not one number behind the other; empty for one that is."""
    if value.layout != torch.strided or value.is_nested:
        return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    return "quantized" if value.is_quantized else "without values" if value.is_meta else ""


def _kind(value: Tensor) -> str:
    return "floating" if value.is_floating_point() else "complex" if value.is_complex() else "integer"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _misfit(path: Path, wrong: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for what, names in wrong.items():
        rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        parts.append(f"{what} ({len(names)}): {', '.join(names[:_LISTED])}{rest}")
    return f"{path} does not fit the model; {'; '.join(parts)}; give the weights of this very model"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)
