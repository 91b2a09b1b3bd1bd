"""Images: detection, segmentation, diffusion and classification, from the libraries that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tools.wild.wrappers import Call, Wild

__all__ = ["MODELS"]

LARGE, IMAGE, SMALL = "2x3x224x224", "2x3x64x64", "2x3x32x32"


def _yolo(name: str, inputs: str = IMAGE) -> Wild:
    def build() -> nn.Module:
        from ultralytics import YOLO

        return YOLO(name).model

    return Wild(build, inputs)


def _unet(name: str, encoder: str = "resnet18") -> Wild:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)(encoder, encoder_weights=None, classes=5)

    return Wild(build, IMAGE)


def _diffuser(kind: str, inputs: str, names: str = "sample timestep", **config: Any) -> Wild:
    def build() -> nn.Module:
        import diffusers

        return Call(getattr(diffusers, kind)(**config), names, "sample")

    return Wild(build, inputs)


def _pytorchcv(name: str, inputs: str = IMAGE) -> Wild:
    def build() -> nn.Module:
        from pytorchcv.model_provider import get_model

        model = get_model(name, pretrained=False)
        for key, index in model.named_buffers():
            if key.endswith("index"):  # which channels CondenseNet learned to read: none has been chosen yet
                index.copy_(torch.randperm(len(index)))
        return model

    return Wild(build, inputs)


def _vit(file: str, kind: str, inputs: str = SMALL, **options: Any) -> Wild:
    def build() -> nn.Module:
        import importlib

        return getattr(importlib.import_module(f"vit_pytorch.{file}"), kind)(**options)

    return Wild(build, inputs)


class Detector(nn.Module):
    """A detector of torchvision without what chooses boxes: features of the backbone and heads on them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, getattr(model, "head", None) or model.rpn.head

    def forward(self, x: Tensor) -> Any:
        """A batch of images to scores and boxes of every place."""
        return self.head(list(self.backbone(x).values()))


class Boxes(nn.Module):
    """A detector of torchvision as it is called: a list with one image; of its answer boxes and scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """A batch of one image."""
        found = self.model([x[0]])[0]
        return found["boxes"], found["scores"]


def _detection(name: str, wrapper: Callable[[Any], nn.Module] = Detector) -> Wild:
    def build() -> nn.Module:
        from torchvision.models import detection

        return wrapper(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5))

    return Wild(build, IMAGE)


_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}

_YOLO = {
    "yolov5n": _yolo("yolov5n.yaml"),
    "yolov8n": _yolo("yolov8n.yaml"),
    "yolov10n": _yolo("yolov10n.yaml"),
    "yolo11n": _yolo("yolo11n.yaml"),
    "yolo11n_seg": _yolo("yolo11n-seg.yaml"),
    "yolo11n_pose": _yolo("yolo11n-pose.yaml"),
    "yolo11n_cls": _yolo("yolo11n-cls.yaml"),
    "yolo12n": _yolo("yolo12n.yaml"),
}

_DIFFUSERS = {
    "unet_2d": _diffuser(
        "UNet2DModel", "2x3x16x16,2:int64", sample_size=16, **_BLOCKS, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "unet_2d_condition": _diffuser(
        "UNet2DConditionModel", "2x4x16x16,2:int64,2x5x24", "sample timestep encoder_hidden_states", sample_size=16,
        **_BLOCKS, attention_head_dim=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "unet_1d": _diffuser(
        "UNet1DModel", "2x2x32,2:int64", sample_size=32, block_out_channels=(32, 32, 64), layers_per_block=1, norm_num_groups=4,
        extra_in_channels=64,
    ),
    "autoencoder_kl": _diffuser(
        "AutoencoderKL", SMALL, "sample", **_BLOCKS, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "autoencoder_tiny": _diffuser(
        "AutoencoderTiny", SMALL, "sample", encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "dit": _diffuser(
        "DiTTransformer2DModel", "2x4x8x8,2:int64,2:int64", "hidden_states timestep class_labels", **_HEADS,
        in_channels=4, out_channels=8, sample_size=8, patch_size=2, norm_num_groups=4,
    ),
    "pixart": _diffuser(
        "PixArtTransformer2DModel", "2x4x8x8,2x5x24,2:int64", "hidden_states encoder_hidden_states timestep", **_HEADS,
        in_channels=4, out_channels=8, sample_size=8, patch_size=2, norm_num_groups=4, caption_channels=24,
        cross_attention_dim=16, use_additional_conditions=False,
    ),
    "sd3": _diffuser(
        "SD3Transformer2DModel", "2x4x8x8,2x5x24,2x32,2:int64", "hidden_states encoder_hidden_states pooled_projections timestep",
        **_HEADS, in_channels=4, out_channels=4, sample_size=8, joint_attention_dim=24, caption_projection_dim=16,
        pooled_projection_dim=32, pos_embed_max_size=8,
    ),
}  # fmt: skip

_SEGMENTATION = {
    "smp_unet": _unet("Unet"),
    "smp_unetplusplus": _unet("UnetPlusPlus"),
    "smp_manet": _unet("MAnet"),
    "smp_linknet": _unet("Linknet"),
    "smp_fpn": _unet("FPN"),
    "smp_pspnet": _unet("PSPNet"),
    "smp_deeplabv3plus": _unet("DeepLabV3Plus"),
    "smp_segformer": _unet("Segformer", "mit_b0"),
}

_DETECTION = {
    "fasterrcnn": _detection("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "retinanet": _detection("retinanet_resnet50_fpn"),
    "fcos": _detection("fcos_resnet50_fpn"),
    "ssdlite": _detection("ssdlite320_mobilenet_v3_large"),
    "ssdlite_boxes": _detection("ssdlite320_mobilenet_v3_large", Boxes),
}

_PYTORCHCV = {
    "hardnet39ds": _pytorchcv("hardnet39ds", LARGE),
    "condensenet74_c4_g4": _pytorchcv("condensenet74_c4_g4", LARGE),
    "resnesta18": _pytorchcv("resnesta18"),
    "peleenet": _pytorchcv("peleenet", LARGE),
    "igcv3_wd4": _pytorchcv("igcv3_wd4", LARGE),
    "squeezenext": _pytorchcv("sqnxt23_w1", LARGE),
    "cbam_resnet18": _pytorchcv("cbam_resnet18", LARGE),
    "menet": _pytorchcv("menet108_8x1_g3", LARGE),
    "lednet": _pytorchcv("lednet_cityscapes"),
}

_VITS = {
    "vit_pytorch": _vit("vit", "ViT", image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64, dim_head=8),
    "cait": _vit(
        "cait", "CaiT", image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, cls_depth=1, heads=4, mlp_dim=64, dim_head=8
    ),
    "t2t": _vit("t2t", "T2TViT", dim=32, image_size=32, depth=2, heads=4, mlp_dim=64, num_classes=5, t2t_layers=((7, 4), (3, 2))),
    "xcit": _vit(
        "xcit", "XCiT", image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, cls_depth=1, heads=4, mlp_dim=64, dim_head=8
    ),
    "cvt": _vit(
        "cvt", "CvT", num_classes=5, s1_emb_dim=16, s1_depth=1, s2_emb_dim=24, s2_heads=2, s2_depth=1, s3_emb_dim=32, s3_heads=2,
        s3_depth=1,
    ),
    "twins": _vit(
        "twins_svt", "TwinsSVT", LARGE, num_classes=5, s1_emb_dim=16, s2_emb_dim=16, s3_emb_dim=32, s4_emb_dim=32, s1_local_patch_size=4,
        s2_local_patch_size=4, s3_local_patch_size=2, s4_local_patch_size=1, s3_depth=1,
    ),
    "crossformer": _vit("crossformer", "CrossFormer", LARGE, num_classes=5, dim=(32, 32, 64, 64), depth=(1, 1, 1, 1)),
    "vivit": _vit(
        "vivit", "ViViT", "2x3x4x32x32", image_size=32, frames=4, image_patch_size=8, frame_patch_size=2, num_classes=5, dim=32,
        spatial_depth=1, temporal_depth=1, heads=4, mlp_dim=64, dim_head=8,
    ),
}  # fmt: skip

MODELS = {**_YOLO, **_DIFFUSERS, **_SEGMENTATION, **_DETECTION, **_PYTORCHCV, **_VITS}
