"""Convolutions whose kernel is built carry the mark of their layer: through files, joined models and new traces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factor_cases import IMAGE, small
from torch import nn

import graphzip as gz
from graphzip.graph.meta import Factored, meta_of
from graphzip.graph.traced import Traced
from graphzip.graph.unmarked_kernels import mark_unmarked
from graphzip.tracing.trace import trace


def marks(traced: Traced) -> list[Factored]:
    return [meta_of(node)["factored"] for node in traced.graph.nodes if "factored" in node.meta]


def kinds(model: nn.Module) -> list[str]:
    return [type(inner).__name__ for inner in model.modules() if "Conv" in type(inner).__name__]


PLANS = {
    "atoms": gz.AtomFactorize(atom_drop=0.25, share="layer", force=True),
    "groups": gz.AtomFactorize(group_size=4, force=True),
    "slices": gz.SliceGenerate(slice=(5, 3, 3, 3), code=6, force=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_marks_survive_a_file_and_are_told_of_one_that_has_none(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = gz.compile(small().eval(), gz.Plan([PLANS[name]]), IMAGE)
    own = marks(made.traced)
    assert [mark.layer for mark in own] == ["1.0", "2.0", "3.0"]
    made.save(tmp_path / "net")
    loaded = gz.load(tmp_path / "net")
    assert marks(loaded.traced) == own
    assert kinds(loaded.module) == kinds(made.module)
    for node in loaded.traced.graph.nodes:
        node.meta.pop("factored", None)
    mark_unmarked(loaded.traced)
    assert marks(loaded.traced) == own
    assert marks(trace(made.module, IMAGE)) == own
