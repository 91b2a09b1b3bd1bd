"""Inputs by name: mappings as example inputs and as batches, and modules that are called as the original is."""

from __future__ import annotations

import inspect
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphzip as gz

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


class Encoder(nn.Module):
    """Takes what a transformer takes, most of it optional."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        kinds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
        twice: bool = False,
    ) -> Any:
        hidden = self.inner(self.embed(input_ids)).relu()
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        if kinds is not None:
            hidden = hidden + kinds[..., None]
        if scale is not None:
            hidden = hidden * scale
        logits = self.head(hidden.mean(1)) * (2 if twice else 1)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": (logits - labels).square().mean()}


def tokens(rows: int = 4) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(11, (rows, 7)), "attention_mask": torch.randint(2, (rows, 7)).float()}


@pytest.fixture
def model() -> Encoder:
    return Encoder().eval()


def test_what_is_compiled_by_name_is_called_by_name_and_by_position(model: Encoder, tmp_path: Path) -> None:
    batch = tokens()
    turned = dict(reversed(batch.items()))
    assert gz.channel_groups(model, turned).names == gz.channel_groups(model, tuple(batch.values())).names
    assert gz.cost(model, turned) == gz.cost(model, tuple(batch.values()))
    data = [{**tokens(3), "labels": torch.zeros(3, 3), "text": ["a"] * 3} for _ in range(2)]
    compiled = gz.compile(model, HALF, turned, calibration=data)
    assert compiled.module.get_submodule("inner").out_features == 4
    other = tokens(2)
    found = compiled.module(**other)["logits"]
    assert torch.equal(found, compiled.module(*other.values())["logits"])
    assert compiled.report.drift is not None
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.verify(tmp_path / "slim.onnx")
    compiled.save(tmp_path / "slim.graphzip")
    again = gz.load(tmp_path / "slim.graphzip")
    assert torch.equal(again.module(**other)["logits"], found)
    assert again.export(tmp_path / "again.onnx").verified
    with pytest.raises(TypeError, match="attention_mask"):
        compiled.module(input_ids=other["input_ids"])


def test_arguments_behind_a_gap_are_by_name_alone(model: Encoder, tmp_path: Path) -> None:
    batch = {**tokens(), "scale": torch.tensor(2.0), "labels": torch.zeros(4, 3)}
    compiled = gz.compile(model, gz.Plan([gz.FoldBatchNorm()]), batch, calibration=[batch])
    kinds = {each.name: each.kind.name for each in inspect.signature(compiled.module.forward).parameters.values()}
    assert list(kinds) == ["input_ids", "attention_mask", "labels", "scale"]
    assert set(list(kinds.values())[2:]) == {"KEYWORD_ONLY"}
    expected = model(**batch)
    for module in (compiled.module, _saved(compiled, tmp_path)):
        for name, value in module(**batch).items():
            torch.testing.assert_close(value, expected[name])
        with pytest.raises(TypeError):
            module(*batch.values())
    assert compiled.export(tmp_path / "slim.onnx").verified
    assert set(compiled.example_inputs) == set(batch)


def _saved(compiled: gz.Compiled, folder: Path) -> nn.Module:
    compiled.save(folder / "saved.graphzip")
    return gz.load(folder / "saved.graphzip").module


def test_defaults_stay_and_values_that_are_no_tensors_are_part_of_the_graph(model: Encoder) -> None:
    batch = {"input_ids": tokens()["input_ids"], "twice": True}
    compiled = gz.compile(model, gz.Plan([gz.FoldBatchNorm()]), batch)
    torch.testing.assert_close(compiled.module(**batch)["logits"], model(**batch)["logits"])
    with pytest.raises(gz.InputShapeError, match="argument 'twice' is False"):
        compiled.module(input_ids=batch["input_ids"], twice=False)


@pytest.mark.parametrize("form", ["mapping", "user", "tuple", "list"])
def test_batches_are_mappings_or_tuples_whatever_the_example_is(model: Encoder, form: str) -> None:
    forms: dict[str, Any] = {"mapping": dict, "user": UserDict, "tuple": lambda b: tuple(b.values())}
    forms["list"] = lambda b: [*b.values(), torch.zeros(1)]
    data = [forms[form](tokens()) for _ in range(3)]
    for example in (tokens(), tuple(tokens().values())):
        plan = gz.plan_for(model, example, params=0.7, calibration=data)
        compiled = gz.compile(model, plan, example, calibration=data)
        assert compiled.report.after.params <= 0.7 * compiled.report.before.params


def test_a_plan_needs_no_data_but_a_named_example(model: Encoder) -> None:
    plan = gz.plan_for(model, UserDict(tokens()), params=0.7)
    assert plan.inputs is None or not plan.inputs


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Encoder()

    def forward(self, x: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x, kinds=kinds)["logits"].softmax(1)
        return found


def test_a_submodule_that_is_called_by_name(tmp_path: Path) -> None:
    model = Around().eval()
    batch = {"kinds": torch.randn(4, 7), "x": torch.randint(11, (4, 7))}
    compiled = gz.compile(model, HALF, batch, scope="inner", calibration=[batch])
    assert compiled.module.get_submodule("inner.inner").out_features == 4
    assert compiled.module(**batch).shape == (4, 3)
    assert compiled.export(tmp_path / "slim.onnx").verified


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"input_id": torch.zeros(2, 7)}, "Encoder takes no argument 'input_id'; it takes input_ids, attention_mask"),
        ({"attention_mask": torch.zeros(2, 7)}, "Encoder needs 'input_ids', too; give it beside attention_mask"),
        ({3: torch.zeros(2, 7)}, "Encoder takes no argument 3"),
        ({"input_ids": torch.zeros(0, 7)}, "a batch of the shape"),
        ([torch.zeros(2, 7)], "must be a tuple of positional arguments, got list"),
    ],
)
def test_wrong_examples_are_refused(model: Encoder, example: Any, said: str) -> None:
    for call in (gz.channel_groups, gz.cost):
        with pytest.raises(gz.ExampleInputError, match=said):
            call(model, example)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"input_ids": torch.zeros(2, 7).long()}, "a batch has no 'attention_mask', which the example inputs have"),
        ({"text": ["a"]}, "a batch has no 'input_ids', which the example inputs have; it has text"),
        ({"input_ids": torch.zeros(0, 7).long(), "attention_mask": torch.zeros(0, 7)}, "has no sample"),
    ],
)
def test_wrong_batches_are_refused(model: Encoder, batch: Any, said: str) -> None:
    for example in (tokens(), tuple(tokens().values())):
        with pytest.raises(gz.ExampleInputError, match=said):
            gz.compile(model, HALF, example, calibration=[batch])


def test_a_tuple_does_not_say_what_is_behind_a_gap(model: Encoder) -> None:
    example = {**tokens(), "scale": torch.tensor(2.0)}
    with pytest.raises(gz.ExampleInputError, match="a batch has no 'scale', which the example inputs give by name"):
        gz.compile(model, HALF, example, calibration=[tuple(example.values())])


class Anything(nn.Module):
    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return sum(values[1:], values[0])


def test_a_mapping_needs_names() -> None:
    with pytest.raises(gz.ExampleInputError, match="arguments have no names; make it yield tuples"):
        gz.compile(Anything(), HALF, (torch.ones(2), torch.ones(2)), calibration=[{"a": torch.ones(2)}])


def test_several_models_take_names_that_follow_each_other() -> None:
    nets = {"one": Encoder().eval(), "two": Encoder().eval()}
    data = {name: [tokens() for _ in range(2)] for name in nets}
    plan = gz.Plan([gz.Zip(share=1.0)])
    compiled = gz.compile(nets, plan, {name: batches[0] for name, batches in data.items()}, calibration=data)
    batch = tokens()
    assert compiled.module(one=tuple(batch.values()), two=tuple(batch.values()))["one"]["logits"].shape == (4, 3)
    with pytest.raises(gz.ExampleInputError, match="task 'one': 'labels' does not follow the other arguments"):
        gz.compile(nets, plan, {key: {**batch, "labels": torch.zeros(4, 3)} for key in nets})
    with pytest.raises(gz.ExampleInputError, match="task 'one': example_inputs: Encoder takes no argument 'no'"):
        gz.compile(nets, plan, {key: {"no": torch.zeros(4, 3)} for key in nets})


def test_a_trace_knows_names(model: Encoder, tmp_path: Path) -> None:
    batch = {**tokens(), "scale": torch.tensor(2.0)}
    traced = gz.trace(model, batch, outputs="logits")
    assert set(traced.example_inputs) == set(batch)
    compiled = gz.compile(traced, gz.plan_for(traced, params=0.7, calibration=[batch]), calibration=[batch])
    assert compiled.module(**batch)["logits"].shape == (4, 3)
    assert compiled.export(tmp_path / "slim.onnx").verified
