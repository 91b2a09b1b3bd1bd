"""The options of the passes that graphzip brings: plain data, no pass code."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from graphzip.limits import LONGEST_NAME
from graphzip.plan.criteria import named
from graphzip.plan.options import PassOptions
from graphzip.plan.problems import says
from graphzip.plan.values import (
    Amounts,
    Balance,
    Blocks,
    Clusters,
    Count,
    Flag,
    Globs,
    HeightAndWidth,
    Match,
    Number,
    Part,
    Path,
    Positive,
    SharedAmounts,
    SliceShape,
    Tasks,
    Thresholds,
)
from graphzip_passes.registry import BUILT_IN

__all__ = [
    "PASS_OPTIONS",
    "RECONSTRUCTION",
    "AtomFactorize",
    "ClusterMerge",
    "CrossDomainShare",
    "DropBlocks",
    "FoldBatchNorm",
    "LowRank",
    "Minimize",
    "PruneChannels",
    "SliceGenerate",
    "Zip",
    "kinds",
    "options_of",
]

RECONSTRUCTION: Final = "reconstruction"
"""The clustering that is decided on calibration data."""

Multiple = Annotated[Count, says("is not a number of channels; write an int of at least 1")]
Importance = Annotated[
    str,
    Field(strict=True, min_length=1, max_length=LONGEST_NAME),
    BeforeValidator(lambda value: named(value) if callable(value) else value),
    says("is not a criterion; write a name, such as 'l1', or give a function (group) -> scores"),
]
Strength = Annotated[Number, says("is not a strength; write a number of at least 0")]


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
    - `pacesetter`: where several layers make the channels of a group, whose kernels `"kmeans"` and registered
      clusterings compare: `"projection"`, those of the layer that lies nearest to the inputs, which in a residual
      network is the projection of a stage (section 3.5); `"first"`, those of the one that runs first.
    - `clusters`: clusters by hand, group name to lists of channels, `{"conv1": [[0, 3], [1], [2, 5, 4]]}`; every
      channel of the group once.
    - `exclude`: globs of the groups that stay whole.
    - `round_to`: the kept width is rounded up to a multiple of this number of channels, at most to the group's size.
    - `min_width`: what a group keeps at least, if it has so many channels; clusters by hand are as they are.
    - `strength`: the centripetal strength of `Prepared.optimizer`, epsilon of C-SGD's Eq. 6 (per step, before the
      learning rate is applied), above 0. The default is the paper's, for hundreds of epochs. `"auto"` takes the one
      that makes filters identical after three quarters of the planned steps, which the optimizer is told.
    - `pull`: `"decoupled"`: every step takes the same share off what members of a cluster are apart, whichever the
      optimizer is. `"gradient"`: the pull is a part of the gradient, as in the authors' code; momentum then multiplies
      it, by ten at 0.9.
    - `norms`: `"exact"` makes a norm over merged channels a weighted one where they stand for different numbers of
      channels; `"plain"` leaves it as it is, faster and no longer lossless, as the report then says.

    - `compensate`: what makes up for merging channels that are not identical. `"none"`: nothing. `"free"`: the
      variances of batch norms are corrected from the kernels alone. `"data"`, which needs calibration data: every
      layer is re-fitted in closed form to what the original gives. Identical channels are merged losslessly by all.

    Where one model and calibration data are given, the defaults of `clustering` and `compensate` are `"reconstruction"`
    and `"data"` (`for_data`).

    Raises `PlanError` when a value is out of range or of the wrong type, or a channel is named twice.
    """

    kind: ClassVar[str] = "cluster_merge"

    clusters: Clusters | None = None
    keep: Amounts = Field(default_factory=lambda given: 0.5 if given.get("clusters") is None else {})
    clustering: Annotated[
        str, Field(strict=True, min_length=1), says("is not the name of a clustering, such as 'kmeans'")
    ] = "kmeans"
    exclude: Globs = ()
    round_to: Multiple = 1
    min_width: Multiple = 1
    strength: Annotated[Positive | Literal["auto"], says("is not a strength; write a number above 0, or 'auto'")] = 3e-3
    pull: Literal["decoupled", "gradient"] = "decoupled"
    norms: Annotated[Literal["exact", "plain"], says("is not a way to treat norms; write 'exact' or 'plain'")] = "exact"
    compensate: Literal["none", "free", "data"] = "none"
    features: Literal["weights", "activations", "both"] = "weights"
    pacesetter: Literal["projection", "first"] = "projection"

    def for_data(self) -> ClusterMerge:
        """The same with what calibration data does best for the options that were not given."""
        best = {"compensate": "data"}
        if "features" not in self.model_fields_set:  # these are for clusterings that compare channels
            best["clustering"] = RECONSTRUCTION
        return ClusterMerge(**(best | self.to_dict()))


class DropBlocks(PassOptions):
    """Leave out whole residual branches: `x + f(x)` becomes `x` (Veit, Wilber and Belongie, "Residual Networks Behave
    Like Ensembles of Relatively Shallow Networks", section 4.1). With calibration data the branches go that move the
    outputs least, and a scale and a shift of every channel are fitted to what the sum gave; without, those whose last
    layer has the smallest weights. Lossless where a branch gives zero.

    - `keep`: how many of the branches stay. A float from 0 to 1 is a share, rounded down; an int is a number.
    - `blocks`: globs on the names of the branches that may go, by default all. A branch has the name of the module that
      adds it (`layer1.0`); where that adds several, of the part of it that has most of the branch's weights
      (`blocks.0.attn`, `blocks.0.mlp`).

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "drop_blocks"

    keep: Blocks = 0.75
    blocks: Globs = ()


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
    - `compensate`: `"data"`: after the fit, batch norms get the statistics of what they read on the calibration data,
      and layers that keep their kernels are re-fitted in closed form to what they gave. `"auto"` does so where there is
      data, for a fit that stands in for the kernels (no `group_size`); `"none"` does not.
    - `force`: store all these layers as factors. Otherwise those stay as they are that would make the model larger (in
      bytes), which the report says, and where none makes it smaller the plan is refused.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "atom_factorize"
    factorizes: ClassVar[bool] = True

    atoms: Annotated[Count, says("is not a number of atoms; write an int of at least 1")] = 8
    share: Literal["net", "block", "layer", None] = "net"
    group_size: Annotated[Count, says("is not a number of channels; write an int of at least 1")] | None = None
    include: Globs = ()
    exclude: Globs = ()
    init: Literal["fit", "random"] = "fit"
    weighted: Flag = False
    atom_drop: Annotated[
        Annotated[Number, Field(lt=1)], says("is not a share of the atoms; write a number from 0 to below 1")
    ] = 0.1
    lower: Literal["auto", "reconstruct", "atoms_first"] = "reconstruct"
    compensate: Literal["auto", "none", "data"] = "auto"
    force: Flag = False


class SliceGenerate(PassOptions):
    """Generate kernels slice by slice from short codes (CSG, "Associative Convolutional Layers", Eq. 1).

    - `slice`: the shape of a slice: out channels, in channels, kernel size. `code`: numbers per slice.
    - `binary`: a generator of fixed -1 and +1 (BCSG), stored as bits.
    - `generator`: a file that `graphzip.save_generator` wrote, to start from; with `frozen` it stays as it is.
    - `scopes`: globs of layer names; the layers of each share a generator of their own, all others one more.
    - `include`, `exclude`: as in `AtomFactorize`.
    - `init`: `"fit"` (truncated SVD of all slices) or `"random"`. `weighted`, `compensate`, `force`: as in
      `AtomFactorize`.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "slice_generate"
    factorizes: ClassVar[bool] = True

    slice: SliceShape = (16, 16, 3, 3)
    code: Annotated[Count, says("is not a number of entries of a code; write an int of at least 1")] = 128
    binary: Flag = False
    generator: Path | None = None
    frozen: Flag = False
    scopes: Globs = ()
    include: Globs = ()
    exclude: Globs = ()
    init: Literal["fit", "random"] = "fit"
    weighted: Flag = False
    compensate: Literal["auto", "none", "data"] = "auto"
    force: Flag = False


class PruneChannels(PassOptions):
    """Drop the channels that a criterion scores lowest, on the groups that `ClusterMerge` merges. Lossy.

    - `keep`, `exclude`, `round_to`: as those of `ClusterMerge`.
    - `criterion`: what scores the channels of a group; the highest scores stay. Of weights alone: `"l1"`, `"l2"`,
      `"bn_scale"`, `"lamp"`, `"fpgm"`, `"random"`. Of calibration data: `"apoz"`, `"activation_norm"`,
      `"activation_variance"`, `"wanda"`, `"thinet"`, `"hrank"`, `"chip"`. Of gradients on calibration data, of `loss=`
      where there are labels and else of the outputs in random directions: `"taylor"`, `"fisher"`, `"hessian"`. A name
      that was registered (`graphzip.register_criterion`), or a function `(group: GroupView) -> scores (n,)`, which is
      registered under its own name. The formulas and their sources stand in `graphzip_passes.prune.criteria`.
    - `ranking`: `"local"`: every group keeps what `keep` says. `"global"`: all groups together keep as many channels as
      they would alone, and those with the lowest scores of all go; scores that do not mean the same in every group are
      divided by their group's mean. `"isomorphic"`: so among groups of the same structure.
    - `compensate`: `"data"`, which needs calibration data, re-fits every layer in closed form to what the original
      gives. `"free"` needs none: what dropped channels are on average, as batch norms before them tell, goes into the
      biases and batch norms behind, and the variances of these shrink by the part that dropped channels had in them.
      `"none"` leaves weights as they are.
    - `norms`: `"exact"`: norms and means over channels count dropped ones as zeros, so that dropping channels that are
      zero changes nothing. `"plain"`: they are taken of what is left.
    - `regularizer`: what draws channels to zero in training, by a `strength` of at least 0. `"lasso"`: the norms of the
      kernels of the channels that go, a term of the loss (`Prepared.regularizer`). `"growing"`: weights of the channels
      that go decay by a share of the learning rate that grows evenly from 0 to `strength` over the steps that
      `Prepared.optimizer` is told (Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021). `"bn_scale"`:
      the sizes of the scales of normalisations, of all channels of the groups that shrink, a term of the loss; the
      criterion then decides once more when the pass is carried out (Liu et al., "Network Slimming", ICCV 2017, Eq. 1).

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "prune_channels"

    keep: Amounts = 0.5
    criterion: Importance = "l1"
    ranking: Literal["local", "global", "isomorphic"] = "local"
    compensate: Literal["none", "free", "data"] = "none"
    norms: Annotated[Literal["exact", "plain"], says("is not a way to treat norms; write 'exact' or 'plain'")] = "exact"
    exclude: Globs = ()
    round_to: Multiple = 1
    strength: Strength = 0.0
    regularizer: Literal["lasso", "growing", "bn_scale"] = "lasso"


class LowRank(PassOptions):
    """Store convolutions and linear layers as products of thinner ones: two or three plain layers in place of one,
    where that costs fewer multiply-accumulates. Lossless where the weight has no higher rank than it gets.

    - `rank`: of every layer. An int is the rank; a float in (0, 1] a share of the full one, `min(O, I * K)` for a
      weight (O, I, K). A mapping from globs on layer names to either: the first match wins, layers that no key matches
      stay. Default: as `energy` says.
    - `energy`: the share, above 0 and at most 1, of the energy (the sum of squares of singular values; of variances of
      the outputs for `"data-svd"`) that every layer keeps. 1 is exact.
    - `method`: `"svd"`: a thinner layer and one of kernel 1 behind it. `"data-svd"`, which needs calibration data: so
      that what the layer gives on it moves least. `"cp-spatial"`: kernels (h, 1) and (1, w). `"tucker"`: kernel 1, the
      kernel between fewer channels, kernel 1; linear layers as by `"svd"`. Sources stand in
      `graphzip_passes.low_rank.factors`.
    - `compensate`: `"data"` re-fits what follows from calibration data in closed form; `"auto"` does so where there is
      some; `"none"` does not.
    - `timed`: time every layer that is cut beside what it is cut into, in onnxruntime here, for one sample; the report
      says where the thin layers are slower.
    - `include`, `exclude`: globs on names of layers. By default all that no other layer shares a weight with.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "low_rank_factors"
    rank: Amounts | None = None
    energy: Annotated[
        Annotated[Positive, Field(le=1)], says("is not a share of the energy; write a number above 0 and at most 1")
    ] = 0.9
    method: Literal["svd", "data-svd", "cp-spatial", "tucker"] = "svd"
    compensate: Literal["auto", "none", "data"] = "auto"
    timed: Flag = False
    include: Globs = ()
    exclude: Globs = ()

    def for_data(self) -> LowRank:
        """The same with what calibration data does best for the options that were not given."""
        return LowRank(**({"method": "data-svd"} | self.to_dict()))


class Minimize(PassOptions):
    """Take out what a network holds for nothing, without changing any output: after unstructured pruning, after
    training towards sparsity or identical filters, from anybody's checkpoint.

    Found are channels that are *dead* (whatever reads them does so with zeros), *constant* (no input decides what they
    hold, for kernels, a batch norm's scale or a factor are zero: it goes into the biases behind, where no padding
    stands against it), *identical*, or *proportional* to another one (where everything in between commutes with the
    factor); heads that nothing reads or that are the same; and linear layers and convolutions in a row. Zeros in front
    of a norm or a mean over channels go, too, which goes on counting them. One channel of every group stays. A constant
    behind a batch norm is what it is in eval mode.

    - `tolerance`: how far channels that count as alike may lie apart, relative to their size; above 0 it is lossy.
    - `chains`: whether layers in a row with nothing in between become one, where that is no larger.
    - `exclude`: globs of the groups that stay whole.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "minimize"

    tolerance: Annotated[Number, says("is not a tolerance; write a number of at least 0")] = 0.0
    chains: Flag = True
    exclude: Globs = ()


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
      `"plain"` (Eq. 7), `"simple"` (Eq. 13), `"growl"` (Eq. 2, to compare with; `Prepared.optimizer` takes it as a
      proximal step, and the term is zero then), or `None`.
    - `strength`: how large the term's gradient is, as a share of the loss's; it is measured every few steps, and means
      the same for all terms. With `scaling="absolute"` the number that the term is multiplied by, as in the paper.
    - `balanced`: all clusters of a layer have as many channels, up to one (section 4.5).
    - `pool`: height and width that feature maps are pooled to before channels are compared; maps of one dimension to
      `height * width`. `samples`: how many numbers of each channel, drawn at random, are compared in a batch.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "cross_domain_share"
    joins: ClassVar[bool] = True

    clusters: Amounts = 0.25
    regularizer: Literal["normalized", "plain", "simple", "growl", None] = "normalized"
    strength: Strength = 0.25
    scaling: Literal["relative", "absolute"] = "relative"
    balanced: Flag = False
    pool: HeightAndWidth = (4, 4)
    samples: Annotated[Count, says("is not a number of numbers of a channel; write an int of at least 1")] = 512
    exclude: Globs = ()


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
    - `metric`: `"hessian"` (Eq. 12, needs calibration data); `"correlation"`, by which neurons are paired whose outputs
      correlate most, as in ZipIt! (Stoica et al., ICLR 2024): every task needs the same calibration batches for it, and
      shared weights are those of `"hessian"`; `"euclidean"`; or `"random"` to compare with. For `"correlation"` a
      `threshold` is one of `1 - correlation`.
    - `within`: so many channels of every group of each model, as a share, are merged with others of the same model
      before it is zipped: a `ClusterMerge(keep=1 - within)` in front, with calibration data by activations and with
      `compensate="data"`. Put your own there for other options.
    - `damping`: what is added to the diagonal of each Hessian, relative to its mean. Large numbers lead to
      `"euclidean"`.
    - `exclude`: globs of the layers that stay apart.
    - `order`: the tasks in the order in which they are joined; by default that of the mapping of models.
    - `match`: for a task whose layers have other names, the first model's layers and its own.
    - `places`: how many places of an image, or of a sequence, count of every sample in a Hessian.
    - `refit`: fit the weights that one task has alone to what its own layers gave, on the calibration data: rows before
      they are paired, what is not shared of a layer, and the layers behind, heads included, each where that serves
      samples that it is not fitted to, too. `False` leaves them.
    - `paper`: exactly Algorithm 1 of the paper, to compare with: nothing is re-fitted, pairs are greedy, and shared
      weights do not make up for what their inputs have lost.

    Raises `PlanError` when a value is out of range or of the wrong type.
    """

    kind: ClassVar[str] = "zip"
    joins: ClassVar[bool] = True

    share: SharedAmounts = 1.0
    threshold: Thresholds | None = None
    alpha: Annotated[Balance, says("does not balance two errors; write a number between 0 and 1")] = 0.5
    pairing: Literal["optimal", "greedy"] = "optimal"
    metric: Literal["hessian", "correlation", "euclidean", "random"] = "hessian"
    within: Annotated[Part, says("is not a share of channels; write a number from 0, and below 1")] = 0.0
    damping: Annotated[Positive, says("is not a damping; write a number above 0")] = 0.03
    exclude: Globs = ()
    order: Tasks = ()
    match: Match | None = None
    places: Annotated[Count, says("is not a number of places; write an int of at least 1")] = 32
    refit: Flag = True
    paper: Flag = False

    def expanded(self, *, has_data: bool) -> tuple[PassOptions, ...]:
        """Channels of one model are merged before those of several are."""
        if not self.within:
            return (self,)
        keep, apart = round(1.0 - self.within, 12), self.model_copy(update={"within": 0.0})
        if has_data:
            return ClusterMerge(keep=keep, features="activations", compensate="data"), apart
        return ClusterMerge(keep=keep), apart


PASS_OPTIONS: dict[str, type[PassOptions]] = {
    options.kind: options
    for options in (
        ClusterMerge,
        CrossDomainShare,
        DropBlocks,
        FoldBatchNorm,
        LowRank,
        Minimize,
        AtomFactorize,
        SliceGenerate,
        PruneChannels,
        Zip,
    )
}
"""The options of the passes that are known, by the name that a plan file has for them; `register_pass` adds to it."""


def options_of(kind: str) -> type[PassOptions] | None:
    """The options of the pass that plan files call `kind`; its file is imported where it was not yet."""
    if kind not in PASS_OPTIONS and kind in BUILT_IN:
        import_module(BUILT_IN[kind].partition(":")[0])
    return PASS_OPTIONS.get(kind)


def kinds() -> list[str]:
    """The passes that a plan file can name."""
    return list(dict.fromkeys([*PASS_OPTIONS, *BUILT_IN]))
