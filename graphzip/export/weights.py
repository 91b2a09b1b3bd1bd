"""Do the constants of an ONNX model hold the weights of the module? Asked of the module, not of the converter.

A stored constant is traced back where it is a tensor of the module (in another shape, order of dimensions or dtype), a
value that the program computes from such tensors alone, or a kernel or bias with a batch norm folded into it. What is
packed in an order of its own, such as the gates of a recurrent layer, must be made of values of the module.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphzip.export.onnx_equality import constants
from graphzip.graph.operators import CONVOLUTIONS, TRANSPOSED, arguments_of
from graphzip.graph.randomness import is_random

__all__ = ["Found", "trace_weights"]

aten = torch.ops.aten

_FEW = 16
"""Numbers up to which a constant may be one of the graph's own: a shape, a scale."""

_ROUNDING = 16.0
_DIMS = 4
_DTYPES = {
    "FLOAT": torch.float32,
    "DOUBLE": torch.float64,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Found:
    """What became of the weights: names of constants and of the module's tensors.

    `wrong` holds sentences on constants that bear the name of a weight and other numbers; `untraced` are constants
    that are no weight in any known form, `missing` are weights that no constant holds, `computed` constants that are
    not one of the module's tensors bit by bit.
    """

    wrong: list[str] = field(default_factory=list)
    untraced: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    computed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Candidate:
    """What is computed from the module's tensors `names`; rounding moves it by shares of `slack`."""

    names: frozenset[str]
    tensor: torch.Tensor
    slack: torch.Tensor


def trace_weights(model: Any, module: nn.Module, program: ExportedProgram) -> Found:
    """Trace the constants of `model` back to the tensors of `module` that `program`, which is `module`, reads."""
    state, found = _State(module, program), Found()
    held: set[str] = set()
    lost = []
    for name, constant in constants(model):
        tensor = _as_torch(constant)
        own = None if tensor is None else state.find(name, tensor)
        if own is not None:
            held.add(own)
        elif tensor is not None:
            lost.append((name, tensor))
    found.computed = {name for name, _ in lost}
    if state.lacks(held) or any(name in state.tensors or tensor.numel() > _FEW for name, tensor in lost):
        lost = _without_computed(state, lost, held)
    for name, tensor in lost:
        if state.is_named(name, tensor) and name not in held:
            found.wrong.append(_sentence(name, tensor, state.forms(name, tensor)))
        elif tensor.numel() > _FEW and tensor.is_floating_point():
            found.untraced.append(name)
    found.missing = state.lacks(held)
    return found


_Constants = list[tuple[str, torch.Tensor]]


def _without_computed(state: _State, lost: _Constants, held: set[str]) -> _Constants:
    """Those constants that nothing computed from weights explains; the weights in the others are `held` from here."""
    left, packed = [], []
    for name, tensor in lost:
        match = state.match(tensor)
        if match is not None:
            held |= match.names
        elif tensor.numel() > _FEW and not state.is_named(name, tensor) and state.holds_values(tensor):
            packed.append(tensor)
        else:
            left.append((name, tensor))
    held |= {name for name in state.lacks(held) if _made_of(state.tensors[name], packed)}
    return left


def _sentence(name: str, there: torch.Tensor, forms: Iterable[torch.Tensor]) -> str:
    """How a constant differs from the form of a weight that it is most like."""
    values, found = there.double().reshape(-1), []
    for form in forms:
        own = form.double().reshape(-1)
        wrong = ~((values - own).abs() <= _ROUNDING * torch.finfo(torch.float32).eps * own.abs())
        found.append((int(wrong.sum()), wrong, own))
    count, wrong, own = min(found, key=lambda each: each[0])
    off = ((values - own).abs() * wrong).nan_to_num(torch.inf)
    worst = int(off.argmax())
    return (
        f"{count} of {values.numel()} numbers of weight {name!r} differ from the module's: there is "
        f"{values[worst].item():.6g} instead of {own[worst].item():.6g}"
    )


def _as_torch(constant: Any) -> torch.Tensor | None:
    """A constant on the CPU; `None` for strings and types that PyTorch lacks."""
    if constant.dtype.is_string():
        return None
    array = np.ascontiguousarray(constant.numpy()).reshape(tuple(constant.shape))
    dtype = _DTYPES.get(constant.dtype.name)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it may not be writable, and nothing is written to it
            return torch.from_numpy(array)
    except TypeError:
        return None


class _State:
    """The tensors of a module that a program reads, and what can be made of them without an input."""

    def __init__(self, module: nn.Module, program: ExportedProgram) -> None:
        self.program = program
        self.places: dict[str, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            name = spec.target
            if name is None or all(_reads_shape(user) for user in nodes[spec.arg.name].users):
                continue
            tensor = own.get(name, program.state_dict.get(name, program.constants.get(name)))
            if isinstance(tensor, torch.Tensor):
                self.places[spec.arg.name] = name
                self.tensors[name] = tensor.detach().cpu()

    def find(self, name: str, tensor: torch.Tensor) -> str | None:
        """Which of the tensors a constant is: the one of its name, or another."""
        if name in self.tensors and _equal(tensor, self.tensors[name]):
            return name
        for other in self.by_count.get(tensor.numel(), []):
            if _equal(tensor, self.tensors[other]) or _transposed(tensor, self.tensors[other]):
                return other
        return None

    def is_named(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a constant has the name and the shape of a tensor of the module."""
        return name in self.tensors and self.tensors[name].shape == tensor.shape

    def forms(self, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """What a tensor of the module may look like: itself, and what is computed from it in the same shape."""
        yield self.tensors[name]
        yield from (each.tensor for each in self.computed if name in each.names and each.tensor.shape == tensor.shape)

    def match(self, tensor: torch.Tensor) -> _Candidate | None:
        """What is computed from tensors of the module and equals a constant up to rounding."""
        if not tensor.is_floating_point():
            return None
        alike = (each for each in (*self.computed, *self.masks) if each.tensor.numel() == tensor.numel())
        return next((each for each in alike if _close(tensor, each) or _masks(tensor, each.tensor)), None)

    def lacks(self, held: Collection[str]) -> list[str]:
        """Weights that are not among those `held`, but for such as may be left out: adding zeros changes nothing."""
        return [
            name
            for name, tensor in self.tensors.items()
            if name not in held and tensor.is_floating_point() and not _all_alike(tensor) and not self.twin(name, held)
        ]

    def twin(self, name: str, held: Collection[str]) -> bool:
        """Whether one of those `held` has the same numbers: a file stores them once."""
        own = self.tensors[name]
        return any(other in held and _equal(self.tensors[other], own) for other in self.by_count[own.numel()])

    @cached_property
    def by_count(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            found.setdefault(tensor.numel(), []).append(name)
        return found

    @cached_property
    def values(self) -> dict[fx.Node, tuple[frozenset[str], torch.Tensor]]:
        """Those of `known` that hold numbers."""
        return {node: each for node, each in self.known.items() if each[1].is_floating_point()}

    @cached_property
    def masks(self) -> list[_Candidate]:
        """Those of `known` that hold truth values."""
        found = [each for each in self.known.values() if each[1].dtype == torch.bool]
        return [_Candidate(names, value, torch.zeros((), dtype=torch.float64)) for names, value in found]

    @cached_property
    def known(self) -> dict[fx.Node, tuple[frozenset[str], torch.Tensor]]:
        """What operators of the program give that depend on no input, and the names of the tensors they read."""
        known: dict[fx.Node, Any] = {}
        names: dict[fx.Node, frozenset[str]] = {}
        none: frozenset[str] = frozenset()
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in self.places:
                known[node] = self.tensors[self.places[node.name]]
                names[node] = frozenset([self.places[node.name]])
            elif node.op == "call_function":
                read = [each for each in node.all_input_nodes if each is not _borrowed(node)]
                value = _value(node, known) if all(each in known for each in read) else None
                if value is not None:
                    known[node] = value
                    names[node] = none.union(*(names[each] for each in read))
        return {
            node: (names[node], value)
            for node, value in known.items()
            if isinstance(value, torch.Tensor) and value.numel()
        }

    @cached_property
    def computed(self) -> list[_Candidate]:
        found = [
            _Candidate(names, value, value.double().abs().max())
            for node, (names, value) in self.values.items()
            if node.op == "call_function"
        ]
        for node in self.program.graph.nodes:
            if node.target in _NORMS:
                found += self._folded(node)
        return found

    def _folded(self, norm: fx.Node) -> Iterator[_Candidate]:
        """Kernel and bias of the layer before a batch norm, with the norm folded in."""
        args = arguments_of(norm)
        layer = args["input"]
        if layer.op != "call_function" or layer.target not in (*CONVOLUTIONS, *TRANSPOSED, aten.linear.default):
            return
        given = arguments_of(layer)
        parts = [given["weight"], given["bias"], *(args[key] for key in ("weight", "bias", *_STATISTICS))]
        known = [None if part is None else self.values.get(part) for part in parts]
        kernel, bias, gamma, beta, mean, var = (None if each is None else each[1].double() for each in known)
        if kernel is None or mean is None or var is None:
            return
        of_kernel, of_bias = (
            frozenset(name for place in places if (each := known[place]) is not None for name in each[0])
            for places in ((0, 2, 5), (1, 2, 3, 4, 5))
        )
        scale = (1.0 if gamma is None else gamma) / (var + args["eps"]).sqrt()
        old, new = torch.zeros_like(mean) if bias is None else bias, torch.zeros_like(mean) if beta is None else beta
        groups = given["groups"] if layer.target in TRANSPOSED else 1
        if layer.target in TRANSPOSED:
            parted = kernel.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])
            folded = (parted * scale.reshape(groups, 1, -1, *[1] * (kernel.dim() - 2))).reshape(kernel.shape)
        else:
            folded = kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))
        yield _Candidate(of_kernel, folded, folded.abs())
        yield _Candidate(of_bias, (old - mean) * scale + new, (old.abs() + mean.abs()) * scale.abs() + new.abs())

    def holds_values(self, tensor: torch.Tensor) -> bool:
        """Whether every number of a constant is one that the module holds."""
        if tensor.dtype not in self._numbers:
            kept = [_bits(each.to(tensor.dtype)) for each in self.tensors.values() if each.is_floating_point()]
            self._numbers[tensor.dtype] = torch.cat(kept) if kept else None
        numbers = self._numbers[tensor.dtype]
        return tensor.is_floating_point() and numbers is not None and bool(torch.isin(_bits(tensor), numbers).all())

    @cached_property
    def _numbers(self) -> dict[torch.dtype, torch.Tensor | None]:
        return {}


_NORMS = (aten.batch_norm.default,)
_SHAPED = ("zeros_like", "ones_like", "full_like", "empty_like", ".new_")
_STATISTICS = ("running_mean", "running_var")


def _reads_shape(node: fx.Node) -> bool:
    name = str(node.target)
    return "sym_size" in name or any(part in name for part in _SHAPED)


def _borrowed(node: fx.Node) -> fx.Node | None:
    """The operand of which an operator reads dtype, device and shape alone."""
    if node.target is aten.type_as.default:
        return node.args[1]  # type: ignore[return-value]
    shaped = any(part in str(node.target) for part in _SHAPED)
    return node.args[0] if shaped else None  # type: ignore[return-value]


def _stand_in(node: fx.Node, reader: fx.Node) -> torch.Tensor:
    """What a reader takes for what a node gives. Raises `ValueError` where its size matters, and is free."""
    like = node.meta["val"]
    if "_like" not in str(reader.target):
        return torch.ones((), dtype=like.dtype)
    if not all(isinstance(size, int) for size in like.shape):
        raise ValueError(f"{node} has a free size")
    return torch.ones(like.shape, dtype=like.dtype)


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What an operator on constants gives; `None` where it is random, writes, or cannot be run alone."""
    schema = getattr(node.target, "_schema", None)
    if is_random(node) or (schema is not None and schema.is_mutable):
        return None
    try:
        borrowed = _borrowed(node)
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda each: _stand_in(each, node) if each is borrowed else known[each]
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:
        return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return flat if flat.dtype == torch.bool else flat.view(_BITS[flat.element_size()])


def _equal(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether the numbers in order are the same, bit by bit, in the type of the constant."""
    if own.numel() != tensor.numel() or own.is_floating_point() != tensor.is_floating_point():
        return False
    return torch.equal(_bits(tensor), _bits(own.to(tensor.dtype)))


def _transposed(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    if not 2 <= own.dim() <= _DIMS or own.dtype.is_floating_point != tensor.dtype.is_floating_point:
        return False
    orders = itertools.permutations(range(own.dim()))
    moved = (own.permute(order) for order in orders if tuple(own.shape[dim] for dim in order) == tuple(tensor.shape))
    return any(_first_alike(tensor, each) and _equal(tensor, each) for each in moved)


def _first_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    place = (0,) * (one.dim() - 1)
    return torch.equal(_bits(one[place]), _bits(other[place].to(one.dtype)))


def _close(tensor: torch.Tensor, candidate: _Candidate) -> bool:
    own, slack = candidate.tensor, candidate.slack
    unit = _ROUNDING * torch.finfo(tensor.dtype).eps
    ways = [(own, slack)]
    if own.dim() >= 2:
        ways.append((own.mT, slack.mT if slack.dim() >= 2 else slack))
    for values, allowed in ways:
        limit = unit * allowed.expand(values.shape)
        for part in (slice(_FEW), slice(None)):  # most candidates differ from the first number on
            off = (tensor.reshape(-1)[part].double() - values.reshape(-1)[part].double()).abs()
            if not bool((off <= limit.reshape(-1)[part]).all()):
                break
        else:
            return True
    return False


def _masks(tensor: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a constant has one of the numbers of masks where `mask` is true, and another one where it is not."""
    if mask.dtype != torch.bool:
        return False
    values, chosen = tensor.reshape(-1), mask.reshape(-1)
    numbers = (0.0, 1.0, -torch.inf, torch.finfo(tensor.dtype).min)
    return all(
        not part.numel() or (bool((part == part[0]).all()) and float(part[0]) in numbers)
        for part in (values[chosen], values[~chosen])
    )


def _all_alike(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or bool((tensor == tensor.reshape(-1)[0]).all())


def _made_of(own: torch.Tensor, packed: Sequence[torch.Tensor]) -> bool:
    """Whether every number of a tensor occurs in constants that are packed in an order of their own."""
    if not own.is_floating_point():
        return False
    return any(
        bool(torch.isin(_bits(own), torch.cat([_bits(each) for each in packed if each.dtype == dtype])).all())
        for dtype in {each.dtype for each in packed}
        if dtype == own.dtype
    )
