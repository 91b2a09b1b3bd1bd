"""What a model is called with: example inputs and batches of data, by position or by name.

Both may be a tuple of positional arguments or a mapping of arguments by name, such as a tokenizer gives. Arguments by
name that come first in the model's signature are positional ones from here on, so that what is made of the model is
called either way, as the model is; the others stay arguments by name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from graphzip.arguments import check_examples
from graphzip.errors import ExampleInputError
from graphzip.graph.torch_private import pytree

__all__ = ["Call", "Signature", "call_of", "example_of", "folded"]

logger = logging.getLogger(__name__)

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Call(NamedTuple):
    """Positional arguments, and arguments by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_of(model: nn.Module, example_inputs: Any) -> Call:
    """How example inputs, a tuple or a mapping by name, are given to a model.

    Raises `ExampleInputError` for anything else, for a name that the model does not take, and where one is missing that
    it needs.
    """
    if isinstance(example_inputs, Call):
        return example_inputs
    check_examples(example_inputs)
    if isinstance(example_inputs, Mapping):
        given = dict(example_inputs)
        _check_names(model, given)
        return folded(model, Call((), given))
    return Call(example_inputs, {})


def folded(model: nn.Module, call: Call) -> Call:
    """The same call, with arguments by name at their positions as far as these follow each other."""
    given, args = dict(call.kwargs), list(call.args)
    parameters = list(_parameters(model).values())
    for parameter in parameters[len(args) :]:
        if parameter.kind not in _BY_POSITION or parameter.name not in given:
            break
        args.append(given.pop(parameter.name))
    known = {each.name: given.pop(each.name) for each in parameters if each.name in given}
    return Call(tuple(args), known | given)


def example_of(model: nn.Module, call: Call) -> Any:
    """The way back of `call_of`: a tuple where all arguments have positions, else a mapping by name."""
    if not call.kwargs:
        return call.args
    return dict(zip(_parameters(model), call.args, strict=False)) | call.kwargs


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """What `forward` takes; nothing where that cannot be told."""
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {}


def _check_names(model: nn.Module, given: Mapping[Any, Any]) -> None:
    parameters, name = _parameters(model), type(model).__name__
    if not parameters:
        return
    known = [each.name for each in parameters.values() if each.kind in _BY_NAME]
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    unknown = [key for key in given if not isinstance(key, str) or (key not in known and not takes_any)]
    if unknown:
        raise ExampleInputError(
            f"example_inputs: {name} takes no argument {unknown[0]!r}; it takes {', '.join(known) or 'none by name'}"
        )
    needed = [each.name for each in parameters.values() if each.kind in _BY_NAME and each.default is each.empty]
    missing = [key for key in needed if key not in given]
    if missing:
        raise ExampleInputError(f"example_inputs: {name} needs {missing[0]!r}, too; give it beside {', '.join(given)}")


@dataclass(frozen=True)
class Signature:
    """The arguments that the example inputs of a model have, and so every batch: so many by position, some by name.

    `names` are those of the model's arguments in order, as far as they are known.
    """

    positional: int
    keywords: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> Signature:
        """That of example inputs. Raises as `call_of` does."""
        call = call_of(model, example_inputs)
        names = [each.name for each in _parameters(model).values() if each.kind in _BY_POSITION]
        return cls(len(call.args), tuple(call.kwargs), tuple(names))

    def call(self, batch: Any) -> Call:
        """How a batch of calibration data is given to the model: `model(*batch)` or, for a mapping, `model(**batch)`.

        What a loader yields beyond the arguments of the example inputs (labels) is left out. Raises
        `ExampleInputError` where one of them is missing, or there is no sample.
        """
        call = self._by_name(batch) if isinstance(batch, Mapping) else self._by_position(batch)
        first = next((leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)), None)
        if first is not None and first.dim() and first.shape[0] == 0:
            raise ExampleInputError(f"calibration: a batch of {tuple(first.shape)} has no sample; leave it out")
        return call

    def rest(self, batch: Any) -> tuple[Any, ...]:
        """What a batch holds beyond the arguments of the example inputs, in its order: labels."""
        if isinstance(batch, Mapping):
            taken = {*self.names[: self.positional], *self.keywords}
            return tuple(value for name, value in batch.items() if name not in taken)
        taken_places = {self.names.index(name) for name in self.keywords if name in self.names}
        values = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return tuple(v for place, v in enumerate(values) if place >= self.positional and place not in taken_places)

    def _by_name(self, batch: Mapping[Any, Any]) -> Call:
        wanted = (*self.names[: self.positional], *self.keywords)
        if len(wanted) < self.positional + len(self.keywords):
            raise ExampleInputError(
                "calibration yields a mapping, but the model's arguments have no names; make it yield tuples"
            )
        missing = [name for name in wanted if name not in batch]
        if missing:
            raise ExampleInputError(
                f"calibration: a batch has no {missing[0]!r}, which the example inputs have; it has "
                f"{', '.join(map(str, batch))}. Let batches have the arguments of the example inputs"
            )
        self._note_rest(len(batch), len(wanted))
        args = tuple(batch[name] for name in wanted[: self.positional])
        return Call(args, {name: batch[name] for name in self.keywords})

    def _by_position(self, batch: Any) -> Call:
        values = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        places = {name: self.names.index(name) if name in self.names else len(values) for name in self.keywords}
        missing = [name for name, place in places.items() if place >= len(values)]
        if missing:
            raise ExampleInputError(
                f"calibration: a batch has no {missing[0]!r}, which the example inputs give by name; yield mappings"
            )
        self._note_rest(len(values), self.positional + len(self.keywords))
        return Call(values[: self.positional], {name: values[place] for name, place in places.items()})

    def _note_rest(self, has: int, takes: int) -> None:
        if has > takes:
            logger.info("calibration batches have %d entries, the model takes %d: the rest is left out", has, takes)
