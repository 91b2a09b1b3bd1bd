"""The main job on real data in under a minute: train, group, cluster-merge, export, verify, compare.

A small residual network learns scikit-learn's handwritten digits (1,797 grey images of 8 x 8). Then every channel group
is merged to half its width: while training goes on, the channels of a cluster are drawn together a little more after
each step (in the manner of Centripetal SGD), until they are identical and merging them changes nothing.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.errors import ExportError
from graphzip.files import check_target, write_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DemoResult", "DigitsNet", "Measured", "check_folder", "digits_net", "run"]

THREADS = 1
BATCH = 64
EPOCHS = 8
MERGE_EPOCHS = 8
RATE = 0.05
LATENCY_RUNS = 200
TEST_IMAGES = 450


@dataclass(frozen=True)
class Measured:
    """One ONNX file: accuracy in [0, 1] on the test images, size in bytes, median milliseconds for `batch` images."""

    accuracy: float
    params: int
    macs: int
    bytes: int
    latency_ms: float
    batch: int = BATCH

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class DemoResult:
    """The network's channel groups, and both of its ONNX files measured; `files` are those that were kept."""

    groups: gz.ChannelGroups
    before: Measured
    after: Measured
    files: tuple[Path, ...]


class Block(nn.Module):
    """A residual block of two convolutions, with a projection where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inner, h, w) to (n, outer, h / stride, w / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for digits: (n, 1, 8, 8) to logits (n, 10)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, width)
        self.block2 = Block(width, 2 * width, stride=2)
        self.block3 = Block(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = torch.relu(self.bn(self.stem(x)))
        y = self.block3(self.block2(self.block1(y)))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def digits_net() -> DigitsNet:
    """The demo's network, untrained: a factory for the command line."""
    return DigitsNet()


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] and their digits (n)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def run(*, seed: int = 0, out: Path | None = None, tell: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Run the demo; `tell` hears what is being done. With `out`, a folder, both ONNX files stay there.

    Raises `ExportError` where `out` cannot be made, and whatever the library refuses.
    """
    check_folder(out)
    with _settings(seed), tempfile.TemporaryDirectory() as scratch:
        data = _load_digits(seed)
        example = (data.train[0][:BATCH],)
        tell("training a residual network on scikit-learn's digits")
        model = DigitsNet()
        _train(model, data, seed)
        groups = gz.channel_groups(model, example)
        tell("drawing clustered channels together")
        prepared = gz.prepare(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), example, seed=seed)
        _train_clusters(prepared, data, seed)
        tell("exporting and verifying")
        files = Path(scratch, "before.onnx"), Path(scratch, "after.onnx")
        compiled = gz.compile(model, gz.Plan([]), example), prepared.convert()
        sizes = [one.export(file).bytes for one, file in zip(compiled, files, strict=True)]
        tell("measuring in onnxruntime")
        sessions = [_session(file) for file in files]
        latencies = _latencies(sessions, example[0].numpy())
        measured = [
            Measured(_accuracy(session, data.test), one.report.after.params, one.report.after.macs, size, latency)
            for session, one, size, latency in zip(sessions, compiled, sizes, latencies, strict=True)
        ]
        kept = _keep(files, out) if out is not None else ()
    return DemoResult(groups, measured[0], measured[1], kept)


# ---------------------------------------------------------------------------------------------- data and training


@contextmanager
def _settings(seed: int) -> Iterator[None]:
    """One thread and the seed, and the caller's own afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _load_digits(seed: int) -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = (found.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(
        images, found.target.astype(np.int64), test_size=TEST_IMAGES, stratify=found.target, random_state=seed
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits((train_x, train_y), (test_x, test_y))


def _batches(data: tuple[Tensor, Tensor], epochs: int, seed: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Shuffled batches of all epochs, each with the share of the steps that is done, in (0, 1]."""
    images, digits = data
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(images) // BATCH
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(per_epoch):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            yield (epoch * per_epoch + step + 1) / (epochs * per_epoch), images[chosen], digits[chosen]


def _train(model: nn.Module, data: Digits, seed: int, *, after_step: Callable[[float], None] | None = None) -> None:
    """SGD with momentum and a cosine learning rate; `after_step` hears the share of the steps that is done."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
    epochs = MERGE_EPOCHS if after_step else EPOCHS
    model.train()
    for done, images, digits in _batches(data.train, epochs, seed):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
        loss = nn.functional.cross_entropy(model(images), digits)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if after_step is not None:
            after_step(done)
    model.eval()


def _train_clusters(prepared: gz.Prepared, data: Digits, seed: int) -> None:
    """Pull harder and harder; from the middle on the channels of a cluster are identical and train as one."""
    _train(prepared, data, seed + 1, after_step=lambda done: prepared.pull_(min(1.0, (2 * done) ** 3)))


# ---------------------------------------------------------------------------------------------- measuring


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _logits(session: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: images})[0]
    return logits


def _accuracy(session: Any, data: tuple[Tensor, Tensor]) -> float:
    images, digits = (part.numpy() for part in data)
    return float((_logits(session, images).argmax(1) == digits).mean())


def _latencies(sessions: list[Any], images: NDArray[np.float32]) -> list[float]:
    """Median milliseconds of each session; the runs take turns, so that what else the machine does hits all alike."""
    times = np.empty((LATENCY_RUNS, len(sessions)))
    for run_number in range(LATENCY_RUNS):
        for number, session in enumerate(sessions):
            start = time.perf_counter()
            _logits(session, images)
            times[run_number, number] = time.perf_counter() - start
    return [float(median) for median in 1e3 * np.median(times, axis=0)]


# ---------------------------------------------------------------------------------------------- files


def check_folder(out: Path | None) -> None:
    """Raises `ExportError` unless files can be kept in `out`, a directory that is there or can be made."""
    if out is None:
        return
    try:
        if out.is_dir():
            check_target(out / "before.onnx", ExportError)
            return
        if out.exists():
            raise ExportError(f"{out} is not a directory; give a directory for the two ONNX files")
        check_target(out, ExportError)
    except OSError as error:
        raise ExportError(f"cannot make {out}: {error.strerror or error}; choose another directory") from error


def _keep(files: tuple[Path, ...], out: Path) -> tuple[Path, ...]:
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot make {out}: {error.strerror or error}; choose another directory") from error
    for file in files:
        write_bytes(out / file.name, file.read_bytes(), ExportError)
    return tuple(out / file.name for file in files)
