"""What a traced graph says of its nodes, in `node.meta`: all keys, and what they mean.

`val` is on every node of a traced graph, the others where they are said. A copy of a graph has them, too, and so has a
saved file, but for those that only tracing needs. Keys of `torch.export` (`nn_module_stack`, `stack_trace`) are gone
once `annotate` has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, cast

from numpy.typing import NDArray
from torch import fx

__all__ = ["Factored", "NodeMeta", "meta_of", "owner_name", "place_meta", "source_line"]


@dataclass(frozen=True)
class Factored:
    """The mark of a convolution whose kernel is built from the state of one module: of a factored layer.

    `layer` is the name of that module (its class is in `Traced.module_types`), `drop` the atom-drop rate of training,
    `size` the shape of a slice. Its kernel's shape is that of the convolution's weight.
    """

    layer: str
    drop: float = 0.0
    size: tuple[int, ...] = ()


class NodeMeta(TypedDict, total=False):
    """The keys of `node.meta`."""

    val: Any
    """The fake tensor (or symbolic number) that the node gives; sizes that the inputs decide are symbols. Absent on
    nodes that a rewrite has made, until the graph is refreshed, and in a graph that was read from a file."""

    owner: str
    """The name of the submodule that ran the operator; empty for the model itself."""

    source: str
    """`resnet.py:96 in forward`: the line of the model's source."""

    no_grad: bool
    """Set while tracing: the operator ran under `torch.no_grad()` (true), or under `enable_grad` inside of it (false).
    Read where writes in place are replaced, and by nobody later."""

    constant: bool
    """On a `get_attr`: the tensor stands in the model's code and is no parameter or buffer."""

    numbers: NDArray[Any]
    """On a `get_attr`: a constant of positions. The analysis reads them, a rewrite may give others in their place."""

    choice: bool
    """On a `get_attr`: a constant of positions of a table. Each is a channel of its own, wherever in the table it lies.
    """

    never_one: bool
    """On a `squeeze`: inputs for which a size that it asks about is one are refused, so that its rank is known."""

    follows_mode: bool
    """On a dropout of the training form of a graph with two forms: it acts in training mode only, as it should."""

    factored: Factored
    """On a convolution: its kernel is built from the factors of one module."""

    onnx: str
    """In the graph that an ONNX file was converted to: the name of the value of the file that the node gives."""


_ITS_OWN = frozenset(NodeMeta.__annotations__) - {"owner", "source"}


def meta_of(node: fx.Node) -> NodeMeta:
    """The metadata of a node, with the types of its keys."""
    return cast("NodeMeta", node.meta)


def place_meta(node: fx.Node) -> dict[str, Any]:
    """What holds for every node that is made in the place of this one: owner and source line."""
    known = {key: value for key, value in node.meta.items() if key not in _ITS_OWN}
    return {"owner": "", "source": "", **known}


def owner_name(node: fx.Node) -> str:
    """The name of the submodule that ran an operator; empty where it is not known."""
    return str(node.meta.get("owner") or "")


def source_line(node: fx.Node) -> str:
    """The source line of an operator; empty where it is not known."""
    return str(node.meta.get("source") or "")
