"""Several folders of `transformers` that become one joint model, which may be larger than the memory.

The models hold tensors that are mapped from the files, so all that looks at a model may look at these; what a pass
changes lies in files, too, before it goes on to the next layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.calibration import Calibration, Trained, check_calibration
from graphzip.calls import Call, Signature, call_of
from graphzip.errors import ExampleInputError, GraphZipError
from graphzip.export.archive import save_archive
from graphzip.formats.folder_weights import text_examples, weights_of
from graphzip.formats.huggingface import computed_buffers, without_weights
from graphzip.formats.shards import Shards
from graphzip.graph.state import attach, get_tensor, is_persistent, like, named_state
from graphzip.graph.tasks import joined_module
from graphzip.graph.torch_private import pytree
from graphzip.plan.plan import Plan
from graphzip.progress import counted
from graphzip.report.origin import Origin
from graphzip.report.report import Report
from graphzip.rewrite.join_models import join
from graphzip.rewrite.whole_tables import whole_tables
from graphzip.tracing.trace import trace
from graphzip.training.account import Account, Moves
from graphzip_passes.base import PassContext, checked_outcome, pass_of
from graphzip_passes.parts.streamed import Workspace

__all__ = ["Folders", "compile_folders"]


@dataclass(frozen=True)
class Folders:
    """Folders by task, and what else belongs to each of them, where it is given."""

    paths: Mapping[str, Path]
    examples: Mapping[str, Any] | None
    data: Mapping[str, Iterable[Any]] | None
    outputs: Mapping[str, Any]
    task: str | None


def compile_folders(folders: Folders, plan: Plan, place: Path, seed: int, workspace: Workspace) -> Report:
    """Carry out a plan that joins the models in these folders, and write the joint one into a file."""
    models: dict[str, nn.Module] = {}
    traced, calls = {}, dict[str, Call]()
    for name, path in counted(folders.paths.items(), "tracing", folders.paths):
        try:
            models[name] = _mapped_model(path, folders.task, workspace)
            calls[name] = _call(models[name], name, folders)
            open_ = "length" if folders.examples is None else None
            traced[name] = trace(models[name], calls[name], outputs=folders.outputs[name], dynamic_shapes=open_)
            data = None if folders.data is None else folders.data[name]
            check_calibration(data, models[name], Signature.of(models[name], calls[name]))
        except GraphZipError as error:
            raise type(error)(f"task {name!r}: {error}") from error
        workspace.files.rest()
    joint = join(traced)
    known = Analysed.of(joint)
    account = Account.of(joint, known.groups)
    trained = Trained(joined_module(models, {name: len(call.args) for name, call in calls.items()}), joint)
    signatures = {name: Signature.of(models[name], call) for name, call in calls.items()}
    calibration = None if folders.data is None else Calibration(folders.data, signatures, trained)
    for number, options in enumerate(plan.passes):
        where = f"passes[{number}].{options.kind}"
        carry_out = pass_of(options, where).by_tensor
        assert carry_out is not None
        context = PassContext(where, seed, trained, calibration, known=known, workspace=workspace)
        outcome = checked_outcome(carry_out(joint, options, context, partial(get_tensor, joint.module)).outcome, where)
        account.add(options.kind, outcome)
        joint = outcome.traced
    joint = whole_tables(joint)
    report = account.report(
        joint, Moves(dict.fromkeys(models, 0.0), has_data=False, eps=0.0), Origin.of(plan, seed, ())
    )

    def read(name: str) -> torch.Tensor:
        workspace.files.rest()
        return get_tensor(joint.module, name).detach()

    save_archive(joint, place, report=report.to_dict(), read=read)
    return report


def _mapped_model(path: Path, task: str | None, workspace: Workspace) -> nn.Module:
    """The model in a folder, with tensors that are mapped from its files."""
    model = without_weights(path, task)
    read = weights_of(model, Shards(path, workspace.files), path, computed_buffers(path, task))
    made: dict[int, torch.Tensor] = {}
    for name, old in list(named_state(model)):
        if id(old) not in made:
            made[id(old)] = like(read(name), old)
            workspace.note_stored(made[id(old)])
        attach(model, name, made[id(old)], persistent=is_persistent(model, name))
    return model


def _call(model: nn.Module, name: str, folders: Folders) -> Call:
    """How the model is called; the values do not count, nor where they are."""
    if folders.examples is None:
        given: Any = text_examples(model, None if folders.data is None else folders.data[name])
    else:
        given = folders.examples[name]
    call = call_of(model, pytree.tree_map_only(torch.Tensor, _zeros, given))
    if call.kwargs:
        raise ExampleInputError(
            f"{next(iter(call.kwargs))!r} does not follow the other arguments of {type(model).__name__}; where several "
            "models are given, give those between as well"
        )
    return call


def _zeros(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype)
