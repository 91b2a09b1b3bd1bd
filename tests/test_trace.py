"""Tracing: what the graph holds, what a compiled module accepts, and how refusals read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import state_of, tensors
from torch import Tensor, nn
from torch.export import Dim

import graphzip as gz
from graphzip.graph.conditions import check_sizes, parse
from graphzip.graph.inputs import check_constant, check_input, with_batch_of_two
from graphzip.graph.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

NOTHING = gz.Plan([])
HALF = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even")])


def net(run: Callable[..., Any], **parts: Any) -> nn.Module:
    """A model with two linear layers, 4 -> 6 -> 3, in eval mode."""
    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3), **parts).eval()


def plain(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.b(m.a(x).relu())
    return out


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    module: nn.Module = gz.compile(model, NOTHING, inputs, **options).module
    return module


def same(model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Both give the same structure with the same bits."""
    expected, found = model(*args, **kwargs), module(*args, **kwargs)
    assert type(expected) is type(found)
    left, right = tensors(expected), tensors(found)
    return len(left) == len(right) and all(map(torch.equal, left, right))


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


# --- arguments and results -------------------------------------------------------------------------------------------


def test_positional_and_keyword_calls() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
            h: Tensor = self.a(x) * scale
            return h if mask is None else h * mask

    model, x, mask = Optional().eval(), torch.randn(2, 4), torch.rand(2, 6)
    one = compiled(model, x)
    assert same(model, one, x)
    assert same(model, one, x=x)
    both = compiled(model, x, mask)
    assert same(model, both, x, mask)
    assert same(model, both, x, mask=mask)
    assert same(model, both, mask=mask, x=x)
    without = compiled(model, x, None)
    assert same(model, without, x, None)
    with pytest.raises(
        gz.InputShapeError, match=r"argument 'mask' is a tensor, but .* compiled for None, which is part of the"
    ):
        without(x, mask)
    with pytest.raises(
        gz.InputShapeError, match=r"input 'mask' is a NoneType, but .* compiled for a tensor of any x 6"
    ):
        both(x, None)


def test_arguments_that_are_not_tensors_are_part_of_the_graph() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x: Tensor, times: int, mode: str = "sum") -> Tensor:
            h: Tensor = self.a(x) * times
            return h.sum(1) if mode == "sum" else h

    model, x = Scaled().eval(), torch.randn(2, 4)
    module = compiled(model, x, 3, "sum")
    assert same(model, module, x, 3, "sum")
    for wrong, name in (((x, 4, "sum"), "times"), ((x, 3, "none"), "mode"), ((x, 3.0, "sum"), "times")):
        with pytest.raises(
            gz.InputShapeError, match=rf"argument '{name}' is .*, which is part of the graph; compile it"
        ):
            module(*wrong)
    check_constant(None, "mask", None)


def test_star_arguments() -> None:
    model = net(lambda m, *xs: [m.b(m.a(x)) for x in xs])
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert same(model, compiled(model, x, y), y, x)


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    model = net(lambda m, x, y: m.b(m.a(x)) + y.sum(1, keepdim=True))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert same(model, compiled(model, x, x), x, y)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_dict_tuple_and_named_tuple() -> None:
    def run(m: Any, given: dict[str, Any], pair: Pair, more: tuple[Tensor, list[Tensor]]) -> Any:
        h = m.a(given["image"]) + m.a(pair.left) + m.a(more[1][0])
        return {"out": m.b(h), "pair": Pair(h, pair.right + more[0]), "none": None, "number": 3}

    model, x = net(run), torch.randn(2, 4)
    module = compiled(model, {"image": x, "extra": x}, Pair(x, x), (x, [x]))
    y = torch.randn(3, 4)
    given = ({"extra": y + 1, "image": y}, Pair(y + 2, y), (y, [y * 2]))
    assert same(model, module, *given)
    found = module(*given)
    assert type(found["pair"]) is Pair
    assert found["none"] is None
    assert found["number"] == 3
    with pytest.raises(KeyError, match="extra"):
        module({"image": y}, *given[1:])


@dataclasses.dataclass
class Known:
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Unknown:
    left: Tensor


torch.export.register_dataclass(Known, serialized_type_name="tests.test_trace.Known")


def test_registered_dataclasses() -> None:
    model = net(lambda m, pair: Known(m.b(m.a(pair.left)), pair.right + 1))
    module = compiled(model, Known(torch.randn(1, 4), torch.randn(1, 2)))
    pair = Known(torch.randn(5, 4), torch.randn(5, 2))
    expected, found = model(pair), module(pair)
    assert type(found) is Known
    assert torch.equal(found.left, expected.left)
    assert torch.equal(found.right, expected.right)


def test_unregistered_dataclasses_are_refused_with_the_cure() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(gz.TraceError, match="tuples, lists and dicts, or register the type"):
        trace(net(lambda m, pair: m.b(m.a(pair.left))), (Unknown(x),))
    with pytest.raises(gz.TraceError, match="tuples, lists and dicts, or register the type"):
        trace(net(lambda m, x: Unknown(m.b(m.a(x)))), (x,))


def test_other_shapes_and_dtypes_are_refused() -> None:
    module = compiled(cnn(), torch.randn(2, 3, 8, 8))
    with pytest.raises(
        gz.InputShapeError,
        match=r"input 'input' has shape \(2, 3, 9, 8\), but the model was compiled for any x 3 x 8 x 8; "
        r"compile it with example_inputs of the new shape, or with dynamic_shapes",
    ):
        module(torch.randn(2, 3, 9, 8))
    with pytest.raises(gz.InputShapeError, match=r"has shape \(3, 8, 8\), but"):
        module(torch.randn(3, 8, 8))
    with pytest.raises(gz.InputShapeError, match="is int64, but the model was compiled for float32; convert it"):
        module(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    half = torch.zeros(2, dtype=torch.float16)
    assert check_input(half, "x", (None,), torch.float64) is half
    for other in (torch.bool, torch.complex64, torch.int32):
        with pytest.raises(gz.InputShapeError, match="convert it, or compile"):
            check_input(torch.zeros(2, dtype=other), "x", (2,), torch.float32)


def test_a_path_that_depends_on_the_dtype_is_checked() -> None:
    model = net(lambda m, x: m.b(m.a(x.float() / 255 if x.dtype == torch.uint8 else x)))
    module = compiled(model, torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(gz.InputShapeError, match="is float32, but the model was compiled for uint8"):
        module(torch.randn(2, 4))


def test_dynamic_shapes_let_other_sizes_through() -> None:
    model = nn.Sequential(cnn(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    size = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim("width")}
    module = gz.compile(model, NOTHING, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(size,)).module
    assert same(model, module, torch.randn(5, 3, 12, 10))
    merged = gz.compile(model, HALF, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(size,)).module
    assert merged(torch.randn(5, 3, 12, 10)).shape == (5, 3)
    with pytest.raises(gz.InputShapeError, match=r"compiled for any x 3 x any x any"):
        module(torch.randn(5, 2, 12, 10))


def test_ranges_and_derived_dimensions_are_checked() -> None:
    model = net(lambda m, x, y: m.b(m.a(x)).sum() + y.sum())
    size = Dim("size", min=3, max=9)
    shapes = {"inputs": ({0: size}, {0: 2 * size + 1})}
    module = gz.compile(model, NOTHING, (torch.randn(4, 4), torch.randn(9, 4)), dynamic_shapes=shapes).module
    assert same(model, module, torch.randn(5, 4), torch.randn(11, 4))
    with pytest.raises(gz.InputShapeError, match=r"needs inputs_1.shape\[0\] == 1 \+ 2\*inputs_0.shape\[0\]"):
        module(torch.randn(5, 4), torch.randn(12, 4))
    with pytest.raises(gz.InputShapeError, match=r"needs inputs_0.shape\[0\] >= 3"):
        module(torch.randn(2, 4), torch.randn(5, 4))
    only = {"inputs": ({}, {0: 2 * size + 1})}
    module = gz.compile(model, NOTHING, (torch.randn(4, 4), torch.randn(9, 4)), dynamic_shapes=only).module
    with pytest.raises(gz.InputShapeError, match=r"needs \(inputs_1.shape\[0\] - 1\) % 2 == 0"):
        module(torch.randn(4, 4), torch.randn(8, 4))


def test_dynamic_shapes_that_do_not_fit() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(gz.TraceError, match=r"Constraints violated.*give dynamic_shapes that the model allows"):
        gz.channel_groups(cnn(), (x,), dynamic_shapes=({1: Dim("channels")},))
    with pytest.raises(gz.TraceError, match="dynamic_shapes"):
        gz.channel_groups(cnn(), (x,), dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO}))


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
    assert "'layers.0.self_attn' (MultiheadAttention) drops out 0.1 only in training" in "\n".join(traced.training_only)


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


def test_a_write_out_of_a_no_grad_block_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        with torch.no_grad():
            h.mul_(2)
        return m.b(h)

    with pytest.raises(gz.TraceError, match=r"mul_\.Tensor .* writes into its input .* in place"):
        trace(net(run), (torch.randn(2, 4),))


def test_autocast_inside_the_model() -> None:
    def run(m: Any, x: Tensor, enabled: bool) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            h = m.a(x)
        return m.b(h.float())

    x = torch.randn(2, 4)
    off = net(lambda m, x: run(m, x, False))
    assert same(off, compiled(off, x), x)
    (note,) = trace(off, (x,)).training_only
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
    with pytest.raises(gz.TraceError, match=r"nets.py:\d+ in forward: cond runs a function of its own inside"):
        trace(net(branch), (x,))
    with pytest.raises(gz.TraceError, match=r"torch.no_grad\(\) instead of torch.inference_mode\(\) inside the model$"):
        trace(net(inference), (x,))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_wrong_shape_names_the_models_own_line() -> None:
    with pytest.raises(
        gz.ExampleInputError,
        match=r"Net itself fails on the example inputs \(float32\[1, 5\]\): mat1 and mat2 shapes cannot be multiplied "
        r".*\(at .*test_trace.py:\d+ in plain: out: Tensor = m.b\(m.a\(x\).relu\(\)\)\); pass example_inputs that",
    ):
        trace(net(plain), (torch.randn(1, 5),))
    with pytest.raises(gz.ExampleInputError, match=r"\(float32\[2, 4\], float32\[2, 4\]\): .* positional argument"):
        trace(net(plain), (torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(gz.ExampleInputError, match=r"example inputs \(\): .*missing 1 required positional"):
        trace(net(plain), ())


def test_a_failed_export_leaves_the_terminal_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(gz.ExampleInputError):
        trace(net(plain), (torch.randn(2, 5),))
    with pytest.raises(gz.TraceError):
        trace(net(decide), (torch.randn(2, 4),))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", [torch.randn(2, 4), [torch.randn(2, 4)], None, {"x": torch.randn(2, 4)}])
def test_example_inputs_must_be_a_tuple(wrong: Any) -> None:
    with pytest.raises(gz.ExampleInputError, match=rf"got {type(wrong).__name__}; for a single input write \(x,\)"):
        trace(net(plain), wrong)


def decide(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.sum() > 0:
        h = -h
    out: Tensor = m.b(h)
    return out


def test_data_dependent_control_flow_names_line_and_cure() -> None:
    with pytest.raises(
        gz.TraceError,
        match=r"Net runs but torch.export cannot trace it: .*\(at .*test_trace.py:\d+ in decide: if h.sum\(\) > 0:\); "
        r"make the control flow there independent of tensor values \(or compile only the part that traces: "
        r"scope='name.of.submodule'\)",
    ):
        trace(net(decide), (torch.randn(2, 4),))


def test_what_is_no_module_is_refused() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(gz.TraceError, match=r"expected a torch.nn.Module, got function; pass the model itself"):
        gz.channel_groups(plain, (x,))  # type: ignore[arg-type]
    with pytest.raises(gz.TraceError, match=r"expected a torch.nn.Module, got type"):
        gz.cost(nn.Linear, (x,))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(gz.TraceError, match=r"is TorchScript, which hides its source; pass the nn.Module it is from"):
        gz.channel_groups(torch.jit.script(nn.Sequential(nn.Linear(4, 6))), (torch.randn(2, 4),))


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile"])
def test_reserved_attribute_names_are_refused(name: str) -> None:
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 6))
    model.forward = lambda x: model.get_submodule(name)(x)  # type: ignore[method-assign]
    with pytest.raises(gz.TraceError, match=rf"Module has an attribute '{name}', which .*GraphModule keeps for itself"):
        trace(model, (torch.randn(2, 4),))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(4, 6)
    model.kept = model(torch.randn(2, 4))  # type: ignore[assignment]
    for call in (lambda: trace(model, (torch.randn(2, 4),)), lambda: gz.compile(model, NOTHING, (torch.randn(2, 4),))):
        with pytest.raises(gz.GraphZipError, match=r"Linear cannot be copied .*Make copy.deepcopy\(model\) work first"):
            call()


def counts(m: Any, x: Tensor) -> Any:
    m.count += 1
    return m.b(m.a(x))


def replaces(m: Any, x: Tensor) -> Any:
    m.count = m.count + 1
    return m.b(m.a(x))


def test_models_that_write_to_buffers_or_inputs_are_refused() -> None:
    x = torch.randn(2, 4)
    for run in (counts, replaces):
        model = net(run, count=torch.zeros(()))
        with pytest.raises(
            gz.TraceError, match=r"writes into the parameter or buffer 'count' in place; .*side effects"
        ):
            trace(model, (x,))
        assert model.count == 0
    with pytest.raises(gz.TraceError, match=r"mul_.* writes into its input 'inputs_0' in place; .*clone first"):
        trace(net(lambda m, x: m.b(m.a(x.mul_(2)))), (x,))


def test_an_embedding_that_renormalises_itself_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 3))
    with pytest.raises(gz.TraceError, match=r"embedding_renorm_.* writes into the parameter or buffer '0.weight'"):
        trace(model, (torch.tensor([[1, 2], [3, 4]]),))
