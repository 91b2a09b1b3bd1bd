"""Several folders of `transformers` that are zipped with tensors that are mapped from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands.cli import app
from graphzip_passes.parts import streamed
from tests.support.folders import llama

transformers = pytest.importorskip("transformers")

DRAW = torch.Generator().manual_seed(0)
DATA = {name: [torch.randint(0, 64, (3, 12), generator=DRAW) for _ in range(2)] for name in ("a", "b")}
EXAMPLES = {name: {"input_ids": batches[0]} for name, batches in DATA.items()}
CASES: dict[str, tuple[gz.Plan, dict[str, Any]]] = {
    "fitted": (gz.Plan([gz.Zip(share=0.75)]), {"calibration": DATA}),
    "without data": (gz.Plan([gz.Zip(metric="euclidean")]), {}),
    "side by side": (gz.Plan([]), {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two decoders, of which one was trained on, each in several files."""
    path = tmp_path_factory.mktemp("models")
    model = llama(dtype=torch.bfloat16, num_hidden_layers=1).to(torch.bfloat16)
    model.save_pretrained(path / "a", max_shard_size="10KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=DRAW)
    model.save_pretrained(path / "b", max_shard_size="10KB")
    return {"a": path / "a", "b": path / "b"}


def check_as_compiled(
    folders: dict[str, Path], plan: gz.Plan, target: Path, shapes: Any = None, **data: Any
) -> gz.Compiled:
    """The file holds what `compile` gives, bit for bit."""
    models = {task: gz.from_pretrained(folder) for task, folder in folders.items()}
    names = dict.fromkeys(models, "logits")
    compiled = gz.compile(models, plan, EXAMPLES, dynamic_shapes=shapes, outputs=names, **data)
    given = {} if shapes else {"example_inputs": EXAMPLES}
    report = gz.compile_folder(folders, plan, target, spill=target.parent, outputs="logits", **given, **data)
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    loaded = gz.load(target)
    found, wanted = loaded.module.state_dict(), compiled.module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert report.passes == loaded.report.passes == compiled.report.passes
    assert report.after.params == compiled.report.after.params
    return loaded


def test_the_file_holds_what_compile_gives(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_SPILLED", 1)
    plan, data = CASES["fitted"]
    loaded = check_as_compiled(folders, plan, tmp_path / "joint.graphzip", **data)
    assert loaded.report.after.params < 0.8 * loaded.report.before.params


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_text_of_any_length(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_SPILLED", 1)
    plan, data = CASES[name]
    loaded = check_as_compiled(folders, plan, tmp_path / "joint.graphzip", dict.fromkeys(folders, "length"), **data)
    ids = {task: batches[0][:, :7] for task, batches in DATA.items()}
    with torch.no_grad():
        assert all(found.logits.shape == (3, 7, 64) for found in loaded.module(**ids).values())


def test_what_cannot_be_zipped(folders: dict[str, Path], tmp_path: Path) -> None:
    plan, target = gz.Plan([gz.Zip()]), tmp_path / "joint.graphzip"

    def refused(kind: type[Exception], text: str, given: Any, plan: gz.Plan = plan, **more: Any) -> None:
        with pytest.raises(kind, match=text):
            gz.compile_folder(given, plan, more.pop("target", target), **more)
        assert not list(tmp_path.iterdir())

    refused(gz.PlanError, r"passes\[0\].zip joins several models; give a mapping", folders["a"])
    refused(gz.PlanError, r"several models become one file; give a target that ends", folders, target=tmp_path / "new")
    refused(
        gz.PlanError, r"passes\[0\].prune_channels: several folders take one", folders, gz.Plan([gz.PruneChannels()])
    )
    refused(gz.PlanError, r"passes\[0\].cross_domain_share: it sees all", folders, gz.Plan([gz.CrossDomainShare()]))
    refused(gz.ArchiveError, "a mapping of folders needs at least two", {"a": folders["a"]})
    refused(gz.ArchiveError, "task 'b': int is no folder", {"a": folders["a"], "b": 3})
    refused(gz.ArchiveError, "task 'b': .*none is no folder", folders | {"b": tmp_path / "none"})
    refused(
        gz.ExampleInputError, "calibration has the keys 'a', the models have", folders, calibration={"a": DATA["a"]}
    )


def test_the_command(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, batches in DATA.items():
        np.save(tmp_path / f"{name}.npy", batches[0].numpy())
    gz.Plan([gz.Zip()]).save(tmp_path / "zip.yaml")
    models = [f"{name}={folder}" for name, folder in folders.items()]
    data = [part for name in folders for part in ("--calibration", f"{name}={tmp_path / name}.npy")]
    given = ["compile-folder", *models, "--plan", str(tmp_path / "zip.yaml"), "-o", str(tmp_path / "joint.graphzip")]
    given += ["--outputs", "logits"]
    called: list[Any] = []

    def compiled(*args: Any, **options: Any) -> Any:
        called.append((args, options))
        raise gz.ArchiveError("enough")

    monkeypatch.setattr(gz, "compile_folder", compiled)
    assert CliRunner().invoke(app, [*given, *data]).exit_code == 1
    ((found, plan, _), options) = called[0]
    assert found == {name: str(folder) for name, folder in folders.items()}
    assert plan == gz.Plan([gz.Zip()])
    assert options["outputs"] == ["logits"]
    assert all(torch.equal(options["calibration"][name][0][0], DATA[name][0]) for name in folders)
    for wrong, text in (
        ([*given, *data[:2]], "--calibration: 'b' has none; give all or none"),
        ([*given[:1], models[0], *given[3:], *data], "--calibration: one folder has one file of data; give it once"),
        ([*given[:2], str(folders["b"]), *given[3:]], "has no name; with several models write name=value"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2
        assert text in done.stderr
    assert len(called) == 1
