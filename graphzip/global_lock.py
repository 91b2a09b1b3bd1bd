"""One thread at a time works with what all threads share.

Tracing replaces functions and methods of torch, and silences loggers, warnings and streams; so does the ONNX exporter.
Two threads that each put back what they found would leave what the other had put there, and a size that one thread
computes with would be looked for in the trace of the other. So public functions wait for each other. While code of the
user runs that may take long, or wait for another thread, others may go on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["ALONE"]


class _Alone:
    """A lock that a thread may take several times, and let go of altogether for a while."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew, in a process that was forked while another thread held the lock."""
        self._lock = threading.RLock()
        self._held = threading.local()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._held.times = getattr(self._held, "times", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._held.times -= 1
        self._lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside, other threads may have it."""
        times = getattr(self._held, "times", 0)
        for _ in range(times):
            self.__exit__()
        try:
            yield
        finally:
            for _ in range(times):
                self.__enter__()


ALONE: Final = _Alone()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ALONE.renew)
