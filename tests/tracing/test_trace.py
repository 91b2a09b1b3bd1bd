"""Tracing: what the graph holds, what a compiled module accepts, and how refusals read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planting import state_of, tensors
from torch import Tensor, nn
from trace_cases import HALF, NOTHING, cnn, compiled, net, plain, same

import graphzip as gz
from graphzip.graph.guards import check_sizes, parse
from graphzip.graph.inputs import with_batch_of_two
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")


# --- the batch -------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_becomes_two_and_stays_open() -> None:
    model = net(plain)
    traced = trace(model, (torch.randn(1, 4),))
    assert traced.example_inputs[0].shape == (2, 4)
    assert traced.inputs[0].shape == (None, 4)
    assert traced.batch_dynamic
    assert traced.conditions == ()
    module = compiled(model, torch.randn(1, 4))
    for batch in (1, 2, 3, 7):
        assert same(model, module, torch.randn(batch, 4))


def test_only_tensors_with_a_batch_of_one_are_repeated() -> None:
    inputs = (torch.zeros(1, 4), {"mask": torch.ones(5, 5), "time": torch.arange(1)}, 3, torch.tensor(1.0))
    image, more, number, scalar = with_batch_of_two(inputs)
    assert image.shape == (2, 4)
    assert more["mask"].shape == (5, 5)
    assert more["time"].shape == (2,)
    assert number == 3
    assert scalar.shape == ()
    pair = (torch.zeros(2, 4), torch.zeros(1, 4))
    assert with_batch_of_two(pair) is pair


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_that_fixes_its_batch_keeps_it(batch: int, caplog: pytest.LogCaptureFixture) -> None:
    model = net(lambda m, x: m.b(m.a(x).view(batch, 6)))
    traced = trace(model, (torch.randn(batch, 4),))
    assert not traced.batch_dynamic
    assert traced.inputs[0].shape == (batch, 4)
    assert "batch" in caplog.text
    module = compiled(model, torch.randn(batch, 4))
    assert same(model, module, torch.randn(batch, 4))
    with pytest.raises(gz.InputShapeError, match=rf"input 'inputs_0' has shape \(3, 4\), .* compiled for {batch} x 4;"):
        module(torch.randn(3, 4))


def test_channels_of_a_model_that_takes_one_sample_only() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.b(m.a(x).relu().view(1, 6))

    model, x = net(run), torch.randn(1, 4)
    result = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters={"a": [[0, 1], [2], [3], [4], [5]]})]), (x,))
    assert result.module.a.weight.shape == (5, 4)
    with pytest.raises(gz.InputShapeError, match="compiled for 1 x 4"):
        result.module(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("choose", "fitting", "condition"),
    [
        (lambda n: n % 2 == 0, 6, r"\(inputs_0.shape\[0\] % 2\) == 0"),
        (lambda n: n < 100, 99, r"inputs_0.shape\[0\] <= 99"),
        (lambda n: n**2 > 5, 3, r"inputs_0.shape\[0\]\*inputs_0.shape\[0\] > 5"),
        (lambda n: n % 3 == 1 or n > 50, 7, None),
    ],
)
def test_a_path_that_depends_on_the_batch_is_checked(choose: Any, fitting: int, condition: str | None) -> None:
    """`torch.export` takes the path of the example; the compiled module must not take it for other sizes."""
    model = net(lambda m, x: m.b(m.a(x) * 2 if choose(x.shape[0]) else m.a(x)))
    module = compiled(model, torch.randn(4, 4))
    for batch in range(1, 12):
        x = torch.randn(batch, 4)
        try:
            assert same(model, module, x)
        except gz.InputShapeError:
            assert not choose(batch)
    assert same(model, module, torch.randn(fitting, 4))
    if condition is not None:
        other = 101 if condition.endswith("99") else 1
        with pytest.raises(
            gz.InputShapeError, match=rf"path that needs {condition}, and the inputs are .*\({other}, 4\)"
        ):
            module(torch.randn(other, 4))


def test_sizes_that_the_model_equates_are_checked() -> None:
    model = net(lambda m, x, y: m.b(m.a(x) + m.a(y)))
    module = compiled(model, torch.randn(2, 4), torch.randn(2, 4))
    assert same(model, module, torch.randn(5, 4), torch.randn(5, 4))
    with pytest.raises(gz.InputShapeError, match=r"needs inputs_1.shape\[0\] == inputs_0.shape\[0\]"):
        module(torch.randn(5, 4), torch.randn(1, 4))


def test_conditions_are_arithmetic_and_nothing_else() -> None:
    assert parse("(x.shape[0] % 2) == 0") == ("Eq", ("Mod", ("size", "x", 0), 2), 0)
    names = ("(max(x.shape[0], 7) - 1) // 2 == 3 and not x.shape[1] > 9 or -x.shape[0]**2 < 0",)
    check_sizes(names, tuple(map(parse, names)), ("x",), torch.zeros(3, 4))
    for text in ("__import__('os')", "x.size() == 1", "1 < x.shape[0] < 3", "x.shape[0] @ 2", "x.shape[0] ==", "'a'"):
        with pytest.raises(gz.TraceError, match=r"depends on a size .* cannot check that"):
            parse(text)


# --- the user's model is not touched ---------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = cnn(), 0
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.plain = torch.randn(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.drop(self.body(x)) * self.scale + self.plain
        return out


@pytest.mark.parametrize("plan", [NOTHING, HALF, gz.Plan([gz.FoldBatchNorm(), gz.ClusterMerge(keep=0.5)])])
def test_the_users_model_stays_as_it_is(plan: gz.Plan) -> None:
    model = Counting()
    model.train()
    model.body[1].eval()
    model.body[3].weight.requires_grad_(False)
    model.body[0].weight.grad = torch.ones_like(model.body[0].weight)
    hook = model.body[0].register_forward_hook(lambda *_: None)
    before = {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in state_of(model).items()}
    modes = {name: module.training for name, module in model.named_modules()}
    x, random = torch.randn(2, 3, 8, 8), torch.get_rng_state()
    given = x.clone()
    gz.channel_groups(model, (x,))
    gz.cost(model, (x,))
    gz.compile(model, plan, (x,), calibration=[x])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert model.calls == 0
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert state_of(model).keys() == before.keys()
    for name, tensor in state_of(model).items():
        kept, value, flag = before[name]
        assert tensor is kept
        assert torch.equal(tensor, value)
        assert tensor.requires_grad == flag
        assert name == "body.0.weight" or tensor.grad is None
    assert model.body[0].weight.grad is not None
    assert hook.id in model.body[0]._forward_hooks
    assert type(model.body[0]) is nn.Conv2d


def test_an_overridden_train_that_freezes_parameters_freezes_none_of_the_users() -> None:
    class Freezing(nn.Sequential):
        def train(self, mode: bool = True) -> Freezing:
            super().train(mode)
            for parameter in self[0].parameters():
                parameter.requires_grad_(False)
            return self

    model = Freezing(nn.Linear(4, 6), nn.Linear(6, 3))
    gz.channel_groups(model, (torch.randn(2, 4),))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inputs_in_containers_are_not_written_to() -> None:
    def run(m: Any, parts: dict[str, Tensor]) -> Any:
        parts["x"] = m.a(parts["x"])
        return m.b(parts["x"])

    given = {"x": torch.randn(2, 4)}
    x = given["x"]
    gz.channel_groups(net(run), (given,))
    assert given["x"] is x


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_changes_nothing(around: Callable[[], Any]) -> None:
    model, x = cnn(), torch.randn(2, 3, 8, 8)
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm()])
    expected = gz.compile(model, plan, (x,), calibration=[x])
    with around():
        names = gz.channel_groups(model, (torch.randn(2, 3, 8, 8),)).names
        counted = gz.cost(model, (torch.randn(2, 3, 8, 8),))
        found = gz.compile(model, plan, (x,), calibration=[x])
    assert names == gz.channel_groups(model, (x,)).names
    assert counted == gz.cost(model, (x,))
    assert found.report == expected.report
    for (name, left), (other, right) in zip(
        found.module.state_dict(keep_vars=True).items(), expected.module.state_dict(keep_vars=True).items(), strict=True
    ):
        assert name == other
        assert torch.equal(left, right)
        assert left.requires_grad == right.requires_grad
        assert not left.is_inference()
    found.module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in found.module.parameters())


def test_the_fast_path_of_attention_is_switched_on_again() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    trace(layer, (torch.randn(2, 5, 8),))
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(gz.ExampleInputError):
        trace(layer, (torch.randn(2, 5, 7),))
    assert torch.backends.mha.get_fastpath_enabled()


# --- parameters, buffers, constants ----------------------------------------------------------------------------------


def test_in_place_forms() -> None:
    def run(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        h.relu_().mul_(2)
        h += 1
        h[:, :2] = 0
        h[:, 2:4].mul_(3)
        F.dropout(h, 0.5, training=m.training, inplace=True)
        return m.b(h)

    model = net(run)
    module = compiled(model, torch.randn(2, 4))
    assert same(model, module, torch.randn(3, 4))
    assert not any("_." in str(node.target) for node in trace(model, (torch.randn(2, 4),)).graph.nodes)


def test_tied_weights_keep_both_names_and_stay_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.again(self.b(self.a(x).relu()).relu())
            return out

    model, x = Tied().eval(), torch.randn(3, 4)
    traced = trace(model, (x,))
    assert traced.aliases["b.weight"] == "a.weight"
    module = compiled(model, x)
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.b.weight is module.a.weight
    assert module.again.weight is module.a.weight
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert same(model, module, x)
    copy.deepcopy(module).load_state_dict(model.state_dict(), strict=True)


def test_non_persistent_buffers_and_plain_tensors() -> None:
    model = Counting().eval()
    module = compiled(model, torch.randn(2, 3, 8, 8))
    assert "scale" not in module.state_dict()
    assert dict(module.named_buffers())["scale"].item() == 1.0
    assert same(model, module, torch.randn(3, 3, 8, 8))
    assert module.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        module.scale.fill_(2.0)
        model.scale.fill_(2.0)
    assert same(model, module, torch.randn(3, 3, 8, 8))


def test_constants_made_in_the_forward() -> None:
    model = net(
        lambda m, x: m.b(m.a(x) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + torch.arange(6)) + torch.zeros(x.shape[0], 3)
    )
    module = compiled(model, torch.randn(2, 4))
    assert same(model, module, torch.randn(5, 4))
    assert module.state_dict().keys() == model.state_dict().keys()


def test_a_detached_parameter_gets_no_gradient() -> None:
    model = net(lambda m, x: m.b(F.linear(x, m.a.weight.detach(), m.a.bias)))
    module = compiled(model, torch.randn(2, 4))
    module(torch.randn(2, 4)).sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is None} == {"a.weight"}


def test_frozen_parameters_stay_frozen() -> None:
    model = cnn()
    model[0].requires_grad_(False)
    merged = gz.compile(model, HALF, (torch.randn(2, 3, 8, 8),)).module
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    assert not any(p.requires_grad for p in merged.get_submodule("0").parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    model, x = cnn().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    for plan in (NOTHING, gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm()])):
        module = gz.compile(model, plan, (x,)).module
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module(x).dtype == dtype


def test_parametrized_weights_keep_their_parameters() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    module = compiled(model, torch.randn(2, 4))
    assert module.state_dict().keys() == model.state_dict().keys()
    assert same(model, module, torch.randn(3, 4))


def test_several_results_are_compiled_again() -> None:
    """A compiled module is a module like any other."""
    model, x = cnn().eval(), torch.randn(2, 3, 8, 8)
    once = gz.compile(model, HALF, (x,)).module
    twice = gz.compile(once, NOTHING, (x,)).module
    assert same(once, twice, torch.randn(3, 3, 8, 8))
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert gz.channel_groups(once, (x,)).names == gz.channel_groups(model, (x,)).names


# --- the meta device -------------------------------------------------------------------------------------------------


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = cnn(), torch.randn(2, 3, 8, 8)
    real = cnn()
    groups = gz.channel_groups(model, (x,))
    assert groups.to_dict() == gz.channel_groups(real, (torch.randn(2, 3, 8, 8),)).to_dict()
    assert gz.cost(model, (x,)) == gz.cost(real, (torch.randn(2, 3, 8, 8),))
    with pytest.raises(gz.WeightsError, match=r"group '0' has no weights to cluster .*meta device.*load them first"):
        gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), (x,))
    shapes = {name: tensor.shape for name, tensor in gz.compile(model, HALF, (x,)).module.named_parameters()}
    assert shapes == {
        n: t.shape for n, t in gz.compile(real, HALF, (torch.randn(2, 3, 8, 8),)).module.named_parameters()
    }


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_traces_into_a_visible_graph(need_weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=need_weights)

    model, x = Attention().eval(), torch.randn(2, 5, 8)
    targets = {str(node.target) for node in trace(model, (x,)).graph.nodes if node.op == "call_function"}
    assert not any("_native_multi_head" in target or "_transformer" in target for target in targets)
    assert any("linear" in target for target in targets)
    module = compiled(model, x)
    for left, right in zip(tensors(model(x)), tensors(module(x)), strict=True):
        torch.testing.assert_close(left, right)


def test_a_transformer_encoder_traces_into_a_visible_graph() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    traced = trace(model, (x,))
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not any("_transformer_encoder" in target for target in targets)
    assert {"aten.layer_norm.default", "aten.scaled_dot_product_attention.default"} <= targets
    torch.testing.assert_close(model(x), compiled(model, x)(x))
    assert "'layers.0.self_attn' (MultiheadAttention) drops out 0.1 only in training" in "\n".join(traced.notes)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_no_grad_blocks_compute_and_differentiate_as_before() -> None:
    def run(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            h = m.norm(m.a(x)).relu_()
            unchanged = x
        g = m.a(x) + h
        with torch.no_grad():
            shift = g.mean()
            with torch.enable_grad():
                g = g * 2
        return m.b(g + shift), unchanged

    model = net(run, norm=nn.BatchNorm1d(6))
    module = compiled(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert same(model, module, x)
    assert all("higher_order" not in str(node.target) for node in trace(model, (x,)).graph.nodes)
    for one in (model, module):
        one(x)[0].square().sum().backward()
    for (name, left), (other, right) in zip(model.named_parameters(), module.named_parameters(), strict=True):
        assert name == other
        assert (left.grad is None) == (right.grad is None), name
        assert left.grad is None or torch.allclose(left.grad, right.grad)
    assert model.norm.weight.grad is None


def test_channels_are_merged_through_a_no_grad_block() -> None:
    def run(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            h = m.a(x)
        return m.b(h.relu())

    model = net(run)
    with torch.no_grad():
        model.a.weight[1], model.a.bias[1] = model.a.weight[0], model.a.bias[0]
    x = torch.randn(3, 4)
    clusters = {"a": [[0, 1], [2], [3], [4], [5]]}
    merged = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,)).module
    assert merged.a.weight.shape == (5, 4)
    torch.testing.assert_close(model(x), merged(x))


def test_a_write_out_of_a_no_grad_block_changes_values_and_not_gradients() -> None:
    def run(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        with torch.no_grad():
            h.mul_(2)
            h[:, :2].sub_(m.a(x)[:, :2])
        return m.b(h).square()

    model = net(run)
    module, x = compiled(model, torch.randn(2, 4)), torch.randn(5, 4)
    assert same(model, module, x)
    for one in (model, module):
        one(x).sum().backward()
    for (name, left), (_, right) in zip(model.named_parameters(), module.named_parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, msg=name)


def test_autocast_inside_the_model() -> None:
    def run(m: Any, x: Tensor, enabled: bool) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            h = m.a(x)
        return m.b(h.float())

    x = torch.randn(2, 4)
    off = net(lambda m, x: run(m, x, False))
    assert same(off, compiled(off, x), x)
    (note,) = trace(off, (x,)).notes
    assert "a block turns autocast off; the result does not" in note
    with pytest.raises(
        gz.TraceError, match=r"^\S+\.py:\d+ in \w+: a block runs under torch.autocast\('cpu', torch.bfl"
    ):
        trace(net(lambda m, x: run(m, x, True)), (x,))


def test_branches_and_inference_mode_inside_the_model_are_refused() -> None:
    def branch(m: Any, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda y: m.a(y), lambda y: -m.a(y), (x,))

    def inference(m: Any, x: Tensor) -> Any:
        with torch.inference_mode():
            h = m.a(x)
        return m.b(h)

    x = torch.randn(2, 4)
    with pytest.raises(gz.TraceError, match=r"net_parts.py:\d+ in forward: cond runs a function of its own inside"):
        trace(net(branch), (x,))
    with pytest.raises(gz.TraceError, match=r"torch.no_grad\(\) instead of torch.inference_mode\(\) inside the model$"):
        trace(net(inference), (x,))
