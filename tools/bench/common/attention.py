"""Attention of transformers, whose modules keep the widths of their heads beside their layers."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["attentions", "heads_of", "narrow_heads"]


def attentions(model: nn.Module) -> list[Any]:
    """Its attention modules, in order."""
    named: list[Any] = [each for each in model.modules() if hasattr(each, "num_attention_heads")]
    return [each for each in named if hasattr(each, "query")]


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """How many heads each layer of queries, keys and values has, as Torch-Pruning wants to be told."""
    return {
        layer: each.num_attention_heads for each in attentions(model) for layer in (each.query, each.key, each.value)
    }


def narrow_heads(model: nn.Module) -> None:
    """Tell attention modules how wide their heads are after their layers were made narrower, in place."""
    for each in attentions(model):
        each.attention_head_size = each.query.out_features // each.num_attention_heads
        each.all_head_size = each.query.out_features
