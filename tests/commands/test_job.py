"""`graphzip run job.yaml`."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import pytest
import typer
import yaml
from typer.testing import CliRunner

from graphzip.commands import job as jobs
from graphzip.commands.cli import app
from graphzip.file_locks import hold

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
"""
JOB = {
    "model": "net.py:net",
    "input": "1x3x8x8",
    "calibration": "data.npz",
    "macs": 0.5,
    "card": False,
    "output": "out",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32))
    return tmp_path


def written(home: Path, **changes: Any) -> Path:
    options = {key: value for key, value in (JOB | changes).items() if value is not None}
    (home / "job.yaml").write_text(yaml.safe_dump(options))
    return home / "job.yaml"


def run(job: Path) -> Any:
    return CliRunner().invoke(app, ["run", str(job)])


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands write empty files instead of running; what each was called with."""
    found: list[list[str]] = []

    def carry_out(stage: Any, home: Path, log: IO[str]) -> int:
        found.append(stage.arguments)
        if "fail" in stage.arguments:
            return 3
        for flag in ("-o", "--save"):
            if flag in stage.arguments:
                Path(stage.arguments[stage.arguments.index(flag) + 1]).write_text("")
        return 0

    monkeypatch.setattr(jobs, "_carry_out", carry_out)
    return found


def test_each_command_gets_its_options(home: Path, carried: list[list[str]]) -> None:
    out = str((home / "out").resolve())
    done = run(written(home, exclude=["a*", "b"], tune=True, seed=3, **{"round-to": 4}))
    assert done.exit_code == 0, done.output
    compile_, report = carried
    assert compile_[:2] == ["compile", "net.py:net"]
    given = {"--input": "1x3x8x8", "--macs": "0.5", "--round-to": "4", "--seed": "3", "--calibration": "data.npz"}
    assert {flag: compile_[compile_.index(flag) + 1] for flag in given} == given
    assert [compile_[number + 1] for number, word in enumerate(compile_) if word == "--exclude"] == ["a*", "b"]
    assert {"--tune", "--no-card"} <= set(compile_)
    assert compile_[compile_.index("--cache") + 1] == f"{out}/measurements.jsonl"
    assert report == ["report", f"{out}/slim.graphzip", "-o", f"{out}/report.html"]
    assert done.stdout.split() == [f"{out}/{name}" for name in ("slim.onnx", "slim.graphzip", "report.html", "log.txt")]


def test_a_job_without_a_budget_measures_nothing(home: Path, carried: list[list[str]]) -> None:
    assert run(written(home, macs=None, keep=["0.5"])).exit_code == 0
    assert [each[0] for each in carried] == ["compile", "report"]
    assert "--keep" in carried[0]
    assert "--cache" not in carried[0]


def test_a_folder_of_transformers(home: Path, carried: list[list[str]]) -> None:
    (home / "llama").mkdir()
    (home / "llama" / "config.json").write_text("{}")
    options = {"folder": "llama", "prune": ["*mlp*=0.5"], "calibration": "data.npz", "output": "out"}
    (home / "job.yaml").write_text(yaml.safe_dump(options))
    assert run(home / "job.yaml").exit_code == 0
    slim = str((home / "out").resolve() / "slim")
    expected = ["compile-folder", "llama", "--calibration", "data.npz", "--prune", "*mlp*=0.5", "-o", slim]
    assert carried == [expected]
    assert run(home / "job.yaml").exit_code == 0
    state = home / "out" / "job.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"done": []}))
    assert run(home / "job.yaml").exit_code == 0, "killed before it was noted that the folder is there"
    assert carried == [expected]
    (home / "llama" / "config.json").write_text("{} ")
    assert "is of another job" in run(home / "job.yaml").stderr
    (home / "job.yaml").write_text(yaml.safe_dump(options | {"macs": 0.5}))
    assert "'macs' is no option of a job" in run(home / "job.yaml").stderr
    (home / "job.yaml").write_text(yaml.safe_dump(options | {"folder": 3}))
    assert "'folder' is missing; write a folder of transformers" in run(home / "job.yaml").stderr


def test_what_is_done_is_not_done_again(home: Path, carried: list[list[str]]) -> None:
    job = written(home)
    assert run(job).exit_code == 0
    assert run(job).exit_code == 0
    assert [each[0] for each in carried] == ["compile", "report"]
    (home / "out" / "slim.onnx").unlink()
    assert run(job).exit_code == 0
    assert [each[0] for each in carried[2:]] == ["compile"]


def test_a_command_that_fails_ends_the_job_with_its_code(home: Path, carried: list[list[str]]) -> None:
    assert run(written(home, scope="fail")).exit_code == 3
    assert [each[0] for each in carried] == ["compile"]
    assert json.loads((home / "out" / "job.json").read_text())["done"] == []


@pytest.mark.parametrize("change", ["option", "data", "code"])
def test_a_folder_of_another_job_is_left_alone(change: str, home: Path, carried: list[list[str]]) -> None:
    assert run(written(home)).exit_code == 0
    if change == "data":
        np.savez(home / "data.npz", x=np.zeros((16, 3, 8, 8), np.float32))
    elif change == "code":
        (home / "net.py").write_text(NET + "# another\n")
    done = run(written(home, macs=0.6 if change == "option" else 0.5))
    assert done.exit_code == 2
    assert "is of another job" in done.stderr
    assert len(carried) == 2


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "'model' is missing; write what a model is"),
    "no folder": ({"output": None}, "'output' is missing; write the folder"),
    "an unknown option": ({"maks": 0.5}, "'maks' is no option of a job; did you mean 'macs'"),
    "one that the job decides": ({"save": "x.graphzip"}, "'save' is no option of a job"),
    "a budget and a plan": ({"plan": "plan.yaml"}, "'macs' and 'plan' are both given"),
    "a folder that is used": ({"output": "."}, "exists and no job made it"),
    "a folder that cannot be": ({"output": "a/b"}, "does not exist; create it first"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_job(name: str, home: Path, carried: list[list[str]]) -> None:
    changes, text = WRONG[name]
    before = sorted(home.iterdir())
    done = run(written(home, **changes))
    assert done.exit_code == 2
    assert text in done.stderr.replace("\n", " ")
    assert not carried
    assert sorted(home.iterdir()) == sorted([*before, home / "job.yaml"])


def test_what_is_no_job(home: Path, carried: list[list[str]]) -> None:
    (home / "job.yaml").write_text("[1, 2]")
    assert "holds no options" in run(home / "job.yaml").stderr
    assert "cannot be read as YAML" in run(home / "none.yaml").stderr


def test_two_processes_do_not_work_in_one_folder(home: Path, carried: list[list[str]]) -> None:
    job = written(home)
    (home / "out").mkdir()
    with hold(home / "out" / "job.lock"):
        (home / "out" / "job.json").write_text("{}")
        done = run(job)
    assert done.exit_code == 2
    assert f"is being worked on by process {os.getpid()} on " in done.stderr.replace("\n", " ")


def test_a_job_that_was_killed_before_its_first_step_goes_on(home: Path, carried: list[list[str]]) -> None:
    """Its folder has a lock, and perhaps a log and the place where the state is written, and no state."""
    out = home / "out"
    (out / ".job.json.x").mkdir(parents=True)
    (out / "log.txt").touch()
    assert "exists and no job made it" in run(written(home)).stderr
    (out / "job.lock").touch()
    assert run(written(home)).exit_code == 0
    assert [each[0] for each in carried] == ["compile", "report"]


def test_a_job_that_is_told_to_stop_takes_its_command_along(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler tells it: what went on would work beside the job that is started next."""
    command = home / "command"
    command.write_text(f"#!/bin/sh\necho $$ > {home}/number\nexec sleep 60\n")
    command.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(command))

    def tell() -> None:
        while not (home / "number").exists() or not (home / "number").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    done = run(written(home))
    teller.join()
    assert done.exit_code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((home / "number").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on(home: Path) -> None:
    """Killed while it measures, and again when the file is there but the report is not."""
    job, out = written(home, effort="thorough"), home / "out"
    command = [sys.executable, "-m", "graphzip", "run", str(job)]
    quiet: Any = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    for awaited in ("measurements.jsonl", "slim.graphzip"):
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        while not (out / awaited).exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    measured = (out / "measurements.jsonl").read_text()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "slim.onnx" in done.stdout
    assert (out / "measurements.jsonl").read_text() == measured
    onnx.checker.check_model(str(out / "slim.onnx"))
    page = (out / "report.html").read_text()
    assert "What each group costs" in page or "frontier" in page.lower()
    assert "graphzip compile net.py:net" in (out / "log.txt").read_text()


def blocks() -> dict[str, str]:
    """The files that the page about jobs shows, by title."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "jobs.md").read_text()
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', page, re.DOTALL))


def test_the_job_of_the_manual_is_one(home: Path, carried: list[list[str]]) -> None:
    (home / "job.yaml").write_text(blocks()["job.yaml"])
    assert run(home / "job.yaml").exit_code == 0
    assert [each[0] for each in carried] == ["compile", "report"]


def test_what_schedulers_get_is_well_formed(tmp_path: Path) -> None:
    for name in ("job.sbatch", "plan.sbatch"):
        text = blocks()[name]
        assert text.startswith("#!/bin/bash\n#SBATCH --")
        assert "set -euo pipefail" in text
        (tmp_path / name).write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
    words = shlex.split(blocks()["plan.sbatch"].partition("-m graphzip ")[2].partition("\ngraphzip run")[0])
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    assert command.make_context("plan", words[1:], resilient_parsing=True).params["macs"] == 0.5
    spec = yaml.safe_load(blocks()["job.k8s.yaml"])
    pod = spec["spec"]["template"]["spec"]
    assert (spec["apiVersion"], spec["kind"], pod["restartPolicy"]) == ("batch/v1", "Job", "OnFailure")
    mounted = {each["name"] for container in pod["containers"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}
    assert pod["containers"][0]["command"][:2] == ["graphzip", "run"]
