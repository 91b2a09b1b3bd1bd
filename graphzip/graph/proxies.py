"""What `torch.fx.symbolic_trace` makes of functions and layers that look at values: one call each, not looked into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["as_call", "as_layer", "is_proxy"]


def is_proxy(*args: Any) -> bool:
    """Whether one of the arguments stands for a value in a graph that is being made."""
    return any(isinstance(value, fx.Proxy) for value in args)


def as_call(function: Callable[..., Any], *args: Any) -> Any:
    """The call of a function, one of whose arguments is a proxy."""
    return _tracer(args).create_proxy("call_function", function, args, {})


def as_layer(layer: nn.Module, *args: Any) -> Any:
    """The call of a layer, one of whose arguments is a proxy."""
    tracer = _tracer(args)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})


def _tracer(args: tuple[Any, ...]) -> Any:
    return next(value.tracer for value in args if isinstance(value, fx.Proxy))
