"""Atoms and coefficients: kernels `K_n = A[:c_n, :c'_n, :m] D_n` whose coefficients `A` many layers share.

Layer `n` keeps `m` atoms `D_n` of the size of its kernel; `A` has the largest dimensions that the layers need. With
groups of `s` channels, filter group `j` has atoms of its own, `K_j = A D_j`, and reads `s` input channels; the output
channels are shuffled.

Source: "A Joint Subspace View to Convolutional Neural Networks" (ACDC): Eq. 1 to 3, blocks in section 3.3, groups in
section 3.4, atom-drop in section 4, the random start in appendix A.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphzip.analysis.convs import ConvLayer, conv_layers
from graphzip.export.latency import ConvCase, milliseconds
from graphzip.graph.layers.factored import AtomConv, factored_conv
from graphzip.graph.operators import arguments_of
from graphzip.graph.traced import Traced
from graphzip.numeric.im2col import Window
from graphzip.numeric.solvers import checked
from graphzip.plan.passes import AtomFactorize
from graphzip.plan.problems import plan_error
from graphzip.progress import counted
from graphzip.report.outcome import Outcome
from graphzip.rewrite.factor import factor
from graphzip.rewrite.lower import AtomCall, atom_calls, atoms_first
from graphzip_passes.base import Decision, PassContext, register_pass
from graphzip_passes.factorize.atom_fit import fit_atoms, random_atoms
from graphzip_passes.factorize.compensate import compensated
from graphzip_passes.factorize.conv_layers import blocks_of, convolutions_of, kernel_of, select
from graphzip_passes.factorize.error_table import error_table
from graphzip_passes.factorize.patch_moments import input_moments
from graphzip_passes.factorize.worth import LeftOut, Stored, left_out_table, worth_storing

__all__ = ["AtomFactorizePass", "atom_factorize"]

logger = logging.getLogger(__name__)

_START = "groups of channels change what the model computes: the fit is a start for training, not a replacement"


@dataclass(frozen=True)
class _Split:
    """How a layer is divided: `count` groups of filters, read by `groups` groups of input channels."""

    layer: ConvLayer
    count: int
    groups: int

    @property
    def rows(self) -> int:
        return self.layer.shape[0] // self.count

    @property
    def columns(self) -> int:
        return self.layer.shape[1] * self.layer.groups // self.groups

    @property
    def length(self) -> int:
        return math.prod(self.layer.shape[2:])

    def filters(self, number: int) -> slice:
        """Output channels of a group; the shuffle brings them to these places."""
        return slice(number, None, self.count)

    def inputs(self, number: int) -> slice:
        """Input channels that a group reads, as columns of the kernel."""
        start = number * self.groups // self.count * self.columns if self.count > 1 else 0
        return slice(start, start + self.columns)


@register_pass(AtomFactorize, decides=True)
def atom_factorize(traced: Traced, options: AtomFactorize, context: PassContext) -> Decision:
    """Store kernels as atoms and coefficients, which are trained in their place."""
    factorizing = AtomFactorizePass(options, traced, seed=context.seed, where=context.where)
    return Decision(factorizing.finish, trained=factorizing.factored(traced, context))


class AtomFactorizePass:
    """`AtomFactorize` bound to a model: which layers it stores as atoms, and who shares coefficients."""

    def __init__(self, options: AtomFactorize, traced: Traced, *, seed: int, where: str) -> None:
        self.options, self.seed = options, seed
        layers = conv_layers(traced)
        self.names = {layer.name: traced.qualified(layer.name).rstrip(".") for layer in layers}
        self.layers = select(layers, self.names, options.include, options.exclude, where=where)
        self.splits = self._splits(where)
        self.sets = self._sets()
        self.left_out: dict[str, LeftOut] = {}
        if not options.force:
            self._leave_out(traced, where)
        self.errors: dict[str, float] = {}
        self.first: set[str] = set()
        self.times: dict[str, tuple[float, float]] = {}

    def factored(self, traced: Traced, context: PassContext) -> tuple[Traced, nn.Module]:
        """The graph and the model with atoms and coefficients in place of kernels."""
        model, data, moments = context.model, context.calibration, {}
        if self.options.weighted and self.options.init == "fit" and data is not None:
            moments = input_moments({layer.name: model.get_submodule(layer.name) for layer in self.layers}, data)
        made = self._made(traced, model, moments)
        result = factor(traced, model, self.layers, made)
        if self.options.init == "fit":
            replaces = all(split.count == 1 for split in self.splits.values())
            result = compensated(traced, result, self.options.compensate if replaces else "none", context)
            self.errors = {name: self._relative_error(traced, name, made[name]) for name in self.splits}
        return result

    def finish(self, traced: Traced, context: PassContext) -> Outcome:
        """Build the kernels of some layers, and apply the atoms of others first."""
        if self.options.lower == "auto":
            self.times = context.processes.agreed(_measured(atom_calls(traced, self.splits)))
            first = [name for name, (built, atoms) in self.times.items() if atoms < built]
        else:
            first = list(self.splits) if self.options.lower == "atoms_first" else []
        self.first = set(first)
        details = self._details()
        fitted = bool(self.errors) and any(split.count > 1 for split in self.splits.values())
        note = {"note": _START} if fitted else {}
        return Outcome(
            atoms_first(traced, first) if first else traced,
            changed=bool(self.layers),
            tables=(
                *error_table(details["relative_error"], details["shared"], **note),
                *left_out_table(self.left_out),
            ),
            details={**details, **note},
        )

    def _details(self) -> dict[str, Any]:
        sets: dict[Any, list[str]] = {}
        for (layer, _), key in self.sets.items():
            names = sets.setdefault(key, [])
            if self.names[layer] not in names:
                names.append(self.names[layer])
        found: dict[str, Any] = {
            "layers": [self.names[layer.name] for layer in self.layers],
            "shared": list(sets.values()),
            "atoms_first": [self.names[name] for name in self.splits if name in self.first],
            "relative_error": {self.names[name]: error for name, error in self.errors.items()},
        }
        if self.left_out:
            found["left_out"] = list(self.left_out)
        if self.times:
            found["milliseconds"] = {self.names[name]: list(times) for name, times in self.times.items()}
        if unused := self._unused():
            found["unused_coefficients"] = unused
        return found

    def _unused(self) -> int:
        """Coefficients in corners of shared blocks that no layer reaches: widest outputs and inputs in other layers."""
        used: dict[Any, torch.Tensor] = {}
        for (name, _), key in self.sets.items():
            mates = [self.splits[mate] for (mate, _), other in self.sets.items() if other == key]
            if key not in used:
                used[key] = torch.zeros(max(mate.rows for mate in mates), max(mate.columns for mate in mates))
            used[key][: self.splits[name].rows, : self.splits[name].columns] = 1.0
        return self.options.atoms * int(sum((block == 0).sum() for block in used.values()))

    def _splits(self, where: str) -> dict[str, _Split]:
        size, problems, splits = self.options.group_size, [], {}
        for layer in self.layers:
            outs, ins = layer.shape[0], layer.shape[1] * layer.groups
            if size is None:
                splits[layer.name] = _Split(layer, 1, layer.groups)
            elif layer.groups > 1:
                problems.append(f"{self.names[layer.name]!r} has groups already")
            elif (outs > size and outs % size) or (ins > size and ins % size):
                problems.append(
                    f"{size} does not divide both widths of {self.names[layer.name]!r} ({ins} to {outs} channels)"
                )
            else:
                count = max(1, outs // size)
                splits[layer.name] = _Split(layer, count, math.gcd(count, max(1, ins // size)))
        if problems:
            raise plan_error([f"{where}.group_size: {text}; choose another size or exclude it" for text in problems])
        return splits

    def _leave_out(self, traced: Traced, where: str) -> None:
        """Leave layers as they are whose factors would take more bytes than their kernels."""
        atoms, alone = self.options.atoms, self.options.share is None
        item = kernel_of(traced, self.layers[0].name).element_size() * atoms
        stored = []
        for name, split in self.splits.items():
            coefficients = split.rows * split.columns * split.count if alone else 0
            own = item * (split.count * split.length + coefficients)
            corner, key = (split.rows, split.columns), name if alone else self.sets[name, 0]
            kernel = item // atoms * math.prod(split.layer.shape)
            stored.append(Stored(self.names[name], kernel, own, key, corner))
        price = (lambda rows, columns: 0) if alone else (lambda rows, columns: item * rows * columns)
        self.left_out = worth_storing(stored, {each.shared: price for each in stored}, where)
        self.layers = [layer for layer in self.layers if self.names[layer.name] not in self.left_out]
        kept = {layer.name for layer in self.layers}
        self.splits = {name: split for name, split in self.splits.items() if name in kept}
        self.sets = {member: key for member, key in self.sets.items() if member[0] in kept}

    def _sets(self) -> dict[tuple[str, int], Any]:
        """Every group of filters of every layer, with the key of the set that it shares coefficients in."""
        keys: dict[tuple[str, int], Any] = {}
        for layer, block in zip(self.layers, blocks_of(self.layers), strict=True):
            for number in range(self.splits[layer.name].count):
                each = {"net": "", "block": block, "layer": layer.name, None: (layer.name, number)}
                keys[layer.name, number] = each[self.options.share]
        return keys

    def _made(self, traced: Traced, model: nn.Module, moments: dict[str, torch.Tensor]) -> dict[str, AtomConv]:
        generator = torch.Generator().manual_seed(self.seed)
        members: dict[Any, list[tuple[str, int]]] = {}
        for member, key in self.sets.items():
            members.setdefault(key, []).append(member)
        atoms: dict[tuple[str, int], torch.Tensor] = {}
        coefficients: dict[tuple[str, int], torch.Tensor] = {}
        for group in counted(members.values(), "fitting atoms", [group[0][0] for group in members.values()]):
            shared, bases = self._factors(traced, group, moments, generator)
            for member, basis in zip(group, bases, strict=True):
                atoms[member], coefficients[member] = basis, shared
        made: dict[str, AtomConv] = {}
        parameters: dict[Any, nn.Parameter] = {}
        biases: dict[int, nn.Parameter] = {}
        for name, split in self.splits.items():
            own = [(name, number) for number in range(split.count)]
            weight = kernel_of(traced, name)
            key = self.sets[own[0]]
            if key not in parameters:
                apart = self.options.share is None and split.count > 1
                value = torch.stack([coefficients[member] for member in own]) if apart else coefficients[own[0]]
                parameters[key] = _parameter(value, weight)
            basis = torch.stack([atoms[member].reshape(-1, *split.layer.shape[2:]) for member in own])
            stored = _parameter(basis, weight)
            for holder, conv in convolutions_of(model, split.layer):
                made[holder] = self._layer(conv, split, stored, parameters[key])
                if conv.bias is not None and split.count > 1:
                    made[holder].bias = biases.setdefault(id(conv.bias), _reordered(conv.bias, split))
        return made

    def _layer(self, conv: Any, split: _Split, atoms: nn.Parameter, coefficients: nn.Parameter) -> AtomConv:
        made: AtomConv = factored_conv("Atom", len(split.layer.shape) - 2)(
            conv, atoms, coefficients, groups=split.groups, drop=self.options.atom_drop, shuffled=split.count > 1
        )
        return made

    def _factors(
        self,
        traced: Traced,
        members: list[tuple[str, int]],
        moments: dict[str, torch.Tensor],
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        splits = [self.splits[name] for name, _ in members]
        if self.options.init == "random":
            shapes = [(split.rows, split.columns, split.length) for split in splits]
            return random_atoms(shapes, self.options.atoms, generator)
        kernels = [self._block(traced, *member) for member in members]
        weights = [
            moments[name][split.inputs(number)] if name in moments else None
            for (name, number), split in zip(members, splits, strict=True)
        ]
        return fit_atoms(kernels, self.options.atoms, moments=weights, seed=self.seed)

    def _block(self, traced: Traced, name: str, number: int) -> torch.Tensor:
        """The part of a trained kernel that a group of filters keeps, `(s, s', positions)`."""
        split = self.splits[name]
        weight = checked(kernel_of(traced, name).detach(), f"the kernel of {self.names[name]!r}").cpu()
        return weight[split.filters(number), split.inputs(number)].flatten(2)

    def _relative_error(self, traced: Traced, name: str, layer: AtomConv) -> float:
        split = self.splits[name]
        whole = kernel_of(traced, name).detach().double().cpu()
        kernel = layer.kernel(training=False).detach().double().cpu().flatten(2)
        lost = float(whole.square().sum())
        for number, part in enumerate(torch.split(kernel, split.rows)):
            block = self._block(traced, name, number)
            lost += float((block - part).square().sum() - block.square().sum())
        size = float(whole.square().sum())
        error = math.sqrt(max(lost, 0.0) / size) if size else 0.0
        logger.info("%s: relative error of the kernel %.3g", self.names[name], error)
        return error


def _reordered(bias: nn.Parameter, split: _Split) -> nn.Parameter:
    """A bias in the order in which the filters stand in their groups."""
    order = bias.detach().reshape(split.rows, split.count).t().reshape(-1).clone()
    return nn.Parameter(order, requires_grad=bias.requires_grad)


def _measured(calls: list[AtomCall]) -> dict[str, tuple[float, float]]:
    """Milliseconds of each layer with the kernel built, and with the atoms first; equal layers are measured once."""
    known: dict[ConvCase, tuple[float, float]] = {}
    times: dict[str, tuple[float, float]] = {}
    for call in calls:
        case = _case(call)
        if case not in known:
            known[case] = milliseconds(case)
        built, atoms = times.get(call.name, (0.0, 0.0))
        times[call.name] = (built + known[case][0], atoms + known[case][1])
        logger.info("%s: %.3f ms with the kernel built, %.3f ms with the atoms first", call.name, *times[call.name])
    return times


def _case(call: AtomCall) -> ConvCase:
    window, (count, atoms) = Window.of_call(arguments_of(call.node), call.kernel[2:]), call.sizes
    image = call.image if len(call.image) == len(call.kernel) else (1, *call.image)
    return ConvCase(image, call.kernel, call.groups, count, atoms, window.stride, window.sides, window.dilation)


def _parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=like.requires_grad)
