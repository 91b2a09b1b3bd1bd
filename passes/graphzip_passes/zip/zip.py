"""Zip several trained models into one that shares neurons (MTZ).

Layer by layer in order of execution: with the inputs of a layer shared as far as the layers before it were zipped, its
neurons are paired by how much error sharing them costs, the newcomer's channels are put in the order of their partners
(which changes nothing), and the weights from shared inputs to shared neurons become one (`graphzip_passes.zip.solve`).
Then every model is put together from what it shares and what it has alone (Fig. 1; `graphzip.rewrite.partition`).

What couples channels is the channel groups' business (`graphzip_passes.zip.channels`): a residual stream is paired
once, by the layer that makes it first, and every other layer that writes to it or reads it follows; heads of attention
are paired as wholes and inside. A batch norm stays with its task: the scale of a layer before it is free, so rows are
joined in units of their deviation, and its statistics move as far as the layer's outputs did on the calibration data.

Source: He, Zhou and Thiele, "Multi-Task Zipping via Layer-wise Neuron Sharing": Algorithm 1, sections 3.2 to 3.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.graph.state import attach, get_tensor, named_state
from graphzip.graph.traced import Traced
from graphzip.plan.passes import Zip
from graphzip.plan.problems import plan_error
from graphzip.progress import counted
from graphzip.report.outcome import Outcome, Table
from graphzip.report.tables import closest
from graphzip.rewrite.edit import settle, tie
from graphzip.rewrite.partition import share
from graphzip_passes.base import ByTensor, Decision, PassContext, Stage, Weights, by_tensor, register_pass
from graphzip_passes.zip.channels import Channels
from graphzip_passes.zip.joining import Joining
from graphzip_passes.zip.joint import Arrival, Joint, joins_bias
from graphzip_passes.zip.layers import match
from graphzip_passes.zip.masks import KeptZeros
from graphzip_passes.zip.pairing import Pairing
from graphzip_passes.zip.readings import Readings
from graphzip_passes.zip.refitting import Refitting

__all__ = ["ZipPass", "zip_by_tensor", "zip_models"]


@register_pass(Zip, decides=True, only_reads=True)
def zip_models(traced: Traced, options: Zip, context: PassContext) -> Decision:
    """Decide which layers correspond; each is then zipped when its stage begins."""
    zipping = ZipPass(options, traced, seed=context.seed, where=context.where)
    return Decision(zipping.finish, constraint=KeptZeros(), stages=zipping.stages)


@by_tensor(Zip, other_layers=True)
def zip_by_tensor(traced: Traced, options: Zip, context: PassContext, weights: Weights) -> ByTensor:
    """Zip models whose tensors are mapped from files: what is changed is, too, from the end of its layer on."""
    zipping = ZipPass(options, traced, seed=context.seed, where=context.where)
    stages = zipping.stages()
    for stage in counted(stages, "zipping", zipping.layers):
        assert stage.rewrite is not None
        traced = stage.rewrite(traced, context)
    outcome = zipping.finish(traced, context)
    return ByTensor(outcome, lambda name: get_tensor(outcome.traced.module, name).detach())


class ZipPass:
    """`Zip` bound to several models: which layers correspond is decided here, who is paired stage by stage."""

    def __init__(self, options: Zip, traced: Traced, *, seed: int, where: str) -> None:
        options = _as_paper(options, where) if options.paper else options
        tasks = _order(options, [task.name for task in traced.tasks], where)
        matching = match(traced, tasks, options.match or {}, where=where)
        readings = Readings(tasks, places=options.places, seed=seed)
        channels = Channels(matching, tasks)
        self.joint = Joint(options, where, tasks, matching, channels, readings, np.random.default_rng(seed))
        amounts = self._amounts()
        found = {name: self._obstacle(name, amounts) for name in matching.layers}
        self.layers = [name for name, obstacle in found.items() if obstacle is None]
        self.alone = {name: obstacle for name, obstacle in found.items() if obstacle is not None} | matching.alone
        self.pairing, self.joining = Pairing(self.joint, amounts, self.layers), Joining(self.joint)
        self.refitting = Refitting(self.joint, self.joining, self.layers)
        self.before = _parameters(traced)
        self.zipped: set[str] = set()
        self.stored: dict[str, tuple[int, int]] = {}
        self.left: dict[str, torch.Tensor] = {}

    def _amounts(self) -> dict[str, float | int]:
        """How much of each layer is shared, or its threshold; layers of which nothing is are left out."""
        options, where, layers = self.joint.options, self.joint.where, list(self.joint.matching.layers)
        key = "share" if options.threshold is None else "threshold"
        given = options.share if options.threshold is None else options.threshold
        table = given if isinstance(given, Mapping) else {"*": given}
        problems = [
            f"{where}.{what}: {glob!r} matches no layer; {closest(glob, layers)}"
            for globs, what in ((options.exclude, "exclude"), (table if isinstance(given, Mapping) else (), key))
            for glob in globs
            if not any(fnmatchcase(name, glob) for name in layers)
        ]
        if problems:
            raise plan_error(problems)
        found = {}
        for name in layers:
            amount = next((value for glob, value in table.items() if fnmatchcase(name, glob)), 0)
            if amount and not any(fnmatchcase(name, glob) for glob in options.exclude):
                found[name] = amount
        return found

    def _obstacle(self, name: str, amounts: Mapping[str, float | int]) -> str | None:
        """Why nothing is shared of a layer; nothing where something is."""
        matching, channels = self.joint.matching, self.joint.channels
        if name not in amounts:
            excluded = any(fnmatchcase(name, glob) for glob in self.joint.options.exclude)
            return "the plan excludes it" if excluded else "the plan shares nothing of it"
        made = channels.made(matching.layers[name][self.joint.tasks[0]])
        if not made:
            return "no channels are known that it makes"
        if not matching.outputs.isdisjoint(made):
            return "its channels are an output of the model"
        if any(set(matching.layers[name]) - set(matching.partners(group)) for group in made):
            return "a weight that several models have already couples its channels"
        if not all(channels.parts_stay(each) for each in matching.layers[name].values()):
            return "channels that change places lie in several of its groups"
        return None

    def stages(self) -> tuple[Stage, ...]:
        """One for each layer that is not zipped yet."""
        return tuple(
            Stage(f"zip/{name}", rewrite=partial(self._zip, name)) for name in self.layers if name not in self.zipped
        )

    def _zip(self, name: str, traced: Traced, context: PassContext) -> Traced:
        """Zip one layer."""
        joint, feeds = self.joint, {} if context.calibration is None else context.calibration.feeds
        if joint.solves and not feeds:
            text = "needs calibration data; pass calibration={...}, or write metric: euclidean"
            raise plan_error([f"{joint.where}.metric: {joint.options.metric!r} {text}"])
        readings, layers = joint.readings, joint.matching.layers[name]
        readings.processes = context.processes
        readings.workspace = joint.channels.workspace = context.workspace
        joined = [task for task in joint.tasks if task in layers]
        result = traced.copy()
        state = dict(named_state(traced.module))
        if not all(_are_equal(tensor, state.get(key)) for key, tensor in self.left.items()):
            readings.forget()
            self.refitting.is_trained = True
        taking_part = [layer for each in self.layers for layer in joint.matching.layers[each].values()]
        readings.note_given(traced, [*taking_part, *self.refitting.watched()], feeds)
        if joint.options.metric == "correlation" and not readings.same_inputs():
            text = "compares what models give for the same inputs; give every task the same batches as calibration data"
            raise plan_error([f"{joint.where}.metric: 'correlation' {text}, or write metric: hessian"])
        inputs = {task: readings.inputs(result, layers[task], feeds) for task in joined} if feeds else {}
        self.refitting.rows(result, layers, inputs)
        for number, task in enumerate(joined[1:], start=1):
            arrival = Arrival(result, name, layers, tuple(joined[:number]), task, inputs)
            self.pairing.decide(arrival)
            self.joining.merge(arrival)
        self.refitting.rest(result, {task: layers[task] for task in joined}, inputs)
        for task, found in inputs.items():
            self.joining.correct(result, layers[task], found)
            readings.done(layers[task])
        self._store(result, name, joined)
        self.refitting.behind(result, name, feeds)
        if context.workspace is not None:
            context.workspace.store(result)
            context.workspace.files.trim()
        self.left = dict(named_state(result.module))
        if any(len(layer.nodes) > 1 for layer in layers.values()):
            readings.forget()  # a layer that reads what it made itself
        self.zipped.add(name)
        return result

    def _store(self, traced: Traced, name: str, joined: Sequence[str]) -> None:
        """Store what the tasks share of a layer once."""
        layers = self.joint.matching.layers[name]
        keys = self.joint.channels.keys({task: layers[task] for task in joined})
        stored = share(traced, {task: layers[task].weight for task in joined}, keys)
        if joins_bias(layers):
            biases = {task: str(layers[task].bias) for task in joined}
            sizes = share(traced, biases, {task: (rows, None) for task, (rows, _) in keys.items()})
            stored = stored[0] + sizes[0], stored[1] + sizes[1]
        self.stored[name] = stored
        tie(traced)
        traced.module.recompile()

    def finish(self, traced: Traced, context: PassContext) -> Outcome:
        """Other parameters of shared channels that are equal in several tasks are one from here on."""
        result = traced.copy()
        state = dict(named_state(result.module))
        first, *others = self.joint.tasks
        for name, tensor in state.items():
            task, _, local = name.partition(".")
            other = state.get(f"{first}.{local}")
            if not isinstance(tensor, nn.Parameter) or not isinstance(other, nn.Parameter) or task not in others:
                continue
            if torch.equal(other, tensor) and self.joint.channels.is_shared(name):
                attach(result.module, name, other)
            if context.workspace is not None:
                context.workspace.files.rest()
        tie(result)
        details = self._details(_parameters(result))
        rows = [(name, _percent(layer["shared"]), "") for name, layer in details["layers"].items()]
        rows += [(name, "", obstacle) for name, obstacle in self.alone.items()]
        columns = ("layer", "shared parameters", "why nothing is shared")
        note = (
            f"{_percent(details['shared'])} of the parameters of these layers are shared, and "
            f"{_percent(details['shared_of_all'])} of all, heads counted"
        )
        shown = tuple(row[: 2 + bool(self.alone)] for row in rows)
        table = Table(columns if self.alone else columns[:2], shown, note=note if self.stored else "")
        return Outcome(settle(result), changed=bool(self.stored), tables=(table,), details=details)

    def _details(self, after: int) -> dict[str, Any]:
        """For every layer what is shared: channels, and its parameters as a share; or why not.

        `shared` is the share of what the zipped layers hold, `shared_of_all` that of all parameters of all models, the
        heads among them, which is the figure of Table 3; `after` are the parameters of the result.
        """
        layers = {
            name: {
                "channels": self.pairing.shared.get(name, {}),
                "parameters": list(sizes),
                "shared": self._share(sizes),
            }
            for name, sizes in self.stored.items()
        }
        total = [sum(sizes[side] for sizes in self.stored.values()) for side in (0, 1)]
        refitted = sorted(self.refitting.fitted)
        return {
            "layers": layers,
            "parameters": total,
            "shared": self._share(total),
            "shared_of_all": self._share((self.before, after)),
            "refitted": refitted,
            "alone": self.alone,
        }

    def _share(self, sizes: Sequence[int]) -> float:
        """The share of each network's parameters that all have, from their numbers before and after."""
        before, after = sizes
        return (before - after) / (before * (1.0 - 1.0 / len(self.joint.tasks))) if before else 0.0


def _are_equal(left: torch.Tensor, now: torch.Tensor | None) -> bool:
    """Whether a tensor is as it was left: the same, or a copy that was given away and not trained."""
    if now is None or left is now:
        return left is now
    return left.data_ptr() != now.data_ptr() and torch.equal(left, now.detach().to(left.device))


def _parameters(traced: Traced) -> int:
    return sum(parameter.numel() for parameter in traced.module.parameters())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _as_paper(options: Zip, where: str) -> Zip:
    wanted = {"refit": False, "pairing": "greedy"}
    others = {name for name, value in wanted.items() if getattr(options, name) != value}
    others |= {"metric"} if options.metric == "correlation" else set()
    problems = [
        f"{where}.{name}: {getattr(options, name)!r} is not what Algorithm 1 does; leave it out, or write paper: false"
        for name in sorted(others & options.model_fields_set)
    ]
    if problems:
        raise plan_error(problems)
    return options.model_copy(update=wanted)


def _order(options: Zip, names: list[str], where: str) -> tuple[str, ...]:
    if options.order and sorted(options.order) != sorted(names):
        raise plan_error([f"{where}.order: {list(options.order)} are not the tasks {names}; name each of them once"])
    tasks = tuple(options.order) or tuple(names)
    for task in options.match or {}:
        if task not in tasks[1:]:
            raise plan_error([f"{where}.match: no task {task!r} to match; {closest(task, tasks[1:])}"])
    return tasks
