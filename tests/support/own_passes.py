"""Passes of one's own, as a user registers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphzip.plan.passes import PASS_OPTIONS
from graphzip_passes.base import PASSES, register_pass

__all__ = ["registered"]


@contextmanager
def registered(options: Any, function: Callable[..., Any], **how: bool) -> Iterator[None]:
    """Inside, the pass is known."""
    try:
        register_pass(options, function, **how)
        yield
    finally:
        if PASSES.pop(options, None) is not None:
            del PASS_OPTIONS[options.kind]
