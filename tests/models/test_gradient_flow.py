"""Gradients reach the pixels, the frames and the waveform of a tower that trains, and nothing of one that is frozen.

Shape suffixes: B rows, T positions, N items, D width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MEDIA_TOKEN_IDS
from torch import Tensor, nn

from datamodules.batch import MODALITIES, Batch, Example, MediaItem, Modality, Origin
from datamodules.collate import collate
from encoders.audio import Wav2Vec2Encoder
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.resampler import PerceiverResampler
from encoders.tuning import Tune
from encoders.video import VideoEncoder
from models.cross_attention import GatedCrossAttentionFusion
from models.fusion import ConcatFusion, Fusion
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from tests.encoders.audio_fakes import save_audio_model
from tests.tiny_configs import IMAGE_SIZE

FULL, FROZEN = Tune(mode="full"), Tune(mode="frozen")
PIXELS = (3, IMAGE_SIZE, IMAGE_SIZE)
SHAPES: dict[Modality, list[tuple[int, ...]]] = {
    "image": [PIXELS, PIXELS],
    "video": [(3, *PIXELS), (2, *PIXELS)],
    "audio": [(200,), (120,)],
}
"""What the encoders take, for each of two rows."""

MakeModel = Callable[..., MultiModalModel]


def crossing() -> Fusion:
    return GatedCrossAttentionFusion(every=1, num_heads=2, head_dim=4)


@pytest.fixture(scope="module")
def tiny_wave(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("wav2vec2")
    save_audio_model("wav2vec2-layer", folder)
    return str(folder)


@pytest.fixture
def make_full_model(tiny_llm: Path, tiny_clip: Path, tiny_wave: str) -> MakeModel:
    """`make_full_model(fusion, tune, latents=None)`: towers of all modalities, each with `tune`; what starts at 0 is drawn."""

    def projector(latents: int | None) -> Any:
        return MLPProjector() if latents is None else PerceiverResampler(latents, depth=1, num_heads=2, head_dim=4)

    def make(fusion: Fusion, tune: Tune, latents: int | None = None) -> MultiModalModel:
        def images() -> HFVisionEncoder:
            return HFVisionEncoder(str(tiny_clip), layer=-2, tune=tune)

        model = MultiModalModel(
            LanguageModel(str(tiny_llm), tune=Tune(mode="lora")),
            images(),
            projector(latents),
            VideoEncoder(images(), num_layers=1, num_heads=4, tune=tune),
            projector(latents),
            Wav2Vec2Encoder(name_or_path=tiny_wave, layer=-2, tune=tune),
            projector(latents),
            fusion=fusion,
        )
        with torch.random.fork_rng():
            torch.manual_seed(6)
            model.build(MEDIA_TOKEN_IDS)
            for name, parameter in model.named_parameters():
                if name.endswith("_gate") or "lora_B" in name or name.startswith("video_encoder.blocks"):
                    nn.init.uniform_(parameter, 0.1, 0.5)
        return model.eval()  # dropout would make two losses differ

    return make


def make_batch(model: MultiModalModel) -> Batch:
    """Two rows with an image, a clip and a sound each, of other lengths."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for row in range(2):
        tokens: list[int] = []
        media: dict[str, list[MediaItem]] = {}
        for modality in MODALITIES:
            shape = SHAPES[modality][row]
            encoder, projector = model.tower(modality)
            decoded = {"image": shape[1:], "video": (shape[0], *shape[2:]), "audio": shape}[modality]
            num = model.fusion.num_placeholders(projector.num_tokens(encoder.num_tokens(decoded)))
            tokens += torch.randint(3, 600, (2,), generator=generator).tolist()
            media[modality] = [MediaItem(f"{modality}{row}", torch.randn(shape, generator=generator), num, len(tokens))]
            tokens += [MEDIA_TOKEN_IDS[modality]] * num
        tokens += torch.randint(3, 600, (3,), generator=generator).tolist()
        examples.append(Example(Origin("rows.jsonl", row + 1), str(row), tokens, [-100] * len(tokens), media))
    return collate(examples, pad_id=0)


def loss_of(model: MultiModalModel, batch: Batch) -> Tensor:
    """Of each row's last token: how much its hidden state points in a random direction (the final norm fixes its length)."""
    last_B = (batch["segments_BT"] > 0).sum(1) - 1
    hidden_BD = model(batch)[torch.arange(2), last_B]
    return (hidden_BD * torch.randn(hidden_BD.shape, generator=torch.Generator().manual_seed(8))).sum()


@pytest.mark.parametrize("latents", [None, 3])
@pytest.mark.parametrize("make_fusion", [ConcatFusion, crossing])
def test_a_tower_that_trains_passes_gradients_to_its_media(
    make_full_model: MakeModel, make_fusion: Callable[[], Fusion], latents: int | None
) -> None:
    model = make_full_model(make_fusion(), FULL, latents)
    batch = make_batch(model)
    inputs = {modality: batch[modality]["media"].requires_grad_() for modality in MODALITIES}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss = loss_of(model, batch)
    loss.backward()
    for modality, media in inputs.items():
        assert media.grad is not None
        reached_NT = (media.grad if media.ndim == 2 else media.grad.flatten(2).abs().sum(2)) != 0
        expected_NT = (
            torch.ones_like(reached_NT) if modality == "image" else batch[modality]["mask"]
        )  # nothing flows into padding
        if modality == "audio":
            expected_NT = expected_NT & (torch.arange(200) % 80 < 40)  # the tiny model's convolutions read 40 of each 80 samples
        assert torch.equal(reached_NT, expected_NT), modality
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for modality in MODALITIES:
        for kind, part in zip(("encoder", "projector"), model.tower(modality), strict=True):
            trained = {f"{modality}_{kind}.{path}" for path, parameter in part.named_parameters() if parameter.requires_grad}
            assert trained and trained <= changed, trained - changed
    assert loss_of(model, batch) < loss


@pytest.mark.parametrize("make_fusion", [ConcatFusion, crossing])
def test_a_frozen_tower_gets_no_gradient_and_no_graph(make_full_model: MakeModel, make_fusion: Callable[[], Fusion]) -> None:
    model = make_full_model(make_fusion(), FROZEN)
    batch = make_batch(model)
    recorded: dict[Modality, bool] = {}
    for modality in MODALITIES:
        _, projector = model.tower(modality)
        projector.register_forward_pre_hook(lambda _, args, name=modality: recorded.update({name: args[0].requires_grad}))
    loss_of(model, batch).backward()
    assert recorded == dict.fromkeys(MODALITIES, False)
    for modality in MODALITIES:
        encoder, projector = model.tower(modality)
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())
    inputs = {modality: batch[modality]["media"].requires_grad_() for modality in MODALITIES}
    loss_of(model, batch).backward()  # it lets the gradient of the media through where that is asked for
    assert recorded == dict.fromkeys(MODALITIES, True)
    assert all(media.grad is not None and media.grad.any() for media in inputs.values())
    assert all(parameter.grad is None for modality in MODALITIES for parameter in model.tower(modality)[0].parameters())
