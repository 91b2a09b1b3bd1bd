"""The options of a pass: plain data, frozen, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from graphzip.errors import PlanError
from graphzip.plan.problems import key_text, plan_error, problems_of, show

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PassOptions", "filled", "plain"]

_ANYTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)


class PassOptions(BaseModel):
    """Base of the options of one pass: frozen, and no option is accepted that the pass does not have.

    Two are equal when they ask for the same: `keep=1` (one channel) differs from `keep=1.0` (all of them), and the
    order of a mapping's keys counts, for the first glob that matches wins.

    Raises `PlanError` when an option is unknown or its value is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str] = ""
    """The name of the pass in a plan file and in reports."""

    factorizes: ClassVar[bool] = False
    """Whether kernels are stored as factors after it, which no pass can narrow: it comes after those that do."""

    joins: ClassVar[bool] = False
    """Whether it takes several models and lets them share; a plan with such a pass is given a mapping of models."""

    def __init__(self, *values: Any, **options: Any) -> None:
        if values:
            raise PlanError(f"{self.kind}: {show(values[0])} has no name; options are given by name, such as keep=0.5")
        problems = filled(self, options, self.kind)
        if problems:
            raise plan_error(problems)

    def expanded(self, *, has_data: bool) -> tuple[PassOptions, ...]:
        """The passes that are carried out for this one, with calibration data or without: by default it alone."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """The options that were given (not the defaults), as plain lists, dicts, strings and numbers."""
        return {name: plain(value) for name, value in self if name in self.model_fields_set}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other options in place of those named in `update`. Raises `PlanError` as the constructor does."""
        if update is not None and not isinstance(update, Mapping):
            raise PlanError(f"{self.kind}: {show(update)} is not a mapping of options")
        return type(self)(**(self.to_dict() | dict(update))) if update else super().model_copy(deep=deep)

    @classmethod
    def model_validate(cls, obj: Any, **_: Any) -> Self:
        """The pass with the options of a mapping. Raises `PlanError` as the constructor does."""
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise PlanError(f"{cls.kind}: {show(obj)} is not a mapping of options")
        return cls(**{key_text(name): value for name, value in obj.items()})

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **_: Any) -> Self:
        """The pass with the options of a JSON object. Raises `PlanError` as the constructor does."""
        try:
            return cls.model_validate(json.loads(json_data))
        except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{cls.kind}: not valid JSON: {error}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise PlanError(f"{self.kind}.{name}: a pass is frozen once made; use model_copy(update={{...}})")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, value) for name, value in self if name in self.model_fields_set]

    def __str__(self) -> str:
        return repr(self)

    def _identity(self) -> str:
        return json.dumps({name: plain(value) for name, value in self})

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))


def plain(value: Any) -> Any:
    """A value as lists, dicts, strings and numbers. Raises `PlanError` for one that these do not describe."""
    if isinstance(value, Mapping):
        return {plain(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(entry) for entry in value), key=json.dumps)  # a set has no order of its own
    if value is None or type(value) in (str, int, float, bool):
        return value
    try:
        return _ANYTHING.dump_python(value, mode="json", by_alias=True)
    except ValueError:
        raise PlanError(
            f"{show(value)} is a {type(value).__name__}, which no plan file can hold; give the option a type of text, "
            "numbers, lists and mappings"
        ) from None


def filled(options: PassOptions, given: Mapping[str, Any], where: str) -> list[str]:
    """Validate `given` into the empty `options`; what is wrong comes back, each problem with its path below `where`."""
    try:
        options.__pydantic_validator__.validate_python(given, self_instance=options)
    except ValidationError as error:
        return problems_of(error, where, type(options).model_fields)
    return []
