"""A dropout that does not act gives the tensor itself that it is given; in training mode it gives another one.

Tracing tells tensors by identity. After `d = dropout(y)` in eval mode it takes every later `y` for `d`, so that in
training mode `y + d` would be `d + d`. Under `CopyingDropouts` a dropout is given a view of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["CopyingDropouts"]

_DROPOUTS = {
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
    *(functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout),
    *(functional.dropout1d, functional.dropout2d, functional.dropout3d),
}


class CopyingDropouts(TorchFunctionMode):
    """Every dropout that is not in place is given a view of its input."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _DROPOUTS and torch.is_grad_enabled() and not options.get("inplace"):
            if args:
                args = (torch.ops.aten.alias.default(args[0]), *args[1:])
            else:
                options["input"] = torch.ops.aten.alias.default(options["input"])
        return func(*args, **options)
