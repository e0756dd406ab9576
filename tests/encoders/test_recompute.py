"""Blocks that are computed again for their gradients give the same bits, dropout included, and keep less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.audio import WhisperEncoder
from encoders.base import Part
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.projectors import MLPProjector
from encoders.recompute import Recomputed
from encoders.tuning import LoRA, Tune
from encoders.video import VideoEncoder
from models.language import LanguageModel

Result = tuple[list[Tensor], dict[str, Tensor], int]


def run(make: Callable[[], Part], call: Callable[[Any], Tensor]) -> Result:
    """Outputs and gradients of a part in training, and how many bytes its graph keeps."""
    torch.manual_seed(4)
    part = make()
    part.build()
    part.train()
    for name, parameter in part.named_parameters():
        if "lora_B" in name or "gate" in name:
            nn.init.normal_(parameter, std=0.3)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = call(part)
        weights = {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}
        num_bytes = sum(size for place, size in kept.items() if place not in weights)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(6))).sum().backward()
    gradients = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    return [out.detach()], gradients, num_bytes


def language(folder: Path, tune: Tune) -> tuple[Callable[[], Part], Callable[[Any], Tensor]]:
    embeddings_BTD = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(7)).requires_grad_()
    segments_BT = torch.ones(3, 12, dtype=torch.long)
    positions_BT = torch.arange(12).expand(3, 12)
    return lambda: LanguageModel(str(folder), tune=tune), lambda part: part(embeddings_BTD, segments_BT, positions_BT)


@pytest.mark.parametrize("mode", ["lora", "full", "frozen"])
def test_the_language_model(tiny_llm: Path, mode: Any) -> None:
    results = []
    for on in (False, True):
        tune = Tune(mode=mode, lora=LoRA(dropout=0.3), activation_checkpointing=on)
        make, call = language(tiny_llm, tune)
        results.append(run(make, call))
    check(*results)


def check(plain: Result, recomputed: Result) -> None:
    assert plain[1].keys() == recomputed[1].keys()
    assert all(map(torch.equal, plain[0], recomputed[0]))
    assert all(torch.equal(gradient, recomputed[1][name]) for name, gradient in plain[1].items())
    assert recomputed[2] < 0.6 * plain[2]


@pytest.mark.parametrize("kind", ["clip", "vit", "whisper", "video"])
def test_the_towers(kind: str, tiny_clip: Path, tiny_whisper: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    image_BCHW = torch.randn(2, 3, 32, 32, generator=generator)
    clip_BFCHW = torch.randn(2, 3, 3, 32, 32, generator=generator)
    mel_NTM = torch.randn(2, 60, 80, generator=generator)

    def make(on: bool) -> Part:
        tune = Tune(mode="full", activation_checkpointing=on)
        match kind:
            case "clip":
                return HFVisionEncoder(name_or_path=str(tiny_clip), layer=-2, tune=tune)
            case "vit":
                return TimmEncoder(model_name="vit_tiny_patch16_224", pretrained=False, image_size=32, layer=3, tune=tune)
            case "whisper":
                return WhisperEncoder(name_or_path=str(tiny_whisper), tune=tune)
        return VideoEncoder(frames=HFVisionEncoder(name_or_path=str(tiny_clip), layer=-2), num_heads=2, tune=tune)

    media = {"whisper": mel_NTM, "video": clip_BFCHW}.get(kind, image_BCHW)
    if kind == "whisper":
        media = media[:, :, : make(False).transform.num_mels]
    check(*(run(lambda on=on: make(on), lambda part: part(media)[0]) for on in (False, True)))


def test_answers_of_a_checkpointed_model_are_the_same(make_model: Any, make_batch: Any) -> None:
    from models.language import Generation

    batch = make_batch([[3, "a", 4], [5]], side="left")
    answers = [
        make_model(tune=Tune(mode="lora", activation_checkpointing=on)).generate(batch, Generation(max_new_tokens=5), [2], 0)
        for on in (False, True)
    ]
    assert answers[0] == answers[1]


def test_names_and_saved_weights_stay(tiny_llm: Path) -> None:
    plain, other = (LanguageModel(str(tiny_llm), tune=Tune(mode="lora", activation_checkpointing=on)) for on in (False, True))
    plain.build()
    other.build()
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert sum(isinstance(module, Recomputed) for module in other.modules()) == 2
    assert len(other.decoder_layers) == 2


def test_what_cannot_be_recomputed_is_refused() -> None:
    projector = MLPProjector(tune=Tune(activation_checkpointing=True))
    with pytest.raises(ValueError, match=r"MLPProjector: tune\.activation_checkpointing is on, but there is no stack"):
        projector.build(8, 8)
    network = TimmEncoder(model_name="test_efficientnet", pretrained=False, tune=Tune(mode="full", activation_checkpointing=True))
    with pytest.raises(ValueError, match=r"running statistics of its batch norms twice"):
        network.build()
