"""Networks that share a part of their weights put these together once, and keep them until something changes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphzip as gz
from graphzip.graph.layers.pieced import Pieced

pytestmark = pytest.mark.usefixtures("seeded")


class Counted(TorchDispatchMode):
    """Counts concatenations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    )


DATA = {
    name: [torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(seed))] for seed, name in enumerate("ab")
}


@pytest.fixture(scope="module")
def zipped() -> gz.Compiled:
    torch.manual_seed(0)
    nets = {name: network().eval() for name in DATA}
    inputs = {name: (each[0][:2],) for name, each in DATA.items()}
    return gz.compile(nets, gz.Plan([gz.Zip(share=0.5)]), inputs, calibration=DATA)


def inputs() -> dict[str, torch.Tensor]:
    return {name: each[0] for name, each in DATA.items()}


def ran(module: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    with torch.no_grad(), Counted() as counted:
        out = module(**inputs())
    return out, counted.count


def test_weights_are_put_together_once(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).eval()
    assert any(isinstance(layer, Pieced) for layer in module.modules())
    first, built = ran(module)
    again, kept = ran(module)
    assert built > 0
    assert kept == 0
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_changed_is_put_together_anew(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).eval()
    before, _ = ran(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    after, built = ran(module)
    assert built > 0
    fresh, _ = ran(copy.deepcopy(module))
    assert all(torch.equal(after[name], fresh[name]) for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in after)


def test_training_reaches_every_tile(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).train()
    sum(out.square().mean() for out in module(**inputs()).values()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad(), Counted() as counted:
        module(**inputs())
    assert counted.count > 0


def test_copies_files_and_exports_compute_the_same(zipped: gz.Compiled, tmp_path: Path) -> None:
    module = zipped.module.eval()
    expected, _ = ran(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    zipped.save(tmp_path / "zipped.graphzip")
    loaded = gz.load(tmp_path / "zipped.graphzip").module.eval()
    for each in (torch.load(buffer, weights_only=False), loaded):
        found, _ = ran(each)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert zipped.export(tmp_path / "zipped.onnx").verified


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_state_dict_has_the_names_and_shapes_of_the_model_that_was_given(zipped: gz.Compiled) -> None:
    for name in DATA:
        task, given = copy.deepcopy(zipped.task(name)).eval(), network().eval()
        state = task.state_dict()
        assert list(state) == list(given.state_dict())
        given.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(given(DATA[name][0]), task(DATA[name][0]))


def test_a_file_that_is_read_again_has_the_same_layers(zipped: gz.Compiled, tmp_path: Path) -> None:
    zipped.save(tmp_path / "zipped.graphzip")
    again = gz.load(tmp_path / "zipped.graphzip").module
    assert again.state_dict().keys() == zipped.module.state_dict().keys()
    assert {name for name, each in again.named_modules() if isinstance(each, Pieced)} == {
        name for name, each in zipped.module.named_modules() if isinstance(each, Pieced)
    }


def test_layers_and_parameters_are_found_where_they_were(zipped: gz.Compiled) -> None:
    task = zipped.task("a")
    layer = task.get_submodule("3")
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight.shape == (8, 8, 3, 3)
    assert layer.bias is not None
    assert layer.bias.shape == (8,)
    own = {name: tuple(each.shape) for name, each in task.named_parameters() if name.startswith("3.")}
    assert own == {
        "3.shared_a_b.weight": (4, 4, 3, 3),
        "3.own.weight": (4, 4, 3, 3),
        "3.own_2.weight": (4, 8, 3, 3),
        "3.shared_a_b.bias": (4,),
        "3.own.bias": (4,),
    }
    assert {name.rpartition(".")[2] for name, _ in zipped.module.named_parameters()} == {"weight", "bias"}
    calls: list[str] = []
    handle = layer.register_forward_hook(lambda *_: calls.append("3"))
    task(DATA["a"][0])
    handle.remove()
    assert calls == ["3"]


def test_a_state_dict_of_the_model_that_was_given_is_loaded(zipped: gz.Compiled) -> None:
    module, given = copy.deepcopy(zipped.module).eval(), network().eval()
    task = module.get_submodule("a")
    before, _ = ran(module)
    task.load_state_dict(given.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(task(DATA["a"][0]), given(DATA["a"][0]))
    after, _ = ran(module)
    assert not torch.allclose(before["b"], after["b"]), "what b shares with a is another now"
    module.load_state_dict(zipped.module.state_dict())
    again, _ = ran(module)
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_names_of_tiles_are_loaded_too(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).eval()
    halved = {name: parameter.detach() / 2 for name, parameter in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict(halved, strict=False)
    assert all(torch.equal(parameter, halved[name]) for name, parameter in module.named_parameters())
    task = module.get_submodule("a")
    own = {name: parameter.detach() for name, parameter in task.named_parameters()}
    missing = task.load_state_dict(own | dict(task.named_buffers()), strict=False).missing_keys
    assert missing == []


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_what_does_not_fit_is_refused_as_torch_does(zipped: gz.Compiled) -> None:
    task = copy.deepcopy(zipped.task("a"))
    state = task.state_dict()
    kernel = state.pop("3.weight")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "3.weight"'):
        task.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for 3.weight: copying a param with shape"):
        task.load_state_dict({**state, "3.weight": kernel[:4]})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "3.scale"'):
        task.load_state_dict({**state, "3.weight": kernel, "3.scale": kernel})
    with pytest.raises(RuntimeError, match=r"3.weight: its tiles have no memory; load into a model that has some"):
        task.to("meta").load_state_dict({**state, "3.weight": kernel})


def test_a_weight_of_tiles_is_not_set(zipped: gz.Compiled) -> None:
    layer = copy.deepcopy(zipped.task("a")).get_submodule("3")
    with pytest.raises(gz.GraphZipError, match=r"weight is put together .* set shared_a_b.weight and own.weight and"):
        layer.weight = nn.Parameter(torch.zeros(8, 8, 3, 3))


def test_what_is_written_into_a_weight_of_tiles_is_not_kept(zipped: gz.Compiled) -> None:
    task = copy.deepcopy(zipped.task("a")).eval()
    with torch.no_grad():
        before = task(DATA["a"][0])
        task.get_submodule("3").weight.zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(task(DATA["a"][0]), before)


def test_a_task_that_is_compiled_again_keeps_its_names(zipped: gz.Compiled) -> None:
    task = zipped.task("a").eval()
    again = gz.compile(task, gz.Plan([]), (DATA["a"][0][:2],)).module
    assert list(again.state_dict()) == list(task.state_dict())
    assert dict(again.named_parameters()).keys() == dict(task.named_parameters()).keys()
    assert torch.equal(again(DATA["a"][0]), task(DATA["a"][0]))


def test_symbolic_tracing_calls_the_layer(zipped: gz.Compiled) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = zipped.task("a").get_submodule("0")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()

    graph = torch.fx.symbolic_trace(Around()).graph
    assert [node.target for node in graph.find_nodes(op="call_module", target="layer")] == ["layer"]


class Named(nn.Module):
    """A layer whose own children have names that tiles would have, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.own, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.linear(x, self.weight).relu()
        return self.head(self.own(hidden).relu())


def test_tiles_do_not_take_names_that_there_are() -> None:
    nets, x = {name: Named().eval() for name in "ab"}, torch.randn(12, 6)
    inputs = dict.fromkeys(nets, (x[:2],))
    data = {name: [x] for name in nets}
    compiled = gz.compile(nets, gz.Plan([gz.Zip(share=0.5)]), inputs, calibration=data)
    names = dict(compiled.task("b").named_parameters()).keys()
    assert {"own_2.weight", "shared_a_b.weight", "own.own.weight", "own.shared_a_b.weight", "own.own_2.weight"} <= names
    with torch.no_grad():
        for name in nets:
            torch.testing.assert_close(compiled.task(name)(x), compiled.module(a=x, b=x)[name])
