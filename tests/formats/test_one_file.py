"""Folders that are compiled a tensor at a time into one file, which describes what no config does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphzip as gz
from tests.support.folders import llama

transformers = pytest.importorskip("transformers")

DRAW = torch.Generator().manual_seed(0)
DATA = [torch.randint(0, 64, (3, 12), generator=DRAW) for _ in range(2)]
PLANS: dict[str, tuple[gz.Plan, dict[str, Any]]] = {
    "another width in each layer": (
        gz.Plan([gz.PruneChannels(keep={"*0.mlp*": 0.5, "*1.mlp*": 0.25}, criterion="l1")]),
        {},
    ),
    "thin layers that are fitted": (gz.Plan([gz.LowRank(rank=0.25, method="data-svd")]), {"calibration": DATA}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    llama(dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.mark.parametrize("name", PLANS)
def test_the_file_holds_what_compile_gives_bit_for_bit(name: str, folder: Path, tmp_path: Path) -> None:
    plan, data = PLANS[name]
    compiled = gz.compile(gz.from_pretrained(folder), plan, {"input_ids": DATA[0]}, dynamic_shapes="length", **data)
    report = gz.compile_folder(folder, plan, tmp_path / "slim.graphzip", **data)
    assert [file.name for file in tmp_path.iterdir()] == ["slim.graphzip"]
    loaded = gz.load(tmp_path / "slim.graphzip")
    found, wanted = loaded.module.state_dict(), compiled.module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert report.passes == loaded.report.passes == compiled.report.passes
    ids = DATA[0][:, :7]
    with torch.no_grad():
        for _ in range(2):
            logits = loaded.module(ids).logits
            assert torch.equal(logits, compiled.module(ids).logits)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert ids.shape == (3, 9)


def test_thin_layers_need_a_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(gz.PlanError, match=r"passes\[0\].low_rank_factors: it makes layers .* ends in '.graphzip'"):
        gz.compile_folder(folder, gz.Plan([gz.LowRank()]), tmp_path / "slim")
    with pytest.raises(gz.PlanError, match=r"method: 'data-svd' needs calibration data"):
        gz.compile_folder(folder, gz.Plan([gz.LowRank(method="data-svd")]), tmp_path / "slim.graphzip")
    assert not list(tmp_path.iterdir())
