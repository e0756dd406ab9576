"""Whisper as CTranslate2 stores it (`model.bin`), rewritten as the folder that transformers reads.

Shape suffixes: V vocabulary, N positions, D width, F width of the feed-forward layer, M mel channels, K kernel.
"""

import json
import re
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

DTYPES = ("<f4", "i1", "<i2", "<i4", "<f2")
"""numpy's names of CTranslate2's data types, by number (ctranslate2 `include/ctranslate2/types.h`)."""
SPEC, BINARY_VERSION, SPEC_REVISION = "WhisperSpec", 6, 3

NAMES = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "layer_norm": ("layer_norm",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""transformers' modules behind each of CTranslate2's; where there are several, their outputs are stacked."""
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
"""What a tensor is; any other last name is a setting, such as `num_heads`."""
LAYER = re.compile(r"layer_(\d+)")

PREPROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "WhisperProcessor",
    "sampling_rate": 16000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "feature_size": 80,
    "padding_value": 0.0,
    "return_attention_mask": False,
}
TOKENIZER = {
    "tokenizer_class": "WhisperTokenizer",
    "processor_class": "WhisperProcessor",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}


def convert_whisper(model_file: Path, tokenizer_file: Path, folder: Path) -> None:
    """CTranslate2's `model.bin` of an English-only Whisper to a transformers folder: model, tokenizer, feature extractor.

    Half-precision weights become float32, which changes no number.

    Args:
        model_file: The weights and their names.
        tokenizer_file: `tokenizer.json` of the same model.
        folder: Gets the files.

    Raises:
        ValueError: The file is of another layout, cut, or quantised.
    """
    from transformers import GenerationConfig, WhisperConfig

    tensors = read_ctranslate2(model_file)
    weights = dict(_transformers_weights(tensors))
    vocab_size, d_model = weights["model.decoder.embed_tokens.weight"].shape
    tokens = {token["content"]: token["id"] for token in json.loads(tokenizer_file.read_text("utf-8"))["added_tokens"]}
    start, end = tokens["<|startoftranscript|>"], tokens["<|endoftext|>"]
    special_ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    ffn_dim = weights["model.encoder.layers.0.fc1.weight"].shape[0]
    config = WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
        vocab_size=vocab_size,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        d_model=d_model,
        encoder_layers=_count_layers(tensors, "encoder"),
        decoder_layers=_count_layers(tensors, "decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=ffn_dim,
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        tie_word_embeddings=True,
        **special_ids,
    )
    generation = GenerationConfig(
        max_length=config.max_target_positions,
        begin_suppress_tokens=[end],  # a transcript has at least one word
        is_multilingual=False,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        return_timestamps=False,
        **special_ids,
    )
    save_file(weights, folder / "model.safetensors")
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    preprocessor = PREPROCESSOR | {"feature_size": config.num_mel_bins}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    tokenizer = TOKENIZER | {"model_max_length": config.max_target_positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


def read_ctranslate2(path: Path) -> dict[str, NDArray]:
    """The tensors and settings of a CTranslate2 model of Whisper, by name.

    Little endian throughout (ctranslate2 `python/ctranslate2/specs/model_spec.py`): the header, then each tensor as name, rank,
    dimensions, data type, number of bytes, data. Names that stand for another tensor follow, and are left out.

    Raises:
        ValueError: The file is of another layout, or ends too early.
    """
    with path.open("rb") as file:
        version, spec, revision = _integer(file, 4), _string(file), _integer(file, 4)
        if (version, spec, revision) != (BINARY_VERSION, SPEC, SPEC_REVISION):
            raise ValueError(
                f"{path} holds {spec!r} revision {revision} in layout {version}, "
                f"expected {SPEC!r} revision {SPEC_REVISION} in layout {BINARY_VERSION}: give such a file, or extend the reader"
            )
        return dict(_tensor(file) for _ in range(_integer(file, 4)))


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{file.name} ends {size - len(data)} bytes too early: it is cut; get it again")
    return data


def _integer(file: BinaryIO, size: int) -> int:
    return int.from_bytes(_read(file, size), "little")


def _string(file: BinaryIO) -> str:
    """A string, whose stored length counts a closing zero byte."""
    return _read(file, _integer(file, 2)).removesuffix(b"\0").decode("utf-8", errors="replace")


def _tensor(file: BinaryIO) -> tuple[str, NDArray]:
    name = _string(file)
    shape = [_integer(file, 4) for _ in range(_integer(file, 1))]
    number = _integer(file, 1)
    if number >= len(DTYPES):
        raise ValueError(f"{file.name}: {name} has data type {number}, expected one of 0 to {len(DTYPES) - 1}")
    data = _read(file, _integer(file, 4))
    return name, np.frombuffer(data, DTYPES[number]).reshape(shape)


def _transformers_weights(tensors: dict[str, NDArray]) -> list[tuple[str, Tensor]]:
    """Weights by transformers' names."""
    weights = []
    for name, array in tensors.items():
        side, *middle, kind = name.split("/")
        if kind not in KINDS:
            continue
        layer = LAYER.fullmatch(middle[0])
        module, prefix = "/".join(middle), f"model.{side}."
        if layer:
            module, prefix = "/".join(middle[1:]), f"{prefix}layers.{layer[1]}."
        if array.dtype.kind != "f":
            raise ValueError(f"{name} is quantised ({array.dtype}), expected floating point: give the model in half precision")
        stacked = torch.from_numpy(array.astype(np.float32))
        for target, weight in zip(NAMES[module], stacked.chunk(len(NAMES[module])), strict=True):
            if target.endswith("k_proj") and kind == "bias":
                assert not weight.any(), "Whisper's keys have no bias (Radford et al. 2022, arXiv 2212.04356)"
            else:
                weights.append((f"{prefix}{target}.{KINDS[kind]}", weight.contiguous()))
    return weights


def _count_layers(tensors: dict[str, NDArray], side: str) -> int:
    return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/layer_norm/gamma") for name in tensors)
