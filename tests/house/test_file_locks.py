"""Locks on files, with those of the file system and without."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from graphzip import file_locks
from graphzip.file_locks import held, hold, holder, take

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="told apart by /proc here")


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks", "no module for them", "a drive without them"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no module for them":
        monkeypatch.setattr(file_locks, "fcntl", None)
    elif request.param == "a drive without them":
        monkeypatch.setattr(file_locks.fcntl, "flock", refuse)
    return str(request.param)


def record(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(file_locks._record()) | changes))


def test_one_holds_a_file_at_a_time(system: str, tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    lock = take(path)
    assert lock is not None
    assert held(path)
    assert holder(path).startswith(f"process {json.loads(path.read_text())['pid']} on ")
    assert take(path) is None
    lock.close()
    with hold(path):
        assert take(path) is None
    assert {file.name for file in tmp_path.iterdir()} <= {"job.lock"}


def test_a_process_that_is_gone_holds_nothing(system: str, tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"began": -1}):
        record(path, **changes)
        assert not held(path)
        lock = take(path)
        assert lock is not None
        assert held(path)
        lock.close()


@pytest.mark.parametrize("system", ["no module for them", "a drive without them"], indirect=True)
def test_a_process_of_another_machine_may_be_there(system: str, tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    record(path, machine=["node3"], pid=17)
    assert held(path)
    assert take(path) is None
    assert holder(path) == "process 17 on node3"
    path.write_text("{half")
    assert held(path)
    assert take(path) is None
    assert holder(path) == "another process"


@pytest.mark.parametrize("system", ["no module for them", "a drive without them"], indirect=True)
def test_one_that_saw_what_another_has_replaced_does_not_take_it(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.lock"
    record(path, began=-1)
    lives, taken = file_locks._lives, list[Any]()

    def another_is_quicker(found: bytes) -> bool:
        monkeypatch.setattr(file_locks, "_lives", lives)
        taken.append(take(path))
        return lives(found)

    monkeypatch.setattr(file_locks, "_lives", another_is_quicker)
    assert take(path) is None
    assert taken[0] is not None
    assert held(path)
    taken[0].close()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("system", ["no module for them", "a drive without them"], indirect=True)
def test_a_turn_that_a_process_left_is_taken_over(system: str, tmp_path: Path) -> None:
    for name in ("job.lock", "job.lock.turn"):
        record(tmp_path / name, began=-1)
    lock = take(tmp_path / "job.lock")
    assert lock is not None
    assert {file.name for file in tmp_path.iterdir()} == {"job.lock"}
    lock.close()


def test_many_that_ask_at_once(system: str, tmp_path: Path) -> None:
    """Of a file that is not there, and of one that a process left that is gone."""
    for name in ("new", "left"):
        path, found = tmp_path / name, list[Any]()
        if name == "left":
            record(path, began=-1)
        together = threading.Barrier(8)

        def ask(path: Path = path, found: list[Any] = found, together: threading.Barrier = together) -> None:
            together.wait()
            found.append(take(path))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(each is not None for each in found) == 1
        next(each for each in found if each is not None).close()
