"""`graphzip plan`, `compile`, `minimize`, `factorize`: one model and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphzip.commands.judging import Judge
from graphzip.commands.options import (
    BudgetOptions,
    DataOptions,
    DeviceOption,
    ModelArgument,
    OpsetOptions,
    OutputOption,
    RunOptions,
    SaveOptions,
    SourceOptions,
    ViewOptions,
    WidthRuleOptions,
    command,
)
from graphzip.commands.ranks import device_here, leads, ranks
from graphzip.commands.subject import BuiltModel, as_json_text, built, checked, data_of, finish, view
from graphzip.commands.terminal import Tell, UsageError, at_work, show
from graphzip.commands.usage import amounts_of, budget_of, check_files, check_writable, find, option, tuning_of

if TYPE_CHECKING:
    from graphzip import Compiled, Plan, WidthStudy

__all__ = ["register"]

KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="[GLOB=]AMOUNT", help="widths to keep: 0.5, 32, or 'layer?.*=0.5' once per pattern"),
]
ImportOption = Annotated[
    list[Path] | None,
    typer.Option("--import", help="Python file to run first, which registers passes of your own; once per file"),
]
PlanOption = Annotated[Path | None, typer.Option("--plan", help="plan file (YAML), or give a budget, or --keep")]
TuneOption = Annotated[
    bool, typer.Option("--tune", help="then fit the outputs to the model's on --calibration, without labels")
]
DistillOption = Annotated[
    int | None,
    typer.Option("--distill", min=1, metavar="EPOCHS", help="then train on --calibration, the model as teacher"),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "plan",
        "graphzip plan torchvision:resnet18 --macs 0.5 -o plan.yaml",
        "graphzip plan net.py:net --input 1x3x32x32 --calibration images.npz --macs 0.5 -o plan.yaml",
    )(plan)
    command(
        app,
        "compile",
        "graphzip compile torchvision:resnet18 --keep 0.5 -o slim.onnx --save slim.graphzip",
        "graphzip compile net.py:net --input 1x3x32x32 --calibration images.npz --macs 0.5 --tune -o slim.onnx",
        "graphzip compile net.py:net --plan plan.yaml --calibration images.npz --labels classes.npy -o slim.onnx",
    )(compile_)
    command(app, "minimize", "graphzip minimize net.py:net --input 1x3x32x32 -o slim.onnx")(minimize)
    command(
        app,
        "factorize",
        "graphzip factorize torchvision:resnet18 --rank 0.5 -o thin.onnx",
        "graphzip factorize net.py:net --input 1x3x32x32 --atoms 6 --save atoms.graphzip -o atoms.onnx",
    )(factorize)
    command(
        app,
        "quantize",
        "graphzip quantize slim.graphzip --calibration images.npz --labels classes.npy -o slim.int8.onnx",
        "graphzip quantize slim.graphzip --to fp16 -o slim.fp16.onnx",
    )(quantize)


def plan(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="plan file to write (YAML)")],
    budget: BudgetOptions,
    widths: WidthRuleOptions,
    data: DataOptions,
    source: SourceOptions,
    shown: ViewOptions,
    run: RunOptions,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="also draw sensitivities and frontier: .svg, .png, .pdf"),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Find the widths that meet a budget and move the outputs least, and write them as a plan.

    The card of what the plan makes of the model follows as comments.
    """
    with at_work(run.verbose, "plan") as tell:
        import graphzip as gz

        amounts = budget_of(**budget.amounts)
        writes = {"--output": output, "--cache": budget.cache, "--plot": plot}
        reads = {"--weights": source.weights, "--calibration": data.calibration, "--labels": data.labels}
        check_files(model, reads, writes)
        check_writable(output=output, cache=budget.cache, plot=plot)
        batches, judge = data_of(data, source)
        subject = built(model, source, shown.scope, run.seed, tell)
        place = device_here(device)
        study = _measured(subject, batches, amounts, (budget, widths, shown), run.seed, tell, device=place)
        tell("splitting the budget")
        found = study.plan(**amounts)
        text = ""
        if leads():
            found.save(output)
            if plot is not None:
                gz.draw_study(study, plot)
            text = as_json_text(found.to_dict()) if run.as_json else output.read_text(encoding="utf-8").rstrip()
        if data.card and not run.as_json:
            tell("carrying the plan out for its card")
            compiled = gz.compile(
                subject.module, found, subject.example, calibration=batches, evaluate=judge.here, seed=run.seed,
                device=place, **view(shown),
            )  # fmt: skip
            judge.entitle(compiled)
            if leads():
                compiled.measure(subject.module)
            text = "\n".join([text, *(f"# {line}".rstrip() for line in str(compiled.report).splitlines())])
    show(text, str(output))


def compile_(
    model: ModelArgument,
    output: OutputOption,
    budget: BudgetOptions,
    widths: WidthRuleOptions,
    data: DataOptions,
    saved: SaveOptions,
    source: SourceOptions,
    shown: ViewOptions,
    run: RunOptions,
    plan_file: PlanOption = None,
    keep: KeepOption = None,
    tune: TuneOption = False,
    distill: DistillOption = None,
    imports: ImportOption = None,
    device: DeviceOption = None,
) -> None:
    """Carry out a plan, or the best one for a budget, and export the slim model as verified ONNX."""
    with at_work(run.verbose, "compile") as tell:
        import graphzip as gz

        amounts = _one_of(plan_file, keep, budget, widths)
        checked(model, source, output, saved, data, plan=plan_file, cache=budget.cache)
        batches, judge = data_of(data, source)
        spec = find(model, imports or [])
        found = gz.Plan.load(plan_file) if plan_file is not None else _kept(keep, widths, has_data=batches is not None)
        tuning = tuning_of(data.calibration) if tune else None
        named = f"{plan_file}: inputs" if found.inputs else None
        subject = built(model, source, shown.scope, run.seed, tell, spec=spec, plan_inputs=named)
        traced: Any = subject.module
        example, sees, study, place = subject.example, view(shown), None, device_here(device)
        if amounts and place is None:
            with subject.inputs_told():
                traced = gz.trace(subject.module, subject.example, **sees)
            study = _measured(subject, batches, amounts, (budget, widths, None), run.seed, tell, traced)
            found, example, sees = study.plan(**amounts), None, {}
        elif amounts:  # a trace has its model where that is
            study = _measured(subject, batches, amounts, (budget, widths, shown), run.seed, tell, device=place)
            found = study.plan(**amounts)
        tell(f"compiling {model}")
        with subject.inputs_told():
            compiled = gz.compile(
                traced, found, example, calibration=batches, evaluate=judge.here, seed=run.seed, tune=tuning,
                device=place, **sees,
            )  # fmt: skip
        if study is not None:
            compiled.report = replace(compiled.report, study=study.summary())
        if distill is not None:
            _distilled(compiled, subject, batches, judge, distill, shown.scope, tell)
        done = finish(compiled, subject, output, saved, tell, judge=judge, card=data.card, as_json=run.as_json)
    done.show()


def minimize(
    model: ModelArgument,
    output: OutputOption,
    saved: SaveOptions,
    source: SourceOptions,
    shown: ViewOptions,
    run: RunOptions,
) -> None:
    """Take out what a network holds for nothing, without changing what it computes, and export it as verified ONNX."""
    with at_work(run.verbose) as tell:
        import graphzip as gz

        checked(model, source, output, saved)
        subject = built(model, source, shown.scope, run.seed, tell)
        tell(f"looking for what {model} holds for nothing")
        with subject.inputs_told():
            options = {"seed": run.seed, **view(shown)}
            compiled = gz.compile(subject.module, gz.Plan([gz.Minimize()]), subject.example, **options)
        done = finish(compiled, subject, output, saved, tell, as_json=run.as_json)
    done.show()


def factorize(
    model: ModelArgument,
    output: OutputOption,
    data: DataOptions,
    saved: SaveOptions,
    source: SourceOptions,
    shown: ViewOptions,
    run: RunOptions,
    rank: Annotated[
        float | None, typer.Option("--rank", help="layers as products of thinner ones: share of the rank, or a number")
    ] = None,
    atoms: Annotated[
        int | None, typer.Option("--atoms", min=1, help="kernels as so many atoms times coefficients")
    ] = None,
    share: Annotated[
        str | None, typer.Option("--share", help="who shares coefficients of --atoms: net, block or layer")
    ] = None,
    tune: TuneOption = False,
    device: DeviceOption = None,
) -> None:
    """Store the weights as products of smaller ones, low rank or atoms times coefficients, and export verified ONNX."""
    with at_work(run.verbose, "factorize") as tell:
        import graphzip as gz

        if (rank is None) == (atoms is None):
            raise UsageError("give --rank, for low-rank layers, or --atoms, for atoms and coefficients: one of them")
        checked(model, source, output, saved, data)
        batches, judge = data_of(data, source)
        with option("--rank" if rank is not None else "--atoms"):
            whole = rank is not None and rank.is_integer() and rank > 1
            chosen: Any = {"atoms": atoms, "share": share}
            amount: Any = int(rank) if rank is not None and whole else rank
            factors = gz.AtomFactorize(**chosen) if rank is None else gz.LowRank(rank=amount)
        subject = built(model, source, shown.scope, run.seed, tell)
        tell(f"fitting factors to {model}")
        with subject.inputs_told():
            compiled = gz.compile(
                subject.module, gz.Plan([factors]), subject.example, calibration=batches, evaluate=judge.here,
                seed=run.seed, tune=tuning_of(data.calibration) if tune else None, device=device_here(device),
                **view(shown),
            )  # fmt: skip
        done = finish(compiled, subject, output, saved, tell, judge=judge, card=data.card, as_json=run.as_json)
    done.show()


def quantize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what --save or Compiled.save wrote: slim.graphzip")],
    output: OutputOption,
    data: DataOptions,
    saved: OpsetOptions,
    run: RunOptions,
    to: Annotated[
        str, typer.Option("--to", help="int8 (or int8-entropy, int8-minmax), which needs --calibration, or fp16")
    ] = "int8",
    error: Annotated[
        float | None, typer.Option("--error", help="how far outputs may be off, of the largest: 0.1, or 0.01 for fp16")
    ] = None,
) -> None:
    """Write the ONNX file of a model that was saved in smaller numbers, and compare it with the model."""
    with at_work(run.verbose) as tell:
        import graphzip as gz

        reads = {"FILE": file, "--calibration": data.calibration, "--labels": data.labels}
        check_files("", reads, {"--output": output})
        check_writable(output=output)
        batches, judge = data_of(data, SourceOptions())
        tell(f"loading {file}")
        compiled = gz.load(file)
        tell(f"quantizing to {to} and comparing")
        with option("--to"):
            exported = compiled.export(
                output, opset=saved.opset, ir_version=saved.ir_version, quantize=to, calibration=batches, error=error
            )
        compiled.report = gz.Report(compiled.report.before, compiled.report.after)
        if data.card or judge.evaluate is not None:
            tell("measuring both in onnxruntime")
            compiled.measure(name="float", score=judge.score(compiled.module))
            compiled.measure(name=to, score=judge.score(gz.OnnxModule(output)), file=output)
            judge.entitle(compiled)
        told = {"report": compiled.report.to_dict(), "export": exported.to_dict()}
        text = as_json_text(told) if run.as_json else f"{compiled.report.figures()}\n\n{exported}"
    show(text, str(output))


# ------------------------------------------------------------------------------------------------- widths


def _one_of(
    plan_file: Path | None, keep: Sequence[str] | None, budget: BudgetOptions, widths: WidthRuleOptions
) -> dict[str, float]:
    """The budget that is given instead of a plan or of widths; none where there is one of these."""
    amounts = any(each is not None for each in budget.amounts.values())
    if plan_file is not None:
        if amounts:
            raise UsageError("--plan and a budget are both given; a plan has its widths already, so leave one out")
        if keep:
            raise UsageError("--plan and --keep are both given; a plan has its widths already, so leave one out")
        for flag, value in _rules(budget, widths).items():
            raise UsageError(
                f"--{flag.replace('_', '-')} is for widths that are found for a budget, and --plan has its own; "
                f"leave one out{value and ''}"
            )
        return {}
    if keep:
        if amounts:
            raise UsageError("--keep and a budget are both given; one says the widths that the other finds")
        return {}
    return budget_of(**budget.amounts)


def _rules(budget: BudgetOptions, widths: WidthRuleOptions) -> dict[str, Any]:
    """What widths that are found have to keep to: the arguments of those options that are given."""
    runtime = None if budget.target is None else budget.target.value
    given = {
        "round_to": widths.round_to,
        "min_width": widths.min_width,
        "target": runtime,
        "uniform": budget.uniform or None,
        "exclude": widths.exclude,
    }
    return {name: value for name, value in given.items() if value}


def _kept(keep: Sequence[str] | None, widths: WidthRuleOptions, *, has_data: bool) -> Plan:
    """The plan that `--keep` asks for; an empty one without it."""
    import graphzip as gz

    if not keep:
        return gz.Plan([])
    amounts = amounts_of(keep, "--keep")
    rules = {"round_to": widths.round_to, "min_width": widths.min_width, "exclude": widths.exclude}
    with option("--keep"):
        merge = gz.ClusterMerge(keep=amounts, **{name: value for name, value in rules.items() if value})  # type: ignore[arg-type]
        return gz.Plan([merge.for_data() if has_data else merge])


def _measured(
    subject: BuiltModel,
    batches: Any,
    amounts: dict[str, float],
    options: tuple[BudgetOptions, WidthRuleOptions, ViewOptions | None],
    seed: int,
    tell: Tell,
    traced: Any = None,
    *,
    device: str | None = None,
) -> WidthStudy:
    """A study of the model that has measured all that a plan for the budget needs."""
    import graphzip as gz

    budget, widths, shown = options
    rules = _rules(budget, widths)
    exclude = rules.pop("exclude", None)
    tell(f"tracing {subject.name}")
    with subject.inputs_told(), option("--exclude"):
        passes = [gz.ClusterMerge(exclude=exclude)] if exclude else []
    with subject.inputs_told():
        study = gz.WidthStudy(
            subject.module if traced is None else traced,
            subject.example if traced is None else None,
            calibration=batches,
            passes=passes,
            cache=budget.cache,
            effort=budget.effort.value,
            seed=seed,
            device=device,
            **rules,
            **({} if shown is None else view(shown)),
        )
    study.check(**amounts)
    study.measure()
    return study


def _distilled(
    compiled: Compiled, subject: BuiltModel, batches: Any, judge: Judge, epochs: int, scope: str | None, tell: Tell
) -> None:
    """Train the slim model with the original as teacher."""
    import graphzip as gz

    if batches is None:
        raise UsageError("--distill needs calibration data: give --calibration, or leave --distill out")
    if ranks()[1] > 1:
        raise UsageError("--distill trains in one process, and torchrun has started several; leave one of them out")
    tell(f"distilling for {epochs} epochs")
    gz.distill(compiled.module, subject.module, batches, epochs=epochs, scope=scope)
    report = compiled.report
    note = f"distilled after that, epochs: {epochs}; how far outputs moved is told of the model before it"
    compiled.report = replace(report, notes=(*report.notes, note))
    if report.scores is not None:
        training = compiled.module.training
        score = judge.score(compiled.module.eval())
        compiled.module.train(training)
        assert score is not None
        compiled.report = replace(compiled.report, scores=report.scores.with_value("after distilling", score))
