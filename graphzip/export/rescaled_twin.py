"""A twin of a module whose outputs move, for modules whose own outputs hardly do.

In a network whose batch norms never saw data, such as a detector that was just built, every layer makes the signal
smaller: other inputs move the outputs no more than rounding does, and no comparison can tell a wrong operator from a
right one. The twin has the same operators and weights, but each of its batch norms has the variance of what reaches it,
behind the settled ones before it. Means stay: where they are zero, a converter leaves out what another would need.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphzip.export.example import Case

__all__ = ["settled"]

aten = torch.ops.aten

_LEAST = 0.1
"""The smallest variance of a channel, as a share of the median one: a channel that hardly varies is not blown up."""


def settled(module: nn.Module, program: ExportedProgram, case: Case) -> nn.Module | None:
    """A copy of `module`, which `program` is, whose batch norms fit a call; `None` where it has none."""
    traced = copy.deepcopy(program.module(check_guards=False))
    assert isinstance(traced, fx.GraphModule)
    names = []
    for node in traced.graph.nodes:
        if node.target is aten.batch_norm.default and isinstance(node.args[4], fx.Node):
            node.target = _settle
            names += [str(node.args[4].target)] if node.args[4].op == "get_attr" else []
    if not names:
        return None
    traced.recompile()
    twin = copy.deepcopy(module)
    state = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        traced(*case.args, **case.kwargs)
        for name in names:
            state[name].copy_(operator.attrgetter(name)(traced))
    return twin


def _settle(x: torch.Tensor, weight: object, bias: object, mean: object, var: torch.Tensor, *rest: object) -> object:
    """A batch norm that first takes over the variance of its input, `(N, C, ...)`."""
    found = x.var([dim for dim in range(x.dim()) if dim != 1], correction=0)
    if bool(found.any()):
        var.copy_(found.clamp(min=_LEAST * float(found.median())))
    return aten.batch_norm.default(x, weight, bias, mean, var, *rest)
