"""What `torch.export` does not see by itself is shown to it: dropouts that do not act, and `.data`.

Tracing tells tensors by identity. A dropout in eval mode gives the tensor itself that it is given, so that after
`d = dropout(y)` every later `y` would be taken for `d`: in training mode `y + d` would be `d + d`. It is given a view
of its input, therefore. And `y.data` is no operator; it is what `y.detach()` is. What is given an `out=` runs only
where nobody wants gradients, and parameters want them while a model is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from graphzip.graph.torch_private import FakeTensor

__all__ = ["ShowUnseen"]

_DROPOUTS = {
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
    *(functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout),
    *(functional.dropout1d, functional.dropout2d, functional.dropout3d),
}
_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_SHOWN = {*_DROPOUTS, _GET_DATA, _SET_DATA}


class ShowUnseen(TorchFunctionMode):
    """Active while a model is traced."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _SHOWN:
            if kwargs and kwargs.get("out") is not None and torch.is_grad_enabled():
                with torch.no_grad():
                    return func(*args, **kwargs)
            return func(*args, **kwargs) if kwargs else func(*args)
        options = dict(kwargs or {})
        if func == _GET_DATA:
            return args[0].detach()
        if func == _SET_DATA and isinstance(args[0], FakeTensor):
            raise RuntimeError("an assignment to .data gives a tensor other memory, which a graph does not hold")
        if func in _DROPOUTS and torch.is_grad_enabled() and not options.get("inplace"):
            if args:
                args = (torch.ops.aten.alias.default(args[0]), *args[1:])
            else:
                options["input"] = torch.ops.aten.alias.default(options["input"])
        return func(*args, **options)
