"""Models of other packages as a user brings them, and what a user does with one.

`examine` looks at the groups, merges planted duplicates, halves, exports, trains and saves.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from planting import double, mergeable_share, plant, randomize_, relative
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphzip as gz

Inputs = tuple[Any, ...] | dict[str, Any]
HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


@dataclass
class Examined:
    """What became of a model: channel groups and the share of channels that can merge, the cuts at half the width,
    how far outputs moved by a lossless merge, the export's report, losses of three steps, and seconds for each stage.
    """

    groups: int = 0
    share: float = 0.0
    pinned: list[str] = field(default_factory=list)
    worst: float = 0.0
    params: float = 0.0
    macs: float = 0.0
    notes: tuple[str, ...] = ()
    refused: tuple[int, ...] = ()
    exported: Any = None
    losses: list[float] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    reloaded: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def with_batch(inputs: Inputs, rows: int) -> Inputs:
    """The same inputs with another first dimension."""
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x] * rows)[:rows], inputs)  # type: ignore[no-any-return]


class _Call(nn.Module):
    """Takes inputs by position, as `randomize_` gives them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Any:
        return run(self.model, inputs)


def _randomized(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A float64 copy with random statistics that has run as often as the model: some keep what a forward leaves."""
    made, ran = double(model), double(model)
    randomize_(_Call(ran), 0, (inputs,))  # type: ignore[arg-type]
    made.load_state_dict(ran.state_dict())
    return made


def merged_losslessly(model: nn.Module, inputs: Inputs) -> float:
    """Plant duplicates in float64, merge them, and tell the worst relative difference at several batch sizes."""
    inputs = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    model = _randomized(model, inputs)
    clusters = plant(model, gz.channel_groups(model, inputs), 0)
    assert clusters
    merged = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), inputs)
    rows = leaves(inputs)[0].shape[0]
    with torch.no_grad():
        worst = relative(run(copy.deepcopy(model), inputs), run(merged.module, inputs))
        for batch in (rows + 1, 1):
            more = with_batch(inputs, batch)
            expected = run(copy.deepcopy(model), more)
            try:
                worst = max(worst, relative(expected, run(merged.module, more)))
            except gz.GraphZipError:
                assert merged.report.notes, "a batch is refused, and the report does not say so"
    return worst


def refused_batches(model: nn.Module, compiled: Any, inputs: Inputs) -> tuple[int, ...]:
    """Batches that the model takes and the compiled module does not; of the others the outputs' shapes are checked."""
    refused = []
    for rows in (1, 3, 5):
        more = with_batch(inputs, rows)
        with torch.no_grad():
            expected = run(copy.deepcopy(model), more)
            try:
                found = run(compiled.module, more)
            except gz.GraphZipError:
                refused.append(rows)
                continue
        assert [leaf.shape for leaf in leaves(found)] == [leaf.shape for leaf in leaves(expected)]
    return tuple(refused)


def trained(module: nn.Module, inputs: Inputs, steps: int = 3) -> tuple[list[float], list[str]]:
    """The losses of some steps on all outputs of the training form, and the parameters that got no gradient."""
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    losses = []
    for _ in range(steps):
        outputs = [leaf for leaf in leaves(run(module, inputs)) if leaf.requires_grad]
        loss = torch.stack([leaf.square().mean() for leaf in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def examine(model: nn.Module, inputs: Inputs, stages: str = "glhets", mode: str = "eval") -> Examined:
    """Everything about one model; stages are groups, lossless, half, export, train, save."""
    found = Examined()
    for stage in stages:
        start = time.perf_counter()
        if stage == "g":
            groups = gz.channel_groups(model, inputs)
            found.groups, found.share = len(groups), mergeable_share(groups)
            found.pinned = sorted({group.reason for group in groups if group.reason})
        elif stage == "l":
            found.worst = merged_losslessly(model, inputs)
        elif stage == "h":
            half = gz.compile(model, HALF, inputs, mode=mode)
            before, after = half.report.before, half.report.after
            found.params, found.macs = 1 - after.params / before.params, 1 - after.macs / max(before.macs, 1)
            found.notes, found.refused = half.report.notes, refused_batches(model, half, inputs)
        elif stage == "e":
            with tempfile.TemporaryDirectory() as folder:
                found.exported = half.export(Path(folder) / "half.onnx")
        elif stage == "t":
            found.losses, found.untrained = trained(half.module, inputs)
            if mode == "train":
                wanted, made = (run(copy.deepcopy(each).train(), inputs) for each in (model, half.module))
                assert pytree.tree_structure(wanted) == pytree.tree_structure(made)
                assert [leaf.shape for leaf in leaves(wanted)] == [leaf.shape for leaf in leaves(made)]
        elif stage == "s":
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                half.save(Path(folder) / "half.graphzip")
                again = gz.load(Path(folder) / "half.graphzip").module
                found.reloaded = relative(run(half.module, inputs), run(again, inputs))
        found.seconds[stage] = round(time.perf_counter() - start, 1)
    return found
