"""Models of `transformers` that are larger than the memory: from a folder to a slimmer one, a tensor at a time.

The graph has no weights: it is traced, analysed, rewritten and proven on the meta device. Passes ask for the weights of
one group when they decide, and the new value of a tensor is computed when it is written. Calibration data runs through
the graph one operator at a time, whose weights alone are read then.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.arguments import by_task, check_seed, re_iterable
from graphzip.boundary import public
from graphzip.calibration import Calibration, Trained
from graphzip.calls import Signature
from graphzip.errors import ArchiveError, PlanError
from graphzip.export.archive import save_archive
from graphzip.files import check_target, scratch, unwritable
from graphzip.formats.folder_weights import text_examples, weights_of
from graphzip.formats.huggingface import (
    ADVICE,
    companions,
    computed_buffers,
    copy_files,
    fitting,
    new_folder,
    of_config,
    without_weights,
)
from graphzip.formats.joint_folders import Folders, compile_folders
from graphzip.formats.shards import Shards, write_shards
from graphzip.graph.state import find_aliases, get_tensor, named_state
from graphzip.graph.tasks import check_task_names
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.plan.plan import Plan, check_plan
from graphzip.progress import Progress, counted, step, watched
from graphzip.report.origin import Origin
from graphzip.report.report import Report
from graphzip.tracing.compare_modes import form_of
from graphzip.tracing.results import Outputs
from graphzip.tracing.trace import trace
from graphzip.training.account import Account, Moves
from graphzip_passes.base import PassContext, Weights, checked_outcome, pass_of
from graphzip_passes.parts.streamed import Workspace, on_cpu, tensors_of

__all__ = ["compile_folder"]

logger = logging.getLogger(__name__)

_GENERATION: Final = "generation_config.json"
_FILE: Final = ".graphzip"


@public
def compile_folder(
    folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    plan: Plan,
    target: str | os.PathLike[str],
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    outputs: Outputs | Mapping[str, Outputs] | None = None,
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    spill: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> Report:
    """Carry out `plan` on the model in `folder`, and write the slimmer one into the new folder `target`, with weights
    that are never all in memory: what a channel group has, and what is written into one file (512 MiB), are.

    Both are folders of `transformers`, with a config.json and safetensors (one file, or sharded), as `from_pretrained`
    reads and `save_pretrained` writes them; `task` is that of `from_pretrained`. A `target` that ends in ".graphzip" is
    one file, as `Compiled.save` writes it: `graphzip.load` reads it, layers may have any widths and ranks, and without
    `example_inputs` it takes text of any length. The passes of the plan are those that look at a group or a layer at a
    time: `PruneChannels` with a criterion of weights or activations, `ClusterMerge` with a clustering of weights, and
    `LowRank`. Of `example_inputs` the shapes count, and tensors on the meta device will do; models of text need none.
    `outputs`, `seed` and `progress` are those of `compile`. Widths are computed from the same numbers as by `compile`,
    tensors keep their dtypes.

    `calibration` are batches as for `compile`. They go through the model an operator at a time, on the CPU, with the
    weights that it reads: layers behind what shrank are fitted (`compensate="data"`), written beside `target`, and
    forgotten. What operators give on all batches is in memory, or in files in the folder `spill`, as long as it is
    read. Sequences have the length of the example, by default of the first batch.

    Several folders, `{"a": folder, "b": folder}`, become one file for a plan with `Zip`, or with no pass, which packs
    them side by side; `example_inputs` and `calibration` (where given) are mappings with the same keys, `outputs` is
    one, too, or holds for all. Their tensors are mapped from the files, and what is changed is written into files
    beside `target` layer by layer.

    Raises `ArchiveError` for a folder that holds no such model, or whose files name tensors otherwise than the class
    does, and where the config cannot say the widths; `PlanError` for other passes, for options that look at several
    layers together, and for layers that no class has in a folder. Nothing is left of `target` then. Other errors are
    those of `compile`.
    """
    if not isinstance(folder, str | os.PathLike | Mapping):
        raise ArchiveError(
            f"{type(folder).__name__} is no folder; give one, or several by name: {{'a': ..., 'b': ...}}"
        )
    _check(plan, seed, str(target), several=isinstance(folder, Mapping))
    given: Any = (example_inputs, calibration, outputs, task)
    several = _by_name(folder, *given) if isinstance(folder, Mapping) else None
    place = check_target(target, ArchiveError) if str(target).endswith(_FILE) else new_folder(target)
    with watched(progress), _workspace(place, spill) as workspace, torch.inference_mode(False):
        if several is not None:
            report = compile_folders(several, plan, place, seed, workspace)
        else:
            data = None if calibration is None else re_iterable(calibration, "calibration")
            source, chosen = cast(tuple[str, Outputs | None], (folder, outputs))
            report = _compiled(Path(source), plan, place, example_inputs, _How(task, chosen, seed, data, workspace))
    logger.info("%s", report)
    return report


def _by_name(folders: Mapping[Any, Any], examples: Any, calibration: Any, outputs: Any, task: str | None) -> Folders:
    """What belongs to several folders. Raises `GraphZipError` for names that cannot be those of tasks."""
    if len(folders) < 2:
        raise ArchiveError(f"a mapping of folders needs at least two, got {list(folders)}; give the one alone")
    check_task_names(folders)
    for name, each in folders.items():
        if not isinstance(each, str | os.PathLike):
            raise ArchiveError(f"task {name!r}: {type(each).__name__} is no folder; give the name of one")
    data = None if calibration is None else by_task(calibration, folders, "calibration")
    return Folders(
        paths={name: Path(each) for name, each in folders.items()},
        examples=None if examples is None else by_task(examples, folders, "example_inputs"),
        data=data and {name: re_iterable(each, f"calibration[{name!r}]") for name, each in data.items()},
        outputs=by_task(outputs, folders, "outputs")
        if isinstance(outputs, Mapping)
        else dict.fromkeys(folders, outputs),
        task=task,
    )


@dataclass(frozen=True)
class _How:
    """The options of `compile_folder`, and where graphs run."""

    task: str | None
    outputs: Outputs | None
    seed: int
    data: Iterable[Any] | None
    workspace: Workspace


@contextmanager
def _workspace(place: Path, spill: str | os.PathLike[str] | None) -> Iterator[Workspace]:
    """Beside the new folder, and in the one for values. Nothing is left of either."""
    try:
        with ExitStack() as stack:
            values = None
            if spill is not None:
                check_target(Path(spill) / "values", ArchiveError)
                values = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphzip-", dir=spill)))
            yield Workspace(stack.enter_context(scratch(place)), values)
    except OSError as error:
        raise unwritable(place, error, ArchiveError) from error


def _compiled(source: Path, plan: Plan, place: Path, example_inputs: Any, how: _How) -> Report:
    step(f"tracing {source} without its weights")
    model = without_weights(source, how.task)
    inputs = text_examples(model, how.data) if example_inputs is None else pytree.tree_map(_on_meta, example_inputs)
    open_ = "length" if example_inputs is None and place.suffix == _FILE else None
    traced = trace(model, inputs, outputs=how.outputs, dynamic_shapes=open_)
    constants = computed_buffers(source, how.task) | _choices(traced)
    weights = weights_of(model, Shards(source), source, constants)
    signature = {"": Signature.of(model, inputs)}
    known = Analysed.of(traced)
    account = Account.of(traced, known.groups)
    for number, options in enumerate(plan.passes):
        where = f"passes[{number}].{options.kind}"
        carry_out = pass_of(options, where).by_tensor
        assert carry_out is not None
        known = known if not number else Analysed.of(traced)
        trained = Trained(model, traced)
        calibration = None if how.data is None else Calibration({"": how.data}, signature, trained)
        context = PassContext(where, how.seed, trained, calibration, known=known, workspace=how.workspace)
        found = carry_out(traced, options, context, weights)
        outcome = checked_outcome(found.outcome, where)
        account.add(options.kind, outcome)
        traced, weights = outcome.traced, found.weights
    slim = None if place.suffix == _FILE else _class_of(model, traced, inputs, how.outputs)
    report = account.report(traced, Moves({"": 0.0}, has_data=False, eps=0.0), Origin.of(plan, how.seed, ()))
    if slim is None:
        save_archive(on_cpu(traced), place, report=report.to_dict(), read=tensors_of(traced, weights))
    else:
        _write(slim, weights, source, place)
    return report


def _check(plan: Any, seed: Any, target: str, *, several: bool) -> None:
    check_plan(plan)
    check_seed(seed)
    if several and not target.endswith(_FILE):
        raise PlanError(
            f"several models become one file; give a target that ends in {_FILE!r}, which graphzip.load reads"
        )
    for number, options in enumerate(plan.passes):
        where = f"passes[{number}].{options.kind}"
        known = pass_of(options, where)
        if options.joins and not several:
            raise PlanError(f"{where} joins several models; give a mapping from task names to folders")
        if several and (number or not options.joins):
            raise PlanError(
                f"{where}: several folders take one pass, which joins them; give others one folder each before"
            )
        if len(options.expanded(has_data=True)) > 1:
            raise PlanError(f"{where}.within: models in folders are zipped alone; merge each with ClusterMerge before")
        if known.by_tensor is None:
            raise PlanError(
                f"{where}: it sees all weights together, and cannot be carried out a tensor at a time; load the model "
                "with from_pretrained, and compile that"
            )
        if known.other_layers and not target.endswith(_FILE):
            raise PlanError(
                f"{where}: it makes layers that no config describes; give a target that ends in {_FILE!r}, which "
                "graphzip.load reads"
            )


def _choices(traced: Traced) -> dict[str, torch.Tensor]:
    """The constants by which layers choose all positions of a table, by name."""
    chosen = [node for node in traced.graph.nodes if node.meta.get("choice")]
    return {str(node.target): torch.arange(get_tensor(traced.module, str(node.target)).numel()) for node in chosen}


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _class_of(model: nn.Module, traced: Traced, inputs: Any, outputs: Outputs | None) -> nn.Module:
    """A model of the class of `model` with the widths of the graph, on the meta device, which computes what that does.

    Raises `ArchiveError` where no config gives one.
    """
    held = dict(named_state(traced.module))
    expected = form_of(traced.module, model).computes

    def build(config: Any) -> nn.Module:
        with torch.device("meta"):
            slim = of_config(type(model), config).eval()
        if form_of(trace(slim, inputs, outputs=outputs).module, slim).computes != expected:
            raise ArchiveError(
                f"{type(model).__name__} of the slim widths computes otherwise than the slim model (a norm that was "
                f"narrowed may weigh its channels, which norms='plain' leaves out); {ADVICE}"
            )
        return slim

    return fitting(model, {name: tuple(held[name].shape) for name in model.state_dict() if name in held}, build)


def _write(slim: nn.Module, weights: Weights, source: Path, place: Path) -> None:
    """Write the folder, whole or not at all."""
    tied = find_aliases(slim)
    state = slim.state_dict(keep_vars=True)
    names = [name for name in state if name not in tied]

    def read(name: str) -> torch.Tensor:
        value = weights(name)
        if value.shape != state[name].shape:
            raise ArchiveError(f"{name!r} is not part of what was compiled and has the old widths; {ADVICE}")
        return value

    try:
        with scratch(place) as fresh:
            slim.config.save_pretrained(fresh)  # type: ignore[union-attr, operator]
            write_shards(fresh, counted(names, "writing", names), read)
            generation = [source / _GENERATION] if (source / _GENERATION).is_file() else []
            copy_files([*companions(source), *generation], fresh)
            fresh.rename(place)
    except OSError as error:
        raise unwritable(place, error, ArchiveError) from error
