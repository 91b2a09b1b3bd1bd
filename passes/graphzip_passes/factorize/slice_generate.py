"""Slices from codes: slice `i` of a kernel is `reshape(G c_i)`, with one linear generator `G` for many layers.

A kernel is tiled by slices of `(n, k, h, w)`; the last ones may reach over its edge, and what does is not used. The
best linear generator of rank `n_c` is the truncated SVD of the matrix of all slices; entries over the edge are free, so
they are filled in with what the fit says and the SVD is taken again until that settles.

Source: "Associative Convolutional Layers" (CSG): slices in section 2.1.1, Eq. 1, the binary generator (BCSG) in section
3.1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from graphzip.analysis.convs import ConvLayer, conv_layers
from graphzip.errors import WeightsError
from graphzip.graph.layers.factored import SliceConv, factored_conv, pack_signs, packed_size, slice_grid
from graphzip.graph.traced import Traced
from graphzip.numeric.solvers import checked, pseudo_inverse, singular, singular_values, symmetric_eigen
from graphzip.plan.passes import SliceGenerate
from graphzip.plan.problems import plan_error
from graphzip.report.outcome import Outcome
from graphzip.rewrite.factor import factor
from graphzip_passes.base import Decision, PassContext, register_pass
from graphzip_passes.factorize.compensate import compensated
from graphzip_passes.factorize.conv_layers import convolutions_of, first_match, kernel_of, select
from graphzip_passes.factorize.error_table import error_table
from graphzip_passes.factorize.patch_moments import input_moments
from graphzip_passes.factorize.slice_weights import SliceWeights, fit_weighted
from graphzip_passes.factorize.worth import LeftOut, SharedBytes, Stored, left_out_table, worth_storing

__all__ = ["SliceGeneratePass", "cut", "slice_generate"]

logger = logging.getLogger(__name__)

_ROUNDS = 50
_SETTLED = 1e-12  # relative fall of the error below which filling in ends


@register_pass(SliceGenerate, decides=True)
def slice_generate(traced: Traced, options: SliceGenerate, context: PassContext) -> Decision:
    """Store kernels as codes, which are trained in their place."""
    generating = SliceGeneratePass(options, traced, seed=context.seed, where=context.where)
    return Decision(generating.finish, trained=generating.factored(traced, context))


class SliceGeneratePass:
    """`SliceGenerate` bound to a model: which layers it generates, and which of them share a generator."""

    def __init__(self, options: SliceGenerate, traced: Traced, *, seed: int, where: str) -> None:
        self.options, self.seed = options, seed
        layers = conv_layers(traced)
        self.names = {layer.name: traced.qualified(layer.name).rstrip(".") for layer in layers}
        self.layers = select(layers, self.names, options.include, options.exclude, where=where)
        self.given = _read(options, where)
        self._check(where)
        self.scope = {layer.name: first_match(self.names[layer.name], options.scopes) for layer in self.layers}
        self.left_out: dict[str, LeftOut] = {}
        if not options.force:
            self._leave_out(traced, where)
        self.errors: dict[str, float] = {}
        self.moments: dict[str, torch.Tensor] = {}

    def factored(self, traced: Traced, context: PassContext) -> tuple[Traced, nn.Module]:
        """The graph and the model with codes and generators in place of kernels."""
        model, data = context.model, context.calibration
        if self.options.weighted and self.options.init == "fit" and data is not None:
            watched = {layer.name: model.get_submodule(layer.name) for layer in self.layers}
            self.moments = input_moments(watched, data)
        made: dict[str, SliceConv] = {}
        random = torch.Generator().manual_seed(self.seed)
        for scope in sorted(set(self.scope.values())):
            layers = [layer for layer in self.layers if self.scope[layer.name] == scope]
            made.update(self._made(traced, model, layers, random))
        result = factor(traced, model, self.layers, made)
        if self.options.init == "fit":
            result = compensated(traced, result, self.options.compensate, context)
            for name in self.scope:
                self._note_error(name, kernel_of(traced, name).detach().double(), made[name].kernel().detach().double())
        return result

    def finish(self, traced: Traced, context: PassContext) -> Outcome:
        """The graph stays as it is: it has had codes and generators since the model was prepared."""
        scopes = sorted(set(self.scope.values()))
        shared = [[self.names[name] for name, own in self.scope.items() if own == scope] for scope in scopes]
        errors = {self.names[name]: error for name, error in self.errors.items()}
        layers = [self.names[layer.name] for layer in self.layers]
        details = {"layers": layers, "shared": shared, "relative_error": errors}
        if self.left_out:
            details["left_out"] = list(self.left_out)
        tables = (*error_table(errors, shared), *left_out_table(self.left_out))
        return Outcome(traced, changed=bool(layers), tables=tables, details=details)

    def _leave_out(self, traced: Traced, where: str) -> None:
        """Leave layers as they are whose codes, and generator, would take more bytes than their kernels."""
        size, length = self.options.code, math.prod(self.options.slice)
        item = kernel_of(traced, self.layers[0].name).element_size()
        stored = [
            Stored(
                self.names[layer.name],
                item * math.prod(layer.shape),
                item * size * math.prod(slice_grid(layer.shape, self.options.slice)),
                self.scope[layer.name],
            )
            for layer in self.layers
        ]
        generator = length * packed_size(size) if self.options.binary else length * size * item
        price: dict[Hashable, SharedBytes] = dict.fromkeys(self.scope.values(), lambda rows, columns: generator)
        self.left_out = worth_storing(stored, price, where)
        self.layers = [layer for layer in self.layers if self.names[layer.name] not in self.left_out]
        self.scope = {layer.name: self.scope[layer.name] for layer in self.layers}

    def _check(self, where: str) -> None:
        rank = len(self.options.slice)
        problems = [
            f"{where}.slice: {list(self.options.slice)} has {rank} dimensions and the kernel of "
            f"{self.names[layer.name]!r} has {len(layer.shape)}; exclude it or use a pass of its own"
            for layer in self.layers
            if len(layer.shape) != rank
        ]
        for position, glob in enumerate(self.options.scopes):
            if not any(first_match(self.names[layer.name], [glob]) == 0 for layer in self.layers):
                problems.append(f"{where}.scopes[{position}]: {glob!r} matches no layer that is generated")
        if problems:
            raise plan_error(problems)

    def _made(
        self, traced: Traced, model: nn.Module, layers: list[ConvLayer], random: torch.Generator
    ) -> dict[str, SliceConv]:
        weights = [kernel_of(traced, layer.name) for layer in layers]
        like = weights[0]
        wanted = [_random_like(weight, random) if self.options.init == "random" else weight for weight in weights]
        codes, generator = self._factors(wanted, random, [self.moments.get(layer.name) for layer in layers])
        stored = self._stored(generator, like)
        made: dict[str, SliceConv] = {}
        counts = [math.prod(slice_grid(layer.shape, self.options.slice)) for layer in layers]
        for layer, weight, own in zip(layers, weights, torch.split(codes, counts), strict=True):
            code = nn.Parameter(own.to(weight.device, weight.dtype).clone(), requires_grad=weight.requires_grad)
            for holder, conv in convolutions_of(model, layer):
                made[holder] = factored_conv("Slice", len(layer.shape) - 2)(conv, code, stored, size=self.options.slice)
        return made

    def _note_error(self, name: str, kernel: torch.Tensor, found: torch.Tensor) -> None:
        size = float(kernel.norm())
        self.errors[name] = float((kernel - found).norm()) / size if size else 0.0
        logger.info("%s: relative error of the kernel %.3g", self.names[name], self.errors[name])

    def _stored(self, generator: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A parameter; a buffer where it is fixed, of one bit per number where it is binary."""
        if self.options.binary:
            return pack_signs(generator).to(like.device)
        value = generator.to(like.device, like.dtype).contiguous()
        return value if self.options.frozen else nn.Parameter(value)

    def _factors(
        self, kernels: list[torch.Tensor], random: torch.Generator, moments: list[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `(slices, n_c)` and the generator `(elements, n_c)`, in float64; moments weigh the fit."""
        if all(moment is None for moment in moments):
            return self._plain_factors(kernels, random)
        kernels = [checked(kernel.detach(), "the kernels").cpu() for kernel in kernels]
        cuts = [cut(kernel, self.options.slice) for kernel in kernels]
        weights = [
            SliceWeights.of(kernel, self.options.slice, moment) for kernel, moment in zip(kernels, moments, strict=True)
        ]
        generator = self._plain_factors(kernels, random)[1]
        slices, used = zip(*cuts, strict=True)
        fixed = self.given is not None or self.options.binary
        return fit_weighted(slices, used, weights, generator, fixed=fixed)

    def _plain_factors(self, kernels: list[torch.Tensor], random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        options = self.options
        size, length = options.code, math.prod(options.slice)
        cuts = [cut(checked(kernel.detach(), "the kernels").cpu(), options.slice) for kernel in kernels]
        slices, used = (torch.cat([each[number] for each in cuts]) for number in (0, 1))
        if self.given is not None:
            return _codes(slices, used, self.given), self.given
        if options.binary:
            signs = torch.randn(length, size, generator=random, dtype=torch.float64).sign()
            signs[signs == 0] = 1.0
            return self._for_fixed(slices, used, signs, random), signs
        if options.init == "random":
            generator = torch.randn(length, size, generator=random, dtype=torch.float64) / size**0.5
            return self._for_fixed(slices, used, generator, random), generator
        return _best(slices, used, size, random)

    def _for_fixed(
        self, slices: torch.Tensor, used: torch.Tensor, generator: torch.Tensor, random: torch.Generator
    ) -> torch.Tensor:
        if self.options.init == "fit":
            return _codes(slices, used, generator)
        codes = torch.randn(len(slices), generator.shape[1], generator=random, dtype=torch.float64)
        spread = (slices.square().sum(1) / used.sum(1)).sqrt()
        return codes * (spread / (generator.square().sum(1).mean().sqrt()))[:, None]


def _random_like(weight: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A Kaiming normal kernel."""
    fan_in = weight[0].numel()
    scale: float = (2.0 / fan_in) ** 0.5
    return torch.randn(weight.shape, generator=random, dtype=torch.float64) * scale


def cut(kernel: torch.Tensor, size: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The slices of a kernel, `(slices, elements)` in row-major order, and which elements lie inside it."""
    grid, rank = slice_grid(kernel.shape, size), kernel.dim()
    padding = [
        amount
        for length, count, step in reversed(list(zip(kernel.shape, grid, size, strict=True)))
        for amount in (0, count * step - length)
    ]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]

    def tiles(value: torch.Tensor) -> torch.Tensor:
        whole = nn.functional.pad(value, padding)
        parted = whole.reshape([each for pair in zip(grid, size, strict=True) for each in pair])
        return parted.permute(order).reshape(math.prod(grid), -1)

    return tiles(kernel), tiles(torch.ones_like(kernel)).bool()


def _codes(slices: torch.Tensor, used: torch.Tensor, generator: torch.Tensor) -> torch.Tensor:
    """The best codes for a given generator; slices with the same elements inside are solved together."""
    codes = slices.new_zeros(len(slices), generator.shape[1])
    patterns, which = torch.unique(used, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = which == number
        codes[rows] = slices[rows][:, pattern] @ pseudo_inverse(generator[pattern], what="a generator").t()
    return codes


def _best(
    slices: torch.Tensor, used: torch.Tensor, size: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated SVD; columns of the generator are orthogonal, those beyond the rank of the slices random.

    Both factors have the same largest singular value: steps of training then move the kernels alike through either.
    """
    filled, error = slices.clone(), math.inf
    total = float(slices.square().sum())
    for _ in range(_ROUNDS):
        generator = _leading(filled, size)
        found = filled @ generator @ generator.t()
        last, error = error, float((slices - found)[used].square().sum())
        filled = torch.where(used, slices, found)
        if bool(used.all()) or error <= 1e-24 * total or last - error <= _SETTLED * total:
            break
    missing = size - generator.shape[1]
    if missing:
        extra = torch.randn(len(generator), missing, generator=random, dtype=torch.float64)
        extra -= generator @ (generator.t() @ extra)
        generator = torch.cat([generator, extra / extra.norm(dim=0).clamp_min(1e-12)], dim=1)
    codes = _codes(slices, used, generator)
    scale = float(singular_values(codes, what="the codes of slices").max()) ** 0.5 or 1.0
    return codes / scale, (generator * scale).contiguous()


def _leading(rows: torch.Tensor, size: int) -> torch.Tensor:
    """The first right singular vectors as columns; of a tall matrix from its Gram matrix, which is far quicker."""
    if rows.shape[0] <= rows.shape[1]:
        vectors = singular(rows, what="the slices of kernels")[2].t()
    else:
        vectors = symmetric_eigen(rows.t() @ rows, what="the slices of kernels")[1].flip(1)
    return vectors[:, :size]


def _read(options: SliceGenerate, where: str) -> torch.Tensor | None:
    """The generator that the options name. Raises `WeightsError` or `PlanError` where it cannot be used."""
    if options.generator is None:
        if options.frozen:
            raise plan_error([f"{where}.frozen: only a generator that is given can be frozen; name its file"])
        return None
    if options.binary:
        raise plan_error([f"{where}.generator: a binary generator is not read from a file; leave one of the two out"])
    if not Path(options.generator).is_file():
        raise WeightsError(f"{where}.generator: there is no file {options.generator}; pass what save_generator wrote")
    try:
        with safetensors.safe_open(options.generator, framework="pt") as file:
            found: torch.Tensor = file.get_tensor("generator").double()
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{where}.generator: {options.generator} holds no generator ({error})") from error
    wanted = math.prod(options.slice), options.code
    if tuple(found.shape) != wanted:
        text = (
            f"{options.generator} is {tuple(found.shape)}; slices of {list(options.slice)} with codes of {options.code}"
        )
        raise plan_error([f"{where}.generator: {text} need {wanted}"])
    return found
