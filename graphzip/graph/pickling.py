"""Graphs, and what refers to them, as bytes: for pickling, copying and sending to other processes.

`torch.fx` writes a graph module as generated source and traces that anew where it is read, which loses what a graph
says of itself and fails where code asks for values. Here a graph is the list of its nodes. Tensors and modules stay
objects beside the bytes (`Frozen.outside`): whoever pickles them does it in his way, and what is shared stays shared.

Reading such bytes runs code, as reading any pickle does.
"""

from __future__ import annotations

import io
import operator
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

import graphzip.numeric.grouped_mm  # noqa: F401 - a node may call its operator
from graphzip.errors import GraphZipError
from graphzip.global_lock import ALONE
from graphzip.graph.torch_private import FakeTensor, FakeTensorMode, OpOverload, ShapeEnv, SymNode
from graphzip.version import __version__

__all__ = ["Beside", "Freezable", "Frozen", "freeze", "thaw"]

_VERSIONS = {"graphzip": __version__, "torch": torch.__version__}


class Beside:
    """Base of what modules hold, too, so that it has to stay one object when they are pickled or copied."""


@dataclass(frozen=True)
class Frozen:
    """Objects as bytes, the tensors and modules they refer to, and the versions that wrote them."""

    data: bytes
    outside: tuple[Any, ...]
    versions: dict[str, str]


class Freezable:
    """Base of what has graphs in it, and is pickled with them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return thaw, (freeze(self),)


def thaw(frozen: Frozen) -> Any:
    """The objects again. Raises `GraphZipError` where these versions of torch and graphzip cannot read them."""
    try:
        with ALONE:
            return _Thawer(frozen).load()
    except Exception as error:
        by, here = (
            " and ".join(f"{name} {version}" for name, version in each.items()) for each in (frozen.versions, _VERSIONS)
        )
        advice = "import what defines its operators first"
        if by != here:
            advice = (
                f"it was pickled by {by}, and here are {here}: a pickle is for the versions that wrote it; keep models "
                "with Compiled.save and graphzip.load"
            )
        raise GraphZipError(f"a pickled model cannot be read ({error}); {advice}") from error


def freeze(value: Any, *, only_calls: bool = False) -> Frozen:
    """`value` as bytes; with `only_calls` graphs without what is known of the nodes' results.

    Raises `GraphZipError` where something in it cannot be pickled.
    """
    buffer = io.BytesIO()
    freezer = _Freezer(buffer, only_calls=only_calls)
    try:
        with ALONE:
            freezer.dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise GraphZipError(
            f"this cannot be pickled or copied ({error}); keep a trained model with state_dict() or Compiled.save"
        ) from error
    return Frozen(buffer.getvalue(), tuple(freezer.outside), _VERSIONS)


class _Freezer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, *, only_calls: bool) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.only_calls = only_calls
        self.outside: list[Any] = []
        self._places: dict[int, int] = {}
        self._graphs: dict[fx.Graph, dict[fx.Node, int]] = {}
        self._lists: dict[fx.Graph, _Nodes] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The place of what stays outside; a container of a traced graph has no class of its own and goes in."""
        stays = isinstance(value, torch.Tensor | Beside) and not isinstance(value, FakeTensor)
        if not stays and not (isinstance(value, nn.Module) and not _is_traced(value)):
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self.outside)
            self.outside.append(value)
        return self._places[id(value)]

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type):
            return NotImplemented
        for kind, reduce in _REDUCED.items():
            if isinstance(value, kind):
                return reduce(self, value)
        return NotImplemented

    def graph(self, graph: fx.Graph) -> Any:
        number = self._numbers(graph)

        def as_ref(node: fx.Node) -> Any:
            return _Ref(number[node])

        nodes = []
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), as_ref)
            meta = {} if self.only_calls else dict(node.meta)
            nodes.append((node.op, node.name, node.target, args, kwargs, meta))
        return _graph, (nodes, graph._codegen)

    def node(self, node: fx.Node) -> Any:
        number = self._numbers(node.graph).get(node)
        if number is None:
            raise pickle.PicklingError(f"node {node.name} is part of no graph any more")
        return operator.getitem, (self._lists.setdefault(node.graph, _Nodes(node.graph)), number)

    def _numbers(self, graph: fx.Graph) -> dict[fx.Node, int]:
        if graph not in self._graphs:
            self._graphs[graph] = {node: number for number, node in enumerate(graph.nodes)}
        return self._graphs[graph]

    def module(self, module: fx.GraphModule) -> Any:
        parts = module._modules, module._parameters, module._buffers, module._non_persistent_buffers_set
        return _module, (type(module).__name__, parts, module.training, module.graph)

    def fake(self, value: FakeTensor) -> Any:
        if value.layout != torch.strided:
            raise pickle.PicklingError(f"a tensor of the layout {value.layout} cannot be described")
        place = tuple(value.shape), value.stride(), value.dtype, value.device
        return _fake, (value.fake_mode, *place, value.requires_grad, isinstance(value, nn.Parameter))

    def mode(self, mode: FakeTensorMode) -> Any:
        return _mode, (mode.shape_env,)

    def environment(self, environment: ShapeEnv) -> Any:
        """All but caches, which hold tensors."""
        caches = ("tracked_fakes", "fake_tensor_cache")
        state = {name: value for name, value in environment.__dict__.items() if name not in caches}
        return ShapeEnv, (), state, None, None, _update

    def symbolic(self, value: Any) -> Any:
        node = value.node
        if not isinstance(node, SymNode):
            raise pickle.PicklingError(f"the size {value} cannot be described")
        return _symbolic, (type(value), node._expr, node.shape_env, node.pytype, node._hint)

    def overload(self, overload: OpOverload) -> Any:
        return _overload, (overload.namespace, overload._schema.name.partition("::")[2], overload._overloadname)

    def alone(self, value: Freezable) -> Any:
        """As part of a whole that is frozen."""
        return object.__new__, (type(value),), vars(value)


_REDUCED: dict[Any, Callable[[_Freezer, Any], Any]] = {
    Freezable: _Freezer.alone,
    fx.Graph: _Freezer.graph,
    fx.Node: _Freezer.node,
    fx.GraphModule: _Freezer.module,
    FakeTensor: _Freezer.fake,
    FakeTensorMode: _Freezer.mode,
    ShapeEnv: _Freezer.environment,
    OpOverload: _Freezer.overload,
    (torch.SymInt, torch.SymFloat, torch.SymBool): _Freezer.symbolic,
}


def _is_traced(module: nn.Module) -> bool:
    """Whether a module is one of a traced graph: the graph itself, or a container that holds its tensors."""
    if isinstance(module, fx.GraphModule):
        return all(type(inner) is nn.Module for inner in module.modules() if inner is not module)
    return type(module) is nn.Module


class _Thawer(pickle.Unpickler):
    def __init__(self, frozen: Frozen) -> None:
        super().__init__(io.BytesIO(frozen.data))
        self.outside = frozen.outside

    def persistent_load(self, pid: Any) -> Any:
        return self.outside[pid]


@dataclass(frozen=True)
class _Ref:
    """A node of the same graph, by its number."""

    number: int


def _graph(nodes: list[tuple[Any, ...]], codegen: Any) -> fx.Graph:
    graph, made = fx.Graph(), list[fx.Node]()
    graph.set_codegen(codegen)
    for op, name, target, args, kwargs, meta in nodes:
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda each: made[each.number] if isinstance(each, _Ref) else each
        )
        made.append(graph.create_node(op, target, args, kwargs, name))
        made[-1].meta.update(meta)
    return graph


class _Nodes:
    """Stands for the list of the nodes of a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __reduce__(self) -> Any:
        return _listed, (self.graph,)


def _listed(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.nodes)


def _module(name: str, parts: tuple[Any, ...], training: bool, graph: fx.Graph) -> fx.GraphModule:
    from graphzip.graph.state import graph_module  # which makes modules that are pickled with this

    root = nn.Module()
    root._modules, root._parameters, root._buffers, root._non_persistent_buffers_set = parts
    root.training = training
    return graph_module(root, graph, name)


def _fake(mode: FakeTensorMode, *described: Any) -> torch.Tensor:
    shape, strides, dtype, device, learns, is_parameter = described
    with mode:
        value = torch.empty_strided(shape, strides, dtype=dtype, device=device, requires_grad=learns)
    return nn.Parameter(value, learns) if is_parameter else value


def _mode(environment: ShapeEnv | None) -> FakeTensorMode:
    return FakeTensorMode(shape_env=environment)


def _update(value: Any, state: dict[str, Any]) -> None:
    value.__dict__.update(state)


def _symbolic(kind: Any, expression: Any, environment: ShapeEnv, pytype: type, hint: Any) -> Any:
    return kind(SymNode(expression, environment, pytype, hint))


def _overload(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
