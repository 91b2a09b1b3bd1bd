"""Where in the user's model an operator comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphzip.graph.meta import meta_of

__all__ = ["OWN_HOME", "TORCH_HOME", "annotate", "describe", "first_line", "owner_of", "source_of"]

TORCH_HOME = f"{Path(torch.__file__).parent}/"
OWN_HOME = f"{Path(__file__).parents[1]}/"
"""What the files of torch and of graphzip begin with: lines of others are the user's."""
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""Where `torch.export` lost the module that ran an operator."""
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')


def annotate(node: fx.Node) -> None:
    """Keep of a node's metadata its value (`val`), `owner` and `source`, and whether it ran under `no_grad`."""
    known = {"val": node.meta.get("val"), "owner": owner_of(node), "source": source_of(node)}
    if meta_of(node).get("no_grad"):
        known["no_grad"] = True
    node.meta.clear()
    node.meta.update(known)


def describe(node: fx.Node) -> str:
    """`softmax (node softmax_1, vit.py:88 in forward)`: how an operator is named in a reason."""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", None) or str(node.target)
    source = node.meta.get("source")
    return f"{name} (node {node.name}{f', {source}' if source else ''})"


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def owner_of(node: fx.Node) -> str:
    """Name of the submodule that ran the operator, as `torch.export` recorded it; empty for the model itself."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    owner = list(stack.values())[-1][0] if stack else ""
    return "" if owner == _NO_MODULE else owner.split("@")[0]


def source_of(node: fx.Node) -> str:
    """`resnet.py:96 in forward`: the innermost line that is not torch's own, as `torch.export` recorded it."""
    frames = [match for match in _FRAME.finditer(node.meta.get("stack_trace") or "") if not _is_torch(match["file"])]
    if not frames:
        return ""
    last = frames[-1]
    return f"{Path(last['file']).name}:{last['line']} in {last['name']}"


def _is_torch(file: str) -> bool:
    return file.startswith((TORCH_HOME, "torch/", "<"))
