"""Speech, time series, and recurrences written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tools.wild.wrappers import Wild, hugging_face

__all__ = ["MODELS"]

_SPEECH: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": (16, 16),
    "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "num_labels": 5, "classifier_proj_size": 16, "vocab_size": 9,
}  # fmt: skip
_WAVE = "2x640"


def _hears(kind: str, **config: Any) -> Wild:
    return hugging_face(kind, _WAVE, names="input_values", **{**_SPEECH, **config})


def _torchaudio(kind: str, inputs: str, **options: Any) -> Wild:
    def build() -> nn.Module:
        import torchaudio

        return getattr(torchaudio.models, kind)(**options)

    return Wild(build, inputs)


class ConvGRU(nn.Module):
    """A recurrence over frames whose state, zeros at first, is an image (Ballas et al., 2016)."""

    def __init__(self, inner: int = 3, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(inner + width, 2 * width, 3, padding=1)
        self.new = nn.Conv2d(inner + width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, frames, channels, height, width) to scores."""
        h = x.new_zeros(x.shape[0], self.width, x.shape[3], x.shape[4])
        for frame in x.unbind(1):
            reset, update = torch.sigmoid(self.gates(torch.cat([frame, h], 1))).chunk(2, 1)
            new = torch.tanh(self.new(torch.cat([frame, reset * h], 1)))
            h = (1 - update) * h + update * new
        return self.head(h.mean((2, 3)))


class Cells(nn.Module):
    """A loop of `nn.LSTMCell` or `nn.GRUCell` between two linear layers."""

    def __init__(self, cell: type[nn.RNNCellBase], width: int = 16) -> None:
        super().__init__()
        self.entry, self.cell, self.head = nn.Linear(8, 12), cell(12, width), nn.Linear(width, 5)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        """(n, time, 8) to scores."""
        state: Any = None
        for now in self.entry(x).unbind(1):
            state = self.cell(now, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Recurrence(nn.Module):
    """`h' = tanh(W x + U h)` written out, from zeros on."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.entry, self.back, self.head = nn.Linear(8, width), nn.Linear(width, width, bias=False), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, time, 8) to scores at every time."""
        h = torch.zeros(x.shape[0], self.back.in_features, dtype=x.dtype, device=x.device)
        states = []
        for now in self.entry(x).unbind(1):
            h = torch.tanh(now + self.back(h))
            states.append(h)
        return self.head(torch.stack(states, 1))


class Expert(nn.Module):
    """One of the experts of `Experts`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every row on its own."""
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """A mixture whose experts are a list, each weighted by a router (Jacobs et al., 1991)."""

    def __init__(self, width: int = 16, inner: int = 24, count: int = 4) -> None:
        super().__init__()
        self.entry, self.router = nn.Linear(8, width), nn.Linear(width, count)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(count))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) to scores."""
        x = self.entry(x)
        weights = self.router(x).softmax(-1)
        mixed = sum(weights[:, k, None] * expert(x) for k, expert in enumerate(self.experts))
        return self.head(x + mixed)


class Blocks(nn.Module):
    """N-BEATS (Oreshkin et al., 2020): every block takes away what it explains and adds what it forecasts."""

    def __init__(self, past: int = 24, future: int = 8, width: int = 32, count: int = 3) -> None:
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(past, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, past + future)
            )
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, past) to (n, future)."""
        forecast: Any = 0
        for block in self.blocks:
            made = block(x)
            x, forecast = x - made[:, : self.past], forecast + made[:, self.past :]
        return forecast


class Dilated(nn.Module):
    """A temporal convolutional network (Bai et al., 2018): padded on the left, residual, weight-normed."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.entry = nn.Conv1d(4, width, 1)
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 3, dilation=2**k)) for k in range(depth)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, time) to scores."""
        x = self.entry(x)
        for k, layer in enumerate(self.layers):
            x = torch.relu(x + layer(nn.functional.pad(x, (2 * 2**k, 0))))
        return self.head(x[..., -1])


_AUDIO = {
    "wav2vec2": _hears("Wav2Vec2ForSequenceClassification"),
    "hubert": _hears("HubertForSequenceClassification"),
    "wavlm": _hears("WavLMForSequenceClassification", num_buckets=8, max_bucket_distance=16),
    "whisper": hugging_face(
        "WhisperForConditionalGeneration", "2x8x40,2x6:int64", names="input_features decoder_input_ids",
        call={"use_cache": False}, vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=20, max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "ast": hugging_face(
        "ASTForAudioClassification", "2x32x16", names="input_values", hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, patch_size=4, max_length=32, num_mel_bins=16, frequency_stride=4,
        time_stride=4, num_labels=5,
    ),
    "wav2letter": _torchaudio("Wav2Letter", "2x1x640", num_classes=5),
    "conv_tasnet": _torchaudio(
        "ConvTasNet", "2x1x160", num_sources=2, enc_kernel_size=8, enc_num_feats=16, msk_kernel_size=3, msk_num_feats=8,
        msk_num_hidden_feats=16, msk_num_layers=2, msk_num_stacks=2,
    ),
    "deepspeech": _torchaudio("DeepSpeech", "2x1x12x16", n_feature=16, n_hidden=32, n_class=5),
    "wavernn": _torchaudio(
        "WaveRNN", "2x1x16,2x1x8x8", upsample_scales=[2, 2], n_classes=8, hop_length=4, n_res_block=2, n_rnn=16, n_fc=16,
        n_freq=8, n_hidden=16, n_output=16,
    ),
}  # fmt: skip

_SERIES = {
    "patchtst": hugging_face(
        "PatchTSTForPrediction", "2x24x3", names="past_values", field="prediction_outputs", num_input_channels=3,
        context_length=24, prediction_length=8, patch_length=4, patch_stride=4, d_model=16, num_attention_heads=2,
        num_hidden_layers=2, ffn_dim=32, loss="mse", scaling=None,
    ),
    "patchtsmixer": hugging_face(
        "PatchTSMixerForPrediction", "2x24x3", names="past_values", field="prediction_outputs", num_input_channels=3,
        context_length=24, prediction_length=8, patch_length=4, patch_stride=4, d_model=16, num_layers=2,
    ),
    "n_beats": Wild(Blocks, "2x24"),
    "tcn": Wild(Dilated, "2x4x32"),
}  # fmt: skip

_BY_HAND = {
    "conv_gru": Wild(ConvGRU, "2x4x3x8x8"),
    "lstm_cells": Wild(lambda: Cells(nn.LSTMCell), "2x5x8"),
    "gru_cells": Wild(lambda: Cells(nn.GRUCell), "2x5x8"),
    "recurrence": Wild(Recurrence, "2x5x8"),
    "expert_list": Wild(Experts, "2x8"),
}

MODELS = {**_AUDIO, **_SERIES, **_BY_HAND}
