"""Small folders of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def llama(**options: Any) -> Any:
    """A decoder of 2 layers; `options` of its config."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | heads | options))).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that is in the files of a folder, by name."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
