"""Zip: identical and permuted networks stay what they are, and what is shared is stored once."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zip_worker
from nets import Net
from torch import Tensor, nn
from zip_nets import own_parameters, permuted, randomized

import graphzip as gz


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def mlp(inputs: int = 12, widths: tuple[int, int] = (20, 9), classes: int = 4) -> nn.Module:
    one, two = widths
    layers = nn.Linear(inputs, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, classes)
    return nn.Sequential(*layers)


def flattened() -> nn.Module:
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3)
    return nn.Sequential(*first, *second)


def residual() -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        x = net.bn1(net.conv1(x)).relu()
        x = (x + net.bn3(net.conv3(net.bn2(net.conv2(x)).relu()))).relu()
        x = (net.down(x) + net.bn4(net.conv4(x))).relu()
        return net.head(x.mean((2, 3)))

    return Net(
        run,
        conv1=nn.Conv2d(3, 8, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 6, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(6),
        conv3=nn.Conv2d(6, 8, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(8),
        conv4=nn.Conv2d(8, 10, 3, stride=2, padding=1, bias=False),
        bn4=nn.BatchNorm2d(10),
        down=nn.Conv2d(8, 10, 1, stride=2),
        head=nn.Linear(10, 3),
    )


def dense() -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        x = net.conv1(x)
        y = net.conv2(net.norm(x).relu())
        x = torch.cat([x, y], 1)
        z = net.conv3(net.norm2(x).relu())
        return net.head(torch.cat([x, z], 1).relu().mean((2, 3)))

    return Net(
        run,
        conv1=nn.Conv2d(3, 6, 3),
        norm=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 4, 3, padding=1),
        norm2=nn.BatchNorm2d(10),
        conv3=nn.Conv2d(10, 5, 1),
        head=nn.Linear(15, 3),
    )


def depthwise() -> nn.Module:
    first = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
    middle = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
    last = nn.Conv2d(8, 6, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    return nn.Sequential(*first, *middle, *last)


def grouped() -> nn.Module:
    first = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
    middle = nn.Conv2d(12, 9, 3, padding=1, groups=3), nn.BatchNorm2d(9), nn.ReLU()
    last = nn.Conv2d(9, 6, 3, groups=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    return nn.Sequential(*first, *middle, *last)


class Encoder(nn.Module):
    """A small vision transformer with a packed projection, as torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.place = nn.Parameter(torch.randn(1, 16, 12))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        out: Tensor = self.head(self.norm3(x).mean(1))
        return out


IMAGES = (2, 3, 8, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3, 12)),
    "flattened": (flattened, IMAGES),
    "residual": (residual, IMAGES),
    "dense": (dense, IMAGES),
    "depthwise": (depthwise, IMAGES),
    "grouped": (grouped, IMAGES),
    "encoder": (Encoder, IMAGES),
}


def batches(*shape: int, count: int = 1) -> list[Tensor]:
    return [torch.randn(16, *shape[1:], dtype=torch.float64) for _ in range(count)]


def zipped(nets: dict[str, nn.Module], x: Tensor, *, shares: Any = 1.0, **options: Any) -> gz.Compiled:
    plan = gz.Plan([gz.Zip(share=shares, **options)])
    data = batches(*x.shape)
    return gz.compile(nets, plan, dict.fromkeys(nets, (x,)), calibration=dict.fromkeys(nets, data))


SLOW = pytest.mark.slow
CASES = [
    *((name, "permuted") for name in NETWORKS),
    ("residual", "identical"),
    *(pytest.param(name, "identical", marks=SLOW) for name in NETWORKS if name != "residual"),
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_lossless(name: str, how: str) -> None:
    make, shape = NETWORKS[name]
    net, x = randomized(make()), torch.randn(shape, dtype=torch.float64)
    twin = copy.deepcopy(net) if how == "identical" else permuted(net, (x,))
    expected = net(x)
    torch.testing.assert_close(twin(x), expected, rtol=1e-9, atol=1e-12)
    result = zipped({"a": net, "b": twin}, x)
    for task in result.tasks:
        torch.testing.assert_close(result.task(task)(x), expected, rtol=1e-9, atol=1e-11)
        assert len(own_parameters(result, task)) == 1, "the head alone is a task's own"
    head = sum(p.numel() for p in list(net.parameters())[-2:])
    assert result.report.after.params == sum(p.numel() for p in net.parameters()) + head
    assert result.report.changed


@pytest.mark.parametrize(
    ("pairing", "metric"),
    [("greedy", "hessian"), pytest.param("greedy", "euclidean", marks=SLOW), ("optimal", "euclidean")],
)
def test_the_permutation_is_found(pairing: str, metric: str) -> None:
    net, x = randomized(residual()), torch.randn(IMAGES, dtype=torch.float64)
    result = zipped({"a": net, "b": permuted(net, (x,))}, x, pairing=pairing, metric=metric)
    torch.testing.assert_close(result.task("b").conv3.weight, net.conv3.weight)  # type: ignore[union-attr]


def test_part_is_shared() -> None:
    net, x = randomized(flattened()), torch.randn(IMAGES, dtype=torch.float64)
    twin = permuted(net, (x,))
    result = zipped({"a": net, "b": twin}, x, shares={"0": 0.5, "4": 4, "7": 5})
    for task in result.tasks:
        torch.testing.assert_close(result.task(task)(x), net(x), rtol=1e-9, atol=1e-11)
    sizes = {name: tuple(p.shape) for name, p in result.task("b").named_parameters()}
    assert sizes["0.shared_a_b.weight"] == (4, 3, 3, 3)
    assert sizes["0.own.weight"] == (4, 3, 3, 3)
    assert sizes["4.shared_a_b.weight"] == (4, 4, 2, 2)
    assert sizes["4.own.weight"] == (4, 4, 2, 2)
    assert sizes["4.own_2.weight"] == (2, 8, 2, 2)
    assert sizes["7.shared_a_b.weight"] == (5, 16)
    report = result.report
    saved = 4 * 27 + (4 * 4 * 4 + 4) + (5 * 16 + 5)
    assert report.before.params - report.after.params == saved + report_of_norms(result)


def test_a_grouped_convolution_is_shared_where_its_inputs_are() -> None:
    """A group of it shares its rows with the other network's only where they read the same."""
    net, x = randomized(grouped()), torch.randn(IMAGES, dtype=torch.float64)
    other = randomized(grouped())
    data = {name: batches(*IMAGES) for name in "ab"}
    inputs = dict.fromkeys("ab", (x,))
    compiled = gz.compile({"a": net, "b": other}, gz.Plan([gz.Zip(share=0.75)]), inputs, calibration=data)
    sizes = {name: tuple(p.shape) for name, p in compiled.task("b").named_parameters()}
    assert sizes["0.shared_a_b.weight"] == (9, 3, 1, 1)
    assert sizes["3.weight"] == (9, 4, 3, 3), "no group of it has all of its inputs in common"
    whole = gz.compile({"a": net, "b": other}, gz.Plan([gz.Zip(share={"0": 1.0, "3": 0.67})]), inputs, calibration=data)
    sizes = {name: tuple(p.shape) for name, p in whole.task("b").named_parameters()}
    assert sizes["3.shared_a_b.weight"] == (6, 4, 3, 3)
    assert sizes["3.own.weight"] == (3, 4, 3, 3)
    for name in "ab":
        expected = whole.module(a=x, b=x)[name]
        torch.testing.assert_close(whole.task(name)(x), expected, rtol=0, atol=0)


def test_three_grouped_networks() -> None:
    net, x = randomized(grouped()), torch.randn(IMAGES, dtype=torch.float64)
    nets = {"a": net, "b": permuted(net, (x,), 1), "c": permuted(net, (x,), 2)}
    result = zipped(nets, x)
    for task in nets:
        torch.testing.assert_close(result.task(task)(x), net(x), rtol=1e-9, atol=1e-11)
        assert own_parameters(result, task) == {"10"}


def report_of_norms(result: gz.Compiled) -> int:
    """Parameters of batch norms that came out shared."""
    one, two = (dict(result.task(name).named_parameters()) for name in "ab")
    return sum(p.numel() for name, p in one.items() if name.startswith("1.") and two.get(name) is p) + sum(
        p.numel() for name, p in one.items() if name == "0.bias" and two.get(name) is p
    )


def test_part_of_a_residual_network_with_training(tmp_path: Path) -> None:
    net, x = randomized(residual()).float(), torch.randn(IMAGES)
    other = randomized(residual()).float()
    plan = gz.Plan([gz.Zip(share=0.5, metric="euclidean")])
    stages: list[str] = []

    def retrain(prepared: gz.Prepared, stage: str) -> None:
        stages.append(stage)
        optimizer = prepared.optimizer(torch.optim.SGD, lr=0.01)
        out = prepared(a=x, b=x)
        (out["a"].square().mean() + out["b"].square().mean()).backward()
        optimizer.step()

    result = gz.compile({"a": net, "b": other}, plan, {"a": (x,), "b": (x,)}, train=retrain)
    assert stages == [f"zip/{name}" for name in ("conv1", "conv2", "conv3", "down", "conv4")]
    a, b = dict(result.task("a").named_parameters()), dict(result.task("b").named_parameters())
    assert a["conv3.shared_a_b.weight"] is b["conv3.shared_a_b.weight"]
    assert a["conv3.shared_a_b.weight"].shape == (4, 3, 3, 3)
    report = result.export(tmp_path / "joint.onnx")
    assert report.verified
    assert (tmp_path / "joint.onnx").stat().st_size < 4 * result.report.after.params + 20_000
    assert result.export(tmp_path / "out", per_task=True).verified
    result.save(tmp_path / "joint.safetensors")
    loaded = gz.load(tmp_path / "joint.safetensors")
    torch.testing.assert_close(loaded.task("b")(x), result.task("b")(x))
    assert loaded.report.after.params == result.report.after.params


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_without_training_the_networks_are_not_copied_first(share: float) -> None:
    """The result is the one that a prepared copy gives, and has no tensor of the networks themselves."""
    nets = {"a": randomized(residual()), "b": randomized(residual())}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    plan, inputs = gz.Plan([gz.Zip(share=share)]), dict.fromkeys(nets, (x[:2],))
    calibration = {key: [x] for key in nets}
    compiled = gz.compile(nets, plan, inputs, calibration=calibration)
    prepared = gz.prepare(nets, plan, inputs, calibration=calibration)
    for _ in prepared.steps():
        pass
    expected = prepared.convert().module.state_dict()
    found = compiled.module.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    own = {tensor.data_ptr() for net in nets.values() for tensor in net.state_dict().values()}
    held = [*compiled.module.state_dict().values(), *compiled.traced.module.state_dict().values()]
    assert own.isdisjoint(tensor.data_ptr() for tensor in held)
    for name, net in nets.items():
        assert all(torch.equal(before[name][key], tensor) for key, tensor in net.state_dict().items())


def test_an_optimizer_of_an_earlier_layer_is_refused() -> None:
    nets, x = {"a": mlp().double(), "b": mlp().double()}, torch.randn(3, 12, dtype=torch.float64)
    data = {name: batches(3, 12) for name in nets}
    prepared = gz.prepare(nets, gz.Plan([gz.Zip()]), dict.fromkeys(nets, (x,)), calibration=data)
    steps = prepared.steps()
    next(steps)
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.1)
    optimizer.step()
    next(steps)
    with pytest.raises(gz.GraphZipError, match="made for a stage that has ended"):
        optimizer.step()


def test_calibration_that_is_not_finite_is_refused() -> None:
    nets, x = {"a": mlp().double(), "b": mlp().double()}, torch.randn(3, 12, dtype=torch.float64)
    data = {"a": batches(3, 12), "b": [torch.full((3, 12), torch.inf, dtype=torch.float64)]}
    with pytest.raises(gz.WeightsError, match="reads or gives values that are NaN or infinite"):
        gz.compile(nets, gz.Plan([gz.Zip()]), dict.fromkeys(nets, (x,)), calibration=data)


def test_rows_in_parts_are_zipped_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {"a": randomized(residual()), "b": randomized(residual())}
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    plan, inputs, data = gz.Plan([gz.Zip()]), dict.fromkeys(nets, (x[:2],)), {name: [x] for name in nets}
    expected = gz.compile(nets, plan, inputs, calibration=data).module.state_dict()
    for module in ("solve", "weights"):
        monkeypatch.setattr(f"graphzip_passes.zip.{module}.BLOCK", 3)
    found = gz.compile(nets, plan, inputs, calibration=data).module.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_mapped_networks_are_never_all_in_memory(tmp_path: Path) -> None:
    """Beside one layer's workings and the result there is no copy of a network that is mapped from a file."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # what is freed is given back
    worker = str(Path(__file__).parents[2] / "support" / "workers" / "mapped_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(tmp_path)], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.0


def test_files_store_shared_weights_once(tmp_path: Path) -> None:
    net, x = randomized(flattened()).float(), torch.randn(IMAGES)
    twin = copy.deepcopy(net)
    plan = gz.Plan([gz.Zip(metric="euclidean")])
    result = gz.compile({"a": net, "b": twin}, plan, {"a": (x,), "b": (x,)})
    result.export(tmp_path / "joint.onnx")
    model = onnx.load(tmp_path / "joint.onnx")
    stored = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert stored <= 1.02 * sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.buffers()) + 24


def test_three_networks_one_after_the_other() -> None:
    net, x = randomized(residual()), torch.randn(IMAGES, dtype=torch.float64)
    nets = {"a": net, "b": permuted(net, (x,), 1), "c": permuted(net, (x,), 2)}
    whole = zipped(nets, x)
    part = zipped(nets, x, shares=0.5, order=["c", "a", "b"])
    for result in (whole, part):
        for task in result.tasks:
            torch.testing.assert_close(result.task(task)(x), net(x), rtol=1e-9, atol=1e-11)
    assert all(own_parameters(whole, task) == {"head"} for task in whole.tasks)
    assert whole.report.after.params < part.report.after.params < whole.report.before.params


def test_the_joint_weights_of_three_networks_fit_them_best() -> None:
    """Behind a zipped layer they are the least squares fit to what each network's own layer gave."""
    nets: dict[str, nn.Module] = {
        name: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)).double().eval() for name in "abc"
    }
    data = {name: torch.randn(40, 6, dtype=torch.float64) for name in nets}
    plan = gz.Plan(
        [gz.Zip(damping=1e-12, refit=False, match={name: {str(n): str(n) for n in range(3)} for name in "bc"})]
    )
    inputs = {name: (x[:2],) for name, x in data.items()}
    compiled = gz.compile(nets, plan, inputs, calibration={name: [x] for name, x in data.items()})
    read, wanted = [], []
    for name, x in data.items():
        slim = compiled.task(name)
        hidden = slim.get_submodule("0")(x)
        read.append(torch.cat([hidden, torch.ones(40, 1, dtype=torch.float64)], 1))
        given = nets[name][1](nets[name][0](x))
        order = order_of(slim.get_submodule("2").weight, nets[name][2].weight)
        wanted.append(given[:, order])
    fitted = torch.linalg.lstsq(torch.cat(read), torch.cat(wanted)).solution
    slim = compiled.task("a")
    torch.testing.assert_close(slim.get_submodule("1").weight, fitted[:-1].T, rtol=1e-6, atol=1e-8)


def order_of(weight: Tensor, before: Tensor) -> Tensor:
    """Which column of `before` each column of `weight` was."""
    return (weight.T.unsqueeze(1) - before.T).abs().sum(2).argmin(1)


def test_other_inputs_widths_and_heads() -> None:
    a, b = randomized(mlp(12, (20, 9), 4)), randomized(mlp(10, (16, 11), 7))
    xa, xb = (torch.randn(3, width, dtype=torch.float64) for width in (12, 10))
    data = {"a": batches(3, 12), "b": batches(3, 10)}
    result = gz.compile({"a": a, "b": b}, gz.Plan([gz.Zip()]), {"a": (xa,), "b": (xb,)}, calibration=data)
    one, two = dict(result.task("a").named_parameters()), dict(result.task("b").named_parameters())
    assert one["0.shared_a_b.weight"] is two["0.shared_a_b.weight"]
    assert one["0.shared_a_b.weight"].shape == (16, 10)
    assert {name: tuple(p.shape) for name, p in one.items() if name.startswith("0.") and name.endswith("weight")} == {
        "0.shared_a_b.weight": (16, 10),
        "0.own.weight": (16, 2),
        "0.own_2.weight": (4, 12),
    }
    assert two["2.shared_a_b.weight"].shape == (9, 16)
    assert result.task("a")(xa).shape == (3, 4)
    assert result.task("b")(xb).shape == (3, 7)


def test_zipping_moves_outputs_less_than_random_sharing() -> None:
    a, b, x = randomized(mlp()), randomized(mlp()), torch.randn(3, 12, dtype=torch.float64)
    nets = {"a": a, "b": b}
    found = {metric: zipped(nets, x, metric=metric, refit=False).report.drift for metric in ("hessian", "random")}
    assert 0.0 < found["hessian"] < found["random"]  # type: ignore[operator]


def test_a_threshold_shares_what_is_near() -> None:
    a, x = randomized(mlp()), torch.randn(3, 12, dtype=torch.float64)
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].weight[::2] += 1.0  # type: ignore[index, union-attr, operator]
    result = zipped({"a": a, "b": b}, x, threshold={"0": 1e-9})
    assert dict(result.task("a").named_parameters())["0.shared_a_b.weight"].shape == (10, 12)
    for task, net in (("a", a), ("b", b)):
        torch.testing.assert_close(result.task(task)(x), net(x))


def test_zeros_stay_zero() -> None:
    a, b, x = randomized(mlp()), randomized(mlp()), torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        for net, share in ((a, 0.5), (b, 0.4)):
            for layer in net.children():
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(torch.rand_like(layer.weight) < share)
    result = zipped({"a": a, "b": b}, x, damping=1e-6)
    kept = [int((net[0].weight != 0).sum(1).max()) for net in (a, b)]  # type: ignore[index, union-attr]
    joint = result.task("a").get_submodule("0").weight
    assert int((joint != 0).sum(1).max()) <= max(kept)  # type: ignore[union-attr, operator]


def test_layers_of_other_names() -> None:
    net, x = randomized(mlp()), torch.randn(3, 12, dtype=torch.float64)
    twin = permuted(net, (x,))
    named = nn.Sequential()
    for name, layer in zip("pqrst", twin.children(), strict=True):
        named.add_module(name, layer)
    in_order = zipped({"a": net, "b": named.eval()}, x)
    by_hand = zipped({"a": net, "b": named.eval()}, x, match={"b": {"0": "p", "2": "r"}})
    for result in (in_order, by_hand):
        torch.testing.assert_close(result.task("b")(x), net(x))
        assert result.task("a").get_submodule("2").weight is result.task("b").get_submodule("r").weight


def test_plan_file(tmp_path: Path) -> None:
    plan = gz.Plan([gz.Zip(share={"fc*": 0.5, "*": 3}, metric="euclidean", match={"b": {"fc1": "one"}})])
    plan.save(tmp_path / "plan.yaml")
    assert gz.Plan.load(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"share": 1.5}, r"zip.share: 1.5 is not an amount to share; write a float from 0 to 1"),
        ({"threshold": 0.0}, r"zip.threshold: 0.0 is not a threshold; write a number above 0"),
        ({"alpha": 1.0}, r"zip.alpha: 1.0 does not balance two errors; write a number between 0 and 1"),
        ({"damping": 0}, r"zip.damping: 0 is not a damping; write a number above 0"),
        ({"pairing": "best"}, r"zip.pairing: 'best' is not one of 'optimal', 'greedy'"),
        ({"metric": "l1"}, r"zip.metric: 'l1' is not one of 'hessian', 'correlation', 'euclidean', 'random'"),
        ({"order": "ab"}, r"zip.order: 'ab' is not a list of the tasks, each once"),
        ({"match": ["fc"]}, r"zip.match: \['fc'\] is not a mapping from tasks to mappings of layers"),
        ({"match": {"b": 1}}, r"zip.match\['b'\]: 1 is not a mapping from the first task's layers to its own"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(gz.PlanError, match=text):
        gz.Zip(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"share": {"fc": 1.0}}, r"passes\[0\].zip.share: 'fc' matches no layer; there are: '0', '2', '4'"),
        ({"exclude": ["fc"]}, r"passes\[0\].zip.exclude: 'fc' matches no layer"),
        ({"order": ["a"]}, r"passes\[0\].zip.order: \['a'\] are not the tasks \['a', 'b'\]; name each of them once"),
        ({"match": {"a": {}}}, r"passes\[0\].zip.match: no task 'a' to match"),
        ({"match": {"b": {"9": "0"}}}, r"passes\[0\].zip.match\['b'\]: no layer '9'"),
        ({"match": {"b": {"0": "9"}}}, r"passes\[0\].zip.match\['b'\]\['0'\]: no layer '9'"),
        ({"match": {"b": {"0": "0", "2": "0"}}}, r"passes\[0\].zip.match\['b'\]: '0' is given for two layers"),
        ({"share": 30}, r"passes\[0\].zip.share: 30 channels of '0', but only 20 can be shared"),
        ({"metric": "hessian"}, r"passes\[0\].zip.metric: 'hessian' needs calibration data; pass calibration="),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    x = torch.randn(3, 12)
    plan = gz.Plan([gz.Zip(**{"metric": "euclidean", **options})])
    with pytest.raises(gz.PlanError, match=text):
        gz.compile({"a": mlp(), "b": mlp()}, plan, {"a": (x,), "b": (x,)})


def test_networks_that_do_not_correspond() -> None:
    x = torch.randn(3, 12)
    other = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 2))
    with pytest.raises(
        gz.PlanError, match=r"the layers of task 'b' \(2\) cannot be matched with those of the first task"
    ):
        gz.prepare({"a": mlp(), "b": other}, gz.Plan([gz.Zip()]), {"a": (x,), "b": (x,)})


class Shuffled:
    """Batches in another order every time."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(self.batches[self.passes % 2 :] + self.batches[: self.passes % 2])


def test_calibration_that_is_shuffled_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 12)
    data = {name: Shuffled([torch.randn(8, 12), torch.randn(8, 12)]) for name in "ab"}
    nets = {"a": mlp().eval(), "b": mlp().eval()}
    with caplog.at_level("WARNING"):
        gz.compile(nets, gz.Plan([gz.Zip()]), dict.fromkeys(nets, (x,)), calibration=data)
    assert "task 'a': its calibration batches differ from pass to pass; do not shuffle them" in caplog.text


@pytest.mark.slow
def test_processes_that_calibrate_on_parts(tmp_path: Path) -> None:
    """Two processes with half of the data each give what one gives with all of it."""
    worker = Path(__file__).parents[2] / "support" / "workers" / "zip_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in zip_worker.zipped().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-7, atol=1e-9, msg=name)
