"""Features of frozen encoders: those of an item are its own, bit for bit, in any batch, with and without a cache."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.batch import CachedFeatures, FeatureKey, MediaBatch, pad_time
from encoders.audio import Wav2Vec2Encoder, WhisperEncoder
from encoders.base import Encoder
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.sampling import FrameSampling
from encoders.tuning import Tune
from encoders.video import VideoEncoder
from models.features import TOGETHER, FrozenFeatures
from tests.encoders.audio_fakes import save_audio_model

FROZEN = Tune(mode="frozen")


def media_batch(items: Sequence[Tensor]) -> MediaBatch:
    media, mask = pad_time(items)
    places = torch.arange(len(items))
    return MediaBatch(media=media, mask=mask, item_O=places, row_O=places, num_tokens_O=places, position_O=places)


class Memory:
    """A cache in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def put(self, key: str, tensor: Tensor, notes: Mapping[str, str] | None = None) -> None:
        assert notes == {"num_features": "7"}
        self.kept[key] = tensor.clone()


def cached_batch(items: Sequence[Tensor], memory: Memory) -> MediaBatch:
    """What a loader makes of items of which some have features in a cache."""
    keys = [str(float(item.double().sum())) for item in items]
    new = [item for item, key in zip(items, keys, strict=True) if key not in memory.kept]
    known = [number for number, key in enumerate(keys) if key in memory.kept]
    batch = media_batch(new) if new else media_batch(items) | {"media": torch.empty(0), "mask": None}
    features_CLD, mask_CL = pad_time([memory.kept[keys[number]] for number in known]) if known else (torch.empty(0), None)
    batch["cached"] = CachedFeatures(
        features_CLD=features_CLD,
        mask_CL=mask_CL,
        items=known,
        keys=[FeatureKey(key, 7) for key in keys if key not in memory.kept],
    )
    return batch  # type: ignore[return-value]


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    def folder(kind: Any) -> str:
        path = tmp_path_factory.mktemp(kind)
        save_audio_model(kind, path)
        return str(path)

    return folder


def shapes(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.fixture(params=["dinov2", "vit", "cnn", "whisper", "wav2vec2", "video"])
def encoder_and_items(
    request: pytest.FixtureRequest, tiny_dinov2: Path, audio_folder: Callable[[str], str]
) -> tuple[Encoder, list[Tensor]]:
    """Encoders of all kinds; items of different lengths where there may be some, several of each length."""
    frames = HFVisionEncoder(str(tiny_dinov2))
    encoder: Encoder
    match request.param:
        case "dinov2":
            encoder, items = frames, shapes(*[(3, 32, 32)] * 9)
        case "vit":
            encoder = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=32, layer=2)
            items = shapes(*[(3, 32, 32)] * 9)
        case "cnn":
            encoder = TimmEncoder("efficientnet_lite0", pretrained=False, image_size=32, layer=2)
            items = shapes(*[(3, 32, 32)] * 9)
        case "whisper":
            encoder = WhisperEncoder(name_or_path=audio_folder("whisper"))
            bands = encoder.transform.num_mels
            items = shapes(*[(length, bands) for length in (100, 30, 100, 6, 150, 100, 30, 100, 240)])
        case "wav2vec2":
            encoder = Wav2Vec2Encoder(name_or_path=audio_folder("wav2vec2"))
            items = shapes(*[(length,) for length in (3000, 1711, 3000, 900, 3000, 1711, 3000, 16_000)])
        case _:
            encoder = VideoEncoder(frames, FrameSampling(4), num_layers=1, num_heads=4)
            items = shapes(*[(count, 3, 32, 32) for count in (4, 2, 4, 4, 1, 4, 2, 4)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder.build()
    return encoder.eval(), items


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_item_has_the_same_features_in_any_batch(encoder_and_items: tuple[Encoder, list[Tensor]], num_threads: int) -> None:
    encoder, items = encoder_and_items
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = [FrozenFeatures()(encoder, media_batch([item]))[0][0] for item in items]
        features, memory = FrozenFeatures(), Memory()
        features.cache = memory
        order = torch.Generator().manual_seed(3)
        for size, with_cache in itertools.product((len(items), 5, 3, 1), (False, True)):
            numbers = torch.randperm(len(items), generator=order)[:size].tolist()
            chosen = [items[number] for number in numbers]
            features_NLD, mask_NL = features(encoder, cached_batch(chosen, memory) if with_cache else media_batch(chosen))
            assert not features_NLD.requires_grad
            for place, number in enumerate(numbers):
                own_LD = features_NLD[place] if mask_NL is None else features_NLD[place][mask_NL[place]]
                assert own_LD.dtype == alone[number].dtype and torch.equal(own_LD, alone[number])
        assert len(memory.kept) == len(items) and features.num_read > 0
    finally:
        torch.set_num_threads(before)


def test_they_are_what_the_encoder_gives(encoder_and_items: tuple[Encoder, list[Tensor]]) -> None:
    encoder, items = encoder_and_items
    batch = media_batch(items)
    expected_NLD, expected_mask_NL = encoder.features(batch["media"], batch["mask"])
    features_NLD, mask_NL = FrozenFeatures()(encoder, batch)
    assert (mask_NL is None) == (expected_mask_NL is None)
    if mask_NL is not None and expected_mask_NL is not None:
        assert torch.equal(mask_NL, expected_mask_NL)
        expected_NLD = expected_NLD * expected_mask_NL[..., None]
    torch.testing.assert_close(features_NLD, expected_NLD, rtol=1e-4, atol=1e-4)


class Fake(Encoder):
    """Adds the number of items run together, times `leak`, to its media, and counts its runs."""

    hidden_size = 2
    transform = staticmethod(abs)

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__(FROZEN)
        self.leak = leak
        self.runs: list[int] = []

    def build(self) -> None: ...

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        self.runs.append(len(media))
        return media + self.leak * len(media), mask


def test_items_are_run_together_where_that_gives_the_same_bits() -> None:
    items = shapes(*[(3, 2)] * 22)
    same, other = Fake(), Fake(leak=2.0**-10)
    for encoder in (same, other):
        features = FrozenFeatures()
        for _ in range(2):
            encoder.runs.clear()
            features_NLD, _ = features(encoder, media_batch(items))
        assert torch.equal(features_NLD, torch.stack(items) + encoder.leak)
    assert same.runs == [16, 4, 1, 1] and other.runs == [1] * 22
    assert TOGETHER == (16, 8, 4)


def test_large_items_are_not_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.features.SMALL_SECONDS", -1.0)
    encoder = Fake()
    FrozenFeatures()(encoder, media_batch(shapes(*[(3, 2)] * 8)))
    assert encoder.runs == [1] * (3 + 8)


def test_on_an_accelerator_a_batch_is_run_as_it_is_and_without_its_padding_where_it_is_kept() -> None:
    """The meta device stands for one: it computes shapes alone."""
    items = shapes((3, 2), (5, 2), (3, 2), (3, 2))
    encoder, features = Fake(), FrozenFeatures()
    batch = media_batch(items)
    on_device: Any = batch | {"media": batch["media"].to("meta")}
    features(encoder, on_device)
    assert encoder.runs == [4]
    encoder.runs.clear()
    together: Any = media_batch([items[0], items[2], items[3]])
    together |= {"media": together["media"].to("meta"), "cached": cached_batch(items[:3], Memory())["cached"]}
    features(encoder, together)
    assert encoder.runs == [3]
