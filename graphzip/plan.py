"""The plan: which passes run, in which order, with which options. Plain data, no pass code.

A plan is a YAML file, or the same thing built in Python:

    version: 1
    inputs:
      - [2, 3, 224, 224]
    passes:
      - cluster_merge: {keep: 0.5, clustering: kmeans}
      - fold_batch_norm: {}

A new pass is one subclass of `PassOptions` and one entry in `PASS_OPTIONS`. What is wrong with a plan is said with the
path of its key, such as `passes[0].cluster_merge.keep['fc*']`, and all problems are said at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from graphzip.errors import PlanError
from graphzip.files import as_path, write_text
from graphzip.guard import public
from graphzip.plan_checks import (
    Problems,
    check_balance,
    check_clusters,
    check_damping,
    check_globs,
    check_keep,
    check_match,
    check_multiple,
    check_name,
    check_names,
    check_norms,
    check_shapes,
    check_share,
    check_strength,
    check_threshold,
    check_weight,
    count_of,
    height_and_width,
    is_flag,
    is_int,
    is_list,
    key_text,
    listed,
    one_of,
    path_or_none,
    share_of_atoms,
    show,
    slice_shape,
)
from graphzip.plan_yaml import check_text, read_yaml, to_yaml
from graphzip.tables import closest

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "PASS_OPTIONS",
    "RECONSTRUCTION",
    "AtomFactorize",
    "ClusterMerge",
    "CrossDomainShare",
    "FoldBatchNorm",
    "PassOptions",
    "Plan",
    "PruneChannels",
    "SliceGenerate",
    "Zip",
    "plan_error",
]

VERSION: Final = 1
_MOST: Final = 1_000  # passes of a plan, or options of a pass
_LISTED: Final = 10  # problems or names that one message lists before it only counts the rest

Shape = tuple[int, ...]

RECONSTRUCTION: Final = "reconstruction"
"""The clustering that is decided on calibration data."""


# ---------------------------------------------------------------------------------------------------- messages


def plan_error(problems: Sequence[str], source: str = "") -> PlanError:
    """One `PlanError` for one or several problems; `source` (a file) goes before them."""
    if len(problems) == 1:
        return PlanError(f"{source}: {problems[0]}" if source else problems[0])
    listed = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        listed.append(f"and {len(problems) - _LISTED} more")
    head = f"{source or 'the plan'}: {len(problems)} problems"
    return PlanError("\n  - ".join([head, *listed]))


# ---------------------------------------------------------------------------------------------------- options


class PassOptions(BaseModel):
    """Base of the options of one pass: frozen, and no option is accepted that the pass does not have.

    Two are equal when they ask for the same: `keep=1` (one channel) differs from `keep=1.0` (all of them), and the
    order of a mapping's keys counts, for the first glob that matches wins.

    Raises `PlanError` when an option is unknown or its value is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    """The name of the pass in a plan file and in reports."""

    factorizes: ClassVar[bool] = False
    """Whether kernels are stored as factors after it, which no pass can narrow: it comes after those that do."""

    joins: ClassVar[bool] = False
    """Whether it takes several models and lets them share; a plan with such a pass is given a mapping of models."""

    def __init__(self, *values: Any, **options: Any) -> None:
        if values:
            raise PlanError(f"{self.kind}: {show(values[0])} has no name; options are given by name, such as keep=0.5")
        problems = _fill(self, options, self.kind)
        if problems:
            raise plan_error(problems)

    def to_dict(self) -> dict[str, Any]:
        """The options that were given (not the defaults), as plain lists, dicts, strings and numbers."""
        return {name: _plain(value) for name, value in self if name in self.model_fields_set}

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
        return json.dumps({name: _plain(value) for name, value in self})

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


def _fill(options: PassOptions, given: Mapping[str, Any], where: str) -> list[str]:
    """Validate `given` into the empty `options`; the problems, each with its path below `where`."""
    try:
        options.__pydantic_validator__.validate_python(given, self_instance=options)
    except ValidationError as error:
        return [problem for detail in error.errors() for problem in _problems(type(options), detail, where)]
    return []


def _problems(options: type[PassOptions], detail: Mapping[str, Any], where: str) -> list[str]:
    key = str(detail["loc"][0]) if detail["loc"] else ""
    cause = detail.get("ctx", {}).get("error")
    if detail["type"] == "default_factory_not_called":  # follows from a problem of another field
        return []
    if detail["type"] == "extra_forbidden":
        known = list(options.model_fields)
        return [f"{where}.{key}: unknown option; " + (closest(key, known) if known else f"{where} has no options")]
    if isinstance(cause, Problems):
        return [f"{where}.{key}{path}: {text}" for path, text in cause.items]
    return [f"{where}.{key}: {cause or detail['msg']}"]


Amount = float | int


class ClusterMerge(PassOptions):
    """Merge channels into clusters and keep one channel per cluster (C-SGD, "Manipulating Identical Filter Redundancy
    for Efficient Pruning on Deep and Complicated CNN", section 3.2).

    - `keep`: how many channels a group keeps. A float in (0, 1] is a share: `max(1, floor(size * keep))` channels. An
      int of at least 1 is a number of channels: 1 keeps one channel, 1.0 keeps all. A mapping from group-name globs
      (`fnmatch.fnmatchcase`) to either: the first match wins and groups that no key matches stay whole. Default 0.5;
      but `{}`, every group whole, when `clusters` is given and `keep` is not.
    - `clustering`: `"kmeans"` (on `features`), `"even"`, `"imbalanced"`, or a registered name; or
      `"reconstruction"`, which needs calibration data: the channels stay from which what reads the group can best be
      computed, each as it is, and every other one joins the most similar of these.
    - `features`: what `"kmeans"` and registered clusterings compare channels by: `"weights"`, the flattened kernels;
      `"activations"`, what the layer that reads them sees on calibration data; or `"both"`. Where no convolution or
      linear layer reads a group, kernels are compared.
    - `clusters`: clusters by hand, group name to lists of channels, `{"conv1": [[0, 3], [1], [2, 5, 4]]}`; every
      channel of the group once.
    - `exclude`: globs of the groups that stay whole.
    - `round_to`: the kept width is rounded up to a multiple of this number of channels, at most to the group's size.
    - `strength`: the centripetal strength of `Prepared.optimizer`, epsilon of C-SGD's Eq. 6 (per step, before the
      learning rate is applied), above 0. The default is the paper's, for hundreds of epochs. `"auto"` takes the one
      that makes filters identical after three quarters of the planned steps, which the optimizer is told.
    - `norms`: `"exact"` makes a norm over merged channels a weighted one where they stand for different numbers of
      channels; `"plain"` leaves it as it is, faster and no longer lossless: the report then says `exact=False`.

    - `compensate`: what makes up for merging channels that are not identical. `"none"`: nothing. `"free"`: the
      variances of batch norms are corrected from the kernels alone. `"data"`, which needs calibration data: every
      layer is re-fitted in closed form to what the original gives. Identical channels are merged losslessly by all.

    Raises `PlanError` when a value is out of range or of the wrong type, or a channel is named twice.
    """

    kind: ClassVar[str] = "cluster_merge"

    clusters: Annotated[Mapping[str, Sequence[Sequence[int]]] | None, BeforeValidator(check_clusters)] = None
    keep: Annotated[Amount | Mapping[str, Amount], BeforeValidator(check_keep)] = Field(
        default_factory=lambda given: 0.5 if given.get("clusters") is None else {}
    )
    clustering: Annotated[str, BeforeValidator(check_name)] = "kmeans"
    exclude: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    round_to: Annotated[int, BeforeValidator(check_multiple)] = 1
    strength: Annotated[float | Literal["auto"], BeforeValidator(check_strength)] = 3e-3
    norms: Annotated[Literal["exact", "plain"], BeforeValidator(check_norms)] = "exact"
    compensate: Annotated[str, BeforeValidator(one_of("none", "free", "data"))] = "none"
    features: Annotated[str, BeforeValidator(one_of("weights", "activations", "both"))] = "weights"


class FoldBatchNorm(PassOptions):
    """Fold every batch normalisation that alone reads a convolution or a linear layer into its weight and bias."""

    kind: ClassVar[str] = "fold_batch_norm"


class AtomFactorize(PassOptions):
    """Store kernels as atoms times coefficients, `K = A D` (ACDC, "A Joint Subspace View to Convolutional Neural
    Networks", Eq. 1 to 3).

    - `atoms`: how many atoms a layer has, m.
    - `share`: who shares coefficients: `"net"` (all layers), `"block"` (runs of layers with equal output channels and
      feature size), `"layer"` (the groups of filters inside a layer), or `None` (nobody). Coefficients have the largest
      dimensions needed; smaller layers use a corner of them.
    - `group_size`: s of section 3.4: layers are divided into groups of s output channels that read s input channels,
      followed by a channel shuffle. This changes what the model computes.
    - `include`, `exclude`: globs of layer names. By default all but the first convolution, 1x1 and depthwise ones.
    - `init`: `"fit"` (least squares on the weights) or `"random"` (orthogonal atoms, Kaiming coefficients).
    - `weighted`: weigh the fit by the second moments of each layer's inputs on the calibration data.
    - `atom_drop`: the share of atoms dropped in training.
    - `lower`: `"reconstruct"` (build the kernel), `"atoms_first"` (a depthwise convolution by the atoms, then a 1x1 one
      by the coefficients), or `"auto"` (the faster in onnxruntime, layer by layer).
    """

    kind: ClassVar[str] = "atom_factorize"
    factorizes: ClassVar[bool] = True

    atoms: Annotated[int, BeforeValidator(count_of("atoms"))] = 8
    share: Annotated[str | None, BeforeValidator(one_of("net", "block", "layer", None))] = "net"
    group_size: Annotated[int | None, BeforeValidator(count_of("channels", optional=True))] = None
    include: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    exclude: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    init: Annotated[str, BeforeValidator(one_of("fit", "random"))] = "fit"
    weighted: Annotated[bool, BeforeValidator(is_flag)] = False
    atom_drop: Annotated[float, BeforeValidator(share_of_atoms)] = 0.1
    lower: Annotated[str, BeforeValidator(one_of("auto", "reconstruct", "atoms_first"))] = "reconstruct"


class SliceGenerate(PassOptions):
    """Generate kernels slice by slice from short codes (CSG, "Associative Convolutional Layers", Eq. 1).

    - `slice`: the shape of a slice: out channels, in channels, kernel size. `code`: numbers per slice.
    - `binary`: a generator of fixed -1 and +1 (BCSG).
    - `generator`: a file that `graphzip.save_generator` wrote, to start from; with `frozen` it stays as it is.
    - `scopes`: globs of layer names; the layers of each share a generator of their own, all others one more.
    - `include`, `exclude`: as in `AtomFactorize`.
    - `init`: `"fit"` (truncated SVD of all slices) or `"random"`.
    """

    kind: ClassVar[str] = "slice_generate"
    factorizes: ClassVar[bool] = True

    slice: Annotated[Sequence[int], BeforeValidator(slice_shape)] = (16, 16, 3, 3)
    code: Annotated[int, BeforeValidator(count_of("entries of a code"))] = 128
    binary: Annotated[bool, BeforeValidator(is_flag)] = False
    generator: Annotated[str | None, BeforeValidator(path_or_none)] = None
    frozen: Annotated[bool, BeforeValidator(is_flag)] = False
    scopes: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    include: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    exclude: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    init: Annotated[str, BeforeValidator(one_of("fit", "random"))] = "fit"


class PruneChannels(PassOptions):
    """Drop the channels with the smallest kernels, to compare with `ClusterMerge` on the same groups. Lossy.

    - `keep`, `exclude`, `round_to`: as those of `ClusterMerge`.
    - `strength`: of the group lasso that draws the kernels of channels to go to zero in training
      (`Prepared.regularizer`), at least 0. Default 0: pruning by magnitude alone.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "prune_channels"

    keep: Annotated[Amount | Mapping[str, Amount], BeforeValidator(check_keep)] = 0.5
    exclude: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    round_to: Annotated[int, BeforeValidator(check_multiple)] = 1
    strength: Annotated[float, BeforeValidator(check_weight)] = 0.0


class CrossDomainShare(PassOptions):
    """Let two models of one architecture share the weights that read channels of one cluster (Gao, Deng and Huang,
    "Cross Domain Model Compression by Structurally Weight Sharing"). Sample i of a batch of one model belongs to sample
    i of the other's, in training and in calibration data. With calibration data the shared weights are fitted to what
    the layers gave, and channels go to the clusters that lose least by it.

    - `clusters`: how many a layer has, over both models. A float in (0, 1] is a share of the input channels of both,
      `max(1, floor(channels * clusters))`; an int is a count. Either is for all layers but the first and the last. A
      mapping from globs on layer names to either: the first match wins, layers that no key matches keep all. After a
      flatten every input feature is a channel of its own. `exclude`: globs of layers that keep all their channels.
    - `regularizer`: the term of the loss in the stage "regularize": `"normalized"` (balanced clusters, Eq. 10),
      `"plain"` (Eq. 7), `"simple"` (Eq. 13), `"growl"` (Eq. 2, to compare with), or `None`; times `strength`.
    - `pool`: height and width that feature maps are pooled to before channels are compared; maps of one dimension to
      `height * width`. `samples`: how many numbers of each channel, drawn at random, are compared in a batch.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "cross_domain_share"
    joins: ClassVar[bool] = True

    clusters: Annotated[Amount | Mapping[str, Amount], BeforeValidator(check_keep)] = 0.25
    regularizer: Annotated[str | None, BeforeValidator(one_of("normalized", "plain", "simple", "growl", None))] = (
        "normalized"
    )
    strength: Annotated[float, BeforeValidator(check_weight)] = 1.0
    pool: Annotated[Sequence[int], BeforeValidator(height_and_width)] = (4, 4)
    samples: Annotated[int, BeforeValidator(count_of("numbers of a channel"))] = 512
    exclude: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()


class Zip(PassOptions):
    """Let several trained models share neurons, layer by layer ("Multi-Task Zipping via Layer-wise Neuron Sharing").

    Layers and groups of channels are named as in the first model. What is shared is stored once. A grouped convolution
    shares the outputs whose inputs are all shared.

    - `share`: how many channels of a layer are shared. A float from 0 to 1 is a share of the narrower model's, an int a
      number. A mapping from layer globs (`fnmatch.fnmatchcase`) to either: the first match wins, layers that no key
      matches are not shared. The layer that makes a group of coupled channels first decides for all of them.
    - `threshold`: share the pairs whose difference (Eq. 12) is below it instead; a number, or a mapping as `share`.
    - `alpha`: weight of the first model's error against that of each other one (Eq. 5), between 0 and 1.
    - `pairing`: `"optimal"` (linear assignment) or `"greedy"` (the smallest difference first, as in the paper).
    - `metric`: `"hessian"` (Eq. 12, needs calibration data), `"euclidean"`, or `"random"` to compare with.
    - `damping`: what is added to the diagonal of each Hessian, relative to its mean. Large numbers lead to
      `"euclidean"`.
    - `exclude`: globs of the layers that stay apart.
    - `order`: the tasks in the order in which they are joined; by default that of the mapping of models.
    - `match`: for a task whose layers have other names, the first model's layers and its own.
    - `places`: how many places of an image, or of a sequence, count of every sample in a Hessian.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "zip"
    joins: ClassVar[bool] = True

    share: Annotated[Amount | Mapping[str, Amount], BeforeValidator(check_share)] = 1.0
    threshold: Annotated[float | Mapping[str, float] | None, BeforeValidator(check_threshold)] = None
    alpha: Annotated[float, BeforeValidator(check_balance)] = 0.5
    pairing: Annotated[str, BeforeValidator(one_of("optimal", "greedy"))] = "optimal"
    metric: Annotated[str, BeforeValidator(one_of("hessian", "euclidean", "random"))] = "hessian"
    damping: Annotated[float, BeforeValidator(check_damping)] = 0.03
    exclude: Annotated[Sequence[str], BeforeValidator(check_globs)] = ()
    order: Annotated[Sequence[str], BeforeValidator(check_names)] = ()
    match: Annotated[Mapping[str, Mapping[str, str]] | None, BeforeValidator(check_match)] = None
    places: Annotated[int, BeforeValidator(count_of("places"))] = 32


PASS_OPTIONS: Final[dict[str, type[PassOptions]]] = {
    options.kind: options
    for options in (
        ClusterMerge,
        CrossDomainShare,
        FoldBatchNorm,
        AtomFactorize,
        SliceGenerate,
        PruneChannels,
        Zip,
    )
}
"""The passes a plan can name."""


# ---------------------------------------------------------------------------------------------------- the plan


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
        self._inputs = check_shapes(inputs, problems)
        if problems or (problems := _misplaced(self._passes)):
            raise plan_error(problems)

    @property
    def passes(self) -> tuple[PassOptions, ...]:
        """The passes' options, in the order in which they run."""
        return self._passes

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

    def to_dict(self) -> dict[str, Any]:
        """The plan in the layout of the plan file: JSON-ready, only the options that were given."""
        data: dict[str, Any] = {"version": VERSION}
        if self._inputs is not None:
            data["inputs"] = _plain(self._inputs)
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

    def __repr__(self) -> str:
        inputs = "" if self._inputs is None else f", inputs={_plain(self._inputs)}"
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
    problems = [f"{key}: unknown key; {closest(key, known)}" for key in unknown[:_LISTED]]
    problems += [f"{len(unknown)} unknown keys"] * (len(unknown) > _LISTED)
    shapes = check_shapes(data.get("inputs"), problems)
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
        keys = ", ".join(key_text(key) for key in list(item)[:_LISTED]) + ", ..." * (len(item) > _LISTED)
        problems.append(
            f"{where}: one item names one pass, this one has the keys {keys}; indent options below the name"
        )
        return []
    ((name, given),) = item.items()
    options_type = PASS_OPTIONS.get(name) if isinstance(name, str) else None
    if options_type is None:
        problems.append(f"{where}.{key_text(name)}: unknown pass; {closest(key_text(name), PASS_OPTIONS)}")
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
    found = _fill(options, {key_text(key): value for key, value in given.items()}, where)
    problems += found
    return [] if found else [options]
