"""Models as people bring them, from eight kinds of libraries, in tiny sizes and with random weights.

`MODELS` has them by name. It is a fixed list: a model that is hard stays on it. Besides torchvision, ultralytics,
diffusers and transformers this takes

    pip install --no-deps segmentation-models-pytorch pytorchcv vit-pytorch einops torchaudio
"""

from __future__ import annotations

from tools.wild.language import MODELS as LANGUAGE
from tools.wild.pictures import MODELS as PICTURES
from tools.wild.sequences import MODELS as SEQUENCES
from tools.wild.wrappers import Wild

__all__ = ["MODELS"]

MODELS: dict[str, Wild] = {**PICTURES, **LANGUAGE, **SEQUENCES}
