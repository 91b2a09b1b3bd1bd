"""Cross-domain sharing: channels of two models that do alike are read by the same weights.

The input channels of a layer, those of both models together, are nodes of a graph whose weights are the similarities
of their features. A spectral embedding of that graph regularises the training, which makes its clusters distinct;
k-means on the embedding then divides the channels into clusters, the weights of a cluster become their centre and stay
equal, for their gradients are averaged (Eq. 12):

    dL/dg_c = 1/n_c sum over i in cluster c of dL/dW_i.

With calibration data the centres are only the beginning: weights and clusters are fitted to what the layers gave before
(`graphzip_passes.cross_domain.shared_fit`), which goes beyond the paper. Clusters that were set by hand stay.

In the end the channels of a cluster are added up before the layer, whose weight has one input channel per cluster.

Source: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019): the regulariser in
section 3.3, sharing and Eq. 12 in section 3.4, the result in section 3.5.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from graphzip.errors import GraphZipError, WeightsError
from graphzip.graph.copies import deep_copy
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.sharded import is_sharded, put, whole
from graphzip.plan.passes import CrossDomainShare
from graphzip.plan.problems import plan_error
from graphzip.report.outcome import Bars, Outcome, Table
from graphzip.report.tables import percent, quantity
from graphzip.rewrite.shared_weights import SharedWeight, share_weights
from graphzip_passes.base import Decision, PassContext, Stage, register_pass
from graphzip_passes.cross_domain.balanced import balanced
from graphzip_passes.cross_domain.embedding import NODES, Learned, spectral_embedding
from graphzip_passes.cross_domain.pooled_features import Trimmed
from graphzip_passes.cross_domain.proximal import attach_proximal
from graphzip_passes.cross_domain.random_state import drawn_so_far, go_on_from, parts_of
from graphzip_passes.cross_domain.shared_fit import fit_shared
from graphzip_passes.cross_domain.shared_layers import SharedLayer, shared_layers, weights_before
from graphzip_passes.cross_domain.similarity import factor_of, growl, simple_loss
from graphzip_passes.cross_domain.strength import Share
from graphzip_passes.parts.centripetal import TIED, attach
from graphzip_passes.parts.clustering import cluster
from graphzip_passes.parts.tied_slices import Slices, Tying

__all__ = ["CrossDomainSharePass", "cross_domain_share"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.floating[Any]]

_LEAST: Final = 1e-6  # of the largest amplitude: what a channel that is always zero counts
_OUTPUTS: Final = 256  # of a layer whose weights are averaged at once
_SIZE: Final = 64  # columns of an embedding, at most: k-means needs no more for many clusters


@dataclass(frozen=True)
class _Clusters:
    """The clusters of one layer: their number for every channel, those of the first task before those of the second.

    Clusters that the first task alone uses come first, those of the second alone last, so that each task reads
    neighbours.
    """

    layer: SharedLayer
    number: IntArray

    @classmethod
    def of(cls, layer: SharedLayer, labels: IntArray) -> _Clusters:
        first = layer.sizes[0]
        left, right = np.isin(labels, labels[:first]), np.isin(labels, labels[first:])
        part = np.where(left & right, 1, np.where(left, 0, 2))
        start = np.array([np.argmax(labels == label) for label in labels])
        _, number = np.unique(part * labels.size + start, return_inverse=True)
        return cls(layer, number.reshape(-1).astype(np.int64))

    @property
    def columns(self) -> tuple[IntArray, ...]:
        """The same by task."""
        return tuple(np.split(self.number, np.cumsum(self.layer.sizes)[:-1]))

    def slices(self, owner: int) -> list[Slices]:
        """The weights of both tasks as slices with clusters in common."""
        return [
            Slices(name, 1, column, np.full(column.size, owner, dtype=np.int64), True, pool=self.layer.name)
            for name, column in zip(self.layer.weights, self.columns, strict=True)
        ]

    def report(self) -> dict[str, Any]:
        """JSON-ready: how many channels of each task every cluster has, the largest first, and who uses it.

        `common` clusters have channels of both, `channels_in_common` of them. `balance` is the mean size of a cluster
        divided by the largest, 1 where all are alike.
        """
        counts = np.stack([np.bincount(column, minlength=self.layer.count) for column in self.columns])
        order = np.argsort(-counts.sum(0), kind="stable")
        alone = (counts > 0).sum(0) == 1
        return {
            "channels": self.layer.channels,
            "clusters": self.layer.count,
            "private": {
                task: int((alone & (own > 0)).sum()) for task, own in zip(self.layer.tasks, counts, strict=True)
            },
            "common": int((~alone).sum()),
            "channels_in_common": int(counts[:, ~alone].sum()),
            "balance": self.layer.channels / (self.layer.count * int(counts.sum(0).max())),
            "sizes": {task: own[order].tolist() for task, own in zip(self.layer.tasks, counts, strict=True)},
        }


@register_pass(CrossDomainShare, decides=True)
def cross_domain_share(traced: Traced, options: CrossDomainShare, context: PassContext) -> Decision:
    """Watch what the layers read, by which their channels will be compared."""
    sharing = CrossDomainSharePass(options, traced, seed=context.seed, where=context.where)
    sharing.watch(context.model)
    return Decision(sharing.finish, constraint=sharing, stages=sharing.stages)


class CrossDomainSharePass(Tying):
    """`CrossDomainShare` bound to two models."""

    def __init__(self, options: CrossDomainShare, traced: Traced, *, seed: int, where: str) -> None:
        if len(traced.tasks) != 2:
            names = ", ".join(repr(task.name) for task in traced.tasks)
            raise plan_error([f"{where}: it shares weights between two models, got {names}; give a mapping of two"])
        self.options, self.seed, self.where = options, seed, where
        self.layers = shared_layers(options, traced, where=where)
        self.before = weights_before(traced)
        self.clusters: dict[str, _Clusters] = {}
        tasks = [task.name for task in traced.tasks]
        self._trimmed = Trimmed(tasks, options.pool, options.samples, seed)
        self._random = np.random.default_rng(seed)
        self._learned: dict[str, Learned] = {}
        self._share_of_loss, self._proximal = Share(options.strength), False

    def stages(self) -> tuple[Stage, ...]:
        """What is left: once there are clusters, only the fine-tuning."""
        return (Stage("finetune"),) if self.clusters else (Stage("regularize"), Stage("finetune", adjust=self._share))

    def watch(self, model: nn.Module) -> None:
        """Note what the layers of `model` read."""
        for layer in self.layers:
            modules = {task: model.get_submodule(f"{task}.{layer.name}") for task in layer.tasks}
            self._trimmed.watch(layer.name, modules, layer.dims)

    def _share(self, context: PassContext) -> None:
        """Find the clusters, where none were set, make their weights equal and fit these."""
        model, data = context.model, context.calibration
        found: list[tuple[_Clusters, FloatArray]] = []
        if not self.clusters:
            if data is not None and self.options.regularizer != "growl":
                self._trimmed.leave()  # the model may be another one now than that which was trained
                self.watch(model)
                with self._trimmed.collecting():
                    data.run(enough=self._trimmed.has_enough)
            found = self._agreed([self._clustered(layer, model) for layer in self.layers])
            self._set({clusters.layer.name: clusters for clusters, _ in found})
        before = deep_copy(model) if data is not None else None
        for clusters, amplitude in found:
            _tie(clusters, amplitude, model)
        if not found:
            self.collapse_(model)
        if data is not None and before is not None:
            for name, each in list(self.clusters.items()):
                move = bool(found) and not self.options.balanced
                number = fit_shared(each.layer, each.number, model, before, data, move=move)
                self.clusters[name] = _Clusters.of(each.layer, number)
            self._set(self.clusters)

    def regularizer(self, model: nn.Module) -> Tensor | None:
        kind = self.options.regularizer
        if kind is None or self.clusters or self._proximal:
            return None
        if kind == "growl":
            terms = [growl(_channels(layer, model)) for layer in self.layers]
        else:
            if self.options.scaling == "relative" and is_sharded(model):
                raise GraphZipError(
                    f"{self.where}.scaling: 'relative' compares gradients of whole parameters, of which every process "
                    "has a part here; write scaling='absolute', or train with DistributedDataParallel"
                )
            terms = [self._graph_term(layer, self._trimmed.take(layer.name)) for layer in self.layers]
        term = torch.stack([each.to(terms[0]) for each in terms]).sum()
        if self.options.scaling == "absolute" or not term.requires_grad:
            return self.options.strength * term
        return self._share_of_loss.weighed(term, model.parameters())

    def finish(self, traced: Traced, context: PassContext) -> Outcome:
        """Give both models one weight per cluster."""
        assert self.clusters, "the stage 'regularize' has not ended"
        shared = []
        for name, clusters in self.clusters.items():
            layer = clusters.layer
            old = get_tensor(traced.module, layer.weights[0])
            weight = nn.Parameter(_means(clusters, traced.module), old.requires_grad)
            logger.info("%s: %d channels of both models in %d clusters", name, layer.channels, layer.count)
            shared.append(SharedWeight(weight, layer.weights, clusters.columns))
        details = self.summary()
        return Outcome(
            share_weights(traced, shared),
            changed=bool(self.clusters),
            widths=self.widths(),
            tables=(_table(details["layers"], details["weights"]),),
            bars=tuple(_bars(name, found) for name, found in details["layers"].items()),
            details=details,
        )

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        if self.clusters:
            attach(optimizer, lambda: self._places(model), strength=TIED, steps=steps, where=self.where)
        elif self.options.regularizer == "growl":
            self._proximal = True
            attach_proximal(
                optimizer,
                lambda: [_channels(layer, model).detach() for layer in self.layers],
                lambda rows: _write(self.layers, model, rows),
                strength=self.options.strength,
                relative=self.options.scaling == "relative",
            )

    def state(self) -> Tensor:
        """The number of the cluster of every channel, layer after layer; -1 while there are none."""
        found = [
            self.clusters[layer.name].number if self.clusters else np.full(layer.channels, -1) for layer in self.layers
        ]
        return torch.from_numpy(np.concatenate(found).astype(np.int64))

    def load_state(self, state: Tensor) -> None:
        parts = torch.split(state.cpu(), [layer.channels for layer in self.layers])
        found: dict[str, _Clusters] = {}
        for layer, part in zip(self.layers, parts, strict=True):
            if int(part.min()) >= 0:
                found[layer.name] = _Clusters.of(layer, part.numpy())
                count = len(np.unique(part.numpy()))
                if count != layer.count:
                    raise WeightsError(
                        f"layer {layer.name!r}: the loaded state has {count} clusters, the plan {layer.count}; prepare "
                        "the models with the plan that the checkpoint was made with"
                    )
        if found and len(found) < len(self.layers):
            raise WeightsError("the loaded state has clusters of some layers only; it is of another plan or damaged")
        self._set(found)

    def progress(self) -> dict[str, Tensor]:
        """While channels are regularised: their features, the networks that embed them, and what is drawn next."""
        if self.clusters or self.options.regularizer is None:
            return {}
        found = {f"features.{name}": tensor for name, tensor in self._trimmed.state().items()}
        found |= {f"share.{name}": tensor for name, tensor in self._share_of_loss.state().items()}
        for number, layer in enumerate(self.layers):
            if layer.name in self._learned:
                state = self._learned[layer.name].state()
                found |= {f"learned.{number}.{name}": tensor for name, tensor in state.items()}
        return found | {"random": drawn_so_far(self._random)}

    def load_progress(self, progress: Mapping[str, Tensor]) -> None:
        try:
            self._trimmed.load(parts_of(progress, "features"))
            self._share_of_loss.load(parts_of(progress, "share"))
            for number, layer in enumerate(self.layers):
                state = parts_of(progress, f"learned.{number}")
                if state:
                    self._network_of(layer, state["network.sketch"]).load(state)
            go_on_from(self._random, progress["random"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"the loaded state is of a training with another plan, or damaged ({error}); prepare the models with "
                "the plan that the checkpoint was made with"
            ) from error

    def widths(self) -> dict[str, tuple[int, int]]:
        """Channels of both tasks and clusters, by layer."""
        return {layer.name: (layer.channels, layer.count) for layer in self.layers}

    def summary(self) -> dict[str, Any]:
        """JSON-ready: the clusters of every layer, and the weights of both models before and after."""
        after = self.before - sum((layer.channels - layer.count) * layer.per_channel for layer in self.layers)
        return {
            "layers": {name: clusters.report() for name, clusters in self.clusters.items()},
            "weights": {"before": self.before, "after": after, "times": self.before / after},
        }

    def _graph_term(self, layer: SharedLayer, features: Tensor) -> Tensor:
        """The regulariser of one layer."""
        with torch.autocast(features.device.type, enabled=False):
            factor = factor_of(features)
            if self.options.regularizer == "simple":
                return simple_loss(factor[torch.from_numpy(self._random.permutation(layer.channels)[:NODES])])
            return self._network_of(layer, factor).term(factor)

    def _network_of(self, layer: SharedLayer, like: Tensor) -> Learned:
        """The network that embeds a layer's channels, made where there is none."""
        if layer.name not in self._learned:
            normalized, size = self.options.regularizer == "normalized", min(layer.count, _SIZE)
            self._learned[layer.name] = Learned(layer.channels, size, normalized=normalized, seed=self.seed, like=like)
        return self._learned[layer.name]

    @torch.no_grad()
    def _clustered(self, layer: SharedLayer, model: nn.Module) -> tuple[_Clusters, FloatArray]:
        """The clusters of a layer, from what is remembered of its channels, and how large their features are."""
        if self.options.regularizer == "growl":
            rows = _channels(layer, model)
            amplitude = rows.new_ones(len(rows))
        else:
            features = self._trimmed.remembered(layer.name)
            if features is None:
                raise GraphZipError(
                    f"{self.where}: there are no features of {layer.name!r} to compare channels by; pass calibration=, "
                    "or train in the stage 'regularize' with prepared.regularizer() in the loss"
                )
            if not bool(features.isfinite().all()):
                raise WeightsError(f"{layer.name!r} reads values that are NaN or infinite; train with a smaller step")
            amplitude = features.norm(dim=1)
            rows = spectral_embedding(factor_of(features), min(layer.count, _SIZE), seed=self.seed)
        labels = np.empty(layer.channels, dtype=np.int64)
        parts = cluster("kmeans", rows.cpu().numpy(), layer.count, seed=self.seed, what=f"layer {layer.name!r}")
        for number, part in enumerate(parts):
            labels[part] = number
        if self.options.balanced:
            labels = balanced(rows.double().cpu().numpy(), labels, layer.count)
        return _Clusters.of(layer, labels), amplitude.cpu().numpy()

    def _agreed(self, found: list[tuple[_Clusters, FloatArray]]) -> list[tuple[_Clusters, FloatArray]]:
        """What the first process found, in all processes of a distributed training."""
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found

    def _set(self, clusters: dict[str, _Clusters]) -> None:
        self.clusters, self._found = clusters, None
        if clusters:
            self._trimmed.leave()
            self._learned.clear()

    def _tied(self) -> Iterable[Slices]:
        return [each for owner, found in enumerate(self.clusters.values()) for each in found.slices(owner)]


@torch.no_grad()
def _tie(clusters: _Clusters, amplitude: FloatArray, model: nn.Module) -> None:
    """Set the weights of every cluster to their centre `g = sum_i a_i W_i / sum_i a_i`, `a_i` being the amplitudes.

    Where the features of a cluster differ in their amplitudes alone, `x_i = a_i s`, this keeps the layer's output.
    """
    layer, weights = clusters.layer, [get_tensor(model, name) for name in clusters.layer.weights]
    share = torch.from_numpy(amplitude).to(weights[0])
    share = share.clamp_min(_LEAST * float(share.max()) or 1.0)
    number = torch.from_numpy(clusters.number).to(share.device)
    share = share / share.new_zeros(layer.count).index_add(0, number, share)[number]
    centres = share.new_zeros(layer.count, layer.per_channel)
    parts = list(zip(weights, *(torch.split(each, list(layer.sizes)) for each in (number, share)), strict=True))
    for weight, own, factor in parts:  # task by task: weights of linear layers may be large
        centres.index_add_(0, own, weight.transpose(0, 1).flatten(1) * factor[:, None])
    for weight, own, _ in parts:
        weight.copy_(centres[own].reshape(-1, layer.outs, *layer.kernel).transpose(0, 1))


@torch.no_grad()
def _means(clusters: _Clusters, model: nn.Module) -> Tensor:
    """The mean weights of all clusters, (outs, clusters, *kernel), some outputs at a time: linear layers are large."""
    layer = clusters.layer
    weights = [whole(get_tensor(model, name)) for name in layer.weights]
    made = weights[0].new_empty(layer.outs, layer.count, *layer.kernel)
    counts = torch.from_numpy(np.bincount(clusters.number, minlength=layer.count)).to(made.device)
    numbers = torch.split(torch.from_numpy(clusters.number).to(made.device), list(layer.sizes))
    for start in range(0, layer.outs, _OUTPUTS):
        rows = made[start : start + _OUTPUTS]
        total = rows.new_zeros(rows.shape, dtype=torch.float64)
        for weight, own in zip(weights, numbers, strict=True):
            total.index_add_(1, own, weight[start : start + _OUTPUTS].double())
        rows.copy_(total / counts.reshape(-1, *[1] * len(layer.kernel)))
    return made


def _table(layers: Mapping[str, Any], weights: Mapping[str, float]) -> Table:
    """Layers whose weights the models share: their clusters, those that one model uses alone, and the largest one."""
    tasks = list(next(iter(layers.values()), {"private": ()})["private"])
    rows = [
        (
            name,
            *(found["channels"], found["clusters"], *found["private"].values(), found["common"]),
            percent(found["channels_in_common"], found["channels"]),
            max(map(sum, zip(*found["sizes"].values(), strict=True))),
            f"{found['balance']:.2f}",
        )
        for name, found in layers.items()
    ]
    before, after = (quantity(weights[key]) for key in ("before", "after"))
    return Table(
        (
            "layer",
            "channels",
            "clusters",
            *(f"{task} alone" for task in tasks),
            "common",
            "channels in them",
            "largest",
            "balance",
        ),
        tuple(rows),
        note=f"{before} weights without biases became {after}: {weights['times']:.2f} times fewer",
    )


def _bars(name: str, found: Mapping[str, Any]) -> Bars:
    """How large the clusters of a layer are."""
    sizes = {task: tuple(own) for task, own in found["sizes"].items()}
    return Bars(f"{name}: {found['channels']} channels, {found['clusters']} clusters", "channels of a cluster", sizes)


@torch.no_grad()
def _write(layers: Sequence[SharedLayer], model: nn.Module, rows: Sequence[Tensor]) -> None:
    """The way back of `_channels`, for several layers."""
    for layer, own in zip(layers, rows, strict=True):
        for name, part in zip(layer.weights, torch.split(own, list(layer.sizes)), strict=True):
            put(get_tensor(model, name), part.reshape(-1, layer.outs, *layer.kernel).transpose(0, 1))


def _channels(layer: SharedLayer, model: nn.Module) -> Tensor:
    """The weights of both tasks as rows: (channels, weights of a channel)."""
    weights: Sequence[Tensor] = [whole(get_tensor(model, name)) for name in layer.weights]
    return torch.cat([weight.transpose(0, 1).flatten(1) for weight in weights])
