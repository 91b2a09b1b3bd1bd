"""Replace in-place operators by functional ones.

`y = relu_(x)` becomes `y = relu(x)` with every later use of `x` reading `y`. A write into a view is carried back to
the tensor it is a view of (`slice_scatter`, `select_scatter`, or the inverse view), and later uses of other views of
that tensor read fresh views. A write that cannot be carried back is refused: it would compute something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphzip.errors import TraceError
from graphzip.graph.inputs import hint

__all__ = ["functionalize"]

aten = torch.ops.aten

_MAY_ALIAS = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.contiguous.default,
    aten.dropout.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.expand_as.default,
    aten.view_as.default,
    aten.reshape_as.default,
}
"""Composite operators whose result may share memory with their input although their schema does not say so."""

_SPECIAL = {"copy_": aten.expand_as.default, "zero_": aten.zeros_like.default}
_OTHER_NAMES = {
    aten.normal_.default: aten.normal_functional.default,
    aten.bernoulli_.float: aten.bernoulli.p,
}


def functionalize(graph: fx.Graph) -> None:
    """Make `graph` free of in-place operators, or raise `TraceError` naming the operator and its source line."""
    bases: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        base = _view_of(node)
        bases[node] = bases.get(base, base) if base is not None else node
        if node.op == "call_function" and _writes(node):
            _replace(graph, node, bases)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _view_of(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one may share."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if "getitem" in str(node.target):
        return node.args[0]
    if node.target in _MAY_ALIAS:
        return node.args[0] if _shares_memory(node) else None
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return None
    shares = any(result.alias_info is not None for result in schema.returns)
    return node.args[0] if shares else None


def _shares_memory(node: fx.Node) -> bool:
    """Whether a composite operator gives a view of its operand: it depends on the strides."""

    def empty(found: fx.Node) -> Any:
        value = found.meta["val"]
        if not isinstance(value, torch.Tensor):
            return hint(value)
        sizes, strides = ([hint(size) for size in each] for each in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")

    args: Any = fx.node.map_arg(node.args, empty)
    kwargs: Any = fx.node.map_arg(node.kwargs, empty)
    target: Any = node.target
    try:
        result = target(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return True  # a move between devices cannot be tried without data
    shares: bool = result.untyped_storage()._cdata == args[0].untyped_storage()._cdata
    return shares


def _replace(graph: fx.Graph, node: fx.Node, bases: dict[fx.Node, fx.Node]) -> None:
    written = node.args[0]
    assert isinstance(written, fx.Node)
    base = bases[written]
    if base.op in {"placeholder", "get_attr"}:
        what = "its input" if base.op == "placeholder" else "the parameter or buffer"
        raise TraceError(
            f"{_at(node)} writes into {what} {base.target!r} in place; a compiled model has no side effects: "
            "write `x = x.op(...)` (or clone first) instead of `x.op_(...)`"
        )
    with graph.inserting_before(node):
        value = graph.call_function(_functional(node), _functional_args(node), dict(node.kwargs))
    value.meta.update(node.meta)
    after = _later(graph, node)
    node.replace_all_uses_with(written)
    _carry_back(graph, node, written, base, value, after, bases)
    graph.erase_node(node)


def _functional(node: fx.Node) -> Any:
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if name == "copy_" and node.args[0].meta["val"].dtype != node.args[1].meta["val"].dtype:  # type: ignore[union-attr]
        raise TraceError(f"{_at(node)} copies into a tensor of another dtype; cast it with .to() first")
    if name in _SPECIAL:
        return _SPECIAL[name]
    if node.target in _OTHER_NAMES:
        return _OTHER_NAMES[node.target]
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    if not name.endswith("_") or overload is None or overload._schema.is_mutable:
        raise TraceError(
            f"{_at(node)} writes in place and has no functional form; write it without the in-place operator"
        )
    return overload


def _functional_args(node: fx.Node) -> tuple[Any, ...]:
    """`x.copy_(y)` is `y.expand_as(x)`, and `x.zero_()` depends on the shape alone; the others keep their arguments."""
    target = _functional(node)
    if target is aten.expand_as.default:
        return node.args[1], node.args[0]
    return node.args[:1] if target is aten.zeros_like.default else node.args


def _later(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    nodes = list(graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])


def _live_views(base: fx.Node, after: set[fx.Node], bases: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Views of `base` made before the write and read after it."""
    return [
        view
        for view, root in bases.items()
        if root is base and view is not base and view not in after and any(user in after for user in view.users)
    ]


def _redirect(old: fx.Node, new: fx.Node, after: set[fx.Node]) -> None:
    for user in list(old.users):
        if user in after:
            user.replace_input_with(old, new)


def _carry_back(
    graph: fx.Graph,
    node: fx.Node,
    written: fx.Node,
    base: fx.Node,
    value: fx.Node,
    after: set[fx.Node],
    bases: dict[fx.Node, fx.Node],
) -> None:
    stale = _live_views(base, after, bases)
    view, current = written, value
    with graph.inserting_before(node):
        while view is not base:
            parent = view.args[0]
            assert isinstance(parent, fx.Node)
            current = _scatter(graph, node, parent, view, current)
            view = parent
        fresh = {base: current}
        bases[current] = current
        for other in stale:
            bases[_view_again(graph, other, fresh)] = current
    for old, new in fresh.items():
        _redirect(old, new, after)


def _view_again(graph: fx.Graph, view: fx.Node, fresh: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same view of what its base has become."""
    if view not in fresh:
        parent = view.args[0]
        assert isinstance(parent, fx.Node)
        _view_again(graph, parent, fresh)
        fresh[view] = graph.node_copy(view, lambda argument: fresh.get(argument, argument))
        fresh[view].meta = dict(view.meta)
    return fresh[view]


def _scatter(graph: fx.Graph, node: fx.Node, parent: fx.Node, view: fx.Node, value: fx.Node) -> fx.Node:
    """`parent` with the part that `view` shows replaced by `value`."""
    target, rest = view.target, tuple(view.args[1:])
    if target is aten.slice.Tensor:
        made = graph.call_function(aten.slice_scatter.default, (parent, value, *rest), dict(view.kwargs))
    elif target is aten.select.int:
        made = graph.call_function(aten.select_scatter.default, (parent, value, *rest), dict(view.kwargs))
    elif target in {aten.transpose.int, aten.t.default, aten.unsqueeze.default} or target in _SAME_SIZE:
        made = graph.call_function(*_inverse(parent, view, value))
    else:
        raise TraceError(
            f"{_at(node)} writes into a view made by {view.target}; graphzip cannot carry that write back to the "
            "tensor: build the result with torch.cat, torch.where or a mask instead"
        )
    made.meta.update(view.meta, val=parent.meta["val"])
    return made


_SAME_SIZE = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.squeeze.dim,
}


def _inverse(parent: fx.Node, view: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    if view.target is aten.transpose.int:
        return aten.transpose.int, (value, *view.args[1:])
    if view.target is aten.t.default:
        return aten.t.default, (value,)
    shape = parent.meta["val"].shape
    sizes = [-1 if isinstance(size, torch.SymInt) else hint(size) for size in shape]
    return aten.reshape.default, (value, sizes)


def _at(node: fx.Node) -> str:
    source = node.meta.get("source")
    return f"{node.target} (node {node.name}{f', {source}' if source else ''})"
