"""Names of the modules that ran operators, where the model reached them by another way than by their names.

`self.layers[:3](x)` runs the layers of a container that exists only during the call; `torch.export` calls the first of
them `layers.slice(None, 3, None).0`. What the rest of the project knows is `layers.0`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

__all__ = ["name_owners"]

_PART = re.compile(r"slice\((?P<bounds>[^)]*)\)|[^.]+")


def name_owners(program: fx.GraphModule, model: nn.Module) -> None:
    """Let the metadata of an exported program name the modules of `model` as `model` does, by their first names."""
    first = {id(module): name for name, module in model.named_modules()}
    found = {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
    for inner in program.modules():
        for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
            if not stack:
                continue
            key, (name, kind) = list(stack.items())[-1]
            plain, _, call = name.partition("@")
            if plain not in found:
                found[plain] = _resolved(plain, model, first)
            if found[plain] != plain:
                renamed = f"{found[plain]}@{call}" if call else found[plain]
                node.meta["nn_module_stack"] = {**stack, key: (renamed, kind)}


def _resolved(name: str, model: nn.Module, first: dict[int, str]) -> str:
    """The name of the module at the end of a way through the model, or of the last module on it that has one."""
    at: Any = model
    last = ""
    for part in _PART.finditer(name):
        try:
            at = at[_slice(part["bounds"])] if part["bounds"] is not None else getattr(at, part[0])
        except Exception:  # a container of the model's own may do anything
            break
        last = first.get(id(at), last)
    return last


def _slice(bounds: str) -> slice:
    return slice(*(None if bound.strip() == "None" else int(bound) for bound in bounds.split(",")))
