"""Composite operators are written as their parts, and compute what they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from torch import Tensor, nn

import graphzip as gz
from graphzip.tracing.trace import trace

Run = Callable[[Any, Tensor], Any]

CASES: dict[str, tuple[str, Run]] = {
    "var_mean": ("var_mean", lambda m, x: torch.cat(torch.var_mean(x, -1, keepdim=True), -1)),
    "var_mean of all": ("var_mean", lambda m, x: torch.stack(torch.var_mean(x.transpose(0, 1), (1, 2)), -1)),
    "var_mean, biased": ("var_mean", lambda m, x: torch.stack(torch.var_mean(x, dim=1, unbiased=False), -1)),
    "var_mean, corrected": ("var_mean", lambda m, x: torch.stack(torch.var_mean(x, dim=[1], correction=2), -1)),
    "only the variance": ("var_mean", lambda m, x: torch.var_mean(x, 2)[0]),
    "only the mean": ("var_mean", lambda m, x: torch.var_mean(x, 2, keepdim=True)[1]),
    "std_mean": ("std_mean", lambda m, x: torch.cat(torch.std_mean(x, -1, keepdim=True), -1)),
    "std_mean, biased": ("std_mean", lambda m, x: torch.stack(torch.std_mean(x, dim=2, unbiased=False), -1)),
    "view_as": ("view_as", lambda m, x: x.flatten(1).view_as(x) + x),
    "reshape_as": ("reshape_as", lambda m, x: x.flatten(1).reshape_as(x) + x),
    "cosine_similarity": ("cosine_similarity", lambda m, x: F.cosine_similarity(x, x.flip(1), dim=-1)),
    "cosine_similarity of dimension 1": ("cosine_similarity", lambda m, x: F.cosine_similarity(x, x.sin())),
    "cosine_similarity with a bound": ("cosine_similarity", lambda m, x: F.cosine_similarity(x, x.sin(), 2, 5.0)),
    "weight_norm of rows": ("_weight_norm", lambda m, x: F.linear(x, torch._weight_norm(m.v, m.rows, 0))),
    "weight_norm of columns": ("_weight_norm", lambda m, x: F.linear(x, torch._weight_norm(m.v, m.columns, 1))),
    "weight_norm of everything": ("_weight_norm", lambda m, x: F.linear(x, torch._weight_norm(m.v, m.one, -1))),
    "renorm of rows": ("renorm", lambda m, x: torch.renorm(x, 2, 1, 1.0)),
    "renorm of the last, of order one": ("renorm", lambda m, x: torch.renorm(x, 1, -1, 2.0)),
    "linalg.norm": ("linalg_norm", lambda m, x: x / torch.linalg.norm(x)),
    "linalg.norm of order one": ("linalg_norm", lambda m, x: torch.linalg.norm(x, 1, -1, True)),
    "linalg.norm of Frobenius": ("linalg_norm", lambda m, x: torch.linalg.norm(x, "fro", (1, 2))),
    "linalg.norm in another dtype": ("linalg_norm", lambda m, x: torch.linalg.norm(x.float(), dim=1, dtype=x.dtype)),
    "matrix_norm": ("linalg_matrix_norm", lambda m, x: torch.linalg.matrix_norm(x, keepdim=True)),
    "pairwise_distance": ("pairwise_distance", lambda m, x: F.pairwise_distance(x, x.sin(), 3, 0.1, keepdim=True)),
    "dist": ("dist", lambda m, x: x * torch.dist(x, x.sin(), 1)),
}


def net(run: Run) -> nn.Module:
    sizes = {"v": (5, 6), "rows": (5, 1), "columns": (1, 6), "one": ()}
    parts = {name: nn.Parameter(torch.randn(size, dtype=torch.float64)) for name, size in sizes.items()}
    return Net(run, **parts).eval()


@pytest.mark.parametrize("name", CASES)
def test_the_parts_compute_the_same(name: str) -> None:
    operator, run = CASES[name]
    torch.manual_seed(0)
    model = net(run)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    graph = trace(model, (x,)).module
    names = {str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("aten.")}
    assert operator not in names
    for batch in (x, torch.randn(5, 4, 6, dtype=torch.float64)):
        torch.testing.assert_close(graph(batch), model(batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, -2])
def test_what_is_taken_along_a_dimension_is_gathered(dim: int) -> None:
    """The shapes of both are broadcast; tracing fixes the batch."""
    torch.manual_seed(0)
    model = net(lambda m, x: torch.take_along_dim(x, x[:1, :, :1].argsort(1)[:, :2], dim))
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    graph = trace(model, (x,)).module
    assert "aten.take_along_dim.default" not in {str(node.target) for node in graph.graph.nodes}
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_standardised_weights_keep_scale_and_shift() -> None:
    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.view(1, self.out_channels, -1)
            flat = F.batch_norm(flat, None, None, self.gain, self.shift, training=True, eps=1e-4)
            return F.conv2d(x, flat.view_as(self.weight), self.bias)

    torch.manual_seed(0)
    conv = Conv(3, 8, 3)
    conv.gain, conv.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    traced = trace(model, (x,))
    assert "batch_norm" not in str(traced.graph)
    torch.testing.assert_close(traced.module(x), model(x), rtol=1e-12, atol=1e-12)
    assert gz.channel_groups(model, (x,))["0"].mergeable


def test_the_batch_norm_of_something_else_stays() -> None:
    conv = nn.Conv2d(3, 4, 1)

    def run(m: Any, x: Tensor) -> Any:
        return m.conv(x) * F.batch_norm(m.conv.weight.view(1, 4, -1), None, None, training=True).sum()

    traced = trace(Net(run, conv=conv).eval(), (torch.randn(2, 3, 5, 5),))
    assert "batch_norm" in str(traced.graph)
