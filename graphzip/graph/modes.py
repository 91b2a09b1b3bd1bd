"""What `.train()` and `.eval()` change, which a graph traced in eval mode does not show.

A batch norm or dropout of `torch.nn` follows the mode. A functional one does what its call says: it may follow the mode
of the module around it, or ignore it. Where the eval graph leaves that open, a second trace, in training mode, tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from graphzip.graph.copies import in_mode, switches_by_itself
from graphzip.graph.layers.pieced import Pieced
from graphzip.graph.source import owner_of, source_of
from graphzip.graph.state import Aliases, joined
from graphzip.graph.torch_private import BatchNorm, DropoutNd, NormBase, SpectralParametrization

__all__ = [
    "CUMULATIVE",
    "DROPOUTS",
    "DROPOUTS_IN_PLACE",
    "FROZEN",
    "is_exactly",
    "is_inside",
    "lost_in_training",
    "mark_cumulative",
    "module_types",
    "settle_modes",
    "spectral_norms",
    "unread",
]

logger = logging.getLogger(__name__)

aten = torch.ops.aten

CUMULATIVE = -1.0
"""The momentum of a batch norm whose own is `None` (a cumulative average), which an operator cannot say."""

FROZEN = "frozen"
"""In `module_types`, of a running mean: the batch norm that reads it uses it in training mode, too."""

DROPOUTS = {
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
}
DROPOUTS_IN_PLACE = {
    aten.dropout_.default,
    aten.alpha_dropout_.default,
    aten.feature_dropout_.default,
    aten.feature_alpha_dropout_.default,
}
_NORMS = NormBase


def mark_cumulative(model: nn.Module) -> None:
    """Give batch norms without a momentum one that survives tracing."""
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.momentum is None:
            module.momentum = CUMULATIVE


def module_types(model: nn.Module) -> dict[str, str]:
    """Classes of the `torch.nn` modules by name: what may become such a module again.

    A batch, instance or group norm of a derived class counts as the `torch.nn` class it derives from, and so does
    a layer that is put together from tiles.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        kinds = type(module).__mro__ if isinstance(module, _NORMS | nn.GroupNorm | Pieced) else (type(module),)
        kind = next((kind.__name__ for kind in kinds if _is_torch_class(kind)), None)
        if kind is not None and not hasattr(module, "parametrizations"):
            found[name] = kind
    return found


def _is_torch_class(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.") and not kind.__name__.startswith("_")


def settle_modes(
    traced: fx.GraphModule, model: nn.Module, types: dict[str, str], aliases: Aliases, training: Callable[[], fx.Graph]
) -> None:
    """Remove dropouts that never act, and enter batch norms whose statistics never change into `types`.

    `traced` is the clean eval graph of `model`. `training` gives the raw graph of the training mode and is asked only
    where a functional batch norm or dropout leaves open what training does.
    """
    asleep = _asleep(model)
    open_norms: list[fx.Node] = []
    open_dropouts: list[fx.Node] = []
    for node in list(traced.graph.nodes):
        owner = str(node.meta.get("owner", ""))
        if _is_norm(node, training=False):
            if owner in asleep:
                types[_running_mean(node)] = FROZEN
            elif not is_exactly(model, owner, _NORMS):
                open_norms.append(node)
        elif _is_dropout(node, training=False):
            if owner in asleep:
                _remove(node)
            elif not is_exactly(model, owner, DropoutNd):
                open_dropouts.append(node)
        elif node.target is aten.rrelu.default and owner in asleep:
            types.pop(owner, None)
    if open_norms or open_dropouts:
        _ask(open_norms, open_dropouts, types, aliases, training)


def _ask(
    norms: list[fx.Node],
    dropouts: list[fx.Node],
    types: dict[str, str],
    aliases: Aliases,
    training: Callable[[], fx.Graph],
) -> None:
    try:
        graph = training()
    except Exception as error:
        logger.info("the training mode cannot be traced (%s): functional batch norm and dropout follow the mode", error)
        return
    learning = {_running_mean(node) for node in graph.nodes if _is_norm(node, training=True)}
    learning |= {aliases[name] for name in learning & aliases.keys()}
    for node in norms:
        if _running_mean(node) not in learning:
            types[_running_mean(node)] = FROZEN
    acting = {(owner_of(node), source_of(node)) for node in graph.nodes if _is_dropout(node, training=True)}
    for node in dropouts:
        if (node.meta["owner"], node.meta["source"]) not in acting:
            _remove(node)


def _asleep(model: nn.Module) -> set[str]:
    """Modules that stay in eval mode when the model is put into training mode: their `train` is overridden."""
    if not switches_by_itself(model):
        return set()
    return {name for name, module in in_mode(model, True).named_modules() if not module.training}


def is_exactly(model: nn.Module, name: str, kind: type) -> bool:
    """Whether a module is of a class of `torch.nn` that derives from `kind`."""
    module = model.get_submodule(name)
    return isinstance(module, kind) and _is_torch_class(type(module))


def _is_norm(node: fx.Node, *, training: bool) -> bool:
    return (
        node.target is aten.batch_norm.default and isinstance(node.args[3], fx.Node) and bool(node.args[5]) == training
    )


def _is_dropout(node: fx.Node, *, training: bool) -> bool:
    return (node.target in DROPOUTS or node.target in DROPOUTS_IN_PLACE) and bool(node.args[2]) == training


def _running_mean(node: fx.Node) -> str:
    mean: Any = node.args[3]
    return str(mean.target)


def _remove(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def unread(model: nn.Module, graphs: Iterable[fx.Graph], aliases: Aliases) -> dict[str, str]:
    """Sentences on the outermost modules none of whose parameters the graphs read, under any name."""
    used = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    found: dict[str, str] = {}
    told: set[str] = set()
    for name, module in model.named_modules():
        own = {joined(name, key) for key, _ in module.named_parameters()}
        own = {aliases.get(key, key) for key in own}
        if own - told and used.isdisjoint(own):
            found[name] = (
                f"'{name}' ({type(module).__name__}) is not part of the eval graph; its parameters are left out"
            )
            told |= own
    return found


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules`, or part of one."""
    return any(not outer or name == outer or name.startswith(f"{outer}.") for outer in modules)


def lost_in_training(model: nn.Module) -> dict[str, str]:
    """Sentences on layers of `torch.nn` that do something in training that an eval graph does not have."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        share = getattr(module, "dropout", 0.0)
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and share:
            who = f"'{name}' " if name else ""
            found[name] = f"{who}({type(module).__name__}) drops out {share:g} only in training and that is left out"
    return found


def spectral_norms(model: nn.Module) -> dict[str, str]:
    """Sentences on spectral norms, whose training step writes to buffers: no graph has it."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, SpectralParametrization) or any(
            isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
        ):
            who = f"'{name}' " if name else ""
            found[name] = f"{who}(spectral norm) updates its vectors only in training and that is left out"
    return found
