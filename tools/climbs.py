"""How data walks through the house: the rooms that a path touches, and the calls that go back up a floor.

    python tools/climbs.py zip plan_for

A path is run once under `sys.setprofile`. Of every call of a function of `graphzip` or `graphzip_passes`, the caller is
the nearest function of these packages further out on the stack: what torch, numpy or the standard library call on
behalf of a room counts for the room. Where the user's own code stands in between (a score, a training loop), nobody of
ours has called; and the guards of public functions (`graphzip.boundary`) are looked through. A *climb* is a call whose
caller lives on a lower floor than its callee (`tools/floors.py`), counted once for each pair of modules, however often
it is made. Resuming a generator is such a call, too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from floors import floor_of, modules
from torch import nn

import graphzip as gz
from graphzip.boundary import is_users

LOOKED_THROUGH = "graphzip.boundary"


@dataclass
class Walk:
    """What was seen: modules that ran, and for each climb (a pair of modules) the functions of its first call."""

    rooms: set[str] = field(default_factory=set)
    climbs: dict[tuple[str, str], str] = field(default_factory=dict)

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """The profile function."""
        callee = _module(frame)
        if event != "call" or not _is_ours(callee) or callee == LOOKED_THROUGH:
            return
        self.rooms.add(callee)
        caller = _caller(frame)
        if caller is None:
            return
        above, below = floor_of(callee), floor_of(_module(caller))
        if above is not None and below is not None and below < above:
            names = f"{caller.f_code.co_name} calls {frame.f_code.co_name}"
            self.climbs.setdefault((_module(caller), callee), names)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__") or "")


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"graphzip", "graphzip_passes"}


def _caller(frame: FrameType) -> FrameType | None:
    """The nearest frame of ours further out, with no code of the user's in between."""
    outer = frame.f_back
    while outer is not None:
        module = _module(outer)
        if _is_ours(module) and module != LOOKED_THROUGH:
            return outer
        if is_users(module):
            return None
        outer = outer.f_back
    return None


@contextmanager
def watched() -> Iterator[Walk]:
    """Everything that runs inside is seen."""
    walk = Walk()
    sys.setprofile(walk.see)
    try:
        yield walk
    finally:
        sys.setprofile(None)


def _net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def _cnn() -> nn.Module:
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def zip_two() -> None:
    """`gz.compile` with `Zip` of two small networks, on calibration data."""
    models = {"a": _net(8), "b": _net(8)}
    inputs = {name: (torch.randn(4, 6),) for name in models}
    data = {name: [torch.randn(16, 6)] for name in models}
    gz.compile(models, gz.Plan([gz.Zip()]), inputs, calibration=data)


def plan_for() -> None:
    """`gz.plan_for` of a small convolutional network, on calibration data."""
    gz.plan_for(_cnn(), (torch.randn(2, 3, 8, 8),), macs=0.6, calibration=[torch.randn(16, 3, 8, 8)])


def compile_merge() -> None:
    """`gz.compile` with `ClusterMerge` of the same network."""
    gz.compile(_cnn(), gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(2, 3, 8, 8),))


PATHS: dict[str, Callable[[], None]] = {"zip": zip_two, "plan_for": plan_for, "compile": compile_merge}


def main() -> None:
    """Run the paths that are named, and print their climbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"one of {', '.join(PATHS)}; all by default")
    chosen = parser.parse_args().paths or list(PATHS)
    for name in chosen:
        if name not in PATHS:
            parser.error(f"{name!r} is no path; there are {', '.join(PATHS)}")
    for module in modules():
        importlib.import_module(module)
    for name in chosen:
        torch.manual_seed(0)
        with watched() as walk:
            PATHS[name]()
        print(f"{name}: {len(walk.rooms)} modules, {len(walk.climbs)} climbs")
        for (caller, callee), how in sorted(walk.climbs.items()):
            print(f"  {caller} -> {callee}  ({how})")


if __name__ == "__main__":
    main()
