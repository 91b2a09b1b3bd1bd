"""Sizes that the inputs decide: nothing that a rewrite writes down is read off the example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import plant, state_of
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import graphzip as gz

BATCHES = (1, 2, 3, 7, 32)
FLOAT = torch.float64
UNEVEN = [[0, 1, 2], [3, 4], [5], [6], [7]]
"""Eight channels, of which some stand for three, some for two and some for one."""


def net(run: Callable[[Any, Tensor], Any], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(run, **parts).double().eval()


def merged(
    model: nn.Module, example: Tensor, clusters: dict[str, list[list[int]]] | None = None, shapes: Any = None
) -> tuple[nn.Module, nn.Module, gz.ChannelGroups]:
    """The model with planted duplicates, what is left of it when they are merged, and its groups."""
    options = {} if shapes is None else {"dynamic_shapes": shapes}
    groups = gz.channel_groups(model, (example,), **options)
    if clusters is None:
        clusters = plant(model, groups, 0)
    else:
        for name, members in clusters.items():
            _plant(model, groups[name], members)
    plan = gz.Plan([gz.ClusterMerge(clusters=clusters)])
    return model, gz.compile(model, plan, (example,), **options).module, groups


@torch.no_grad()
def _plant(model: nn.Module, group: Any, clusters: Sequence[Sequence[int]]) -> None:
    state = state_of(model)
    for first, *others in clusters:
        for other in others:
            for source, target in zip(group.slices(first), group.slices(other), strict=True):
                if target.role != "consumer":
                    tensor = state[target.param]
                    tensor.select(target.dim, target.index).copy_(tensor.select(source.dim, source.index))


def same(left: Any, right: Any, tolerance: float = 1e-9) -> None:
    for one, other in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- statistics ----------------------------------------------------------------------------------------------------

STATISTICS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "sum": lambda y, dims: y.sum(dims, keepdim=True),
    "mean": lambda y, dims: y.mean(dims, keepdim=True),
    "amax": lambda y, dims: y.amax(dims, keepdim=True),
    "logsumexp": lambda y, dims: y.logsumexp(dims, keepdim=True),
    "norm": lambda y, dims: torch.linalg.vector_norm(y, 3, dims, keepdim=True),
    "var": lambda y, dims: y.var(dims, keepdim=True),
    "population": lambda y, dims: y.var(dims, correction=0, keepdim=True),
    "std": lambda y, dims: y.std(dims, correction=2, keepdim=True),
    "var_mean": lambda y, dims: torch.add(*torch.var_mean(y, dims, keepdim=True)),
    "std_mean": lambda y, dims: torch.mul(*torch.std_mean(y, dims, correction=0, keepdim=True)),
    "squeezed": lambda y, dims: y.var(dims).sum() + y.mean(dims).std(correction=0),
}
DIMS = [list(dims) for count in (1, 2, 3, 4) for dims in itertools.combinations(range(4), count)]
OPEN = (({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),)
IMAGES = ((4, 6, 6), (2, 5, 7), (3, 6, 4), (7, 3, 3), (32, 2, 3))


def images(shapes: Sequence[tuple[int, int, int]] = IMAGES) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in shapes:
        yield torch.randn(batch, 3, height, width, generator=generator, dtype=FLOAT)


def convolutions(run: Callable[[Any, Tensor], Any], outs: int = 8, **parts: Any) -> nn.Module:
    return net(run, a=nn.Conv2d(3, 8, 3, padding=1), o=nn.Conv2d(outs, 2, 1), **parts)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_statistics_count_what_the_inputs_have(dims: list[int]) -> None:
    """The batch, the height and the width are others than those of the example."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x)
        return tuple(m.o(y * 0.5 + take(y, dims).sigmoid()) for take in STATISTICS.values())

    model, slim, _ = merged(convolutions(run), next(images()), {"a": UNEVEN}, OPEN)
    assert slim.get_parameter("a.weight").shape[0] == 5
    for x in images():
        same(model(x), slim(x))


def test_a_statistic_of_the_batch_alone_takes_a_batch_of_one() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x)
        return tuple(m.o(y + take(y, [0, 1])) for take in STATISTICS.values())

    model, slim, _ = merged(
        net(run, a=nn.Linear(5, 8), o=nn.Linear(8, 2)), torch.randn(4, 5, dtype=FLOAT), {"a": UNEVEN}
    )
    for batch in BATCHES:
        x = torch.randn(batch, 5, dtype=FLOAT)
        same(model(x), slim(x))


NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "group": lambda m, y: F.group_norm(y, 1, m.w, m.b),
    "groups": lambda m, y: F.group_norm(y, 2, m.w, m.b, 0.1),
    "instance": lambda m, y: F.instance_norm(y, weight=m.w, bias=m.b),
    "batch": lambda m, y: F.batch_norm(y, None, None, m.w, m.b, True),
    "layer": lambda m, y: F.layer_norm(y.permute(0, 2, 3, 1), [8], m.w, m.b).permute(0, 3, 1, 2),
    "rms": lambda m, y: F.rms_norm(y.permute(0, 2, 3, 1), [8], m.w).permute(0, 3, 1, 2),
    "softmax": lambda m, y: y.softmax(1) + y.log_softmax(1) * m.w.view(-1, 1, 1),
    "standardised": lambda m, y: (y - y.mean((1, 2, 3), True)) / (y.std((1, 2, 3), keepdim=True) + 0.1),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_count_what_the_inputs_have(name: str) -> None:
    clusters = UNEVEN if name != "groups" else [[0, 1, 2], [3], [4, 5], [6, 7]]
    parts = {"w": nn.Parameter(torch.rand(8) + 0.5), "b": nn.Parameter(torch.randn(8))}
    model = convolutions(lambda m, x: m.o(NORMS[name](m, m.a(x)).relu()), **parts)
    model, slim, groups = merged(model, next(images()), {"a": clusters}, OPEN)
    assert slim.get_parameter("a.weight").shape[0] == len(clusters)
    for x in images():
        same(model(x), slim(x))
    model.train()
    slim.train()
    for x in images(IMAGES[:2]):
        same(model(x), slim(x))
        gradients = [
            torch.autograd.grad(each(x).square().sum(), each.get_parameter("o.bias")) for each in (model, slim)
        ]
        same(*gradients)
    assert groups["a"].exact


# --- the batch and channels in one dimension -------------------------------------------------------------------------


def _flat(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.a(x)
    flat = y.flatten()
    return (
        m.o(y / (flat.std() + 1)),
        m.o(y - flat.mean()),
        m.o(y * flat.norm()),
        m.o(y - flat.logsumexp(0)),
        m.o(flat.softmax(0).view_as(y)),
        m.o((flat - flat.amax()).view(-1, 8)),
        y.sum() / y.numel() + y.sum() / flat.shape[0],
    )


def _batch_inside(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.a(x)
    flat = y.t().reshape(-1)
    back = (flat / (flat.var(correction=3) + 1)).view(8, -1)
    return m.o(back.t()), m.o((y.t().flatten().log_softmax(0)).view(8, -1).t())


@pytest.mark.parametrize("run", [_flat, _batch_inside])
@pytest.mark.parametrize("example", [2, 4, 8])
def test_channels_may_share_a_dimension_with_the_batch(run: Any, example: int) -> None:
    """An example with as many rows as there are channels is no other."""
    model = net(run, a=nn.Linear(5, 8), o=nn.Linear(8, 2))
    model, slim, _ = merged(model, torch.randn(example, 5, dtype=FLOAT), {"a": UNEVEN})
    assert slim.get_parameter("a.weight").shape[0] == 5
    for batch in BATCHES:
        x = torch.randn(batch, 5, dtype=FLOAT)
        same(model(x), slim(x), 1e-8)


# --- views that mix the batch with others ----------------------------------------------------------------------------


def _halves(y: Tensor) -> Tensor:
    a, b = y.view(2, -1, 8).unbind(0)
    return a * b.sin()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view and index": lambda y: y.view(2, -1, 8)[0],
    "view and unbind": _halves,
    "unflatten": lambda y: y.unflatten(0, (2, -1))[1],
    "unflatten the other way": lambda y: y.unflatten(0, (-1, 2))[:, 0],
    "reshape": lambda y: y.reshape(-1, 2, 8).select(1, 0),
    "chunk": lambda y: torch.mul(*y.chunk(2, 0)),
    "split": lambda y: y.split(y.shape[0] // 2, 0)[0],
    "first rows": lambda y: y[: y.shape[0] // 2] + y[:1],
    "pairs": lambda y: y.view(-1, 2, 8).transpose(0, 1).reshape(-1, 8),
    "pairs of halves": lambda y: y.view(-1, 2, 2, 4).transpose(1, 2).reshape(-1, 8),
    "shuffled rows": lambda y: y.view(2, -1, 8).transpose(0, 1).reshape(-1, 8),
    "shuffled channels": lambda y: y.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
    "across": lambda y: y.view(2, -1, 4).sum(0).view(-1, 8)[:1],
    "shifted": lambda y: y.flatten()[8:].view(-1, 8),
    "from the end": lambda y: y.flatten()[-16:].view(2, 8),
    "interleaved": lambda y: y.t().reshape(-1).view(-1, 8),
    "stacked twice": lambda y: torch.cat([y.flatten(), y.flatten()]).view(-1, 8),
    "rolled": lambda y: y.flatten().roll(3).view(-1, 8),
    "repeated": lambda y: y.repeat(y.shape[0], 1).view(y.shape[0], -1, 8).mean(1),
    "expanded": lambda y: y[:, None].expand(-1, y.shape[0], -1).reshape(-1, 8),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("example", [4, 8])
def test_views_may_mix_the_batch_with_others(name: str, example: int) -> None:
    model = net(lambda m, x: m.o(VIEWS[name](m.a(x).relu())), a=nn.Linear(5, 8), o=nn.Linear(8, 2))
    x = torch.randn(example, 5, dtype=FLOAT)
    planted, slim, _ = merged(model, x)
    as_it_is = gz.compile(model, gz.Plan([]), (x,)).module
    done = []
    for batch in (2, 4, 6, 8, 10, 12, 16):
        x = torch.randn(batch, 5, dtype=FLOAT)
        try:
            found = as_it_is(x), slim(x)
        except gz.InputShapeError:
            continue
        for each in found:
            same(planted(x), each)
        done.append(batch)
    assert len(done) > 3


def test_packed_projections_are_taken_apart_at_any_length() -> None:
    """The dimensions in front of the packed one are open; the view names them by what the inputs have."""

    def run(m: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = m.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return m.o((scores @ v).transpose(1, 2).reshape(batch, length, 8))

    model = net(run, qkv=nn.Linear(5, 24), o=nn.Linear(8, 2))
    shapes = (({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),)
    model, slim, groups = merged(model, torch.randn(3, 4, 5, dtype=FLOAT), None, shapes)
    assert sum(group.size for group in groups if group.mergeable and not group.whole_blocks) == 16
    for batch, length in ((1, 4), (2, 3), (4, 4), (3, 9)):
        x = torch.randn(batch, length, 5, dtype=FLOAT)
        same(model(x), slim(x))


# --- groups of a convolution that the batch decides ------------------------------------------------------------------


def _each_its_own_kernel(m: Any, x: Tensor) -> Tensor:
    """Convolutions with a kernel for every image: the batch is the number of groups."""
    y = m.a(x).relu()
    batch, channels, height, width = y.shape
    scale = m.m(y.mean((2, 3))).view(batch, 1, channels, 1, 1)
    kernel = (m.w[None] * scale).reshape(-1, channels, 3, 3)
    made = F.conv2d(y.reshape(1, -1, height, width), kernel, padding=1, groups=batch)
    return m.o(made.view(batch, -1, height, width).relu())


def _transposed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    batch, channels, height, width = y.shape
    scale = m.m(y.mean((2, 3))).view(batch, channels, 1, 1, 1)
    kernel = (m.w.transpose(0, 1)[None] * scale).reshape(batch * channels, -1, 3, 3)
    made = F.conv_transpose2d(y.reshape(1, -1, height, width), kernel, groups=batch)
    return m.o(made.view(batch, -1, height + 2, width + 2).relu())


def _correlated(m: Any, x: Tensor) -> Tensor:
    """Every channel of one image is slid over the same channel of another."""
    y = m.a(x).relu()
    batch, channels, height, width = y.shape
    kernel = m.w.mean(0).mul(m.a(x).mean((2, 3))[..., None, None]).view(batch * channels, 1, 3, 3)
    made = F.conv2d(y.reshape(1, -1, height, width), kernel, groups=batch * channels)
    return m.o(made.view(batch, channels, height - 2, width - 2))


@pytest.mark.parametrize("example", [2, 4, 8])
@pytest.mark.parametrize(
    ("run", "expected"),
    [(_each_its_own_kernel, {"a": 5, "w": 6}), (_transposed, {"a": 5, "w": 6}), (_correlated, {"a": 5})],
)
def test_the_batch_may_be_the_groups_of_a_convolution(run: Any, expected: dict[str, int], example: int) -> None:
    outs = 8 if run is _correlated else 12
    model = convolutions(run, outs, w=nn.Parameter(torch.randn(12, 8, 3, 3)), m=nn.Linear(8, 8))
    x = torch.randn(example, 3, 6, 6, dtype=FLOAT)
    clusters = {"a": UNEVEN, "w": [[0, 6, 7], [1, 8], [2, 9], [3, 10], [4, 11], [5]]}
    groups = gz.channel_groups(model, (x,))
    assert all(groups[name].mergeable for name in expected), str(groups)
    model, slim, _ = merged(model, x, {name: clusters[name] for name in expected})
    for name, left in expected.items():
        tensor = slim.get_parameter(name) if name == "w" else slim.get_parameter(f"{name}.weight")
        assert tensor.shape[0] == left
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 3, 6, 6, dtype=FLOAT)
        same(model(x), slim(x))
