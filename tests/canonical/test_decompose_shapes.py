"""Composite operators and their parts on many shapes and argument forms: values, dtypes and gradients in float64."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphzip.canonical.decompose import decompose

aten = torch.ops.aten

SEEDS = range(40)


def parts(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """What becomes of a call of the operator, as a module of the tensors among its arguments."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def enter(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = mode.from_tensor(leaf)
        return node

    given = pytree.tree_map(enter, (args, kwargs))
    call = graph.call_function(target, *given)
    with mode:
        fake_args, fake_kwargs = fx.node.map_arg(given, lambda node: node.meta["val"])
        call.meta["val"] = target(*fake_args, **fake_kwargs)
    outputs: Any = call
    if isinstance(call.meta["val"], (tuple, list)):
        outputs = tuple(graph.call_function(operator.getitem, (call, n)) for n in range(len(call.meta["val"])))
    graph.output(outputs)
    decompose(graph)
    return fx.GraphModule(torch.nn.Module(), graph)


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    made = [leaf for leaf in pytree.tree_leaves(outputs) if leaf.requires_grad]
    total = torch.stack([(out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum() for out in made]).sum()
    found = torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad], allow_unused=True)
    return [torch.zeros(()) if each is None else each.detach() for each in found]


def assert_same(target: Any, *args: Any, **kwargs: Any) -> None:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    module = parts(target, args, kwargs)
    assert all(node.target is not target for node in module.graph.nodes)
    expected, found = target(*args, **kwargs), module(*leaves)
    close = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
    for want, got in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        torch.testing.assert_close(got, want, **close)
    if any(leaf.requires_grad for leaf in pytree.tree_leaves(expected)):
        for want, got in zip(gradients(expected, leaves), gradients(found, leaves), strict=True):
            torch.testing.assert_close(got, want, **close)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul(3).to(dtype)


# --- cosine similarity ---------------------------------------------------------------------------------------------


def meeting_shapes(seed: int) -> tuple[list[int], list[int], int]:
    """Two shapes that broadcast against each other, and one of the dimensions of the result."""
    draw = random.Random(seed)
    whole = [draw.choice([1, 2, 3, 5]) for _ in range(draw.randint(1, 4))]
    shapes = []
    for _ in range(2):
        cut = draw.choice([0, 0, draw.randrange(len(whole))])
        shapes.append([size if draw.random() < 0.7 else 1 for size in whole[cut:]])
    rank = max(map(len, shapes))
    return shapes[0], shapes[1], draw.randrange(-rank, rank)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("seeded")
def test_cosine_similarity_of_any_shapes(seed: int) -> None:
    left, right, dim = meeting_shapes(seed)
    eps = (1e-8, 0.5, 3.0)[seed % 3]
    assert_same(aten.cosine_similarity.default, numbers(*left), numbers(*right), dim, eps)


def zeroed(row: int) -> Tensor:
    x = numbers(3, 4)
    x[row] = 0.0
    return x


@pytest.mark.usefixtures("seeded")
def test_cosine_similarity_of_short_vectors() -> None:
    """Below the bound, and of length zero, the gradients are those of the operator as well."""
    assert_same(aten.cosine_similarity.default, zeroed(0), zeroed(1))
    assert_same(aten.cosine_similarity.default, numbers(3, 4) * 1e-9, numbers(3, 4))
    assert_same(aten.cosine_similarity.default, numbers(3, 4), numbers(3, 1) * 1e-9, dim=0, eps=1e-3)


@pytest.mark.parametrize(
    ("left", "right"), [(torch.float64, torch.int64), (torch.float32, torch.float64), (torch.bool, torch.float32)]
)
@pytest.mark.usefixtures("seeded")
def test_cosine_similarity_of_two_dtypes(left: torch.dtype, right: torch.dtype) -> None:
    assert_same(aten.cosine_similarity.default, numbers(3, 4, dtype=left), numbers(3, 1, dtype=right))


@pytest.mark.usefixtures("seeded")
def test_cosine_similarity_of_infinite_length() -> None:
    x = torch.tensor([[6e4, 6e4], [1.0, 2.0]], dtype=torch.float16)
    found = parts(aten.cosine_similarity.default, (x, x.flip(0)), {})(x, x.flip(0))
    torch.testing.assert_close(found, torch.cosine_similarity(x, x.flip(0)), equal_nan=True)


# --- weight norm ---------------------------------------------------------------------------------------------------


def normed() -> Iterator[tuple[list[int], list[int], int]]:
    """The shape of a weight, that of its length, and the dimension that is left out."""
    for shape in ([4], [4, 3], [4, 3, 2], [2, 3, 2, 2], [1, 3], [3, 1], [1]):
        for dim in range(-len(shape) + 1, len(shape)):
            own = dim % len(shape)
            if dim != -1:
                yield shape, [size if place == own else 1 for place, size in enumerate(shape)], dim
        yield shape, [], -1


@pytest.mark.parametrize(("shape", "length", "dim"), list(normed()))
@pytest.mark.usefixtures("seeded")
def test_weight_norm_of_any_shape(shape: list[int], length: list[int], dim: int) -> None:
    assert_same(aten._weight_norm.default, numbers(*shape), numbers(*length), dim)


# --- moments -------------------------------------------------------------------------------------------------------


OF_ALL: list[dict[str, Any]] = [{}, {"unbiased": False}, {"unbiased": True}]
OF_DIM: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (([1],), {}), (([0, -1],), {"unbiased": False}), (([-2], False, True), {}), (([0], True), {"keepdim": True}),
    ((None, False), {}), (([], True, False), {}), ((), {"dim": [1, 2], "unbiased": False, "keepdim": True}),
]  # fmt: skip
CORRECTED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}), (([1],), {}), (([0, 2],), {"correction": 0}), ((None,), {"correction": 2, "keepdim": True}),
    (([],), {"correction": 0.5}), ((), {"dim": [-1], "keepdim": True}), (([2],), {"correction": None}),
    (([1],), {"correction": 7}),
]  # fmt: skip


@pytest.mark.parametrize("packet", [aten.var_mean, aten.std_mean])
@pytest.mark.usefixtures("seeded")
def test_moments_in_every_form(packet: Any) -> None:
    x = numbers(3, 4, 5)
    for options in OF_ALL:
        assert_same(packet.default, x, **options)
    for args, options in OF_DIM:
        assert_same(packet.dim, x, *args, **options)
    for args, options in CORRECTED:
        assert_same(packet.correction, x, *args, **options)
    for part, one in itertools.product((packet.default, packet.correction), (numbers(1), numbers(4), numbers())):
        assert_same(part, one)


@pytest.mark.parametrize("target", [aten.var.default, aten.std.default])
@pytest.mark.usefixtures("seeded")
def test_spread_of_everything(target: Any) -> None:
    for x, unbiased in itertools.product((numbers(3, 4), numbers(1, 5), numbers(4)), (True, False)):
        assert_same(target, x, unbiased)


# --- shapes of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("seeded")
def test_broadcasting(seed: int) -> None:
    left, right, _ = meeting_shapes(seed)
    whole = torch.broadcast_shapes(left, right)
    assert_same(aten.broadcast_tensors.default, [numbers(*left), numbers(*right), numbers(1)])
    assert_same(aten.broadcast_to.default, numbers(*left), list(whole))
    for target in (aten.view_as.default, aten.reshape_as.default):
        assert_same(target, numbers(*whole).flatten(), numbers(*whole))


# --- second names --------------------------------------------------------------------------------------------------


def said_at_once() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Calls of operators that say in one word what others say."""
    shapes = ((3, 4), (5,), (), (2, 3, 4))
    yield from ((target, (numbers(*shape),)) for shape in shapes for target in (
        aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default, aten.ravel.default,
        aten.absolute.default, aten.negative.default, aten.arctan.default, aten.fix.default,
    ))  # fmt: skip
    for stack in (aten.hstack.default, aten.vstack.default, aten.row_stack.default, aten.dstack.default):
        yield from ((stack, ([numbers(*shape), numbers(*shape)],)) for shape in shapes)
    yield aten.hstack.default, ([numbers(2), numbers(3)],)
    yield aten.hstack.default, ([numbers(4, 2), numbers(4, 3)],)
    yield aten.vstack.default, ([numbers(3, 4), numbers(4)],)
    yield aten.column_stack.default, ([numbers(3), numbers(3, 2), numbers(3)],)
    yield aten.column_stack.default, ([numbers(), numbers()],)
    yield aten.block_diag.default, ([numbers(3, 4), numbers(2), numbers(), numbers(1, 2)],)
    for turns, dims in itertools.product(range(-2, 6), ([0, 1], [1, 0], [0, 2], [-1, 1])):
        yield aten.rot90.default, (numbers(2, 3, 4), turns, dims)
    yield aten.rot90.default, (numbers(2, 3),)
    for split in (aten.hsplit, aten.vsplit, aten.dsplit):
        yield from ((split.int, (numbers(4, 4, 4), 2)), (split.array, (numbers(4, 4, 4), [1, 3])))
    yield aten.hsplit.int, (numbers(6), 3)
    yield aten.unsafe_chunk.default, (numbers(5, 3), 2)
    yield aten.unsafe_chunk.default, (numbers(5, 3), 2, -1)
    yield aten.unsafe_split.Tensor, (numbers(5, 3), 2, 1)
    yield aten.unsafe_split_with_sizes.default, (numbers(5, 3), [2, 1], 1)
    yield aten.narrow_copy.default, (numbers(5, 3), 0, 1, 3)
    yield aten.select_copy.int, (numbers(5, 3), 0, -1)
    yield aten.expand_copy.default, (numbers(3, 1), [2, 3, 4])
    yield from ((target, (numbers(3, 4),)) for target in (
        aten.fliplr.default, aten.flipud.default, aten.adjoint.default, aten.mH.default, aten.matrix_H.default,
    ))  # fmt: skip
    yield from ((target, (numbers(3), numbers(4))) for target in (aten.outer.default, aten.ger.default))
    for left, right in ([(4,), (4,)], [(3, 4), (4,)], [(3, 4), (2, 4)], [(2, 3, 4), (5, 4)], [(), (3, 4)]):
        yield aten.inner.default, (numbers(*left), numbers(*right))
    yield aten.tensordot.default, (numbers(2, 3, 4), numbers(4, 3, 5), [1, 2], [1, 0])
    yield aten.tensordot.default, (numbers(2, 3), numbers(4, 5), [], [])
    yield aten.tensordot.default, (numbers(2, 1), numbers(3, 5), [-1], [0])
    yield aten.linalg_vecdot.default, (numbers(2, 3), numbers(1, 3))
    for size in ([3, 4], [1, 4], [4], [3, 1], [1], []):
        yield aten.sum_to_size.default, (numbers(2, 3, 4), size)
    yield aten.sum_to_size.default, (numbers(3, 4), [3, 4])
    yield aten.clip.default, (numbers(3), -0.5, 0.5)
    yield aten.clip.Tensor, (numbers(3), numbers(1), None)
    yield from ((target, (numbers(3), 0.5)) for target in (aten.greater.Scalar, aten.less_equal.Scalar))
    yield aten.not_equal.Tensor, (numbers(3), numbers(3))


@pytest.mark.usefixtures("seeded")
def test_what_is_said_at_once() -> None:
    for target, args in said_at_once():
        assert_same(target, *args)
    assert_same(aten.linalg_vecdot.default, numbers(3, 2), numbers(3, 1), dim=0)


# --- recurrent layers ----------------------------------------------------------------------------------------------


def recurrent(kind: str, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """A stacked layer of `torch.nn` as the call that it makes, with states that are given."""
    layer = getattr(torch.nn, kind)(3, 4, **options).double()
    batch, both = 2, 2 if layer.bidirectional else 1
    x = numbers(2, 5, 3) if layer.batch_first else numbers(5, 2, 3)
    first = numbers(both * layer.num_layers, batch, layer.proj_size or 4)
    state = [first, numbers(both * layer.num_layers, batch, 4)] if kind == "LSTM" else first
    weights = [weight.detach().clone() for weight in layer._flat_weights]
    name = {"LSTM": "lstm", "GRU": "gru"}.get(kind) or f"rnn_{layer.nonlinearity}"
    more = (layer.bias, layer.num_layers, layer.dropout, False, layer.bidirectional, layer.batch_first)
    return getattr(aten, name).input, (x, state, weights, *more)


LAYERS: list[tuple[str, dict[str, Any]]] = [
    *(
        (kind, {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias, "dropout": 0.5})
        for kind in ("LSTM", "GRU", "RNN")
        for layers, both in ((2, False), (1, True), (3, True))
        for first, bias in ((True, True), (False, False))
    ),
    *(("LSTM", {"num_layers": 2, "proj_size": 2, "bidirectional": both}) for both in (True, False)),
    ("LSTM", {"num_layers": 2, "proj_size": 2, "bias": False}),
    ("RNN", {"num_layers": 2, "nonlinearity": "relu"}),
]


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.usefixtures("seeded")
def test_stacked_recurrent_layers(kind: str, options: dict[str, Any]) -> None:
    target, args = recurrent(kind, **options)
    leaves = [leaf.requires_grad_() for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    module = parts(target, args, {})
    layers = [node for node in module.graph.nodes if node.target is target]
    assert len(layers) == options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    expected, found = target(*args), module(*leaves)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for want, got in zip(gradients(expected, leaves), gradients(found, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
