"""From the flat graph back to a module that people can train, print and hook.

Convolutions, linear layers, embeddings, normalisations and dropouts are `torch.nn` modules again, under the names that
they had. Batch norm and dropout follow `.train()` and `.eval()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from graphzip.graph.inputs import check_input
from graphzip.graph.state import attach, get_tensor, graph_module, named_state
from graphzip.graph.trace import Traced, share_copy

__all__ = ["to_module"]

aten = torch.ops.aten


def to_module(traced: Traced) -> fx.GraphModule:
    """A module with the call signature and the parameter names of the model that was traced.

    All tensors are copies. Inputs whose shape the graph was not made for raise `InputShapeError`.
    """
    copied = traced.copy()
    module = graph_module(_own_state(copied.module), copied.module.graph, type(traced.module).__name__)
    _Restorer(module, traced.module_types).run()
    _check_inputs(module, traced)
    module.graph.lint()
    module.recompile()
    return module


def _own_state(module: nn.Module) -> nn.Module:
    """The same tree with tensors of its own; tied ones stay tied."""
    root = share_copy(module)
    own: dict[int, torch.Tensor] = {}
    persistent = {name for name, _ in _persistent_buffers(root)}
    for name, tensor in list(named_state(root)):
        if id(tensor) not in own:
            value = tensor.detach().clone()
            own[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        attach(root, name, own[id(tensor)], persistent=name in persistent)
    return root


def _persistent_buffers(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in root.named_modules(remove_duplicate=False):
        for leaf, tensor in module._buffers.items():
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield f"{prefix}.{leaf}" if prefix else leaf, tensor


def _check_inputs(module: fx.GraphModule, traced: Traced) -> None:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, traced.inputs, strict=True):
        if spec.dtype is None or not node.users:
            continue
        with module.graph.inserting_after(placeholders[-1]):
            checked = module.graph.call_function(check_input, (node, spec.name, spec.shape))
        node.replace_all_uses_with(checked, delete_user_cb=lambda user, checked=checked: user is not checked)


class _Restorer:
    """Replaces operator calls by calls of `torch.nn` modules."""

    def __init__(self, module: fx.GraphModule, types: dict[str, str]) -> None:
        self.module = module
        self.types = types
        self.made: dict[str, str] = {}

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            if node.op == "call_function" and node.target in _LAYERS:
                self._layer(node, *_LAYERS[node.target])
            elif node.op == "call_function" and node.target in _DROPOUTS:
                self._dropout(node)
        for node in reversed(list(self.module.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self.module.graph.erase_node(node)

    def _layer(self, node: fx.Node, source: str, build: Callable[..., nn.Module]) -> None:
        args = _bound(node)
        tensors = {name: value for name, value in args.items() if name in _STATE and isinstance(value, fx.Node)}
        owner = self._owner(tensors)
        if owner is None:
            if node.target is aten.batch_norm.default:
                self._following_batch_norm(node, args)
            return
        state = {name: get_tensor(self.module, str(value.target)) for name, value in tensors.items()}
        layer = build(self.types[owner], args, state)
        if repr(layer) != self.made.setdefault(owner, repr(layer)):
            return
        self._install(owner, layer)
        self._call(node, owner, (args[source],))

    def _owner(self, tensors: dict[str, fx.Node]) -> str | None:
        """The `torch.nn` module all of whose state these operands are, and nothing else reads."""
        names = {name: str(value.target) for name, value in tensors.items() if value.op == "get_attr"}
        owners = {name.rpartition(".")[0] for name in names.values()}
        if len(names) != len(tensors) or len(owners) != 1:
            return None
        owner = owners.pop()
        if self.types.get(owner) not in _CLASSES or any(full != f"{owner}.{name}" for name, full in names.items()):
            return None
        held = {name for name, _ in named_state(self.module.get_submodule(owner))} - {"num_batches_tracked"}
        return owner if held == set(names) else None

    def _install(self, owner: str, layer: nn.Module) -> None:
        old = self.module.get_submodule(owner)
        if type(old) is type(layer):
            return
        layer._buffers.update({leaf: None for leaf in layer._buffers if leaf not in old._buffers})
        for leaf, tensor in named_state(old):
            attach(layer, leaf, tensor, persistent=leaf not in old._non_persistent_buffers_set)
        _set_submodule(self.module, owner, layer)

    def _call(self, node: fx.Node, name: str, args: tuple[Any, ...]) -> None:
        with self.module.graph.inserting_before(node):
            call = self.module.graph.call_module(name, args)
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        self.module.graph.erase_node(node)

    def _following_batch_norm(self, node: fx.Node, args: dict[str, Any]) -> None:
        name = f"{node.name}_follows_mode"
        self.module.add_module(name, BatchNormCall(args["momentum"], args["eps"]))
        self._call(node, name, tuple(args[key] for key in ("input", "weight", "bias", "running_mean", "running_var")))

    def _dropout(self, node: fx.Node) -> None:
        args = _bound(node)
        owner = str(node.meta.get("owner", ""))
        kind = self.types.get(owner, "")
        if kind not in _DROPOUT_CLASSES:
            owner, kind = f"{node.name}_layer", _dropout_class(node)
        layer = _DROPOUT_CLASSES[kind](args["p"])
        if repr(layer) != self.made.setdefault(owner, repr(layer)):
            owner = f"{node.name}_layer"
        _set_submodule(self.module, owner, layer)
        self._call(node, owner, (args["input"],))


class BatchNormCall(nn.Module):
    """Functional batch norm whose parameters are passed in; it follows `.train()` and `.eval()`."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
    ) -> torch.Tensor:
        batch_statistics = self.training or mean is None
        return nn.functional.batch_norm(x, mean, var, weight, bias, batch_statistics, self.momentum, self.eps)


def _set_submodule(root: nn.Module, name: str, value: nn.Module) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner._modules[leaf] = value


def _bound(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in schema.arguments}
    bound.update({argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def _convolution(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    weight, groups = state["weight"], args["groups"]
    options = {"stride": args["stride"], "padding": args["padding"], "dilation": args["dilation"], "groups": groups}
    width = (weight.shape[1] * groups, weight.shape[0])
    if "Transpose" in kind:
        width, options["output_padding"] = (
            (weight.shape[0], weight.shape[1] * groups),
            _spread(args["output_padding"], weight),
        )
    for key in ("stride", "padding", "dilation"):
        options[key] = _spread(options[key], weight)
    layer: nn.Module = getattr(nn, kind)(
        *width, tuple(weight.shape[2:]), bias="bias" in state, device="meta", **options
    )
    return layer


def _spread(value: Any, weight: torch.Tensor) -> Any:
    if isinstance(value, str):
        return value
    numbers = tuple(value)
    return numbers * (weight.dim() - 2) if len(numbers) == 1 else numbers


def _linear(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    outs, ins = state["weight"].shape
    return nn.Linear(ins, outs, bias="bias" in state, device="meta")


def _batch_norm(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    width = next(iter(state.values())).shape[0]
    layer: nn.Module = getattr(nn, kind)(
        width,
        eps=args["eps"],
        momentum=args["momentum"],
        affine="weight" in state,
        track_running_stats="running_mean" in state,
        device="meta",
    )
    return layer


def _layer_norm(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    return nn.LayerNorm(args["normalized_shape"], eps=args["eps"], bias="bias" in state, device="meta")


def _group_norm(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    return nn.GroupNorm(args["num_groups"], state["weight"].shape[0], eps=args["eps"], device="meta")


def _prelu(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    return nn.PReLU(state["weight"].numel(), device="meta")


def _embedding(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    padding = args["padding_idx"]
    entries, width = state["weight"].shape
    return nn.Embedding(entries, width, padding_idx=None if padding < 0 else padding, device="meta")


def _dropout_class(node: fx.Node) -> str:
    if node.target is aten.feature_dropout.default:
        return {3: "Dropout1d", 5: "Dropout3d"}.get(len(node.meta["val"].shape), "Dropout2d")
    if node.target is aten.alpha_dropout.default:
        return "AlphaDropout"
    return "FeatureAlphaDropout" if node.target is aten.feature_alpha_dropout.default else "Dropout"


_STATE = ("weight", "bias", "running_mean", "running_var")
_LAYERS: dict[Any, tuple[str, Callable[..., nn.Module]]] = {
    **dict.fromkeys(
        (
            aten.conv1d.default,
            aten.conv2d.default,
            aten.conv3d.default,
            aten.conv1d.padding,
            aten.conv2d.padding,
            aten.conv3d.padding,
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ),
        ("input", _convolution),
    ),
    aten.linear.default: ("input", _linear),
    aten.batch_norm.default: ("input", _batch_norm),
    aten.instance_norm.default: ("input", _batch_norm),
    aten.layer_norm.default: ("input", _layer_norm),
    aten.group_norm.default: ("input", _group_norm),
    aten.prelu.default: ("self", _prelu),
    aten.embedding.default: ("indices", _embedding),
}
_CLASSES = {
    *(f"{kind}{n}d" for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm") for n in (1, 2, 3)),
    "Linear",
    "LayerNorm",
    "GroupNorm",
    "PReLU",
    "Embedding",
}
_DROPOUTS = {
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
}
_DROPOUT_CLASSES: dict[str, type[nn.Module]] = {
    name: getattr(nn, name)
    for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
}
