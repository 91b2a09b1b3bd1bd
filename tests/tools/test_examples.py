"""The examples of the papers' methods on scikit-learn's digits: they run as they stand, and lose little."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("csgd_digits", "zip_digits", "factors_digits", "domains_digits")


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "plans").glob("*_digits.yaml")), ids=lambda path: path.stem)
def test_plans_are_of_one_pass_and_say_their_inputs(path: Path) -> None:
    plan = gz.Plan.load(path)
    assert len(plan.passes) == 1
    assert plan.inputs is not None


def test_two_networks_become_one(examples: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before, after, compiled = examples["zip_digits"].main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("zipped zip/")] == [
        "zipped zip/0",
        "zipped zip/2",
    ]
    assert min(before.values()) > 0.9
    assert all(after[name] > before[name] - 0.03 for name in before)
    whole, left = compiled.report.before.params, compiled.report.after.params
    assert left < 0.52 * whole
    details = compiled.report.passes[0]["zip"]
    assert details["shared"] == 1.0
    assert details["shared_of_all"] == pytest.approx(2 * (whole - left) / whole)
    assert "of all, heads counted" in str(compiled.report)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["acdc", "csg"])
def test_kernels_as_factors(examples: dict[str, Any], plan: str) -> None:
    dense, fitted, trained, compiled = examples["factors_digits"].factored(plan, 4)
    assert dense > 0.95
    assert fitted > dense - 0.15
    assert trained > dense - 0.03
    assert compiled.report.after.params < 0.5 * compiled.report.before.params


@pytest.mark.slow
def test_two_domains_share_weights(examples: dict[str, Any]) -> None:
    before, after, compiled = examples["domains_digits"].main()
    assert before > 0.93
    assert after > before - 0.03
    assert compiled.report.after.params < 0.3 * compiled.report.before.params
