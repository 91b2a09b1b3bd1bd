"""Names of modules and tensors, as the model that a file was written from had them, as far as the file tells."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from typing import Final

from torch import Tensor, nn

from graphzip.graph.state import attach

__all__ = ["MADE_UP", "Names", "identifier", "module_path", "tensor_path"]

MADE_UP: Final = re.compile(r"^(onnx::|val_|node_|/|\d+$)")
"""Names that an exporter or an optimizer made up."""


def identifier(name: str) -> str:
    """A name that Python takes, close to this one."""
    found = re.sub(r"\W", "_", name).strip() or "_"
    found = f"_{found}" if found[0].isdigit() else found
    return f"{found}_" if keyword.iskeyword(found) else found


def module_path(node: str, kind: str, weights: Iterable[str]) -> str:
    """Where a module of an operator belongs: by its own name where that is a path, else by its weights' names.

    `layer1.0.conv1.weight` and `/layer1/layer1.0/conv1/Conv` are both of `layer1.0.conv1`.
    """
    for name in weights if not node.startswith("/") else ():
        head, _, tail = name.rpartition(".")
        if head and not MADE_UP.match(name) and re.match(r"^(weight|bias|W|kernel)", tail):
            return head
    parts: list[str] = []
    for part in (each for each in node.split("/") if each):
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    if len(parts) > 1 and re.fullmatch(rf"{kind}(_\d+)?", parts[-1]):
        parts.pop()
    return ".".join(parts) or kind.lower()


def tensor_path(name: str) -> str:
    """Where a tensor belongs that is no layer's."""
    return name.split("/")[-1] if MADE_UP.match(name) else name


_OF_GRAPHS: Final = ("code", "graph", "meta", "recompile")


class Names:
    """Gives every module and tensor a place in a tree of modules that none had before."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def put(self, path: str, what: nn.Module | Tensor) -> str:
        """Put a module, a parameter or a buffer at a path, or close to it; gives the path."""
        words = re.sub(r"::|[/:]", ".", path).split(".")
        parts = [re.sub(r"\W", "_", word) for word in words if word] or ["_"]
        home, way = self.root, list[str]()
        for part in parts[:-1]:
            inner = home._modules.get(part)
            if inner is None or type(inner) is not nn.Module:
                part, inner = self._free(home, part), nn.Module()
                home.add_module(part, inner)
            home = inner
            way.append(part)
        name = self._free(home, parts[-1])
        if isinstance(what, nn.Module):
            home.add_module(name, what)
        else:
            attach(home, name, what)
        return ".".join([*way, name])

    def _free(self, home: nn.Module, name: str) -> str:
        """A name close to this one that `home` has not."""
        if not hasattr(home, name) and name not in _OF_GRAPHS:
            return name
        count = 1
        while hasattr(home, f"{name}_{count}"):
            count += 1
        return f"{name}_{count}"
