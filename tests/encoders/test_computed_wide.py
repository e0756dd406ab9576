"""Towers whose weights stay narrow and compute wide: the features of rounded weights, and half of the memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from encoders.audio import Wav2Vec2Encoder, WhisperEncoder
from encoders.base import Encoder
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.stored import StoredLinear
from encoders.tuning import LoRA, Tune
from tests.encoders.audio_fakes import save_audio_model, sound

pytestmark = pytest.mark.usefixtures("seed")

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "image_size": 32,
    "patch_size": 8,
}
TARGETS = {
    "clip": ("q_proj", "fc1"),
    "siglip": ("q_proj", "fc1"),
    "dinov2": ("q_proj", "fc1"),
    "vit": ("fc1",),
    "timm": ("qkv", "fc1"),
    "whisper": ("q_proj", "fc1"),
    "wav2vec2-layer": ("q_proj", "intermediate_dense"),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Encoder]:
    """Builds an encoder of a kind, with random weights."""
    import transformers as hf

    def build(kind: str, **options: Any) -> Encoder:
        encoder: Encoder
        if kind == "timm":
            encoder = TimmEncoder(model_name="test_vit", pretrained=False, image_size=32, **options)
        elif kind in ("whisper", "wav2vec2-layer"):
            save_audio_model(kind, tmp_path)
            audio = {"whisper": WhisperEncoder, "wav2vec2-layer": Wav2Vec2Encoder}[kind]
            encoder = audio(name_or_path=str(tmp_path), pretrained=False, **options)
        else:
            configs: dict[str, Any] = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig, "dinov2": hf.Dinov2Config}
            configs.get(kind, hf.ViTConfig)(**SIZES).save_pretrained(tmp_path)
            encoder = HFVisionEncoder(name_or_path=str(tmp_path), pretrained=False, **options)
        encoder.build()
        return encoder.eval()

    return build


def media_of(encoder: Encoder) -> Tensor:
    """A medium, as the transform gives it."""
    if isinstance(encoder, WhisperEncoder | Wav2Vec2Encoder):
        return encoder.transform(sound(5000))[None]
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("mode", ["frozen", "lora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_narrow_tower_computes_as_rounded_weights_do(make: Callable[..., Encoder], kind: str, mode: Any) -> None:
    """Bit for bit, where it is frozen; its adapters have the same gradients."""
    tune = Tune(mode=mode, lora=LoRA(r=2, target_modules=TARGETS[kind]))
    plain, narrow = make(kind, tune=tune), make(kind, tune=tune, dtype="bfloat16", compute_dtype="float32")
    for name, weight in plain.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
        else:
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
            weight.data = weight.data.bfloat16().float()
    narrow.load_state_dict(plain.state_dict())
    for name, weight in narrow.state_dict().items():  # what a checkpoint and a fingerprint see
        assert torch.equal(weight.float(), plain.state_dict()[name]), name
    media = media_of(plain)
    (wide, _), (features, _) = plain(media), narrow(media)
    assert features.dtype == torch.float32
    tolerance = 0 if mode == "frozen" else 1e-5
    torch.testing.assert_close(features, wide, rtol=tolerance, atol=tolerance)
    if mode == "lora":
        for x in (wide, features):
            x.square().sum().backward()
        expected = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
        assert len(expected) >= 4
        for name, weight in narrow.named_parameters():
            if name in expected:
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_narrow_tower_takes_half_of_the_memory(make: Callable[..., Encoder], kind: str) -> None:
    narrow = make(kind, dtype="bfloat16", compute_dtype="float32")
    layers = [module for module in narrow.modules() if isinstance(module, StoredLinear)]
    numbers = {weight: weight.numel() for weight in (layer.weight for layer in layers)}
    assert sum(weight.nbytes for weight in numbers) == 2 * sum(numbers.values())
    matrices = [p for name, p in narrow.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert set(matrices) == set(numbers) and {p.dtype for p in narrow.parameters() if p not in numbers} == {torch.float32}


def test_a_tower_in_full_or_in_float32_is_left_as_it_is(make: Callable[..., Encoder]) -> None:
    for options in ({"dtype": "bfloat16", "tune": Tune(mode="full")}, {"dtype": "float32"}):
        encoder = make("clip", compute_dtype="float32", **options)
        assert not any(isinstance(module, StoredLinear) for module in encoder.modules())
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_timm_models_that_do_not_call_their_layers_are_refused_too(name: str) -> None:
    encoder = TimmEncoder(model_name=name, pretrained=False, dtype="bfloat16", compute_dtype="float32")
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name} takes .* set compute_dtype of the image encoder to null"):
        encoder.build()


def test_wavlm_is_refused(tmp_path: Path) -> None:
    """Its attention reads the weights of layers that it does not call."""
    save_audio_model("wavlm", tmp_path)
    encoder = Wav2Vec2Encoder(name_or_path=str(tmp_path), dtype="bfloat16", compute_dtype="float32")
    with pytest.raises(ValueError, match="set compute_dtype of the audio encoder to null"):
        encoder.build()
