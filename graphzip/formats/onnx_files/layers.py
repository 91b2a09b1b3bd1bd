"""Operators that read weights, as the layers of PyTorch that they are.

Each function is given the operator with the weights that it reads, and gives the layer and which inputs of the operator
the layer is called with. `None` is given where no layer does the same, and what `operators` has is taken then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from graphzip.formats.onnx_files.operators import Unsupported
from graphzip.formats.onnx_files.spatial import symmetric

__all__ = ["LAYERS", "Reading", "TorchLayer", "Weight"]


@dataclass(frozen=True)
class Weight:
    """A constant of a file: `name` is that of the initializer that it is, or, `transposed`, the transpose of."""

    tensor: Tensor
    name: str = ""
    trainable: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Reading:
    """An operator: its inputs, `None` where it has none there and a `Weight` where it is constant; its attributes."""

    kind: str
    inputs: Sequence[Any]
    attributes: Mapping[str, Any]
    opset: int
    ranks: Sequence[int | None]
    outputs: int

    def weight(self, position: int) -> Weight | None:
        """The constant at this position, if it is one."""
        found = self.inputs[position] if position < len(self.inputs) else None
        return found if isinstance(found, Weight) else None

    def given(self, position: int) -> bool:
        """Whether there is an input at this position."""
        return position < len(self.inputs) and self.inputs[position] is not None

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)


@dataclass
class TorchLayer:
    """A layer, what its parameters and buffers are to be, and the positions of the inputs that it is called with.

    Of `weights` the value is a constant as it is, or, where `transposed`, its transpose. `before` and `after` are
    operators on what it reads and gives.
    """

    module: nn.Module
    weights: dict[str, Weight] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    inputs: tuple[int, ...] = (0,)
    before: tuple[str, dict[str, Any]] | None = None
    after: tuple[str, dict[str, Any]] | None = None


_CONV: Final[Mapping[int, Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DECONV: Final[Mapping[int, Any]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM: Final[Mapping[int | None, Any]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE_NORM: Final[Mapping[int | None, Any]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _conv(op: Reading) -> TorchLayer | None:
    weight, bias = op.weight(1), op.weight(2)
    if weight is None or (op.given(2) and bias is None):
        raise Unsupported("a convolution whose kernel is computed")
    rank = weight.tensor.dim() - 2
    if rank not in _CONV:
        raise Unsupported(f"a convolution over {rank} dimensions")
    steps, apart = op.get("strides", [1] * rank), op.get("dilations", [1] * rank)
    groups, auto = op.get("group", 1), op.get("auto_pad", "NOTSET")
    pads, before = op.get("pads", [0] * (2 * rank)) if auto == "NOTSET" else [0] * (2 * rank), None
    kernel = list(weight.tensor.shape[2:])
    even = symmetric(pads)
    if auto.startswith("SAME"):
        before, even = ("_PadSame", {"kernel": kernel, "strides": steps, "dilations": apart, "auto_pad": auto}), None
    elif even is None:
        before = ("_PadAround", {"pads": list(pads)})
    out, inner = weight.tensor.shape[0], weight.tensor.shape[1] * groups
    layer = _CONV[rank](
        inner, out, tuple(kernel), tuple(steps), tuple(even or [0] * rank), tuple(apart), groups, bias is not None
    )
    return TorchLayer(layer, _present(weight=weight, bias=bias), before=before)


def _present(**weights: Weight | None) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if weight is not None}


def _deconv(op: Reading) -> TorchLayer | None:
    weight, bias = op.weight(1), op.weight(2)
    if weight is None or (op.given(2) and bias is None):
        raise Unsupported("a transposed convolution whose kernel is computed")
    rank = weight.tensor.dim() - 2
    if rank not in _DECONV or op.get("output_shape", None) or op.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported("a transposed convolution with output_shape or auto_pad")
    even = symmetric(op.get("pads", [0] * (2 * rank)))
    if even is None:
        raise Unsupported("a transposed convolution whose padding differs at both ends")
    steps, apart = op.get("strides", [1] * rank), op.get("dilations", [1] * rank)
    groups, more = op.get("group", 1), op.get("output_padding", [0] * rank)
    layer = _DECONV[rank](
        weight.tensor.shape[0],
        weight.tensor.shape[1] * groups,
        tuple(weight.tensor.shape[2:]),
        tuple(steps),
        tuple(even),
        tuple(more),
        groups,
        bias is not None,
        tuple(apart),
    )
    return TorchLayer(layer, _present(weight=weight, bias=bias))


def _linear(weight: Weight, bias: Weight | None, *, turn: bool) -> TorchLayer:
    """`x W` (or, unless `turn`, `x W^T`) with a bias."""
    out, inner = weight.tensor.shape[::-1] if turn else weight.tensor.shape
    return TorchLayer(
        nn.Linear(inner, out, bias is not None),
        _present(weight=weight, bias=bias),
        frozenset(["weight"] if turn else []),
    )


def _gemm(op: Reading) -> TorchLayer | None:
    weight, bias = op.weight(1), op.weight(2)
    if weight is None or op.get("transA", 0) or (op.given(2) and bias is None):
        return None
    if op.get("alpha", 1.0) != 1.0 or op.get("beta", 1.0) != 1.0:
        return None
    turn = not op.get("transB", 0)
    if bias is not None:
        wide = weight.tensor.shape[1 if turn else 0]
        if bias.tensor.numel() != wide or bias.tensor.shape[-1:] != (wide,):
            return None
        bias = _flat(bias)
    return _linear(weight, bias, turn=turn)


def _flat(bias: Weight) -> Weight:
    return bias if bias.tensor.dim() == 1 else Weight(bias.tensor.reshape(-1), bias.name, bias.trainable)


def _matmul(op: Reading) -> TorchLayer | None:
    weight = op.weight(1)
    if weight is None or weight.tensor.dim() != 2 or op.weight(0) is not None:
        return None
    return _linear(weight, None, turn=True)


def _batch_norm(op: Reading) -> TorchLayer | None:
    parts = [op.weight(k) for k in range(1, 5)]
    if op.get("training_mode", 0) or op.outputs > 1:
        raise Unsupported("a batch norm in training mode: export the model in eval mode")
    if None in parts:
        raise Unsupported("a batch norm whose statistics are computed")
    if op.ranks[0] not in _BATCH_NORM:
        raise Unsupported("a batch norm of an input of an unknown number of dimensions")
    scale, shift, mean, variance = (part for part in parts if part is not None)
    layer = _BATCH_NORM[op.ranks[0]](
        len(scale.tensor), eps=op.get("epsilon", 1e-5), momentum=1 - op.get("momentum", 0.9)
    )
    return TorchLayer(layer, {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance})


def _layer_norm(op: Reading) -> TorchLayer | None:
    scale, shift = op.weight(1), op.weight(2)
    axis, rank = op.get("axis", -1), op.ranks[0]
    wide = -axis if axis < 0 else None if rank is None else rank - axis
    if scale is None or (op.given(2) and shift is None) or op.outputs > 1 or scale.tensor.dim() != wide:
        raise Unsupported("a layer norm whose scale is computed or of other sizes, or whose statistics are read")
    layer = nn.LayerNorm(list(scale.tensor.shape), op.get("epsilon", 1e-5), bias=shift is not None)
    return TorchLayer(layer, _present(weight=scale, bias=shift))


def _rms_norm(op: Reading) -> TorchLayer | None:
    scale, axis, rank = op.weight(1), op.get("axis", -1), op.ranks[0]
    wide = -axis if axis < 0 else None if rank is None else rank - axis
    if scale is None or scale.tensor.dim() != wide:
        raise Unsupported("a norm whose scale is computed or of other sizes")
    return TorchLayer(nn.RMSNorm(list(scale.tensor.shape), op.get("epsilon", 1e-5)), {"weight": scale})


def _instance_norm(op: Reading) -> TorchLayer | None:
    scale, shift = op.weight(1), op.weight(2)
    if scale is None or shift is None or op.ranks[0] not in _INSTANCE_NORM:
        raise Unsupported("an instance norm whose scale is computed, or of an unknown number of dimensions")
    layer = _INSTANCE_NORM[op.ranks[0]](len(scale.tensor), eps=op.get("epsilon", 1e-5), affine=True)
    return TorchLayer(layer, {"weight": scale, "bias": shift})


def _group_norm(op: Reading) -> TorchLayer | None:
    scale, shift, groups = op.weight(1), op.weight(2), op.get("num_groups", 0)
    if scale is None or shift is None or op.opset < 21:
        raise Unsupported("a group norm whose scale is computed, or that has one scale for each group (opset 18)")
    layer = nn.GroupNorm(groups, len(scale.tensor), op.get("epsilon", 1e-5))
    return TorchLayer(layer, {"weight": scale, "bias": shift})


def _embedding(op: Reading) -> TorchLayer | None:
    table = op.weight(0)
    if table is None or table.tensor.dim() != 2 or not table.trainable or op.get("axis", 0) != 0:
        return None
    return TorchLayer(nn.Embedding(*table.tensor.shape), {"weight": table}, inputs=(1,))


# ------------------------------------------------------------------------------------------------- recurrences

_GATES: Final[Mapping[str, tuple[Any, tuple[int, ...]]]] = {
    "LSTM": (nn.LSTM, (0, 2, 3, 1)),  # iofc to ifgo
    "GRU": (nn.GRU, (1, 0, 2)),  # zrh to rzn
    "RNN": (nn.RNN, (0,)),
}
_ACTIVATIONS: Final = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _recurrent(op: Reading) -> TorchLayer | None:
    weights, back, bias = op.weight(1), op.weight(2), op.weight(3)
    direction, size = op.get("direction", "forward"), op.get("hidden_size", 0)
    count = 2 if direction == "bidirectional" else 1
    usual = [each for _ in range(count) for each in _ACTIVATIONS[op.kind]]
    active = [str(each).title() for each in op.get("activations", usual)]
    plain = op.kind == "RNN" and active == ["Relu"] * count
    if weights is None or back is None or (op.given(3) and bias is None):
        raise Unsupported("a recurrence whose weights are computed")
    if direction == "reverse" or op.given(4) or op.given(7) or op.get("layout", 0) or (active != usual and not plain):
        raise Unsupported("a recurrence that runs backwards, of given lengths, with peepholes or other activations")
    if (
        "clip" in op.attributes
        or op.get("input_forget", 0)
        or (op.kind == "GRU" and not op.get("linear_before_reset", 0))
    ):
        raise Unsupported("a recurrence that clips, couples gates, or resets before the product")
    kind, order = _GATES[op.kind]
    options = {"nonlinearity": "relu"} if plain else {}
    layer = kind(weights.tensor.shape[-1], size, bias=bias is not None, bidirectional=count == 2, **options)
    found = {}
    for k, suffix in enumerate(["_l0", "_l0_reverse"][:count]):
        found[f"weight_ih{suffix}"] = _gates(weights, k, order)
        found[f"weight_hh{suffix}"] = _gates(back, k, order)
        if bias is not None:
            half = bias.tensor.shape[1] // 2
            found[f"bias_ih{suffix}"] = _gates(bias, k, order, slice(0, half))
            found[f"bias_hh{suffix}"] = _gates(bias, k, order, slice(half, None))
    states = tuple(k for k in (5, 6) if op.given(k))
    return TorchLayer(layer, found, inputs=(0, *states), after=("_Directions", {"count": count}))


def _gates(weight: Weight, direction: int, order: Sequence[int], part: slice = slice(None)) -> Weight:
    chunks = weight.tensor[direction][part].chunk(len(order))
    return Weight(torch.cat([chunks[k] for k in order]), trainable=weight.trainable)


LAYERS: Final[Mapping[str, Callable[[Reading], TorchLayer | None]]] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _deconv,
    "GRU": _recurrent,
    "Gather": _embedding,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "RMSNormalization": _rms_norm,
    "RNN": _recurrent,
}
"""What makes a layer of an operator, by its name."""
