"""What every rewrite does with a graph: new nodes, other tensors, and bringing the rest up to date at the end.

A rewrite takes a copy of a traced model (`Edit`), makes nodes (`before`, `behind`), sets tensors (`put`), and ends with
`done`, after which every tensor is fetched once, the state holds what is read, and shapes and code are those of the new
graph. Functions that change a graph in place say so and leave the end to their caller (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import fx

from graphzip.canonical.canonicalize import fetch_once
from graphzip.graph.builder import Builder
from graphzip.graph.randomness import drop_dead
from graphzip.graph.state import attach, drop_unread, find_aliases, get_tensor, is_persistent, like
from graphzip.graph.traced import Traced
from graphzip.rewrite.refresh import refresh

__all__ = ["Edit", "before", "behind", "put", "settle", "tie"]


def before(node: fx.Node) -> Builder:
    """Makes nodes right before another one; they have no shapes until the graph is refreshed."""
    return Builder.before(node, shaped=False)


def behind(node: fx.Node) -> Builder:
    """Makes nodes behind another one, one after the other."""
    return Builder.behind(node, shaped=False)


def put(traced: Traced, name: str, value: torch.Tensor) -> None:
    """Give a parameter or buffer another value, in its dtype and on its device, under each of its names."""
    old = get_tensor(traced.module, name)
    made = like(value.detach().to(old.device), old)
    first = traced.aliases.get(name, name)
    for each in (first, *(alias for alias, kept in traced.aliases.items() if kept == first)):
        attach(traced.module, each, made, persistent=is_persistent(traced.module, each))


def tie(traced: Traced) -> None:
    """Fetch every tensor once, under the first of its names, after names have been given other tensors."""
    traced.aliases = find_aliases(traced.module)
    fetch_once(traced.graph, traced.aliases)


def settle(traced: Traced, *, rewritten: bool = False, check: Callable[[], None] | None = None) -> Traced:
    """Bring the shapes and the code of a graph up to date, which is given back.

    With `rewritten` sizes must depend on the inputs as they did (`refresh`). `check` may refuse the graph before its
    code is made.
    """
    refresh(traced, rewritten=rewritten)
    if check is not None:
        check()
    traced.module.recompile()
    return traced


class Edit:
    """A copy of a traced model that is being changed; the given one and its tensors stay as they are."""

    def __init__(self, traced: Traced) -> None:
        self.given = traced
        self.traced = traced.copy(compiled=False)
        self.graph, self.module = self.traced.graph, self.traced.module
        self.traced.module_types = dict(traced.module_types)

    @cached_property
    def twins(self) -> dict[fx.Node, fx.Node]:
        """For every node of the given graph the one that stands for it; to be asked for before the first change."""
        return dict(zip(self.given.graph.nodes, self.graph.nodes, strict=True))

    def put(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter or buffer another value."""
        put(self.traced, name, value)

    def done(self, *, tied: bool = False, unread: bool = False, check: Callable[[], None] | None = None) -> Traced:
        """The changed model, up to date; what nobody reads is gone.

        `tied`: names have been given other tensors. `unread`: parameters that are no longer read go, too. Raises
        `RewriteError` where an operator does not fit, or a size no longer follows the inputs.
        """
        drop_dead(self.graph)
        if tied:
            tie(self.traced)
        if unread:
            drop_unread(self.module, self.graph)
        return settle(self.traced, rewritten=True, check=check)
