"""What graphzip uses of PyTorch that PyTorch does not call public, in one place: a new torch is this file's work.

All other files import these names from here. What they are for stands beside each; where one moves, it is looked for
here and nothing else changes. `ATTRIBUTES` lists the private attributes of PyTorch's objects that are read elsewhere,
for an attribute cannot be imported; a test sees to it that there are no others.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

# The dispatcher that sees symbolic sizes while an operator is run on fake tensors. Else: run without it, sizes fixed.
from torch._dispatch.python import enable_python_dispatcher

# Operators as nodes call them (`torch.ops.aten.add.Tensor`). Else: the type of any such operator.
from torch._ops import HigherOrderOperator, OpOverload

# Tensors with a shape and without numbers, which `torch.export` leaves in node.meta["val"]. Else: torch.export's own.
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode

# How dynamic_shapes= is matched with arguments, so that it is understood as torch.export does. Else: pytree's own map.
from torch.export.dynamic_shapes import _combine_args as combine_args
from torch.export.dynamic_shapes import _tree_map_with_path as tree_map_with_path

# A graph module whose code is made when it is first run. Else: fx.GraphModule, whose code is made at once.
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

# Traces a function of tensors into operators as torch.export leaves them. Else: torch.export of a small module.
from torch.fx.experimental.proxy_tensor import make_fx

# Sizes that are free, the conditions on them, and the environment that they live in. Else: torch.export.Dim's ranges.
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

# The code of a graph whose inputs and outputs are nested. Else: what fx's Graph.set_codegen takes.
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo

# The parametrisation behind spectral_norm, which acts differently in training. Else: told by its name.
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralParametrization

# Nested inputs and outputs: flatten, map, and their specs. Else: torch.utils.pytree, optree, or code of our own.
from torch.utils import _pytree as pytree

# Sees every operator that a piece of code runs. Else: torch.overrides' modes.
from torch.utils._python_dispatch import TorchDispatchMode

# Writes a condition on sizes as Python. Else: sympy's own printer.
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "ATTRIBUTES",
    "BatchNorm",
    "DimDynamic",
    "DropoutNd",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "InstanceNorm",
    "LazyGraphModule",
    "NormBase",
    "OpOverload",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "PythonPrinter",
    "ShapeEnv",
    "SpectralParametrization",
    "StatelessSymbolicContext",
    "SymNode",
    "TorchDispatchMode",
    "combine_args",
    "enable_python_dispatcher",
    "foreach_add_",
    "foreach_copy_",
    "has_kernel",
    "is_wrapped",
    "make_fx",
    "pytree",
    "tree_map_with_path",
]

# The bases of all batch norms, instance norms and dropouts. Else: tuples of the public classes.
NormBase = nn.modules.batchnorm._NormBase
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm
DropoutNd = nn.modules.dropout._DropoutNd

# Whether an operator is made of others. Else: an entry in torch.export's table of decompositions.
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

# Whether a tensor is one of torch.func's, which stands for others in vmap and grad. Else: data_ptr() raises.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

# Many tensors in one call. Else: a loop.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_

ATTRIBUTES: Final = {
    "_apply": "of a module: what .to, .cuda, .double and .to_empty do to its tensors",
    "_cdata": "of a storage: its address, which tells tensors that share memory",
    "_codegen": "of a graph: how its inputs and outputs are nested",
    "_conj": "aten::_conj, the view that is a conjugate",
    "_expr": "of a SymNode: its size as an expression",
    "_forward_pre_hooks": "of a module: what runs before it, such as weight_norm of old",
    "_get_node_type": "of pytree: what kind of container a value is",
    "_hint": "of a SymNode: its size in the example",
    "_overloadname": "of an operator: the last part of its name",
    "_rename_unbacked_to": "of a ShapeEnv: two sizes that only values decide are one",
    "_reversed_padding_repeated_twice": "of a convolution: its padding as F.pad takes it",
    "_schema": "of an operator: the names and kinds of its arguments",
    "_to_copy": "aten::_to_copy, what `.to` is traced as",
    "_unsafe_view": "aten::_unsafe_view, what matmul is traced with",
}
"""Private attributes of PyTorch's objects that are read elsewhere, and what they say."""
