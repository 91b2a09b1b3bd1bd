"""Where a model is measured, and batches that its memory is enough for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.devices import moved_model
from graphzip.numeric.moments import Moments
from graphzip.numeric.solvers import products

MOST = 6
DATA = list(torch.randn(2, 16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
PLAN = gz.Plan([gz.PruneChannels(keep=0.5, compensate="data")])


class Small(nn.Module):
    """A network on a device with room for so many samples."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(96, 3)
        self.most = most
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and len(x) > self.most:
            raise torch.OutOfMemoryError("no room")
        return self.head(self.second(self.first(x).relu()).relu().flatten(1))


def small(most: int = MOST) -> Small:
    torch.manual_seed(0)
    return Small(most).double().eval()


def compiled(model: nn.Module, plan: gz.Plan = PLAN, **given: Any) -> dict[str, Tensor]:
    given = {"calibration": DATA, **given}
    return gz.compile(model, plan, (DATA[0][:2],), **given).module.state_dict()


@pytest.fixture(scope="module")
def wanted() -> dict[str, Tensor]:
    return compiled(small(most=64))


def test_batches_get_smaller_until_they_fit(wanted: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """Sums over samples do not depend on how these are divided."""
    with caplog.at_level(logging.WARNING):
        found = compiled(small())
    assert [record.args for record in caplog.records if "out of memory" in record.msg] == [(16, 8), (8, 4)]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_a_plan_is_that_of_batches_that_fit() -> None:
    given: dict[str, Any] = {"macs": 0.5, "effort": "fast", "passes": [gz.PruneChannels()]}
    fitting = [part for batch in DATA for part in batch.split(4)]
    wanted = gz.plan_for(small(64), (DATA[0][:2],), calibration=fitting, **given)
    assert gz.plan_for(small(), (DATA[0][:2],), calibration=DATA, **given) == wanted


def test_the_device_that_the_model_is_on(wanted: dict[str, Tensor]) -> None:
    model = small(64)
    found = compiled(model, device="cpu")
    assert moved_model(model, torch.device("cpu")) is model
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_result_moves_as_a_whole() -> None:
    """Module, graph and example inputs; a plan without data needs no numbers."""
    result = gz.compile(small(), gz.Plan([gz.PruneChannels(keep=0.5)]), (DATA[0][:2],))
    result.move(torch.device("meta"))
    held = [*result.module.parameters(), *result.traced.module.parameters(), *result.example_inputs]
    assert all(each.is_meta for each in held)
    values = [node.meta["val"] for node in result.traced.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert {each.device.type for each in values} == {"meta"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(wanted: dict[str, Tensor]) -> None:
    model = small(64)
    plan = gz.plan_for(model, (DATA[0][:2],), macs=0.5, calibration=DATA, device="cuda")
    assert plan == gz.plan_for(model, (DATA[0][:2],), macs=0.5, calibration=DATA)
    for each in (PLAN, plan):
        found, same = (compiled(model, each, device=device) for device in ("cuda", None))
        assert {value.device.type for value in found.values()} == {"cpu"}
        for name, value in same.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=name)
    assert {each.device.type for each in model.parameters()} == {"cpu"}


def test_float32_reaches_float64_where_means_are_large() -> None:
    """Products of float32 rows are added up in float64 over a long stream, so that nothing is lost on the way."""
    generator = torch.Generator().manual_seed(0)
    total, exact = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    plain = torch.zeros(6, 6)
    for _ in range(400):
        rows = torch.randn(512, 6, generator=generator) + 100
        total += products(rows[None], rows[None])[0]
        plain += rows.T @ rows
        exact += rows.double().T @ rows.double()
    assert float(((total - exact) / exact).abs().max()) < 2e-7
    assert float(((plain.double() - exact) / exact).abs().max()) > 2e-7


def test_rows_of_a_device_are_moments_as_well() -> None:
    moments = Moments(2)
    rows = torch.randn(5, 2, dtype=torch.float64)
    moments.add(rows)
    torch.testing.assert_close(moments.dense(), rows.T @ rows / 5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("meta", r"device: 'meta' has no numbers to measure; write 'cuda' or 'cpu', or leave it out"),
        ("fast", r"device: 'fast' is no device; write 'cuda', 'cuda:1' or 'cpu'"),
        (["cpu"], r"device: \['cpu'\] is no device"),
        ("xpu", r"device: 'xpu' cannot be used here for float64 \("),
    ],
)
def test_devices_that_nothing_is_measured_on(device: Any, said: str) -> None:
    for call in (gz.compile, gz.WidthStudy, gz.plan_for):
        plan = {"plan": PLAN} if call is gz.compile else {"macs": 0.5} if call is gz.plan_for else {}
        with pytest.raises(gz.PlanError, match=said):
            call(small(), example_inputs=(DATA[0],), device=device, **plan)


def test_a_model_on_several_devices() -> None:
    model = small()
    model.head.to("meta")
    with pytest.raises(gz.PlanError, match="device: the model is on cpu, meta, and its result can be only on one"):
        compiled(model, device="cpu")


def test_a_trace_stays_where_it_is() -> None:
    traces = {"a": gz.trace(small(), (DATA[0][:2],))}
    with pytest.raises(gz.PlanError, match="device: a Trace has its model where that is; give the model, or leave"):
        gz.compile(traces, gz.Plan([gz.Zip()]), device="cpu")


def test_one_sample_is_not_split() -> None:
    with pytest.raises(gz.GraphZipError, match="a batch of calibration of 1, which is not split, for it has"):
        compiled(small(most=0))


def test_a_mean_over_a_batch_is_not_split() -> None:
    labelled = [(each, torch.zeros(16, dtype=torch.int64)) for each in DATA]
    plan = gz.Plan([gz.PruneChannels(keep=0.5, criterion="taylor")])
    with pytest.raises(gz.GraphZipError, match="of 16, which is not split, for loss= is the mean over a batch; give"):
        compiled(small(), plan, calibration=labelled, loss=nn.functional.cross_entropy)


def test_one_of_several_processes_does_not_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphzip.devices._has_others", lambda: True)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        gz.plan_for(small(), (DATA[0][:2],), macs=0.5, calibration=DATA)


class Fixed(Small):
    """It takes sixteen samples and no other number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(16, 3, 8, 8))


def test_a_batch_of_one_size_is_not_split() -> None:
    torch.manual_seed(0)
    model = Fixed().double().eval()
    with pytest.raises(gz.GraphZipError, match=r"the model takes no batches of 8 \(.*give smaller ones that it takes"):
        gz.compile(model, PLAN, (DATA[0],), calibration=DATA)


def test_threads_are_the_callers() -> None:
    """Nothing but the demo, a program of its own, says how many threads PyTorch has."""
    root = Path(gz.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "passes").rglob("*.py")]
    setting = [path.name for path in files if "set_num_threads(" in path.read_text() and path.parent.name != "commands"]
    assert len(files) > 100
    assert setting == []
