"""`--config FILE`: a YAML file that holds options of a command; the command line goes before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from graphzip.report.tables import closest

__all__ = ["long_name", "read_config", "read_options"]

_LARGEST = 1 << 20  # bytes


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Give the other options of the command the values that the file has. Raises `typer.BadParameter`."""
    if path is None:
        return None
    params = {param.name: param for param in context.command.params if param.name not in (None, "config", "help")}
    known = {long_name(param): name for name, param in params.items()}
    values: dict[str, Any] = {}
    for key, value in read_options(path, typer.BadParameter).items():
        if key not in known:
            raise typer.BadParameter(f"{path}: {key!r} is no option of this command; {closest(str(key), list(known))}")
        name = known[key]
        several = getattr(params[name], "multiple", False) or params[name].nargs == -1
        listed = value if isinstance(value, list) else [value]
        values[str(name)] = [str(each) for each in listed] if several else value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def long_name(param: Any) -> str:
    """An option without dashes, `round-to`; an argument by its name, `model`."""
    return next((name[2:] for name in param.opts if name.startswith("--")), str(param.name))


def read_options(path: Path, error: Callable[[str], Exception]) -> Mapping[Any, Any]:
    """What a YAML file of options holds. Raises `error` where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise error(f"{path} is larger than {_LARGEST} bytes; give a file of options alone")
        found = yaml.safe_load(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        raise error(f"{path} cannot be read as YAML: {str(reason).splitlines()[0]}") from reason
    if not isinstance(found, Mapping):
        raise error(f"{path} holds no options; write a mapping such as 'macs: 0.5'")
    return found
