"""Public names say what they take, what they give, what they raise, and where it comes from."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import graphzip as gz
from graphzip import errors

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {name: getattr(gz, name) for name in gz.__all__ if name != "__version__"}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if not inspect.isclass(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
PASSES = {name: value for name, value in CLASSES.items() if getattr(value, "kind", "")}
HINTED = re.compile(r"\b(?:Tensor|ndarray|NDArray)\b")
SHAPE = re.compile(
    r"\((?:\w+(?: [*/+] \w+)?|\.\.\.)(?:, (?:\*?\w+(?: [*/+] \w+)?|\.\.\.))*,?\)|\bscalar\b|\bone number\b"
)
UNITS = re.compile(r"\b(?:milliseconds|bytes|share|number|numbers|channels|samples|seconds|multiply-accumulates)\b")
"""What a quantity is counted in."""


def members() -> Iterator[tuple[str, Any]]:
    """Methods and properties that the public classes define themselves, and no class of another library did before."""
    for name, owner in CLASSES.items():
        others = [base for base in owner.__mro__ if not base.__module__.startswith("graphzip")]
        for key, value in vars(owner).items():
            inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            is_method = callable(inner) and inspect.isfunction(inspect.unwrap(inner))
            if is_method and not key.startswith("_") and not any(key in vars(base) for base in others):
                yield f"{name}.{key}", inner


MEMBERS = dict(members())


def doc(value: Any) -> str:
    """A docstring on one line."""
    return " ".join((inspect.getdoc(value) or "").split())


def referred(text: str) -> Iterator[Callable[..., Any]]:
    """The public functions whose arguments a docstring says that it shares: "are those of `prepare`"."""
    for name in re.findall(r"(?:those of|as for|as in|that of|as those of) `([\w.]+)`", text):
        found: Any = gz
        for part in name.removeprefix("graphzip.").split("."):
            found = getattr(found, part, None)
        if found is not None:
            yield found


def explained(text: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The words in backticks, here and where the docstring leads to."""
    found = {word for each in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", each)}
    for other in referred(text):
        if other.__qualname__ not in seen:
            found |= explained(doc(other), seen | {other.__qualname__})
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_has_a_docstring(name: str) -> None:
    assert PUBLIC[name].__doc__
    assert len(doc(PUBLIC[name])) > 20


@pytest.mark.parametrize("name", MEMBERS)
def test_every_method_has_a_docstring(name: str) -> None:
    assert doc(MEMBERS[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_explain_their_arguments(name: str) -> None:
    arguments = inspect.signature(FUNCTIONS[name]).parameters
    assert {each for each in arguments if each not in explained(doc(FUNCTIONS[name]))} == set()


@pytest.mark.parametrize("name", MEMBERS)
def test_methods_explain_their_arguments(name: str) -> None:
    """Beside `self` and what any method of that name takes (`data` of `from_dict`)."""
    arguments = [
        each for each in inspect.signature(MEMBERS[name]).parameters.values() if each.name not in {"self", "cls"}
    ]
    if len(arguments) < 2:
        return
    owner = CLASSES[name.split(".")[0]]
    known = explained(doc(MEMBERS[name])) | explained(doc(owner))
    named = {
        each.name for each in arguments if each.kind is not each.VAR_POSITIONAL and each.kind is not each.VAR_KEYWORD
    }
    assert named - known == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_raise(name: str) -> None:
    text = doc(FUNCTIONS[name])
    assert "Raises `" in text or any("Raises `" in doc(other) for other in referred(text)), text


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_errors_that_are_named_are_there(name: str) -> None:
    value = PUBLIC.get(name) or MEMBERS[name]
    raised = re.findall(r"Raises (.*?)(?:\. |\.$|$)", doc(value))
    named = {each for text in raised for each in re.findall(r"`([A-Z]\w+Error|GraphZipError)`", text)}
    assert named <= {*errors.__all__, *dir(builtins)}, name


@pytest.mark.parametrize("name", PASSES)
def test_options_are_explained_with_their_source(name: str) -> None:
    options, text = PASSES[name], doc(PASSES[name])
    fields = set(options.model_fields)
    assert fields - explained(text) == set()
    assert not fields or "Raises `PlanError`" in text
    cites = re.search(r"\([^()]*\"[A-Z]", text) or "ources stand in `graphzip_passes." in text
    assert cites or "without changing any output" in text or not fields


@pytest.mark.parametrize("name", [name for name, value in CLASSES.items() if dataclasses.is_dataclass(value)])
def test_fields_are_explained(name: str) -> None:
    source = inspect.getsource(CLASSES[name])
    own = {
        each.name
        for each in dataclasses.fields(CLASSES[name])
        if each.repr
        and not each.name.startswith("_")
        and not re.search(rf'^    {each.name}: .*\n    """', source, flags=re.MULTILINE)
    }
    assert own - explained(doc(CLASSES[name])) == set()


@pytest.mark.parametrize(
    "name", [name for name, value in {**FUNCTIONS, **MEMBERS}.items() if inspect.isfunction(inspect.unwrap(value))]
)
def test_tensors_have_shapes(name: str) -> None:
    value = {**FUNCTIONS, **MEMBERS}[name]
    hint = str(inspect.signature(value).return_annotation)
    if HINTED.search(hint):
        assert SHAPE.search(doc(value)), f"{hint}: {doc(value)}"


@pytest.mark.parametrize(
    "name",
    [n for n, v in {**FUNCTIONS, **MEMBERS}.items() if inspect.signature(v).return_annotation in {"float", "int"}],
)
def test_quantities_have_units(name: str) -> None:
    text = doc({**FUNCTIONS, **MEMBERS}[name])
    assert UNITS.search(text) or re.search(r"how many|how far|how much|relative", text, flags=re.IGNORECASE), text
