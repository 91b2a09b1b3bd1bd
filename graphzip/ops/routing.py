"""Experts in a list: which of them a router picks is read one by one, as a column of weights or as the number of each.

    y = sum_k w[:, k] f_k(x)              a column is a factor of a term of a sum
    rows = where(chosen == k)             the number of an expert is compared with those that were chosen

An expert that goes is one whose weight is zero, or that is never chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.ops.rules import same
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Patch, Result

__all__ = ["SPECS", "is_gate", "patch_gate"]

aten = torch.ops.aten

_THROUGH = {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.clone.default,
    aten.contiguous.default,
}
_PERMUTES = {aten.permute.default, aten.transpose.int}


def is_gate(node: fx.Node) -> bool:
    """Whether one position that is picked decides over one term of a sum, or over the rows of one expert."""
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source.target in _THROUGH | _PERMUTES:
        source = source.args[0]
    if isinstance(source, fx.Node) and source.target is aten.one_hot.default:
        return True
    factors = _reached(node)
    decides = bool(factors) and all(
        each.target is aten.mul.Tensor and _are_terms(_reached(each)) for each in factors if each is not node
    )
    return decides and _depends_on_inputs(node)  # strengths of branches are no router, and zero for no input


def _depends_on_inputs(node: fx.Node) -> bool:
    """Whether a value is computed from what is given, and not from parameters alone."""
    seen, behind = {node}, [node]
    while behind:
        each = behind.pop()
        if each.op == "placeholder":
            return True
        behind += [source for source in each.all_input_nodes if source not in seen]
        seen.update(each.all_input_nodes)
    return False


def _reached(node: fx.Node) -> list[fx.Node]:
    """What reads a value, looking through what hands it on."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _reached(user) if user.target in _THROUGH else [user]
    return found


def _are_terms(readers: list[fx.Node]) -> bool:
    return bool(readers) and all(reader.target is aten.add.Tensor for reader in readers)


def patch_gate(patch: Patch) -> None:
    """`select` of one position, or a `slice` of it: where that is gone the term is zero."""
    source, keeps = patch.args["self"], "start" in patch.args
    dim = int(patch.args["dim"]) % len(source.meta["val"].shape)
    if not patch.shrinks(source, dim):
        return
    index = int(patch.args["start" if keeps else "index"] or 0) % patch.before(source, dim)
    place = np.flatnonzero(patch.kept(source, dim) == index)
    found = int(place[0]) if place.size else 0
    if keeps:
        patch.replace(aten.slice.Tensor, (source, dim, found, found + 1))
    else:
        patch.set("index", found)
    if not place.size:
        patch.vanish(patch.then(aten.mul.Scalar, 0))


def equals(site: Site) -> Result:
    """Numbers of experts may be compared with one of them."""
    numbered = site.labels_numbered(site.args["self"])
    if numbered is not None and not _is_number_of(site.args["other"], numbered.size):
        site.pin(numbered, "compares the places of channels with another number")
    return same(site)


def _is_number_of(other: Any, count: int) -> bool:
    return isinstance(other, int) and not isinstance(other, bool) and 0 <= other < count


def patch_equals(patch: Patch) -> None:
    kept = patch.kept_numbers(patch.args["self"])
    if kept is None:
        return
    place = np.flatnonzero(kept == patch.args["other"])
    patch.set("other", int(place[0]) if place.size else -1)
    if not place.size:
        patch.vanish(patch.copied(patch.node))


SPECS = (OpSpec((aten.eq.Scalar,), equals, patch=patch_equals),)
