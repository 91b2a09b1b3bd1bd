"""What the JSON document of a saved model must look like, before anything is made of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from graphzip.limits import SIZES

__all__ = [
    "Described",
    "Document",
    "ExampleEntry",
    "FormsEntry",
    "GraphEntry",
    "Leaf",
    "NodeEntry",
    "State",
    "TaskEntry",
]

_MOST_DIMENSIONS = 64

Name = Annotated[str, Field(max_length=1024)]
Size = Annotated[int, Field(ge=0, lt=SIZES)]
Shape = Annotated[list[Size], Field(max_length=_MOST_DIMENSIONS)]
Condition = Annotated[str, Field(max_length=10_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """Types as they stand: no text is taken for a number. What a newer version of the format adds is passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class State(_Strict):
    """A parameter or buffer by one of its names; `same_as` is the first name of a tied one."""

    name: Name
    parameter: bool
    persistent: bool = True
    same_as: Name | None = None
    requires_grad: bool = False
    strides: Shape | None = None
    sha256: str | None = None


class Described(_Strict):
    """A floating-point example input, which is made anew."""

    shape: Shape
    dtype: Name
    mean: Number
    spread: Number
    range: Annotated[list[Number], Field(min_length=2, max_length=2)]


class Leaf(_Strict):
    """One example input: a description, the name of a stored tensor, or a plain value."""

    random: Described | None = None
    tensor: Name | None = None
    value: bool | int | float | str | None = None
    sha256: str | None = None


class ExampleEntry(_Strict):
    """The example inputs in order, and how they are nested."""

    structure: list[Any]
    leaves: list[Leaf]


class FactoredEntry(_Strict):
    """The mark of a convolution whose kernel is built: the layer, its atom-drop rate, the shape of a slice."""

    layer: str
    drop: Number = 0.0
    size: Shape = []


class NodeEntry(_Strict):
    """One node of the graph; what its arguments may be, `graph_json` says.

    `shape` is that of the result on the example, where a module depends on it.
    """

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    name: Name
    target: Name
    args: list[Any] = []
    kwargs: dict[Name, Any] = {}
    owner: str = ""
    source: str = ""
    shape: Shape | None = None
    factored: FactoredEntry | None = None


class GraphEntry(_Strict):
    """The nodes in order, and the call signature."""

    arguments: list[Name]
    inputs: list[Any]
    outputs: list[Any] | None
    nodes: list[NodeEntry]


class TaskEntry(_Strict):
    """One of several models."""

    name: Name
    arguments: list[Name]
    inputs: list[Any]
    outputs: list[Any] | None


class FormsEntry(_Strict):
    """With how many of the graph's outputs the eval form comes, and what sizes the training form asks for."""

    evaluated: Size
    conditions: list[Condition]


class Document(_Strict):
    """Everything about a saved model but its tensors."""

    graph: GraphEntry
    numbers: list[Name]
    state: list[State]
    class_name: Name
    inputs: list[tuple[Name, Annotated[list[Size | None], Field(max_length=_MOST_DIMENSIONS)], Name | None]]
    example: ExampleEntry
    aliases: dict[Name, Name]
    module_types: dict[Name, Name]
    scope: Name
    training_only: list[str]
    conditions: list[Condition]
    batch_dynamic: bool
    report: dict[str, Any]
    tasks: list[TaskEntry] = []
    forms: FormsEntry | None = None
