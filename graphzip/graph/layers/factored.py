"""Convolutions that store no kernel: they build it from atoms and coefficients, or from codes and a generator.

`AtomConv` (ACDC, "A Joint Subspace View to Convolutional Neural Networks", Eq. 1 to 3 and section 3.4):
`K_j = A[:s, :s', :m] D_j` for each of `g` groups of filters, with atoms `D` of shape `(g, m, *kernel)` and
coefficients `A` of shape `(C, C', m)` shared by the groups, or `(g, s, s', m)` where every group has its own. With
`g > 1` the groups' filters are laid end to end and the output is shuffled: filter `i` of group `j` makes channel
`i g + j`.

`SliceConv` (CSG, "Associative Convolutional Layers", Eq. 1): slice `i` of the kernel is `reshape(G c_i)`, with codes
`c` of shape `(slices, n_c)` and a generator `G` of shape `(elements of a slice, n_c)`. Slices tile the kernel in
row-major order; what reaches over its edge is cut off. A binary generator (BCSG, section 3.1) is stored as bits, eight
columns of signs to a byte, and unpacked where the kernel is built.

Shared tensors are one `Parameter` under a name in each layer. In eval mode without gradients a kernel is built once and
kept until a tensor it depends on changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from graphzip.graph.meta import Factored, meta_of, owner_name
from graphzip.graph.operators import CONVOLUTIONS, argument_of
from graphzip.graph.proxies import as_layer, is_proxy
from graphzip.graph.torch_private import is_wrapped

__all__ = [
    "FACTORED",
    "AtomConv",
    "FactoredConv",
    "KeptValue",
    "SliceConv",
    "factored_conv",
    "kernel_nodes",
    "mark_calls",
    "pack_signs",
    "packed_size",
    "slice_grid",
    "unpack_signs",
]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

_SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


def slice_grid(shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """How many slices of `size` it takes along each dimension of a kernel of `shape` (the last ones may reach over)."""
    return tuple(math.ceil(length / step) for length, step in zip(shape, size, strict=True))


def packed_size(count: int) -> int:
    """How many bytes hold the signs of this many numbers."""
    return math.ceil(count / 8)


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """The signs of `(n, k)` numbers as `(n, ceil(k / 8))` bytes: bit j of byte b is set where column 8 b + j is +1."""
    bits = nn.functional.pad((signs > 0).to(torch.uint8), (0, -signs.shape[1] % 8))
    places = 2 ** torch.arange(8, device=signs.device)
    return (bits.reshape(len(signs), -1, 8) * places).sum(2).to(torch.uint8)


def unpack_signs(packed: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    """The signs, -1 and +1, of `count` columns: operators that every runtime has for bytes."""
    bits = torch.stack([torch.bitwise_and(packed, 1 << place) for place in range(8)], dim=2)
    return bits.to(torch.bool).flatten(1)[:, :count].type_as(like) * 2 - 1


class KeptValue:
    """A tensor that is computed from others, kept while these stay as they are."""

    def __init__(self) -> None:
        self._kept: tuple[Any, torch.Tensor, int] | None = None

    def of(self, tensors: Sequence[torch.Tensor], build: Callable[[], torch.Tensor], *, training: bool) -> torch.Tensor:
        """What `build` gives for these tensors: anew in training, with gradients, and while a model is traced.

        Among several processes always: sharding fetches whole tensors into the same memory, and nothing of them tells.
        """
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        special = torch.compiler.is_compiling() or any(
            tensor.is_inference() or is_wrapped(tensor) or type(tensor) not in (nn.Parameter, torch.Tensor)
            for tensor in tensors
        )
        if training:
            self.forget()
        if training or learns or special or (dist.is_available() and dist.is_initialized()):
            return build()
        state = [(id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]
        if self._kept is None or self._kept[0] != state or self._kept[1]._version != self._kept[2]:
            with torch.inference_mode(False), torch.no_grad():
                value = build()
            self._kept = (state, value, value._version)
        return self._kept[1]

    def forget(self) -> None:
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}


class FactoredConv(nn.Module):
    """What both kinds share: a convolution whose `weight` is computed."""

    operands: tuple[str, ...] = ()

    def __init__(self, like: Conv, groups: int) -> None:
        nn.Module.__init__(self)
        for name in _SETTINGS:
            setattr(self, name, getattr(like, name))
        self.groups = groups
        self.training = like.training
        self.register_parameter("bias", like.bias)  # type: ignore[arg-type]
        self._kept = KeptValue()

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    _conv_forward: Any

    @property
    def weight(self) -> torch.Tensor:
        """The kernel, `(out channels, in channels / groups, *kernel size)`."""
        tensors = [getattr(self, name) for name in self.operands]
        return self._kept.of(tensors, self.kernel, training=self.training)

    def kernel(self, *, training: bool | None = None) -> torch.Tensor:
        """The kernel as the tensors are now; atoms drop out in training, or as `training` says."""
        tensors = [getattr(self, name) for name in self.operands]
        return self.build(*tensors, training=self.training if training is None else training)

    def build(self, one: torch.Tensor, other: torch.Tensor, *, training: bool) -> torch.Tensor:
        """The kernel of these operands: what is run here, and traced where a graph has the kernel as factors."""
        raise NotImplementedError

    def mark(self, name: str) -> Factored:
        """What a graph says of the calls of this layer, which has that name."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        self._kept.forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={tuple(getattr(self, name).shape)}" for name in self.operands)
        return f"{super().extra_repr()}, {sizes}"


class AtomConv(FactoredConv):
    """A convolution with kernel `A D`; `drop` is the atom-drop rate of training, `shuffled` whether the output is."""

    operands = ("atoms", "coefficients")
    atoms: torch.Tensor
    coefficients: torch.Tensor

    def __init__(
        self, like: Conv, atoms: nn.Parameter, coefficients: nn.Parameter, *, groups: int, drop: float, shuffled: bool
    ) -> None:
        super().__init__(like, groups)
        self.drop, self.shuffled = drop, shuffled
        self.register_parameter("atoms", atoms)
        self.register_parameter("coefficients", coefficients)

    @classmethod
    def around(cls, like: Conv, atoms: Any, coefficients: Any, mark: Factored) -> AtomConv:
        """The layer with these operands; its output is shuffled by the graph."""
        return cls(like, atoms, coefficients, groups=like.groups, drop=mark.drop, shuffled=False)

    def mark(self, name: str) -> Factored:
        return Factored(name, drop=self.drop)

    def build(self, one: torch.Tensor, other: torch.Tensor, *, training: bool) -> torch.Tensor:
        columns = self.in_channels // self.groups
        product = torch.matmul(self.used(other).flatten(-3, -2), self.flat(one, training=training))
        return product.reshape(self.out_channels, columns, *self.kernel_size)

    def used(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The corner of the coefficients that the layer uses, `(s, s', m)` or `(g, s, s', m)`."""
        rows, columns = self.out_channels // self.atoms.shape[0], self.in_channels // self.groups
        return coefficients[..., :rows, :columns, :]

    def flat(self, atoms: torch.Tensor, *, training: bool) -> torch.Tensor:
        """The atoms laid out flat, `(g, m, L)`; some drop out in training."""
        atoms = atoms.flatten(2)
        return torch.feature_dropout(atoms, self.drop, training) if self.drop else atoms

    # --- the atoms first: `(A D) * x = A (D * x)` (ACDC, section 3.1) ---

    @property
    def repeats(self) -> int:
        """How many groups of filters, with atoms of their own, read the same channels."""
        return max(self.atoms.shape[0] // self.groups, 1)

    def spread_atoms(self, atoms: torch.Tensor) -> torch.Tensor:
        """The kernel of a depthwise convolution by the atoms, `(inputs * repeats * m, 1, *kernel size)`."""
        flat = self.flat(atoms, training=False)
        wide = torch.unflatten(flat, 0, (-1, 1, self.repeats))
        wide = wide.expand(-1, self.in_channels * self.repeats // self.atoms.shape[0], -1, -1, -1)
        return wide.reshape(self.in_channels * self.repeats * self.atoms.shape[1], 1, *self.kernel_size)

    def mixing(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The kernel of the 1x1 convolution that mixes what comes of the atoms."""
        count, atoms = self.atoms.shape[:2]
        mixing = self.used(coefficients).flatten(-2, -1)
        if count > 1 and mixing.dim() == 2:
            mixing = mixing.unsqueeze(0).expand(count, -1, -1)
        columns = self.in_channels // self.groups * atoms
        return mixing.reshape(self.out_channels, columns, *[1] * len(self.kernel_size))

    def by_filters(self, z: torch.Tensor) -> torch.Tensor:
        """What comes of the atoms in the order in which groups of filters read it."""
        channel, columns = -1 - len(self.kernel_size), self.in_channels // self.groups
        parted = torch.unflatten(z, channel, (self.groups, columns, self.repeats, self.atoms.shape[1]))
        return parted.transpose(channel - 2, channel - 1).flatten(channel - 3, channel)

    # --- what comes out ---

    @property
    def shuffles(self) -> bool:
        return self.shuffled and self.atoms.shape[0] > 1

    def shuffle(self, y: torch.Tensor) -> torch.Tensor:
        """Filter `i` of group `j` makes channel `i g + j`."""
        channel = -1 - len(self.kernel_size)
        parted = torch.unflatten(y, channel, (self.atoms.shape[0], -1))
        return parted.transpose(channel - 1, channel).flatten(channel - 1, channel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_proxy(x):
            return as_layer(self, x)  # type: ignore[no-any-return]
        y: torch.Tensor = self._conv_forward(x, self.weight, self.bias)
        return self.shuffle(y) if self.shuffles else y


class SliceConv(FactoredConv):
    """A convolution with kernel slices `G c`; a fixed generator is a buffer, a binary one a buffer of bits.

    Files of earlier versions hold a binary one as int8.
    """

    operands = ("codes", "generator")
    codes: torch.Tensor
    generator: torch.Tensor

    def __init__(self, like: Conv, codes: nn.Parameter, generator: torch.Tensor, *, size: Sequence[int]) -> None:
        super().__init__(like, like.groups)
        self.size = tuple(size)
        self.register_parameter("codes", codes)
        if isinstance(generator, nn.Parameter):
            self.register_parameter("generator", generator)
        else:
            self.register_buffer("generator", generator)

    @classmethod
    def around(cls, like: Conv, codes: Any, generator: Any, mark: Factored) -> SliceConv:
        """The layer with these operands."""
        return cls(like, codes, generator, size=mark.size)

    def mark(self, name: str) -> Factored:
        return Factored(name, size=self.size)

    def build(self, one: torch.Tensor, other: torch.Tensor, *, training: bool) -> torch.Tensor:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        grid, rank = slice_grid(shape, self.size), len(shape)
        if other.dtype == torch.uint8:
            generator = unpack_signs(other, one.shape[1], one)
        else:
            generator = other.type_as(one) if other.dtype != one.dtype else other
        slices = torch.matmul(one, generator.t())
        order = [dim for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for dim in pair]
        tiled = slices.reshape(*grid, *self.size).permute(order)
        kernel = tiled.reshape([count * step for count, step in zip(grid, self.size, strict=True)])
        for dim, (length, whole) in enumerate(zip(shape, kernel.shape, strict=True)):
            if length < whole:
                kernel = kernel.narrow(dim, 0, length)
        return kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_proxy(x):
            return as_layer(self, x)  # type: ignore[no-any-return]
        y: torch.Tensor = self._conv_forward(x, self.weight, self.bias)
        return y


class AtomConv1d(AtomConv):
    _conv_forward = nn.Conv1d._conv_forward


class AtomConv2d(AtomConv):
    _conv_forward = nn.Conv2d._conv_forward


class AtomConv3d(AtomConv):
    _conv_forward = nn.Conv3d._conv_forward


class SliceConv1d(SliceConv):
    _conv_forward = nn.Conv1d._conv_forward


class SliceConv2d(SliceConv):
    _conv_forward = nn.Conv2d._conv_forward


class SliceConv3d(SliceConv):
    _conv_forward = nn.Conv3d._conv_forward


FACTORED: dict[str, type[FactoredConv]] = {
    kind.__name__: kind for kind in (AtomConv1d, AtomConv2d, AtomConv3d, SliceConv1d, SliceConv2d, SliceConv3d)
}
"""The classes by name, as `Traced.module_types` has them."""


def factored_conv(family: str, dims: int) -> type[Any]:
    """The class of a family (`"Atom"` or `"Slice"`) for kernels of this many dimensions."""
    return FACTORED[f"{family}Conv{dims}d"]


def mark_calls(graph: fx.Graph, model: nn.Module) -> None:
    """Mark the convolutions that are calls of factored layers of the model that a graph was traced from."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredConv)}
    for node in graph.nodes if layers else ():
        if node.target in CONVOLUTIONS and owner_name(node) in layers:
            meta_of(node)["factored"] = layers[owner_name(node)].mark(owner_name(node))


def kernel_nodes(call: fx.Node) -> list[fx.Node]:
    """The operators that compute the kernel of a convolution and what they read, the last one first."""
    found: list[fx.Node] = [argument_of(call, "weight")]
    for each in found:
        found += [operand for operand in each.all_input_nodes if operand not in found]
    wanted = set(found)
    return [each for each in reversed(list(call.graph.nodes)) if each in wanted]
