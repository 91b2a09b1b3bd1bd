"""Random models, random plans of all passes, and odd things that people feed: nothing may be silently wrong.

    python tools/fuzz.py --cases 1000 --seed 0 --jobs 2
    python tools/fuzz.py --cases 10000 --resume fuzz.jsonl --out failures --onnx-every 5
    python tools/fuzz.py --one 1234                              # one case, its program, and its failure made small

Case number n is fixed by the seed plus n. What is compared with what stands in `tests/fuzz`: the original model is the
oracle, at every size at which it runs. A failure is shrunk to a few statements and written to a file that shows it
again. At the end: counts, the share that was refused, how long it took, and which rules of the table of operators were
reached. With `--resume` results are appended to a file of JSON lines, and cases that it has are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / each) for each in (".", "tests/support", "tests/support/networks", "tests")]

SHRUNK = 3
"""Failures that look the same of which so many are made small."""

FRESH = 400
"""Cases after which a worker is started anew."""


# --- a worker: one process that runs many cases ------------------------------------------------------------------


def work(options: argparse.Namespace) -> int:
    """Read requests as JSON lines and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    logging.disable(logging.CRITICAL)
    from fuzz.case import check, make_case
    from fuzz.shrink import script, shrink

    for line in sys.stdin:
        asked = json.loads(line)
        case = make_case(asked["seed"], onnx_every=options.onnx_every, jobs=tuple(options.only))
        outcome = check(case, limit=options.limit)
        answer = outcome.to_dict()
        if asked.get("shrink") and outcome.status == "failed":
            case, outcome = shrink(case, outcome, seconds=options.shrink)
            answer |= {"script": script(case, outcome), "small": outcome.to_dict()}
            answer["source"] = case.program.source() if case.program else ""
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


class Worker:
    """The process, started again where it died or hangs."""

    def __init__(self, arguments: list[str]) -> None:
        self.command = [sys.executable, __file__, "--worker", *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self.done = 0

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer; a failure of kind crash or hang where there is none."""
        if self.process is None or self.process.poll() is not None or self.done >= FRESH:
            self.stop()
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
            self.done = 0
        self.done += 1
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
        found = _line(process.stdout, time.monotonic() + limit)
        if found:
            answer: dict[str, Any] = json.loads(found)
            return answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # one that has closed its answers is about to end
        kind = "hang" if process.poll() is None else "crash"
        self.stop()
        detail = f"the process ends with {process.returncode}" if kind == "crash" else f"took more than {limit:g} s"
        return {"seed": request["seed"], "status": "failed", "kind": kind, "detail": detail, "seconds": 0.0}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


def _line(stream: Any, end: float) -> bytes:
    """One line, or nothing where the stream ends or the time is over."""
    found = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(stream, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not waiting.select(left):
                return b""
            part = os.read(stream.fileno(), 1 << 16)
            if not part:
                return b""
            found += part
    return found


# --- the run -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Results so far."""

    options: argparse.Namespace
    started: float = field(default_factory=time.monotonic)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    alike: Counter[str] = field(default_factory=Counter)
    written: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, worker: Worker, seed: int) -> None:
        """Run one case; make a failure small where it is a new one."""
        limit = 10 * self.options.limit
        row = worker.ask({"seed": seed}, limit)
        with self.lock:
            look = f"{row.get('kind')}|{row.get('stage')}|{row.get('detail', '')[:60]}"
            wanted = row["status"] == "failed" and self.options.shrink > 0 and self.alike[look] < SHRUNK
            self.alike[look] += row["status"] == "failed"
        if wanted and row.get("kind") not in ("crash", "hang"):
            small = worker.ask({"seed": seed, "shrink": True}, limit + 2 * self.options.shrink + 2 * limit)
            if "script" in small:
                row |= {"script": small["script"], "source": small["source"], "small": small["small"]}
        with self.lock:
            self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows[row["seed"]] = row
        if row["status"] == "failed":
            self._tell(row)
        if self.options.resume is not None:
            with self.options.resume.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: value for key, value in row.items() if key != "script"}) + "\n")
        done = len(self.rows)
        if done % 100 == 0:
            states = Counter(each["status"] for each in self.rows.values())
            print(f"{done} cases, {time.monotonic() - self.started:.0f} s: {dict(states)}", flush=True)

    def _tell(self, row: dict[str, Any]) -> None:
        small = row.get("small", row)
        stage, kind, job = small.get("stage"), small["kind"], row.get("job")
        print(f"\nFAILED seed {row['seed']} {job} {stage} {kind}: {small['detail'][:300]}")
        if row.get("source"):
            print("    " + row["source"].replace("\n", "\n    "))
        key = f"{kind}|{stage}|{','.join(small.get('rules', []))}|{row.get('source', row['detail'])}"
        if self.options.out is not None and "script" in row and key not in self.written:
            self.options.out.mkdir(parents=True, exist_ok=True)
            path = self.options.out / f"seed_{row['seed']}_{kind.replace(' ', '_')}.py"
            path.write_text(row["script"], encoding="utf-8")
            self.written[key] = str(path)
        sys.stdout.flush()


def run(options: argparse.Namespace) -> Run:
    """All cases, over the workers."""
    found = Run(options)
    if options.resume is not None and options.resume.exists():
        lines = options.resume.read_text(encoding="utf-8").splitlines()
        found.rows = {row["seed"]: row for row in map(json.loads, lines)}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in range(options.seed, options.seed + options.cases):
        if seed not in found.rows:
            waiting.put(seed)
    passed = ["--onnx-every", str(options.onnx_every), "--limit", str(options.limit), "--shrink", str(options.shrink)]
    passed += ["--only", *options.only] if options.only else []

    def loop() -> None:
        worker = Worker(passed)
        try:
            while options.seconds is None or time.monotonic() - found.started < options.seconds:
                try:
                    seed = waiting.get_nowait()
                except queue.Empty:
                    return
                found.take(worker, seed)
        finally:
            worker.stop()

    threads = [threading.Thread(target=loop) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# --- what is printed at the end ----------------------------------------------------------------------------------


def report(found: Run) -> int:
    """Counts, refusals, time, coverage. The number of failures."""
    rows = list(found.rows.values())
    states = Counter(row["status"] for row in rows)
    print(f"\n{len(rows)} cases: " + ", ".join(f"{count} {state}" for state, count in states.most_common()))
    by_job = Counter((row.get("job", "?"), row["status"]) for row in rows)
    for job in sorted({job for job, _ in by_job}):
        counts = {state: by_job[job, state] for state in ("ok", "idle", "refused", "failed") if by_job[job, state]}
        own = [row["seconds"] for row in rows if row.get("job", "?") == job]
        print(f"  {job:14} {sum(counts.values()):6}  {counts}  {sum(own) / len(own):.2f} s each")
    checked = max(len(rows) - states["idle"], 1)
    print(f"refused: {states['refused']} of {checked} that were checked ({states['refused'] / checked:.1%})")
    for text, count in _reasons(rows).most_common(12):
        print(f"  {count:5}  {text}")
    print(f"channels merged or dropped: {sum(row.get('merged', 0) for row in rows)}; files: {_count(rows, 'onnx')}")
    print(f"  of which PyTorch's exporter cannot write {_count(rows, 'unwritten')}: an operator has no ONNX function")
    seconds = sum(row["seconds"] for row in rows)
    print(f"time: {seconds / 60:.1f} core-minutes, {time.monotonic() - found.started:.0f} s on the clock")
    _coverage(rows)
    failed = [row for row in rows if row["status"] == "failed"]
    kinds = Counter(f"{row.get('stage')}: {row['kind']}" for row in failed)
    print(f"failures: {len(failed)}" + "".join(f"\n  {count:5}  {kind}" for kind, count in kinds.most_common()))
    for path in found.written.values():
        print(f"  {path}")
    return len(failed)


def _count(rows: list[dict[str, Any]], key: str) -> int:
    return sum(bool(row.get(key)) for row in rows)


def _reasons(rows: list[dict[str, Any]]) -> Counter[str]:
    texts = [f"{row['stage']}: {row['kind']}: {row['detail']}" for row in rows if row["status"] == "refused"]
    return Counter("".join(c for c in text.splitlines()[0] if not c.isdigit())[:150] for text in texts)


def _coverage(rows: list[dict[str, Any]]) -> None:
    """Which statements were written, and which rows of the table of operators were reached."""
    from fuzz.gen import RULES
    from fuzz.grammar import FAMILIES

    from graphzip.ops import OPS

    rules = Counter(rule for row in rows for rule in row.get("rules", []))
    never = sorted(RULES.keys() - rules.keys())
    print(f"statements: {len(RULES) - len(never)} of {len(RULES)} kinds in {len(FAMILIES)} families; never: {never}")
    hit = {target for row in rows for target in row.get("targets", [])}
    reached = {id(spec) for target, spec in OPS.items() if str(target) in hit}
    table = {id(spec): spec for spec in OPS.values()}
    names = {str(target) for target in OPS}
    print(f"operators: {len(hit & names)} of {len(names)}, rows of the table: {len(reached)} of {len(table)}")
    missed = [min(map(str, spec.targets)) for key, spec in table.items() if key not in reached]
    print(f"rows never reached: {sorted(missed)}")
    print(f"operators never reached: {sorted(names - hit)}")


def show(options: argparse.Namespace) -> int:
    """One case with all that is known of it."""
    logging.disable(logging.CRITICAL)
    from fuzz.case import check, make_case
    from fuzz.shrink import shrink

    case = make_case(options.one, onnx_every=options.onnx_every, jobs=tuple(options.only))
    print(case.job, *(["with a file"] if case.onnx else []))
    print(case.program.source() if case.program else "")
    outcome = check(case, limit=options.limit)
    print(outcome)
    if outcome.status == "failed":
        case, outcome = shrink(case, outcome, seconds=options.shrink)
        print(f"\n{case.program.source() if case.program else ''}\n{outcome}")
    return outcome.status == "failed"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--onnx-every", type=int, default=5, metavar="N", help="write a file of each N-th case; 0: never"
    )
    parser.add_argument("--out", type=Path, help="folder for the failures")
    parser.add_argument("--resume", type=Path, help="file of JSON lines to continue and append to")
    parser.add_argument("--seconds", type=float, help="begin no case after so long")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds to make a failure small; 0: leave it")
    parser.add_argument("--only", nargs="*", default=[], help="jobs to do, such as merge or feed; by default all")
    parser.add_argument("--one", type=int, metavar="SEED", help="run one case and print all about it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return work(options)
    if options.one is not None:
        return show(options)
    return 1 if report(run(options)) else 0


if __name__ == "__main__":
    sys.exit(main())
