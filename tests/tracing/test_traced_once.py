"""`gz.trace`: accepted wherever a model is, traced once, never changed, and never behind the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphzip as gz
from graphzip.graph.state import named_state
from graphzip.tracing import program

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 4)
        self.register_buffer("order", torch.randperm(8))
        self.scale = torch.tensor(2.0, dtype=torch.float64)
        self.options = SimpleNamespace(power=1)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.a(x)).relu().index_select(1, self.order) * self.scale
        return self.head(self.b(x).relu().mean((2, 3)) ** self.options.power)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().eval()


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that is exported."""
    seen: list[Any] = []
    plain = program.export

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        return plain(model, *args, **kwargs)

    monkeypatch.setattr(program, "export", counted)
    return seen


def same(found: gz.Compiled, wanted: gz.Compiled, x: torch.Tensor = X) -> None:
    """Two results are one in graph, weights and report."""
    assert str(found.report) == str(wanted.report)
    assert str(found.traced.graph) == str(wanted.traced.graph)
    for batch in (x, x[:1]):
        assert torch.equal(found.module(batch), wanted.module(batch))


def test_a_trace_is_taken_wherever_a_model_is_and_traced_once(exports: list[Any]) -> None:
    model, data = net(), [X, X + 1]
    traced = gz.trace(model, (X,))
    groups, cost = gz.channel_groups(traced), gz.cost(traced)
    study = gz.WidthStudy(traced, calibration=data)
    study.measure()
    plan = gz.plan_for(traced, macs=0.5, calibration=data)
    compiled = gz.compile(traced, plan, calibration=data)
    prepared = gz.prepare(traced, HALF)
    assert len(exports) == 1
    assert str(groups) == str(gz.channel_groups(model, (X,)))
    assert cost == gz.cost(model, (X,))
    assert study.plan(macs=0.5) == plan == gz.plan_for(model, (X,), macs=0.5, calibration=data)
    same(compiled, gz.compile(model, plan, (X,), calibration=data))
    same(prepared.convert(), gz.compile(model, HALF, (X,)))
    assert str(traced) == "Trace(Net, 3x3x8x8, mode='eval')"


@pytest.mark.parametrize("kind", ["prune", "atoms", "nothing", "fold"])
def test_every_pass_begins_on_a_trace(kind: str) -> None:
    plan = {
        "prune": gz.Plan([gz.PruneChannels(keep=0.5), gz.FoldBatchNorm()]),
        "atoms": gz.Plan([gz.ClusterMerge(keep=0.5), gz.AtomFactorize(atoms=2, force=True)]),
        "nothing": gz.Plan([]),
        "fold": gz.Plan([gz.FoldBatchNorm(), gz.ClusterMerge(keep=0.5)]),
    }[kind]
    model = net()
    same(gz.compile(gz.trace(model, (X,)), plan), gz.compile(model, plan, (X,)))


def test_several_models_are_given_as_traces(exports: list[Any]) -> None:
    nets, inputs = {"a": net(1), "b": net(2)}, {"a": (X,), "b": (X,)}
    data = {name: [X] for name in nets}
    plan = gz.Plan([gz.Zip(share=0.5)])
    traces = {name: gz.trace(each, (X,)) for name, each in nets.items()}
    found = [gz.compile(traces, plan, calibration=data) for _ in range(2)]
    assert len(exports) == 2
    wanted = gz.compile(nets, plan, inputs, calibration=data)
    for each in found:
        for name in nets:
            assert torch.equal(each.task(name)(X), wanted.task(name)(X))


def test_nothing_changes_a_trace_nor_its_model() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced = gz.trace(model, (X,))
    graph = traced.current()
    text, metas = str(graph.graph), [dict(node.meta) for node in graph.graph.nodes]
    wanted = gz.compile(traced, HALF)
    prepared = gz.prepare(traced, HALF)
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.1)
    prepared.train()
    prepared(X).sum().backward()
    optimizer.step()
    prepared.half()
    prepared.convert()
    copy.deepcopy(gz.prepare(traced, HALF)).convert()
    gz.plan_for(traced, params=0.5, calibration=[X])
    after = traced.current()
    assert after is graph
    assert str(after.graph) == text
    assert [dict(node.meta) for node in after.graph.nodes] == metas
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    held = dict(named_state(model))
    assert all(value is held.get(name, value) for name, value in named_state(after.module))
    same(gz.compile(traced, HALF), wanted)


def test_a_pass_that_edits_its_graph_in_place_does_not_reach_the_trace() -> None:
    from graphzip_passes.base import PASSES

    class Tear(gz.PassOptions):
        kind = "tear"

    @gz.register_pass(Tear)
    def tear(traced: Any, options: Any, context: Any) -> gz.Outcome:
        for node in traced.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.tanh.default
        for value in traced.module.parameters():
            value.detach().zero_()
        traced.module.recompile()
        return gz.Outcome(traced, changed=True, lossless=False, loss="all")

    try:
        traced = gz.trace(net(), (X,))
        wanted = gz.compile(traced, HALF)
        gz.compile(traced, gz.Plan([Tear()]))
        same(gz.compile(traced, HALF), wanted)
    finally:
        PASSES.pop(Tear)


def test_a_study_writes_to_no_weight_of_the_model() -> None:
    model = net()
    versions = {name: value._version for name, value in named_state(model)}
    gz.plan_for(gz.trace(model, (X,)), macs=0.5, calibration=[X, X + 1], effort="thorough")
    assert {name: value._version for name, value in named_state(model)} == versions


# ------------------------------------------------------------------------------------------------- weights as they are


def in_place(model: Net) -> None:
    with torch.no_grad():
        model.a.weight.mul_(-0.5)


def loaded(model: Net) -> None:
    model.load_state_dict(net(7).state_dict() | {"order": model.order})


def assigned(model: Net) -> None:
    model.load_state_dict(net(7).state_dict() | {"order": model.order}, assign=True)


def data_set(model: Net) -> None:
    model.b.weight.data = torch.randn_like(model.b.weight)


def other_parameter(model: Net) -> None:
    model.b.weight = nn.Parameter(torch.randn_like(model.b.weight))


def trained(model: Net) -> None:
    model.train()
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("change", [in_place, loaded, assigned, data_set, other_parameter, trained])
def test_the_weights_at_the_time_of_the_call_count(change: Callable[[Net], None], exports: list[Any]) -> None:
    model = net()
    traced = gz.trace(model, (X,))
    old = gz.compile(traced, HALF)
    change(model)
    found = gz.compile(traced, HALF)
    assert len(exports) == 1
    same(found, gz.compile(model, HALF, (X,)))
    assert not torch.equal(found.module(X), old.module(X))


# ------------------------------------------------------------------------------------------------- another model


def stride(model: Net) -> None:
    model.a.stride = (2, 2)


def replaced(model: Net) -> None:
    model.b = nn.Conv2d(8, 10, 1).double()
    model.head = nn.Linear(10, 4).double()


def indices(model: Net) -> None:
    model.order.copy_(model.order.flip(0))


def constant(model: Net) -> None:
    model.scale.fill_(3.0)


def option(model: Net) -> None:
    model.options.power = 2


def forward(model: Net) -> None:
    model.norm.forward = torch.tanh  # type: ignore[method-assign]


def hook(model: Net) -> None:
    model.b.register_forward_hook(lambda module, args, output: output + 1)


def tied(model: Net) -> None:
    model.norm.bias = model.a.bias


def norm(model: Net) -> None:
    model.norm.eps = 0.1


@pytest.mark.parametrize("change", [stride, replaced, indices, constant, option, forward, hook, tied, norm])
def test_a_model_that_became_another_is_traced_anew(
    change: Callable[[Net], None], exports: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    traced = gz.trace(model, (X,))
    gz.compile(traced, HALF)
    change(model)
    with caplog.at_level(logging.WARNING, "graphzip"):
        found = gz.compile(traced, HALF)
    assert "Net is traced anew: " in caplog.text
    assert "has changed" in caplog.text
    same(found, gz.compile(model, HALF, (X,)))
    count = len(exports)
    same(gz.compile(traced, HALF), found)
    assert len(exports) == count


def test_a_model_of_another_dtype_does_not_take_the_inputs_of_the_trace() -> None:
    model = net()
    traced = gz.trace(model, (X,))
    model.float()
    with pytest.raises(gz.ExampleInputError, match="Net itself fails on the example inputs"):
        gz.compile(traced, HALF)


# ------------------------------------------------------------------------------------------------- options


def test_the_options_of_tracing_belong_to_the_trace() -> None:
    model = net()
    model.scale = torch.tensor(1.0, dtype=torch.float64)
    inner = nn.Sequential(model, nn.Softmax(1)).eval()
    same(gz.compile(gz.trace(inner, (X,), scope="0"), HALF), gz.compile(inner, HALF, (X,), scope="0"))
    free = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    compiled = gz.compile(gz.trace(model, (X,), dynamic_shapes=free), HALF)
    assert compiled.module(X[:, :, :5, :7]).shape == (3, 4)
    part = gz.trace(inner, (X,), scope="0")
    assert gz.plan_for(part, macs=0.5, calibration=[X]) == gz.plan_for(
        inner, (X,), macs=0.5, calibration=[X], scope="0"
    )


class Several(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return {"hidden": self.a(x), "logits": super().forward(x)}


def test_the_outputs_that_matter_belong_to_the_trace() -> None:
    torch.manual_seed(0)
    model = Several().double().eval()
    found = gz.compile(gz.trace(model, (X,), outputs="logits"), HALF)
    wanted = gz.compile(model, HALF, (X,), outputs="logits")
    assert str(found.report) == str(wanted.report)
    assert torch.equal(found.module(X)["logits"], wanted.module(X)["logits"])
    assert found.module(X)["hidden"] is None


class TwoForms(Net):
    def forward(self, x: torch.Tensor) -> Any:
        found = super().forward(x)
        return (found, found.exp()) if self.training else found


def test_both_forms_are_traced_once() -> None:
    torch.manual_seed(0)
    model = TwoForms().double().eval()
    traced = gz.trace(model, (X,), mode="train")
    found, wanted = gz.compile(traced, HALF), gz.compile(model, HALF, (X,), mode="train")
    same(found, wanted)
    assert torch.equal(found.module.train()(X)[1], wanted.module.train()(X)[1])
    assert str(gz.channel_groups(traced)) == str(gz.channel_groups(model, (X,), mode="train"))


BESIDE: dict[str, tuple[Callable[[gz.Trace], Any], type[gz.GraphZipError], str]] = {
    "inputs": (lambda t: gz.compile(t, HALF, (X,)), gz.ExampleInputError, "example_inputs is given beside a trace"),
    "scope": (lambda t: gz.prepare(t, HALF, scope="a"), gz.TraceError, r"scope is given .* scope=\.\.\."),
    "mode": (lambda t: gz.channel_groups(t, mode="train"), gz.TraceError, "mode is given beside a trace"),
    "shapes": (lambda t: gz.compile(t, HALF, dynamic_shapes={}), gz.TraceError, "dynamic_shapes is given"),
    "cost": (lambda t: gz.cost(t, (X,)), gz.ExampleInputError, "leave it out"),
    "plan_for": (lambda t: gz.plan_for(t, (X,), macs=0.5), gz.ExampleInputError, "leave it out"),
    "outputs": (lambda t: gz.compile(t, HALF, outputs=0), gz.TraceError, "outputs is given beside a trace"),
    "again": (lambda t: gz.trace(t, (X,)), gz.TraceError, "got a Trace of one; use it as it is"),  # type: ignore[arg-type]
    "mixed": (
        lambda t: gz.compile({"a": t, "b": t.model}, gz.Plan([gz.Zip()])),  # type: ignore[dict-item]
        gz.TraceError,
        "task 'a' is a trace and task 'b' is not; give traces of all tasks, or of none",
    ),
    "joined part": (
        lambda t: gz.compile({"a": t, "b": gz.trace(t.model, (X,), scope="a")}, gz.Plan([gz.Zip()])),
        gz.TraceError,
        "task 'b': its trace was made with scope='a', .* trace it without",
    ),
    "joined inputs": (
        lambda t: gz.compile({"a": t, "b": t}, gz.Plan([gz.Zip()]), {"a": (X,), "b": (X,)}),
        gz.ExampleInputError,
        "example_inputs is given beside a trace",
    ),
    "one of several": (lambda t: gz.compile(t, gz.Plan([gz.Zip()])), gz.PlanError, "joins several models"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_belongs_to_a_trace_is_not_given_again(name: str) -> None:
    attempt, error, message = BESIDE[name]
    with pytest.raises(error, match=message):
        attempt(gz.trace(net(), (X,)))


def test_a_model_whose_copy_computes_with_it_is_not_trained() -> None:
    model = net()
    plain = model.forward
    model.forward = lambda x: plain(x)  # type: ignore[method-assign]
    traced = gz.trace(model, (X,))
    assert str(gz.channel_groups(traced)) == str(gz.channel_groups(model, (X,)))
    same(gz.compile(traced, HALF), gz.compile(model, HALF, (X,)))
    with pytest.raises(gz.TraceError, match=r"a copy of Net reads 'a.weight' of the model itself"):
        gz.prepare(traced, HALF)


def test_a_model_that_cannot_be_traced_is_refused_at_once() -> None:
    with pytest.raises(gz.TraceError, match=r"expected a torch\.nn\.Module"):
        gz.trace({"a": net()}, (X,))  # type: ignore[arg-type]
    with pytest.raises(gz.ExampleInputError, match="for a single input write"):
        gz.trace(net(), X)  # type: ignore[arg-type]
    model = net()
    model.lock = (_ for _ in ())  # type: ignore[assignment]
    with pytest.raises(gz.TraceError, match="Net cannot be copied"):
        gz.trace(model, (X,))
