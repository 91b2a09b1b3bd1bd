"""Several processes that work on one model, each with its share of the data: `torch.distributed`, in few words.

What is computed from data is added up or put together over all processes (`Processes.summed`, `gathered`), so that each
of them has the same numbers, to the bit, and decides the same. What is looked at on few samples is divided instead:
each process does its part of the work on the same samples (`divided`).

Public functions that take calibration data do so `together`: they meet, work, and part. A process that fails in between
tells the others why, and all raise the same kind of error. Every exchange begins with a few numbers that say what a
process is about, so processes that run apart are told so and do not wait for each other forever. The connection is one
of its own, by gloo, so nothing that the user's process group is used for can get in its way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from graphzip import errors
from graphzip.errors import ProcessesError
from graphzip.graph.torch_private import pytree

__all__ = ["ALONE", "ATTEMPT", "Processes", "present", "processes", "sharing"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")

ATTEMPT: Final = "TORCHELASTIC_RESTART_COUNT"
"""In the environment: how often `torchrun` has started the processes anew."""

_MEETING: Final = 50.0  # seconds that processes wait for each other at first
_SOON: Final = 5.0  # seconds after which that is said
_ANSWER: Final = 5.0  # seconds in which a process that is there says so when a connection breaks
_GOES_ON, _FAILED = 0, 1
_PATIENCE: Final = 6 * 3600.0  # seconds that one process may compute while the others wait for what it finds
_AGAIN: Final = "start all of them again: what a cache= kept is not measured twice, and no file was left half-written"
_DIFFERENT: Final = (
    "the ranks of the process group do different things; give all of them the same model, plan and options, and each "
    "its own share of calibration"
)


class Processes:
    """Those of a process group of `torch.distributed`, or one process for itself; `rank` is the number of this one.

    All methods but `mine` are called by all processes in the same order, between the two ends of `together`.
    """

    def __init__(self, group: Any = None, *, timeout: float = 0.0) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._link: Any = None
        self._inside = self._apart = False
        self._meetings = 0

    def __reduce__(self) -> str | tuple[Callable[[], Processes], tuple[()]]:
        """What is loaded from a file belongs to the processes that load it."""
        return "ALONE" if self is ALONE else (present, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        """The same."""
        return self

    # ------------------------------------------------------------------------------------------------- to and fro

    def gathered(self, value: T) -> list[T]:
        """What every process has, in order of rank."""
        if self.size == 1:
            return [value]
        data = _packed(value)
        sizes = [size for _, size in self._exchange("gather", len(data))]
        sent = torch.zeros(max(sizes), dtype=torch.uint8)
        sent[: len(data)] = data
        found = [torch.empty_like(sent) for _ in sizes]
        self._wait(lambda: self._link.allgather([found], [sent]))
        return [_unpacked(each[:size]) for each, size in zip(found, sizes, strict=True)]

    def agreed(self, value: T, source: int = 0) -> T:
        """What the process of that rank has, in all of them."""
        if self.size == 1:
            return value
        data = _packed(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = self._exchange("agree", len(data))[source][1]
        sent = data if self.rank == source else torch.empty(size, dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._wait(lambda: self._link.broadcast([sent], options))
        return _unpacked(sent)  # type: ignore[no-any-return]

    def summed(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each of these tensors, added up over all processes in float64; shapes are the same in all of them."""
        if self.size == 1:
            return values
        flat = torch.cat([value.detach().to("cpu", torch.float64).reshape(-1) for value in values])
        if len({size for _, size in self._exchange("add", flat.numel())}) > 1:
            raise ProcessesError(_DIFFERENT)
        self._wait(lambda: self._link.allreduce([flat]))
        parts = torch.split(flat, [value.numel() for value in values])
        return tuple(part.reshape(value.shape).to(value.device) for part, value in zip(parts, values, strict=True))

    def summed_by_name(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same for tensors that have names, some of which a process may not have."""
        if self.size == 1:
            return dict(values)
        shapes: dict[str, Any] = {}
        for each in self.gathered({name: tuple(value.shape) for name, value in values.items()}):
            shapes |= each
        names = sorted(shapes)
        parts = [values.get(name, torch.zeros(shapes[name], dtype=torch.float64)) for name in names]
        return dict(zip(names, self.summed(*parts), strict=True)) if names else {}

    def every(self, flag: bool) -> bool:
        """Whether it is true in all of them."""
        return flag if self.size == 1 else all(size for _, size in self._exchange("every", int(flag)))

    def mine(self, things: Sequence[T]) -> list[T]:
        """Those of alike things that this process sees to: one after the other in turns."""
        return list(things[self.rank :: self.size])

    def divided(self, things: Sequence[T], work: Callable[[T], S]) -> list[S]:
        """What `work` makes of each, every process doing its part; it asks nothing of other processes."""
        if self.size == 1:
            return [work(each) for each in things]
        self._apart = True
        try:
            done = [work(each) for each in self.mine(things)]
        finally:
            self._apart = False
        parts = self.gathered(done)
        return [parts[number % self.size][number // self.size] for number in range(len(things))]

    def check_same(self, what: str, told: Any) -> None:
        """Raises `ProcessesError` unless all processes say the same of `what`."""
        if self.size > 1:
            number = zlib.crc32(repr(told).encode())
            others = [size for _, size in self._exchange("same", number)]
            if unlike := [rank for rank, each in enumerate(others) if each != others[0]]:
                raise ProcessesError(f"{what} of rank {unlike[0]} differs from that of rank 0; give all ranks the same")

    # ------------------------------------------------------------------------------------------------- together

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Inside, all processes do the same, and part when all have. Where one fails, all raise an error of its kind.

        Raises `ProcessesError` where some do not come, or stop on the way.
        """
        if self.size == 1 or self._inside:
            yield
            return
        self._meet(what)
        self._inside = True
        try:
            yield
            self._exchange("part", 0)
        except ProcessesError:
            raise
        except Exception as error:
            if not getattr(error, "of_another", False):
                self._tell(error)
            raise
        finally:
            self._inside = self._apart = False

    def _meet(self, what: str) -> None:
        """Wait until all are there; the first time, connect them."""
        store, key = self.group.get_group_store(), self._key()
        try:
            store.set(f"{key}/{self.rank}", what)
            if store.add(f"{key}/came", 1) >= self.size:
                store.set(f"{key}/all", "")
            if not _comes(store, f"{key}/all", min(_SOON, self.timeout)):
                logger.warning(
                    "%s: rank %d waits for other ranks of the process group, for they add up what the shares of "
                    "calibration say; where it is to work alone, call it in `with graphzip.processes(alone=True):`",
                    what,
                    self.rank,
                )
                if not _comes(store, f"{key}/all", max(self.timeout - _SOON, 0.0)):
                    missing = [rank for rank in range(self.size) if not store.check([f"{key}/{rank}"])]
                    store.add(f"{key}/came", -1)
                    store.delete_key(f"{key}/{self.rank}")
                    raise ProcessesError(
                        f"{what}: {_ranks(missing)} did not come within {self.timeout:g} seconds; call it in all ranks "
                        "of the process group, each with its share of calibration. Where this one is to work alone, "
                        "call it in `with graphzip.processes(alone=True):`; timeout= waits longer"
                    )
        except dist.DistError as error:
            raise ProcessesError(f"{what}: the process that holds the store of the group is gone; {_AGAIN}") from error
        self._meetings += 1
        if self._link is None:
            prefix = dist.distributed_c10d.PrefixStore(f"{key}/link", store)
            self._link = self._wait(
                lambda: dist.ProcessGroupGloo(prefix, self.rank, self.size, timedelta(seconds=_PATIENCE)), wait=False
            )

    def _key(self) -> str:
        """Of what this meeting has in the store of the group, which `torchrun` keeps when it starts all anew."""
        return f"graphzip/{os.environ.get(ATTEMPT, '0')}/{self._meetings}"

    def _tell(self, error: Exception) -> None:
        """Let the others raise this, too."""
        with contextlib.suppress(Exception):
            self._exchange("tell", 0, error)

    def _exchange(self, kind: str, size: int, error: Exception | None = None) -> list[tuple[int, int]]:
        """By rank a kind and a size. Raises what another process failed by."""
        if self._apart:
            raise AssertionError("what is divided among processes asks something of all of them")
        if not self._inside:
            raise AssertionError("processes that have not met ask something of each other")
        status = _GOES_ON if error is None else _FAILED
        own = torch.tensor([status, zlib.crc32(kind.encode()), size])
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(lambda: self._link.allgather([found], [own]))
        rows = [tuple(each.tolist()) for each in found]
        if any(row[0] == _FAILED for row in rows):
            self._raise(rows, error)
        if len({row[1] for row in rows}) > 1:
            raise ProcessesError(_DIFFERENT)
        return [(row[1], row[2]) for row in rows]

    def _raise(self, rows: Sequence[tuple[int, ...]], error: Exception | None) -> None:
        """What the first process failed by that did, in those that did not."""
        first = next(rank for rank, row in enumerate(rows) if row[0] == _FAILED)
        name = "OutOfMemoryError" if _is_out_of_memory(error) else type(error).__name__
        text = "" if error is None else f"{name}\n{error}"
        sent = torch.zeros(4096, dtype=torch.uint8)
        data = text.encode(errors="replace")[:4096]
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else sent[:0]
        options = dist.BroadcastOptions()
        options.rootRank = first
        self._wait(lambda: self._link.broadcast([sent], options))
        if error is None:
            name, _, message = bytes(sent.tolist()).rstrip(b"\0").decode(errors="replace").partition("\n")
            kind = torch.OutOfMemoryError if name == "OutOfMemoryError" else getattr(errors, name, ProcessesError)
            text = message if kind is not ProcessesError else f"{name}: {message}"
            failed: Any = kind(f"rank {first}: {text}")
            failed.of_another = True
            raise failed

    def _wait(self, begin: Callable[[], Any], *, wait: bool = True) -> Any:
        """What `begin` gives, when it is done. Raises `ProcessesError` where a process is gone."""
        try:
            work = begin()
            if wait:
                work.wait()
            return work
        except RuntimeError as error:
            self._link = None
            raise ProcessesError(f"{self._gone()}; {_AGAIN}") from error

    def _gone(self) -> str:
        """Which processes do not answer any more."""
        store, key = self.group.get_group_store(), f"{self._key()}/broken"
        try:
            store.set(f"{key}/{self.rank}", "")
            others = [rank for rank in range(self.size) if rank != self.rank]
            silent = [rank for rank in others if not _comes(store, f"{key}/{rank}", _ANSWER / len(others))]
        except (dist.DistError, RuntimeError):
            return "the process that holds the store of the process group is gone, and others may be"
        return f"{_ranks(silent)} did not answer" if silent else "the connection between the processes broke"


ALONE: Final = Processes()
"""One process for itself."""

_chosen: ContextVar[Processes | None] = ContextVar("processes", default=None)
_known: list[Processes] = []  # of the default process group, once it was asked for


def present() -> Processes:
    """Those that were chosen; else those of the default process group, where `torch.distributed` has one."""
    chosen = _chosen.get()
    return _of(None, _MEETING) if chosen is None else chosen


def sharing(calibration: Any) -> Processes:
    """Those that have shares of calibration data; where there is none, each works for itself."""
    return ALONE if calibration is None else present()


def _of(group: Any, timeout: float) -> Processes:
    """The processes of a group, connected once."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    group = dist.group.WORLD if group is None else group
    if dist.get_world_size(group) < 2:
        return ALONE
    for each in _known:
        if each.group is group:
            each.timeout = timeout
            return each
    found = Processes(group, timeout=timeout)
    _known[:] = [*_known[-3:], found]
    return found


@contextlib.contextmanager
def processes(group: Any = None, *, alone: bool = False, timeout: float = _MEETING) -> Iterator[None]:
    """Inside, graphzip works over the processes of `group`, or with `alone` in this one process only.

    Where `torch.distributed` is initialised, functions that are given `calibration=` work over the default process
    group without this: every rank calls them, with the same model and options and its own share of the data, rank r of
    w the batches r, r + w, ...; a share may be empty. Statistics are added up over all ranks, and every rank ends with
    the same. `timeout` is how many seconds ranks wait until all of them have called; while they work, they wait for
    each other as long as that takes.

    Raises `ProcessesError` for a group that this process is not in.
    """
    if group is not None and dist.is_available() and dist.is_initialized() and dist.get_rank(group) < 0:
        raise ProcessesError("processes: this process is not in the group; call it in those that are")
    token = _chosen.set(ALONE if alone else _of(group, timeout))
    try:
        yield
    finally:
        _chosen.reset(token)


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


def _comes(store: Any, key: str, seconds: float) -> bool:
    """Whether a key is there within so many seconds."""
    end, pause = time.monotonic() + seconds, 0.001
    while not store.check([key]):  # its own way to wait writes to stderr
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2.0 * pause, 0.1)
    return True


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _packed(value: Any) -> torch.Tensor:
    """As bytes; of a tensor that is a view its own numbers alone."""
    buffer = io.BytesIO()
    torch.save(pytree.tree_map_only(torch.Tensor, _whole, value), buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone() if value.untyped_storage().nbytes() > value.nbytes else value.detach()


def _unpacked(data: torch.Tensor) -> Any:
    """What another process of this job packed; what was on its accelerator is on that of this one."""

    def place(storage: Any, where: str) -> Any:
        return torch.serialization.default_restore_location(storage, where.partition(":")[0])  # type: ignore[no-untyped-call]

    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location=place, weights_only=False)
