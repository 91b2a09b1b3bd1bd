"""One random case: its program, its job, and what came out."""

from __future__ import annotations

import random
import re
import signal
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import graphzip as gz
from fuzz import jobs_more  # noqa: F401 (its jobs register themselves)
from fuzz.compare import NotApplicable, Problem
from fuzz.context import Context, traced_once
from fuzz.feed import feed
from fuzz.grammar import make_program
from fuzz.jobs import JOBS
from fuzz.program import Program

__all__ = ["Case", "Outcome", "check", "make_case"]

FED = 25
"""One case of so many feeds what people feed, instead of running a model."""


LAYERS = {"linear": 12.0, "conv": 25.0, "depthwise": 8.0, "residual": 4.0, "gate": 4.0, "batch_norm": 5.0}
"""Weights of statements for jobs that need layers of `torch.nn`."""


@dataclass(frozen=True)
class Case:
    """Everything is fixed by the seed; the program is replaced while a failure is shrunk."""

    seed: int
    job: str
    program: Program | None
    onnx: bool = False
    fresh: bool = False


@dataclass
class Outcome:
    """What came out. `status` is ok, refused, failed, idle (nothing could be checked)."""

    seed: int
    status: str
    job: str = ""
    stage: str = ""
    kind: str = ""
    detail: str = ""
    rules: list[str] = field(default_factory=list)
    merged: int = 0
    seconds: float = 0.0
    onnx: bool = False
    unwritten: bool = False
    targets: list[str] = field(default_factory=list)

    @property
    def signature(self) -> str:
        """What failures of one cause have in common."""
        text = re.sub(r"[0-9.e+-]+", "#", self.detail.splitlines()[0] if self.detail else "")
        return f"{self.kind}|{self.stage if self.kind != 'untyped' else ''}|{text[:160]}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_case(
    seed: int, *, onnx_every: int = 5, jobs: tuple[str, ...] = (), rules: frozenset[str] | None = None
) -> Case:
    """The case of a seed; only these `jobs` and `rules` of statements, where they are given."""
    rng = random.Random(f"case {seed}")
    if (not jobs and rng.random() < 1 / FED) or jobs == ("feed",):
        return Case(seed, "feed", None)
    names = [name for name in JOBS if not jobs or name in jobs]
    name = rng.choices(names, [JOBS[each][1] for each in names])[0]
    layered = name in ("factor", "share_models", "zip_models", "plan_for") and rules is None
    program = make_program(seed, rules=rules, weights=LAYERS if layered else None)
    return Case(seed, name, program, onnx=bool(onnx_every) and seed % onnx_every == 0, fresh=rng.random() < 0.1)


INSIDE = "failed inside graphzip"
"""What an error says that is typed and hides one that is not."""


class Late(BaseException):
    """The time of a case is over; no `except Exception` may catch it."""


def _alarm(*_: Any) -> None:
    raise Late


def check(case: Case, *, limit: float = 60.0) -> Outcome:
    """Run a case. What fails is told, not raised."""
    outcome = Outcome(
        case.seed, "ok", case.job, onnx=case.onnx, rules=sorted(case.program.rules) if case.program else []
    )
    started = time.process_time()
    kept = signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(case, outcome)
    except Late:
        outcome.status, outcome.kind, outcome.detail = "failed", "hang", f"took more than {limit:g} s of processor time"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, kept)
    outcome.seconds = time.process_time() - started
    return outcome


def _check(case: Case, outcome: Outcome) -> None:
    context: Context | None = None
    with traced_once(fresh=case.fresh) as once:
        try:
            if case.program is None:
                feed(case.seed)
            else:
                context = Context(case.program, case.seed, onnx=case.onnx)
                JOBS[case.job][0](context)
                outcome.merged, outcome.unwritten = context.merged, context.unwritten
        except NotApplicable as reason:
            outcome.status, outcome.detail = "idle", str(reason)
        except Problem as problem:
            outcome.status, outcome.kind, outcome.detail = "failed", problem.kind, str(problem)
        except gz.GraphZipError as error:
            outcome.status, outcome.kind, outcome.detail = "refused", type(error).__name__, str(error)
            if INSIDE in outcome.detail:
                outcome.status, outcome.kind, outcome.detail = "failed", *_told(error.__cause__ or error, "untyped")
        except AssertionError as error:
            outcome.status, outcome.kind, outcome.detail = "failed", *_told(error, "assertion")
        except Exception as error:
            outcome.status, outcome.kind, outcome.detail = "failed", *_told(error, "untyped")
        outcome.stage = context.stage if context is not None else "feed"
        outcome.targets = sorted(map(str, once.targets))


def _told(error: BaseException, kind: str) -> tuple[str, str]:
    """The kind, and the error with the last lines of graphzip that it went through."""
    frames = [
        f"{frame.filename.rpartition('/')[2]}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "/graphzip/" in frame.filename or "/graphzip_passes/" in frame.filename or "planting" in frame.filename
    ]
    first = (str(error).splitlines() or [""])[0]
    return kind, f"{type(error).__name__}: {first[:300]} [{' < '.join(reversed(frames[-3:]))}]"


def same_failure(one: Outcome, two: Outcome) -> bool:
    """Whether a smaller case fails in the same way."""
    if one.status != two.status or one.kind != two.kind:
        return False
    if one.kind in ("untyped", "assertion"):
        return _place(one.detail) == _place(two.detail)
    return one.stage == two.stage


def _place(detail: str) -> str:
    return detail.partition(":")[0] + detail.rpartition("[")[2]


def with_program(case: Case, program: Program) -> Case:
    return replace(case, program=program)


torch.set_num_threads(1)
