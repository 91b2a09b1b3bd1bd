"""Folders of `transformers` that are compiled a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands.cli import app
from graphzip.formats import by_tensor, shards
from tests.support.folders import llama, tensors

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))}
HALF = gz.Plan([gz.PruneChannels(keep={"*mlp*": 0.5})])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    llama(tie_word_embeddings=True).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


PLANS = {
    "everywhere": gz.Plan([gz.PruneChannels(keep=0.5, criterion="l2", norms="plain")]),
    "global": gz.Plan([gz.PruneChannels(keep={"*mlp*": 0.5}, ranking="global", round_to=12)]),
    "two passes": gz.Plan([gz.PruneChannels(keep={"*mlp*": 0.5}), gz.ClusterMerge(keep={"*mlp*": 0.5})]),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_folder_is_that_of_compile_bit_for_bit(name: str, folder: Path, tmp_path: Path) -> None:
    model = gz.from_pretrained(folder)
    compiled = gz.compile(model, PLANS[name], IDS)
    gz.save_pretrained(compiled, model, tmp_path / "whole")
    report = gz.compile_folder(folder, PLANS[name], tmp_path / "slim")
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "slim")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert sum(value.numel() for value in found.values()) < sum(value.numel() for value in tensors(folder).values())
    assert report.groups == compiled.report.groups
    for one, other in ((report.before, compiled.report.before), (report.after, compiled.report.after)):
        assert (one.params, one.macs) == (other.params, other.macs)
    assert not report.lossless
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("whole", "slim")]
    assert configs[0] == configs[1]
    loaded = gz.from_pretrained(tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, gz.from_pretrained(tmp_path / "whole")(**IDS).logits)
    assert (tmp_path / "slim" / "tokenizer.json").read_text() == "{}"


def test_shards_are_read_and_written_and_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    monkeypatch.setattr(shards.write_shards, "__defaults__", (8_000,))
    told: list[tuple[int, int, str]] = []
    gz.compile_folder(tmp_path / "sharded", HALF, tmp_path / "slim", progress=lambda *given: told.append(given))
    index = json.loads((tmp_path / "slim" / "model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "slim")
    assert {name: name in load_file(tmp_path / "slim" / file) for name, file in index["weight_map"].items()} == (
        dict.fromkeys(found, True)
    )
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    written = [given for given in told if given[2].startswith("writing: ")]
    assert {given[2].removeprefix("writing: ") for given in written} == set(found)
    assert [given[:2] for given in written] == [(number, len(found)) for number in range(len(found))]
    assert [given[2] for given in told if given[2].startswith("scoring: ")] == [
        f"scoring: model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)
    ]
    assert gz.from_pretrained(tmp_path / "slim").config.intermediate_size == 12
    assert not list((tmp_path / "slim").glob("*.part"))


def test_one_group_is_held_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were read are gone when the next group is looked at."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = shards.Shards.__call__

    def counted(self: shards.Shards, name: str) -> torch.Tensor:
        nonlocal most
        value = read(self, name)
        alive.append(weakref.ref(value))
        most = max(most, sum(each() is not None for each in alive))
        return value

    monkeypatch.setattr(shards.Shards, "__call__", counted)
    monkeypatch.setattr(shards.write_shards, "__defaults__", (1,))
    gz.compile_folder(folder, HALF, tmp_path / "slim")
    assert 1 <= most <= 4


def test_a_classifier_of_pictures_takes_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    plan = gz.Plan([gz.PruneChannels(keep={"*fc1*": 0.5})])
    with pytest.raises(gz.ExampleInputError, match=r"ViTForImageClassification is no model of text .*'pixel_values'"):
        gz.compile_folder(tmp_path / "vit", plan, tmp_path / "slim")
    inputs = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    report = gz.compile_folder(tmp_path / "vit", plan, tmp_path / "slim", inputs)
    assert [(group.before, group.after) for group in report.groups] == [(24, 12)]
    assert gz.from_pretrained(tmp_path / "slim").config.intermediate_size == 12


# --- refused, with nothing left behind -------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no plan": ("half", gz.PlanError, r"expected a graphzip.Plan, got str; write Plan\(\[...\]\) or Plan.load\(path\)"),
    "another pass": (
        gz.Plan([gz.Minimize()]),
        gz.PlanError,
        r"passes\[0\].minimize: it sees all weights together.* from_pretrained",
    ),
    "a criterion of data": (
        gz.Plan([gz.PruneChannels(criterion="wanda")]),
        gz.PlanError,
        r"passes\[0\].prune_channels.criterion: 'wanda': it looks at calibration data",
    ),
    "pruning compensated": (
        gz.Plan([gz.PruneChannels(compensate="data")]),
        gz.PlanError,
        r"passes\[0\].prune_channels.compensate: 'data' needs calibration data; pass calibration=",
    ),
    "statistics": (
        gz.Plan([gz.PruneChannels(compensate="free")]),
        gz.PlanError,
        r"passes\[0\].prune_channels.compensate: 'free' looks at several layers together; write 'none' or 'data'",
    ),
    "merging compensated": (
        gz.Plan([gz.ClusterMerge(compensate="data")]),
        gz.PlanError,
        r"passes\[0\].cluster_merge.compensate: 'data' needs calibration data; pass calibration=",
    ),
    "reconstruction": (
        gz.Plan([gz.ClusterMerge(clustering="reconstruction")]),
        gz.PlanError,
        r"passes\[0\].cluster_merge.clustering: 'reconstruction' looks at several layers together; write 'kmeans'",
    ),
    "activations": (
        gz.Plan([gz.ClusterMerge(features="activations")]),
        gz.PlanError,
        r"passes\[0\].cluster_merge.features: 'activations' looks at several layers together; write 'weights'",
    ),
    "another width in each layer": (
        gz.Plan([gz.PruneChannels(keep={"*layers.0.mlp*": 0.5})]),
        gz.ArchiveError,
        "config.json cannot say the widths",
    ),
    "a norm that weighs its channels": (
        gz.Plan([gz.ClusterMerge(keep={"model.embed_tokens": 0.5}, clustering="imbalanced")]),
        gz.ArchiveError,
        "LlamaForCausalLM of the slim widths computes otherwise than the slim model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    plan, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        gz.compile_folder(folder, plan, tmp_path / "slim")
    assert not list(tmp_path.iterdir())


def spoiled(folder: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(change(tensors(folder)), target / "model.safetensors")
    return target


def test_files_that_do_not_fit_the_class(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    norm = "model.norm.weight"
    less = spoiled(folder, tmp_path / "less", lambda held: {name: held[name] for name in held if name != norm})
    with pytest.raises(gz.ArchiveError, match=f"less has no '{norm}', or in several tensors of which LlamaForCausalLM"):
        gz.compile_folder(less, HALF, tmp_path / "slim")
    wrong = spoiled(folder, tmp_path / "wrong", lambda held: held | {norm: torch.ones(7)})
    with pytest.raises(gz.ArchiveError, match=rf"wrong: '{norm}' is \(7,\), where the config says \(32,\)"):
        gz.compile_folder(wrong, HALF, tmp_path / "slim")
    more = spoiled(folder, tmp_path / "more", lambda held: held | {"old.table": torch.ones(7)})
    gz.compile_folder(more, HALF, tmp_path / "slim")
    assert "'old.table' of" in caplog.text
    assert "old.table" not in tensors(tmp_path / "slim")
    (more / "copy.safetensors").write_bytes((more / "model.safetensors").read_bytes())
    with pytest.raises(gz.ArchiveError, match=r"model.safetensors and copy.safetensors both have"):
        gz.compile_folder(more, HALF, tmp_path / "again")
    (more / "copy.safetensors").write_bytes(b"nothing")
    with pytest.raises(gz.ArchiveError, match=r"copy.safetensors cannot be read"):
        gz.compile_folder(more, HALF, tmp_path / "again")
    with pytest.raises(gz.ArchiveError, match=r"slim exists; give the name of a new folder"):
        gz.compile_folder(folder, HALF, tmp_path / "slim")
    with pytest.raises(gz.ArchiveError, match="list is no folder; give one, or several by name"):
        gz.compile_folder([folder, folder], HALF, tmp_path / "again")  # type: ignore[arg-type]
    with pytest.raises(gz.ArchiveError, match="task: 'translation' is unknown"):
        gz.compile_folder(folder, HALF, tmp_path / "again", task="translation")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["less", "more", "slim", "wrong"]


def test_an_error_while_writing_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def stop(done: int, count: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gz.compile_folder(folder, HALF, tmp_path / "slim", progress=stop)
    assert not list(tmp_path.iterdir())


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(folder: Path, tmp_path: Path) -> None:
    slim = tmp_path / "slim"
    done = CliRunner().invoke(app, ["compile-folder", str(folder), "--prune", "*mlp*=0.5", "-o", str(slim), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"]["after"]["params"] < json.loads(done.stdout)["report"]["before"]["params"]
    HALF.save(tmp_path / "plan.yaml")
    same = [str(folder), "--plan", str(tmp_path / "plan.yaml"), "-o", str(tmp_path / "same")]
    done = CliRunner().invoke(app, ["compile-folder", *same])
    assert done.exit_code == 0, done.output
    assert all(torch.equal(value, tensors(slim)[name]) for name, value in tensors(tmp_path / "same").items())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "give a plan file with --plan, or widths with --prune GLOB=AMOUNT: one of them"),
        (["--prune", "*mlp*=half"], "--prune: '*mlp*=half' is no width"),
        (["--prune", "*mlp*=0.5", "--task", "cooking"], "task: 'cooking' is unknown"),
    ],
)
def test_a_wrong_command(given: list[str], text: str, folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compile-folder", str(folder), "-o", str(tmp_path / "slim"), *given])
    assert done.exit_code in {1, 2}
    assert text in done.stderr
    assert not (tmp_path / "slim").exists()


def test_what_streams_is_what_the_passes_say() -> None:
    from graphzip_passes.base import PASSES, pass_of

    for options in (gz.PruneChannels(), gz.ClusterMerge(), gz.LowRank()):
        pass_of(options, "here")
    assert {kind for kind, known in PASSES.items() if known.by_tensor} >= {
        gz.PruneChannels,
        gz.ClusterMerge,
        gz.LowRank,
    }
    assert by_tensor.compile_folder is gz.compile_folder
