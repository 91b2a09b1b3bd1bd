"""A module that computes what the operators of an ONNX file compute, with layers where PyTorch has them."""

from __future__ import annotations

import inspect
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from graphzip.errors import ArchiveError
from graphzip.formats.onnx_files import operators, spatial
from graphzip.formats.onnx_files.layers import LAYERS, Reading, TorchLayer, Weight
from graphzip.formats.onnx_files.naming import MADE_UP, Names, identifier, module_path, tensor_path
from graphzip.formats.onnx_files.operators import Unsupported
from graphzip.formats.onnx_files.reading import OnnxFile, attributes_of, weight_of
from graphzip.formats.onnx_files.sizes import SIZES, shape, size, tensor_of
from graphzip.graph.source import first_line
from graphzip.limits import MOST_EXAMPLE_NUMBERS

__all__ = ["Operator", "SizesOperator", "build"]


def _pad_same(x: Tensor, *, kernel: Any, strides: Any, dilations: Any, auto_pad: str) -> Tensor:
    return spatial.padded(x, spatial.same(x, kernel, strides, dilations, auto_pad))


def _directions(x: Tensor, *, count: int) -> Tensor:
    """What a recurrence gives, (time, n, directions * width), as ONNX has it: (time, directions, n, width)."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


_TABLE: Final[Mapping[str, Any]] = {
    **operators.OPERATORS,
    **spatial.SPATIAL,
    "_AsTensor": tensor_of,
    "_Directions": _directions,
    "_PadAround": lambda x, *, pads: spatial.padded(x, pads),
    "_PadSame": _pad_same,
}
_NUMBERS: Final = {**operators.NUMBERS, **spatial.SPATIAL_NUMBERS}
_SHAPES: Final = {"Shape": shape, "Size": size}
_SINGLE: Final = {"min", "max", "value", "axis", "ratio", "training", "start", "limit", "delta", "depth"}
_LONGEST: Final = 64  # numbers of a constant that may be sizes
_TAKE_NUMBERS: Final = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("Max", "Min", "Where", "Sum"),
}
_MAKE_ROOM: Final = ("ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Pad", "OneHot", "Upsample")


class Operator(nn.Module):
    """An operator of ONNX that has no weights; `node` is its name in the file."""

    def __init__(self, kind: str, attributes: Mapping[str, Any], node: str = "") -> None:
        super().__init__()
        self.kind, self.attributes, self.node = kind, dict(attributes), node

    def forward(self, *inputs: Any) -> Any:
        """What it reads, in the order of ONNX, to what it gives."""
        try:
            return _TABLE[self.kind](*inputs, **self.attributes)
        except Unsupported as error:
            raise Unsupported(f"the node {self.node!r}, operator {self.kind}, cannot be converted: {error}") from error

    def extra_repr(self) -> str:
        """How it is shown."""
        return ", ".join([self.kind, *(f"{key}={value}" for key, value in self.attributes.items())])


class SizesOperator(Operator):
    """An operator on sizes."""

    def forward(self, *inputs: Any) -> Any:
        """Tensors (of `Shape` and `Size` alone) or sizes to sizes."""
        return {**SIZES, **_SHAPES}[self.kind](*inputs, **self.attributes)


def build(file: OnnxFile) -> fx.GraphModule:
    """The module, which takes tensors by the names of the file's inputs and gives a mapping by names of its outputs.

    Where those are no names in Python, other characters become underscores. Every node knows in `meta["onnx"]` which
    values of the file it gives, by name. Raises `ArchiveError` with the node and the operator that cannot be converted.
    """
    try:
        builder = _Builder(file)
    except Exception as error:
        raise ArchiveError(
            f"{file.path} holds weights that cannot be read: {first_line(error)}; write it with weights of float32"
        ) from error
    for node in file.proto.graph.node:
        try:
            builder.add(node)
        except ArchiveError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, Unsupported | ValueError) else first_line(error)
            raise ArchiveError(
                f"{file.path}: the node {_called(node)!r}, operator {node.op_type}, cannot be converted: "
                f"{reason}; write the model as a program (torch.export.save) or give the code that builds it"
            ) from error
    return builder.finished()


class _Builder:
    """What was made of the nodes so far: values of the file by name, each a node of the graph or a constant."""

    def __init__(self, file: OnnxFile) -> None:
        self.file, self.graph, self.root = file, fx.Graph(), nn.Module()
        self.names = Names(self.root)
        self.values: dict[str, Any] = {each.name: weight_of(each) for each in file.proto.graph.initializer}
        self.sizes: set[fx.Node] = set()
        self.counts: set[fx.Node] = set()  # how many sizes there are: a number that is known
        self.parameters: dict[tuple[str, bool], nn.Parameter] = {}
        self.places: dict[tuple[str, bool], str] = {}
        self.uses = Counter(name for node in file.proto.graph.node for name in node.input)
        self.uses.update(file.outputs)
        self.readers = {name: node for node in file.proto.graph.node for name in node.input}
        self.arguments: dict[str, str] = {}
        for each in file.inputs:
            name = identifier(each.name)
            while name in self.arguments.values():
                name += "_"
            self.arguments[each.name] = name
            self.values[each.name] = self.graph.placeholder(name)

    def finished(self) -> fx.GraphModule:
        """The module, in eval mode."""
        results = {}
        for name in self.file.outputs:
            if name not in self.values:
                raise ArchiveError(f"{self.file.path}: nothing gives the output {name!r}")
            results[identifier(name)] = self._tensor(self.values[name])
        self.graph.output(results)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name="OnnxModel").eval()

    # ------------------------------------------------------------------------------------------ operators

    def add(self, node: Any) -> None:
        """Raises `Unsupported`, or whatever an operator that is computed at once raises."""
        if node.domain not in ("", "ai.onnx"):
            raise Unsupported(f"it is of the domain {node.domain!r}, not of ONNX itself")
        if node.output[0] in self.values:
            return  # the sum with the bias of a layer
        attributes = attributes_of(node)
        if node.op_type == "Constant":
            self.values[node.output[0]] = _constant(attributes)
            return
        inputs = [self.values[name] if name else None for name in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        constant = all(each is None or isinstance(each, Weight) for each in inputs)
        if not constant and self._layer(node, inputs, attributes):
            return
        if self._on_sizes(node.op_type, inputs):
            read, options = self._arguments(node, inputs, attributes, {**SIZES, **_SHAPES}[node.op_type])
            self._call(node, SizesOperator(node.op_type, options, _called(node)), [self._number(each) for each in read])
            return
        if node.op_type not in _TABLE:
            raise Unsupported("graphzip has no such operator")
        read, options = self._arguments(node, inputs, attributes, _TABLE[node.op_type])
        if constant:
            self._fold(node, read, options)
        else:
            self._call(
                node,
                Operator(node.op_type, options, _called(node)),
                [self._operand(each, node.op_type) for each in read],
            )

    def _on_sizes(self, kind: str, inputs: Sequence[Any]) -> bool:
        """Whether an operator works on plain numbers."""
        given = [each for each in inputs if each is not None]
        if kind == "ConstantOfShape":
            return given[0] in self.counts if isinstance(given[0], fx.Node) else False
        return kind in _SHAPES or (
            kind in SIZES
            and any(each in self.sizes for each in given if isinstance(each, fx.Node))
            and all(each in self.sizes if isinstance(each, fx.Node) else _may_be_sizes(each) for each in given)
        )

    def _arguments(
        self, node: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], function: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """What the function of an operator is called with: by position, and by name."""
        named, options = _NUMBERS.get(node.op_type, {}), dict(attributes)
        last = max((position for position, name in named.items() if name in options), default=-1)
        read = [*inputs, *[None] * (last + 1 - len(inputs))]
        for position, name in named.items():
            if name in options and node.op_type != "ConstantOfShape":
                read[position] = options.pop(name)
            elif position < len(read) and read[position] is not None:
                read[position] = self._numbers(read[position], name)
        if node.op_type == "ConstantOfShape" and "value" in options:
            value = options["value"].tensor
            options = {"value": value.item(), "dtype": _number_of(value.dtype)}
        return read, _accepted(function, options, self.file.opset, len(node.output))

    def _numbers(self, value: Any, name: str) -> Any:
        """What is read as plain numbers: a list, or one number where there is to be one."""
        if isinstance(value, Weight):
            numbers = value.tensor.tolist()
            if name in _SINGLE:
                return numbers[0] if isinstance(numbers, list) and len(numbers) == 1 else numbers
            return numbers if isinstance(numbers, list) else [numbers]
        if value not in self.sizes and name not in ("min", "max"):
            raise Unsupported(f"its {name} is computed from data, and what is traced has no such shapes")
        return value

    def _fold(self, node: Any, read: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Compute an operator on constants at once."""
        for each in read if node.op_type in _MAKE_ROOM else ():
            if isinstance(each, list) and math.prod(max(abs(n), 1) for n in each) > MOST_EXAMPLE_NUMBERS:
                raise Unsupported("it makes more numbers than any model needs")
        with torch.no_grad():
            found = _TABLE[node.op_type](
                *(each.tensor if isinstance(each, Weight) else each for each in read), **options
            )
        results = list(found) if isinstance(found, list | tuple) else [found]
        trainable = any(isinstance(each, Weight) and each.trainable for each in read)
        source = read[0] if read and isinstance(read[0], Weight) else None
        turned = node.op_type == "Transpose" and results[0].dim() == 2 and options.get("perm", [1, 0]) == [1, 0]
        for name, result in zip(node.output, results, strict=False):
            if source is not None and (turned or node.op_type == "Identity"):
                self.values[name] = Weight(result, source.name, source.trainable, source.transposed != turned)
            else:
                self.values[name] = Weight(result.contiguous(), name, trainable and result.is_floating_point())

    def _call(self, node: Any, module: Operator, args: Sequence[Any]) -> None:
        made = self._module(module_path(node.name, "", ()) if node.name else node.op_type.lower(), module, args)
        if isinstance(module, SizesOperator):
            self.sizes.add(made)
            read = [each for each in args if isinstance(each, fx.Node)]
            if all(each in self.counts or (node.op_type == "Shape" and each in self.sizes) for each in read):
                self.counts.add(made)
        if node.op_type in ("Split", "TopK"):
            for k, name in enumerate(node.output):
                self._give(name, self.graph.call_function(operator.getitem, (made, k)))
        elif len([name for name in node.output[1:] if name and self.uses[name]]):
            raise Unsupported(f"its output {node.output[1]!r} is read")
        else:
            self._give(node.output[0], made)

    # ------------------------------------------------------------------------------------------ layers

    def _layer(self, node: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> bool:
        """Whether a layer was made of an operator."""
        if node.op_type not in LAYERS:
            return False
        ranks = [self.file.ranks.get(name) for name in node.input]
        read = len([name for name in node.output if name and self.uses[name]])
        layer = LAYERS[node.op_type](Reading(node.op_type, inputs, attributes, self.file.opset, ranks, read))
        if layer is None:
            return False
        output = self._with_bias(node, layer)
        args: list[Any] = [self._tensor(inputs[k]) for k in layer.inputs]
        if node.op_type == "LSTM" and len(args) == 3:
            args = [args[0], (args[1], args[2])]
        path = module_path(node.name, node.op_type, [weight.name for weight in layer.weights.values()])
        if layer.before is not None:
            args[0] = self._module(f"{path}_pad", Operator(*layer.before), args[:1])
        self._fill(layer)
        made = self._module(path, layer.module, args)
        if layer.after is None:
            self._give(output, made)
        else:
            self._give_states(node, made, path, Operator(*layer.after))
        return True

    def _with_bias(self, node: Any, layer: TorchLayer) -> str:
        """The name of what the layer gives: of a product to which only a bias is added, that of the sum."""
        name: str = node.output[0]
        then = self.readers.get(name)
        if node.op_type != "MatMul" or self.uses[name] != 1 or then is None or then.op_type != "Add":
            return name
        other = self.values.get(then.input[1] if then.input[0] == name else then.input[0])
        linear = layer.module
        if not isinstance(other, Weight) or not isinstance(linear, nn.Linear):
            return name
        if tuple(other.tensor.shape) != (linear.out_features,):
            return name
        layer.module = nn.Linear(linear.in_features, linear.out_features)
        layer.weights["bias"] = other
        summed: str = then.output[0]
        return summed

    def _fill(self, layer: TorchLayer) -> None:
        """Give a layer its weights; those of one name are one parameter."""
        for name, weight in layer.weights.items():
            turn = name in layer.transposed
            tensor = (weight.tensor.t() if turn else weight.tensor).contiguous()
            if name in layer.module._parameters:
                setattr(layer.module, name, self._parameter(weight, tensor, weight.transposed != turn))
            else:
                layer.module._buffers[name] = tensor.clone()

    def _parameter(self, weight: Weight, tensor: Tensor, transposed: bool) -> nn.Parameter:
        if not weight.name or tensor.dim() < 2:  # files are optimized to hold one of many biases that are all zero
            return nn.Parameter(tensor.clone())
        return self.parameters.setdefault((weight.name, transposed), nn.Parameter(tensor))

    def _give_states(self, node: Any, made: fx.Node, path: str, turned: Operator) -> None:
        """What a recurrence gives at every time, and its last states."""
        self._give(
            node.output[0],
            self._module(f"{path}_directions", turned, [self.graph.call_function(operator.getitem, (made, 0))]),
        )
        if any(self.uses[name] for name in node.output[1:]):
            last = self.graph.call_function(operator.getitem, (made, 1))
            for k, name in enumerate(node.output[1:]):
                parts = node.op_type == "LSTM"
                self._give(name, self.graph.call_function(operator.getitem, (last, k)) if parts else last)

    # ------------------------------------------------------------------------------------------ values

    def _module(self, path: str, module: nn.Module, args: Sequence[Any]) -> fx.Node:
        return self.graph.call_module(self.names.put(path, module), tuple(args))

    def _give(self, name: str, node: fx.Node) -> None:
        self.values[name] = node
        node.meta["onnx"] = name

    def _number(self, value: Any) -> Any:
        return value.tensor.tolist() if isinstance(value, Weight) else value

    def _operand(self, value: Any, kind: str) -> Any:
        """What an operator reads: a node, or a plain number."""
        if isinstance(value, Weight):
            plain = value.tensor.dim() == 0 and (not value.trainable or MADE_UP.match(value.name))
            return value.tensor.item() if plain and kind in _TAKE_NUMBERS else self._tensor(value)
        if isinstance(value, fx.Node) and value in self.sizes and kind not in _NUMBERS and kind != "Gather":
            return self._tensor(value)
        return value

    def _tensor(self, value: Any) -> fx.Node:
        """A node that gives a tensor."""
        if not isinstance(value, Weight):
            assert isinstance(value, fx.Node)
            return self._module("as_tensor", Operator("_AsTensor", {}), [value]) if value in self.sizes else value
        key = (value.name, value.transposed)
        if key not in self.places or not value.name:
            tensor = value.tensor.contiguous()
            held = self._parameter(value, tensor, value.transposed) if value.trainable else tensor
            self.places[key] = self.names.put(tensor_path(value.name) or "constant", held)
        return self.graph.get_attr(self.places[key])


def _constant(attributes: Mapping[str, Any]) -> Weight:
    """What the operator `Constant` gives."""
    (name, value), *more = attributes.items()
    if more or name not in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        raise Unsupported("a constant of texts, or a sparse one")
    if isinstance(value, Weight):
        return value
    return Weight(torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64))


def _called(node: Any) -> str:
    """What messages call a node."""
    return str(node.name or node.output[0])


def _number_of(dtype: torch.dtype) -> int:
    return next(number for number, each in operators.DTYPES.items() if each == dtype)


def _may_be_sizes(weight: Weight) -> bool:
    return weight.tensor.dim() <= 1 and weight.tensor.numel() <= _LONGEST


def _accepted(function: Any, options: Mapping[str, Any], opset: int, results: int) -> dict[str, Any]:
    """Attributes that a function knows. Raises `Unsupported` for others."""
    try:
        known = inspect.signature(function).parameters
    except ValueError:  # a function of torch, of which those here have no attributes
        known = {}  # type: ignore[assignment]
    unknown = [name for name in options if name not in known and name != "consumed_inputs"]
    if unknown:
        raise Unsupported(f"its attribute {unknown[0]!r} is not known")
    more = {name: value for name, value in (("opset", opset), ("results", results)) if name in known}
    return {**options, **more}
