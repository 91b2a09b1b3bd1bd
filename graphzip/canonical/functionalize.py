"""Replace operators that write in place by functional ones.

`y = relu_(x)` becomes `y = relu(x)`, and whatever reads `x` afterwards reads `y`. Where other values share the memory
of `x` and are read afterwards, they get what was written, too: it is carried back to the tensor that `x` is a view of,
and later uses of other views of that tensor read fresh views. A write that cannot be carried to where it is read, or
that is seen outside of the model, is refused: the result would compute something else.

Gradients flow as they do in the model. What is written under `no_grad`, or through `detach`, changes the values of a
tensor and not its gradients.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphzip.canonical.fragile_copies import shared_at_one
from graphzip.canonical.functional import functional_call, is_like_operand, metadata_form, writes_out
from graphzip.canonical.memory import Memory, View, layout, plain, writes, written
from graphzip.canonical.numbered_views import is_plain, write_positions
from graphzip.canonical.writeback import is_apart, overlaps, write_back
from graphzip.errors import TraceError
from graphzip.graph.branches import Branch
from graphzip.graph.builder import Builder
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.meta import meta_of
from graphzip.graph.modes import DROPOUTS
from graphzip.graph.operators import arguments_of
from graphzip.graph.randomness import drop_dead
from graphzip.graph.state import get_tensor

__all__ = ["Writes", "functionalize"]

aten = torch.ops.aten

_STRICT = {aten.view.default, aten._unsafe_view.default}
"""Views that need the strides that tracing saw, which a functional operator may not keep."""

_UNSEEN = {getattr(aten, f"logical_{name}_").default for name in ("and", "or", "xor", "not")}
"""Operators that autograd does not see: gradients go on as if nothing had been written."""

_NAMES = {aten.slice.Tensor, aten.alias.default}
"""Operators that are not needed where they give their operand."""

_LAID_OUT = {aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype}
"""Views that read the memory as it lies."""


@dataclass(frozen=True)
class Writes:
    """What is to be said of the writes of a graph.

    `notes` are sentences on what it does otherwise than the model; `branches` are comparisons of sizes that decide what
    shares memory.
    """

    notes: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()


def functionalize(graph: fx.Graph) -> Writes:
    """Make `graph` free of operators that write.

    Raises `TraceError`, which names the operator and its source line, where that is impossible.
    """
    if not any(writes(node) for node in graph.nodes):
        return Writes()
    for node in list(graph.nodes):
        _spell_out(graph, node)
    drop_dead(graph)
    memory = Memory(graph)
    branches = tuple(shared_at_one(graph, memory))
    _Functional(graph, memory).run()
    drop_dead(graph)
    return Writes(tuple(_what_is_left(graph)), branches)


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    """Write operators that only change how a tensor looks at its memory as views, and `fill_diagonal_` as a fill."""
    if not writes(node):
        return
    view = metadata_form(node.target)
    if view is not None:
        node.target = view
        meta_of(node).pop("no_grad", None)  # it is the same tensor, whose gradients go on
    elif node.target is aten.fill_diagonal_.default:
        _fill_of_diagonal(graph, node)


def _fill_of_diagonal(graph: fx.Graph, node: fx.Node) -> None:
    given = arguments_of(node)
    tensor = given["self"]
    shape = concrete_shape(tensor.meta["val"])
    if given["wrap"] and len(shape) == 2 and shape[0] > shape[1]:
        raise TraceError(f"{_at(node)} wraps around at the end of the diagonal; use torch.where with a mask instead")
    build = Builder.before(node)
    diagonal = build(aten.diagonal.default, tensor)
    for _ in shape[2:]:
        diagonal = build(aten.diagonal.default, diagonal, 0, 0, -1)
    build.known(diagonal.meta["val"], aten.fill_.Scalar, diagonal, given["fill_value"])
    node.replace_all_uses_with(tensor)
    graph.erase_node(node)


def _lost(value: Any, reason: str) -> Any:
    """Stands for a value that cannot be computed, which matters only where it is read."""


def _otherwise(value: Any, note: str) -> Any:
    """Stands for its operand, which the model computes otherwise in training mode."""


def _what_is_left(graph: fx.Graph) -> Iterable[str]:
    """Notes on the values that are read in spite of what is to be said of them."""
    for node in list(graph.nodes):
        if node.target is _lost:
            raise TraceError(str(node.args[1]))
        if node.target is _otherwise:
            yield str(node.args[1])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


class _Functional:
    """One run through a graph in the order of execution.

    `now` holds, for every value in a memory that is written somewhere, the node that has its current content, and how
    often the memory had been written by then. A value whose memory has been written since is made again, out of what
    its parent is now, when it is read.
    """

    def __init__(self, graph: fx.Graph, memory: Memory) -> None:
        self.graph = graph
        self.memory = memory
        self.nodes = list(graph.nodes)
        operands = [operand for node in self.nodes if writes(node) for operand in written(node)]
        self.tracked = {number for operand in operands for number in self.memory.numbers(operand)}
        self.count: Counter[int] = Counter()
        self.now: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}
        self.given: dict[fx.Node, tuple[Any, Any]] = {}
        self.results: dict[fx.Node, list[fx.Node]] = {}
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.last = {node: max((self.place[user] for user in node.users), default=-1) for node in self.nodes}
        self.build = Builder.before(self.nodes[0])
        self.relaid = False

    def run(self) -> None:
        gone = []
        for node in self.nodes:
            self.build.place = node
            if writes(node):
                self._write(node)
                gone.append(node)
            elif self._is_result(node):
                gone.append(node)
            else:
                self._rewire(node)
                self._loosen(node)
        for node in reversed(gone):
            self.graph.erase_node(node)

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self, node: fx.Node) -> fx.Node:
        """The node that holds what `node` is now."""
        if not self._is_tracked(node):
            return node
        made, stamp = self.now[node]
        if stamp != self._stamp(node):
            made = self._again(node)
            self._know(node, made)
        return made

    def _read_all(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self.read)

    def _is_tracked(self, node: fx.Node) -> bool:
        return any(number in self.tracked for number in self.memory.numbers(node))

    def _stamp(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.count[number] for number in self.memory.numbers(node))

    def _know(self, node: fx.Node, made: fx.Node) -> None:
        self.now[node] = made, self._stamp(node)

    def _is_result(self, node: fx.Node) -> bool:
        """Whether a node takes one of the tensors that an operator has written out of their tuple."""
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, fx.Node) or not writes(source):
            return False
        self._know(node, self.results[source][node.args[1]])  # type: ignore[index]
        return True

    def _rewire(self, node: fx.Node) -> None:
        """Let a node read what its operands are now."""
        self.given[node] = node.args, node.kwargs
        if any(self._is_tracked(each) for each in node.all_input_nodes):
            node.args = self._read_all(node.args)
            node.kwargs = self._read_all(node.kwargs)
        if self._is_tracked(node):
            is_name = node.target in _NAMES and self.memory.same[node] is not node
            self._know(node, self.read(self.memory.view[node].parent) if is_name else node)

    def _again(self, node: fx.Node) -> fx.Node:
        """The same view of what the memory holds now."""
        view = self.memory.view.get(node)
        if view is not None and (writes(view.maker) or self.memory.same[node] is self.memory.same[view.parent]):
            return self.read(view.parent)
        assert node in self.given, f"{node} is read after it was given up"
        self.relaid = True
        made = self.build.again(node, *map(self._read_all, self.given[node]))
        self._loosen(made)
        if node.target in DROPOUTS:
            return self._mark(_otherwise, made, f"{_at(node)} {_NO_COPY}")
        return made

    def _mark(self, target: Any, value: fx.Node, text: str) -> fx.Node:
        return self.build.known(value.meta["val"], target, value, text)

    def _loosen(self, node: fx.Node) -> None:
        """Where a tensor may lie in memory otherwise than when it was traced, a view may have to copy."""
        if not self.relaid or node.op != "call_function":
            return
        if node.target in _STRICT:
            node.target = aten.reshape.default
        elif node.target in _LAID_OUT:
            source: Any = self.given.get(node, (node.args,))[0][0]
            if node.target is aten.as_strided.default and not is_plain(source.meta["val"]):
                raise TraceError(f"{_at(node)} reads the memory of a tensor as it lies, after a write in place")
            laid_out = self.build.known(source.meta["val"], aten.contiguous.default, node.args[0])
            node.args = (laid_out, *node.args[1:])

    # --- writing ---------------------------------------------------------------------------------------------------

    def _write(self, node: fx.Node) -> None:
        operands = written(node)
        if node.target is aten.copy_.default and self._is_there(operands[0], node.args[1]):
            self._know(node, self.read(operands[0]))
            return
        for operand in operands:
            self._check(node, operand)
        values = self._computed(node, operands)
        self.results[node] = values
        for number, (operand, value) in enumerate(zip(operands, values, strict=True)):
            result = node.meta["val"] if isinstance(node.meta["val"], torch.Tensor) else node.meta["val"][number]
            if _shape(result) == _shape(operand.meta["val"]):
                self._put(node, operand, value)
            else:
                self._replace(node, operand, value)

    def _check(self, node: fx.Node, operand: Any) -> None:
        """Refuse what is written outside of the model."""
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            raise TraceError(f"{_at(node)} {_NO_FORM}")
        root = self.memory.root(operand)
        if root.op in {"placeholder", "get_attr"}:
            what = "its input" if root.op == "placeholder" else "the parameter or buffer"
            raise TraceError(
                f"{_at(node)} writes into {what} {root.target!r} in place; a compiled model has no side effects: "
                "write `x = x.op(...)` (or clone first) instead of `x.op_(...)`"
            )
        if overlaps(operand.meta["val"]):
            raise TraceError(
                f"{_at(node)} writes several values to one place of the memory, made by {operand.target}, and which "
                "one stays there is not defined; clone the tensor first"
            )

    def _is_there(self, left: fx.Node, right: Any) -> bool:
        """Whether a tensor is copied to where it lies already, as in the last step of `y[:, 0] *= 2`."""
        return (
            isinstance(right, fx.Node)
            and self.memory.numbers(left) == self.memory.numbers(right)
            and layout(left.meta["val"]) == layout(right.meta["val"])
        )

    def _computed(self, node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
        """What an operator writes, as new nodes: of the dtype of what is written, and with its gradients."""
        if node.target is aten.copy_.default:
            values = [self._copied(node)]
        else:
            call = functional_call(node)
            if call is None:
                raise TraceError(f"{_at(node)} {_NO_FORM}")
            form, args, kwargs = call[0], self._read_all(call[1]), self._read_all(call[2])
            if is_like_operand(form, args, kwargs, operands[0].meta["val"]) and len(operands) == 1:
                return [self._cast(node, operands[0], self.build.known(operands[0].meta["val"], form, *args, **kwargs))]
            made = self.build(form, *args, **kwargs)
            if self._narrows(node, form, made):
                made = self.build(form, *args, **{**kwargs, "dtype": operands[0].meta["val"].dtype})
            values = [made]
            if not isinstance(made.meta["val"], torch.Tensor):
                values = [self.build(operator.getitem, made, number) for number in range(len(made.meta["val"]))]
        return [self._cast(node, operand, value) for operand, value in zip(operands, values, strict=True)]

    def _narrows(self, node: fx.Node, form: Any, made: fx.Node) -> bool:
        """Whether `out=` decides in which dtype an operator sums up."""
        takes = writes_out(node.target) and "dtype" in {argument.name for argument in form._schema.arguments}
        return takes and made.meta["val"].dtype != written(node)[0].meta["val"].dtype

    def _copied(self, node: fx.Node) -> fx.Node:
        """What `copy_` copies, in the shape of what it is copied to."""
        target, source = (self.read(each) for each in node.args[:2])  # type: ignore[arg-type]
        device = target.meta["val"].device
        if source.meta["val"].device != device:
            source = self.build(aten.to.device, source, device, target.meta["val"].dtype)
        if _shape(source.meta["val"]) != _shape(target.meta["val"]):
            source = self.build(aten.expand_as.default, source, target)
        return source

    def _cast(self, node: fx.Node, operand: fx.Node, value: fx.Node) -> fx.Node:
        wanted, found = operand.meta["val"], value.meta["val"]
        if found.dtype != wanted.dtype:
            value = self.build(aten.to.dtype, value, wanted.dtype)
        self.relaid |= [*map(plain, found.stride())] != [*map(plain, wanted.stride())]
        if meta_of(node).get("no_grad") or node.target in _UNSEEN:
            return self._past_gradients(self.read(operand), value)
        return value

    def _past_gradients(self, before: fx.Node, value: fx.Node) -> fx.Node:
        """`value` with the gradients of what stood there before: they do not see the write."""
        if _carries_gradient(value, stopped=False):
            value = self.build(aten.detach.default, value)
        if not _carries_gradient(before, stopped=True):
            return value
        nothing = self.build(aten.sub.Tensor, before, self.build(aten.detach.default, before))
        if not before.meta["val"].is_complex():
            nothing = self.build(aten.nan_to_num.default, nothing, 0.0)  # infinity has no difference from itself
        return self.build(aten.add.Tensor, value, nothing)

    def _replace(self, node: fx.Node, operand: fx.Node, value: fx.Node) -> None:
        """`out=` a tensor of another shape, which gets new memory."""
        place = self.place[node]
        known = {each for each in self.memory.members[self.memory.numbers(operand)[0]] if self.place[each] < place}
        if any(self.last[each] > place for each in known):
            raise TraceError(f"{_at(node)} resizes a tensor that is read under another name afterwards")
        self._know(node, value)

    def _put(self, node: fx.Node, operand: fx.Node, value: fx.Node) -> None:
        """Let `operand` be `value` from here on, and with it whatever shares its memory and is read later."""
        memory, place = self.memory, self.place[node]
        members = memory.members[memory.numbers(operand)[0]]
        fresh = [each for each in members if each in self.now and self.now[each][1] == self._stamp(each)]
        became = self._carried_back(node, operand, value)
        self.relaid |= len(became) > 1
        apart = [each for each in fresh if memory.same[each] not in became and is_apart(memory, each, operand)]
        self.count[memory.numbers(operand)[0]] += 1
        for each in apart:
            self._know(each, self.now[each][0])
        for each in members:
            if memory.same[each] in became and self.place[each] <= place:
                self._know(each, became[memory.same[each]])

    def _carried_back(self, node: fx.Node, operand: fx.Node, value: fx.Node) -> dict[fx.Node, fx.Node]:
        """What the written tensor and those it is a view of have become, as far as it matters."""
        same = self.memory.same
        root = same[self.memory.root(operand)]
        became, steps = {same[operand]: value}, []
        for child, view in self.memory.path(operand):
            if same[child] is same[view.parent]:
                continue
            if not self._is_needed(node, operand, became):
                break
            steps.append((child, view))
            made = self._undone(node, steps, value)
            if made is None and same[view.parent] is not root:
                continue
            if made is None:
                made = self._mark(_lost, self.read(view.parent), f"{_at(node)} {_NO_WAY_BACK.format(operand.target)}")
            if any(step.stops_gradient for _, step in steps):
                made = self._past_gradients(self.read(view.parent), made)
            became[same[view.parent]] = value = made
            steps = []
        return became

    def _undone(self, node: fx.Node, steps: list[tuple[fx.Node, View]], value: fx.Node) -> fx.Node | None:
        """What the tensor at the end of `steps` has become, the view at their start being `value`."""
        (child, view), parent = steps[0], steps[-1][1].parent
        if overlaps(parent.meta["val"]):
            return None
        if len(steps) == 1 and view.maker.target in DROPOUTS:
            return self._mark(_otherwise, value, f"{_at(node)} {_NO_COPY}")
        if len(steps) == 1 and view.maker.target is aten.detach.default:
            return value
        made = write_back(self.build, child, view, lambda: self.read(parent), value) if len(steps) == 1 else None
        return write_positions(self.build, steps, self.read(parent), value) if made is None else made

    def _is_needed(self, node: fx.Node, operand: fx.Node, became: Iterable[fx.Node]) -> bool:
        """Whether something that is read after a write is not made of what is known to have become."""
        known, same, place = set(became), self.memory.same, self.place[node]
        for each in self.memory.members[self.memory.numbers(operand)[0]]:
            if self.last[each] > place and isinstance(each.meta["val"], torch.Tensor):
                above = [view.parent for _, view in self.memory.path(each)]
                if not known & {same[found] for found in [each, *above]}:
                    return True
        return False


def _carries_gradient(node: fx.Node, *, stopped: bool) -> bool:
    """Whether a gradient may flow from a value to a parameter or an input; `stopped` says if `no_grad` stops it."""
    seen, left = {node}, [node]
    while left:
        found = left.pop()
        value = found.meta.get("val")
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            continue
        if found.op == "placeholder" or (found.op == "get_attr" and _is_parameter(found)):
            return True
        if found.target is not aten.detach.default and not (stopped and meta_of(found).get("no_grad")):
            left += [each for each in found.all_input_nodes if each not in seen]
            seen.update(found.all_input_nodes)
    return False


def _is_parameter(node: fx.Node) -> bool:
    module = node.graph.owning_module
    assert module is not None
    return isinstance(get_tensor(module, str(node.target)), nn.Parameter)


def _shape(value: torch.Tensor) -> list[Any]:
    return [plain(size) for size in value.shape]


_NO_FORM = "writes in place and has no functional form; write it without the in-place operator"
_NO_COPY = (
    "changes a tensor of which a dropout makes a copy in training mode and none in eval mode; training computes with "
    "what was there before"
)
_NO_WAY_BACK = (
    "writes into a view made by {}; graphzip cannot carry that write back to the tensor: build the result with "
    "torch.cat, torch.where or a mask instead"
)


def _at(node: fx.Node) -> str:
    source = node.meta.get("source")
    return f"{node.target} (node {node.name}{f', {source}' if source else ''})"
