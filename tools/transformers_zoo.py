"""Small transformers with random weights, one factory each, for `tools/zoo.py`.

    python tools/zoo.py tools/transformers_zoo.py:bert@2x12:int64

`MODELS` names all of them with the inputs that they take. Each has a head, so that the residual stream is not an
output, and returns tensors only.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import Tensor, nn

TOKENS, IMAGE = "2x12:int64", "2x3x32x32"

_TEXT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip


class Logits(nn.Module):
    """The scores of a model whose output is a structure."""

    def __init__(self, model: nn.Module, field: str = "logits", **options: Any) -> None:
        super().__init__()
        self.model = model.eval()
        self.field = field
        self.options = options

    def forward(self, x: Tensor) -> Any:
        """`x` is a batch of images, or of tokens."""
        return getattr(self.model(x, **self.options), self.field)


class Pooled(nn.Module):
    """A linear head on the mean of what an encoder makes of tokens."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder.eval()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Any:
        """`x` is a batch of tokens."""
        return self.head(self.encoder(input_ids=x).last_hidden_state.mean(1))


def vit() -> nn.Module:
    """Vision Transformer."""
    return Logits(hf.ViTForImageClassification(hf.ViTConfig(**_IMAGES)))


def deit() -> nn.Module:
    """DeiT with its distillation token."""
    return Logits(hf.DeiTForImageClassification(hf.DeiTConfig(**_IMAGES)))


def swin() -> nn.Module:
    """Swin, with shifted windows."""
    config = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return Logits(hf.SwinForImageClassification(config))


def convnext() -> nn.Module:
    """ConvNeXt."""
    config = hf.ConvNextConfig(num_stages=3, hidden_sizes=[8, 16, 24], depths=[1, 2, 1], num_labels=5)
    return Logits(hf.ConvNextForImageClassification(config))


def bert() -> nn.Module:
    """BERT."""
    return Logits(hf.BertForSequenceClassification(hf.BertConfig(**_TEXT, intermediate_size=64, num_labels=5)))


def distilbert() -> nn.Module:
    """DistilBERT."""
    config = hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=5)
    return Logits(hf.DistilBertForSequenceClassification(config))


def gpt2() -> nn.Module:
    """GPT-2 with its tied head."""
    config = hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return Logits(hf.GPT2LMHeadModel(config), use_cache=False)


def llama() -> nn.Module:
    """Llama: grouped queries, rotary positions, RMS norm, SwiGLU."""
    config = hf.LlamaConfig(**_TEXT, intermediate_size=64, num_key_value_heads=2)
    return Logits(hf.LlamaForCausalLM(config), use_cache=False)


def t5() -> nn.Module:
    """The encoder of T5: relative positions, no biases."""
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return Pooled(hf.T5EncoderModel(config), 32)


def clip() -> nn.Module:
    """The image half of CLIP."""
    config = hf.CLIPVisionConfig(**{name: value for name, value in _IMAGES.items() if name != "num_labels"})
    return Logits(hf.CLIPVisionModelWithProjection(config), "image_embeds")


def clip_text() -> nn.Module:
    """The text half of CLIP."""
    config = hf.CLIPTextConfig(**_TEXT, intermediate_size=64, eos_token_id=98)
    return Logits(hf.CLIPTextModelWithProjection(config), "text_embeds")


MODELS = {
    "vit": IMAGE, "deit": IMAGE, "swin": IMAGE, "convnext": IMAGE, "bert": TOKENS, "distilbert": TOKENS,
    "gpt2": TOKENS, "llama": TOKENS, "t5": TOKENS, "clip": IMAGE, "clip_text": TOKENS,
}  # fmt: skip
