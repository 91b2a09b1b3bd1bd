"""Tracing: arguments and results, and what is refused."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from trace_cases import HALF, NOTHING, cnn, compiled, net, plain, same

import graphzip as gz
from graphzip.graph.inputs import check_constant, check_input
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")


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


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_wrong_shape_names_the_models_own_line() -> None:
    with pytest.raises(
        gz.ExampleInputError,
        match=r"Net itself fails on the example inputs \(float32\[1, 5\]\): mat1 and mat2 shapes cannot be multiplied "
        r".*\(at .*trace_cases.py:\d+ in plain: out: Tensor = m.b\(m.a\(x\).relu\(\)\)\); pass example_inputs that",
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


@pytest.mark.parametrize("wrong", [torch.randn(2, 4), [torch.randn(2, 4)], None])
def test_example_inputs_must_be_a_tuple(wrong: Any) -> None:
    with pytest.raises(gz.ExampleInputError, match=rf"got {type(wrong).__name__}; for a single input write \(x,\)"):
        trace(net(plain), wrong)


def test_inputs_by_name_are_those_that_there_are() -> None:
    with pytest.raises(gz.ExampleInputError, match="Net takes no argument 'x'; it takes none by name"):
        trace(net(plain), {"x": torch.randn(2, 4)})


def decide(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.sum() > 0:
        h = -h
    out: Tensor = m.b(h)
    return out


def test_data_dependent_control_flow_names_line_and_cure() -> None:
    with pytest.raises(
        gz.TraceError,
        match=r"Net runs but torch.export cannot trace it: .*\(at .*test_trace_calls.py:\d+ in decide: "
        r"if h.sum\(\) > 0:\); make the control flow there independent of tensor values "
        r"\(or compile only the part that traces: scope='name.of.submodule'\)",
    ):
        trace(net(decide), (torch.randn(2, 4),))


def test_what_is_no_module_is_refused() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(gz.TraceError, match=r"expected a torch.nn.Module, got function; pass the model itself"):
        gz.channel_groups(plain, (x,))  # type: ignore[arg-type]
    with pytest.raises(gz.TraceError, match=r"expected a torch.nn.Module, got the class Linear; make one of it first"):
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
    model.kept = threading.Lock()  # type: ignore[assignment]
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
