"""The two forms of a model: what it computes in eval mode, and what it computes in training.

Both are exported graphs of the same modules. They are compared operator by operator and output by output, apart from
what follows the mode in every result: batch norm, and dropout that both forms have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphzip.canonical.canonicalize import is_assertion
from graphzip.graph.modes import DROPOUTS, DROPOUTS_IN_PLACE, is_inside
from graphzip.graph.operators import arguments_of
from graphzip.graph.source import owner_of, source_of
from graphzip.graph.state import get_tensor
from graphzip.graph.torch_private import InstanceNorm, pytree

__all__ = ["Form", "Place", "counts_batches", "differences", "form_of", "same_numbers", "shown"]

aten = torch.ops.aten

Place = tuple[str, str]
"""The module that ran an operator, and its line."""


@dataclass(frozen=True)
class _Ref:
    """An input, or the result of an earlier step."""

    kind: str
    number: int


@dataclass(frozen=True)
class Operation:
    """One operator: what it does to earlier results, and where it stands in the model."""

    target: str
    args: tuple[Any, ...]
    owner: str
    source: str
    is_size: bool = False

    @property
    def said(self) -> tuple[str, str, str, str]:
        """What tells it from the others where the results it reads do not count."""
        literals = fx.node.map_aggregate(self.args, lambda value: "" if isinstance(value, _Ref) else value)
        return self.target, self.owner, self.source, repr(literals)


@dataclass(frozen=True)
class Form:
    """What a graph computes, as a list of steps, and what it returns."""

    steps: tuple[Operation, ...]
    outputs: Any
    shown: str
    followed: frozenset[Any]

    @property
    def computes(self) -> list[Any]:
        """The operators and what they read, wherever they stand."""
        return [(step.target, step.args) for step in self.steps]


def form_of(module: fx.GraphModule, model: nn.Module, other: Form | None = None) -> Form:
    """The form of an exported graph of `model`, with the eval form as `other` where it is the one of training."""
    return _Reader(module, model, other).read()


class _Reader:
    def __init__(self, module: fx.GraphModule, model: nn.Module, other: Form | None) -> None:
        self.module = module
        self.model = model
        self.other = other
        self.refs: dict[fx.Node, Any] = {}
        self.steps: list[Operation] = []
        self.followed: set[Any] = set()
        self.named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.named |= {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def read(self) -> Form:
        live = _live(self.module.graph)
        outputs: Any = ()
        places = 0
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.refs[node] = _Ref("input", places)
                places += 1
            elif node.op == "get_attr":
                self.refs[node] = self._constant(str(node.target))
            elif node.op == "output":
                outputs = node.args[0]
            elif node in live and not is_assertion(node) and not counts_batches(node):
                self._step(node)
        spec = _out_spec(self.module.graph)
        returned = (str(spec), fx.node.map_aggregate(outputs, self._ref), _kinds(outputs))
        return Form(tuple(self.steps), returned, shown(spec, outputs), frozenset(self.followed))

    def _step(self, node: fx.Node) -> None:
        place = (owner_of(node), source_of(node))
        target: Any = node.target
        plain: dict[str, Any] = {str(number): value for number, value in enumerate(node.args)}
        args = arguments_of(node) if hasattr(target, "_schema") else plain
        if target in DROPOUTS or target in DROPOUTS_IN_PLACE:
            key = (place, str(target), args["p"])
            if not args["train"]:
                self.followed.add(key)
            if (
                not args["train"]
                or self._follows(key)
                or isinstance(module_named(self.model, place[0]), nn.MultiheadAttention)
            ):
                self.refs[node] = self._ref(args[next(iter(args))])
                return
        args |= self._switches(place, target, args)
        self.refs[node] = _Ref("step", len(self.steps))
        said = tuple((name, fx.node.map_aggregate(value, self._ref)) for name, value in args.items())
        is_size = isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
        self.steps.append(Operation(str(target), said, *place, is_size=is_size))

    def _switches(self, place: Place, target: Any, args: Mapping[Any, Any]) -> dict[str, Any]:
        """Arguments that say the mode, where the result follows it, or its loss is told by the module alone."""
        owner, key = module_named(self.model, place[0]), (place, str(target))
        if target is aten.batch_norm.default and args["running_mean"] is not None:
            if not args["training"]:
                self.followed.add(key)
            return {"training": "follows"} if not args["training"] or self._follows(key) else {}
        if target is aten.instance_norm.default and isinstance(owner, InstanceNorm):
            return {"use_input_stats": "follows"}
        if target is aten.rrelu.default and type(owner) is nn.RReLU:
            return {"training": "follows"}
        if target is aten.scaled_dot_product_attention.default and isinstance(owner, nn.MultiheadAttention):
            return {"dropout_p": "told"}
        if "train" in args and "num_layers" in args and (isinstance(owner, nn.RNNBase) or not args["dropout"]):
            return {"train": "told"}
        return {}

    def _follows(self, key: Any) -> bool:
        return self.other is not None and key in self.other.followed

    def _ref(self, value: Any) -> Any:
        return self.refs[value] if isinstance(value, fx.Node) else value

    def _constant(self, name: str) -> Any:
        if name in self.named:
            return ("state", name)
        return _Constant(get_tensor(self.module, name))


def counts_batches(node: fx.Node) -> bool:
    """Whether a node is the step of a batch norm's counter, which the norm takes by itself."""
    first = node.args[0] if node.args else None
    return (
        node.target is aten.add_.Tensor
        and isinstance(first, fx.Node)
        and first.op == "get_attr"
        and str(first.target).rpartition(".")[2] == "num_batches_tracked"
    )


class _Constant:
    """A tensor that stands in the model's code, which equals another by its numbers."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and same_numbers(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.value.dtype}{list(self.value.shape)}"


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two constants are equal; without numbers to compare, whether they may be."""
    if one is other or one.dtype != other.dtype or one.shape != other.shape:
        return one is other
    return one.is_meta or other.is_meta or torch.equal(one, other)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Operators that reach an output, or write somewhere."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or node in found or (schema is not None and schema.is_mutable):
            found.add(node)
            found.update(node.all_input_nodes)
    return found


def _out_spec(graph: fx.Graph) -> pytree.TreeSpec | None:
    info = getattr(graph._codegen, "pytree_info", None)
    return None if info is None else info.out_spec


def _size(size: Any) -> int | None:
    return int(size) if isinstance(size, int) else None


def _kinds(outputs: Any) -> tuple[Any, ...]:
    """The dtype and the fixed sizes of every output."""
    values = [each.meta.get("val") if isinstance(each, fx.Node) else each for each in outputs]
    return tuple(
        (value.dtype, tuple(map(_size, value.shape))) if isinstance(value, torch.Tensor) else type(value)
        for value in values
    )


def shown(spec: pytree.TreeSpec | None, outputs: Sequence[Any]) -> str:
    """`{a: [*, 3], b: ([*, 4], [*, 5])}`: the tensors that are returned, by their shapes."""
    leaves = []
    for each in outputs:
        value = each.meta.get("val") if isinstance(each, fx.Node) else each
        sizes = (
            [] if not isinstance(value, torch.Tensor) else ["*" if _size(n) is None else str(n) for n in value.shape]
        )
        leaves.append(f"[{', '.join(sizes)}]" if isinstance(value, torch.Tensor) else repr(value))
    try:
        text = _tree(leaves[0] if spec is None else pytree.tree_unflatten(leaves, spec))
    except Exception:  # a container that only holds tensors, such as a cache
        text = f"({', '.join(leaves)})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


_LONGEST = 160


def _tree(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_tree(each)}" for key, each in value.items()) + "}"
    parts = ", ".join(map(_tree, value if isinstance(value, tuple | list) else pytree.tree_leaves(value)))
    if type(value) in (tuple, list):
        return f"({parts})" if type(value) is tuple else f"[{parts}]"
    return str(value) if value is None else f"{type(value).__name__}({parts})"


# --- comparing -----------------------------------------------------------------------------------------------------


def differences(model: nn.Module, evaluated: Form, trained: Form, told: Iterable[str]) -> Iterator[str]:
    """Sentences on what `model` does in training that its eval form does not; not on modules that were `told` of."""
    if evaluated.computes == trained.computes and evaluated.outputs == trained.outputs:
        return
    name, said = type(model).__name__, False
    (spec, _, kinds), (other_spec, _, other_kinds) = evaluated.outputs, trained.outputs
    if (spec, kinds) != (other_spec, other_kinds):
        said = True
        yield (
            f"{name} returns {trained.shown} in training mode and {evaluated.shown} in eval mode; the result returns "
            f"the latter in both{_ADVICE}"
        )
    missing, extra = (Counter(step.said for step in form.steps if not step.is_size) for form in (evaluated, trained))
    missing, extra = missing - extra, extra - missing
    changed = [*extra, *missing]
    for (what, kind, lines), names in _by_kind(model, evaluated, trained, changed, told).items():
        alike = f", and {len(names) - 1} like it" if len(names) > 1 else ""
        who = f"'{names[0]}' ({kind}{alike})" if names[0] else kind
        more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        yield f"{who} {what.format(lines=', '.join(lines[:_NAMED]) + more)}{_ADVICE}"
    if not changed and not said:
        yield f"{name} computes something else in training mode, which is left out{_ADVICE}"


_ADVICE = " (mode='train' keeps both)"
_NAMED = 3
_ONLY_TRAINING = "acts only in training and is left out"
_ONLY_EVAL = "does not act in training; in the result it acts in both modes"
_OTHERWISE = "computes something else in training mode ({lines}), which is left out"

_Kind = tuple[str, str, tuple[str, ...]]
"""What is said of a module, its class, and the operators that differ."""


def _by_kind(
    model: nn.Module,
    evaluated: Form,
    trained: Form,
    changed: Sequence[tuple[str, str, str, str]],
    told: Iterable[str],
) -> dict[_Kind, list[str]]:
    """Modules that differ, together with others of their class that differ alike; not what is inside of one told of."""
    in_eval, in_training = ({step.owner for step in form.steps} for form in (evaluated, trained))
    told = list(told)
    found: dict[_Kind, list[str]] = {}
    order = list(dict.fromkeys(owner for _, owner, _, _ in changed))
    for owner in sorted(order, key=lambda name: name.count(".")):
        if is_inside(owner, told):
            continue
        what = _OTHERWISE
        if owner and (owner not in in_eval or owner not in in_training):
            what = _ONLY_EVAL if owner in in_eval else _ONLY_TRAINING
            told.append(owner)
        found.setdefault((what, type(module_named(model, owner)).__name__, _lines(changed, owner)), []).append(owner)
    return dict(sorted(found.items(), key=lambda item: min(map(order.index, item[1]))))


def _lines(changed: Sequence[tuple[str, str, str, str]], owner: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_line(target, source) for target, own, source, _ in changed if own == owner))


def _line(target: str, source: str) -> str:
    name = target.split(".")[1] if target.count(".") > 1 else target
    return f"{name} at {source}" if source else name


def module_named(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name, if there is one."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
