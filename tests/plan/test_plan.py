"""The plan: options, messages, the file."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphzip.errors import PlanError
from graphzip.plan.options import PassOptions
from graphzip.plan.passes import PASS_OPTIONS, ClusterMerge, FoldBatchNorm
from graphzip.plan.plan import Plan
from graphzip.plan.problems import plan_error
from graphzip.report.tables import closest


def message(action: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(PlanError) as caught:
        action(*args, **kwargs)
    return str(caught.value)


def read(text: str, tmp_path: Path) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return Plan.load(path)


# ---------------------------------------------------------------------------------------------------- options


def test_cluster_merge_defaults() -> None:
    options = ClusterMerge()
    assert (options.keep, options.clustering, options.clusters) == (0.5, "kmeans", None)
    assert (options.exclude, options.round_to, options.strength) == ((), 1, 3e-3)


def test_clusters_by_hand_leave_the_other_groups_whole_unless_keep_is_given() -> None:
    assert ClusterMerge(clusters={}).keep == {}
    assert ClusterMerge(clusters={"a": [[0, 1]]}).keep == {}
    assert ClusterMerge(clusters={}, keep=0.5).keep == 0.5
    assert ClusterMerge(clusters=None).keep == 0.5


def test_one_channel_and_all_channels_are_different() -> None:
    one, every = ClusterMerge(keep=1), ClusterMerge(keep=1.0)
    assert type(one.keep) is int
    assert type(every.keep) is float
    assert one != every
    assert ClusterMerge(keep={"a": 1}) != ClusterMerge(keep={"a": 1.0})


def test_equality_is_about_what_is_asked_for() -> None:
    assert ClusterMerge() == ClusterMerge(keep=0.5)
    assert hash(ClusterMerge()) == hash(ClusterMerge(keep=0.5))
    assert ClusterMerge(keep={"a": 0.5, "*": 0.7}) != ClusterMerge(keep={"*": 0.7, "a": 0.5})
    assert ClusterMerge(exclude=["a"]) == ClusterMerge(exclude=("a",))
    assert ClusterMerge() != FoldBatchNorm()
    assert Plan([ClusterMerge()]) != Plan([ClusterMerge()], inputs=[[2, 3]])
    assert Plan([ClusterMerge()]) != [ClusterMerge()]


def test_options_survive_pickling_and_copying() -> None:
    options = ClusterMerge(clusters={"a": [[0, 1], [2]]}, exclude=["b*"], strength="auto")
    for twin in (pickle.loads(pickle.dumps(options)), copy.copy(options), copy.deepcopy(options), options.model_copy()):
        assert twin == options
        assert twin.to_dict() == options.to_dict()
    plan = Plan([options, FoldBatchNorm()], inputs=[[2, 3]])
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan
    assert hash(copy.deepcopy(plan)) == hash(plan)


def test_model_copy_validates_what_it_changes() -> None:
    options = ClusterMerge(clusters={"a": [[0, 1]]}, round_to=8)
    assert options.model_copy(update={"clusters": None}) == ClusterMerge(round_to=8)
    assert "2.0 is out of range" in message(options.model_copy, update={"keep": 2.0})


def test_options_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ClusterMerge().keep = 0.3
    with pytest.raises(AttributeError):
        Plan([]).passes = ()  # type: ignore[misc]


def test_representation_shows_what_was_given_and_evaluates() -> None:
    plan = Plan([ClusterMerge(keep={"a": 1}), FoldBatchNorm()], inputs=[(2, 3)])
    assert repr(plan) == "Plan([ClusterMerge(keep={'a': 1}), FoldBatchNorm()], inputs=[[2, 3]])"
    assert str(FoldBatchNorm()) == "FoldBatchNorm()"
    assert eval(repr(plan)) == plan


def test_numpy_numbers_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    options = ClusterMerge(keep=numpy.int64(3), round_to=numpy.int32(2), clusters={"a": [[numpy.int64(0)]]})
    assert json.dumps(options.to_dict()) == '{"clusters": {"a": [[0]]}, "keep": 3, "round_to": 2}'
    assert type(ClusterMerge(keep=numpy.float64(0.5)).keep) is float


SHARE = "a float is the share of the channels to keep, above 0 and at most 1"
AMOUNT = "is not an amount; write a float above 0 and at most 1"

WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"keep": 2.0}, f"keep: 2.0 is out of range; {SHARE}"),
    ({"keep": 0.0}, f"keep: 0.0 is out of range; {SHARE}"),
    ({"keep": float("nan")}, f"keep: nan is out of range; {SHARE}"),
    ({"keep": 0}, "keep: 0 is out of range; an int is the number of channels to keep, at least 1"),
    ({"keep": True}, f"keep: True {AMOUNT}"),
    ({"keep": "half"}, f"keep: 'half' {AMOUNT}"),
    ({"keep": None}, f"keep: None {AMOUNT}"),
    ({"keep": {"fc*": 1.5}}, "keep['fc*']: 1.5 is out of range"),
    ({"keep": {1: 0.5}}, "keep[1]: a name must be text; put it in quotes"),
    ({"clustering": ""}, "clustering: '' is not the name of a clustering, such as 'kmeans'"),
    ({"clustering": 3}, "clustering: 3 is not the name of a clustering"),
    ({"clusters": [[0]]}, "clusters: [[0]] is not a mapping from group names to lists of clusters"),
    ({"clusters": {"a": [0, 1]}}, "clusters['a']: [0, 1] is not a list of lists of channels"),
    ({"clusters": {"a": "01"}}, "clusters['a']: '01' is not a list of lists of channels"),
    ({"clusters": {"a": []}}, "clusters['a']: no clusters; leave the group out to keep it whole"),
    ({"clusters": {"a": [[0], []]}}, "clusters['a']: a cluster is empty"),
    ({"clusters": {"a": [[0, -1]]}}, "clusters['a']: -1 is not a channel; channels are ints from 0"),
    ({"clusters": {"a": [[0, True]]}}, "clusters['a']: True is not a channel"),
    ({"clusters": {"a": [[0, 1.0]]}}, "clusters['a']: 1.0 is not a channel"),
    ({"clusters": {"a": [[0, 1], [1]]}}, "clusters['a']: channel 1 is named twice"),
    ({"exclude": "fc*"}, "exclude: 'fc*' is one glob; write a list: ['fc*']"),
    ({"exclude": 3}, "exclude: 3 is not a list of globs on names"),
    ({"exclude": ["a", 3]}, "exclude: 3 is not a glob; a glob is text"),
    ({"round_to": 0}, "round_to: 0 is not a number of channels; write an int of at least 1"),
    ({"round_to": 8.0}, "round_to: 8.0 is not a number of channels"),
    ({"round_to": True}, "round_to: True is not a number of channels"),
    ({"strength": 0}, "strength: 0 is not a strength; write a number above 0, or 'auto'"),
    ({"strength": float("inf")}, "strength: inf is not a strength"),
    ({"strength": "big"}, "strength: 'big' is not a strength"),
    ({"strength": True}, "strength: True is not a strength"),
    ({"keap": 0.5}, "keap: unknown option; did you mean 'keep'?"),
    ({"xyzzy": 0.5}, "xyzzy: unknown option; there are: 'clusters', 'keep', 'clustering', 'exclude'"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG_OPTIONS)
def test_a_wrong_option_is_one_line_in_python_and_in_a_plan(options: dict[str, Any], expected: str) -> None:
    here = message(ClusterMerge, **options) if all(isinstance(key, str) for key in options) else ""
    assert here.startswith(f"cluster_merge.{expected}")
    assert "\n" not in here
    there = message(Plan.from_dict, {"version": 1, "passes": [{"cluster_merge": options}]})
    assert there.startswith(f"passes[0].cluster_merge.{expected}")
    assert "pydantic" not in there


def test_a_pass_without_options_says_so() -> None:
    assert message(FoldBatchNorm, x=1) == "fold_batch_norm.x: unknown option; fold_batch_norm has no options"


def test_all_problems_are_said_at_once() -> None:
    assert message(ClusterMerge, keep={"a": 0, "b": 2.0}, round_to=0).splitlines() == [
        "the plan: 3 problems",
        "  - cluster_merge.keep['a']: 0 is out of range; an int is the number of channels to keep, at least 1",
        f"  - cluster_merge.keep['b']: 2.0 is out of range; {SHARE} (write an int to keep a number of channels)",
        "  - cluster_merge.round_to: 0 is not a number of channels; write an int of at least 1",
    ]


def test_many_problems_are_counted() -> None:
    lines = str(plan_error([str(number) for number in range(15)], "plan.yaml")).splitlines()
    assert lines[0] == "plan.yaml: 15 problems"
    assert lines[1:] == [*(f"  - {number}" for number in range(10)), "  - and 5 more"]


def test_closest_names() -> None:
    assert closest("layer1.0.conv9", ["fc", "layer1.0.conv1"]) == "did you mean 'layer1.0.conv1'?"
    assert closest("zzz", ["a", "b"]) == "there are: 'a', 'b'"
    assert closest("zzz", [str(number) for number in range(12)]).endswith("'8', '9', 2 more")
    assert closest("zzz", []) == "there are none to choose from"


def test_the_table_of_passes_names_each_by_its_kind() -> None:
    assert PASS_OPTIONS["cluster_merge"] is ClusterMerge
    assert all(issubclass(options, PassOptions) and options.kind == kind for kind, options in PASS_OPTIONS.items())
    for kind, options in PASS_OPTIONS.items():
        assert Plan.from_dict({"version": 1, "passes": [{kind: {}}]}) == Plan([options()])


# ---------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (ClusterMerge(), "passes: ClusterMerge() is not a list of passes; write Plan([ClusterMerge()])"),
        (3, "passes: 3 is not a list of passes"),
        ([ClusterMerge], "passes[0]: ClusterMerge is a class; write ClusterMerge()"),
        ([FoldBatchNorm(), 3], "passes[1]: 3 is not a pass, such as ClusterMerge()"),
    ],
)
def test_passes_that_are_none(passes: Any, expected: str) -> None:
    assert message(Plan, passes).startswith(expected)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([1, 3, 224, 224], "inputs: [1, 3, 224, 224] is not a list of shapes, such as [[2, 3, 224, 224]]"),
        ("2x3", "inputs: '2x3' is not a list of shapes"),
        ([], "inputs: [] is not a list of shapes"),
        ([[]], "inputs: [[]] is not a list of shapes"),
        ([[2, 0]], "inputs[0][1]: 0 is not a size; write an int of at least 1"),
        ([[2], [True]], "inputs[1][0]: True is not a size"),
    ],
)
def test_inputs_that_are_no_shapes(inputs: Any, expected: str) -> None:
    assert message(Plan, [], inputs=inputs).startswith(expected)
    assert message(Plan.from_dict, {"version": 1, "passes": [], "inputs": inputs}).startswith(expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, "a plan is a mapping with 'version' and 'passes', got None"),
        ({"passes": []}, "version: missing; write 'version: 1'"),
        ({"version": 2, "passes": []}, "version: 2 is unknown; this graphzip reads version 1"),
        ({"version": True, "passes": []}, "version: True is unknown"),
        ({"version": "1", "passes": []}, "version: '1' is unknown"),
        ({"version": 1}, "passes: missing; write a list of passes"),
        ({"version": 1, "passes": None}, "passes: None is not a list of passes"),
        ({"version": 1, "passes": "fold_batch_norm"}, "passes: 'fold_batch_norm' is not a list of passes"),
        ({"version": 1, "pases": []}, "the plan: 2 problems\n  - pases: unknown key; did you mean 'passes'?"),
        ({"version": 1, "passes": [3]}, "passes[0]: 3 is not a pass; write its name and options: 'cluster_merge: {}'"),
        ({"version": 1, "passes": [{}]}, "passes[0]: {} is not a pass"),
        ({"version": 1, "passes": [{"cluster_mrge": {}}]}, "passes[0].cluster_mrge: unknown pass; did you mean 'clust"),
        ({"version": 1, "passes": [{3: {}}]}, "passes[0].3: unknown pass; there are: 'cluster_merge'"),
        ({"version": 1, "passes": ["quantise!"]}, "passes[0].quantise!: unknown pass; there are: 'cluster_merge'"),
        ({"version": 1, "passes": [{"cluster_merge": 0.5}]}, "passes[0].cluster_merge: 0.5 is not a mapping of option"),
        ({"version": 1, "passes": [{"cluster_merge": {1: 2}}]}, "passes[0].cluster_merge.1: unknown option"),
        (
            {"version": 1, "passes": [{"cluster_merge": None, "keep": 0.5}]},
            "passes[0]: one item names one pass, this one has the keys cluster_merge, keep; indent options below the",
        ),
    ],
)
def test_data_that_is_no_plan(data: Any, expected: str) -> None:
    assert message(Plan.from_dict, data).startswith(expected)


def test_a_pass_may_be_named_without_options() -> None:
    plan = Plan.from_dict({"version": 1, "passes": ["fold_batch_norm", {"cluster_merge": None}]})
    assert plan.passes == (FoldBatchNorm(), ClusterMerge())


AMOUNTS = st.one_of(st.integers(1, 99), st.floats(0, 1, exclude_min=True))
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)


@st.composite
def options_given(draw: st.DrawFn) -> PassOptions:
    fields: dict[str, st.SearchStrategy[Any]] = {
        "keep": AMOUNTS | st.dictionaries(NAMES, AMOUNTS, max_size=3),
        "clusters": st.none() | st.dictionaries(NAMES, st.just([[0, 2], [1]]), max_size=2),
        "clustering": st.sampled_from(["kmeans", "even"]),
        "exclude": st.lists(NAMES, max_size=3),
        "round_to": st.integers(1, 64),
        "strength": st.just("auto") | st.floats(1e-9, 10),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(fields))))
    return ClusterMerge(**{name: draw(fields[name]) for name in sorted(chosen)})


@settings(deadline=None)
@example(passes=[ClusterMerge(exclude=["0e0", "1", "yes", "~", "", "2020-01-01", "<<", "="])])
@given(passes=st.lists(options_given() | st.just(FoldBatchNorm()), max_size=3))
def test_dictionaries_and_files_round_trip(tmp_path_factory: pytest.TempPathFactory, passes: list[PassOptions]) -> None:
    plan = Plan(passes, inputs=[[2, 3]])
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.to_dict() == plan.to_dict()


# ---------------------------------------------------------------------------------------------------- the file

GOLDEN = """\
version: 1
inputs:
  - [2, 3, 224, 224]
passes:
  - cluster_merge: {keep: 0.5, clustering: even, strength: auto}
  - cluster_merge:
      clusters:
        conv1:
          - [0, 3]
          - [1]
          - [2]
      keep: {layer1.*: 1, '*': 1.0}
      exclude: [fc*, layer4.*]
  - fold_batch_norm: {}
"""


def test_the_file_is_readable(tmp_path: Path) -> None:
    by_hand = ClusterMerge(
        keep={"layer1.*": 1, "*": 1.0}, clusters={"conv1": [[0, 3], [1], [2]]}, exclude=["fc*", "layer4.*"]
    )
    even = ClusterMerge(keep=0.5, clustering="even", strength="auto")
    plan = Plan([even, by_hand, FoldBatchNorm()], inputs=[[2, 3, 224, 224]])
    path = tmp_path / "plan.yaml"
    plan.save(path)
    assert path.read_text(encoding="utf-8") == GOLDEN
    assert Plan.load(str(path)) == plan
    assert Plan.load(path).inputs == ((2, 3, 224, 224),)
    assert os.listdir(tmp_path) == ["plan.yaml"]


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    plan = read("version: 1\npasses: [{cluster_merge: {strength: 3e-3, keep: 5.e-1}}]", tmp_path)
    assert plan == Plan([ClusterMerge(strength=3e-3, keep=0.5)])


def test_merge_keys_work(tmp_path: Path) -> None:
    text = "version: 1\npasses:\n- cluster_merge: &a {keep: 0.5, round_to: 8}\n- cluster_merge: {<<: *a, keep: 3}\n"
    assert read(text, tmp_path).passes[1] == ClusterMerge(keep=3, round_to=8)


def test_a_message_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        read("version: 1\npasses: [{cluster_merge: {keap: 1}}]", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'plan.yaml'}: passes[0].cluster_merge.keap: unknown option; did you mean 'keep'?"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a plan is a mapping with 'version' and 'passes', got None"),
        ("version: 1\nversion: 1\npasses: []", "not valid YAML: line 2, column 1: the key 'version' is given twice"),
        ("version: 1\npasses: [{cluster_merge: {keep: 1, keep: 2}}]", "line 2, column 36: the key 'keep' is given twi"),
        ("version: 1\npasses: [a", "expected ',' or ']'"),
        ("version: 1\n--- {}", "not valid YAML: line 2, column 1: but found another document"),
        ("version: 1\npasses: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("version: 1\npasses: {? [a] : b}", "not valid YAML: line 2, column 12: found unhashable key"),
        ("version: 2026-13-45", "version: '2026-13-45' is unknown"),
        ("version: !!timestamp no", "not valid YAML"),
        ("version: " + "[" * 5000, "not valid YAML"),
        ("version: 1\npasses: &a [*a]", "not valid YAML: line 2, column 9: it refers to itself"),
    ],
)
def test_files_that_are_no_plan(text: str, expected: str, tmp_path: Path) -> None:
    said = message(read, text, tmp_path)
    assert said.startswith(f"{tmp_path / 'plan.yaml'}: ")
    assert expected in said
    assert "\n" not in said


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert message(Plan.load, missing) == f"{missing}: cannot be read: No such file or directory"
    assert message(Plan.load, tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"version: \xff")
    assert message(Plan.load, binary) == f"{binary}: not UTF-8 text (byte 9); save the plan as UTF-8"


def test_files_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "plan.yaml"
    assert message(Plan([]).save, nowhere) == (
        f"cannot write {nowhere}: the directory {nowhere.parent} does not exist; create it first"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert message(Plan([]).save, folder) == f"{folder} is a directory; give the name of a file in it"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    Plan([FoldBatchNorm()]).save(path)

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert message(Plan([]).save, path).startswith(f"cannot write {path}: No space left on device")
    assert Plan.load(path) == Plan([FoldBatchNorm()])
    assert os.listdir(tmp_path) == ["plan.yaml"]


def test_norms_are_exact_or_plain() -> None:
    assert ClusterMerge().norms == "exact"
    assert Plan([ClusterMerge(norms="plain")]).to_dict()["passes"] == [{"cluster_merge": {"norms": "plain"}}]
    with pytest.raises(PlanError, match=r"norms: 'fast' is not a way to treat norms; write 'exact' or 'plain'"):
        ClusterMerge(norms="fast")  # type: ignore[arg-type]
