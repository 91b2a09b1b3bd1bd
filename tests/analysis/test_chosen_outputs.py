"""`outputs=`: what does not matter is not computed, and holds no channel fast."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphzip as gz

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])
Pair = namedtuple("Pair", ["logits", "features"])


class Talkative(nn.Module):
    """Logits, what is inside, and an auxiliary head; `form` says in which kind of structure."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form
        self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.body(x).relu()
        if self.form == "dict":
            return {"logits": self.head(hidden), "hidden": (hidden, 2 * hidden), "aux": self.aux(hidden)}
        if self.form == "named":
            return Pair(self.head(hidden), hidden)
        return self.head(hidden), [hidden, 2 * hidden], self.aux(hidden)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4)


@pytest.mark.parametrize("outputs", ["logits", ["logits"], 0, [0], ["log*"], ("logits", "logits"), [-3]])
def test_what_is_left_out_pins_nothing(x: torch.Tensor, outputs: Any) -> None:
    model = Talkative().eval()
    assert not gz.channel_groups(model, (x,))["body"].mergeable
    groups = gz.channel_groups(model, (x,), outputs=outputs)
    assert groups["body"].mergeable
    assert groups.names == ("body", "head")


@pytest.mark.parametrize(
    ("form", "outputs", "expected"),
    [
        ("dict", "logits", {"logits": 1, "hidden": None, "aux": None}),
        ("dict", ["hidden.1", "aux"], {"logits": None, "hidden": (None, 1), "aux": 1}),
        ("dict", "hidden", {"logits": None, "hidden": (1, 1), "aux": None}),
        ("tuple", [0], (1, None, None)),
        ("tuple", ["0", "1.0"], (1, [1, None], None)),
        ("tuple", ["*"], (1, [1, 1], 1)),
        ("named", "logits", Pair(1, None)),
    ],
)
def test_the_structure_stays_and_has_none_in_it(x: torch.Tensor, form: str, outputs: Any, expected: Any) -> None:
    model = Talkative(form).eval()
    compiled = gz.compile(model, gz.Plan([gz.FoldBatchNorm()]), (x,), outputs=outputs)
    found, whole = compiled.module(x), model(x)
    assert type(found) is type(whole)
    shown = torch.utils._pytree.tree_map(lambda leaf: None if leaf is None else 1, found)
    assert shown == expected
    leaves, known = (torch.utils._pytree.tree_leaves(each) for each in (found, whole))
    for leaf in leaves:
        assert leaf is None or any(torch.equal(leaf, each) for each in known)


def test_what_only_they_read_goes_and_the_report_says_so(x: torch.Tensor, tmp_path: Path) -> None:
    model = Talkative().double().eval()
    x = x.double()
    with torch.no_grad():
        model.body.weight[4:], model.body.bias[4:] = model.body.weight[:4], model.body.bias[:4]
    clusters = {"body": [[number, number + 4] for number in range(4)]}
    compiled = gz.compile(
        model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,), outputs=["logits"], calibration=[x]
    )
    assert {name for name, _ in compiled.module.named_children()} == {"body", "head"}
    assert "left out of the results, as asked for (outputs=): hidden, aux" in compiled.report.notes
    assert compiled.report.drift is not None
    assert compiled.report.drift < 1e-12
    for rows in (1, 5):
        batch = torch.randn(rows, 4, dtype=torch.float64)
        torch.testing.assert_close(compiled.module.train()(batch)["logits"], model(batch)["logits"])
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.save(tmp_path / "slim.graphzip")
    again = gz.load(tmp_path / "slim.graphzip").module(x)
    torch.testing.assert_close(again["logits"], model(x)["logits"])
    assert again["aux"] is None


def test_outputs_of_a_tuple_keep_their_names_in_the_file(x: torch.Tensor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    compiled = gz.compile(Talkative("tuple").eval(), gz.Plan([gz.FoldBatchNorm()]), (x,), outputs=[0, 2])
    compiled.export(tmp_path / "slim.onnx")
    assert [each.name for each in onnx.load(tmp_path / "slim.onnx").graph.output] == ["output", "output_2"]


@pytest.mark.parametrize("outputs", ["logit", 3, ["logits", "hidden.2"], [-4]])
def test_an_output_that_is_not_there_is_named_with_those_that_are(x: torch.Tensor, outputs: Any) -> None:
    with pytest.raises(gz.NotFoundError, match=r"names; it returns logits, hidden\.0, hidden\.1, aux"):
        gz.channel_groups(Talkative().eval(), (x,), outputs=outputs)


@pytest.mark.parametrize("outputs", [[], True, 1.5, [None], {"logits": 1}])
def test_what_names_no_outputs_is_refused(x: torch.Tensor, outputs: Any) -> None:
    with pytest.raises(gz.GraphZipError, match=r"outputs: .* names no outputs; give names"):
        gz.channel_groups(Talkative().eval(), (x,), outputs=outputs)


def test_the_only_output_is_called_output(x: torch.Tensor) -> None:
    assert gz.channel_groups(nn.Linear(4, 2), (x,), outputs="output").names == ("weight",)
    with pytest.raises(gz.NotFoundError, match="it returns output"):
        gz.channel_groups(nn.Linear(4, 2), (x,), outputs="logits")


class Around(nn.Module):
    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads, self.inner, self.last = reads, Talkative(), nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.inner(x)
        return self.last(found["logits"]) + (found["aux"].sum() if self.reads == "both" else 0)


def test_with_a_scope_they_are_those_of_the_submodule(x: torch.Tensor) -> None:
    model = Around("logits").eval()
    compiled = gz.compile(model, HALF, (x,), scope="inner", outputs=["logits"])
    assert compiled.module.get_submodule("inner.body").out_features == 4
    assert compiled.module(x).shape == model(x).shape
    with pytest.raises(gz.ExampleInputError, match="Around reads more of what its 'inner' returns"):
        gz.compile(Around("both").eval(), HALF, (x,), scope="inner", outputs=["logits"])


class TwoForms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.body(x).relu()
        return (self.head(hidden), self.aux(hidden)) if self.training else (self.head(hidden), hidden)


def test_with_both_forms_the_training_form_returns_what_it_did(x: torch.Tensor) -> None:
    compiled = gz.compile(TwoForms().eval(), HALF, (x,), outputs=[0], mode="train")
    assert compiled.module.get_submodule("body").out_features == 4
    assert compiled.module(x)[1] is None
    assert [part.shape for part in compiled.module.train()(x)] == [(3, 3), (3, 2)]


def test_several_models_have_outputs_each(x: torch.Tensor) -> None:
    nets = {"one": Talkative().eval(), "two": Talkative("tuple").eval()}
    inputs = dict.fromkeys(nets, (x,))
    data = {name: [x] for name in nets}
    compiled = gz.compile(
        nets, gz.Plan([gz.Zip(share=1.0)]), inputs, calibration=data, outputs={"one": "logits", "two": 0}
    )
    found = compiled.module(one=x, two=x)
    assert found["one"]["aux"] is None
    assert found["two"][1] is None


def test_a_plan_for_a_budget_knows_outputs_scope_and_sizes() -> None:
    model, images = Around("logits").eval(), [torch.randn(8, 4) for _ in range(3)]
    options: dict[str, Any] = {"scope": "inner", "outputs": ["logits"]}
    plan = gz.plan_for(model, (images[0],), params=0.7, calibration=images, **options)
    compiled = gz.compile(model, plan, (images[0],), calibration=images, **options)
    assert compiled.report.after.params <= 0.7 * compiled.report.before.params
    assert compiled.module(images[0]).shape == (8, 5)
    seen = []

    def score(module: nn.Module) -> float:
        seen.append(module(images[0]).shape)
        return 0.0

    gz.plan_for(model, (images[0],), params=0.7, evaluate=score, **options)
    assert set(seen) == {(8, 5)}
