"""Random programs of views, writes in place and reads, and what they compute in the model and in its graph.

A program is text, a few lines of PyTorch, so that a failure can be read. Lines are drawn one after the other; a line
that PyTorch itself refuses on some batch is drawn again.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphzip as gz
from graphzip.graph.guards import check_sizes, parse
from graphzip.graph.traced import Traced
from graphzip.tracing.trace import trace

BATCHES = (4, 1, 3, 7)
"""The first one is traced."""


class Program(nn.Module):
    """Runs lines of text on `v0`, a layer's output of shape `(batch, 4, 6)`, on constants and on parameters."""

    def __init__(self, lines: tuple[str, ...] = (), outputs: tuple[str, ...] = ("v0",)) -> None:
        super().__init__()
        self.lines, self.outputs = lines, outputs
        self.layer = nn.Linear(3, 24)
        self.p = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
        self.q = nn.Parameter(torch.linspace(0.5, 2, 6))
        body = "\n".join(f"    {part}" for line in lines for part in line.split("\n"))
        named = ", ".join(f"{name!r}: {name}" for name in outputs)
        text = f"def run(self, v0, r):\n{body}\n    return {{{named}, **{{str(i): t for i, t in enumerate(r)}}}}"
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(text, "<program>", "exec"), names)
        self.__dict__["body"] = names["run"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = self.body(self, self.layer(x).view(-1, 4, 6), [])
        return results

    def __str__(self) -> str:
        return "\n".join([*self.lines, f"return {', '.join(self.outputs)}"])


def inputs(batch: int) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def results_of(model: nn.Module, batch: int, *, gradients: bool) -> dict[str, Tensor]:
    """Outputs by name, and gradients of a loss on them; raises what the model raises."""
    x = inputs(batch).requires_grad_()
    model.zero_grad()
    outputs = model(x)
    found = {name: value.detach().clone() for name, value in outputs.items()}
    terms = [
        (value.double() ** 2).sum() + (value.double() * 0.3).sum() for value in outputs.values() if value.requires_grad
    ]
    if gradients and terms:
        sum(terms, torch.zeros((), dtype=torch.float64)).backward()
        given = {"x": x, **dict(model.named_parameters())}
        found |= {
            f"gradient of {name}": torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in given.items()
        }
    return found


def differs(left: dict[str, Tensor], right: dict[str, Tensor]) -> str:
    """What is not the same, or nothing."""
    for name in left:
        one, other = left[name], right.get(name, torch.zeros_like(left[name]))  # a graph holds what it reads
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{name} is {other.dtype} {tuple(other.shape)}, not {one.dtype} {tuple(one.shape)}"
        tolerance = 1e-5 if "gradient" in name else 1e-10 if one.dtype == torch.float64 else 1e-5
        if not torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"{name} is off by {(one.double() - other.double()).abs().max():.3g}"
    return ""


def check(program: nn.Module) -> tuple[str, str]:
    """`exact`, or what is wrong with the graph of a program, or why it is refused.

    Gradients are compared where the program itself can be differentiated. A batch may be refused if the graph says so.
    """
    gradients = True
    try:
        expected = {batch: results_of(program, batch, gradients=True) for batch in BATCHES}
    except RuntimeError:
        gradients = False
        expected = {batch: results_of(program, batch, gradients=False) for batch in BATCHES}
    try:
        traced = trace(program, (inputs(BATCHES[0]),))
    except gz.GraphZipError as error:
        return "refused", str(error)
    for batch in BATCHES:
        if not _takes(traced, batch):
            continue
        wrong = differs(expected[batch], results_of(traced.module, batch, gradients=gradients))
        if wrong:
            return "wrong", f"batch {batch}: {wrong}"
    return "exact", ""


def _takes(traced: Traced, batch: int) -> bool:
    names = tuple(spec.name for spec in traced.inputs)
    try:
        check_sizes(traced.conditions, tuple(map(parse, traced.conditions)), names, inputs(batch))
    except gz.InputShapeError:
        return False
    return traced.batch_dynamic or batch == BATCHES[0]


# --- drawing -------------------------------------------------------------------------------------------------------


def program(seed: int, length: int = 7) -> Program:
    """A program of about `length` lines that PyTorch runs at all batch sizes."""
    chance = random.Random(seed)
    lines: list[str] = []
    names = ["v0"]
    for _ in range(60):
        if len(lines) >= length:
            break
        line, made = _draw(chance, lines, names)
        if _runs((*lines, line), (*names, *made)):
            lines.append(line)
            names += made
    outputs = sorted(chance.sample(names, min(len(names), chance.randint(1, 3))))
    return _model(tuple(lines), tuple(outputs))


def _model(lines: tuple[str, ...], names: tuple[str, ...]) -> Program:
    return Program(lines, names).double().eval()


def _runs(lines: tuple[str, ...], names: tuple[str, ...]) -> bool:
    try:
        for batch in BATCHES:
            results_of(_model(lines, names), batch, gradients=False)
    except Exception:
        return False
    return True


def _shapes(lines: list[str], names: list[str]) -> dict[str, Tensor]:
    return dict(_model(tuple(lines), tuple(names))(inputs(4)))


def _draw(chance: random.Random, lines: list[str], names: list[str]) -> tuple[str, list[str]]:
    values = _shapes(lines, names)
    name = chance.choice(names[-3:] if chance.random() < 0.6 else names)
    value, new = values[name], f"v{len(names)}"
    kind = chance.random()
    if kind < 0.42:
        return f"{new} = {_view(chance, name, value)}", [new]
    if kind < 0.5:
        return f"{new} = {_fresh(chance, name, value, values)}", [new]
    if kind < 0.57:
        return f"r.append({name} * 1)", []
    write = _write(chance, name, value, values)
    if chance.random() < 0.12:
        return f"with torch.no_grad():\n    {write}", []
    return write, []


def _dim(chance: random.Random, value: Tensor) -> int:
    return chance.randrange(-value.dim(), value.dim())


def _index(chance: random.Random, value: Tensor) -> str:
    """`:, 1:3` and the like."""
    parts = []
    for size in value.shape[: chance.randint(1, max(1, value.dim()))]:
        choices = [":", ":", ":", "1:", ":-1", "::2", "1::2"]
        if size > 1:
            choices += ["0", "-1", "1:2"]
        parts.append(chance.choice(choices))
    if chance.random() < 0.3:
        parts = ["...", chance.choice(["1:", "::2", ":2", "0"])]
    if chance.random() < 0.1:
        parts.insert(0, "None")
    return ", ".join(parts)


def _view(chance: random.Random, name: str, value: Tensor) -> str:
    rank = value.dim()
    if rank == 0:
        return chance.choice([f"{name}.unsqueeze(0)", f"{name}.view(1)", f"{name}.expand(3)", f"{name}.detach()"])
    dim, other = _dim(chance, value), _dim(chance, value)
    order = ", ".join(str(d) for d in chance.sample(range(rank), rank))
    letters = "abcdefg"[:rank]
    size = max(1, value.shape[dim] // 2)
    choices = [
        *[f"{name}[{_index(chance, value)}]"] * 4,
        f"{name}.transpose({dim}, {other})",
        f"{name}.permute({order})",
        f"{name}.movedim({dim}, {other})",
        f"{name}.swapaxes({dim}, {other})",
        f"{name}.unsqueeze({dim})",
        f"{name}.squeeze()",
        f"{name}.squeeze({dim})",
        f"{name}.flatten({min(dim % rank, other % rank)}, {max(dim % rank, other % rank)})",
        f"{name}.reshape(-1)",
        f"{name}.reshape(-1, {value.shape[-1]})",
        f"{name}.view({name}.shape[0], -1)",
        f"{name}.unflatten({dim}, (-1, 2))",
        f"{name}.select({dim}, {chance.choice([0, -1])})",
        f"{name}.narrow({dim}, {chance.choice([0, 1])}, {size})",
        f"{name}.narrow({dim}, -1, 1)",
        f"{name}.diagonal({chance.choice([0, 1, -1])}, {dim}, {other})",
        f"{name}.unfold({dim}, 2, {chance.choice([1, 2])})",
        f"{name}.chunk(2, {dim})[{chance.choice([0, -1])}]",
        f"{name}.split({size}, {dim})[{chance.choice([0, 1])}]",
        f"{name}.unbind({dim})[{chance.choice([0, -1])}]",
        f"{name}.expand(2, {', '.join(['-1'] * rank)})",
        f"torch.einsum('{letters}->{''.join(chance.sample(letters, rank))}', {name})",
        f"{name}.contiguous()",
        f"{name}.to({name}.dtype)",
        f"{name}.detach()",
        f"{name}.mT",
        f"{name}.view_as({name})",
        f"F.dropout({name}, 0.5, False)",
        f"torch.broadcast_tensors({name}, self.q[:1])[0]",
        f"{name}.real",
        f"{name}.ravel()",
        f"torch.atleast_3d({name})",
        *[f"{name}.T"] * (rank == 2),
    ]
    return chance.choice(choices)


def _fresh(chance: random.Random, name: str, value: Tensor, values: dict[str, Tensor]) -> str:
    dim = _dim(chance, value) if value.dim() else 0
    return chance.choice(
        [
            f"{name} * 2",
            f"{name}.clone()",
            f"{name} > 0",
            f"{name}.to(torch.float32)",
            f"({name} * 3).long()",
            f"{name}.max({dim})[0]",
            f"{name}.sort({dim})[0]",
            f"{name}.topk(1, {dim})[{chance.choice([0, 0, 1])}]",
            f"{name}.softmax({dim})",
            f"torch.zeros_like({name})",
            f"{name}.new_zeros({name}.shape)",
            "torch.zeros(v0.shape[0], 6, dtype=torch.float64)",
            "torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)",
            "torch.zeros(6, 6)",
            f"torch.var_mean({name}, {dim})[{chance.choice([0, 1])}]",
            f"{name}.flip({dim})",
            f"{name}[..., [0, 1]]",
            f"{name}.repeat_interleave(2, {dim})",
        ]
    )


def _other(chance: random.Random, value: Tensor, values: dict[str, Tensor]) -> str:
    """Something that broadcasts to `value`."""
    fitting = [name for name, each in values.items() if _broadcasts(each, value)]
    fitting += ["self.q"] * (value.dim() > 0 and value.shape[-1] == 6)
    fitting += ["self.p"] * (value.dim() > 1 and value.shape[-2:] == (4, 6))
    return chance.choice([*(f"{name} * 2" for name in fitting), *fitting, "0.5", "2"])


def _broadcasts(value: Tensor, to: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(value.shape, to.shape) == to.shape
    except RuntimeError:
        return False


def _write(chance: random.Random, name: str, value: Tensor, values: dict[str, Tensor]) -> str:
    other, number = _other(chance, value, values), chance.choice(["0.5", "-1", "2", "3"])
    part = f"{name}[{_index(chance, value)}]" if value.dim() else name
    if value.dtype == torch.bool:
        masks = [each for each in values if values[each].dtype == torch.bool and values[each].shape == value.shape]
        mask = chance.choice(masks)
        return chance.choice(
            [f"{name} |= ~{mask}", f"{name} &= {mask}", f"{name} ^= {mask}", f"{part} = True", f"{name}.logical_not_()"]
        )
    dim = _dim(chance, value) if value.dim() else 0
    index = "torch.tensor([0, 1])"
    choices = [
        f"{name} *= {number}",
        f"{name} += {other}",
        f"{name} -= {other}",
        f"{name}.mul_({other})",
        f"{name}.add_({other}, alpha=2)",
        f"{part} *= {number}",
        f"{part} += {number}",
        f"{part} = {number}",
        f"{part} = {part} * {number} + 1",
        f"{part}.mul_({number})",
        f"{part}.sub_({number}).neg_()",
        f"{name}[{name} > 0.3] = {number}",
        f"{name}.masked_fill_({name} > 0.2, {number})",
        f"{name}.relu_()",
        f"F.relu({name}, inplace=True)",
        f"{name}.clamp_(-0.5, 0.5)",
        f"{name}.zero_()",
        f"{name}.fill_({number})",
        f"{name}.copy_({other if not other[0].isdigit() else name + ' * 2'})",
        f"{name}.copy_({name})",
        f"{name}.sigmoid_()",
        f"{name}.tanh_().neg_()",
        f"{name}.floor_divide_({number})",
        f"{name}.remainder_(0.7)",
        f"{name}.lerp_({name} * 2, 0.3)",
        f"{name}.addcmul_({name} * 1, {name} * 2, value=0.5)",
        f"{name}.tril_()",
        f"{name}.gt_(0)",
        f"{name}.index_fill_({dim}, {index}, {number})",
        f"{name}.index_add_({dim}, {index}, {name}.index_select({dim}, {index}) * 2)",
        f"{name}.index_copy_({dim}, {index}, {name}.index_select({dim}, {index}) * 2)",
        f"{name}.scatter_({dim}, torch.zeros_like({name}, dtype=torch.long), {number})",
        f"{name}.scatter_add_({dim}, torch.zeros_like({name}, dtype=torch.long), {name} * 2)",
        f"{name}.index_put_(({index},), {name}[{index}] * 2)",
        f"{name}.fill_diagonal_({number})",
        f"{name}.transpose_({dim}, -1)",
        f"{name}.unsqueeze_({dim})",
        f"{name}.squeeze_()",
        f"{name}.cumsum_({dim})",
        f"F.dropout({name}, 0.5, False, inplace=True)",
        f"{name}.pow_(2)",
        f"torch.mul({name}, 2, out={name})",
        f"torch.sum({name} * 1, {dim}, out={part})",
    ]
    return chance.choice(choices)
