"""Detectors, encoder-decoders, diffusion and expert models of other packages go through the whole compiler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from real_models import Examined, Inputs, examine
from torch import Tensor, nn

pytestmark = pytest.mark.slow

YOLOS = ["yolov8n", "yolo11n", "yolo11n-seg", "yolo11n-pose", "yolov10n", "yolo12n", "yolo26n"]


def yolo(name: str, *, ran: bool) -> tuple[nn.Module, Inputs]:
    """A detector as its configuration makes it, but with batch norms that know what they read, and classes that are not
    all but excluded: without that next to nothing of the inputs is left in the outputs. Where it `ran`, it holds the
    anchors of these inputs.
    """
    tasks: Any = pytest.importorskip("ultralytics.nn.tasks")
    kind = {"seg": "SegmentationModel", "pose": "PoseModel"}.get(name.rpartition("-")[2], "DetectionModel")
    torch.manual_seed(0)
    model: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False).eval()
    images = torch.rand(2, 3, 64, 64)
    _adapt_norms(model, images)
    for key, parameter in model.named_parameters():
        if "cv3" in key and key.endswith(".bias"):
            nn.init.zeros_(parameter)
    if ran:
        with torch.no_grad():
            model(images)
    return model, (images,)


@torch.no_grad()
def _adapt_norms(model: nn.Module, images: Tensor) -> None:
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    model.eval()


def check(found: Examined, *, cut: float, refused: tuple[int, ...] = ()) -> None:
    assert found.worst < 1e-9
    assert found.params > cut
    assert found.refused == refused
    assert found.exported.verified, found.exported.unchecked
    assert all(map(math.isfinite, found.losses))
    assert found.reloaded == 0.0


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("name", YOLOS)
def test_detectors(name: str, ran: bool) -> None:
    model, inputs = yolo(name, ran=ran)
    found = examine(model, inputs, mode="train")
    check(found, cut=0.5, refused=(1, 3, 5) if ran else ())
    assert not found.untrained


def hugging_face() -> Any:
    torch.manual_seed(0)
    return pytest.importorskip("transformers")


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 98, (rows, length))


def test_bart_classifies() -> None:
    """The place of the last token of a text is found from its values."""
    hf = hugging_face()
    config = hf.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, num_labels=3,
        eos_token_id=2, pad_token_id=1, use_cache=False,
    )  # fmt: skip
    ids = tokens()
    ids[:, -1] = 2
    check(examine(hf.BartForSequenceClassification(config).eval(), (ids,)), cut=0.35)


def test_rt_detr() -> None:
    """Its decoder reads `len` of a tensor, which fixes the batch."""
    hf = hugging_face()
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[24, 32, 48], encoder_ffn_dim=48,
        encoder_attention_heads=4, d_model=32, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=48, num_queries=20,
        decoder_layers=2, decoder_attention_heads=4, num_denoising=0, num_labels=5,
    )  # fmt: skip
    found = examine(hf.RTDetrForObjectDetection(config).eval(), (torch.rand(2, 3, 64, 64),), "glhts")
    assert found.worst < 1e-9
    assert found.params > 0.5
    assert found.refused == (1, 3, 5)
    assert any("pixel_values.shape[0] = 2" in note for note in found.notes)


def test_unet_of_diffusers() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    found = examine(model, (torch.randn(2, 3, 16, 16), torch.tensor([3, 40])), "glhet")
    assert found.worst < 1e-9
    assert found.exported.verified, found.exported.unchecked


def test_dense_parts_of_mixtral_shrink() -> None:
    """Its grouped products exist in single precision only, so nothing is compared in double precision."""
    hf = hugging_face()
    config = hf.MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    found = examine(hf.MixtralForCausalLM(config).eval(), (tokens(),), "gh")
    assert found.params > 0.05
    assert found.macs > 0.3
