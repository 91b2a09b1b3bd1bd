"""What the options of a command say: checked before the work starts, and spoken of as options where it is wrong."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from graphzip.commands.ranks import leads, ranks, share
from graphzip.commands.terminal import UsageError, in_flags, say
from graphzip.errors import ExampleInputError, GraphZipError, MissingDependencyError, NotFoundError
from graphzip.files import check_picture, check_target
from graphzip.report.tables import closest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphzip import Tune
    from graphzip.commands.models import InputShape, ModelSpec

__all__ = [
    "Weights",
    "amount",
    "amounts_of",
    "budget_of",
    "build",
    "by_name",
    "calibration_of",
    "check_files",
    "check_opset",
    "check_scope",
    "check_writable",
    "example_inputs",
    "find",
    "of_inputs",
    "option",
    "outputs_of",
    "shapes_of",
    "tuning_of",
    "view_of",
]

_FIRST_OPSET = 18  # that PyTorch's exporter writes


@contextlib.contextmanager
def option(flag: str) -> Iterator[None]:
    """What is refused in here is a wrong value of this option."""
    try:
        yield
    except MissingDependencyError:
        raise
    except GraphZipError as error:
        text = in_flags(error)
        raise UsageError(text if text.startswith(flag) else f"{flag}: {text}") from error


@contextlib.contextmanager
def of_inputs(source: str | None) -> Iterator[None]:
    """Example inputs that the model does not accept come from this option or file; so do outputs that it has not."""
    try:
        yield
    except NotFoundError as error:
        raise UsageError(in_flags(error)) from error
    except ExampleInputError as error:
        text = in_flags(error)
        raise UsageError(text if source is None or text.startswith("--") else f"{source}: {text}") from error


def amount(value: float | None) -> float | None:
    """A budget as an option gives it."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a budget; write a share such as 0.5, or an amount above 1")
    return value


def budget_of(**amounts: float | None) -> dict[str, float]:
    """The budgets that were given."""
    given = {what: amount for what, amount in amounts.items() if amount is not None}
    if not given:
        raise UsageError("give a budget, --macs, --params, --bytes or --latency; got none")
    if "latency" in given and len(given) > 1:
        others = " and ".join(f"--{what}" for what in given if what != "latency")
        raise UsageError(f"--latency is met by measuring, alone; leave it out, or leave out {others}")
    return given


def amounts_of(texts: Sequence[str], flag: str) -> dict[str, float | int]:
    """Widths by glob: `0.5`, `32`, `layer?.*=0.5`."""
    found: dict[str, float | int] = {}
    for text in texts:
        glob, _, amount = text.rpartition("=")
        try:
            found[glob or "*"] = int(amount) if amount.strip().isdecimal() else float(amount)
        except ValueError:
            raise UsageError(f"{flag}: {text!r} is no width; write 0.5, 32, or 'layer?.*=0.5'") from None
    return found


def by_name(
    texts: Sequence[str] | None, what: str, known: Sequence[str] | dict[str, str] = (), *, all_or_none: bool = False
) -> dict[str, str]:
    """`name=value` each; of `known` names alone where there are any, and of every one with `all_or_none`, if of some.

    Raises `UsageError`.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise UsageError(f"{what}: {text!r} has no name; with several models write name=value")
        if known and name not in known:
            raise UsageError(f"{what}: there is no model {name!r}; there are {', '.join(known)}")
        if name in found:
            raise UsageError(f"{what}: {name!r} is given twice; leave one out")
        found[name] = value
    missing = [name for name in known if name not in found]
    if all_or_none and found and missing:
        raise UsageError(f"{what}: {missing[0]!r} has none; give all or none")
    return found


# ------------------------------------------------------------------------------------------------- files


def check_writable(**targets: Path | None) -> None:
    """Every file that is going to be written can be; `plot` and `graph` are pictures."""
    for name, path in targets.items():
        if path is not None:
            with option(f"--{name}"):
                check = check_picture if name in ("plot", "graph") else check_target
                check(path, UsageError)


def check_files(model: str, reads: Mapping[str, Path | None], writes: Mapping[str, Path | None]) -> None:
    """No file is written over another one of the same command."""
    source = Path(model.rpartition(":")[0])
    seen: dict[str, str] = {}
    everything = {"MODEL": source if source.suffix == ".py" else None}
    for flag, path in (*everything.items(), *reads.items(), *writes.items()):
        if path is None:
            continue
        place = os.path.realpath(path)
        if place in seen and flag in writes:
            first, second = (seen[place], flag) if seen[place] in writes else (flag, seen[place])
            raise UsageError(f"{first} and {second} both name {path}; give what is written another name")
        seen.setdefault(place, flag)


def calibration_of(path: Path | None, shapes: tuple[InputShape, ...] = ()) -> Any:
    """The batches of a file, by name where the inputs have names."""
    if path is None:
        return None
    from graphzip.commands.models import load_calibration

    with option("--calibration"):
        return load_calibration(path, by_name=any(shape.name for shape in shapes))


def own_share(batches: Any, name: str = "") -> Any:
    """Of all batches those that this process reads; the first process says who reads how many samples."""
    _, count = ranks()
    if batches is None or count == 1:
        return batches
    samples = [len(next(iter(each.values() if isinstance(each, Mapping) else each))) for each in batches]
    read = [sum(samples[rank::count]) for rank in range(count)]
    if leads():
        each = ", ".join(f"rank {rank} {some}" for rank, some in enumerate(read))
        say(f"samples of --calibration{name} read: {each}; {sum(read)} in all")
    return share(batches)


def tuning_of(calibration: Path | None) -> Tune:
    """How `--tune` has the result tuned."""
    if calibration is None:
        raise UsageError("--tune needs calibration data: give --calibration, or leave --tune out")
    import graphzip as gz

    return gz.Tune()


def check_opset(opset: int | None) -> None:
    """Raises `UsageError` for one that is never written."""
    if opset is None:
        return
    import onnx

    last = onnx.defs.onnx_opset_version()
    if not _FIRST_OPSET <= opset <= last:
        raise UsageError(f"--opset: {opset} is not written; write one from {_FIRST_OPSET} to {last}, or leave it out")


# ------------------------------------------------------------------------------------------------- the model


def find(model: str, imports: Sequence[Path] = ()) -> ModelSpec:
    """The model that an argument names, not yet built; files of the user's own are run before."""
    from graphzip.commands.models import find_model, import_file

    for path in imports:
        with option("--import"):
            import_file(path)
    try:
        return find_model(model)
    except MissingDependencyError:
        raise
    except GraphZipError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Weights:
    """What the options on weights say."""

    path: Path | None
    key: str | None
    strip_prefix: str | None


def build(spec: ModelSpec, weights: Weights, seed: int = 0) -> nn.Module:
    """The model with its weights."""
    import torch

    from graphzip.commands.weights import load_weights

    if weights.path is None and (weights.key is not None or weights.strip_prefix is not None):
        raise UsageError("--weights-key and --strip-prefix say how to read --weights, which is not given")
    torch.manual_seed(seed)
    module = spec.build()
    if weights.path is not None:
        with option("--weights"):
            said = load_weights(module, weights.path, key=weights.key, strip_prefix=weights.strip_prefix)
        for sentence in said:
            say(f"{weights.path}: {sentence}")
    return module


def check_scope(model: str, module: nn.Module, scope: str | None) -> None:
    """Raises `UsageError` unless the model has this submodule."""
    known = [name for name, _ in module.named_modules() if name]
    if scope is not None and scope not in known:
        raise UsageError(f"--scope: {model} has no submodule {scope!r}; {closest(scope, known)}")


def shapes_of(inputs: list[str] | None) -> tuple[InputShape, ...]:
    """Shapes as the options write them."""
    from graphzip.commands.models import parse_shape

    with option("--input"):
        return tuple(parse_shape(text) for text in inputs or ())


def example_inputs(
    spec: ModelSpec, module: nn.Module, shapes: tuple[InputShape, ...], seed: int = 0
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Random inputs of the shapes that were given, or that the model is known to take."""
    from graphzip.commands.models import make_inputs

    known = shapes or spec.inputs(module)
    if not known:
        raise UsageError(f"what {spec.name} takes is not known; give the shape of every input: --input 1x3x224x224")
    with option("--input"):
        return make_inputs(module, known, seed=seed)


def outputs_of(outputs: list[str] | None) -> list[str | int] | None:
    """Names and positions as the options write them, several of them between commas."""
    parts = [part.strip() for text in outputs or () for part in text.split(",")]
    if not all(parts):
        raise UsageError("--outputs: a name is empty; write --outputs logits, or --outputs 0,1 for positions")
    return [int(part) if part.lstrip("-").isdecimal() else part for part in parts] or None


def view_of(scope: str | None, outputs: list[str] | None, dynamic: str | None, mode: str) -> dict[str, Any]:
    """Which part and which form of a model is worked on: arguments that `plan_for` and `compile` have in common."""
    return {"scope": scope, "outputs": outputs_of(outputs), "dynamic_shapes": dynamic, "mode": mode}
