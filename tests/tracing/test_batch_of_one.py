"""A size of one: the result is the model there, or refuses it, and the report says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planting import tensors
from torch import Tensor, nn
from torch.export import Dim
from trace_cases import net

import graphzip as gz
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

Shapes = tuple[tuple[int, ...], ...]

AUTO = Dim.AUTO
WIDE = {"inputs": ({0: AUTO, 2: AUTO, 3: AUTO},)}


def doubled(asks: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """What is asked of the input decides whether the activations count twice."""
    return lambda m, x: m.b(m.a(x).relu() * (2 if asks(x) else 1))


def given(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def ends(model: nn.Module, module: nn.Module, *shapes: tuple[int, ...]) -> str:
    """How a call ends: `same`, `refused`, `fails` where the model itself fails, or `WRONG`."""
    inputs = given(*shapes)
    try:
        expected = tensors(model(*inputs))
    except Exception:
        expected = None
    try:
        found = tensors(module(*inputs))
    except gz.InputShapeError:
        return "fails" if expected is None else "refused"
    except Exception:
        return "fails" if expected is None else "WRONG"
    if expected is None:
        return "runs alone"
    right = len(found) == len(expected) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-12)
        for one, other in zip(found, expected, strict=True)
    )
    return "same" if right else "WRONG"


def outcomes(model: nn.Module, example: Shapes, calls: list[Shapes], **options: Any) -> tuple[list[str], gz.Report]:
    compiled = gz.compile(model.double(), gz.Plan([]), given(*example), **options)
    assert ends(model, compiled.module, *example) == "same", "the user's own example"
    return [ends(model, compiled.module, *shapes) for shapes in calls], compiled.report


# --- branches --------------------------------------------------------------------------------------------------------

ASKS = {
    "more": lambda x: x.shape[0] > 1,
    "not one": lambda x: x.shape[0] != 1,
    "one": lambda x: x.size(0) == 1,
    "less than two": lambda x: x.shape[0] < 2,
    "not at most one": lambda x: not x.shape[0] <= 1,
    "truth": lambda x: x.shape[0] - 1,
    "numel": lambda x: x.numel() == 4,
    "shape": lambda x: x.shape == (1, 4),
    "one of several": lambda x: x.shape[0] in (1, 30),
    "half": lambda x: x.shape[0] // 2 == 0,
    "part": lambda x: x.shape[0] / 2 > 0.7,
    "stride": lambda x: x[None].flatten().shape[0] == 4,
}


@pytest.mark.parametrize("name", ASKS)
def test_a_branch_that_a_batch_of_one_takes(name: str) -> None:
    model = net(doubled(ASKS[name]))
    found, report = outcomes(model, ((4, 4),), [((batch, 4),) for batch in (1, 2, 3, 7)])
    assert found == ["refused", "same", "same", "same"]
    notes = "\n".join(report.notes)
    assert "inputs must have" in notes
    assert "test_batch_of_one.py" in notes, "the line that asks"
    found, report = outcomes(model, ((1, 4),), [((batch, 4),) for batch in (1, 2, 3)])
    assert found == ["same", "refused", "refused"]
    assert "sizes of one are fixed, as in the example" in "\n".join(report.notes)


@pytest.mark.parametrize("ask", [len, lambda x: int(x.shape[0]), lambda x: sum(1 for _ in x)])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_that_becomes_a_number_is_fixed_and_the_report_says_so(ask: Any, batch: int) -> None:
    model = net(doubled(lambda x: ask(x) > 1))
    found, report = outcomes(model, ((batch, 4),), [((size, 4),) for size in (1, 2, 4)])
    assert found == ["same" if size == batch else "refused" for size in (1, 2, 4)]
    assert "as in the example" in "\n".join(report.notes)
    if batch == 4:
        assert "test_batch_of_one.py" in "\n".join(report.notes)


def test_what_cannot_be_traced_with_an_open_batch_is_traced_with_a_fixed_one() -> None:
    model = net(lambda m, x: m.b(m.a(x)) * [1.0, 2.0][x.shape[0] > 1])
    for batch in (1, 4):
        found, report = outcomes(model, ((batch, 4),), [((size, 4),) for size in (1, 2, 4)])
        assert found == ["same" if size == batch else "refused" for size in (1, 2, 4)]
        assert "fixed" in "\n".join(report.notes)
        assert "list indices must be integers" in "\n".join(report.notes)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: (x.shape[0] > 1 and None) or m.b(m.a(x)),
        lambda m, x: m.b(m.a(x).reshape(x.shape[0], -1)) if x.shape[0] > 1 else m.b(m.a(x).reshape(1, -1)),
        lambda m, x: m.b(m.a(x) + torch.zeros(x.shape[0] if x.shape[0] != 1 else 1, 6, dtype=x.dtype)),
        lambda m, x: m.b(m.a(x) * max(x.shape[0], 2) * min(x.shape[0], 3)),
        lambda m, x: m.b(m.a(x) if x.shape[0] >= 1 else -m.a(x)),
    ],
)
def test_a_branch_that_changes_nothing_rules_nothing_out(run: Any) -> None:
    for batch in (1, 4):
        found, report = outcomes(net(run), ((batch, 4),), [((size, 4),) for size in (1, 2, 5)])
        assert found == ["same", "same", "same"]
        assert not any("must have" in note for note in report.notes)
    assert trace(net(run), (torch.randn(4, 4, dtype=torch.float32),)).conditions == ()


def test_a_batch_of_one_that_the_model_refuses_may_be_refused() -> None:
    def run(m: Any, x: Tensor) -> Any:
        if x.shape[0] < 2:
            raise ValueError("give me more")
        return m.b(m.a(x))

    found, _ = outcomes(net(run), ((4, 4),), [((size, 4),) for size in (1, 2, 5)])
    assert found == ["fails", "same", "same"]


def test_a_branch_of_a_size_that_is_derived() -> None:
    def run(m: Any, x: Tensor) -> Any:
        h = torch.cat([x, x])
        return m.b(m.a(h)) * (2 if h.shape[0] == 2 else 1)

    found, _ = outcomes(net(run), ((4, 4),), [((size, 4),) for size in (1, 2, 5)])
    assert found == ["refused", "same", "same"]


# --- squeeze ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.b(m.a(x).squeeze()),
        lambda m, x: m.b(m.a(x).squeeze(0).relu()),
        lambda m, x: m.b(m.a(x)[:, :, None].squeeze()).log_softmax(-1),
        lambda m, x: m.b(m.a(x).squeeze((0, -1))).sum(-1),
    ],
)
def test_a_squeeze_that_drops_a_batch_of_one(run: Any) -> None:
    for batch in (1, 4):
        found, _ = outcomes(net(run), ((batch, 4),), [((size, 4),) for size in (1, 2, 5)])
        assert found == ["same", "same", "same"]


def test_a_rank_that_is_asked_for_behind_a_squeeze() -> None:
    def run(m: Any, x: Tensor) -> Any:
        h = m.a(x).squeeze()
        return m.b(h) if h.dim() == 2 else m.b(h * 2)[None]

    for batch, expected in ((4, ["refused", "same", "same"]), (1, ["same", "refused", "refused"])):
        found, report = outcomes(net(run), ((batch, 4),), [((size, 4),) for size in (1, 2, 5)])
        assert found == expected
        assert any("shape[0] != 1" in note for note in report.notes)


def test_channels_behind_a_squeeze_are_merged_where_no_patch_counts_dimensions() -> None:
    plain = net(lambda m, x: m.b(m.a(x).squeeze().relu()))
    counting = net(lambda m, x: m.b(m.a(x).squeeze().softmax(-1)))
    ruled_out = net(lambda m, x: m.b(m.a(x).squeeze().softmax(-1)) * (2 if x.shape[0] == 1 else 1))
    x = torch.randn(4, 4)
    assert gz.channel_groups(plain, (x,))["a"].mergeable
    reason = gz.channel_groups(counting, (x,))["a"].reason
    assert reason is not None
    assert "behind a squeeze that drops the batch where it is one" in reason
    assert gz.channel_groups(ruled_out, (x,))["a"].mergeable


@pytest.mark.parametrize(
    "squeeze",
    [
        lambda h: h.squeeze(),
        lambda h: h.squeeze((-1, -2)),
        lambda h: h.squeeze(-1).squeeze(-1),
        lambda h: h.squeeze(1).squeeze((1, 2, 3)),
    ],
)
def test_channels_that_become_one_are_not_squeezed_away(squeeze: Any) -> None:
    model = net(lambda m, x: m.d(squeeze(m.c(x).mean((2, 3), keepdim=True))), c=nn.Conv2d(3, 6, 3), d=nn.Linear(6, 3))
    with torch.no_grad():
        model.c.weight.copy_(model.c.weight[:1].expand_as(model.c.weight))
        model.c.bias.fill_(0.3)
    model = model.double()
    x = given((4, 3, 5, 5))
    module = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=1)]), x).module
    assert module.c.weight.shape[0] == 1
    for size in (1, 2, 4):
        assert ends(model, module, (size, 3, 5, 5)) == "same"


# --- several inputs, other sizes -------------------------------------------------------------------------------------


def both(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.b(m.a(x) + m.a(y))


SEVERAL: dict[str, tuple[Any, Shapes, dict[Shapes, str]]] = {
    "one of them has one row": (both, ((4, 4), (1, 4)), {((1, 4), (1, 4)): "same", ((3, 4), (1, 4)): "same"}),
    "both have one row": (both, ((1, 4), (1, 4)), {((3, 4), (3, 4)): "same", ((3, 4), (1, 4)): "refused"}),
    "the second has the batch": (both, ((1, 4), (4, 4)), {((1, 4), (4, 4)): "same", ((1, 4), (1, 4)): "refused"}),
    "a table as long as the batch": (
        lambda m, x, table: m.b(m.a(x @ table)),
        ((4, 4), (4, 4)),
        {((3, 4), (4, 4)): "same", ((1, 4), (4, 4)): "same"},
    ),
    "a branch on the other input": (
        lambda m, x, y: m.b(m.a(x)) * (2 if y.shape[0] > 1 else 1) + y.sum(),
        ((4, 4), (4, 4)),
        {((3, 4), (5, 4)): "same", ((1, 4), (4, 4)): "same", ((3, 4), (1, 4)): "refused"},
    ),
    "sizes compared with each other": (
        lambda m, x, y: m.b(m.a(x) + (m.a(y) if y.shape[0] == x.shape[0] else m.a(y).mean(0, keepdim=True) * 2)),
        ((4, 4), (4, 4)),
        {((3, 4), (3, 4)): "same", ((1, 4), (1, 4)): "same", ((3, 4), (1, 4)): "refused", ((1, 4), (3, 4)): "refused"},
    ),
    "one sample with a time": (
        lambda m, x, t: m.b(m.a(x) * t[:, None]),
        ((1, 4), (1,)),
        {((1, 4), (1,)): "same", ((3, 4), (3,)): "same"},
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_inputs(name: str) -> None:
    run, example, calls = SEVERAL[name]
    found, report = outcomes(net(run), example, list(calls))
    assert dict(zip(calls, found, strict=True)) == calls
    assert report.notes or "refused" not in found


@pytest.mark.parametrize(
    ("run", "refused"),
    [
        (lambda m, x: m.c(x).mean((2, 3)) * (2 if x.shape[2] > 1 else 1), {(2, 3, 1, 6), (1, 3, 1, 1)}),
        (lambda m, x: m.c(x).mean((2, 3)) * (2 if x.shape[2] * x.shape[3] > 1 else 1), {(1, 3, 1, 1)}),
        (lambda m, x: (x.shape[3] > 1 and None) or m.c(x).mean((2, 3)), set()),
        (
            lambda m, x: m.c(x).mean((2, 3)) * (2 if x.shape[2] == 1 or x.shape[0] == 1 else 1),
            {(2, 3, 1, 6), (1, 3, 1, 1), (1, 3, 5, 7)},
        ),
    ],
)
def test_other_dynamic_sizes_of_one(run: Any, refused: set[tuple[int, ...]]) -> None:
    model = net(run, c=nn.Conv2d(3, 6, 3, padding=1))
    calls: list[Shapes] = [((2, 3, 6, 1),), ((2, 3, 1, 6),), ((1, 3, 1, 1),), ((1, 3, 5, 7),), ((3, 3, 5, 7),)]
    found, _ = outcomes(model, ((2, 3, 6, 6),), calls, dynamic_shapes=WIDE)
    assert found == ["refused" if shapes[0] in refused else "same" for shapes in calls]


@pytest.mark.parametrize(
    ("run", "condition"),
    [
        (lambda m, x, y: m.a(x) if x.shape[1] * 2 == y.shape[1] else m.a(x) * 2, "y.shape[1] == 2*x.shape[1]"),
        (lambda m, x, y: m.a(x) if x.shape[0] * x.shape[1] > 7 else m.a(x) * 2, "x.shape[0]*x.shape[1] > 7"),
        (lambda m, x, y: m.a(x) if x.shape[1] / 3 > 1.25 else m.a(x) * 2, "(x.shape[1] / 3) > 1.25"),
        (lambda m, x, y: m.a(x) if x.shape[1] >= y.shape[1] - 4 else m.a(x) * 2, "x.shape[1] >= (-4) + y.shape[1]"),
        (lambda m, x, y: m.a(x) + y.sum() if x.shape[0] == y.shape[0] else m.a(x) * 2, "y.shape[0] == x.shape[0]"),
        (lambda m, x, y: m.a(x) if (x.shape[1] + 3) // 4 == 1 else m.a(x) * 2, "((3 + x.shape[1]) // 4) == 1"),
    ],
)  # fmt: skip
def test_every_guard_becomes_a_condition(run: Any, condition: str) -> None:
    shapes = {"inputs": ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})}
    model = net(run)
    traced = trace(model, (torch.randn(2, 4, 4), torch.randn(2, 8, 4)), dynamic_shapes=shapes)
    assert condition.replace("x.", "inputs_0.").replace("y.", "inputs_1.") in traced.conditions
    found, _ = outcomes(
        model,
        ((2, 4, 4), (2, 8, 4)),
        [((b, t, 4), (c, s, 4)) for b, c in ((2, 2), (1, 1), (3, 2)) for t, s in ((4, 8), (1, 2), (2, 8), (5, 8))],
        dynamic_shapes=shapes,
    )
    assert set(found) == {"same", "refused"}


def test_a_number_that_is_an_input_of_its_own() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x: Tensor, times: int) -> Tensor:
            h: Tensor = self.a(x) * times
            return h if times > 3 else -h

    model = Repeated().double()
    module = gz.compile(
        model, gz.Plan([]), (*given((2, 4)), 5), dynamic_shapes={"x": {0: AUTO}, "times": Dim.DYNAMIC}
    ).module
    (x,) = given((3, 4))
    assert torch.equal(module(x, 7), model(x, 7))
    with pytest.raises(gz.InputShapeError, match="times"):
        module(x, 2)
