"""Plans from strangers: bombs of references, endless numbers, too many of anything; refused at once, with a reason."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from graphzip import ClusterMerge, Plan, PlanError
from graphzip.plan import yaml_text
from graphzip.plan.passes import PASS_OPTIONS

SECONDS = 1.0
HEAD = "version: 1\npasses:\n"


def pairs(prefix: str, count: int, text: str) -> str:
    return ", ".join(f"{prefix}{number}: {text}" for number in range(count))


def laughs(depth: int, width: int, form: str) -> str:
    """References to references: few lines that stand for `width ** depth` values."""
    lines = ["a0: &a0 [x, y]" if form == "list" else "a0: &a0 {x: 1, y: 2}"]
    for level in range(1, depth):
        names = [f"*a{level - 1}"] * width
        inside = {
            "list": f"[{', '.join(names)}]",
            "mapping": f"{{{', '.join(f'k{place}: {name}' for place, name in enumerate(names))}}}",
            "merge": f"{{<<: [{', '.join(names)}]}}",
        }[form]
        lines.append(f"a{level}: &a{level} {inside}")
    return "\n".join([*lines, "version: 1", f"passes: [cluster_merge: {{exclude: *a{depth - 1}}}]"])


BY_HAND = f"{HEAD}  - cluster_merge: {{exclude: [%s]}}\n"
FILES: dict[str, tuple[str, str]] = {
    "lists of lists by reference": (laughs(12, 9, "list"), "more than 100,000 values with what it"),
    "mappings of mappings by reference": (laughs(12, 9, "mapping"), "more than 100,000 values with what it refers to"),
    "merges of merges": (laughs(12, 9, "merge"), "more than 100,000 values with what it refers to"),
    "few levels, all of them wide": (laughs(4, 300, "list"), "more than 100,000 values with what it refers to"),
    "a list in itself": ("version: 1\npasses: &a [*a]", "line 2, column 9: it refers to itself"),
    "a mapping in itself": ("version: 1\npasses: &a {b: {c: *a}}", "it refers to itself"),
    "a mapping merged into itself": ("&a {<<: *a, version: 1}", "it refers to itself"),
    "a key that is itself": ("? &a [*a]\n: 1", "it refers to itself"),
    "a reference to nothing": ("version: 1\npasses: *a", "line 2, column 9"),
    "400 digits": (f"{HEAD}  - cluster_merge: {{keep: {'9' * 400}}}", "line 3, column 27: a number of 400 digits"),
    "400 digits behind a sign": (f"version: -{'9' * 400}\npasses: []", "a number of 401 digits"),
    "100,000 digits": (f"version: {'9' * 100_000}\npasses: []", "a number of 100000 digits; write one of at most 40"),
    "400 digits behind the point": (f"version: 0.{'9' * 400}\npasses: []", "a number of 402 digits"),
    "an exponent of 400 digits": (f"version: 1e{'9' * 400}\npasses: []", "a number of 402 digits"),
    "39 digits": (f"{HEAD}  - cluster_merge: {{keep: {'9' * 39}}}", "keep: 99999999999999999"),
    "39 digits of a size": (f"version: 1\ninputs: [[{'9' * 39}]]\npasses: []", "inputs[0][0]: 999999999999999999"),
    "39 digits of a channel": (f"{HEAD}  - cluster_merge: {{clusters: {{a: [[{'9' * 39}]]}}}}", "is not a channel"),
    "a strength that is no float": (f"{HEAD}  - cluster_merge: {{strength: {'9' * 39}e300}}", "a number of 43 digits"),
    "hexadecimal": (f"version: 0x{'f' * 5000}\npasses: []", "version: '0xfffff"),
    "octal": ("version: 01\npasses: []", "version: '01' is unknown"),
    "underscores": ("version: 1_0\npasses: []", "version: '1_0' is unknown"),
    "a number to base 60": (f"{HEAD}  - cluster_merge: {{keep: 1:30}}", "keep: '1:30' is not an amount"),
    "a float to base 60": (f"{HEAD}  - cluster_merge: {{keep: 0:0.5}}", "keep: '0:0.5' is not an amount"),
    "a long number to base 60": (f"version: 1{':59' * 400_000}\npasses: []", "version: '1:59:59"),
    "a long float to base 60": (f"version: 1{':59' * 400_000}.5\npasses: []", "version: '1:59:59"),
    "base 60 by its tag": (f"version: !!int 1{':59' * 400_000}", "digits; write one of at most 40"),
    "base 60 by its tag, short": ("version: !!int 1:59", "line 1, column 10: '1:59' is not a number"),
    "a date": ("version: 2026-01-01\npasses: []", "version: '2026-01-01' is unknown"),
    "bytes": ("version: !!binary aGk=\npasses: []", "could not determine a constructor for the tag"),
    "a set": ("version: 1\npasses: !!set {a, b}", "could not determine a constructor for the tag"),
    "code": ("version: !!python/object/apply:os.system [true]", "could not determine a constructor for the tag"),
    "300,000 globs": (BY_HAND % ", ".join(["layer*"] * 300_000), "more than 100,000 values, which no plan has"),
    "300,000 globs, lines": (f"{HEAD}  - cluster_merge:\n      exclude:\n" + "      - a*\n" * 300_000, "more than 1"),
    "50,000 globs": (BY_HAND % ", ".join(["a"] * 50_000), "passes[0].cluster_merge.exclude: 50,000 globs, of which"),
    "12,000 widths": (f"{HEAD}  - cluster_merge: {{keep: {{{pairs('a', 12_000, '1')}}}}}", "keep: 12,000 names"),
    "a glob of a million characters": (BY_HAND % ("a*" * 500_000), "has 1,000,000 characters; no name has more"),
    "a name of a million characters": (f"{HEAD}  - cluster_merge: {{? {'a' * 1_000_000}\n: 1}}", ""),
    "a pass of a million characters": (f"{HEAD}  - {'a' * 1_000_000}", "passes[0].'aaaa"),
    "12,000 passes": (f"version: 1\npasses: [{'zip, ' * 12_000}]", "passes: 12,000 passes, more than 1,000"),
    "20,000 keys": ("version: 1\npasses: []\n" + "\n".join(f"k{n}: 1" for n in range(20_000)), "11 problems"),
    "10,000 options": (f"{HEAD}  - cluster_merge: {{{pairs('a', 10_000, '1')}}}", "10,000 options, which no pass has"),
    "12,000 passes in one": (f"{HEAD}  - {{{pairs('a', 12_000, '1')}}}", "passes[0]: one item names one pass"),
    "12,000 sizes that are none": (f"version: 1\ninputs: [[{'x, ' * 12_000}]]\npasses: []", "12000 problems"),
    "deep lists": (f"version: {'[' * 100_000}", "not valid YAML: "),
    "rather deep lists": (f"version: {'[' * 200}{']' * 200}", "nested more than 32 deep"),
    "deep mappings": (f"version: {'{a: ' * 200}1{'}' * 200}", "nested more than 32 deep"),
    "deep lists on a line": (f"{'- ' * 20_000}a", "not valid YAML: "),
    "deep keys": ("? " * 20_000, "not valid YAML: "),
    "a key given twice": ("version: 1\nversion: 1\npasses: []", "line 2, column 1: the key 'version' is given twice"),
    "a key of a group twice": (f"{HEAD}  - cluster_merge: {{keep: {{a: 1, 'a': 2}}}}", "the key 'a' is given twice"),
    "a long key given twice": (f"? {'a' * 900}\n: 1\n? {'a' * 900}\n: 1", "is given twice"),
    "5 MB of nothing": ("#" * 5_000_000, "larger than 4,194,304 bytes, which no plan is"),
    "3 MB of comments": ("#" * 3_000_000, "a plan is a mapping with 'version' and 'passes', got None"),
    "3 MB of spaces": ("version:" + " " * 3_000_000 + "2", "version: 2 is unknown"),
    "3 MB of words": ("version: " + "a " * 1_500_000, "version: 'a a a"),
    "3 MB of dots": ("version: " + "." * 3_000_000, "version: '....."),
    "3 MB of text in quotes": ('version: "' + "\\x41" * 700_000 + '"', "version: 'AAA"),
    "90,000 empty lines": ("\n" * 90_000 + "version: 3", "version: 3 is unknown"),
    "many anchors": ("version: [" + ", ".join(f"&a{n} x" for n in range(20_000)) + "]", "version: ['x'"),
    "a control character": ("version: \x07", "not valid YAML: "),
    "a null character": ("version: \0", "not valid YAML: "),
}  # fmt: skip


def refused(read: Callable[[], Any]) -> str:
    """What is said, which has to be short and soon."""
    gc.disable()  # it would walk all that the tests of this process hold
    try:
        start = time.thread_time()
        with pytest.raises(PlanError) as caught:
            read()
        assert time.thread_time() - start < SECONDS
    finally:
        gc.enable()
    text = str(caught.value)
    assert len(text) < 5_000
    assert "inside graphzip" not in text
    return text


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    text, said = FILES[name]
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    found = refused(lambda: Plan.load(path))
    assert found.startswith(f"{path}: ")
    assert said in found


def test_a_file_without_an_end() -> None:
    assert "larger than 4,194,304 bytes" in refused(lambda: Plan.load("/dev/zero"))


def test_a_plan_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "_MOST_VALUES", 1000)
    path = tmp_path / "plan.yaml"
    plans = [Plan([ClusterMerge(clusters={"a": [[each] for each in range(size)]})]) for size in (900, 1100)]
    plans[0].save(path)
    assert Plan.load(path) == plans[0]
    with pytest.raises(PlanError, match=r"plan\.yaml: more than 1,000 values"):
        plans[1].save(path)
    assert Plan.load(path) == plans[0]


def test_references_that_stand_for_little_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        f"{HEAD}  - cluster_merge: &a {{exclude: &b [fc*], keep: 0.5}}\n"
        "  - prune_channels: {exclude: *b}\n  - cluster_merge: {<<: *a, keep: 2}\n",
        encoding="utf-8",
    )
    assert Plan.load(path).to_dict()["passes"][1:] == [
        {"prune_channels": {"exclude": ["fc*"]}},
        {"cluster_merge": {"exclude": ["fc*"], "keep": 2}},
    ]


# ------------------------------------------------------------------------------------------------- dictionaries


def cyclic_list() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def cyclic_mapping() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    found["a"] = found
    return found


def deep(levels: int = 5_000) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def deep_mapping(levels: int = 5_000) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"a": found}
    return found


class Rude:
    """Cannot be shown, compared or counted."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__

    def __len__(self) -> int:
        raise RuntimeError("no")


VALUES: dict[str, Callable[[], Any]] = {
    "a list in itself": cyclic_list,
    "a mapping in itself": cyclic_mapping,
    "a deep list": deep,
    "a deep mapping": deep_mapping,
    "an endless number": lambda: 10**10_000,
    "an endless number, negative": lambda: -(10**10_000),
    "a number of 400 digits": lambda: 10**400,
    "an endless fraction": lambda: Fraction(10**10_000 + 1, 10**5_000),
    "an endless text": lambda: "x" * 10_000_000,
    "what cannot be shown": Rude,
    "100,000 texts": lambda: ["x"] * 100_000,
    "100,000 numbers": lambda: list(range(100_000)),
    "100,000 names": lambda: {str(number): 0.5 for number in range(100_000)},
    "a mapping of numbers": lambda: {10**10_000: 1},
    "a surrogate": lambda: "\ud800",
}
OPTIONS = [(kind, name) for kind, options in PASS_OPTIONS.items() for name in options.model_fields]
TAKEN = {  # texts that a name or a path may be, and numbers that may be as large
    ("a surrogate", name) for name in ("clustering", "generator")
} | {("an endless text", name) for name in ("clustering", "generator")}


@pytest.mark.parametrize("value", VALUES)
def test_dictionaries(value: str) -> None:
    given = VALUES[value]()
    for kind, name in OPTIONS:
        if (value, name) in TAKEN or (value == "100,000 texts" and name == "order"):
            continue
        said = refused(lambda kind=kind, name=name: Plan.from_dict({"version": 1, "passes": [{kind: {name: given}}]}))
        assert f"passes[0].{kind}.{name}" in said
    for key in ("version", "inputs", "passes"):
        refused(lambda key=key: Plan.from_dict({"version": 1, "passes": [], key: given}))
    for name in ("cluster_merge", "zip"):
        refused(lambda name=name: Plan.from_dict({"version": 1, "passes": [{name: given}]}))
    for whole in (given, {"version": 1, "passes": [given]}):
        refused(lambda whole=whole: Plan.from_dict(whole))


def test_a_plan_in_itself() -> None:
    plan: dict[str, Any] = {"version": 1}
    plan["passes"] = [plan]
    assert "one item names one pass" in refused(lambda: Plan.from_dict(plan))
    options: dict[str, Any] = {}
    options["keep"] = options
    assert "is not an amount" in refused(lambda: Plan.from_dict({"version": 1, "passes": [{"cluster_merge": options}]}))
