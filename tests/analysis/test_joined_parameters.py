"""Parameters that are joined, spread or rearranged before they are used: slices have the role of what they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from op_cases import param
from planting import assert_lossless, mergeable_share
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.channels import analyse
from graphzip.errors import RewriteError
from graphzip.rewrite.layout import Layout
from graphzip.rewrite.params import shrink_parameters, spread_parameters
from graphzip.tracing.trace import trace

Weight = Callable[[Any], Tensor]


def reads(weight: Weight, outputs: int = 10, **parts: Any) -> nn.Module:
    """`last(weight applied to relu(first(x)))` with 16 channels between."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(F.linear(m.first(x).relu(), weight(m)))

    return Net(run, first=nn.Linear(5, 16), last=nn.Linear(outputs, 3), **parts)


def pair(rows: int = 6, others: int = 4) -> dict[str, nn.Parameter]:
    return {"w": param(rows, 16), "v": param(others, 16)}


def written(m: Any) -> Tensor:
    weight = m.w.clone()
    weight[2:6] = m.v
    return weight


def experts(m: Any, x: Tensor) -> Tensor:
    """Every expert on every token, weighted."""
    hidden = torch.einsum("bi,eoi->beo", m.first(x).relu(), torch.stack([m.u0, m.u1, m.u2])).relu()
    made = torch.einsum("beo,eco->bec", hidden, torch.stack([m.d0, m.d1, m.d2]))
    return m.last((made * m.gate(x).softmax(-1)[..., None]).sum(1))


def chosen_expert(m: Any, x: Tensor) -> Tensor:
    best = m.gate(x).argmax(-1)
    hidden = torch.bmm(torch.stack([m.u0, m.u1, m.u2])[best], m.first(x).relu()[..., None])
    return m.last(torch.bmm(torch.stack([m.d0, m.d1, m.d2]).index_select(0, best), hidden.relu()).squeeze(-1))


def packed_attention(m: Any, x: Tensor) -> Tensor:
    tokens = m.first(x)[:, None] * m.place
    weight, bias = torch.cat([m.q.weight, m.k.weight, m.v.weight]), torch.cat([m.q.bias, m.k.bias, m.v.bias])
    q, k, v = F.linear(tokens, weight, bias).view(x.shape[0], 3, 3, 2, 8).permute(2, 0, 3, 1, 4)
    return m.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def two_kernels(dim: int) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        image = m.first(x)[..., None, None] * m.place
        kernel = torch.cat([m.u.weight, F.pad(m.v.weight, (1, 1, 1, 1))], dim)
        return m.last(F.conv2d(image, kernel, padding=1).relu().mean((2, 3)))

    width = 8 if dim else 16
    return Net(
        run, first=nn.Linear(5, 16), place=param(4, 4),
        u=nn.Conv2d(width, 6, 3, bias=False), v=nn.Conv2d(width, 6, 1, bias=False),
        last=nn.Linear(6 if dim else 12, 3),
    )  # fmt: skip


def positions(m: Any, x: Tensor) -> Tensor:
    table = torch.cat([torch.cat([m.cls, m.places], 1), m.wide[None]], 2)
    return m.last((m.first(x)[:, None] + table).relu().mean(1))


def memory(m: Any, x: Tensor) -> Tensor:
    tokens = torch.cat([m.one, m.two], 1).expand(x.shape[0], -1, -1)
    return m.last(torch.cat([tokens, m.first(x)[:, None]], 1).relu().mean(1))


def prototypes(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.normalize(m.first(x), dim=-1), F.normalize(torch.cat([m.w, m.v]), dim=-1))


EXPERTS = {f"{kind}{n}": (12, 16) if kind == "u" else (6, 12) for n in range(3) for kind in "ud"}


def with_experts(run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    parts = {name: param(*shape) for name, shape in EXPERTS.items()}
    return Net(run, first=nn.Linear(5, 16), gate=nn.Linear(5, 3), last=nn.Linear(6, 3), **parts)


NETS: dict[str, Callable[[], nn.Module]] = {
    "rows": lambda: reads(lambda m: torch.cat([m.w, m.v]), **pair()),
    "columns": lambda: reads(lambda m: torch.cat([m.w, m.v], 1), w=param(10, 9), v=param(10, 7)),
    "a column more": lambda: reads(lambda m: torch.cat([m.w, m.v], 1), w=param(10, 15), v=param(10, 1)),
    "three levels": lambda: reads(
        lambda m: torch.cat([torch.cat([m.w, m.v]), torch.stack([m.a, m.b]).flatten(0, 1)]), 18, **pair(),
        a=param(4, 16), b=param(4, 16),
    ),
    "one more often": lambda: reads(lambda m: torch.cat([m.w, m.v, m.w.flip(1)]), 16, **pair()),
    "in other orders": lambda: reads(lambda m: torch.cat([m.w.roll(3, 1), m.v.t().flip(0).t()]), **pair()),
    "parts of them": lambda: reads(lambda m: torch.cat([m.w[1:], m.v.chunk(2)[1]]), 7, **pair()),
    "stacked": lambda: reads(lambda m: torch.stack([m.w, m.v], 1).flatten(0, 1), 12, **pair(6, 6)),
    "written into": lambda: reads(written, 6, **pair()),
    "written by columns": lambda: reads(
        lambda m: torch.slice_scatter(m.w, m.v, 1, 2, 10), 6, w=param(6, 16), v=param(6, 8)
    ),
    "with zeros": lambda: reads(lambda m: torch.cat([F.pad(m.w, (0, 4)), m.v]), w=param(6, 12), v=param(4, 16)),
    "with ones": lambda: reads(lambda m: F.pad(m.w, (0, 4), value=1.0), w=param(10, 12)),
    "one column repeated": lambda: reads(lambda m: torch.cat([m.v, m.w.repeat(1, 16)]), w=param(6, 1), v=param(4, 16)),
    "one column spread": lambda: reads(lambda m: torch.cat([m.w.expand(6, 16), m.v]), w=param(6, 1), v=param(4, 16)),
    "like another": lambda: reads(lambda m: m.w.expand_as(m.v), w=param(10, 1), v=param(10, 16)),
    "masked": lambda: reads(
        lambda m: torch.cat([m.w * m.mask, m.v]), **pair(), mask=(torch.arange(96).view(6, 16) % 5 > 0).double()
    ),
    "with a step of low rank": lambda: reads(
        lambda m: torch.cat([m.w, m.v + m.a @ m.b]), **pair(), a=param(4, 2), b=param(2, 16)
    ),
    "kernels by outputs": lambda: two_kernels(0),
    "kernels by inputs": lambda: two_kernels(1),
    "experts": lambda: with_experts(experts),
    "a chosen expert": lambda: with_experts(chosen_expert),
    "packed attention": lambda: Net(
        packed_attention, first=nn.Linear(5, 16), place=param(3, 1), last=nn.Linear(16, 3),
        **{name: nn.Linear(16, 16) for name in "qkv"},
    ),
    "positions": lambda: Net(
        positions, first=nn.Linear(5, 16), cls=param(1, 1, 10), places=param(1, 3, 10), wide=param(4, 6),
        last=nn.Linear(16, 3),
    ),
    "memory": lambda: Net(
        memory, first=nn.Linear(5, 16), one=param(1, 1, 16), two=param(1, 3, 16), last=nn.Linear(16, 3)
    ),
    "prototypes": lambda: Net(prototypes, first=nn.Linear(5, 16), **pair()),
    "statistics": lambda: Net(
        lambda m, x: m.last(F.batch_norm(m.first(x), *map(torch.cat, [(m.a, m.b), (m.c, m.d), (m.e, m.f)]))),
        first=nn.Linear(5, 16), last=nn.Linear(16, 3), a=torch.randn(8), b=torch.randn(8), c=torch.rand(8) + 1,
        d=torch.rand(8) + 1, e=param(8), f=param(8),
    ),
    "embedded": lambda: Net(
        lambda m, x: m.last(F.embedding((4 * x).long() % 7, torch.cat([m.w, m.v], 1)).mean(1)),
        w=param(7, 9), v=param(7, 7), last=nn.Linear(16, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.usefixtures("seeded")
def test_joined_parameters_merge_losslessly(name: str) -> None:
    found = assert_lossless(NETS[name](), (torch.randn(4, 5),), trains=name in ("rows", "experts"))
    assert found.merged > 0
    assert mergeable_share(found.groups) > 0.6, str(found.groups)


@pytest.mark.usefixtures("seeded")
def test_every_joined_parameter_is_a_consumer() -> None:
    groups = gz.channel_groups(NETS["three levels"](), (torch.randn(4, 5),))
    roles = {(each.param, each.dim): each.role for each in groups["first"].params}
    assert roles == {
        ("first.weight", 0): "producer", ("first.bias", 0): "pointwise",
        **{(name, 1): "consumer" for name in "wvab"},
    }  # fmt: skip


# --- used in several ways ------------------------------------------------------------------------------------------


def twice(run: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    """Both parameters make a layer; `run` uses one of them, or their join, once more."""

    def whole(m: Any, x: Tensor) -> Tensor:
        y = m.first(x).relu()
        return m.last(F.linear(y, torch.cat([m.w, m.v]))) + run(m, x, y)

    return Net(whole, first=nn.Linear(5, 16), last=nn.Linear(10, 3), other=nn.Linear(16, 3), **pair())


TWICE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "as a sum": lambda m, x, y: m.v.sum(),
    "as a norm": lambda m, x, y: m.v.norm(),
    "as a scale": lambda m, x, y: m.other(y * m.v[0]),
    "as a scale of something else": lambda m, x, y: m.other(m.first(x).sin() * m.v.sum(0)),
    "transposed": lambda m, x, y: m.other(F.linear(F.linear(y, m.v).relu(), m.v.t())),
    "all of them transposed": lambda m, x, y: m.other(F.linear(m.last.weight.sum(0), torch.cat([m.w, m.v]).t())),
    "a part of it": lambda m, x, y: F.linear(y[:, :8], m.v[:3, :8]) + y[:, 8:].sum(1, keepdim=True) * m.v[3, 8:].sum(),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.usefixtures("seeded")
def test_other_uses_of_a_joined_parameter(name: str) -> None:
    found = assert_lossless(
        twice(TWICE[name]), (torch.randn(4, 5),), trains=False, unused=lambda key: key.startswith("other.")
    )
    assert found.merged > 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8])
@pytest.mark.usefixtures("seeded")
def test_whole_numbers_are_not_added_up(dtype: torch.dtype) -> None:
    """Their sums would not fit: 100 + 100 in int8, and true + true."""
    numbers = torch.full((10, 16), 100).to(dtype)
    model = reads(lambda m: m.w.to(m.last.weight.dtype), w=numbers)
    assert assert_lossless(model, (torch.randn(4, 5),), trains=False).merged > 0


@pytest.mark.usefixtures("seeded")
def test_rounded_weights_are_not_added_up() -> None:
    model = reads(lambda m: m.w.to(torch.int32).to(m.w.dtype), w=nn.Parameter(3 * torch.randn(10, 16)))
    assert assert_lossless(model, (torch.randn(4, 5),), trains=False).merged > 0


# --- no slice without a role ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("seeded")
def test_a_slice_without_a_role_is_an_error() -> None:
    traced = trace(NETS["rows"](), (torch.randn(4, 5),))
    analysis = analyse(traced.graph)
    owned = next(axis for axis in analysis.propagation.params if (axis.param, axis.dim) == ("v", 1))
    analysis.roles[owned.labels] = 0
    channels = analysis.fine.classes[owned.labels]
    layout = Layout.of(analysis, [(False, channels, [[0, 3], *([n] for n in range(16) if n not in (0, 3))])])
    tensors = dict(traced.module.named_parameters())
    for rewrite in (shrink_parameters, spread_parameters):
        with pytest.raises(RewriteError, match=r"^v: slices along dimension 1 would change, but .* found no use"):
            rewrite(layout, tensors)
