"""The operator that computes what another one writes: `add` for `add_`, for `__iadd__` and for `add(.., out=y)`.

PyTorch generates these forms from one another, so that they are told by their arguments. Where there is none, the
operator is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphzip.canonical.memory import is_dense, layout, written
from graphzip.graph.inputs import hint
from graphzip.graph.operators import arguments_of

__all__ = ["functional_call", "functional_form", "is_like_operand", "metadata_form", "writes_out"]

_METADATA = ("detach_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_")
"""In-place operators that change how a tensor looks at its memory, and not the memory."""

_STORAGE = ("set_", "resize_", "resize_as_", "set_data", "shallow_copy_data_")
"""Operators that give a tensor other memory."""

_OTHER_NAMES = {
    "normal_": "normal_functional",
    "__ior__": "bitwise_or",
    "__iand__": "bitwise_and",
    "__ixor__": "bitwise_xor",
    "__ilshift__": "__lshift__",
    "__irshift__": "__rshift__",
    "zero_": "zeros_like",
}

_FACTORY = {"dtype", "layout", "device", "pin_memory", "memory_format"}
"""What an operator takes from the tensor that it writes to, and its functional form is told."""


def metadata_form(target: Any) -> Any | None:
    """The view that an operator such as `transpose_` makes of its operand, in place of which it then stands."""
    name = target._schema.name.partition("::")[2]
    return functional_form(target) if name in _METADATA else None


def functional_call(node: fx.Node) -> tuple[Any, list[Any], dict[str, Any]] | None:
    """The operator without side effects that computes what `node` writes, with its arguments, if there is one."""
    form = functional_form(node.target)
    if form is None:
        return None
    given = arguments_of(node)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for place, argument in enumerate(form._schema.arguments):
        if argument.name in given:
            value = given[argument.name]
        elif place == 0:
            value = node.args[0]
        elif argument.name in ("dtype", "device") and writes_out(node.target):
            value = getattr(written(node)[0].meta["val"], argument.name)
        else:
            continue
        if argument.has_default_value() and value == argument.default_value:
            continue
        if argument.kwarg_only or len(args) < place:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return form, args, kwargs


def is_like_operand(form: Any, args: Any, kwargs: Any, operand: torch.Tensor) -> bool:
    """Whether an operator surely gives a tensor like the one that it writes to, which is tried with single numbers.

    That is so of pointwise operators whose operands give the same dtype, and have the strides of `operand` or none.
    """
    random = torch.Tag.nondeterministic_seeded in form.tags
    if random or torch.Tag.pointwise not in form.tags or not is_dense(operand):
        return False
    alike = True

    def single(node: fx.Node) -> Any:
        nonlocal alike
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return hint(value) if isinstance(value, torch.SymInt) else value
        alike &= value.dim() < operand.dim() or value is operand or layout(value)[1:] == layout(operand)[1:]
        return torch.ones([1] * value.dim(), dtype=value.dtype, device="cpu")

    args, kwargs = fx.node.map_arg((args, kwargs), single)
    try:
        with torch.no_grad():
            found = form(*args, **kwargs) if alike else None
    except Exception:
        return False
    return isinstance(found, torch.Tensor) and found.dtype == operand.dtype


def writes_out(target: Any) -> bool:
    """Whether an operator writes to tensors that are given as `out=`."""
    return any(argument.is_out for argument in target._schema.arguments)


def functional_form(target: Any) -> Any | None:
    """The overload without side effects that takes the same arguments, but for those that are written to."""
    space, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), _OTHER_NAMES.get(name, name.removesuffix("_")), None)
    if packet is None or name in _STORAGE:
        return None
    found = [getattr(packet, overload) for overload in packet.overloads()]
    fitting = [each for each in found if not each._schema.is_mutable and _fits(each, target)]
    return min(fitting, key=lambda each: len(each._schema.arguments), default=None)


def _fits(form: Any, target: Any) -> bool:
    given = [(argument.name, str(argument.type)) for argument in target._schema.arguments if not argument.is_out]
    wanted = [(argument.name, str(argument.type)) for argument in form._schema.arguments]
    if given[1:] == wanted[1:] and [kind for _, kind in given] == [kind for _, kind in wanted]:
        return True
    return set(given) <= set(wanted) and {name for name, _ in set(wanted) - set(given)} <= _FACTORY
