"""Random valid networks as small programs, for property tests.

A `Program` is a list of steps over numbered values; `RandomNet` runs it as an nn.Module that torch.export can trace.
Value 0 is the input; every step appends its results. A failing program prints as Python that builds it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_blocks import ATTENTION, Attention, Gate, Gated, Residual, Scale, Tied
from torch import Tensor, nn

Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]
Options = dict[str, Any]
WIDEST = 24


@dataclass(frozen=True)
class Step:
    """One call: operation, the values it reads, options, and the layer it uses (an earlier one's when it is shared)."""

    op: str
    reads: tuple[int, ...]
    options: Options = field(default_factory=dict)
    layer: str = ""


@dataclass(frozen=True)
class Program:
    """Steps, the values that are outputs, and the size of the square input image."""

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    size: int = 8

    def ops(self) -> set[str]:
        return {step.op for step in self.steps}


@dataclass(frozen=True)
class Operation:
    """`pick` chooses values and options (None: nothing fits), `make` builds the layer, `run` computes."""

    pick: Callable[[Draw, list[Shape]], tuple[tuple[int, ...], Options] | None]
    run: Callable[..., Any]
    make: Callable[..., nn.Module] | None = None


OPERATIONS: dict[str, Operation] = {}


class RandomNet(nn.Module):
    """The program as a module; weights come from seed 0."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            values = [torch.zeros(2, 3, program.size, program.size)]
            self._build(values)

    def _build(self, values: list[Tensor]) -> None:
        for step in self.program.steps:
            make = OPERATIONS[step.op].make
            reads = [values[i] for i in step.reads]
            if make is not None and step.layer not in self.layers:
                self.layers[step.layer] = make([tuple(v.shape[1:]) for v in reads], **step.options).eval()
            values += self._run(step, reads)

    def _run(self, step: Step, reads: list[Tensor]) -> list[Tensor]:
        layer = [self.layers[step.layer]] if step.layer else []
        result = OPERATIONS[step.op].run(*layer, *reads, **step.options)
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.program.steps:
            values += self._run(step, [values[i] for i in step.reads])
        return tuple(values[i] for i in self.program.outputs)

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        return (torch.randn(2, 3, self.program.size, self.program.size, generator=generator),)


# --- how operations choose what they read --------------------------------------------------------------------------


def _some(draw: Draw, values: list[Shape], fits: Callable[[Shape], bool]) -> int | None:
    """A value that fits; hypothesis shrinks towards the latest."""
    found = [i for i in range(len(values) - 1, 0, -1) if fits(values[i])]
    return draw(st.sampled_from(found)) if found else None


def _is_map(shape: Shape) -> bool:
    return len(shape) == 3


def _is_vector(shape: Shape) -> bool:
    return len(shape) == 1


def one(fits: Callable[[Shape], bool] = _is_map, **options: Callable[[Shape], st.SearchStrategy[Any]]) -> Any:
    """One value; each option is drawn from a strategy that knows the value's shape."""

    def pick(draw: Draw, values: list[Shape]) -> tuple[tuple[int, ...], Options] | None:
        index = _some(draw, values, fits)
        if index is None:
            return None
        return (index,), {name: draw(strategy(values[index])) for name, strategy in options.items()}

    return pick


def alike(same: Callable[[Shape, Shape], bool], most: int = 2) -> Any:
    """Two or more values that go together."""

    def pick(draw: Draw, values: list[Shape]) -> tuple[tuple[int, ...], Options] | None:
        first = _some(draw, values, lambda shape: True)
        if first is None:
            return None
        others = [i for i in range(len(values) - 1, 0, -1) if same(values[first], values[i])]
        count = draw(st.integers(2, most))
        reads = (first, *(draw(st.sampled_from(others)) for _ in range(count - 1)))
        return reads, {}

    return pick


def operation(name: str, pick: Any, make: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function that runs an operation."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[name] = Operation(pick, run, make)
        return run

    return register


def sampled(*choices: Any) -> Callable[[Shape], st.SearchStrategy[Any]]:
    return lambda shape: st.sampled_from(choices)


def channel(shape: Shape) -> st.SearchStrategy[int]:
    return st.integers(0, shape[0] - 1)


def divisor(shape: Shape) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, shape[0] + 1) if shape[0] % d == 0])


def _at_least(channels: int, multiple: int = 1) -> Callable[[Shape], bool]:
    return lambda shape: len(shape) == 3 and shape[0] >= channels and shape[0] % multiple == 0


def _even_image(shape: Shape) -> bool:
    return len(shape) == 3 and shape[1] % 2 == 0 and shape[2] % 2 == 0 and shape[1] >= 4


# --- layers --------------------------------------------------------------------------------------------------------


def _conv(shapes: Sequence[Shape], width: int, kernel: int, groups: int, bias: bool, transposed: bool) -> nn.Module:
    inner = shapes[0][0]
    groups = math.gcd(groups, math.gcd(inner, width))
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return kind(inner, width, kernel, padding=kernel // 2, groups=groups, bias=bias)


@operation(
    "conv",
    one(width=sampled(8, 6, 4, 12), kernel=sampled(1, 3), groups=sampled(1, 1, 2, 4), bias=sampled(True, False),
        transposed=sampled(False, False, True)),
    _conv,
)  # fmt: skip
def _run_conv(layer: nn.Module, x: Tensor, **_: Any) -> Tensor:
    return layer(x)


def _depthwise(shapes: Sequence[Shape], multiplier: int, transposed: bool) -> nn.Module:
    inner = shapes[0][0]
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return kind(inner, inner * multiplier, 3, padding=1, groups=inner)


@operation("depthwise", one(multiplier=sampled(1, 1, 2), transposed=sampled(False, True)), _depthwise)
def _run_depthwise(layer: nn.Module, x: Tensor, **_: Any) -> Tensor:
    return layer(x)


@operation("batch_norm", one(), lambda shapes: nn.BatchNorm2d(shapes[0][0]))
@operation("prelu", one(), lambda shapes: nn.PReLU(shapes[0][0]))
@operation("instance_norm", one(), lambda shapes: nn.InstanceNorm2d(shapes[0][0], affine=True))
@operation("group_norm", one(groups=divisor), lambda shapes, groups: nn.GroupNorm(groups, shapes[0][0]))
@operation("batch_norm1d", one(_is_vector), lambda shapes: nn.BatchNorm1d(shapes[0][0]))
@operation("linear", one(_is_vector, width=sampled(6, 8)), lambda shapes, width: nn.Linear(shapes[0][0], width))
def _run_layer(layer: nn.Module, x: Tensor, **_: Any) -> Tensor:
    return layer(x)


@operation("layer_norm", one(), lambda shapes: nn.LayerNorm(shapes[0][0]))
@operation("rms_norm", one(), lambda shapes: nn.RMSNorm(shapes[0][0]))
@operation("nhwc_linear", one(width=sampled(6, 8)), lambda shapes, width: nn.Linear(shapes[0][0], width))
def _run_last(layer: nn.Module, x: Tensor, **_: Any) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@operation("flatten_linear", one(width=sampled(6, 8)), lambda shapes, width: nn.Linear(math.prod(shapes[0]), width))
def _run_flatten(layer: nn.Module, x: Tensor, **_: Any) -> Tensor:
    return layer(x.flatten(1))


@operation("tied", one(), lambda shapes: Tied(shapes[0][0]))
@operation("gated", one(kind=sampled("geglu", "swiglu", "glu")), lambda shapes, kind: Gated(shapes[0][0], kind))
@operation(
    "attention",
    one(heads=sampled(2, 4, 3, 1), width=sampled(4, 2, 3), kind=sampled(*ATTENTION)),
    lambda shapes, heads, width, kind: Attention(shapes[0][0], heads, width, kind),
)
@operation("gate", one(), lambda shapes: Gate(shapes[0][0]))
@operation("residual", one(), lambda shapes: Residual(shapes[0][0]))
@operation("scale", one(trained=sampled(True, False)), lambda shapes, trained: Scale(shapes[0][0], trained))
def _run_block(layer: nn.Module, x: Tensor, **_: Any) -> Tensor:
    return layer(x)


# --- arithmetic ----------------------------------------------------------------------------------------------------


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid, "square": lambda x: 0.5 * x * x, "hardswish": F.hardswish,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": lambda a, b: a - 0.5 * b, "mul": lambda a, b: a * torch.tanh(b), "max": torch.maximum,
}  # fmt: skip


@operation("pointwise", one(lambda shape: True, kind=sampled(*POINTWISE)))
def _run_pointwise(x: Tensor, kind: str) -> Tensor:
    return POINTWISE[kind](x)


for _name, _function in BINARY.items():
    operation(_name, alike(lambda a, b: a == b))(_function)


@operation("cat", alike(lambda a, b: a[1:] == b[1:] and len(a) == len(b), most=3))
def _run_cat(*values: Tensor) -> Tensor:
    return torch.cat(values, 1)


@operation("stack_sum", alike(lambda a, b: a == b))
def _run_stack(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, 2 * b], 1).sum(1)


def _gates(draw: Draw, values: list[Shape]) -> tuple[tuple[int, ...], Options] | None:
    vector = _some(draw, values, _is_vector)
    if vector is None:
        return None
    image = _some(draw, values, lambda shape: len(shape) == 3 and shape[0] == values[vector][0])
    return None if image is None else ((vector, image), {})


@operation("vector_gate", _gates)
def _run_vector_gate(vector: Tensor, image: Tensor) -> Tensor:
    return torch.sigmoid(vector)[:, :, None, None].expand_as(image) * image


# --- data movement over channels -----------------------------------------------------------------------------------


@operation("split", one(_at_least(3), at=lambda shape: st.integers(1, shape[0] - 1)))
def _run_split(x: Tensor, at: int) -> Sequence[Tensor]:
    return torch.split(x, [at, x.shape[1] - at], 1)


@operation("chunk", one(_at_least(4), count=sampled(2, 3)))
def _run_chunk(x: Tensor, count: int) -> Sequence[Tensor]:
    return x.chunk(count, 1)


@operation("slice", one(_at_least(3), start=sampled(0, 1, 2), step=sampled(1, 2)))
def _run_slice(x: Tensor, start: int, step: int) -> Tensor:
    return x[:, start::step]


@operation("select", one(_at_least(2), index=channel))
def _run_select(x: Tensor, index: int) -> Tensor:
    return x * torch.sigmoid(x[:, index].unsqueeze(1))


@operation("shuffle", one(_at_least(4, 2), groups=divisor, written=sampled(True, False)))
def _run_shuffle(x: Tensor, groups: int, written: bool) -> Tensor:
    if not written:
        return F.channel_shuffle(x, groups)
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


@operation("pixel_shuffle", one(lambda s: len(s) == 3 and s[0] % 4 == 0 and s[1] <= 8))
def _run_pixel_shuffle(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


@operation("pixel_unshuffle", one(lambda s: _even_image(s) and s[0] <= WIDEST // 4))
def _run_pixel_unshuffle(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


@operation("glu", one(_at_least(2, 2)))
def _run_glu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


@operation("maxout", one(_at_least(4, 2), inner=sampled(True, False)))
def _run_maxout(x: Tensor, inner: bool) -> Tensor:
    return x.unflatten(1, (-1, 2)).amax(2) if inner else x.unflatten(1, (2, -1)).amax(1)


@operation("pad_channels", one(before=sampled(0, 1, 2), after=sampled(1, 0, 3), value=sampled(0.0, 0.0, 0.5)))
def _run_pad(x: Tensor, before: int, after: int, value: float) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, before, after), value=value)


@operation("roll_channels", one(by=channel))
def _run_roll(x: Tensor, by: int) -> Tensor:
    return torch.roll(x, by, 1)


@operation("flip_channels", one())
def _run_flip(x: Tensor) -> Tensor:
    return x.flip(1)


@operation("permute_channels", one(order=lambda shape: st.permutations(range(shape[0]))))
@operation("gather_channels", one(order=lambda shape: st.lists(channel(shape), min_size=2, max_size=8)))
def _run_permute(x: Tensor, order: Sequence[int]) -> Tensor:
    return x[:, list(order)]


@operation("mixed_sum", one(order=lambda shape: st.permutations(range(shape[0]))))
def _run_mixed(x: Tensor, order: Sequence[int]) -> Tensor:
    return x + 2 * x[:, list(order)]


@operation("repeat", one(lambda s: len(s) == 3 and s[0] <= WIDEST // 2, inner=sampled(True, False)))
def _run_repeat(x: Tensor, inner: bool) -> Tensor:
    return x.repeat_interleave(2, 1) if inner else x.repeat(1, 2, 1, 1)


# --- space ---------------------------------------------------------------------------------------------------------


SPATIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: torch.roll(x, 1, 3),
    "flip": lambda x: x.flip(2),
    "transpose": lambda x: x.transpose(2, 3),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "shift": lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :-1],
    "double": lambda x: 2 * x,
    "square": lambda x: x * x,
}


@operation("spatial", one(kind=sampled(*SPATIAL)))
def _run_spatial(x: Tensor, kind: str) -> Tensor:
    return SPATIAL[kind](x)


@operation("spatial_part", one(_at_least(4), kind=sampled(*SPATIAL), at=lambda shape: st.integers(1, shape[0] - 1)))
def _run_part(x: Tensor, kind: str, at: int) -> Tensor:
    return torch.cat([x[:, :at], SPATIAL[kind](x[:, at:])], 1)


@operation("two_orders", one(lambda s: _at_least(4, 2)(s) and s[0] <= WIDEST // 2, kind=sampled(*SPATIAL)))
def _run_orders(x: Tensor, kind: str) -> Tensor:
    half = x.shape[1] // 2
    plain, changed = x.split(half, 1), SPATIAL[kind](x).split(half, 1)
    return torch.cat([plain[0], changed[1], changed[0], plain[1]], 1)


@operation("down", one(_even_image))
def _run_down(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


@operation("up", one(lambda s: len(s) == 3 and s[1] <= 4))
def _run_up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@operation("pool", one())
def _run_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


# --- channels treated unevenly, writes into views ------------------------------------------------------------------


UNEVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, 1) * x,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "amax": lambda x: x / (1 + x.abs().amax(1, keepdim=True)),
    "cumsum": lambda x: 0.3 * torch.cumsum(x, 1),
    "sum": lambda x: x * torch.sigmoid(x.sum(1, keepdim=True)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "std": lambda x: x / (1 + x.std(1, keepdim=True)),
    "moments": lambda x: (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + 0.1),
    "rms": lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 0.1),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "count": lambda x: x * (x > 0.5).sum(1, keepdim=True),
    "dot": lambda x: x * (x * x.flip(3)).sum(1, keepdim=True),
    "mean_of_halves": lambda x: x * x[:, : (x.shape[1] + 1) // 2].mean(1, keepdim=True),
    "gram": lambda x: torch.einsum("bchw,bcij->bhwij", x, x).sum((3, 4)).tanh().unsqueeze(1) * x,
    "sort": lambda x: torch.sort(x, 1).values,
}


@operation("uneven", one(kind=sampled(*UNEVEN)))
def _run_uneven(x: Tensor, kind: str) -> Tensor:
    return UNEVEN[kind](x)


@operation("write", one(_at_least(3), at=lambda shape: st.integers(1, shape[0] - 1), kind=sampled("mul", "set", "add")))
def _run_write(x: Tensor, at: int, kind: str) -> Tensor:
    y = x.clone()
    if kind == "mul":
        y[:, :at].mul_(2)
    elif kind == "set":
        y[:, at:] = 0.5
    else:
        y[:, ::2].add_(1)
    return y


# --- programs ------------------------------------------------------------------------------------------------------


def _step(draw: Draw, name: str, shapes: list[Shape], steps: list[Step]) -> Step | None:
    picked = OPERATIONS[name].pick(draw, shapes)
    if picked is None:
        return None
    reads, options = picked
    if OPERATIONS[name].make is None:
        return Step(name, reads, options)
    earlier = [
        step for step in steps
        if step.op == name and [shapes[i][0] for i in step.reads] == [shapes[i][0] for i in reads]
        and name not in {"flatten_linear"}
    ]  # fmt: skip
    if earlier and draw(st.integers(0, 2)) == 2:
        shared = draw(st.sampled_from(earlier))
        return Step(name, reads, shared.options, shared.layer)
    return Step(name, reads, options, f"{name}{len(steps)}")


def _shapes(steps: Sequence[Step], size: int) -> list[Shape]:
    net = RandomNet(Program(tuple(steps), (), size))
    values = [torch.zeros(2, 3, size, size)]
    with torch.no_grad():
        for step in steps:
            values += net._run(step, [values[i] for i in step.reads])
    return [tuple(value.shape[1:]) for value in values]


@st.composite
def programs(draw: Draw, *, most: int = 10) -> Program:
    """A stem convolution, up to `most` random steps, and a head for every value that nothing reads."""
    size = draw(st.sampled_from([4, 8]))
    stem = {"width": draw(st.sampled_from([8, 6, 12])), "kernel": 3, "groups": 1, "bias": True, "transposed": False}
    steps = [Step("conv", (0,), stem, "conv0")]
    for _ in range(draw(st.integers(1, most))):
        shapes = _shapes(steps, size)
        step = _step(draw, draw(st.sampled_from(sorted(OPERATIONS))), shapes, steps)
        if step is not None and max(shape[0] for shape in _shapes([*steps, step], size)) <= 2 * WIDEST:
            steps.append(step)
    outputs = []
    shapes = _shapes(steps, size)
    read = {index for step in steps for index in step.reads}
    for index in range(1, len(shapes)):
        if index not in read:
            last = len(_shapes(steps, size))
            if _is_map(shapes[index]):
                options = {"width": 3, "kernel": 1, "groups": 1, "bias": True, "transposed": False}
                steps.append(Step("conv", (index,), options, f"head{index}"))
            else:
                steps.append(Step("linear", (index,), {"width": 3}, f"head{index}"))
            outputs.append(last)
    if draw(st.integers(0, 4)) == 4:
        outputs.append(draw(st.integers(1, len(shapes) - 1)))
    return Program(tuple(steps), tuple(outputs), size)
