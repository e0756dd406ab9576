"""Media from caches: what is there is not decoded, what may be wrong is not kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datamodules.augment import ImageAugment
from datamodules.cache import CacheOptions, TensorCache
from datamodules.cache_keys import media_settings
from datamodules.cached_media import CachedMedia, FeatureStore
from datamodules.content import Media
from datamodules.dataset import MultiModalDataset
from datamodules.media import Decoded, MediaLimits
from datamodules.media_image import ImageLimits
from datamodules.sources import MediaRoot
from tests.datamodules.loader_fakes import PixelEncoder, make_processor, pixels, write_rows

MEDIUM = Media("image", "a.png")


@pytest.fixture
def root(tmp_path: Path, picture: Callable[..., Image.Image]) -> MediaRoot:
    folder = tmp_path / "media"
    folder.mkdir()
    picture(1).save(folder / "a.png")
    return MediaRoot(folder)


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return CacheOptions(str(tmp_path / "cache")).open()


class Decoder:
    """Decodes a picture, and counts how often."""

    def __init__(self, root: MediaRoot) -> None:
        self.root = root
        self.calls = 0

    def __call__(self, medium: Media) -> Decoded:
        self.calls += 1
        return Image.open(self.root.path / medium.files[0]).convert("RGB")


def make(root: MediaRoot, media: TensorCache | None, features: FeatureStore | None = None, **limits: Any) -> CachedMedia:
    all_limits = MediaLimits(image=ImageLimits(**limits))
    return CachedMedia(root, all_limits, {"image": media_settings("image", pixels, all_limits)}, media, features)


def test_a_medium_is_decoded_once(root: MediaRoot, cache: TensorCache) -> None:
    encoder, decode = PixelEncoder(), Decoder(root)
    found = [make(root, cache).prepare(MEDIUM, encoder, decode) for _ in range(3)]
    assert decode.calls == 1
    expected = pixels(Image.open(root.path / "a.png"))
    for prepared in found:
        assert torch.equal(prepared.tensor, expected) and prepared.num_features == 2
        assert not prepared.has_features and prepared.feature_key is None


def test_the_shape_before_the_transform_is_kept(root: MediaRoot, cache: TensorCache) -> None:
    class Area(PixelEncoder):
        def num_tokens(self, shape: tuple[int, ...]) -> int:
            return shape[0] * shape[1]

    decode = Decoder(root)
    for _ in range(2):
        assert make(root, cache).prepare(MEDIUM, Area(), decode).num_features == 40 * 36
    assert decode.calls == 1


def test_other_settings_or_limits_are_other_tensors(root: MediaRoot, cache: TensorCache) -> None:
    decode = Decoder(root)
    make(root, cache).prepare(MEDIUM, PixelEncoder(), decode)
    make(root, cache, max_pixels=100).prepare(MEDIUM, PixelEncoder(), decode)
    assert decode.calls == 2


def test_features_are_asked_for_until_they_are_there(root: MediaRoot, cache: TensorCache) -> None:
    encoder, decode = PixelEncoder(), Decoder(root)
    store, other = FeatureStore(cache, {"image": "one"}), FeatureStore(cache, {"image": "two"})
    first, again = (make(root, None, store).prepare(MEDIUM, encoder, decode) for _ in range(2))
    assert first.feature_key is not None and first.feature_key == again.feature_key and decode.calls == 2
    features_LD = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).half()
    cache.put(first.feature_key.key, features_LD, {"num_features": "2"})
    hit = make(root, None, store).prepare(MEDIUM, encoder, decode)
    assert hit.has_features and hit.feature_key is None and hit.num_features == 2
    assert hit.tensor.dtype == torch.float16 and torch.equal(hit.tensor, features_LD)
    assert decode.calls == 2
    miss = make(root, None, other).prepare(MEDIUM, encoder, decode)
    assert not miss.has_features and miss.feature_key not in (None, first.feature_key)


def test_an_encoder_without_a_hash_has_no_features_to_keep(root: MediaRoot, cache: TensorCache) -> None:
    prepared = make(root, cache, FeatureStore(cache, {})).prepare(MEDIUM, PixelEncoder(), Decoder(root))
    assert not prepared.has_features and prepared.feature_key is None


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(
    root: MediaRoot, cache: TensorCache, picture: Callable[..., Image.Image]
) -> None:
    """Its tensor would come under the hash of what was there before."""
    decode = Decoder(root)

    def change(medium: Media) -> Decoded:
        picture(2).save(root.path / "a.png")
        return decode(medium)

    store = FeatureStore(cache, {"image": "one"})
    assert make(root, cache, store).prepare(MEDIUM, PixelEncoder(), change).feature_key is None
    assert not list(cache.folder.rglob("*.safetensors"))


def test_of_a_file_above_the_limit_not_even_the_hash_is_computed(
    root: MediaRoot, cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("it was hashed")

    monkeypatch.setattr("datamodules.cache_keys.ContentHash._hash", never)
    decode = Decoder(root)
    make(root, cache, max_bytes=10).prepare(MEDIUM, PixelEncoder(), decode)
    assert decode.calls == 1 and not list(cache.folder.rglob("*.safetensors"))


class TestDataset:
    @pytest.fixture
    def make_dataset(self, tmp_path: Path) -> Callable[..., MultiModalDataset]:
        processor = make_processor(tmp_path)
        path = str(write_rows(tmp_path / "rows.jsonl", 3))
        return lambda **options: MultiModalDataset(path, str(tmp_path), processor, **options)

    def test_examples_are_the_same_with_a_cache(
        self, make_dataset: Callable[..., MultiModalDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, cached = make_dataset(), make_dataset()
        cached.open_caches(CacheOptions(str(tmp_path / "cache")))
        for number in (0, 1, 2, 0, 1, 2):
            expected, got = plain[number], cached[number]
            assert got.tokens == expected.tokens and got.labels == expected.labels
            for one, other in zip(got.media["image"], expected.media["image"], strict=True):
                assert (one.key, one.num_tokens, one.position) == (other.key, other.num_tokens, other.position)
                assert torch.equal(one.media, other.media)
        monkeypatch.setattr("datamodules.dataset.decode", None)
        assert [cached[number].id for number in range(3)] == [plain.sample(number).id for number in range(3)]

    def test_a_bad_medium_is_the_same_error(self, make_dataset: Callable[..., MultiModalDataset], tmp_path: Path) -> None:
        cached = make_dataset()
        cached.open_caches(CacheOptions(str(tmp_path / "cache")))
        names = [medium.files[0] for number in range(3) for medium in cached.sample(number).media("image")]
        (tmp_path / names[0]).write_bytes((tmp_path / names[0]).read_bytes()[:60])
        (tmp_path / names[1]).unlink()
        expected, got = make_dataset().__getitems__([0, 1, 2]), cached.__getitems__([0, 1, 2])
        assert [str(error) for error in got[:2]] == [str(error) for error in expected[:2]]
        assert "truncated or damaged" in str(got[0]) and "does not exist" in str(got[1])

    def test_augmented_media_are_not_kept(
        self, make_dataset: Callable[..., MultiModalDataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        augmented, still = make_dataset(augment=ImageAugment()), make_dataset(augment=ImageAugment((1, 1), (1, 1), 0, 0, 0, 0))
        for dataset in (augmented, still):
            dataset.open_caches(CacheOptions(str(tmp_path / "cache")))
        assert [
            message for message in caplog.messages if "rows.jsonl: image media change at random" in message
        ] == caplog.messages
        assert len(caplog.messages) == 1
        augmented[0]
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        still[0]
        assert list((tmp_path / "cache").rglob("*.safetensors"))
