"""Widths of a kind that the config of transformers can say, so that a plan ends in a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphzip as gz

transformers: Any = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(4, 6) % 32
PARTS = "encoder.block.0.layer.1", "decoder.block.0.layer.2"


def decoder(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


def planned(model: Any, **options: Any) -> gz.Plan:
    inputs = {"input_ids": IDS[:2]}
    data = [{"input_ids": IDS}]
    how: dict[str, Any] = {"calibration": data, "outputs": "logits", "uniform": True, "effort": "fast"}
    return gz.plan_for(model, inputs, macs=0.8, **how, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_uniform_plan_of_a_decoder_goes_back_into_a_folder(kind: str, tmp_path: Path) -> None:
    decoder(kind).save_pretrained(tmp_path / "whole")
    model = gz.from_pretrained(tmp_path / "whole")
    plan = planned(model)
    compiled = gz.compile(model, plan, {"input_ids": IDS[:2]}, outputs="logits", calibration=[{"input_ids": IDS}])
    assert compiled.report.after.macs <= 0.8 * compiled.report.before.macs
    gz.save_pretrained(compiled, model, tmp_path / "slim")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, compiled.module(input_ids=IDS)["logits"], rtol=1e-4, atol=1e-5)
    assert again.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 8)


def test_one_number_for_encoder_and_decoder_is_one_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "whole")
    model = gz.from_pretrained(tmp_path / "whole")
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    given = {"calibration": [batch], "outputs": "logits"}
    example = {name: value[:2] for name, value in batch.items()}
    plan = gz.plan_for(model, example, macs=0.8, uniform=True, effort="fast", **given)  # type: ignore[arg-type]
    compiled = gz.compile(model, plan, example, **given)  # type: ignore[arg-type]
    slim: Any = gz.save_pretrained(compiled, model, tmp_path / "slim")
    assert slim.config.d_ff < 32
    assert {slim.get_parameter(f"{part}.DenseReluDense.wi.weight").shape[0] for part in PARTS} == {slim.config.d_ff}


def mixture() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config = transformers.Qwen3MoeConfig(vocab_size=32, **sizes, **heads, **experts)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def test_stacked_experts_keep_widths_that_their_class_computes(tmp_path: Path) -> None:
    model = mixture()
    given: dict[str, Any] = {"calibration": [{"input_ids": IDS}], "outputs": "logits"}
    heads = gz.ClusterMerge(exclude=("*attn*",))
    plan = gz.plan_for(model, {"input_ids": IDS[:2]}, params=0.85, uniform=True, effort="fast", passes=[heads], **given)
    compiled = gz.compile(model, plan, {"input_ids": IDS[:2]}, **given)
    gz.save_pretrained(compiled, model, tmp_path / "slim")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim").eval()
    assert again.config.moe_intermediate_size in (4, 8, 12)
    assert again.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 8)


def test_other_widths_of_stacked_experts_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = mixture()
    plan = gz.Plan([gz.ClusterMerge(keep={"*experts*": 6})])
    compiled = gz.compile(model, plan, {"input_ids": IDS}, outputs="logits")
    said = r"'model\.layers\.0\.mlp\.experts\.down_proj' has a width that is no multiple of 4; .* round_to=4"
    with pytest.raises(gz.ArchiveError, match=said):
        gz.save_pretrained(compiled, model, tmp_path / "slim")


def test_a_config_that_says_no_width_is_named() -> None:
    with pytest.raises(gz.PlanError, match="uniform: the model's config says no width of what may shrink"):
        planned(decoder("gpt2"), passes=[gz.ClusterMerge(exclude=("*mlp*",))])
