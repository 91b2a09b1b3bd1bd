"""What a model returns: the names of its outputs, and those of them that matter.

An output's name is the way to it: `logits` in a dict, `1` in a tuple, `hidden_states.3` further down, and `output`
where it is the only one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
from torch import fx

from graphzip.errors import GraphZipError, NotFoundError
from graphzip.graph.inputs import CallCode
from graphzip.graph.randomness import drop_dead
from graphzip.graph.torch_private import PyTreeCodeGen, pytree

__all__ = ["Outputs", "Way", "check_outputs", "choose_outputs", "leaves_with_ways", "tensors_by_way", "title"]

Outputs = str | int | Sequence[str | int]
"""The outputs that matter: names, globs on names, or positions at the top level."""

Way = tuple[int | str, ...]
"""The way to a part of nested results: positions, and names where a part has one."""

_LISTED = 30
_ONLY = "output"
_LEAF = pytree.tree_structure(0)


def check_outputs(outputs: Any) -> tuple[str | int, ...]:
    """The outputs that are asked for, one by one. Raises `GraphZipError` for what names none."""
    several = isinstance(outputs, Sequence) and not isinstance(outputs, str)
    listed = tuple(outputs) if several else (outputs,)
    fits = all(isinstance(each, str | Integral) and not isinstance(each, bool) for each in listed)
    if not listed or not fits:
        raise GraphZipError(
            f"outputs: {outputs!r} names no outputs; give names, globs or positions, outputs=['logits'] or outputs=[0]"
        )
    return listed


def leaves_with_ways(tree: Any, way: Way = ()) -> list[tuple[Way, Any]]:
    """Every leaf of nested results and the way to it, in the order of `pytree.tree_leaves`."""
    kind = pytree._get_node_type(tree)
    if kind not in pytree.SUPPORTED_NODES or pytree.tree_structure(tree).is_leaf():
        return [(way, tree)]
    node = pytree.SUPPORTED_NODES[kind]
    if node.flatten_with_keys_fn is not None:
        parts = [(_plain(key), child) for key, child in node.flatten_with_keys_fn(tree)[0]]
    else:
        children, _ = node.flatten_fn(tree)
        parts = [(_field(tree, child, number), child) for number, child in enumerate(children)]
    return [found for key, child in parts for found in leaves_with_ways(child, (*way, key))]


def _plain(key: Any) -> int | str:
    if isinstance(key, pytree.SequenceKey):
        return int(key.idx)
    return str(getattr(key, "key", getattr(key, "name", key)))


def _field(tree: Any, child: Any, number: int) -> int | str:
    """The key or attribute under which a container has this part, or its number."""
    named = tree.items() if isinstance(tree, Mapping) else getattr(tree, "__dict__", {}).items()
    return next((str(name) for name, value in named if value is child), number)


def title(way: Way) -> str:
    """The name of an output."""
    return ".".join(map(str, way)) or _ONLY


def _results(graph: fx.Graph) -> tuple[fx.Node, list[Any], pytree.TreeSpec]:
    (end,) = graph.find_nodes(op="output")
    codegen = graph._codegen
    assert isinstance(codegen, PyTreeCodeGen)
    spec = codegen.pytree_info.out_spec
    results: Any = end.args[0]
    return end, list(results), _LEAF if spec is None else spec


def _ways(graph: fx.Graph) -> list[Way]:
    _, results, spec = _results(graph)
    values = [each.meta.get("val") if isinstance(each, fx.Node) else each for each in results]
    return [way for way, _ in leaves_with_ways(pytree.tree_unflatten(values, spec))]


def choose_outputs(module: fx.GraphModule, outputs: Outputs) -> tuple[str, ...]:
    """Let the graph of `module` return only the `outputs` that matter; what nothing else reads goes, from the graph.

    What is returned has the structure that it had, with `None` in place of every part of which nothing was chosen.
    Gives the names of these parts. Raises `NotFoundError` for a name or a position that no output has, `GraphZipError`
    where the structure cannot have a part left out.
    """
    graph = module.graph
    end, results, spec = _results(graph)
    ways = _ways(graph)
    tensors = [way for way, value in zip(ways, results, strict=True) if isinstance(value, fx.Node)]
    tops = list(dict.fromkeys(way[:1] for way in ways))
    chosen: set[Way] = set()
    for each in check_outputs(outputs):
        found = {way for way in tensors if _matches(each, way, tops)}
        if not found:
            names = [title(way) for way in tensors]
            listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if names[_LISTED:] else "")
            raise NotFoundError(f"outputs: the model returns nothing that {each!r} names; it returns {listed}")
        chosen |= found
    if len(chosen) == len(tensors):
        return ()
    left, pruned = _pruned(spec, [(value, way in chosen) for value, way in zip(results, ways, strict=True)])
    _check_structure(left, pruned)
    end.args = (tuple(left),)
    codegen = graph._codegen
    assert isinstance(codegen, PyTreeCodeGen)
    graph.set_codegen(CallCode(codegen.pytree_info._replace(out_spec=pruned)))
    drop_dead(graph)
    module.recompile()
    return tuple(dict.fromkeys(title(_outermost(way, chosen)) for way in tensors if way not in chosen))


def _matches(wanted: str | int, way: Way, tops: Sequence[Way]) -> bool:
    """Whether an output is one of those that a position, a name or a glob stands for."""
    if not isinstance(wanted, str):
        return -len(tops) <= wanted < len(tops) and tops[wanted] == way[:1]
    return any(fnmatchcase(title(way[:depth]), wanted) for depth in range(min(len(way), 1), len(way) + 1))


def _outermost(way: Way, chosen: set[Way]) -> Way:
    """The outermost part around an output of which nothing was chosen."""
    return next(way[:end] for end in range(1, len(way) + 1) if not any(each[:end] == way[:end] for each in chosen))


_Leaves = list[tuple[Any, bool]]
"""What is returned, and whether it was chosen."""


def _pruned(spec: pytree.TreeSpec, leaves: _Leaves) -> tuple[list[Any], pytree.TreeSpec]:
    """The results that are left, and their structure; constants stay where something around them does."""
    if not any(chosen for _, chosen in leaves):
        return [None], _LEAF
    if spec.is_leaf():
        return [leaves[0][0]], spec
    kept: list[Any] = []
    children: list[pytree.TreeSpec] = []
    for child, part in zip(spec.children(), _by_child(spec, leaves), strict=True):
        constant = child.is_leaf() and not isinstance(part[0][0], fx.Node)
        values, made = ([part[0][0]], child) if constant else _pruned(child, part)
        kept += values
        children.append(made)
    return kept, pytree.TreeSpec(spec.type, spec.context, children)


def _by_child(spec: pytree.TreeSpec, leaves: _Leaves) -> Iterator[_Leaves]:
    start = 0
    for child in spec.children():
        yield leaves[start : start + child.num_leaves]
        start += child.num_leaves


def _check_structure(results: list[Any], spec: pytree.TreeSpec) -> None:
    values = [each.meta.get("val") if isinstance(each, fx.Node) else each for each in results]
    try:
        pytree.tree_unflatten(values, spec)
    except Exception as error:
        raise GraphZipError(
            f"outputs: a {getattr(spec.type, '__name__', spec.type)} cannot have a part left out ({error}); choose it "
            "as a whole"
        ) from error


def tensors_by_way(results: Any) -> dict[Way, torch.Tensor]:
    """The tensors among nested results, by the way to them."""
    return {way: leaf for way, leaf in leaves_with_ways(results) if isinstance(leaf, torch.Tensor)}
