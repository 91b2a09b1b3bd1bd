"""Reused and tied layers, buffers, traps, writes into views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from net_parts import REFUSABLE, Example, Net, between, conv, head, image, net, unit
from torch import Tensor, nn

# --- reuse, buffers, structure -------------------------------------------------------------------------------------


@net
def shared_conv() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(m.shared(F.relu(m.shared(x)))))

    return Net(run, stem=unit(3, 8), shared=conv(8, 8), head=head(8)), (image(),)


@net
def shared_head_over_scales() -> Example:
    """RetinaNet style: one head over feature maps of two sizes."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        fine = m.one(x)
        coarse = m.two(F.max_pool2d(fine, 2))
        fine = m.lateral1(fine) + F.interpolate(m.lateral2(coarse), size=fine.shape[2:])
        return m.out(m.tower(fine)), m.out(m.tower(m.lateral2(coarse)))

    return Net(
        run, one=unit(3, 6), two=unit(6, 8), lateral1=conv(6, 8, 1), lateral2=conv(8, 8, 1), tower=unit(8, 8),
        out=conv(8, 2),
    ), (image(),)  # fmt: skip


@net
def siamese() -> Example:
    def run(m: Any, left: Tensor, right: Tensor) -> Tensor:
        a, b = m.body(left), m.body(right)
        return m.last(torch.cat([(a - b).abs(), a * b], 1))

    body = nn.Sequential(unit(3, 8), unit(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(run, body=body, last=nn.Linear(12, 2)), (image(), image())


@net
def tied_weights() -> Example:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    return nn.Sequential(unit(3, 8), first, nn.BatchNorm2d(8), nn.ReLU(), second, unit(8, 6), head(6)), (image(),)


@net
def tied_autoencoder() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x.flatten(1)))
        hidden = torch.tanh(F.linear(x, m.encode.weight))
        return m.last(F.linear(hidden, m.encode.weight.t()))

    return Net(
        run, first=nn.Linear(12, 8), encode=nn.Linear(8, 6, bias=False), last=nn.Linear(8, 4)
    ), (image(3, 2, 2),)  # fmt: skip


@net
def tied_embedding() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.down(F.gelu(m.up(m.table(x)))), m.table.weight)

    model = Net(run, table=nn.Embedding(11, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))
    return model, (torch.randint(11, (2, 5)),)


@net
def buffers() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = (x - m.mean) / m.std
        return m.head(m.second(m.first(x) * m.scale[None, :, None, None] + m.shift))

    return Net(
        run, mean=torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        std=torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), first=unit(3, 8), scale=torch.rand(8) + 0.5,
        shift=torch.randn(1, 8, 8, 8), second=unit(8, 6), head=head(6),
    ), (image(),)  # fmt: skip


@net
def buffer_mask_and_index() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(m.second(x.index_select(1, m.order) * m.mask))

    return Net(
        run, first=unit(3, 8), order=torch.tensor([7, 6, 5, 4, 0, 1, 2, 3]),
        mask=(torch.arange(8) % 3 != 0).view(1, 8, 1, 1), second=unit(8, 6), head=head(6),
    ), (image(),)  # fmt: skip


@net
def inplace() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.first(x)).relu_()
        y = m.second(x)
        y.add_(x).mul_(0.5)
        return m.head(F.hardswish(y, inplace=True))

    return Net(run, first=conv(3, 8), norm=nn.BatchNorm2d(8), second=conv(8, 8), head=head(8)), (image(),)


class TwoInputs(nn.Module):
    """An image and a condition vector in; a dict that holds a tensor, a tuple and a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.condition = nn.Linear(4, 16)
        self.body = unit(8, 6)
        self.classes = head(6)
        self.mask = conv(6, 2, 1)

    def forward(self, picture: Tensor, condition: Tensor) -> dict[str, Any]:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        features = self.body(self.stem(picture) * (1 + scale) + shift)
        return {
            "classes": self.classes(features),
            "masks": (self.mask(features), self.mask(F.avg_pool2d(features, 2))),
            "more": {"features": features.mean((2, 3))},
        }


@net
def dict_and_two_inputs() -> Example:
    return TwoInputs(), (image(), torch.randn(2, 4))


@net
def output_in_the_middle() -> Example:
    def run(m: Any, x: Tensor) -> list[Tensor]:
        x = m.one(x)
        y = m.two(x)
        return [m.three(y), y[:, :3], x.mean((2, 3))[:, 2:6]]

    return Net(run, one=unit(3, 8), two=unit(8, 6), three=conv(6, 2)), (image(),)


@net
def unused_parts() -> Example:
    """A value that nothing reads, an output that is returned twice, an input that passes through."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.one(x)
        _ = m.two(y).sum()
        y = m.head(m.three(y))
        return y, y, x

    return Net(run, one=unit(3, 8), two=conv(8, 4), three=unit(8, 6), head=head(6)), (image(),)


# --- traps: channels that touch the same parameters and are not exchangeable ----------------------------------------


def halves_differ(change: Callable[[Tensor], Tensor]) -> Callable[[], Example]:
    """`change` is done to one half of the channels before a concatenation."""
    return lambda: between(lambda x: torch.cat([x[:, :4], change(x[:, 4:])], 1))


def opposite_order(change: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], Example]:
    """Every channel is used plain and changed; one half in the one order, the other half in the other."""

    def build() -> Example:
        def run(m: Any, x: Tensor) -> Tensor:
            x = m.first(x)
            plain, changed = x.split(4, 1), change(x).split(4, 1)
            return m.head(m.second(torch.cat([plain[0], changed[1], changed[0], plain[1]], 1)))

        return Net(run, first=unit(3, 8), second=unit(16, 8, **options), head=head(8)), (image(),)

    return build


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: torch.roll(x, 2, dims=3),
    "flip": lambda x: x.flip(2),
    "transpose": lambda x: x.transpose(2, 3),
    "scale": lambda x: 3 * x,
    "relu": lambda x: F.relu(x - 0.3),
    "square": lambda x: x * x,
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "shift": lambda x: F.pad(x, (1, -1, 0, 0)),
}
for _name, _change in CHANGES.items():
    for _prefix, _make in (("halves_differ", halves_differ), ("opposite_order", opposite_order)):
        _factory = _make(_change)
        _factory.__name__ = f"{_prefix}_{_name}"
        net(_factory)


@net
def opposite_order_grouped() -> Example:
    return opposite_order(CHANGES["roll"], groups=2)()


@net
def opposite_order_depthwise() -> Example:
    return opposite_order(CHANGES["roll"], groups=8)()


@net
def opposite_order_by_index() -> Example:
    order = [0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7]
    return between(lambda x: torch.cat([x, x.roll(2, 3)], 1)[:, order], after=16)


@net
def opposite_order_by_chunks() -> Example:
    def middle(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a, torch.roll(a, 1, 2), torch.roll(b, 1, 2), b], 1)

    return between(middle, after=16)


@net
def opposite_order_two_readers() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.first(x).chunk(2, 1)
        return m.head(m.left(torch.cat([a, b.flip(2)], 1)) + m.right(torch.cat([a.flip(2), b], 1)))

    return Net(run, first=unit(3, 8), left=unit(8, 6), right=unit(8, 6), head=head(6)), (image(),)


@net
def interleaved_changes() -> Example:
    """Even channels are rolled, odd ones are not; a view hides the stride."""

    def middle(x: Tensor) -> Tensor:
        pairs = x.view(x.shape[0], 4, 2, 8, 8)
        return torch.stack([pairs[:, :, 0], pairs[:, :, 1].roll(1, 3)], 2).reshape(-1, 8, 8, 8)

    return between(middle)


@net
def cycles_in_opposite_order() -> Example:
    """x + x[perm] with two cycles of three that run in opposite directions."""
    return between(lambda x: x + 2 * x[:, [1, 2, 0, 5, 3, 4]], width=6)


@net
def subtracted_neighbours() -> Example:
    return between(lambda x: x[:, 1:] - x[:, :-1], after=7)


@net
def attention_between_halves() -> Example:
    """Linear attention over space: channels of q and k are contracted away."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.stem(x)).flatten(2).split([4, 4, 6], 1)
        return m.last((torch.softmax(q.transpose(1, 2) @ k, -1) @ v.transpose(1, 2)).mean(1))

    return Net(run, stem=unit(3, 8), qkv=conv(8, 14, 1), last=nn.Linear(6, 3)), (image(3, 4, 4),)


@net
def height_equals_channels() -> Example:
    """Channels and height have one size; a transpose swaps them before a second convolution."""

    def middle(x: Tensor) -> Tensor:
        return x + x.transpose(1, 2)

    return between(middle)


@net
def channels_in_the_batch() -> Example:
    """One single-channel convolution over every channel: channels are folded into the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        y = m.each(x.reshape(-1, 1, 8, 8)).view(-1, 6, 4, 8, 8)
        return m.head(m.second(y.flatten(1, 2)))

    return Net(run, first=unit(3, 6), each=conv(1, 4), second=unit(24, 6), head=head(6)), (image(),)


@net
def bilinear_pooling() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.left(x).mean((2, 3)), m.right(x).mean((2, 3))
        return m.last((a.unsqueeze(2) * b.unsqueeze(1)).flatten(1))

    return Net(run, left=unit(3, 4), right=unit(3, 5), last=nn.Linear(20, 3)), (image(),)


# --- writes into views ---------------------------------------------------------------------------------------------


def writes(write: Callable[[Tensor], Tensor | None]) -> Callable[[], Example]:
    """A network in which `write` changes its argument in place (and returns nothing) or returns another tensor."""

    def middle(x: Tensor) -> Tensor:
        result = write(x)
        return x if result is None else result

    return lambda: between(middle)


def _write_halves(x: Tensor) -> None:
    x[:, :4].mul_(2)


def _write_strided(x: Tensor) -> None:
    x[:, ::2] = 0


def _write_one(x: Tensor) -> None:
    x[:, 1] += x[:, 3]


def _write_space(x: Tensor) -> None:
    x[:, :, ::2].add_(1)


def _write_relu(x: Tensor) -> None:
    F.relu_(x[:, 4:].sub_(0.2))


def _write_result_kept(x: Tensor) -> Tensor:
    part = x[:, 4:].mul_(2)
    part.neg_()
    x[:, 5:].add_(1)
    return torch.cat([x[:, :4], part], 1)


def _write_result_read_later(x: Tensor) -> Tensor:
    part = x.transpose(2, 3).add_(0.1)
    x.mul_(2)
    return part + x


def _write_after_copies(x: Tensor) -> Tensor:
    """A reshape and a contiguous that had to copy: they keep what was there before."""
    rows, turned = x[..., 1:].reshape(-1, 8, 56), x.transpose(2, 3).contiguous()
    x.mul_(-2)
    return x + turned + F.pad(rows.view(-1, 8, 8, 7), (1, 0))


def _write_after_no_copies(x: Tensor) -> Tensor:
    """A reshape and a contiguous that are views: they see the write."""
    rows, same = x.reshape(-1, 8, 64), x.contiguous()
    x.mul_(-2)
    return rows.view(-1, 8, 8, 8) + same


def _write_overlapping(x: Tensor) -> None:
    x[:, :5].add_(x[:, 3:].roll(1, 3))


def _write_view(x: Tensor) -> None:
    x.view(x.shape[0], 2, 4, 8, 8)[:, 1].neg_()


def _write_fresh(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :3] = x[:, 5:]
    y[:, 3:] = x[:, :5] * 2
    return y


def _write_masked(x: Tensor) -> None:
    x[x < 0.1] = 0.5


def _write_after_reading(x: Tensor) -> Tensor:
    before = x[:, 2:6]
    y = before.flip(2)
    before.zero_()
    return torch.cat([x[:, :4], y], 1)


for _write in (
    _write_halves, _write_strided, _write_one, _write_space, _write_relu, _write_overlapping, _write_view, _write_fresh,
    _write_masked, _write_after_reading, _write_result_kept, _write_result_read_later,
    _write_after_copies, _write_after_no_copies,
):  # fmt: skip
    _factory = writes(_write)
    _factory.__name__ = _write.__name__.removeprefix("_")
    net(_factory)
    REFUSABLE.add(_factory.__name__)
