"""One small network per operator: what the operator's rule must say about channels.

`Cases.add` builds it: a linear layer `make` makes the channels of an activation, the operator acts on it, and a linear
layer `use` reads what comes out. `free` are the groups that must be mergeable, with their sizes; every other group
must be pinned, and `why` is part of the reason of the one that `make` starts. The cases are in a file
`op_cases_*.py` per kind of operator, like the rows of the table in `graphzip/ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nets import Example, Net
from torch import Tensor, nn

__all__ = ["FITS", "Case", "Cases", "network", "overload", "param"]

FITS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda x: x,
    "unit": lambda x: 0.9 * torch.tanh(x),
    "positive": lambda x: x * x + 0.5,
    "large": lambda x: x * x + 1.0,
    "whole": lambda x: (4 * x).to(torch.int64),
    "flag": lambda x: x > 0,
}
"""What an operator can take: activations are brought into its domain first."""


@dataclass(frozen=True)
class Case:
    """A network that runs `targets`, and what is expected of its groups.

    Where `free` is `None`, any groups will do, as long as exchanging and merging them is exact.
    """

    targets: tuple[Any, ...]
    build: Callable[[], Example]
    free: Mapping[str, int] | None
    why: str


class Cases(dict[str, Case]):
    """Cases by name: the operator's, and what is special about the case."""

    def add(
        self,
        target: Any,
        run: Callable[..., Any],
        shape: Sequence[int] = (2, 6, 5),
        *,
        name: str = "",
        free: Mapping[str, int] | str | None = "all",
        why: str = "",
        **options: Any,
    ) -> None:
        """The network of `network(run, shape, **options)`; all channels are expected to be free unless `why`."""
        expected = {} if why else {"make": shape[options.get("dim", 1)]}
        full = f"{str(target).removeprefix('aten.').removesuffix('.default')} {name}".strip()
        self.put((target,), full, lambda: network(run, shape, **options), expected if free == "all" else free, why)

    def put(
        self,
        targets: Sequence[Any],
        name: str,
        build: Callable[[], Example],
        free: Any,
        why: str = "",
    ) -> None:
        """A network of any form."""
        if name in self:
            raise ValueError(f"two cases are called {name!r}")
        self[name] = Case(tuple(targets), build, free, why)

    def each(self, calls: Mapping[str, tuple[Any, ...]], **options: Any) -> None:
        """One case per operator: its name, and the arguments that follow the activations."""
        for name, args in calls.items():
            self.add(overload(name), lambda m, *xs, name=name, args=args: overload(name)(*xs, *args), **options)

    def together(
        self,
        name: str,
        calls: Mapping[str, Callable[..., Any] | tuple[Any, ...]],
        shape: Sequence[int] = (2, 3, 6),
        *,
        dim: int = 2,
        **options: Any,
    ) -> None:
        """One network for operators of one kind, side by side: each is given by what it calls, or by the arguments
        that follow the activations. All channels are expected to be free.
        """

        def run(m: Any, *xs: Any) -> tuple[Tensor, ...]:
            return tuple(
                call(m, *xs) if callable(call) else overload(target)(*xs, *call) for target, call in calls.items()
            )

        targets = [overload(target) for target in calls]
        self.put(targets, name, lambda: network(run, shape, dim=dim, **options), {"make": shape[dim]})


def overload(name: str) -> Any:
    """`add.Tensor` -> `torch.ops.aten.add.Tensor`; the default overload where none is named."""
    packet, _, kind = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), kind or "default")


def param(*shape: int) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(torch.randn(shape))


def network(
    run: Callable[..., Any],
    shape: Sequence[int],
    *,
    dim: int = 1,
    out: int | None = -2,
    fit: str = "any",
    makers: Sequence[str] = ("make",),
    parts: Callable[[], dict[str, Any]] = dict,
) -> Example:
    """`run(m, *activations)` between linear layers, in float64.

    Every name of `makers` is a layer that makes an activation of this shape, with channels along `dim`. Channels of
    the result (of every result, where it is a tuple) are read along `out` (the same as `dim` where it is -2; `None`:
    the result is the output of the model). `parts` makes further parameters, buffers and modules, found as attributes
    of `m`.
    """
    rank = len(shape)
    out = dim if out == -2 else out

    def middle(m: Any, x: Tensor) -> Any:
        made = [FITS[fit](getattr(m, name)(x)) for name in makers]
        return run(m, *(y if dim % rank == rank - 1 else y.transpose(dim, -1) for y in made))

    def read(m: Any, y: Tensor, like: Tensor) -> Tensor:
        y = y if y.dtype == like.dtype else y.to(like.dtype)
        if out is None:
            return y
        return m.use(y if out % y.dim() == y.dim() - 1 else y.transpose(out, -1))

    def whole(m: Any, x: Tensor) -> Any:
        found = middle(m, x)
        return tuple(read(m, y, x) for y in found) if isinstance(found, tuple) else read(m, found, x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(whole, **{name: nn.Linear(3, shape[dim]) for name in makers}, **parts()).double().eval()
        sizes = list(shape)
        sizes[dim], sizes[-1] = sizes[-1], 3
        x = torch.randn(sizes, dtype=torch.float64)
        if out is not None:
            with torch.no_grad():
                found = middle(model, x)
            model.use = nn.Linear((found[0] if isinstance(found, tuple) else found).shape[out], 2).double()
    return model, (x,)
