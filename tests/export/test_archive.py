"""Saved models: they load elsewhere bit for bit, and a file cannot do more than describe a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphzip.errors import ArchiveError
from graphzip.export.archive import load_archive, save_archive, sealed
from graphzip.export.archive_schema import GraphEntry
from graphzip.export.graph_json import graph_from_json, graph_to_json
from graphzip.export.onnx import export_onnx
from graphzip.export.tree_json import GraphFormatError
from graphzip.graph.restore_modules import to_module
from graphzip.graph.traced import Traced
from graphzip.rewrite.refresh import refresh
from graphzip.tracing.trace import trace

REPOSITORY = Path(__file__).parents[2]


class Net(nn.Module):
    """Batch norm, dropout, tied and frozen parameters, a buffer that is not saved, sizes computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.stem.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, image: torch.Tensor, ids: torch.Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        hidden = torch.relu(self.norm(self.stem(image)))
        left, right = hidden.chunk(2, 1)
        hidden = torch.cat([right, left], 1).mean((2, 3)) + self.shift
        hidden = self.tied(self.drop(self.first(hidden))) * scale
        mask = ids[:, ::2] > 2
        return OrderedDict(
            logits=hidden.masked_fill(mask, float("-inf")),
            parts=(hidden.reshape(hidden.shape[0] * 2, 4), hidden.to(torch.float64)),
        )


def build() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.stem.weight = nn.Parameter(net.stem.weight.detach().contiguous(memory_format=torch.channels_last))
    net(torch.randn(8, 3, 6, 6), torch.zeros(8, 16, dtype=torch.int64))
    return net


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, 6, 6, generator=generator), torch.randint(5, (batch, 16), generator=generator)


def outputs(module: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {str(k): leaf for k, leaf in enumerate(pytree.tree_leaves(module(*inputs(batch))))}


class Saved:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "net.gz"
        self.traced = trace(build(), inputs(2))
        save_archive(self.traced, self.path, report={"kept": 0.5, "groups": ["a"]})
        archive = load_archive(self.path)
        self.loaded, self.report = archive.traced, archive.report
        archive.fill_example(self.loaded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def edit(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an archive whose document is changed."""
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    document = json.loads(metadata["document"])
    change(document)
    save_file(load_file(source), target, metadata=sealed({**metadata, "document": json.dumps(document)}))
    return target


def node(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["graph"]["nodes"] if entry["name"] == name)
    return found


def tied(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["state"] if "same_as" in entry)
    return found


FRESH = """
import pickle, sys
def refuse(*args, **kwargs): raise AssertionError("unpickling")
pickle.load = pickle.loads = refuse
import torch
torch.set_num_threads(1)
from graphzip.export.archive import load_archive
from graphzip.graph.restore_modules import to_module
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree
archive, given, results = sys.argv[1:]
traced = load_archive(archive).traced
module = to_module(traced)
given = load_file(given)
out = {}
for mode in ("eval", "train"):
    torch.manual_seed(1)
    leaves = pytree.tree_leaves(getattr(module, mode)()(given["image"], given["ids"]))
    out.update({f"{mode}.{k}": leaf.detach().contiguous().clone() for k, leaf in enumerate(leaves)})
out.update({f"state.{name}": tensor.contiguous().clone() for name, tensor in module.state_dict().items()})
assert "test_archive" not in sys.modules
save_file(out, results)
"""


def test_a_fresh_process_computes_the_same_bits(saved: Saved, tmp_path: Path) -> None:
    image, ids = inputs(3)
    save_file({"image": image, "ids": ids}, tmp_path / "given")
    arguments = [str(saved.path), str(tmp_path / "given"), str(tmp_path / "results")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], cwd=REPOSITORY, check=True, timeout=300)
    found = load_file(tmp_path / "results")
    module = to_module(saved.traced)
    expected = {f"eval.{k}": leaf for k, leaf in outputs(module.eval(), 3).items()}
    expected |= {f"train.{k}": leaf for k, leaf in outputs(module.train(), 3).items()}
    expected |= {f"state.{name}": tensor for name, tensor in module.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(found["eval.0"], found["train.0"])
    assert int(found["state.norm.num_batches_tracked"]) == 2


def test_loaded_module_is_the_users_model(saved: Saved) -> None:
    original, module = build().eval(), to_module(saved.loaded).eval()
    for name, leaf in outputs(original, 4).items():
        assert torch.equal(outputs(module, 4)[name], leaf)
    assert isinstance(module(*inputs(2)), OrderedDict)


def test_state_is_kept(saved: Saved) -> None:
    old, new = saved.traced.module, saved.loaded.module
    assert list(new.state_dict()) == list(old.state_dict())
    assert "shift" not in new.state_dict()
    assert torch.equal(new.shift, old.shift)
    for (name, before), (other, after) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(before, after)
        assert before.requires_grad == after.requires_grad == (name != "stem.bias")
        assert before.stride() == after.stride()
    assert new.get_submodule("stem").weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_parameters_are_stored_once_and_tied_again(saved: Saved) -> None:
    with safetensors.safe_open(saved.path, framework="pt") as file:
        names = set(file.keys())
    assert "first.weight" in names
    assert "tied.weight" not in names
    module = saved.loaded.module
    assert module.get_submodule("tied").weight is module.get_submodule("first").weight
    assert saved.loaded.aliases == {"tied.weight": "first.weight"}


def test_the_description_is_kept(saved: Saved) -> None:
    assert saved.report == {"kept": 0.5, "groups": ["a"]}
    for name in ("inputs", "aliases", "module_types", "scope", "notes", "batch_dynamic"):
        assert getattr(saved.loaded, name) == getattr(saved.traced, name), name
    assert saved.loaded.module.code == saved.traced.module.code
    assert type(saved.loaded.module).__name__ == type(saved.traced.module).__name__
    assert all("val" not in node.meta for node in saved.loaded.graph.nodes if node.op == "call_function")
    refresh(saved.loaded)
    for old, new in zip(saved.traced.graph.nodes, saved.loaded.graph.nodes, strict=True):
        assert (old.meta["owner"], old.meta["source"]) == (new.meta["owner"], new.meta["source"])
        for before, after in zip(*(pytree.tree_leaves(n.meta["val"]) for n in (old, new)), strict=True):
            if isinstance(before, torch.Tensor):
                dynamic = [isinstance(size, torch.SymInt) for size in before.shape]
                assert dynamic == [isinstance(size, torch.SymInt) for size in after.shape]
                assert before.shape[1:] == after.shape[1:]
                assert before.dtype == after.dtype


def test_example_inputs_are_like_those_traced(saved: Saved) -> None:
    (image, ids), (old_image, old_ids) = saved.loaded.example_inputs, saved.traced.example_inputs
    assert torch.equal(ids, old_ids)
    assert image.shape == old_image.shape
    assert old_image.min() <= image.min() <= image.max() <= old_image.max()
    archive = load_archive(saved.path)
    assert archive.traced.example_inputs[0].stride() == (0, 0, 0, 0)
    archive.fill_example(archive.traced)
    assert torch.equal(archive.traced.example_inputs[0], image)


def test_a_loaded_model_exports(saved: Saved, tmp_path: Path) -> None:
    module = to_module(saved.loaded)
    report = export_onnx(module, saved.loaded.example_inputs, tmp_path / "net.onnx")
    assert report.verified


class Plain(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Any) -> Traced:
    return trace(Plain(function), (torch.randn(2, 4),))


def test_plain_values_and_nested_inputs(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, parts: dict[str, torch.Tensor], flag: bool, name: str | None) -> list[torch.Tensor]:
            return [parts["a"] + parts["b"], parts["a"]] if flag and name is None else []

    x = torch.randn(2, 4)
    save_archive(trace(Nested(), ({"a": x, "b": x + 1}, True, None)), tmp_path / "net", report={})
    loaded = load_archive(tmp_path / "net").traced
    assert loaded.example_inputs[1:] == (True, None)
    assert list(loaded.example_inputs[0]) == ["a", "b"]
    left, right = to_module(loaded)({"a": x, "b": x}, True, None)
    assert torch.equal(left, 2 * x)
    assert torch.equal(right, x)


def test_operators_of_truth_values_are_kept(tmp_path: Path) -> None:
    save_archive(traced(lambda x: ((x > 0) & (x < 1)) | ((x > 2) ^ (x > 3))), tmp_path / "net", report={})
    x = torch.linspace(-1, 4, 8).reshape(2, 4)
    found = to_module(load_archive(tmp_path / "net").traced)(x)
    assert torch.equal(found, ((x > 0) & (x < 1)) | ((x > 2) ^ (x > 3)))


def test_constant_indices_are_known_again(tmp_path: Path) -> None:
    class Shuffle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.channel_shuffle(x, 2)

    before = trace(Shuffle(), (torch.randn(2, 6, 3, 3),))
    save_archive(before, tmp_path / "net", report={})
    after = load_archive(tmp_path / "net").traced
    known = [
        [list(node.meta["numbers"]) for node in each.graph.nodes if "numbers" in node.meta] for each in (before, after)
    ]
    assert known[0] == known[1] == [[0, 3, 1, 4, 2, 5]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -0.5,
        float("inf"),
        float("-inf"),
        "text",
        [1, [2]],
        (1, (2, None)),
        slice(None, 3, 1),
        complex(1, -2),
        torch.float16,
        torch.channels_last,
        torch.strided,
        torch.device("cpu"),
        {"key": [1]},
        ...,
    ],
    ids=str,
)
def test_values_survive(value: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.ops.aten.clone.default, (x, value), {"memory_format": value})
    graph.output((made,))
    leaf = pytree.tree_structure(0)
    spec = pytree.tree_structure(((0,), {}))
    graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(["x"], spec, leaf)))
    again = graph_from_json(GraphEntry.model_validate_json(json.dumps(graph_to_json(graph))))
    found = next(node for node in again.nodes if node.op == "call_function")
    assert found.args[1] == found.kwargs["memory_format"] == value
    assert type(found.args[1]) is type(made.args[1])
    assert repr(found.args) == repr(made.args)


@torch.library.custom_op("graphzip_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@dataclass
class Registered:
    value: torch.Tensor


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


@dataclass
class Nameless:
    value: torch.Tensor


pytree.register_pytree_node(
    Registered,
    lambda result: ([result.value], None),
    lambda leaves, _: Registered(*leaves),
    serialized_type_name="graphzip_test.Registered",
)
pytree.register_pytree_node(Nameless, lambda result: ([result.value], None), lambda leaves, _: Nameless(*leaves))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: twice(x), r"cannot be saved: node 'twice.*graphzip_test.twice.default is not one of PyTorch's own"),
        (lambda x: Nameless(x + 1), "cannot be saved: the model takes or returns a type that cannot be named"),
        (lambda x: Pair(x, x), r"cannot be saved: the model takes or returns a named tuple \(Pair\), whose class"),
    ],
)
def test_what_a_file_cannot_name_is_refused(function: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=message):
        save_archive(traced(function), tmp_path / "net", report={})
    assert list(tmp_path.iterdir()) == []


def test_functions_and_values_without_a_name_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(print, (x,)),))
    spec = pytree.tree_structure(((0,), {}))
    graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(["x"], spec, None)))
    call = next(node for node in graph.nodes if node.op == "call_function")
    with pytest.raises(GraphFormatError, match=r"node 'print_1': function .* is not one that a file can name"):
        graph_to_json(graph)
    call.target, call.args = torch.ops.aten.relu.default, (x, range(3))
    with pytest.raises(GraphFormatError, match="a range cannot be written"):
        graph_to_json(graph)


def test_an_example_input_must_be_plain(saved: Saved, tmp_path: Path) -> None:
    odd = replace(saved.traced, example_inputs=(torch.float32,))
    with pytest.raises(ArchiveError, match=r"the example input torch.float32 is neither a tensor nor a plain value"):
        save_archive(odd, tmp_path / "net", report={})


def test_a_failing_write_keeps_the_old_file(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: disk full")

    (tmp_path / "net").write_text("old")
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ArchiveError, match=r"cannot write .*net: I/O error: disk full; free some space"):
        save_archive(saved.traced, tmp_path / "net", report={})
    assert (tmp_path / "net").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_report_must_be_plain_data(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="its report or options are not plain JSON data"):
        save_archive(traced(torch.relu), tmp_path / "net", report={"tensor": torch.ones(1)})


def test_a_result_type_unknown_to_the_loading_process_is_named(tmp_path: Path) -> None:
    save_archive(traced(lambda x: Registered(x + 1)), tmp_path / "net", report={})
    loaded = load_archive(tmp_path / "net").traced
    assert isinstance(to_module(loaded)(torch.ones(2, 4)), Registered)
    code = (
        "import sys; from graphzip.errors import ArchiveError; from graphzip.export.archive import load_archive\n"
        "try: load_archive(sys.argv[1])\n"
        "except ArchiveError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net")]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=300)
    assert "takes or returns a graphzip_test.Registered, which this process does not know; first import" in done.stdout


def test_the_place_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"the directory .*missing does not exist"):
        save_archive(traced(torch.relu), tmp_path / "missing" / "net", report={})


def test_files_that_are_not_archives(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"there is no file .*nowhere"):
        load_archive(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ArchiveError, match="text is not a model that graphzip saved, or it is damaged"):
        load_archive(tmp_path / "text")
    data = saved.path.read_bytes()
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArchiveError, match="short is not a model that graphzip saved, or it is damaged"):
        load_archive(tmp_path / "short")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ArchiveError, match="weights is a safetensors file, but not a model that graphzip saved"):
        load_archive(tmp_path / "weights")
    newer = {"format": "graphzip", "version": "3", "document": "{}"}
    save_file({"weight": torch.ones(2)}, tmp_path / "newer", metadata=newer)
    with pytest.raises(
        ArchiveError, match=r"format version 3, newer than the 2 that .* pip install --upgrade graphzip"
    ):
        load_archive(tmp_path / "newer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("state"), "net is damaged: state: Field required; copy it again"),
        (lambda data: data.update(report=[]), "report: Input should be an object"),
        (lambda data: data["state"].pop(0), "is damaged"),
        (
            lambda data: node(data, "relu").update(target="aten.no_such.default"),
            r"'aten.no_such.default' is not an operator that a file can name",
        ),
        (
            lambda data: node(data, "relu").update(target="aten.relu_.default"),
            "'aten.relu_.default' is not an operator",
        ),
        (
            lambda data: node(data, "relu").update(target="aten.from_file.default"),
            "'aten.from_file.default' is not an operator",
        ),
        (lambda data: node(data, "relu").update(target="os.system"), "'os.system' is not an operator"),
        (
            lambda data: node(data, "relu").update(target="aten.relu.__class__"),
            "'aten.relu.__class__' is not an operator",
        ),
        (lambda data: node(data, "relu").update(args=[{"node": "later"}]), "node 'later' is used before it is defined"),
        (lambda data: node(data, "relu").update(args=[{"pickle": "gASV"}]), "'pickle' needs a list"),
        (lambda data: node(data, "relu").update(args=[{"dtype": "nn"}]), "torch has no dtype 'nn'"),
        (lambda data: node(data, "relu").update(args=[{}]), "{} is not a value"),
        (lambda data: data["inputs"][0].__setitem__(2, "nn"), "torch has no dtype 'nn'"),
        (
            lambda data: node(data, "relu").update(op="call_module"),
            r"graph.nodes.\d+.op: Input should be 'placeholder'",
        ),
        (lambda data: node(data, "relu").update(name="x; import os"), "'x; import os' is not a name"),
        (lambda data: node(data, "relu").update(name="image"), "node 'image' is taken twice"),
        (lambda data: node(data, "relu").update(kwargs={"a=1": 2}), "'a=1' is not a name"),
        (lambda data: node(data, "image").update(target="x=print()"), r"'x=print\(\)' is not a name"),
        (lambda data: node(data, "shift").update(target='a" + b'), "holds a quote"),
        (lambda data: tied(data).update(name="a\nb"), "control character"),
        (lambda data: tied(data).update(name="a..b"), "'a..b' is not the name of a parameter"),
        (lambda data: data["graph"]["arguments"].__setitem__(0, "a, b=print()"), r"'a, b=print\(\)' is not a name"),
        (
            lambda data: data["graph"]["inputs"][1]["children_spec"][1].update(
                context='["a\':print(),"]', children_spec=[{"type": None, "context": None, "children_spec": []}]
            ),
            r"is not a name",
        ),
        (
            lambda data: data["graph"]["outputs"][1].update(type="collections.defaultdict"),
            "a collections.defaultdict, which a file cannot hold",
        ),
        (
            lambda data: data["graph"]["outputs"][1].update(context='{"__enum__": true, "fqn": "os:x", "name": "y"}'),
            "a collections.OrderedDict whose keys are not distinct texts",
        ),
    ],
)
def test_a_changed_document_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(ArchiveError, match=message):
        load_archive(edit(saved.path, tmp_path / "net", change))


def test_a_graph_without_a_signature_is_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(GraphFormatError, match="the graph has no call signature"):
        graph_to_json(graph)
