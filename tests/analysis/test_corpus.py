"""The groups of real architectures, as they were last looked at: a change of one rule cannot silently change a model.

`pytest tests/analysis/test_corpus.py -m "" --update-corpus` writes the file anew; look at its
difference before committing it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import mergeable_share
from torch import nn

import graphzip as gz

models: Any = pytest.importorskip("torchvision.models")

CORPUS = Path(__file__).with_name("corpus.json")
QUICK = [
    "alexnet", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mobilenet_v3_small", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vit_b_16",
]  # fmt: skip
SLOW = [
    "convnext_tiny", "efficientnet_v2_s", "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large",
    "regnet_x_400mf", "regnet_y_400mf", "resnet50", "swin_v2_t", "vgg11", "vgg16_bn", "vit_b_32", "wide_resnet50_2",
]  # fmt: skip


def summary(groups: gz.ChannelGroups) -> dict[str, Any]:
    """How many groups and channels, what share can shrink, and a digest of all that a table shows."""
    rows = [{**group.to_dict(), "reason": _general(group.reason)} for group in groups]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {
        "groups": len(groups),
        "channels": sum(group.size for group in groups),
        "mergeable": round(mergeable_share(groups), 4),
        "digest": digest[:16],
    }


def _general(reason: str | None) -> str | None:
    """A reason without the node and the source line, which other versions of a library change."""
    return reason and re.sub(r" \(node .*?\)", "", reason)


def analysed(name: str) -> gz.ChannelGroups:
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    model: nn.Module = models.get_model(name, weights=None, **options).to("meta").eval()
    size = 299 if name == "inception_v3" else 224
    return gz.channel_groups(model, (torch.empty(2, 3, size, size, device="meta"),))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_groups_are_those_of_the_corpus(name: str, request: pytest.FixtureRequest) -> None:
    known = json.loads(CORPUS.read_text(encoding="utf-8")) if CORPUS.exists() else {}
    groups = analysed(name)
    found = summary(groups)
    if request.config.getoption("--update-corpus"):
        known[name] = found
        CORPUS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found == known.get(name), f"{groups}\n\nif that is meant: pytest {__file__} -m '' --update-corpus"


def test_the_corpus_holds_nothing_else() -> None:
    assert set(json.loads(CORPUS.read_text(encoding="utf-8"))) == {*QUICK, *SLOW}
