"""From the flat graph back to a module that people can train, print and hook.

Convolutions, linear layers, embeddings, normalisations and dropouts are `torch.nn` modules again, under the names that
they had. Batch norm and dropout follow `.train()` and `.eval()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from graphzip.graph.dual_mode import TwoForms, one_form
from graphzip.graph.guards import check_sizes, parse
from graphzip.graph.inputs import check_constant, check_input, concrete_shape
from graphzip.graph.layers.factored import FACTORED, FactoredConv, kernel_nodes
from graphzip.graph.layers.pieced import PIECED, Assembled, Assembly, Pieced, Tile, assembly_of
from graphzip.graph.meta import meta_of
from graphzip.graph.modes import CUMULATIVE, DROPOUTS, FROZEN
from graphzip.graph.operators import CONVOLUTIONS, argument_of, arguments_of
from graphzip.graph.proxies import as_layer, is_proxy
from graphzip.graph.state import (
    attach,
    get_tensor,
    inside,
    is_persistent,
    joined,
    made_owner,
    named_state,
    owner_of,
    with_code,
)
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.numeric.im2col import per_dimension

__all__ = ["factored_layer", "to_module"]

aten = torch.ops.aten


def to_module(traced: Traced, own: dict[int, torch.Tensor] | None = None) -> nn.Module:
    """A module with the call signature and the parameter names of the model that was traced.

    Where the graph has two forms, the module computes that of its mode.

    All tensors are copies; `own` keeps those made, by the `id` of the tensor, for modules that share them. Inputs whose
    shape the graph was not made for raise `InputShapeError`.
    """
    module = traced.copy(compiled=False).module
    _own_state(module, {} if own is None else own)
    _Restorer(module, traced.module_types).run()
    if traced.forms is None:
        _check_inputs(module.graph, traced, traced.conditions)
        module.graph.lint()
        module.recompile()
        return with_code(module)
    evaluated, trained = (one_form(module.graph, traced.forms, training=mode) for mode in (False, True))
    _check_inputs(evaluated, traced, traced.conditions)
    _check_inputs(trained, traced, traced.forms.conditions)
    return TwoForms(module, evaluated, trained, type(module).__name__)


def _own_state(root: nn.Module, own: dict[int, torch.Tensor]) -> None:
    """Give the module tensors of its own; tied ones stay tied."""
    for name, tensor in list(named_state(root)):
        if id(tensor) not in own:
            value = tensor.detach().clone()
            own[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        attach(root, name, own[id(tensor)], persistent=is_persistent(root, name))


def _check_inputs(graph: fx.Graph, traced: Traced, conditions: tuple[str, ...]) -> None:
    """Let a graph refuse inputs that it was not made for."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves((traced.example_inputs, traced.example_kwargs))
    tensors = {
        spec.name: node for node, spec in zip(placeholders, traced.inputs, strict=True) if spec.dtype is not None
    }
    if conditions:
        terms = tuple(parse(text) for text in conditions)
        numbers = {
            spec.name: node
            for node, spec in zip(placeholders, traced.inputs, strict=True)
            if spec.dtype is None and node.users
        }
        asked = tensors | numbers
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_sizes, (conditions, terms, tuple(asked), *asked.values()))
    for node, spec, leaf in zip(reversed(placeholders), reversed(traced.inputs), reversed(leaves), strict=True):
        with graph.inserting_after(placeholders[-1]):
            if spec.dtype is None:
                if not node.users:
                    graph.call_function(check_constant, (node, spec.name, leaf))
            elif node.users:
                checked = graph.call_function(check_input, (node, spec.name, spec.shape, spec.dtype))
                node.replace_all_uses_with(checked, delete_user_cb=lambda user, checked=checked: user is not checked)


_Found = tuple[Assembly, list[fx.Node], list[fx.Node]]


@dataclass(frozen=True)
class _ModuleRule:
    """How an operator becomes a module: its operand, the classes it may belong to, and what builds the module."""

    operand: str
    kinds: tuple[str, ...]
    build: Callable[[str, dict[str, Any], dict[str, torch.Tensor]], nn.Module]


class _Restorer:
    """Replaces operator calls by calls of `torch.nn` modules."""

    def __init__(self, module: fx.GraphModule, types: dict[str, str]) -> None:
        self.module = module
        self.types = types
        self.made: dict[str, str] = {}

    def run(self) -> None:
        self._factored_layers()
        self._assembled()
        for node in list(self.module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _NORMS:
                self._norm(node, _NORMS[node.target])
            elif node.target in _LAYERS:
                self._layer(node, _LAYERS[node.target])
            elif node.target in DROPOUTS:
                self._dropout(node)
            elif node.target is aten.rrelu.default:
                self._random_relu(node)
        for node in reversed(list(self.module.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self.module.graph.erase_node(node)

    def _factored_layers(self) -> None:
        """Convolutions whose kernel is built from the state of one module are called as that module."""
        for node in list(self.module.graph.nodes):
            made = factored_layer(self.module, self.types, node)
            if made is None:
                continue
            owner, built = meta_of(node)["factored"].layer, kernel_nodes(node)
            if repr(made) == self.made.setdefault(owner, repr(made)):
                self._install(owner, made)
                self._call(node, owner, (argument_of(node, "input"),))
            for each in built:
                if not each.users:
                    self.module.graph.erase_node(each)

    def _assembled(self) -> None:
        """Parameters that are put together from tiles are kept between calls, by the layer that has them."""
        for node in list(self.module.graph.nodes):
            found = {
                weight: built
                for weight in (node.all_input_nodes if node.target in _LAYERS else ())
                if weight.op == "call_function" and (built := assembly_of(weight)) is not None
            }
            if not found:
                continue
            owner = self._pieced(node, _LAYERS[node.target], found)
            if owner is not None:
                self._call(node, owner, (argument_of(node, "input"),))
            for weight, (assembly, fetched, made) in found.items():
                if owner is None:
                    name = self._free_name(weight, "assembled")
                    _set_submodule(self.module, name, Assembled(assembly))
                    self._call(weight, name, tuple(fetched))
                    made = made[:-1]
                for each in reversed(made):
                    if not each.users:
                        self.module.graph.erase_node(each)

    def _pieced(self, node: fx.Node, layer: _ModuleRule, found: dict[fx.Node, _Found]) -> str | None:
        """The layer that this is a call of, with its parameters put together from tiles; nothing where it is none."""
        args, owner = arguments_of(node), str(node.meta.get("owner", ""))
        if self.types.get(owner) not in layer.kinds or not _has_submodule(self.module, owner):
            return None
        pieces, state = dict[str, tuple[Assembly, tuple[str, ...]]](), dict[str, torch.Tensor]()
        for leaf in _STATE:
            value = args.get(leaf)
            if value in found:
                assembly, fetched, _ = found[value]
                names = [str(each.target) for each in fetched]
                if not all(name.startswith(f"{owner}.") for name in names):
                    return None
                pieces[leaf] = assembly, tuple(inside(name, owner) for name in names)
                state[leaf] = assembly.built([get_tensor(self.module, name).detach().to("meta") for name in names])
            elif isinstance(value, fx.Node):
                if str(value.target) != f"{owner}.{leaf}":
                    return None
                state[leaf] = get_tensor(self.module, str(value.target))
        held = {name for name, _ in named_state(self.module.get_submodule(owner))}
        if held != {leaf for leaf in state if leaf not in pieces}.union(*(names for _, names in pieces.values())):
            return None
        plain = layer.build(self.types[owner], args, state)
        kind = PIECED.get(type(plain))
        if kind is None or repr(plain) != self.made.setdefault(owner, repr(plain)):
            return None
        if not isinstance(self.module.get_submodule(owner), kind):
            self._install_pieced(owner, kind, plain, pieces)
        return owner

    def _install_pieced(
        self, owner: str, kind: type[Pieced], plain: nn.Module, pieces: dict[str, tuple[Assembly, tuple[str, ...]]]
    ) -> None:
        plain.__class__ = kind
        made = cast(Pieced, plain)
        made.put_together(pieces)
        self._install(owner, made)
        for name, inner in list(made.named_children()):
            tile = Tile()
            tile._parameters.update(inner._parameters)
            made._modules[name] = tile

    def _norm(self, node: fx.Node, layer: _ModuleRule) -> None:
        """A norm with running statistics follows the mode, unless it never uses them or always does."""
        args = arguments_of(node)
        mean = args["running_mean"]
        always = bool(args.get("training", args.get("use_input_stats")))
        if mean is not None and (always or self.types.get(str(mean.target)) == FROZEN):
            return
        if not self._layer(node, layer) and node.target is aten.batch_norm.default and mean is not None:
            self._following_batch_norm(node, args)

    def _layer(self, node: fx.Node, layer: _ModuleRule) -> bool:
        """Call a module instead, where all that the operator reads is the state of one; whether that was so."""
        args = arguments_of(node)
        tensors = {name: value for name, value in args.items() if name in _STATE and isinstance(value, fx.Node)}
        owner = self._owner(tensors, layer.kinds)
        if owner is None:
            return False
        state = {name: get_tensor(self.module, str(value.target)) for name, value in tensors.items()}
        made = layer.build(self.types[owner], args, state)
        if repr(made) != self.made.setdefault(owner, repr(made)):
            return False
        self._install(owner, made)
        self._call(node, owner, (args[layer.operand],))
        return True

    def _owner(self, tensors: dict[str, fx.Node], kinds: tuple[str, ...]) -> str | None:
        """The module of one of these classes all of whose state these operands are, and nothing else."""
        names = {name: str(value.target) for name, value in tensors.items() if value.op == "get_attr"}
        owners = {name.rpartition(".")[0] for name in names.values()}
        if len(names) != len(tensors) or len(owners) != 1:
            return None
        owner = owners.pop()
        if self.types.get(owner) not in kinds or any(full != f"{owner}.{name}" for name, full in names.items()):
            return None
        inner = self.module.get_submodule(owner)
        held = {leaf for leaf, tensor in (inner._parameters | inner._buffers).items() if tensor is not None}
        return owner if held - {"num_batches_tracked"} == set(names) else None

    def _install(self, owner: str, layer: nn.Module) -> None:
        old = self.module.get_submodule(owner)
        if type(old) is type(layer):
            return
        layer._buffers.update({leaf: None for leaf in layer._buffers if leaf not in old._buffers})
        for leaf, tensor in (old._parameters | old._buffers).items():
            assert tensor is not None
            attach(layer, leaf, tensor, persistent=leaf not in old._non_persistent_buffers_set)
        layer._modules.update(old._modules)
        _set_submodule(self.module, owner, layer)

    def _call(self, node: fx.Node, name: str, args: tuple[Any, ...]) -> None:
        with self.module.graph.inserting_before(node):
            call = self.module.graph.call_module(name, args)
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        self.module.graph.erase_node(node)

    def _following_batch_norm(self, node: fx.Node, args: dict[str, Any]) -> None:
        name = self._free_name(node, "batch_norm")
        _set_submodule(self.module, name, BatchNormCall(args["momentum"], args["eps"]))
        self._call(node, name, tuple(args[key] for key in ("input", "weight", "bias", "running_mean", "running_var")))

    def _dropout(self, node: fx.Node) -> None:
        args = arguments_of(node)
        if args["train"]:
            return  # in the eval graph: it drops in every mode
        owner = str(node.meta.get("owner", ""))
        kind = self.types.get(owner, "")
        layer = getattr(nn, kind if kind in _DROPOUT_CLASSES else _dropout_class(node))(args["p"])
        self._stateless(node, owner if kind in _DROPOUT_CLASSES else "", "dropout", layer, args["input"])

    def _random_relu(self, node: fx.Node) -> None:
        args, owner = arguments_of(node), str(node.meta.get("owner", ""))
        if self.types.get(owner) == "RReLU":
            self._stateless(node, owner, "rrelu", nn.RReLU(args["lower"], args["upper"]), args["self"])

    def _stateless(self, node: fx.Node, owner: str, base: str, layer: nn.Module, operand: Any) -> None:
        """Call a module without parameters: under the name it had, or a new one beside the module that ran it."""
        if not owner or repr(layer) != self.made.setdefault(owner, repr(layer)):
            owner = self._free_name(node, base)
        _set_submodule(self.module, owner, layer)
        self._call(node, owner, (operand,))

    def _free_name(self, node: fx.Node, base: str) -> str:
        """A name inside the module that ran the operator, so that it shares the mode of that module."""
        owner = str(node.meta.get("owner", ""))
        if not _has_submodule(self.module, owner):
            return f"{owner}.{base}"
        taken = self.module.get_submodule(owner)
        number, name = 1, base
        while hasattr(taken, name) or joined(owner, name) in self.types:
            number, name = number + 1, f"{base}_{number}"
        return joined(owner, name)


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
        mean: torch.Tensor,
        var: torch.Tensor,
    ) -> torch.Tensor:
        if is_proxy(x):
            return as_layer(self, x, weight, bias, mean, var)  # type: ignore[no-any-return]
        return nn.functional.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


class SingleGroupNorm(nn.GroupNorm):
    """A group norm with one channel per group: it also takes a batch of one vector, whose groups are single numbers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _set_submodule(root: nn.Module, name: str, value: nn.Module) -> None:
    owner, leaf = made_owner(root, name)
    owner._modules[leaf] = value


def _has_submodule(root: nn.Module, name: str) -> bool:
    try:
        owner, leaf = owner_of(root, name)
    except AttributeError:
        return False
    return not name or owner._modules.get(leaf) is not None


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


def factored_layer(root: nn.Module, types: dict[str, str], node: fx.Node) -> FactoredConv | None:
    """The layer whose call a convolution is marked as, around the tensors that it reads; nothing where it is none.

    That is so where the kernel is built from the operands of that layer alone, and the bias is the layer's.
    """
    mark = meta_of(node).get("factored")
    kind: Any = FACTORED.get(types.get(mark.layer, "")) if mark is not None else None
    if mark is None or kind is None or node.target not in CONVOLUTIONS or not _has_submodule(root, mark.layer):
        return None
    args, held = arguments_of(node), root.get_submodule(mark.layer)
    if "val" not in args["weight"].meta:
        return None
    read = {id(get_tensor(root, str(each.target))) for each in kernel_nodes(node) if each.op == "get_attr"}
    state = {leaf: tensor for leaf, tensor in (held._parameters | held._buffers).items() if tensor is not None}
    operands = [state.get(leaf) for leaf in kind.operands]
    bias = None if args["bias"] is None else get_tensor(root, str(args["bias"].target))
    if read != {id(each) for each in operands} or bias is not state.get("bias"):
        return None
    weight = torch.empty(concrete_shape(args["weight"].meta["val"]), device="meta")
    like = _convolution(kind.__name__.removeprefix("Atom").removeprefix("Slice"), args, {**state, "weight": weight})
    like.register_parameter("bias", state.get("bias"))  # type: ignore[arg-type]
    layer: FactoredConv = kind.around(like, *operands, mark)
    return layer


def _spread(value: Any, weight: torch.Tensor) -> Any:
    return value if isinstance(value, str) else per_dimension(value, weight.dim() - 2)


def _linear(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    outs, ins = state["weight"].shape
    return nn.Linear(ins, outs, bias="bias" in state, device="meta")


def _batch_norm(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    width = next(iter(state.values())).shape[0]
    layer: nn.Module = getattr(nn, kind)(
        width,
        eps=args["eps"],
        momentum=None if args["momentum"] == CUMULATIVE else args["momentum"],
        affine="weight" in state,
        track_running_stats="running_mean" in state,
        device="meta",
        **_without_bias(state),
    )
    return layer


def _without_bias(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The option of a norm that has a weight and no bias, which older versions of torch do not know."""
    return {"bias": False} if "weight" in state and "bias" not in state else {}


def _layer_norm(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    return nn.LayerNorm(args["normalized_shape"], eps=args["eps"], bias="bias" in state, device="meta")


def _group_norm(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    groups, width = args["num_groups"], state["weight"].shape[0]
    made = SingleGroupNorm if groups == width else nn.GroupNorm
    return made(groups, width, eps=args["eps"], device="meta", **_without_bias(state))


def _prelu(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    return nn.PReLU(state["weight"].numel(), device="meta")


def _embedding(kind: str, args: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    padding = args["padding_idx"]
    entries, width = state["weight"].shape
    return nn.Embedding(
        entries,
        width,
        padding_idx=None if padding < 0 else padding,
        scale_grad_by_freq=args["scale_grad_by_freq"],
        sparse=args["sparse"],
        device="meta",
    )


def _dropout_class(node: fx.Node) -> str:
    if node.target is aten.feature_dropout.default:
        value = node.meta.get("val")  # absent where a file does not tell it
        return {3: "Dropout1d", 5: "Dropout3d"}.get(0 if value is None else value.dim(), "Dropout2d")
    if node.target is aten.alpha_dropout.default:
        return "AlphaDropout"
    return "FeatureAlphaDropout" if node.target is aten.feature_alpha_dropout.default else "Dropout"


def _rows(kind: str, *targets: tuple[Any, ...]) -> dict[Any, _ModuleRule]:
    """Convolutions of one, two and three dimensions."""
    return {
        target: _ModuleRule("input", (f"{kind}{n}d",), _convolution)
        for n, row in enumerate(targets, start=1)
        for target in row
    }


_STATE = ("weight", "bias", "running_mean", "running_var")
_LAYERS: dict[Any, _ModuleRule] = {
    **_rows(
        "Conv",
        (aten.conv1d.default, aten.conv1d.padding),
        (aten.conv2d.default, aten.conv2d.padding),
        (aten.conv3d.default, aten.conv3d.padding),
    ),
    **_rows(
        "ConvTranspose",
        (aten.conv_transpose1d.default,),
        (aten.conv_transpose2d.input,),
        (aten.conv_transpose3d.input,),
    ),
    aten.linear.default: _ModuleRule("input", ("Linear", "NonDynamicallyQuantizableLinear"), _linear),
    aten.layer_norm.default: _ModuleRule("input", ("LayerNorm",), _layer_norm),
    aten.group_norm.default: _ModuleRule("input", ("GroupNorm",), _group_norm),
    aten.prelu.default: _ModuleRule("self", ("PReLU",), _prelu),
    aten.embedding.default: _ModuleRule("indices", ("Embedding",), _embedding),
}
_NORMS: dict[Any, _ModuleRule] = {
    aten.batch_norm.default: _ModuleRule(
        "input", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), _batch_norm
    ),
    aten.instance_norm.default: _ModuleRule(
        "input", ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _batch_norm
    ),
}
_DROPOUT_CLASSES = {"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}
