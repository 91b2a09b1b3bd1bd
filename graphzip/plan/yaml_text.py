"""YAML as plans are written in it: keys are unique, numbers are those of YAML 1.2, nothing is written by reference.

A file from a stranger is refused before it can do harm: what is read is bounded in size, in depth and in what its
references (aliases, merge keys) stand for, and nothing but mappings, lists, texts, numbers and flags is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

__all__ = ["check_text", "read_yaml", "to_yaml"]

_MOST_BYTES: Final = 1 << 22
_MOST_VALUES: Final = 100_000
_DEEPEST: Final = 32
_DIGITS: Final = 40

_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT: Final = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


def read_yaml(path: Path) -> Any:
    """The data of a YAML file in UTF-8. Raises `ValueError` with what is wrong where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        check_text(content)
        return _constructed(content.decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); save the plan as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {_problem(error)}") from None
    except RecursionError:
        raise ValueError(f"not valid YAML: nested more than {_DEEPEST} deep, which no plan is") from None


def check_text(content: bytes) -> None:
    """Raises `ValueError` where a file is larger than any plan that can be read; told at a glance."""
    if len(content) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES:,} bytes, which no plan is")
    if content.count(b",") + content.count(b"\n") > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values, which no plan has; name groups and layers by wildcards")


def to_yaml(data: Any) -> str:
    """The text of a YAML file."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)
    return text


def _constructed(text: str) -> Any:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Raises a YAML error for a key given twice, and for what is too deep or too large, references followed."""
    sizes: dict[int, int] = {}
    stack: list[tuple[yaml.Node, Iterator[yaml.Node]]] = []
    open_: set[int] = set()

    def enter(node: yaml.Node) -> None:
        if len(stack) >= _DEEPEST:
            raise _wrong(f"nested more than {_DEEPEST} deep, which no plan is", node)
        if id(node) in open_:
            raise _wrong("it refers to itself", node)
        open_.add(id(node))
        stack.append((node, iter(_children(node))))

    enter(root)
    while stack:
        node, children = stack[-1]
        child = next((each for each in children if id(each) not in sizes), None)
        if child is not None:
            enter(child)
            continue
        stack.pop()
        open_.discard(id(node))
        sizes[id(node)] = max(1, sum(sizes[id(each)] for each in _held(node)))
        if sizes[id(node)] > _MOST_VALUES:
            raise _wrong(f"more than {_MOST_VALUES:,} values with what it refers to, which no plan has", node)


def _held(node: yaml.Node) -> list[yaml.Node]:
    """What a file has a comma or a line for: the items of a list, the values of a mapping."""
    return [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else _children(node)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _wrong(f"the key {_short(key.value)!r} is given twice", key)
            seen.add((key.tag, key.value))
    return [each for pair in node.value for each in pair]


def _wrong(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def _short(text: str) -> str:
    return text if len(text) <= _DIGITS else f"{text[:_DIGITS]}..."


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader with fewer types: no dates, no base 60, no sets; `3e-3` is a number, as in YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An int or a float as YAML 1.2 writes them."""
        text = self.construct_scalar(node)
        if len(text) > _DIGITS:
            raise _wrong(f"a number of {len(text)} digits; write one of at most {_DIGITS}", node)
        if _INT.match(text):
            return int(text)
        if _FLOAT.match(text):
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        raise _wrong(f"{_short(text)!r} is not a number", node)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, with the items of a list indented below its key and nothing written by reference."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_TAG: Final = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (
        "bool",
        re.compile(r"(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$"),
        "yYnNtTfFoO",
    ),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"<<$"), "<"),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, list(_first))
for _kind in ("null", "bool", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _kind, yaml.SafeLoader.yaml_constructors[_TAG + _kind])
for _kind in ("int", "float"):
    _Loader.add_constructor(_TAG + _kind, _Loader.construct_number)
_Loader.add_constructor(None, yaml.SafeLoader.yaml_constructors[None])
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark is not None else text
