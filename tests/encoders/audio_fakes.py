"""Tiny random audio models in folders, and sounds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

WINDOW = 50
"""Features of a full window of the tiny Whisper, which is one second."""

WHISPER = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 80,
    "max_source_positions": WINDOW,
    "max_target_positions": 20,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WAVE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 4, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 3,
}
GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
KINDS = ["wav2vec2-group", "wav2vec2-layer", "hubert-group", "hubert-layer", "wavlm-group", "wavlm-layer"]


@dataclass(frozen=True)
class Sound:
    samples_S: NDArray[np.float32]
    sample_rate: int = 16_000


def sound(num_samples: int, seed: int = 0) -> Sound:
    """A few tones and noise, at different strengths over time."""
    rng = np.random.default_rng(seed)
    time_S = np.arange(num_samples) / 16_000
    tones_S = sum(np.sin(2 * np.pi * rng.uniform(80, 4000) * time_S + rng.uniform(0, 6)) for _ in range(4))
    samples_S = 0.05 * tones_S * (1 + np.sin(9 * time_S)) + 0.02 * rng.standard_normal(num_samples)
    return Sound(samples_S.astype(np.float32))


def make_audio_model(kind: str, **options: Any) -> nn.Module:
    """A model of transformers with random weights: norms and biases away from 1 and 0, so that leaving one out shows."""
    import transformers as hf

    family, _, norm = kind.partition("-")
    if family == "whisper":
        model: nn.Module = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER | options))
    else:
        config = {"wav2vec2": hf.Wav2Vec2Config, "hubert": hf.HubertConfig, "wavlm": hf.WavLMConfig}[family]
        model = hf.AutoModel.from_config(config(**WAVE | (GROUP if norm == "group" else LAYER) | options))
    for number, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model.eval()


def save_audio_model(kind: str, folder: Path, **options: Any) -> nn.Module:
    """Makes a model, and saves it with its feature extractor."""
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    model: Any = make_audio_model(kind, **options)
    model.save_pretrained(folder)
    extractor: Any = WhisperFeatureExtractor(chunk_length=1) if kind == "whisper" else Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(folder)
    return model
