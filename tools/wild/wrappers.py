"""What makes models of all libraries alike: positional tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Call", "Wild", "hugging_face"]


@dataclass(frozen=True)
class Wild:
    """How a model is built, and the shapes of its inputs as the command line takes them, with commas between."""

    build: Callable[[], nn.Module]
    inputs: str


class Call(nn.Module):
    """A model whose inputs have names, and of whose output one field is meant (all of it where that is empty)."""

    def __init__(self, model: nn.Module, names: str = "", field: str = "", **options: Any) -> None:
        super().__init__()
        self.model = model.eval()
        self.names, self.field, self.options = names.split(), field, options

    def forward(self, *inputs: Tensor) -> Any:
        """One tensor for each of the names; without names as they are."""
        named = dict(zip(self.names, inputs, strict=True)) if self.names else {}
        found = self.model(*(() if self.names else inputs), **named, **self.options)
        return getattr(found, self.field) if self.field else found


def hugging_face(
    kind: str, inputs: str, *, names: str = "input_ids", field: str = "logits", call: Any = (), **config: Any
) -> Wild:
    """A model of transformers by the name of its class, with options of its config; `call` are those of its forward."""

    def build() -> nn.Module:
        import transformers

        made: Any = getattr(transformers, kind)
        return Call(made(made.config_class(**config)), names, field, **dict(call))

    return Wild(build, inputs)
