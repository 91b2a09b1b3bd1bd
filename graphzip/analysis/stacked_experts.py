"""Which widths PyTorch's own product of rows that are sorted by matrix takes (`torch.nn.functional.grouped_mm`).

Rows of its operands begin at multiples of 16 bytes. graphzip's operator, which a compiled module has, takes all widths;
a class whose weights it is to fit does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from torch import fx

from graphzip.numeric.grouped_mm import grouped_mm

__all__ = ["row_steps", "uneven_rows"]

_ROW: Final = 16  # bytes


def row_steps(graph: fx.Graph) -> dict[str, int]:
    """By the name of a stacked weight the number of channels of which its widths have to be multiples."""
    return {
        str(node.target): _ROW // node.meta["val"].element_size()
        for product in graph.find_nodes(op="call_function", target=grouped_mm)
        for node in _parameters_behind(product.args[1])
    }


def uneven_rows(graph: fx.Graph) -> Mapping[str, int]:
    """Those of which some width is none."""
    values = {str(node.target): node.meta["val"] for node in graph.find_nodes(op="get_attr")}
    return {
        name: step for name, step in row_steps(graph).items() if any(size % step for size in values[name].shape[1:])
    }


def _parameters_behind(node: fx.Node) -> Iterator[fx.Node]:
    if node.op == "get_attr":
        yield node
    for source in node.all_input_nodes:
        yield from _parameters_behind(source)
