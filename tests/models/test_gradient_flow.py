"""Gradients reach the pixels, the frames and the waveform of a tower that trains, and nothing of one that is frozen.

Shape suffixes: B rows, T tokens, N items, F frames, S samples, D width.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IMAGE_SIZE, MEDIA_TOKEN_IDS, NUM_PATCHES
from torch import Tensor, nn

from datamodules.batch import MODALITIES, Batch, Example, MediaItem, Modality, Origin
from datamodules.collate import collate
from encoders.base import Encoder, MediaShape, MediaTransform
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.resampler import PerceiverResampler
from encoders.tuning import Tune
from models.cross_attention import GatedCrossAttentionFusion
from models.fusion import ConcatFusion, Fusion
from models.language import LanguageModel
from models.multimodal import MultiModalModel

FULL, FROZEN = Tune(mode="full"), Tune(mode="frozen")


class StepEncoder(Encoder):
    """One feature for each frame of a clip, or each stretch of four samples of a waveform."""

    hidden_size = 6

    def __init__(self, step: int, tune: Tune = FULL) -> None:
        super().__init__(tune)
        self.step = step

    @cached_property
    def transform(self) -> MediaTransform:
        raise AssertionError("no media are decoded here")

    def build(self) -> None:
        self.linear = nn.Linear(self.step, self.hidden_size)
        self.apply_tune(self)

    def num_tokens(self, shape: MediaShape) -> int:
        return shape[0] * (1 if self.step > 4 else 4) // 4

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        features_NLD = self.linear(media.flatten(1).unflatten(1, (-1, self.step))).tanh()
        return features_NLD, None if mask is None else mask.unflatten(1, (features_NLD.shape[1], -1)).any(2)


MEDIA: dict[Modality, tuple[int, ...]] = {
    "image": (3, IMAGE_SIZE, IMAGE_SIZE),
    "video": (5, 3, 4, 4),
    "audio": (24,),
}
"""Shapes of what encoders take; the second item of a clip or a sound is shorter."""


def build(llm: Path, clip: Path, fusion: Fusion, tune: Tune, latents: int | None = None) -> MultiModalModel:
    def projector() -> Any:
        return MLPProjector() if latents is None else PerceiverResampler(latents, 1, num_heads=2, head_dim=4)

    model = MultiModalModel(
        LanguageModel(str(llm), tune=Tune(mode="lora")),
        HFVisionEncoder(str(clip), layer=-2, tune=tune),
        projector(),
        StepEncoder(48, tune),
        projector(),
        StepEncoder(4, tune),
        projector(),
        fusion=fusion,
    )
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model.build(MEDIA_TOKEN_IDS)
        for name, parameter in model.named_parameters():
            if name.endswith("_gate") or "lora_B" in name:
                nn.init.uniform_(parameter, 0.3, 0.6)
    return model


def make_batch(model: MultiModalModel) -> Batch:
    """Two rows with an image, a clip and a sound each, of other lengths."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for row in range(2):
        tokens: list[int] = []
        media: dict[str, list[MediaItem]] = {}
        for modality in MODALITIES:
            shape = MEDIA[modality]
            if modality != "image":
                shape = (shape[0] - 2 * row if modality == "video" else shape[0] - 8 * row, *shape[1:])
            num_features = {"image": NUM_PATCHES, "video": shape[0], "audio": shape[0] // 4}[modality]
            _, projector = model.tower(modality)
            num = model.fusion.num_placeholders(projector.num_tokens(num_features))
            item = MediaItem(f"{modality}{row}", torch.randn(shape, generator=generator), num, len(tokens) + 2)
            media[modality] = [item]
            tokens += [*torch.randint(3, 600, (2,), generator=generator).tolist(), *[MEDIA_TOKEN_IDS[modality]] * num]
        tokens += torch.randint(3, 600, (3,), generator=generator).tolist()
        examples.append(Example(Origin("rows.jsonl", row + 1), str(row), tokens, [-100] * len(tokens), media))
    return collate(examples, pad_id=0)


def fusions() -> list[Any]:
    crossing: Callable[[], Fusion] = lambda: GatedCrossAttentionFusion(every=1, num_heads=2, head_dim=4)  # noqa: E731
    return [pytest.param(ConcatFusion, id="concat"), pytest.param(crossing, id="cross_attention")]


def loss_of(model: MultiModalModel, batch: Batch) -> Tensor:
    """Of each row's last token: how much its hidden state points in a random direction (the final norm fixes its length)."""
    last_B = (batch["segments_BT"] > 0).sum(1) - 1
    hidden_BD = model(batch)[torch.arange(2), last_B]
    return (hidden_BD * torch.randn(hidden_BD.shape, generator=torch.Generator().manual_seed(8))).sum()


@pytest.mark.parametrize("latents", [None, 3])
@pytest.mark.parametrize("make_fusion", fusions())
def test_a_tower_that_trains_passes_gradients_to_its_media(
    tiny_llm: Path, tiny_clip: Path, make_fusion: Callable[[], Fusion], latents: int | None
) -> None:
    model = build(tiny_llm, tiny_clip, make_fusion(), FULL, latents)
    batch = make_batch(model)
    inputs = {modality: batch[modality]["media"].requires_grad_() for modality in MODALITIES}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss = loss_of(model, batch)
    loss.backward()
    for modality, media in inputs.items():
        assert media.grad is not None
        reached_NT = media.grad.flatten(2).abs().sum(2) > 0 if media.ndim > 2 else media.grad != 0
        mask_NT = batch[modality]["mask"]
        assert torch.equal(reached_NT, torch.ones_like(reached_NT) if mask_NT is None else mask_NT), modality  # not the padding
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for modality in MODALITIES:
        parts = {f"{modality}_{kind}": part for kind, part in zip(("encoder", "projector"), model.tower(modality), strict=True)}
        for name, part in parts.items():
            trained = {f"{name}.{path}" for path, parameter in part.named_parameters() if parameter.requires_grad}
            assert trained and trained <= changed, trained - changed
    assert loss_of(model, batch) < loss


@pytest.mark.parametrize("make_fusion", fusions())
def test_a_frozen_tower_gets_no_gradient_and_no_graph(tiny_llm: Path, tiny_clip: Path, make_fusion: Callable[[], Fusion]) -> None:
    model = build(tiny_llm, tiny_clip, make_fusion(), FROZEN)
    batch = make_batch(model)
    recorded: dict[Modality, bool] = {}
    for modality in MODALITIES:
        encoder, _ = model.tower(modality)
        encoder.register_forward_hook(lambda *call, name=modality: recorded.update({name: call[2][0].grad_fn is not None}))
    loss_of(model, batch).backward()
    assert recorded == dict.fromkeys(MODALITIES, False)
    for modality in MODALITIES:
        encoder, projector = model.tower(modality)
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert all(parameter.grad.any() for parameter in projector.parameters())
    inputs = {modality: batch[modality]["media"].requires_grad_() for modality in MODALITIES}
    loss_of(model, batch).backward()  # a frozen tower lets the gradient of the media through where it is asked for
    assert recorded == dict.fromkeys(MODALITIES, True)
    assert all(media.grad is not None and media.grad.any() for media in inputs.values())
    assert all(p.grad is None for modality in MODALITIES for p in model.tower(modality)[0].parameters())
