"""Folders that are compiled on calibration data with one layer's weights in memory at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands.cli import app
from graphzip.formats import shards
from graphzip.mapped import MappedFiles
from graphzip_passes.parts import streamed
from tests.support.folders import llama, tensors

transformers = pytest.importorskip("transformers")

DRAW = torch.Generator().manual_seed(0)
DATA = [torch.randint(0, 64, (3, 12), generator=DRAW) for _ in range(2)]
MLP = {"*mlp*": 0.5}
PLANS = {
    "dropped": [gz.PruneChannels(keep=MLP, criterion="wanda", compensate="data")],
    "merged, then dropped": [
        gz.ClusterMerge(keep=MLP, clustering="kmeans"),
        gz.PruneChannels(keep=MLP, compensate="data"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    llama(tie_word_embeddings=True).save_pretrained(path)
    return path


def apart(one: Path, other: Path) -> float:
    """The largest difference of two folders' tensors, relative to the largest number of each."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max() / left[k].abs().max()) for k in left)


@pytest.mark.parametrize("name", PLANS)
def test_layers_are_fitted_as_in_memory(name: str, folder: Path, tmp_path: Path) -> None:
    plan, model = gz.Plan(PLANS[name]), gz.from_pretrained(folder)
    compiled = gz.compile(model, plan, {"input_ids": DATA[0]}, calibration=DATA)
    gz.save_pretrained(compiled, model, tmp_path / "whole")
    report = gz.compile_folder(folder, plan, tmp_path / "slim", calibration=DATA)
    assert apart(tmp_path / "whole", tmp_path / "slim") < 1e-6
    assert report.groups == compiled.report.groups
    assert (
        [kind for kind, _ in report.passes] == [kind for kind, _ in compiled.report.passes]
        if isinstance(report.passes[0], tuple)
        else report.passes == compiled.report.passes
    )


@pytest.fixture(scope="module")
def fitted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slim") / "llama"
    gz.compile_folder(folder, gz.Plan(PLANS["dropped"]), path, calibration=DATA)
    return path


def test_spilled_values_are_the_same(
    folder: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_SPILLED", 64)
    mapped: list[Path] = []
    stored = MappedFiles.stored

    def counted(files: MappedFiles, value: torch.Tensor, file: Path) -> torch.Tensor:
        mapped.append(file)
        return stored(files, value, file)

    monkeypatch.setattr(MappedFiles, "stored", counted)
    (tmp_path / "values").mkdir()
    plan = gz.Plan(PLANS["dropped"])
    gz.compile_folder(folder, plan, tmp_path / "spilled", calibration=DATA, spill=tmp_path / "values")
    assert len(mapped) > 100
    assert not list((tmp_path / "values").iterdir())
    assert apart(tmp_path / "spilled", fitted) < 1e-6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_spilled_values_give_their_memory_back(tmp_path: Path) -> None:
    """Until they are read again; a view of one is in its file already."""

    def resident() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0])

    workspace = streamed.Workspace(tmp_path, tmp_path)
    value = torch.arange(1 << 22)
    spilled = workspace.spilled(value)
    view = spilled.view(2, -1).T
    assert workspace.spilled(view) is view
    assert torch.equal(spilled, value)
    before = resident()
    workspace.files.rest()
    assert before - resident() > 0.9 * value.nbytes
    assert torch.equal(view.T.reshape(-1), value)


def test_fitting_helps(folder: Path, fitted: Path, tmp_path: Path) -> None:
    gz.compile_folder(folder, gz.Plan([gz.PruneChannels(keep=MLP, criterion="l1")]), tmp_path / "dropped")
    with torch.no_grad():
        wanted, slim, dropped = (
            gz.from_pretrained(each)(DATA[0]).logits for each in (folder, fitted, tmp_path / "dropped")
        )
    assert float((slim - wanted).square().mean()) < 0.5 * float((dropped - wanted).square().mean())


def test_sharded_bfloat16_with_masks(tmp_path: Path) -> None:
    llama(dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    mask = torch.ones_like(DATA[0])
    mask[0, :5] = 0
    batches = [{"input_ids": each, "attention_mask": mask, "labels": each} for each in DATA]
    plan, model = gz.Plan(PLANS["dropped"]), gz.from_pretrained(tmp_path / "sharded")
    example = {"input_ids": DATA[0], "attention_mask": mask}
    gz.save_pretrained(gz.compile(model, plan, example, calibration=batches), model, tmp_path / "whole")
    gz.compile_folder(tmp_path / "sharded", plan, tmp_path / "slim", calibration=batches)
    found = tensors(tmp_path / "slim")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert apart(tmp_path / "whole", tmp_path / "slim") < 1e-6


def test_few_weights_are_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one operator of both models, and what is written; however deep the model is."""
    llama(num_hidden_layers=4).save_pretrained(tmp_path / "deep")
    most: dict[str, int] = {}
    for name in (folder, tmp_path / "deep"):
        alive: list[weakref.ref[torch.Tensor]] = []
        peak = 0
        read = shards.Shards.__call__

        def counted(self: shards.Shards, name: str, alive: Any = alive, read: Any = read) -> torch.Tensor:
            nonlocal peak
            value: torch.Tensor = read(self, name)
            alive.append(weakref.ref(value))
            peak = max(peak, sum(each() is not None for each in alive))
            return value

        with monkeypatch.context() as patch:
            patch.setattr(shards.Shards, "__call__", counted)
            patch.setattr(shards.write_shards, "__defaults__", (1,))
            gz.compile_folder(name, gz.Plan(PLANS["dropped"]), tmp_path / f"{name.name}-slim", calibration=DATA)
        most[name.name] = peak
    assert most["llama"] == most["deep"] <= 5


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a loss": (gz.PruneChannels(criterion="taylor"), gz.PlanError, "looks at all layers together.*'wanda'"),
    "second moments": (gz.PruneChannels(criterion="obs"), gz.PlanError, "looks at all layers together.*'wanda'"),
    "the best of merges": (gz.ClusterMerge(), gz.PlanError, r"clustering: 'reconstruction' looks .* write 'kmeans'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_all_layers_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    options, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        gz.compile_folder(folder, gz.Plan([options]), tmp_path / "slim", calibration=DATA)
    assert not list(tmp_path.iterdir())


def test_wrong_data(folder: Path, tmp_path: Path) -> None:
    plan = gz.Plan(PLANS["dropped"])
    with pytest.raises(gz.PlanError, match="it looks at calibration data"):
        gz.compile_folder(folder, plan, tmp_path / "slim")
    with pytest.raises(gz.ExampleInputError, match=r"calibration: batch 1: .* has shape"):
        gz.compile_folder(folder, plan, tmp_path / "slim", calibration=[DATA[0], DATA[0][:, :5]])
    with pytest.raises(gz.ArchiveError, match=r"the directory .*nowhere does not exist"):
        gz.compile_folder(folder, plan, tmp_path / "slim", calibration=DATA, spill=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_the_command(folder: Path, fitted: Path, tmp_path: Path) -> None:
    gz.Plan(PLANS["dropped"]).save(tmp_path / "plan.yaml")
    np.savez(tmp_path / "text.npz", input_ids=torch.cat(DATA).numpy())
    given = [str(folder), "--plan", str(tmp_path / "plan.yaml"), "--calibration", str(tmp_path / "text.npz")]
    done = CliRunner().invoke(app, ["compile-folder", *given, "--spill", str(tmp_path), "-o", str(tmp_path / "slim")])
    assert done.exit_code == 0, done.output
    assert apart(tmp_path / "slim", fitted) < 1e-4
