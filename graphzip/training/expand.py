"""Give a model that is being trained more room, and keep what it has learned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from glob import escape
from typing import Any, Final

import torch
from torch import nn

from graphzip.api import prepare
from graphzip.boundary import public
from graphzip.errors import GraphZipError, PlanError
from graphzip.graph.copies import follow_modes
from graphzip.graph.layers.factored import AtomConv
from graphzip.graph.state import joined, named_state
from graphzip.graph.traced import Traced
from graphzip.plan.passes import AtomFactorize
from graphzip.plan.plan import Plan
from graphzip.training.prepared import Prepared

__all__ = ["expand"]

_FINER: Final = ("net", "block", "layer", None)
"""Ways to share coefficients, each dividing the sets of the one before."""

_SAME: Final = "same"


@public
def expand(
    prepared: Prepared,
    *,
    share: str | None = _SAME,
    atoms: int | None = None,
    dynamic_shapes: Any | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Prepared:
    """A prepared model with finer sharing or more atoms that computes what `prepared` computes now (ACDC, appendix E).

    `share` and `atoms` are those of `AtomFactorize` and stay as they are where they are not given. Layers take over the
    coefficients they used; new atoms start at zero, with random coefficients. `prepared` is left as it is, and
    `dynamic_shapes` is what it was prepared with.

    An `optimizer` of the parameters of `prepared` goes on with those of the model that is given, in place and in the
    same groups, so that schedules go on, too: its state (moments and the like, of the size of a parameter) is taken
    over as the parameters are, and what is new begins with zeros.

    Raises `GraphZipError` where `prepared` is not at a pass of atoms, or the `optimizer` has none of its parameters,
    `PlanError` where sharing would get coarser or atoms fewer.
    """
    if not isinstance(prepared, Prepared):
        raise GraphZipError(f"expected what graphzip.prepare gave, got {type(prepared).__name__}; pass that")
    position = prepared._progress.position
    options = prepared.plan.passes[position] if position < len(prepared.plan.passes) else None
    if not isinstance(options, AtomFactorize):
        raise GraphZipError("only a model that is at an atom_factorize pass can grow; expand it before convert()")
    _check_optimizer(optimizer, prepared.model)
    hidden, traced = prepared._hidden, prepared._progress.traced
    layers = _layers(prepared.model, traced)
    plan = _grown(prepared.plan, position, options.model_copy(update={"include": layers}), share, atoms)
    grown = prepare(
        hidden["original"],
        plan,
        hidden["inputs"],
        calibration=hidden["calibration"],
        seed=prepared.seed,
        scope=traced.scope or None,
        dynamic_shapes=dynamic_shapes,
    )
    while grown._progress.position < position:
        grown._carry_out()
    _place_like(grown.model, prepared.model)
    _inherit(grown.model, prepared.model)
    if optimizer is not None:
        _go_on(optimizer, grown.model, prepared.model)
    return grown


def _layers(model: nn.Module, traced: Traced) -> list[str]:
    """The layers that have atoms now, as patterns for their names alone; those that are tied to one go with it."""
    first: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AtomConv):
            first.setdefault(id(layer.atoms), escape(traced.qualified(name).rstrip(".")))
    return list(first.values())


def _grown(plan: Plan, position: int, options: AtomFactorize, share: str | None, atoms: int | None) -> Plan:
    share = options.share if share == _SAME else share
    atoms = options.atoms if atoms is None else atoms
    update = options.model_copy(update={"share": share, "atoms": atoms, "init": "random", "exclude": (), "force": True})
    if _FINER.index(share) < _FINER.index(options.share):
        raise PlanError(f"share: {share!r} is coarser than {options.share!r}; a model grows towards finer sharing")
    if atoms < options.atoms:
        raise PlanError(f"atoms: {atoms} is fewer than {options.atoms}; a model grows by more atoms")
    passes = list(plan.passes)
    passes[position] = update
    return Plan(passes, inputs=plan.inputs)


def _place_like(grown: nn.Module, model: nn.Module) -> None:
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    grown.to(like.device, like.dtype)
    follow_modes(grown, model)


@torch.no_grad()
def _inherit(grown: nn.Module, model: nn.Module) -> None:
    """Copy every tensor; coefficients corner by corner, atoms into the first places."""
    old = dict(model.named_modules())
    taken: set[str] = set()
    for name, layer in grown.named_modules():
        if isinstance(layer, AtomConv):
            _inherit_layer(layer, old[name])
            taken |= {joined(name, leaf) for leaf in ("atoms", "coefficients")}
    tensors = dict(named_state(model))
    for name, tensor in named_state(grown):
        source = tensors[name]
        if name not in taken:
            tensor.copy_(source)
        tensor.requires_grad_(source.requires_grad)


def _inherit_layer(layer: AtomConv, source: Any) -> None:
    layer.atoms.zero_()
    _take_atoms(layer.atoms, source.atoms)
    _take_coefficients(layer, source, layer.coefficients, source.coefficients)


def _take_atoms(new: torch.Tensor, old: torch.Tensor) -> None:
    new[:, : old.shape[1]] = old


def _take_coefficients(layer: AtomConv, source: Any, new: torch.Tensor, old: torch.Tensor) -> None:
    """The corner that the layer uses."""
    count, atoms = source.atoms.shape[:2]
    rows, columns = layer.out_channels // count, layer.in_channels // layer.groups
    new[..., :rows, :columns, :atoms] = old[..., :rows, :columns, :]


# --- optimizers ---


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise GraphZipError(f"optimizer: {type(optimizer).__name__} is none; pass a torch.optim.Optimizer")
    own = {id(parameter) for parameter in model.parameters()}
    if own.isdisjoint(id(each) for group in optimizer.param_groups for each in group["params"]):
        raise GraphZipError("optimizer: it has no parameter of the prepared model; pass the one that trains it")


@torch.no_grad()
def _go_on(optimizer: torch.optim.Optimizer, grown: nn.Module, model: nn.Module) -> None:
    """Let an optimizer go on with the parameters of `grown` in place of those of `model`, with its state."""
    fresh = dict(named_state(grown))
    heirs: dict[int, dict[int, torch.Tensor]] = {}
    for name, tensor in named_state(model):
        heirs.setdefault(id(tensor), {})[id(fresh[name])] = fresh[name]
    layers, old = dict(grown.named_modules()), dict(model.named_modules())
    pairs = [(layer, old[name]) for name, layer in layers.items() if isinstance(layer, AtomConv)]
    for group in optimizer.param_groups:
        followed = []
        for parameter in group["params"]:
            new = list(heirs.get(id(parameter), {id(parameter): parameter}).values())
            followed += new
            state = optimizer.state.pop(parameter, None)
            for each in new if state is not None else ():
                optimizer.state[each] = {
                    key: _grown_state(value, each, parameter, pairs) for key, value in state.items()
                }
        group["params"] = followed


def _grown_state(value: Any, new: torch.Tensor, old: torch.Tensor, pairs: Sequence[tuple[AtomConv, Any]]) -> Any:
    """What an optimizer knows of a parameter, for the one in its place."""
    if not isinstance(value, torch.Tensor) or value.shape != old.shape or old.dim() == 0:
        return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
    if value.shape == new.shape and not any(new is layer.coefficients for layer, _ in pairs):
        return value.clone()
    made = value.new_zeros(new.shape)
    for layer, source in pairs:
        if new is layer.atoms:
            _take_atoms(made, value)
        elif new is layer.coefficients:
            _take_coefficients(layer, source, made, value)
    return made
