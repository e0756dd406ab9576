"""The converter is given a small file in CTranslate2's layout, written here from a random model whose output is known."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel, WhisperProcessor

from demo.convert_whisper import convert_whisper, read_ctranslate2

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
CODES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
PARTS = {
    "self_attn": {"linear_0": ("q_proj", "k_proj", "v_proj"), "linear_1": ("out_proj",)},
    "encoder_attn": {"linear_0": ("q_proj",), "linear_1": ("k_proj", "v_proj"), "linear_2": ("out_proj",)},
}
"""How CTranslate2 stacks the projections of self-attention and of attention to the encoder."""


def random_whisper() -> WhisperForConditionalGeneration:
    """Every weight random and a number that half precision holds; widths, depths and heads all differ."""
    config = WhisperConfig(
        vocab_size=40,
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=3,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=5,
        max_source_positions=11,
        max_target_positions=9,
        bos_token_id=37,
        eos_token_id=37,
        pad_token_id=37,
        decoder_start_token_id=38,
    )
    model = WhisperForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).half())
    return model


def ctranslate2_tensors(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The weights as CTranslate2 names and stacks them, in half precision, among its settings."""
    tensors: dict[str, np.ndarray] = {
        "decoder/alignment_heads": np.array([1, 0], np.int16),
        "decoder/pre_norm": np.array(1, np.int8),
    }

    def put(name: str, *modules: torch.nn.Module, weight: str = "weight", bias: str = "bias") -> None:
        tensors[f"{name}/{weight}"] = torch.cat([module.weight for module in modules]).detach().half().numpy()
        biases = [torch.zeros(len(module.weight)) if module.bias is None else module.bias for module in modules]
        tensors[f"{name}/{bias}"] = torch.cat(biases).detach().half().numpy()

    def put_norm(name: str, norm: torch.nn.Module) -> None:
        put(f"{name}/layer_norm".removeprefix("/"), norm, weight="gamma", bias="beta")

    config = model.config
    for side, stack, heads in (
        ("encoder", model.model.encoder, config.encoder_attention_heads),
        ("decoder", model.model.decoder, config.decoder_attention_heads),
    ):
        tensors[f"{side}/num_heads"] = np.array(heads, np.int16)
        tensors[f"{side}/position_encodings/encodings"] = stack.embed_positions.weight.detach().half().numpy()
        put_norm(side, stack.layer_norm)
        for number, layer in enumerate(stack.layers):
            name = f"{side}/layer_{number}"
            for ours, theirs in (("self_attn", "self_attention"), ("encoder_attn", "attention"))[: 1 + (side == "decoder")]:
                attention = layer.get_submodule(ours)
                for linear, projections in PARTS[ours].items():
                    put(f"{name}/{theirs}/{linear}", *(attention.get_submodule(projection) for projection in projections))
                put_norm(f"{name}/{theirs}", layer.get_submodule(f"{ours}_layer_norm"))
            put(f"{name}/ffn/linear_0", layer.fc1)
            put(f"{name}/ffn/linear_1", layer.fc2)
            put_norm(f"{name}/ffn", layer.final_layer_norm)
    put("encoder/conv1", model.model.encoder.conv1)
    put("encoder/conv2", model.model.encoder.conv2)
    tensors["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight.detach().half().numpy()
    return tensors


def write_ctranslate2(path: Path, tensors: dict[str, np.ndarray], spec: str = "WhisperSpec") -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", 6) + string(spec) + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        content += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", CODES[str(array.dtype)], array.nbytes) + array.tobytes()
    path.write_bytes(content + struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight"))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={chr(97 + index): index for index in range(37)}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer_file) -> tuple[WhisperForConditionalGeneration, Path]:
    folder = tmp_path_factory.mktemp("whisper")
    model = random_whisper()
    write_ctranslate2(folder / "model.bin", ctranslate2_tensors(model))
    convert_whisper(folder / "model.bin", tokenizer_file, folder)
    return model, folder


def test_no_weight_is_missing_or_left_over(converted):
    for family in (WhisperModel, WhisperForConditionalGeneration):
        _, loading = family.from_pretrained(converted[1], output_loading_info=True)
        assert not any(loading.values()), family


def test_the_converted_model_gives_the_same_logits(converted):
    model, folder = converted
    generator = torch.Generator().manual_seed(1)
    mel_BMT = torch.randn(2, 5, 22, generator=generator)
    tokens_BT = torch.randint(40, (2, 7), generator=generator)
    same = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(mel_BMT, decoder_input_ids=tokens_BT).logits
        assert torch.equal(same(mel_BMT, decoder_input_ids=tokens_BT).logits, expected)


def test_the_folder_knows_how_to_listen_and_to_write(converted):
    processor = WhisperProcessor.from_pretrained(converted[1])
    assert processor.feature_extractor.feature_size == 5
    assert processor.tokenizer.eos_token_id == processor.tokenizer.pad_token_id == 37
    assert processor.tokenizer.decode([38, 7, 4, 37], skip_special_tokens=True) == "he"
    generation = WhisperForConditionalGeneration.from_pretrained(converted[1]).generation_config
    assert (generation.decoder_start_token_id, generation.eos_token_id, generation.no_timestamps_token_id) == (38, 37, 39)
    assert json.loads((converted[1] / "config.json").read_text())["decoder_attention_heads"] == 3


def test_another_layout_is_refused(tmp_path, tokenizer_file):
    tensors = ctranslate2_tensors(random_whisper())
    write_ctranslate2(tmp_path / "model.bin", tensors, spec="TransformerSpec")
    with pytest.raises(ValueError, match="holds 'TransformerSpec' revision 3 in layout 6, expected 'WhisperSpec' revision 3"):
        read_ctranslate2(tmp_path / "model.bin")

    write_ctranslate2(tmp_path / "model.bin", tensors)
    whole = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"model\.bin ends \d+ bytes too early"):
        read_ctranslate2(tmp_path / "model.bin")

    tensors["encoder/layer_1/ffn/linear_0/weight"] = tensors["encoder/layer_1/ffn/linear_0/weight"].astype(np.int8)
    write_ctranslate2(tmp_path / "model.bin", tensors)
    with pytest.raises(ValueError, match=r"encoder/layer_1/ffn/linear_0/weight is quantised \(int8\)"):
        convert_whisper(tmp_path / "model.bin", tokenizer_file, tmp_path)
