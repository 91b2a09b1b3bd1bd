"""Jobs that store kernels as factors, widen a model, choose widths by a budget, or join several models."""

from __future__ import annotations

import copy
from typing import Any

import torch

import graphzip as gz
from fuzz.compare import NotApplicable, Problem, apart, run
from fuzz.context import Context
from fuzz.jobs import consistent, data, drops, job
from fuzz.onnx_check import exports

__all__: list[str] = []


@job(1)
def factor(c: Context) -> None:
    """A model with factored kernels computes the same before and after its conversion."""
    r = c.rng
    passes: list[Any] = [gz.FoldBatchNorm()] if r.random() < 0.3 else []
    if r.random() < 0.3:
        passes.append(gz.ClusterMerge(keep=0.6, clustering="even"))
    if r.random() < 0.6:
        options: dict[str, Any] = {"atoms": r.choice((1, 2, 4, 9)), "share": r.choice(("net", "block", "layer", None))}
        options |= {
            "include": ["*"],
            "force": True,
            "init": r.choice(("fit", "fit", "random")),
            "atom_drop": r.choice((0.0, 0.1)),
        }
        options |= {"lower": r.choice(("reconstruct", "atoms_first")), "weighted": r.random() < 0.3}
        passes.append(gz.AtomFactorize(**options))
    else:
        options = {"slice": r.choice(((16, 16, 3, 3), (4, 4, 3, 3), (8, 2, 1, 1))), "code": r.choice((1, 4, 16))}
        options |= {"include": ["*"], "force": True, "init": r.choice(("fit", "random")), "binary": r.random() < 0.3}
        passes.append(gz.SliceGenerate(**options))
    c.stage = "prepare"
    try:
        prepared = gz.prepare(c.model, gz.Plan(passes), c.inputs, calibration=data(c), seed=c.seed, **c.options)
    except gz.PlanError as error:
        raise NotApplicable(str(error)) from error
    c.stage = "steps"
    last = prepared.model
    try:
        for _ in prepared.steps():
            last = copy.deepcopy(prepared.model).eval()
        c.stage = "convert"
        compiled = prepared.convert()
    except gz.PlanError as error:
        raise NotApplicable(str(error)) from error
    if not c.program.random:
        c.stage = "converted"
        c.same(last, compiled, "factored, ", tolerance=1e-8)
    consistent(c, compiled, gz.Plan(passes))


@job(1.5)
def minimize(c: Context) -> None:
    """Slices that are zero, equal or in proportion, planted anywhere: what is taken out moves no output."""
    model = copy.deepcopy(c.model)
    groups = c.groups(model)
    c.stage = "plant"
    for group in groups:
        if group.mergeable and c.rng.random() < 0.7:
            _make_redundant(c, model, group)
    c.stage = "compile"
    compiled = c.compile(model, gz.Plan([gz.Minimize(chains=c.rng.random() < 0.5)]))
    found = compiled.report.passes[0]["minimize"]["channels"]
    c.merged = sum(sum(kinds.values()) for kinds in found.values())
    if not compiled.report.lossless:
        raise Problem("note", "taking out what is redundant is not exact by the report")
    c.stage = "minimized"
    c.same(model, compiled, "minimized, ")


def _make_redundant(c: Context, model: torch.nn.Module, group: gz.ChannelGroup) -> None:
    """Set slices of one channel: what reads it or makes it to zero, or what makes it to another's times a number."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    one, other = (c.rng.randrange(group.size) for _ in range(2))
    whole = ("producer", "pointwise")
    kinds = [(("consumer",), 0.0), (("producer",), 0.0), (whole, 0.0), (whole, 1.0), (("producer",), 1.0), (whole, 0.3)]
    roles, factor = c.rng.choice(kinds)
    with torch.no_grad():
        for mine, its in zip(group.slices(one), group.slices(other), strict=True):
            tensor = state.get(mine.param)
            if tensor is None or mine.role not in roles or not tensor.is_floating_point():
                continue
            if "running_var" in mine.param:
                continue
            rows = slice(None) if mine.rows is None else slice(*mine.rows)
            source = tensor.select(its.dim, its.index)[rows if tensor.dim() > 1 else ...].clone()
            target = tensor.select(mine.dim, mine.index)[rows if tensor.dim() > 1 else ...]
            if source.shape == target.shape:
                target.copy_(factor * source)


@job(0.8)
def widen(c: Context) -> None:
    """A wider model computes the same, and can be squeezed back without a loss."""
    groups = c.groups(c.model)
    if not any(group.exact and not group.whole_blocks for group in groups):
        raise NotApplicable("nothing can grow")
    c.stage = "widen"
    factor: Any = c.rng.choice((2.0, 2.0, 1.5, {"*": 2.0}))
    try:
        wide = gz.widen(c.model, c.inputs, factor, seed=c.seed, **c.options)
    except gz.RewriteError as error:
        raise NotApplicable(str(error)) from error
    c.stage = "widened"
    if c.program.random:
        return
    from fuzz.compare import same_at

    notes = (*gz.compile(c.model, gz.Plan([]), c.inputs, **c.options).traced.conditions, "see compile")
    same_at(c.model, wide, c.make, c.places(), notes, what="widened, ")
    c.stage = "squeeze"
    widths = {name: count for name, count in groups.widths().items() if groups[name].mergeable}
    plan = gz.Plan([gz.ClusterMerge(keep=widths)])
    compiled = gz.compile(wide, plan, c.inputs, seed=c.seed, **c.options)
    c.stage = "squeezed"
    if isinstance(factor, float) and factor == 2.0 and not drops(compiled):
        consistent(c, compiled)


@job(0.12)
def plan_for(c: Context) -> None:
    """Widths by a budget."""
    c.stage = "plan_for"
    try:
        plan = gz.plan_for(c.model, c.inputs, macs=c.rng.choice((0.5, 0.7)), calibration=data(c))
    except gz.PlanError as error:
        raise NotApplicable(str(error)) from error
    c.stage = "compile"
    compiled = c.compile(c.model, plan, calibration=data(c))
    consistent(c, compiled)


# --- several models ----------------------------------------------------------------------------------------------


def _models(c: Context, count: int, *, equal: bool) -> dict[str, Any]:
    names = ("one", "two", "three")[:count]
    found = {}
    for number, name in enumerate(names):
        model = c.program.build(c.seed + (0 if equal else number))
        model.load_state_dict(c.model.state_dict()) if number == 0 or equal else None
        found[name] = model
    return found


def _batches(c: Context, names: Any) -> dict[str, Any]:
    return {name: data(c) for name in names}


def _joint(c: Context, models: dict[str, Any], compiled: gz.Compiled, tolerance: float | None) -> None:
    """The joint model, its tasks and, where nothing may change, the originals agree."""
    for batch in (4, 3, 1):
        inputs = c.make(batch)
        for name, model in models.items():
            try:
                expected = run(model, inputs)
            except Exception:
                continue
            try:
                found = run(compiled.task(name), inputs)
            except gz.InputShapeError as error:
                if batch != 4 and c.told(compiled):
                    continue
                raise Problem("unannounced", f"{name}, batch {batch} is refused without a note: {error}") from error
            off = apart(expected, found) if tolerance is not None else 0.0
            if tolerance is not None and not off <= tolerance:
                raise Problem("wrong", f"{name} at batch {batch}: off by {off:.2g}")
            if len(inputs) == 1:
                with torch.no_grad():
                    joint = compiled.module(**{each: inputs[0].clone() for each in models})[name]
                if not apart(found, joint) <= 1e-12:
                    raise Problem("wrong", f"{name}: the joint module and its task differ at batch {batch}")


@job(1)
def zip_models(c: Context) -> None:
    """Equal models share everything without a loss; others agree with themselves."""
    r = c.rng
    if c.program.random:
        raise NotApplicable("random")
    equal = r.random() < 0.5
    models = _models(c, r.choice((2, 2, 3)), equal=equal)
    share = r.choice((1.0, 1.0, 0.5, 0.0, 2, {"*": 0.5}))
    options: dict[str, Any] = {
        "share": share,
        "metric": r.choice(("hessian", "euclidean", "random")),
        "alpha": r.choice((0.5, 0.3)),
    }
    options["pairing"] = r.choice(("optimal", "greedy"))
    if r.random() < 0.2:
        options = {"threshold": r.choice((0.1, 10.0)), "metric": options["metric"]}
    c.stage = "zip"
    calibration = _batches(c, models)
    example = dict.fromkeys(models, c.inputs)
    shapes = {"dynamic_shapes": dict.fromkeys(models, c.dynamic)} if c.dynamic is not None else {}
    try:
        compiled = gz.compile(
            models, gz.Plan([gz.Zip(**options)]), example, calibration=calibration, seed=c.seed, **shapes
        )
    except gz.PlanError as error:
        raise NotApplicable(str(error)) from error
    c.stage = "zipped"
    exact = "share" in options and (share == 0.0 or (equal and share == 1.0 and options["metric"] != "random"))
    _joint(c, models, compiled, 1e-6 if exact else None)
    if c.onnx:
        exports(c, None, lambda cast: _zip_again(c, models, options, cast))
    elif r.random() < 0.5:
        c.comes_back(compiled)


def _zip_again(c: Context, models: dict[str, Any], options: dict[str, Any], cast: Any) -> gz.Compiled:
    given = {name: cast(model) for name, model in models.items()}
    plan, example = gz.Plan([gz.Zip(**options)]), dict.fromkeys(models, c.inputs)
    shapes = {"dynamic_shapes": dict.fromkeys(models, c.dynamic)} if c.dynamic is not None else {}
    return gz.compile(given, plan, example, calibration=_batches(c, models), seed=c.seed, **shapes)


@job(0.7)
def share_models(c: Context) -> None:
    """Two models that share weights agree with themselves."""
    r = c.rng
    if c.program.random:
        raise NotApplicable("random")
    models = _models(c, 2, equal=r.random() < 0.3)
    options: dict[str, Any] = {
        "clusters": r.choice((0.25, 0.5, 1.0, 3)),
        "regularizer": r.choice(("normalized", "plain", "simple", "growl", None)),
    }
    options |= {"pool": r.choice(((4, 4), (2, 2), (1, 1))), "samples": r.choice((16, 64))}
    c.stage = "share"
    example = dict.fromkeys(models, c.inputs)
    shapes = {"dynamic_shapes": dict.fromkeys(models, c.dynamic)} if c.dynamic is not None else {}
    calibration = _batches(c, models) if r.random() < 0.8 else None
    if calibration is None and len(c.inputs) > 1:
        raise NotApplicable("nothing to compare channels by")
    try:
        plan = gz.Plan([gz.CrossDomainShare(**options)])
        prepared = gz.prepare(models, plan, example, calibration=calibration, seed=c.seed, **shapes)
        for _ in prepared.steps():
            c.stage = "share, stages"
            if len(c.inputs) == 1:
                prepared(**dict.fromkeys(models, c.inputs[0]))
                prepared.regularizer()
        c.stage = "share, convert"
        compiled = prepared.convert()
    except gz.PlanError as error:
        raise NotApplicable(str(error)) from error
    c.stage = "shared"
    _joint(c, models, compiled, None)
    if r.random() < 0.5:
        c.comes_back(compiled)
