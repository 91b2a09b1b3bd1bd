"""Every exception that leaves the public interface is a `GraphZipError` or the user's own, and nothing else is left."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import ANYTHING, DATA, EXAMPLES, MODELS, Own, batches, example, net, process, state_of
from torch import Tensor

import graphzip as gz
from graphzip.boundary import public, user_data, users_own

MERGE = gz.Plan([gz.ClusterMerge(keep=0.5)])
FITTED = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="reconstruction", compensate="data")])
ALIKE = gz.Plan([gz.ClusterMerge(keep=0.5, features="activations")])
ATOMS = gz.Plan([gz.AtomFactorize(atoms=3, weighted=True, force=True)])


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """A failure leaves the process as it was."""
    before = process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert process() == before


def typed(call: Callable[[], Any], *held: Any) -> str:
    """Call it. What leaves is typed and says something, and what is `held` stays as it was; the message."""
    before = [state_of(each) for each in held]
    try:
        call()
    except gz.GraphZipError as error:
        text = str(error)
        assert len(text) > 10
        assert "failed inside graphzip" not in text, text
    else:
        text = ""
    assert [state_of(each) for each in held] == before
    return text


def refused(call: Callable[[], Any], *held: Any) -> str:
    """The same of what must not go through."""
    text = typed(call, *held)
    assert text, "nothing was refused"
    return text


# ------------------------------------------------------------------------------------------------- models and examples

OF_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "channel_groups": lambda model: gz.channel_groups(model, example()),
    "cost": lambda model: gz.cost(model, example()),
    "compile": lambda model: gz.compile(model, MERGE, example()),
    "compile with data": lambda model: gz.compile(model, FITTED, example(), calibration=batches()),
    "prepare": lambda model: gz.prepare(model, MERGE, example()),
    "plan_for": lambda model: gz.plan_for(model, example(), macs=0.5),
    "plan_for with data": lambda model: gz.plan_for(model, example(), macs=0.5, calibration=batches()),
    "WidthStudy": lambda model: gz.WidthStudy(model, example()),
    "widen": lambda model: gz.widen(model, example(), 2.0),
    "coefficient_rank": lambda model: gz.coefficient_rank(model, batches()),
    "suggest_code_size": lambda model: gz.suggest_code_size(model, (4, 4, 3, 3)),
    "save_generator": lambda model: gz.save_generator(model, "generator.safetensors"),
    "distill": lambda model: gz.distill(net(), model, batches()),
}

NO_MODEL = [
    *("nothing", "a name", "a path", "a number", "a tensor", "a list", "a mapping of one", "an empty mapping"),
    *("a class", "a function", "a state dict", "a program", "TorchScript", "lazy layers"),
]


@pytest.mark.parametrize("name", OF_A_MODEL)
@pytest.mark.parametrize("kind", NO_MODEL)
def test_what_is_no_model_is_refused(name: str, kind: str) -> None:
    model = MODELS[kind]()
    refused(lambda: OF_A_MODEL[name](model), model)


@pytest.mark.parametrize("name", [each for each in OF_A_MODEL if not each.startswith(("compile", "prepare"))])
def test_several_models_are_refused_where_one_is_needed(name: str) -> None:
    text = refused(lambda: OF_A_MODEL[name](MODELS["a mapping"]()))
    assert "expected a torch.nn.Module, got a dict of 2; give one model at a time" in text


@pytest.mark.parametrize("name", OF_A_MODEL)
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in NO_MODEL and kind != "a mapping"])
def test_models_that_cannot_be_used(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", str(tmp_path))
    model = MODELS[kind]()
    typed(lambda: OF_A_MODEL[name](model), model)


@pytest.mark.parametrize("kind", MODELS)
def test_students_that_cannot_be_trained(kind: str) -> None:
    typed(lambda: gz.distill(MODELS[kind](), net(), batches()))


@pytest.mark.parametrize("name", ["channel_groups", "cost", "compile", "prepare", "plan_for", "widen"])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_example_inputs_that_cannot_be_used(name: str, kind: str) -> None:
    model, given = net(), EXAMPLES[kind]()
    calls: dict[str, Callable[[], Any]] = {
        "channel_groups": lambda: gz.channel_groups(model, given),
        "cost": lambda: gz.cost(model, given),
        "compile": lambda: gz.compile(model, MERGE, given),
        "prepare": lambda: gz.prepare(model, MERGE, given),
        "plan_for": lambda: gz.plan_for(model, given, macs=0.5),
        "widen": lambda: gz.widen(model, given, 2.0),
    }
    refused(calls[name], model)


# ------------------------------------------------------------------------------------------------- data

WITH_DATA: dict[str, Callable[[Any], Any]] = {
    "a plain merge": lambda data: gz.compile(net(), MERGE, example(), calibration=data),
    "reconstruction": lambda data: gz.compile(net(), FITTED, example(), calibration=data),
    "activations": lambda data: gz.compile(net(), ALIKE, example(), calibration=data),
    "atoms": lambda data: gz.compile(net(), ATOMS, example(), calibration=data),
    "plan_for": lambda data: gz.plan_for(net(), example(), macs=0.5, calibration=data),
    "zip": lambda data: _joined(gz.Zip(), data),
    "share": lambda data: _joined(gz.CrossDomainShare(), data),
    "distill": lambda data: gz.distill(net(), net(1), data),
    "coefficient_rank": lambda data: gz.coefficient_rank(net(), data),
}
HARMLESS = {
    "a plain merge": {"NaN", "NaN later", "infinite", "too large", "another size later", "emptied"},
    "plan_for": {"emptied"},
}


def _joined(options: Any, data: Any) -> gz.Compiled:
    models, inputs = {"a": net(), "b": net(1)}, dict.fromkeys("ab", example())
    return gz.compile(models, gz.Plan([options]), inputs, calibration={"a": batches(), "b": data})


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("kind", DATA)
def test_data_that_cannot_be_used(name: str, kind: str) -> None:
    text = typed(lambda: WITH_DATA[name](DATA[kind]()))
    lenient = name in {"distill", "coefficient_rank"} or kind in HARMLESS.get(name, set())
    assert text or lenient or kind in {"too large", "another size later"}, "nothing was refused"


class Broken:
    """Batches, of which one raises."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error = at, error

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(batches()):
            if number == self.at:
                raise self.error
            yield batch


class Converted:
    """Batches of which one is no number, which the language itself finds out: no frame of the user's is in it."""

    def __iter__(self) -> Iterator[Any]:
        return map(int, ["1", "x"])


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("error", [Own("mine"), TypeError("mine")])
def test_what_the_users_data_raises_is_his(name: str, at: int, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        WITH_DATA[name](Broken(at, error))
    assert caught.value is error


def test_what_libraries_raise_under_the_users_data_is_his() -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(user_data(Converted()))
    with pytest.raises(ValueError, match="invalid literal for int"):
        public(lambda: list(user_data(Converted())))()


# ------------------------------------------------------------------------------------------------- callbacks


def raising(*_: Any, **__: Any) -> Any:
    raise Own("mine")


CALLBACKS: dict[str, Callable[[Any], Any]] = {
    "train": lambda given: gz.compile(net(), MERGE, example(), train=given),
    "evaluate": lambda given: gz.plan_for(net(), example(), macs=0.5, evaluate=given),
    "progress": lambda given: gz.compile(net(), MERGE, example(), progress=given),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_callbacks_raise_is_the_users(name: str) -> None:
    with pytest.raises(Own, match="mine"):
        CALLBACKS[name](raising)
    for given in (3, "x", [], object()):
        assert "cannot be called" in refused(lambda given=given: CALLBACKS[name](given))  # type: ignore[misc]


def test_what_a_clustering_raises_is_the_users() -> None:
    gz.register_clustering("raises")(raising)
    with pytest.raises(Own, match="mine"):
        gz.compile(net(), gz.Plan([gz.ClusterMerge(clustering="raises")]), example())
    for name in ANYTHING:
        if not isinstance(name, str) or not name:
            refused(lambda name=name: gz.register_clustering(name)(raising))  # type: ignore[misc]
    for function in (None, 3, "x"):
        refused(lambda function=function: gz.register_clustering("nothing")(function))  # type: ignore[misc]
    refused(lambda: gz.register_clustering("kmeans"))


@pytest.mark.parametrize(
    "score", [None, "x", "1.0", [], float("nan"), float("inf"), torch.tensor([1.0, 2.0]), 1j, True]
)
def test_scores_that_are_none(score: Any) -> None:
    text = refused(lambda: gz.plan_for(net(), example(), macs=0.5, evaluate=lambda _: score))
    assert "evaluate gave" in text


# ------------------------------------------------------------------------------------------------- options


PASSES = [
    *(
        gz.ClusterMerge,
        gz.Zip,
        gz.CrossDomainShare,
        gz.AtomFactorize,
        gz.SliceGenerate,
        gz.FoldBatchNorm,
        gz.LowRank,
        gz.Minimize,
    ),
    *(gz.PruneChannels, gz.DropBlocks),
]
FIELDS = [(each, field) for each in PASSES for field in (*each.model_fields, "nowhere")]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_options_of_passes_are_checked(kind: Any, field: str) -> None:
    for value in ANYTHING:
        typed(lambda value=value: gz.Plan([kind(**{field: value})]).to_dict())  # type: ignore[misc]
        typed(lambda value=value: kind.model_validate({field: value}))  # type: ignore[misc]
        typed(lambda value=value: kind().model_copy(update={field: value}))  # type: ignore[misc]
    refused(lambda: kind(nowhere=1))
    refused(lambda: setattr(kind(), field, 1))
    refused(lambda: delattr(kind(), field))


@pytest.mark.parametrize("kind", PASSES)
def test_passes_are_made_of_named_options(kind: Any) -> None:
    refused(lambda: kind(0.5))
    refused(lambda: kind().model_copy(update=3))
    refused(lambda: kind.model_validate(3))
    for text in ("", "[", "3", '{"nowhere": 1}'):
        refused(lambda text=text: kind.model_validate_json(text))  # type: ignore[misc]
    assert kind.model_validate_json("{}") == kind.model_validate(kind()) == kind()


def test_plans_are_checked() -> None:
    for value in ANYTHING:
        typed(lambda value=value: gz.Plan(value))  # type: ignore[misc]
        refused(lambda value=value: gz.Plan([value]))  # type: ignore[misc]
        typed(lambda value=value: gz.Plan([], inputs=value))  # type: ignore[misc]
        typed(lambda value=value: gz.Plan([], inputs=[value]))  # type: ignore[misc]
        refused(lambda value=value: gz.Plan.from_dict(value))  # type: ignore[misc]
        refused(lambda value=value: gz.Plan.from_dict({"version": value, "passes": 3}))  # type: ignore[misc]
        typed(lambda value=value: gz.Plan.from_dict({"version": 1, "passes": value}))  # type: ignore[misc]
        typed(lambda value=value: gz.Plan.from_dict({"version": 1, "passes": [value]}))  # type: ignore[misc]
        given = {"version": 1, "passes": [{"cluster_merge": value}]}
        typed(lambda given=given: gz.Plan.from_dict(given))  # type: ignore[misc]
        refused(lambda value=value: gz.compile(net(), value, example()))  # type: ignore[misc]


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "seed": lambda value: gz.prepare(net(), MERGE, example(), seed=value),
    "seed of a study": lambda value: gz.WidthStudy(net(), example(), seed=value),
    "seed of widen": lambda value: gz.widen(net(), example(), 1.0, seed=value),
    "scope": lambda value: gz.channel_groups(net(), example(), scope=value),
    "dynamic_shapes": lambda value: gz.channel_groups(net(), example(), dynamic_shapes=value),
    "factor": lambda value: gz.widen(net(), example(), value),
    "exclude": lambda value: gz.widen(net(), example(), 1.0, exclude=value),
    "init": lambda value: gz.widen(net(), example(), 1.0, init=value),
    "slice": lambda value: gz.suggest_code_size(net(), value),
    "energy": lambda value: gz.suggest_code_size(net(), (4, 4, 3, 3), energy=value),
    "layer": lambda value: gz.save_generator(net(), "g.safetensors", layer=value),
    "epochs": lambda value: gz.distill(net(), net(), batches(1), epochs=value),
    "rate": lambda value: gz.distill(net(), net(), batches(1), rate=value),
    "temperature": lambda value: gz.distill(net(), net(), batches(1), temperature=value),
    "labels": lambda value: gz.distill(net(), net(), batches(1), labels=value),
    "optimizer": lambda value: gz.distill(net(), net(), batches(1), optimizer=value),
    "passes": lambda value: gz.WidthStudy(net(), example(), passes=value),
    "evaluate_name": lambda value: gz.WidthStudy(net(), example(), evaluate_name=value),
    "groups": lambda value: gz.draw_groups(value, "groups.svg"),
    "study": lambda value: gz.draw_study(value, "study.svg"),
    "report": lambda value: gz.draw_sharing(value, "sharing.svg"),
    "prepared": lambda value: gz.expand(value),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ANYTHING:
        typed(lambda value=value: OPTIONS[name](value))  # type: ignore[misc]
    monkeypatch.undo()


@pytest.mark.parametrize("seed", [None, "x", -1, 1.5, True, 1 << 32, float("nan")])
def test_bad_seeds_are_refused(seed: Any) -> None:
    for name in ("seed", "seed of a study", "seed of widen"):
        assert "is not a seed; write an int from 0" in refused(lambda name=name: OPTIONS[name](seed))  # type: ignore[misc]


@pytest.mark.parametrize("what", ["macs", "params", "bytes", "latency"])
def test_budgets_that_are_none(what: str) -> None:
    study = gz.WidthStudy(net(), example())
    for value in (0, 0.0, -1, -0.5, float("nan"), float("inf"), -float("inf"), "half", [0.5], {}, True, 1j, 1e-9):
        budget = {what: value}
        refused(lambda budget=budget: study.check(**budget))  # type: ignore[misc]
        refused(lambda budget=budget: study.plan(**budget))  # type: ignore[misc]
        if value != 1e-9:
            refused(lambda budget=budget: gz.plan_for(net(), example(), **budget))  # type: ignore[misc]
    for call in (study.check, study.plan):
        refused(call)
        refused(lambda call=call: call(**{what: 0.5}, nowhere=0.5))  # type: ignore[misc]
        refused(lambda call=call: call(nowhere=0.5))  # type: ignore[misc]
    if what != "latency":
        assert "latency" in refused(lambda: gz.plan_for(net(), example(), **{what: 0.5, "latency": 0.5}))


def test_a_study_is_asked_for_what_it_knows() -> None:
    study = gz.WidthStudy(net(), example())
    for call in (study.frontier, lambda: study.plan(macs=0.5), lambda: gz.draw_study(study, "study.svg")):
        assert "measure" in refused(call)
    study.measure()
    for what in (*ANYTHING, "latency"):
        refused(lambda what=what: study.frontier(what))  # type: ignore[misc]
    for steps in ANYTHING:
        if type(steps) is not int or not 2 <= steps < 100:
            refused(lambda steps=steps: study.frontier(steps=steps))  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"keep": {"nowhere": 0.5}},
        {"keep": {"0": 9}},
        {"exclude": ["nowhere"]},
        {"clusters": {"nowhere": [[0]]}},
        {"clusters": {"0": [[0, 1], [2]]}},
        {"clusters": {"0": [[0, 99]]}},
        {"clustering": "nowhere"},
        {"clustering": "reconstruction"},
        {"compensate": "data"},
        {"features": "activations", "clustering": "even"},
    ],
)
def test_plans_that_do_not_fit(options: dict[str, Any]) -> None:
    model = net()
    refused(lambda: gz.compile(model, gz.Plan([gz.ClusterMerge(**options)]), example()), model)


# ------------------------------------------------------------------------------------------------- files


def places(folder: Path) -> dict[str, Any]:
    """Places where no file can be read or written."""
    closed = (folder / "closed").open("w")
    closed.close()
    (folder / "folder").mkdir()
    return {
        "nothing": None,
        "a number": 3,
        "bytes": b"x",
        "an empty name": "",
        "an open file": io.BytesIO(),
        "a closed file": closed,
        "a list": [folder / "x"],
        "a directory": folder / "folder",
        "a missing directory": folder / "nowhere" / "x.svg",
        "a file for a directory": folder / "closed" / "x.svg",
        "a null character": "a\0b",
        "a long name": "x" * 5000,
        "a system's directory": "/proc/x",
    }


@pytest.fixture(scope="module")
def compiled() -> gz.Compiled:
    return gz.compile(net(), MERGE, example())


@pytest.fixture(scope="module")
def joint() -> gz.Compiled:
    models = {"a": net(), "b": net(1)}
    return gz.compile(models, gz.Plan([gz.Zip(metric="euclidean")]), dict.fromkeys(models, example()))


def test_places_that_cannot_be_written(
    compiled: gz.Compiled, joint: gz.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = gz.prepare(net(), MERGE, example())
    prepared.record()
    sliced = gz.compile(net(), gz.Plan([gz.SliceGenerate(slice=(4, 4, 3, 3), code=4, force=True)]), example()).module
    groups = gz.channel_groups(net(), example())
    found = places(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for kind, place in found.items():
        refused(lambda place=place: compiled.save(place))  # type: ignore[misc]
        refused(lambda place=place: compiled.export(place))  # type: ignore[misc]
        refused(lambda place=place: joint.export(place))  # type: ignore[misc]
        if kind not in {"a directory", "an empty name"}:
            refused(lambda place=place: joint.export(place, per_task=True))  # type: ignore[misc]
        refused(lambda place=place: MERGE.save(place))  # type: ignore[misc]
        refused(lambda place=place: gz.save_generator(sliced, place))  # type: ignore[misc]
        refused(lambda place=place: gz.draw_groups(groups, place))  # type: ignore[misc]
        refused(lambda place=place: prepared.history.plot(place))  # type: ignore[misc]
        if kind not in {"nothing", "a system's directory"}:
            refused(lambda place=place: gz.WidthStudy(net(), example(), cache=place))  # type: ignore[misc]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    monkeypatch.undo()


def test_places_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = places(tmp_path)
    contents = {"empty": b"", "binary": bytes(range(256)), "not YAML": b"passes: [: :", "no plan": b"[1, 2]"}
    for name, content in contents.items():
        found[name] = tmp_path / name.replace(" ", "_")
        found[name].write_bytes(content)
    for place in (*found.values(), tmp_path / "missing", "/dev/zero"):
        refused(lambda place=place: gz.load(place))  # type: ignore[misc]
        refused(lambda place=place: gz.Plan.load(place))  # type: ignore[misc]
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------- what is compiled


def test_exports_are_asked_for_what_there_is(compiled: gz.Compiled, joint: gz.Compiled, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    for value in ANYTHING:
        if type(value) is not bool:
            for flag in ("dynamic_batch", "verify", "per_task", "same_input"):
                refused(lambda flag=flag, value=value: compiled.export(target, **{flag: value}))  # type: ignore[misc]
        if value is not None:
            refused(lambda value=value: compiled.export(target, opset=value))  # type: ignore[misc]
        refused(lambda value=value: joint.task(value))  # type: ignore[misc]
        refused(lambda value=value: compiled.task(value))  # type: ignore[misc]
    refused(lambda: compiled.export(target, per_task=True))
    refused(lambda: joint.export(target, per_task=True, same_input=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [(torch.zeros(2, 3, 9, 9),), (torch.zeros(2, 4, 8, 8),), (torch.zeros(2, 3, 8),), ("x",), (None,)],
    ids=["another size", "other channels", "another rank", "text", "nothing"],
)
def test_compiled_modules_refuse_what_they_were_not_compiled_for(compiled: gz.Compiled, given: tuple[Any, ...]) -> None:
    with pytest.raises(gz.InputShapeError):
        compiled.module(*given)


def test_groups_are_asked_for_by_a_name_or_a_number() -> None:
    groups = gz.channel_groups(net(), example())
    for key in ("nowhere", 99, -99, 1.5, None, (0, 1)):
        for kind in (gz.NotFoundError, KeyError, IndexError):
            with pytest.raises(kind, match="no channel group"):
                groups[key]  # type: ignore[call-overload]
    with pytest.raises(gz.NotFoundError, match="no channel group 'nowhere'; there are: '0', '3'"):
        groups.explain("nowhere")
    history = gz.prepare(net(), MERGE, example()).history
    with pytest.raises(gz.NotFoundError, match="no record 0; there are 0"):
        history[0]


# ------------------------------------------------------------------------------------------------- what is prepared


def test_prepared_models_are_asked_for_what_they_can_do() -> None:
    prepared = gz.prepare(net(), MERGE, example())
    sgd = torch.optim.SGD
    for value in ANYTHING:
        typed(lambda value=value: prepared.pull_(value))  # type: ignore[misc]
        typed(lambda value=value: prepared.record(value))  # type: ignore[misc]
        typed(lambda value=value: prepared.record(1.0, accuracy=value))  # type: ignore[misc]
        refused(lambda value=value: prepared.optimizer(value))  # type: ignore[misc]
        typed(lambda value=value: prepared.optimizer(sgd, value, lr=0.1))  # type: ignore[misc]
        typed(lambda value=value: prepared.optimizer(sgd, lr=value))  # type: ignore[misc]
        typed(lambda value=value: prepared.optimizer(sgd, lr=0.1, steps=value))  # type: ignore[misc]
        refused(lambda value=value: prepared.task(value))  # type: ignore[misc]
        refused(lambda value=value: prepared.load_state_dict(value))  # type: ignore[misc]
        refused(lambda value=value: gz.expand(prepared, share=value))  # type: ignore[misc]
    refused(lambda: prepared.optimizer(sgd, lr=-1.0))
    refused(lambda: prepared.optimizer(sgd, nowhere=1.0))

    class Strange(torch.optim.SGD):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise Own("mine")

    with pytest.raises(Own):
        prepared.optimizer(Strange)


def test_a_checkpoint_that_does_not_fit_leaves_the_clusters() -> None:
    prepared = gz.prepare(net(), MERGE, example())
    state = copy.deepcopy(prepared.state_dict())
    clusters = prepared.clusters.clone()
    for wrong in (clusters[:3], clusters * 0, clusters * 0.5, clusters[:, None]):
        refused(lambda wrong=wrong: prepared.load_state_dict({**state, "clusters": wrong}))  # type: ignore[misc]
        assert torch.equal(prepared.clusters, clusters)
    prepared.load_state_dict(state)
    assert prepared.convert().report.changed


def test_layers_of_atoms_grow_by_what_they_can() -> None:
    prepared = gz.prepare(net(), gz.Plan([gz.AtomFactorize(atoms=4, share=None, force=True)]), example())
    for value in ANYTHING:
        typed(lambda value=value: gz.expand(prepared, atoms=value))  # type: ignore[misc]
        typed(lambda value=value: gz.expand(prepared, share=value))  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- the edge itself


def test_a_fault_of_graphzip_is_said_to_be_one() -> None:
    def faulty() -> None:
        torch.zeros(2).reshape(3)

    faulty.__globals__["__name__"], name = "graphzip.somewhere", __name__
    try:
        with pytest.raises(gz.GraphZipError, match=r"faulty failed inside graphzip with RuntimeError: shape") as caught:
            public(faulty)()
        assert isinstance(caught.value.__cause__, RuntimeError)
    finally:
        faulty.__globals__["__name__"] = name


def test_the_edge_lets_through_what_is_not_its_own() -> None:
    @public
    def of_the_user() -> None:
        raise Own("mine")

    @public
    def stopped() -> None:
        raise KeyboardInterrupt

    @public
    def refusing() -> None:
        raise gz.PlanError("no")

    for function, kind in ((of_the_user, Own), (stopped, KeyboardInterrupt), (refusing, gz.PlanError)):
        with pytest.raises(kind):
            function()
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        gz.compile()  # type: ignore[call-arg]
    assert not users_own(RuntimeError("never raised"))


def test_stages_that_are_gone_through_half_way_can_be_left() -> None:
    prepared = gz.prepare(net(), gz.Plan([gz.ClusterMerge(), gz.FoldBatchNorm()]), example())
    for stage in prepared.steps():
        assert stage == "cluster_merge"
        break
    assert prepared.convert().report.changed


NOT_CALLED = {"to_dict", "from_dict", "collapse_"}


def test_everything_public_is_guarded() -> None:
    """A new public function gets the decorator: this fails where it has been forgotten."""
    functions = {name: getattr(gz, name) for name in gz.__all__ if inspect.isfunction(getattr(gz, name))}
    bare = {name for name, function in functions.items() if not hasattr(function, "__wrapped__")}
    assert bare <= {"register_clustering"}, "decorate it with graphzip.boundary.public"
    for kind in (gz.Prepared, gz.Compiled, gz.WidthStudy, gz.Plan, gz.History):
        methods = {name: each for name, each in vars(kind).items() if inspect.isfunction(each) and name[0] != "_"}
        left = {name for name, each in methods.items() if not hasattr(each, "__wrapped__")}
        assert left <= {"forward", "to_dict", "add", "is_due", "load_state_dict"}, (kind, left)


def test_what_would_steer_a_terminal_is_spelled_out() -> None:
    assert str(gz.WeightsError("\x1b[31mé ─\x07\tb\n")) == "\\x1b[31mé ─\\x07\tb\n"
