"""Several processes, each with a share of the calibration data, give what one gives with all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes_worker
import pytest
import torch

import graphzip as gz
from graphzip_passes.registry import BUILT_IN

WORKER = Path(__file__).parents[1] / "support" / "workers" / "processes_worker.py"


def started(folder: Path, count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *arguments],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def results(workers: list[subprocess.Popen[str]], folder: Path) -> list[dict[str, Any]]:
    for worker in workers:
        _, told = worker.communicate(timeout=900)
        assert worker.returncode == 0, told
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(workers))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return results(started(folder, 2, "quick"), folder)


def check_equal(found: dict[str, Any], other: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Processes have the same, to the bit, and one process has the same but for rounding."""
    assert list(found) == list(wanted)
    for name, case in wanted.items():
        if "plan" in case:
            assert found[name] == other[name], name
            assert found[name]["plan"] == case["plan"], name
            assert found[name]["losses"] == pytest.approx(case["losses"], rel=1e-6, abs=1e-12), name
            continue
        assert found[name]["drift"] == pytest.approx(case["drift"], rel=1e-4, abs=1e-7), name
        for key, value in case["weights"].items():
            assert torch.equal(found[name]["weights"][key], other[name]["weights"][key]), f"{name}: {key}"
            scale = 1e-6 * float(value.double().abs().max()) if value.numel() else 0.0
            given = found[name]["weights"][key]
            assert float((given.double() - value.double()).abs().max()) <= scale, f"{name}: {key}"


def test_two_processes_give_what_one_gives(two: list[dict[str, Any]]) -> None:
    wanted = processes_worker.quick(list) | processes_worker.empty_shares(list)
    check_equal(two[0]["quick"], two[1]["quick"], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_pass_and_plan_over_processes(count: int, tmp_path: Path) -> None:
    """All passes with all options that read data: nothing that a share alone says is taken for the whole."""
    kinds = {name.partition(" ")[0] for name in (*processes_worker.single(), *processes_worker.several())}
    assert set(BUILT_IN) <= kinds
    found = results(started(tmp_path, count, "everything"), tmp_path)
    wanted = processes_worker.everything(list)
    for other in found[1:]:
        check_equal(found[0]["everything"], other["everything"], wanted)


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """The others stop with its number, and the next start goes on from what was measured."""
    first, second = started(tmp_path, 2, "killed")
    assert second.wait(timeout=300) == -signal.SIGKILL
    start = time.monotonic()
    _, told = first.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert "ProcessesError: rank 1 did not answer; start all of them again" in told
    kept = (tmp_path / "cache.jsonl").read_text().splitlines()
    assert len(kept) == 4
    assert all(json.loads(line)["loss"] >= 0.0 for line in kept)
    (tmp_path / "store").unlink()
    again = results(started(tmp_path, 2, "again"), tmp_path)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    whole = results(started(fresh, 2, "again"), fresh)
    assert again[0]["plan"] == again[1]["plan"] == whole[0]["plan"]
    assert again[0]["turns"] == whole[0]["turns"] - 2


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """The data is divided, one process prints and writes, and the file holds what one process writes."""
    (tmp_path / "net.py").write_text("from pass_cases import network\n\nnet = network\n")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((150, 3, 6, 6)).astype(np.float32))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def run(start: list[str], name: str, *more: str) -> subprocess.CompletedProcess[str]:
        options = ["--input", "2x3x6x6", "--calibration", "x.npz", "--no-card", "--save", f"{name}.graphzip"]
        command = [*start, "graphzip", "compile", "net.py:net", *options, "-o", f"{name}.onnx", *more]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    alone = run([sys.executable, "-m"], "alone", "--keep", "0.5")
    both = run(launcher, "both", "--keep", "0.5")
    assert both.returncode == alone.returncode == 0, both.stderr
    assert "samples of --calibration read: rank 0 86, rank 1 64; 150 in all" in both.stderr
    assert both.stdout == alone.stdout.replace("alone", "both")
    first, second = (gz.load(tmp_path / f"{name}.graphzip").module.state_dict() for name in ("alone", "both"))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0.0, atol=1e-6 * float(value.abs().max()))
    failed = run(launcher, "none", "--macs", "0.0001")
    assert failed.stderr.count("exitcode  : 2") + failed.stderr.count("exitcode: 2") >= 1, failed.stderr
    assert failed.stderr.count("graphzip: error: --macs") == 1


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("nan", "WeightsError: rank 1: '3.weight' reads or gives values that are NaN"),
        ("shape", "ExampleInputError: rank 1: calibration"),
        ("model", "ProcessesError: the model of rank 1 differs from that of rank 0"),
        ("seed", "ProcessesError: the plan, or an option, of rank 1 differs from that of rank 0"),
        ("none", "ExampleInputError: calibration yields no batch in any rank"),
        ("tune", "PlanError: tune: it trains in one process"),
        ("late", "ProcessesError: prepare: rank 1 did not come within 0.2 seconds"),
        ("alone", "nothing"),
        ("after all", "nothing"),
    ],
)
def test_errors_of_processes(two: list[dict[str, Any]], case: str, told: str) -> None:
    """What goes wrong in one process is said in all, and they go on working together."""
    first, second = (each["errors"][case] for each in two)
    assert first.startswith(told), first
    if case != "late":
        assert second == first or first.replace("rank 1: ", "", 1) == second
