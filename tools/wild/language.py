"""Forty families of transformers and what else reads tokens."""

from __future__ import annotations

from typing import Any

from tools.wild.wrappers import Wild, hugging_face

__all__ = ["MODELS"]

TOKENS, IMAGE = "2x12:int64", "2x3x32x32"
_CACHELESS = {"use_cache": False}

_TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_TEXT, **_ENDS, "num_key_value_heads": 2, "head_dim": 8}
_IMAGES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip
_BOTH: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip


def _reads(kind: str, **config: Any) -> Wild:
    return hugging_face(kind, TOKENS, **config)


def _writes(kind: str, **config: Any) -> Wild:
    return hugging_face(kind, TOKENS, call=_CACHELESS, **config)


def _translates(kind: str, **config: Any) -> Wild:
    return hugging_face(kind, f"{TOKENS},{TOKENS}", names="input_ids decoder_input_ids", call=_CACHELESS, **config)


def _sees(kind: str, inputs: str = IMAGE, field: str = "logits", **config: Any) -> Wild:
    return hugging_face(kind, inputs, names="pixel_values", field=field, **config)


_CLASSIFY: dict[str, Any] = {**_TEXT, "num_labels": 5}
_MIXTURE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
_MAMBA: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

_ENCODERS = {
    "bert": _reads("BertForSequenceClassification", **_CLASSIFY),
    "roberta": _reads("RobertaForSequenceClassification", **_CLASSIFY),
    "albert": _reads("AlbertForSequenceClassification", **_CLASSIFY, embedding_size=16),
    "electra": _reads("ElectraForSequenceClassification", **_CLASSIFY, embedding_size=16),
    "deberta_v2": _reads(
        "DebertaV2ForSequenceClassification", **_CLASSIFY, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "mpnet": _reads("MPNetForSequenceClassification", **_CLASSIFY),
    "distilbert": _reads(
        "DistilBertForSequenceClassification", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=5
    ),
    "fnet": _reads("FNetForSequenceClassification", **_CLASSIFY),
    "nystromformer": _reads("NystromformerForSequenceClassification", **_CLASSIFY, num_landmarks=4, segment_means_seq_len=12),
    "convbert": _reads("ConvBertForSequenceClassification", **_CLASSIFY, embedding_size=32, head_ratio=2),
    "squeezebert": _reads("SqueezeBertForSequenceClassification", **_CLASSIFY, embedding_size=32),
    "mobilebert": _reads(
        "MobileBertForSequenceClassification", **_CLASSIFY, embedding_size=16, intra_bottleneck_size=16
    ),
    "modernbert": _reads("ModernBertForSequenceClassification", **_CLASSIFY, **_ENDS, cls_token_id=1, sep_token_id=2),
    "xlnet": _reads("XLNetForSequenceClassification", vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64, num_labels=5),
    "funnel": _reads(
        "FunnelForSequenceClassification", vocab_size=99, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=64,
        num_labels=5,
    ),
}  # fmt: skip

_DECODERS = {
    "gpt2": _writes("GPT2LMHeadModel", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": _writes("GPTNeoXForCausalLM", **_TEXT),
    "gptj": _writes("GPTJForCausalLM", vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "opt": _writes(
        "OPTForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    "bloom": _writes("BloomForCausalLM", vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "llama": _writes("LlamaForCausalLM", **_GROUPED),
    "mistral": _writes("MistralForCausalLM", **_GROUPED),
    "qwen3": _writes("Qwen3ForCausalLM", **_GROUPED),
    "gemma2": _writes("Gemma2ForCausalLM", **_GROUPED),
    "phi": _writes("PhiForCausalLM", **_TEXT, partial_rotary_factor=0.5),
    "falcon": _writes("FalconForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "stablelm": _writes("StableLmForCausalLM", **_TEXT, num_key_value_heads=2),
    "olmo2": _writes("Olmo2ForCausalLM", **_TEXT, **_ENDS, num_key_value_heads=2),
    "cohere": _writes("CohereForCausalLM", **_TEXT, **_ENDS, num_key_value_heads=2),
    "mixtral": _writes("MixtralForCausalLM", **_MIXTURE, num_local_experts=4),
    "qwen3_moe": _writes("Qwen3MoeForCausalLM", **_MIXTURE, num_experts=4, moe_intermediate_size=32),
    "deepseek_v3": _writes(
        "DeepseekV3ForCausalLM", **_TEXT, **_ENDS, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "mamba": _writes("MambaForCausalLM", **_MAMBA),
    "mamba2": _writes("Mamba2ForCausalLM", **_MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    "rwkv": _writes("RwkvForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "recurrent_gemma": _writes(
        "RecurrentGemmaForCausalLM", **_GROUPED, lru_width=32, attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
}  # fmt: skip

_TRANSLATORS = {
    "t5": _translates(
        "T5ForConditionalGeneration", vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    ),
    "bart": _translates("BartForConditionalGeneration", **_BOTH),
    "pegasus": _translates("PegasusForConditionalGeneration", **_BOTH),
    "m2m_100": _translates("M2M100ForConditionalGeneration", **_BOTH),
}

_VISION = {
    "hf_vit": _sees("ViTForImageClassification", **_IMAGES),
    "beit": _sees("BeitForImageClassification", **_IMAGES),
    "dinov2": _sees("Dinov2ForImageClassification", **_IMAGES),
    "swinv2": _sees(
        "Swinv2ForImageClassification", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4, num_labels=5,
    ),
    "convnextv2": _sees(
        "ConvNextV2ForImageClassification", num_stages=3, hidden_sizes=[8, 16, 24], depths=[1, 2, 1], num_labels=5
    ),
    "segformer": _sees(
        "SegformerForSemanticSegmentation", "2x3x64x64", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32, num_labels=5,
    ),
    "mobilevit": _sees(
        "MobileViTForImageClassification", "2x3x64x64", image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 16, 16, 24, 32, 32, 64], num_attention_heads=2, num_labels=5,
    ),
    "pvt": _sees(
        "PvtForImageClassification", "2x3x64x64", image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], num_labels=5,
    ),
    "levit": _sees(
        "LevitForImageClassification", "2x3x64x64", image_size=64, hidden_sizes=[16, 24, 32], depths=[1, 1, 1],
        num_attention_heads=[2, 3, 4], key_dim=[8, 8, 8], num_labels=5,
    ),
    "sam": hugging_face(
        "SamVisionModel", "2x3x32x32", names="pixel_values", field="last_hidden_state", hidden_size=32, output_channels=16,
        num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, mlp_dim=64, window_size=2,
        global_attn_indexes=[1], initializer_range=0.02,
    ),
    "siglip": _sees(
        "SiglipForImageClassification",
        vision_config={key: value for key, value in _IMAGES.items() if key != "num_labels"}, num_labels=5,
    ),
    "clip": hugging_face(
        "CLIPModel", f"{TOKENS},{IMAGE}", names="input_ids pixel_values", field="logits_per_image", projection_dim=16,
        text_config={**_TEXT, "eos_token_id": 1},
        vision_config={key: value for key, value in _IMAGES.items() if key != "num_labels"},
    ),
    "yolos": _sees("YolosForObjectDetection", **{**_IMAGES, "image_size": [32, 32]}, num_detection_tokens=5),
}  # fmt: skip

MODELS = {**_ENCODERS, **_DECODERS, **_TRANSLATORS, **_VISION}
