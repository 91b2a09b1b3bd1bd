"""Passes of a user's own: what can be registered, and where it works then."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from own_passes import registered
from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn

import graphzip as gz
from graphzip.graph.traced import Traced
from graphzip.plan.passes import PASS_OPTIONS
from graphzip_passes.base import PASSES

pytestmark = pytest.mark.usefixtures("seeded")

EXAMPLE = (torch.randn(2, 3),)


class Quiet(gz.PassOptions):
    """Multiply the weights of linear layers."""

    kind: ClassVar[str] = "quiet"

    factor: float = 0.5


def quiet(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Outcome:
    weights = {name: each for name, each in traced.module.named_parameters() if each.dim() == 2}
    for each in weights.values():
        each.detach().mul_(options.factor)
    return gz.Outcome(traced, changed=bool(weights), lossless=False, details={"weights": list(weights)})


@pytest.fixture
def known() -> Iterator[None]:
    with registered(Quiet, quiet):
        yield


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def compiled(plan: gz.Plan | None = None) -> gz.Compiled:
    return gz.compile(net(), plan or gz.Plan([Quiet()]), EXAMPLE)


@pytest.mark.usefixtures("known")
def test_it_is_carried_out_on_the_weights_as_they_were_trained() -> None:
    model = net()

    def train(prepared: gz.Prepared, stage: str) -> None:
        assert stage == "quiet"
        assert prepared.deviation() == prepared.residual() == 0.0
        with torch.no_grad():
            for parameter in prepared.parameters():
                parameter.add_(1.0)

    result = gz.compile(model, gz.Plan([Quiet(factor=2.0)]), EXAMPLE, train=train)
    torch.testing.assert_close(result.module.get_parameter("0.weight"), 2.0 * (model.get_parameter("0.weight") + 1.0))
    torch.testing.assert_close(result.module.get_parameter("0.bias"), model.get_parameter("0.bias") + 1.0)
    assert result.report.passes == ({"quiet": {"weights": ["0.weight", "2.weight"]}},)
    assert (result.report.changed, result.report.lossless) == (True, False)


@pytest.mark.usefixtures("known")
def test_it_stands_among_other_passes() -> None:
    plan = gz.Plan.from_dict({"version": 1, "passes": [{"quiet": {"factor": 0.25}}, {"cluster_merge": {"keep": 2}}]})
    assert plan.passes == (Quiet(factor=0.25), gz.ClusterMerge(keep=2))
    assert [next(iter(each)) for each in compiled(plan).report.passes] == ["quiet", "cluster_merge"]


def test_a_decorator_registers_too() -> None:
    try:
        assert gz.register_pass(Quiet)(quiet) is quiet
        assert compiled().report.changed
        gz.register_pass(Quiet, lambda traced, options, context: gz.Outcome(traced))  # a later one replaces it
        assert not compiled().report.changed
    finally:
        del PASSES[Quiet], PASS_OPTIONS["quiet"]


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    def again() -> type[gz.PassOptions]:
        class Cell(gz.PassOptions):
            kind: ClassVar[str] = "cell"

        return Cell

    first, second = again(), again()
    try:
        gz.register_pass(first, lambda traced, options, context: gz.Outcome(traced, changed=True))
        earlier = gz.Plan([first()])
        gz.register_pass(second, lambda traced, options, context: gz.Outcome(traced))
        assert type(gz.Plan.from_dict({"version": 1, "passes": ["cell"]}).passes[0]) is second
        assert compiled(earlier).report.changed
    finally:
        del PASSES[first], PASSES[second], PASS_OPTIONS["cell"]


# ------------------------------------------------------------------------------------------------- its options


class Norm(enum.Enum):
    """A way to measure."""

    L1 = "l1"
    L2 = "l2"


class Part(BaseModel):
    """Options inside options."""

    rank: int = 4
    scales: list[float] = [1.0]


class Rich(gz.PassOptions):
    """Options of types that YAML does not know."""

    kind: ClassVar[str] = "rich"

    part: Part = Part()
    norm: Norm = Norm.L1
    file: Path = Path("weights.pt")
    names: frozenset[str] = frozenset()
    least: int = 1

    @model_validator(mode="after")
    def fits(self) -> Rich:
        if self.least > self.part.rank:
            raise ValueError("least is more than part.rank")
        return self


def test_its_options_may_be_of_any_type_that_text_and_numbers_describe(tmp_path: Path) -> None:
    given: dict[str, Any] = {"part": {"rank": 2}, "norm": "l2", "file": "own.pt", "names": ["b", "a"]}
    with registered(Rich, quiet):
        plan = gz.Plan([Rich(**given), Rich()])
        assert plan == gz.Plan([Rich(**given | {"part": Part(rank=2), "norm": Norm.L2}), Rich()])
        assert len({Rich(), Rich(names=frozenset("abc")), Rich(names=frozenset("cba"))}) == 2
        plan.save(tmp_path / "plan.yaml")
        assert gz.Plan.load(tmp_path / "plan.yaml") == plan
        assert plan.passes[0].model_copy(update={"least": 2}) != plan.passes[0]
        with pytest.raises(gz.PlanError, match=r"rich: .*least is more than part.rank"):
            Rich(least=5)


def test_an_option_that_no_plan_file_can_hold(tmp_path: Path) -> None:
    class Typed(gz.PassOptions):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        kind: ClassVar[str] = "typed"

        dtype: torch.dtype = torch.float32

    with registered(Typed, quiet), pytest.raises(gz.PlanError, match="is a dtype, which no plan file can hold"):
        gz.Plan([Typed(dtype=torch.float16)]).save(tmp_path / "plan.yaml")


# ------------------------------------------------------------------------------------------------- what decides


class Shrink(gz.Constraint):
    """Draws every weight to zero."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @torch.no_grad()
    def pull_(self, model: nn.Module, fraction: float) -> None:
        for name in self.names:
            model.get_parameter(name).mul_(1.0 - fraction)

    def deviations(self, model: nn.Module) -> dict[str, float]:
        return {name: float(model.get_parameter(name).detach().square().sum()) for name in self.names}

    def state(self) -> torch.Tensor:
        return torch.tensor([len(self.names)])

    def load_state(self, state: torch.Tensor) -> None:
        raise gz.WeightsError("it is of another plan")

    def finish(self, traced: Traced, context: gz.PassContext) -> gz.Outcome:
        self.pull_(traced.module, 1.0)
        return gz.Outcome(traced, widths={"0": (4, 4)})


def decide(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Decision:
    shrink = Shrink([name for name, each in context.model.named_parameters() if each.dim() == 2])
    return gz.Decision(shrink.finish, constraint=shrink)


def test_it_may_ask_something_of_the_training() -> None:
    with registered(Quiet, decide, decides=True):
        prepared = gz.prepare(net(), gz.Plan([Quiet()]), EXAMPLE)
        before = prepared.deviation()
        prepared.pull_(0.5)
        assert prepared.deviation() == pytest.approx(before / 4)
        assert (prepared.residual(), float(prepared.regularizer())) == (0.0, 0.0)
        optimizer = prepared.optimizer(torch.optim.SGD, lr=0.1)
        optimizer.step()
        assert set(prepared.history[-1].groups) == {"0.weight", "2.weight"}
        prepared.collapse_()
        assert prepared.deviation() == 0.0
        with pytest.raises(gz.WeightsError, match="another plan"):
            prepared.load_state_dict({**prepared.state_dict(), "clusters": torch.tensor([7])})
        assert not prepared.convert().module.get_parameter("0.weight").any()


def test_stages_rewrite_the_graph_or_adjust_the_model() -> None:
    seen: list[Any] = []

    def rewrite(traced: Traced, context: gz.PassContext) -> Traced:
        result = traced.copy()
        weight = result.module.get_parameter("0.weight")
        result.module.get_submodule("0").weight = nn.Parameter(weight.detach() + 1.0)
        seen.append(("rewrite", float(context.model.get_parameter("0.weight").sum() - weight.sum())))
        return result

    def adjust(context: gz.PassContext) -> None:
        context.model.get_parameter("0.weight").detach().add_(1.0)
        seen.append("adjust")

    def stages() -> tuple[gz.Stage, ...]:
        done = len(seen)
        return (gz.Stage("one", rewrite=rewrite), gz.Stage("two", adjust=adjust), gz.Stage("three"))[done:]

    def staged(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Decision:
        return gz.Decision(lambda graph, later: gz.Outcome(graph, changed=True), stages=stages)

    for trained in (False, True):
        seen.clear()
        model = net()
        with registered(Quiet, staged, decides=True):
            names: list[str] = []
            train: Any = (lambda prepared, stage: names.append(stage)) if trained else None  # noqa: B023
            result = gz.compile(model, gz.Plan([Quiet()]), EXAMPLE, train=train)
        assert seen == [("rewrite", 0.0), "adjust"]
        assert names == (["one", "two", "three"] if trained else [])
        torch.testing.assert_close(result.module.get_parameter("0.weight"), model.get_parameter("0.weight") + 2.0)


def test_the_users_model_stays_as_it_was_whatever_a_pass_does_to_the_prepared_one() -> None:
    def finish(traced: Traced, context: gz.PassContext) -> gz.Outcome:
        return gz.Outcome(traced, changed=True)

    def reckless(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Outcome:
        for parameter in context.model.parameters():
            parameter.detach().zero_()
        return finish(traced, context)

    def decided(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Decision:
        for parameter in context.model.parameters():
            parameter.detach().zero_()
        return gz.Decision(finish)

    def adjusted(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Decision:
        return gz.Decision(
            finish, stages=lambda: (gz.Stage("zero", adjust=lambda now: reckless(traced, Quiet(), now)),)
        )

    pair = {"a": net(), "b": net()}
    zipped = gz.Zip(metric="euclidean", exclude=["2"])
    before = [parameter.clone() for each in pair.values() for parameter in each.parameters()]
    for function, decides in ((reckless, False), (decided, True), (adjusted, True)):
        with registered(Quiet, function, decides=decides):
            gz.compile(pair["a"], gz.Plan([Quiet()]), EXAMPLE)
            for passes in ([zipped, Quiet()], [Quiet(), zipped]):
                gz.compile(pair, gz.Plan(passes), {"a": EXAMPLE, "b": EXAMPLE})
        now = [parameter for each in pair.values() for parameter in each.parameters()]
        assert all(torch.equal(old, new) for old, new in zip(before, now, strict=True)), function


# ------------------------------------------------------------------------------------------------- refusals


class Nameless(gz.PassOptions):
    """It has no kind."""


class Loud(gz.PassOptions):
    """Its kind is no name."""

    kind: ClassVar[str] = "Loud!"


class Demanding(gz.PassOptions):
    """It has an option without a default."""

    kind: ClassVar[str] = "demanding"

    factor: float


class Taken(gz.PassOptions):
    """Its kind is that of another pass."""

    kind: ClassVar[str] = "zip"


WRONG: list[tuple[Any, Any, str]] = [
    (3, quiet, "register_pass: 3 is not a class of options; write class LowRank"),
    (dict, quiet, "is not a class of options"),
    (Quiet(), quiet, "is not a class of options"),
    (gz.PassOptions, quiet, "is not a class of options"),
    (Nameless, quiet, "Nameless has the kind '', by which no plan can name it; write small letters"),
    (Loud, quiet, "Loud has the kind 'Loud!'"),
    (Demanding, quiet, "Demanding.factor has no default; give every option one"),
    (Taken, quiet, "'zip' is a pass of graphzip.* already; give Taken another kind"),
    (Quiet, 3, "'quiet': 3 cannot be called; register a function"),
    (Quiet, lambda traced: None, "does not take three arguments"),
]


@pytest.mark.parametrize(("options", "function", "message"), WRONG)
def test_what_is_no_pass(options: Any, function: Any, message: str) -> None:
    before = dict(PASS_OPTIONS), dict(PASSES)
    with pytest.raises(gz.PlanError, match=message):
        gz.register_pass(options, function)
    assert before == (PASS_OPTIONS, PASSES)


def test_another_class_of_the_same_file_may_not_take_the_name() -> None:
    class Other(gz.PassOptions):
        kind: ClassVar[str] = "quiet"

    with registered(Quiet, quiet), pytest.raises(gz.PlanError, match="'quiet' is a pass of"):
        gz.register_pass(Other, quiet)


def test_a_pass_that_was_not_registered(tmp_path: Path) -> None:
    with pytest.raises(gz.PlanError, match=r"passes\[0\].quiet: Quiet has options and no function; call graphzip.reg"):
        compiled()
    with pytest.raises(gz.PlanError, match=r"passes\[0\].quiet: unknown pass; .* graphzip.register_pass was called"):
        gz.Plan.from_dict({"version": 1, "passes": ["quiet"]})


def halved(traced: Traced) -> Traced:
    traced.module.get_submodule("0").weight = nn.Parameter(torch.zeros(2, 3))
    return traced


GIVES: list[tuple[Callable[..., Any], bool, str]] = [
    (lambda *_: None, False, r"passes\[0\].quiet: its function gave None; return a graphzip.Outcome"),
    (lambda *_: gz.Outcome(3), False, "its outcome has 3 as traced"),  # type: ignore[arg-type]
    (lambda traced, *_: gz.Outcome(traced, details={"x": torch.ones(1)}), False, "its details are not JSON"),
    (lambda traced, *_: gz.Outcome(traced, details=None), False, "has None as details; give a mapping"),  # type: ignore[arg-type]
    (lambda traced, *_: gz.Outcome(traced, widths={"0": 3}), False, "as widths; give channels before"),  # type: ignore[dict-item]
    (lambda traced, *_: gz.Outcome(traced, widths={"0": (4, 2.0)}), False, "as widths"),  # type: ignore[dict-item]
    (lambda traced, *_: gz.Outcome(traced, tables=gz.Table(("a",))), False, "as tables"),  # type: ignore[arg-type]
    (lambda traced, *_: gz.Outcome(traced, bars=("a",)), False, "as bars"),  # type: ignore[arg-type]
    (lambda traced, *_: gz.Outcome(traced, loss=3), False, "has 3 as loss; give a sentence"),  # type: ignore[arg-type]
    (lambda traced, *_: gz.Outcome(halved(traced)), False, r"passes\[0\].quiet: the graph that it gave does not run"),
    (lambda traced, *_: gz.Outcome(traced), True, "return a graphzip.Decision"),
]


@pytest.mark.parametrize(("function", "decides", "message"), GIVES)
def test_a_function_that_gives_something_else(function: Any, decides: bool, message: str) -> None:
    with registered(Quiet, function, decides=decides), pytest.raises(gz.GraphZipError, match=message):
        compiled()


def test_details_are_what_a_saved_model_says_of_them(tmp_path: Path) -> None:
    def details(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Outcome:
        return gz.Outcome(traced, details={"pairs": (1, 2), "counts": {3: 4}})

    with registered(Quiet, details):
        result = compiled()
    assert result.report.passes == ({"quiet": {"pairs": [1, 2], "counts": {"3": 4}}},)
    result.save(tmp_path / "net.graphzip")
    assert gz.load(tmp_path / "net.graphzip").report == result.report


def test_passes_behind_it_go_by_the_graph_that_it_edited() -> None:
    def doubles(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Outcome:
        relu = next(node for node in traced.graph.nodes if "relu" in str(node.target))
        with traced.graph.inserting_after(relu):
            twice = traced.graph.call_function(torch.ops.aten.mul.Tensor, (relu, 2.0))
        relu.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
        return gz.Outcome(traced, changed=True)

    model = net()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):  # type: ignore[index]
            tensor[1::2] = tensor[::2]
    with registered(Quiet, doubles):
        result = gz.compile(model, gz.Plan([Quiet(), gz.ClusterMerge(keep=0.5)]), EXAMPLE)
    assert result.module.get_parameter("0.weight").shape == (2, 3)
    expected = model[2](2.0 * model[1](model[0](*EXAMPLE)))  # type: ignore[index]
    torch.testing.assert_close(result.module(*EXAMPLE), expected)


def test_what_its_function_raises_is_the_users() -> None:
    def fails(traced: Traced, options: Quiet, context: gz.PassContext) -> gz.Outcome:
        raise ZeroDivisionError("mine")

    with registered(Quiet, fails), pytest.raises(ZeroDivisionError, match="mine"):
        compiled()


def test_tables_and_bars_are_checked() -> None:
    with pytest.raises(gz.GraphZipError, match="give a cell for each"):
        gz.Table(("a", "b"), (("1",),))
    with pytest.raises(gz.GraphZipError, match="give a height for each bar"):
        gz.Bars("title", "label", {"a": (1, 2), "b": (1,)})
    with pytest.raises(gz.GraphZipError, match="heights that are no ints"):
        gz.Bars("title", "label", {"a": (1.5,)})  # type: ignore[dict-item,arg-type]
    assert str(gz.Table(("name", "count"), ((1, 2.5),), "title", "note")).splitlines() == [  # type: ignore[arg-type]
        "title", "name   count", "────────────", "1        2.5", "", "note"
    ]  # fmt: skip
