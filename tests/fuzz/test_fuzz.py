"""Random models and plans of fixed seeds; `tools/fuzz.py` runs as many as one likes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuzz.case import Case, check, make_case
from fuzz.gen import RULES
from fuzz.grammar import make_program
from fuzz.jobs import JOBS
from fuzz.program import Input, Line, Program
from fuzz.shrink import script, shrink
from graphzip.ops import OPS

CASES, CHUNK = 150, 15
REFUSED: list[bool] = []
"""Of the cases that were checked: whether each was refused."""


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases(first: int) -> None:
    found = [check(make_case(seed, onnx_every=CHUNK)) for seed in range(first, first + CHUNK)]
    failed = [
        f"seed {each.seed}, {each.job}, {each.stage}: {each.kind}: {each.detail}"
        for each in found
        if each.status == "failed"
    ]
    assert not failed, "\n".join(failed)
    REFUSED.extend(each.status == "refused" for each in found if each.status != "idle")
    assert sum(each.merged for each in found) > 0


def test_few_are_refused() -> None:
    """Of what the cases above checked."""
    assert sum(REFUSED) <= 0.05 * len(REFUSED)


def test_a_seed_gives_one_case() -> None:
    for seed in (1, 7, 21):
        one, two = make_program(seed), make_program(seed)
        assert one == two
        model = one.build()
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in two.build().named_parameters()
        }
    assert make_case(3) == make_case(3)


def test_every_kind_of_statement_is_written() -> None:
    written = {rule for seed in range(800) for rule in make_program(seed).rules}
    assert RULES.keys() <= written, RULES.keys() - written


MEAN = Program(
    state=(("a1", "self.a1 = nn.Linear(4, 8)"), ("a2", "self.a2 = nn.Linear(8, 3)")),
    lines=(
        Line("y1 = self.a1(x)", ("x",), ("y1",), "first"),
        Line("y2 = F.relu(y1) * 2", ("y1",), ("y2",), "pointwise"),
        Line("y3 = y2 - y2.mean(1, keepdim=True)", ("y2",), ("y3",), "uneven"),
        Line("y4 = y3 + y2", ("y3", "y2"), ("y4",), "binary"),
        Line("y5 = self.a2(y4)", ("y4",), ("y5",), "head"),
    ),
    inputs=(Input("x", (4,)),),
    outputs="(y5, y2.sum())",
)


def _without_patch(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    """The mean over merged channels counts each of them once."""
    object.__setattr__(spec := OPS[target], "patch", spec.patch)
    monkeypatch.setitem(spec.__dict__, "patch", None)


def test_a_wrong_rule_is_found_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, "merge", MEAN)
    assert check(case).status == "ok"
    _without_patch(monkeypatch, torch.ops.aten.mean.dim)
    outcome = check(case)
    assert (outcome.status, outcome.kind, outcome.stage) == ("failed", "wrong", "merged")
    small, again = shrink(case, outcome)
    assert small.program is not None
    assert "mean" in small.program.source()
    assert len(small.program.lines) < len(MEAN.lines)
    text = script(small, again)
    assert small.program.source() in text
    scope: dict[str, Any] = {}
    with pytest.raises(AssertionError, match="off by"):
        exec(compile(text, "<script>", "exec"), scope)


def test_a_refusal_without_a_note_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the original runs at another batch size and the result does not."""
    import graphzip as gz
    from fuzz.compare import Problem, same_at

    class Narrow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] != 4:
                raise gz.InputShapeError("only four")
            return F.relu(x)

    def make(batch: int, seed: int, grown: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, dtype=torch.float64),)

    same_at(nn.ReLU(), Narrow(), make, [(4, 0), (1, 0)], ["x.shape[0] == 4"])
    with pytest.raises(Problem, match="at batch 1: refused without a note"):
        same_at(nn.ReLU(), Narrow(), make, [(4, 0), (1, 0)], [])


def test_jobs_reach_every_pass() -> None:
    assert {"merge", "prune", "factor", "zip_models", "share_models", "widen", "plan_for", "several"} <= JOBS.keys()
