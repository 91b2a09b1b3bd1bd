"""The plan: which passes run, in which order, with which options. Plain data, no pass code.

A plan is a YAML file, or the same thing built in Python:

    version: 1
    inputs:
      - [2, 3, 224, 224]
    passes:
      - cluster_merge: {keep: 0.5, clustering: kmeans}
      - fold_batch_norm: {}

What is wrong with a plan is said with the path of its key, such as `passes[0].cluster_merge.keep['fc*']`, and all
problems are said at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from graphzip.boundary import public
from graphzip.errors import PlanError
from graphzip.files import as_path, write_text
from graphzip.limits import SIZES
from graphzip.plan.options import PassOptions, filled, plain
from graphzip.plan.passes import kinds, options_of
from graphzip.plan.problems import LISTED, key_text, plan_error, show
from graphzip.plan.values import Shapes, is_int, is_list, listed
from graphzip.plan.yaml_text import check_text, read_yaml, to_yaml
from graphzip.report.tables import closest, preformatted

__all__ = ["Plan", "check_plan"]

VERSION: Final = 1
_MOST: Final = 1_000  # passes of a plan, or options of a pass

Shape = tuple[int, ...]

_SHAPES: Final[TypeAdapter[tuple[Shape, ...]]] = TypeAdapter(Shapes)


class Plan:
    """Passes in the order in which they run, and optionally the shapes of the model's inputs.

    `inputs` has one shape per positional input, in elements per dimension, batch first: `[[2, 3, 224, 224]]`.
    A plan does not change once made. Raises `PlanError` when a pass or a shape is not one.
    """

    __slots__ = ("_inputs", "_passes")

    @public
    def __init__(self, passes: Iterable[PassOptions], *, inputs: Iterable[Sequence[int]] | None = None) -> None:
        items = None if isinstance(passes, PassOptions) else listed(passes)
        if items is None:
            raise PlanError(f"passes: {show(passes)} is not a list of passes; write Plan([ClusterMerge()])")
        self._passes = tuple(items)
        problems: list[str] = []
        for position, options in enumerate(self._passes):
            if isinstance(options, type) and issubclass(options, PassOptions):
                problems.append(f"passes[{position}]: {options.__name__} is a class; write {options.__name__}()")
            elif not isinstance(options, PassOptions):
                problems.append(f"passes[{position}]: {show(options)} is not a pass, such as ClusterMerge()")
        self._inputs = _shapes(inputs, problems)
        if problems or (problems := _misplaced(self._passes)):
            raise plan_error(problems)

    @property
    def passes(self) -> tuple[PassOptions, ...]:
        """The passes' options, in the order in which they run."""
        return self._passes

    @public
    def expanded(self, *, has_data: bool) -> Plan:
        """The plan that is carried out, with calibration data or without: some options ask for passes of their own."""
        passes = [each for options in self._passes for each in options.expanded(has_data=has_data)]
        return Plan(passes, inputs=self._inputs)

    @property
    def inputs(self) -> tuple[Shape, ...] | None:
        """One shape per positional input, or None when the plan leaves the inputs to the caller."""
        return self._inputs

    @classmethod
    @public
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `data`, in the layout of the plan file, describes.

        Raises `PlanError`, naming the key, on an unknown version, pass or option and on a wrong value.
        """
        return _read(data, source="")

    @staticmethod
    @public
    def json_schema() -> dict[str, Any]:
        """The JSON Schema (draft 2020-12) of plan files, with the options of every pass that is registered by now."""
        known = {kind: options_of(kind) for kind in kinds()}
        passes = {kind: each.model_json_schema(ref_template="#/$defs/{model}") for kind, each in known.items() if each}
        defs = {name: each for schema in passes.values() for name, each in schema.pop("$defs", {}).items()}
        items = [
            {"type": "object", "properties": {kind: {"anyOf": [schema, {"type": "null"}]}}, "required": [kind],
             "additionalProperties": False}
            for kind, schema in passes.items()
        ]  # fmt: skip
        sizes = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "a plan of graphzip",
            "type": "object",
            "properties": {
                "version": {"const": VERSION},
                "inputs": {"type": "array", "items": sizes, "minItems": 1},
                "passes": {"type": "array", "items": {"anyOf": [{"enum": sorted(passes)}, *items]}},
            },
            "required": ["version", "passes"],
            "additionalProperties": False,
            "$defs": defs,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan in the layout of the plan file: JSON-ready, only the options that were given."""
        data: dict[str, Any] = {"version": VERSION}
        if self._inputs is not None:
            data["inputs"] = plain(self._inputs)
        data["passes"] = [{options.kind: options.to_dict()} for options in self._passes]
        return data

    @classmethod
    @public
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file (YAML, UTF-8).

        Raises `PlanError`, naming the file, when it cannot be read or is not a valid plan.
        """
        file = as_path(path, PlanError)
        source = str(file)
        try:
            data = read_yaml(file)
        except ValueError as error:
            raise PlanError(f"{source}: {error}") from None
        return _read(data, source)

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan file. It is written whole or not at all.

        Raises `PlanError`, naming the file, when it cannot be written, or would be larger than `load` reads.
        """
        text = to_yaml(self.to_dict())
        try:
            check_text(text.encode())
        except ValueError as error:
            raise PlanError(f"{as_path(path, PlanError)}: {error}") from None
        write_text(path, text, PlanError)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._passes == other._passes and self._inputs == other._inputs

    def __hash__(self) -> int:
        return hash((self._passes, self._inputs))

    def _repr_html_(self) -> str:
        """What a notebook shows: the plan file."""
        return preformatted(to_yaml(self.to_dict()))

    def __repr__(self) -> str:
        inputs = "" if self._inputs is None else f", inputs={plain(self._inputs)}"
        return f"Plan({list(self._passes)}{inputs})"


def _misplaced(passes: Sequence[PassOptions]) -> list[str]:
    """Merging and folding need whole kernels, so they come before the passes that store kernels as factors."""
    problems = []
    for position, options in enumerate(passes):
        earlier = [other.kind for other in passes[:position] if other.factorizes]
        if earlier and not options.factorizes:
            problems.append(
                f"passes[{position}].{options.kind}: stands behind {earlier[0]}, after which no kernels are whole; "
                "put it before"
            )
    return problems


# ---------------------------------------------------------------------------------------------------- reading


def _shapes(value: Any, problems: list[str]) -> tuple[Shape, ...] | None:
    """The shapes of a plan's inputs; what is wrong with them is added to `problems`."""
    try:
        return None if value is None else _SHAPES.validate_python(value)
    except ValidationError as error:
        wrong = [(detail["loc"], detail["input"]) for detail in error.errors(include_url=False)]
    if any(len(place) < 2 for place, _ in wrong):
        problems.append(f"inputs: {show(value)} is not a list of shapes, such as [[2, 3, 224, 224]]")
        return None
    problems += [
        f"inputs[{position}][{dim}]: {show(size)} is not a size; write an int of at least 1 and below {SIZES}"
        for (position, dim), size in wrong
    ]
    return None


def _read(data: Any, source: str) -> Plan:
    if not isinstance(data, Mapping):
        raise plan_error([f"a plan is a mapping with 'version' and 'passes', got {show(data)}"], source)
    if "version" not in data:
        raise plan_error([f"version: missing; write 'version: {VERSION}'"], source)
    version = data["version"]
    if not is_int(version) or version != VERSION:
        text = f"version: {show(version)} is unknown; this graphzip reads version {VERSION}"
        raise plan_error([text], source)
    known = ("version", "inputs", "passes")
    unknown = [key_text(key) for key in data if key not in known]
    problems = [f"{key}: unknown key; {closest(key, known)}" for key in unknown[:LISTED]]
    problems += [f"{len(unknown)} unknown keys"] * (len(unknown) > LISTED)
    shapes = _shapes(data.get("inputs"), problems)
    listed = data.get("passes")
    passes: list[PassOptions] = []
    if "passes" not in data:
        problems.append("passes: missing; write a list of passes, such as 'passes: [{cluster_merge: {keep: 0.5}}]'")
    elif not is_list(listed):
        problems.append(f"passes: {show(listed)} is not a list of passes")
    elif len(listed) > _MOST:
        problems.append(f"passes: {len(listed):,} passes, more than {_MOST:,}; name groups by globs")
    else:
        for position, item in enumerate(listed):
            passes += _read_pass(item, f"passes[{position}]", problems)
    if problems or (problems := _misplaced(passes)):
        raise plan_error(problems, source)
    return Plan(passes, inputs=shapes)


def _read_pass(item: Any, where: str, problems: list[str]) -> list[PassOptions]:
    """One item of `passes`: `{name: options}`, where `name` or `{name: null}` stands for the defaults."""
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or not item:
        problems.append(f"{where}: {show(item)} is not a pass; write its name and options: 'cluster_merge: {{}}'")
        return []
    if len(item) > 1:
        keys = ", ".join(key_text(key) for key in list(item)[:LISTED]) + ", ..." * (len(item) > LISTED)
        problems.append(
            f"{where}: one item names one pass, this one has the keys {keys}; indent options below the name"
        )
        return []
    ((name, given),) = item.items()
    options_type = options_of(name) if isinstance(name, str) else None
    if options_type is None:
        problems.append(
            f"{where}.{key_text(name)}: unknown pass; {closest(key_text(name), kinds())}; one of your own is known "
            "once graphzip.register_pass was called for it"
        )
        return []
    where = f"{where}.{name}"
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        problems.append(f"{where}: {show(given)} is not a mapping of options")
        return []
    if len(given) > _MOST:
        problems.append(f"{where}: {len(given):,} options, which no pass has; {closest('', options_type.model_fields)}")
        return []
    options = options_type.__new__(options_type)
    found = filled(options, {key_text(key): value for key, value in given.items()}, where)
    problems += found
    return [] if found else [options]


def check_plan(plan: Any) -> None:
    """Raises `PlanError` unless it is a plan."""
    if not isinstance(plan, Plan):
        raise PlanError(f"expected a graphzip.Plan, got {type(plan).__name__}; write Plan([...]) or Plan.load(path)")
