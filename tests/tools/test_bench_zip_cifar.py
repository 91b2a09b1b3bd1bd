"""Ways to merge networks that Zip is compared with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    pytest.importorskip("PIL")
    pytest.importorskip("scipy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("zip_cifar")
    for name in ("zip_cifar", "cifar", "common.merging", "common"):
        sys.modules.pop(name, None)


def network(bench: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return bench.CifarResNet(1, 4, 5).eval()


def shuffled(bench: Any, net: Any) -> Any:
    """The same network with other places for what its blocks hold inside."""
    other = network(bench, 0)
    other.load_state_dict(net.state_dict())
    for stage in (other.layer1, other.layer2, other.layer3):
        for block in stage:
            order = torch.randperm(len(block.conv1.weight))
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                getattr(block.bn1, leaf).data = getattr(block.bn1, leaf)[order]
            block.conv1.weight.data = block.conv1.weight[order]
            block.conv2.weight.data = block.conv2.weight[:, order]
    return other


@pytest.mark.parametrize("share", [1.0, 0.34])
@pytest.mark.parametrize("method", ["averaging", "permutation", "zipit"])
def test_equal_networks_are_merged_without_a_trace(bench: Any, method: str, share: float) -> None:
    net, images = network(bench, 0), torch.randn(6, 3, 32, 32)
    other = net if method == "averaging" else shuffled(bench, net)
    found = bench.merged(method, [net, other], share, images)
    with torch.no_grad():
        for each in found.values():
            torch.testing.assert_close(each(images), net(images), atol=1e-4, rtol=1e-4)


def test_rows_are_kept(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimpleNamespace(
        cache=tmp_path, shares=[1.0], methods=["averaging"], width=4, images=0, epochs=0, calibration=4, tests=20
    )
    nets = {task: network(bench, seed) for seed, task in enumerate(bench.TASKS)}
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    calibration = {task: torch.randn(4, 3, 32, 32) for task in nets}
    data = {"calibration": calibration, "test": (images, torch.arange(20) % 10)}
    (first,) = bench.rows(nets, data, options)
    assert set(first["plain"]) == {"joint", "own"}
    assert first["params"] < 2 * sum(p.numel() for p in nets["first"].parameters())
    monkeypatch.setattr(bench, "row", None)
    assert bench.rows(nets, data, options) == [first]
