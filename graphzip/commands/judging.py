"""How well a model does, or each of several, as `--labels` or `--evaluate` say it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphzip.commands.ranks import leads
from graphzip.commands.terminal import UsageError
from graphzip.errors import GraphZipError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphzip import Compiled

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """A score of a module, or of the module of each task, what it is called, and whether it is a share such as an
    accuracy; or nothing.
    """

    evaluate: Callable[[nn.Module], float] | Mapping[str, Callable[[nn.Module], float]] | None = None
    title: str = ""
    share: bool = False

    @classmethod
    def of(cls, labels: Path | None, evaluate: str | None, batches: Sequence[Any] | None) -> Judge:
        """What the options ask for. Raises `UsageError` where they do not fit each other or the data."""
        if labels is not None and evaluate is not None:
            raise UsageError("--labels and --evaluate are both given; leave one out")
        if evaluate is not None:
            return cls(_function(evaluate), evaluate.rpartition(":")[2])
        if labels is None:
            return cls()
        accuracy, samples = _accuracy_of(labels, batches)
        return cls(accuracy, f"accuracy ({samples} samples)", True)

    @classmethod
    def of_several(
        cls, labels: Mapping[str, Path], evaluate: Mapping[str, str], batches: Mapping[str, Sequence[Any]] | None
    ) -> Judge:
        """What the options ask for, of several models by name."""
        if labels and evaluate:
            raise UsageError("--labels and --evaluate are both given; leave one out")
        if evaluate:
            return cls({name: _function(spec) for name, spec in evaluate.items()}, "score")
        found = {name: _accuracy_of(path, (batches or {}).get(name))[0] for name, path in labels.items()}
        return cls(found or None, "accuracy", True)

    @property
    def here(self) -> Any:
        """What the library is given: of several processes the score of the first counts, and the others find none."""
        if leads() or self.evaluate is None:
            return self.evaluate
        return dict.fromkeys(self.evaluate, _nothing) if isinstance(self.evaluate, Mapping) else _nothing

    def score(self, module: nn.Module) -> float | Mapping[str, float] | None:
        """Of a module in eval mode, or of each of its tasks; nothing where nothing judges."""
        if isinstance(self.evaluate, Mapping):
            return {name: evaluate(module.get_submodule(name)) for name, evaluate in self.evaluate.items()}
        return None if self.evaluate is None else self.evaluate(module)

    def entitle(self, compiled: Compiled) -> None:
        """Let the scores of a report be called what they are."""
        report = compiled.report
        if report.scores is not None:
            compiled.report = replace(report, scores=replace(report.scores, title=self.title, share=self.share))


def _nothing(module: nn.Module) -> float:
    return 0.0


def _accuracy_of(path: Path, batches: Sequence[Any] | None) -> tuple[Callable[[nn.Module], float], int]:
    """The accuracy on data whose labels a file holds, and the number of samples."""
    if batches is None:
        raise UsageError("--labels: they are of the samples of --calibration, which is not given; give it, too")
    wanted = _labels(path, batches)
    return lambda module: _accuracy(module, batches, wanted), sum(map(len, wanted))


def _function(spec: str) -> Callable[[nn.Module], float]:
    from graphzip.commands.models import import_file

    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UsageError(f"--evaluate: {spec!r} is no function; write module:function or file.py:function")
    try:
        module = import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except GraphZipError as error:
        raise UsageError(f"--evaluate: {error}") from error
    except ImportError as error:
        raise UsageError(f"--evaluate: {source!r} cannot be imported ({error}); give file.py:function") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--evaluate: {source} has no function {name!r}; name one that takes a module")
    found: Callable[[nn.Module], float] = function
    return found


def _count(batch: Any) -> int:
    tensors = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    return len(tensors[0])


def _labels(path: Path, batches: Sequence[Any]) -> list[Tensor]:
    """The labels of each batch."""
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
        wanted = torch.from_numpy(np.ascontiguousarray(array))
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"--labels: {path} cannot be read ({error}); write it with numpy.save") from error
    counts = [_count(batch) for batch in batches]
    if wanted.dim() != 1 or wanted.is_floating_point() or wanted.is_complex() or len(wanted) != sum(counts):
        raise UsageError(
            f"--labels: {path} has {tuple(wanted.shape)} of {str(wanted.dtype).removeprefix('torch.')}; give a class "
            f"index for each of the {sum(counts)} samples of --calibration, in their order"
        )
    return list(torch.split(wanted.long(), counts))


def _accuracy(module: nn.Module, batches: Sequence[Any], labels: Sequence[Tensor]) -> float:
    """The share of samples whose class has the highest of the logits (n, classes)."""
    import torch

    right, place = 0, next((parameter.device for parameter in module.parameters()), None)
    with torch.no_grad():
        for batch, wanted in zip(batches, labels, strict=True):
            if isinstance(batch, Mapping):
                given = module(**{name: value.to(place) for name, value in batch.items()})
            else:
                given = module(*(value.to(place) for value in batch))
            logits = _logits(given)
            if logits is None or len(logits) != len(wanted):
                raise UsageError("--labels: the model gives no logits (n, classes); give a score of yours, --evaluate")
            right += int((logits.argmax(1).cpu() == wanted).sum())
    return right / sum(map(len, labels))


def _logits(outputs: Any) -> Tensor | None:
    """The first result with two dimensions, wherever it lies in what the model gives."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return outputs if outputs.dim() == 2 and outputs.is_floating_point() else None
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple | list) else ()
    return next((found for each in values if (found := _logits(each)) is not None), None)
