"""YAML as plans are written in it: keys are unique, `3e-3` is a number, nothing is written by reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["read_yaml", "to_yaml"]

_MOST = 1 << 24


def read_yaml(path: Path) -> Any:
    """The data of a YAML file in UTF-8. Raises `ValueError` with what is wrong where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST + 1)
        if len(content) > _MOST:
            raise ValueError(f"larger than {_MOST:,} bytes, which no plan is")
        return yaml.load(content.decode("utf-8-sig"), Loader=_Loader)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); save the plan as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {_problem(error)}") from None
    except (ValueError, LookupError, AttributeError, RecursionError) as error:  # PyYAML, on hostile scalars
        raise ValueError(f"not valid YAML: {error}") from None


def to_yaml(data: Any) -> str:
    """The text of a YAML file."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)
    return text


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, where a key given twice is an error and `3e-3` is a number (YAML 1.2), not text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                text = f"the key {key.value!r} is given twice"
                raise yaml.composer.ComposerError(None, None, text, key.start_mark)
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, with the items of a list indented below its key and nothing written by reference."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark is not None else text
