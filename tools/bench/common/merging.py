"""Merge CIFAR ResNets without training, by averages of paired channels: to compare with.

Channels of two networks are divided into pairs, and those of a pair become one: with `M` (merged channels, channels of
both networks side by side), which averages them, and `U`, which gives every channel the merged one of its pair,

    W* = M diag(W_a, W_b) U.

A pair is a channel of each network at the same place (`averaging`), at places that correlate most (`permutation`, Li et
al., "Convergent Learning", ICLR 2016), or any two channels that do, of one network too (`zipit`, Stoica et al.,
"ZipIt!", ICLR 2024, section 4.1 and Algorithm 1 with beta = 1). Channels of the stream, which shortcuts hand on from
stage to stage between channels of zeros, are paired once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from cifar import Block, CifarResNet
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

__all__ = ["METHODS", "merged"]

Pairs = Tensor
"""For every channel of both networks side by side the number of its merged channel: `(2 n,)`."""


def _same(correlation: Tensor) -> Pairs:
    return torch.arange(len(correlation) // 2).repeat(2)


def _permutation(correlation: Tensor) -> Pairs:
    half = len(correlation) // 2
    _, partner = linear_sum_assignment(correlation[:half, half:].numpy(), maximize=True)
    numbers = torch.arange(half).repeat(2)
    numbers[half + torch.from_numpy(partner)] = torch.arange(half)
    return numbers


def _greedy(correlation: Tensor) -> Pairs:
    """The two channels that correlate most, of those that are left, again and again."""
    left = correlation.clone()
    left.fill_diagonal_(-torch.inf)
    numbers = torch.zeros(len(left), dtype=torch.long)
    for number in range(len(left) // 2):
        one, two = divmod(int(left.argmax()), len(left))
        numbers[[one, two]] = number
        left[[one, two]] = -torch.inf
        left[:, [one, two]] = -torch.inf
    return numbers


METHODS: Mapping[str, Callable[[Tensor], Pairs]] = {"averaging": _same, "permutation": _permutation, "zipit": _greedy}


class Merged(nn.Module):
    """The merged blocks, then what a task has alone; `own` are the channels of the stream that are the task's."""

    def __init__(self, trunk: nn.Sequential, own: Tensor, rest: nn.Sequential) -> None:
        super().__init__()
        self.trunk, self.rest = trunk, rest
        self.register_buffer("own", own)

    def forward(self, x: Tensor) -> Tensor:
        rest: Tensor = self.rest(self.trunk(x)[:, self.own])
        return rest


class _Head(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


@torch.no_grad()
def merged(method: str, nets: Sequence[CifarResNet], share: float, images: Tensor) -> dict[int, nn.Module]:
    """Both tasks of two networks whose first blocks, a `share` of all, are merged; the rest stays each task's own."""
    pick = METHODS[method]
    blocks = [_blocks(net) for net in nets]
    depth = round(share * len(blocks[0]))
    trunk = [copy.deepcopy(block) for block in blocks[0][:depth]]
    stem = copy.deepcopy(nn.Sequential(nets[0].conv1, nets[0].bn1, nn.ReLU()))
    streams, inner = _activations(nets, images)
    stream = pick(_correlation(streams[0]))
    raw = torch.arange(3).repeat(2)
    _merge(stem[0], stem[1], [(net.conv1, net.bn1) for net in nets], stream, raw)
    for place, block in enumerate(trunk):
        pair = [each[place] for each in blocks]
        middle = pick(_correlation(inner[place]))
        _merge(block.conv1, block.bn1, [(each.conv1, each.bn1) for each in pair], middle, stream)
        if block.pad:
            stream = _padded(stream, block.pad, streams[place + 1], pick)
        _merge(block.conv2, block.bn2, [(each.conv2, each.bn2) for each in pair], stream, middle)
    body = nn.Sequential(stem, *trunk).eval()
    return {
        number: Merged(body, own, nn.Sequential(*rest[depth:], _Head(net.linear))).eval()
        for number, (own, rest, net) in enumerate(zip(stream.chunk(2), blocks, nets, strict=True))
    }


def _blocks(net: CifarResNet) -> list[Block]:
    return [block for stage in (net.layer1, net.layer2, net.layer3) for block in stage]  # type: ignore[union-attr]


def _padded(stream: Pairs, pad: int, activations: Sequence[Tensor], pick: Callable[[Tensor], Pairs]) -> Pairs:
    """The stream of the next stage: what was there is in the middle, and stays paired, the new channels around it.

    A channel of zeros that the shortcut puts in goes with another one, so merged channels have them, too.
    """
    before = stream.chunk(2)
    width = len(before[0])
    fresh = torch.cat([torch.arange(pad), torch.arange(width + pad, width + 2 * pad)])
    around = pick(_correlation([each[:, fresh] for each in activations])).chunk(2)
    place = torch.cat([torch.arange(pad), torch.arange(width + pad, width + 2 * pad)])
    found = []
    for old, new in zip(before, around, strict=True):
        own = torch.empty(width + 2 * pad, dtype=torch.long)
        own[pad : pad + width] = old + pad
        own[fresh] = place[new]
        found.append(own)
    return torch.cat(found)


def _merge(
    conv: nn.Module, norm: nn.Module, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], out: Pairs, read: Pairs
) -> None:
    """Give a convolution and its batch norm the merged values."""
    rows, columns = out.chunk(2), read.chunk(2)
    counts = torch.bincount(out).float()
    weight = torch.zeros_like(conv.weight)  # type: ignore[arg-type]
    for (own, _), row, column in zip(pairs, rows, columns, strict=True):
        summed = torch.zeros(len(row), *weight.shape[1:]).index_add(1, column, own.weight)
        weight.index_add_(0, row, summed)
    conv.weight.copy_(weight / counts[:, None, None, None])  # type: ignore[operator, union-attr]
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        values = torch.zeros(len(counts))
        for (_, own), row in zip(pairs, rows, strict=True):
            values.index_add_(0, row, getattr(own, leaf))
        getattr(norm, leaf).copy_(values / counts)


def _activations(nets: Sequence[CifarResNet], images: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What the stream holds behind the stem and every block, and blocks inside: `(places, channels)` by network."""
    streams: list[list[Tensor]] = []
    inner: list[list[Tensor]] = []
    for net in nets:
        x = torch.relu(net.bn1(net.conv1(images)))
        _note(streams, 0, x)
        for place, block in enumerate(_blocks(net)):
            _note(inner, place, torch.relu(block.bn1(block.conv1(x))))
            x = block(x)
            _note(streams, place + 1, x)
    return streams, inner


def _note(found: list[list[Tensor]], place: int, x: Tensor) -> None:
    if place == len(found):
        found.append([])
    rows = x.movedim(1, -1).flatten(0, 2)
    found[place].append(rows[:: max(1, len(rows) // 4096)])


def _correlation(activations: Sequence[Tensor]) -> Tensor:
    """Of all channels of both networks: `(2 n, 2 n)`."""
    rows = torch.cat(list(activations), 1).double()
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=0).clamp_min(1e-12)
    return rows.T @ rows
