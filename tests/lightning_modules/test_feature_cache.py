"""Runs with caches give the losses of runs without, bit for bit, and what is stale is never used."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageOps
from safetensors import safe_open

from datamodules.augment import ImageAugment
from datamodules.cache import CacheOptions
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.tuning import LoRA, Tune
from lightning_modules.feature_cache import arithmetic, encoder_hash
from lightning_modules.multimodal import MultiModalLitModule
from tests.lightning_modules.run_fakes import Watch, batches, make_data, make_trainer, weights, write_rows

NUM_ROWS = 8
NUM_PICTURES = 7  # every fifth row has none


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", NUM_ROWS)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.fixture
def options(tmp_path: Path) -> CacheOptions:
    return CacheOptions(str(tmp_path / "cache"))


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class Run(NamedTuple):
    losses: list[float]
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    num_read: int
    num_encoded: int


Fit = Callable[..., Run]


@pytest.fixture
def fit(make_lit_module: Callable[..., MultiModalLitModule], rows: Path, tmp_path: Path) -> Fit:
    """`fit(*callbacks, module={}, ckpt_path=None, epochs=2, **data)`: a run whose validation rows are those of training."""

    def run(
        *callbacks: Callback, module: dict[str, Any] | None = None, ckpt_path: Path | None = None, epochs: int = 2, **data: Any
    ) -> Run:
        torch.manual_seed(4)
        lit_module = make_lit_module(**(module or {}))
        losses: list[float] = []
        watch = Watch(lambda trainer, _: losses.append(float(trainer.callback_metrics["train/loss"])))
        trainer = make_trainer(tmp_path, watch, *callbacks, max_epochs=epochs)
        datamodule = make_data(lit_module, rows, **({"val_path": str(rows), "batch_size": 3} | data))
        trainer.fit(lit_module, datamodule, ckpt_path=ckpt_path, weights_only=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        features = lit_module.model.frozen_features
        return Run(losses, metrics, weights(lit_module), features.num_read, features.num_encoded)

    return run


def assert_same(one: Run, other: Run) -> None:
    assert one.losses == other.losses and len(one.losses) > 0
    assert one.metrics == other.metrics and len(one.metrics) > 0
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


def cached_files(options: CacheOptions) -> list[Path]:
    return list(Path(options.folder).rglob("*.safetensors"))


@pytest.mark.parametrize(("kind", "num_workers"), [("cnn", 0), ("clip", 2)])
def test_a_run_with_a_feature_cache_is_the_run_without(fit: Fit, options: CacheOptions, kind: str, num_workers: int) -> None:
    def module(cache: CacheOptions | None) -> dict[str, Any]:
        cnn = {"image_encoder": TimmEncoder("efficientnet_lite0", pretrained=False, image_size=32, layer=2)}
        return {"feature_cache": cache, **(cnn if kind == "cnn" else {})}

    plain = fit(module=module(None), num_workers=num_workers)
    filled = fit(module=module(options), num_workers=num_workers)
    assert_same(filled, plain)
    assert (plain.num_read, plain.num_encoded) == (0, 4 * NUM_PICTURES)
    assert (filled.num_read, filled.num_encoded) == (3 * NUM_PICTURES, NUM_PICTURES)
    assert len(cached_files(options)) == NUM_PICTURES
    # another run, in other batches than those that filled the cache
    assert_same(fit(module=module(options), batch_size=5), fit(module=module(None), batch_size=5))
    assert len(cached_files(options)) == NUM_PICTURES


def test_a_hit_is_neither_decoded_nor_encoded(fit: Fit, options: CacheOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(module={"feature_cache": options})

    def never(*args: Any) -> Any:
        raise AssertionError("there is no need for that")

    monkeypatch.setattr("datamodules.dataset.decode", never)  # also tried on the first row before the run
    monkeypatch.setattr("datamodules.loading.contextlib.suppress", lambda _: _Suppress())
    monkeypatch.setattr(HFVisionEncoder, "forward", never)
    again = fit(module={"feature_cache": options})
    assert_same(again, first)
    assert (again.num_read, again.num_encoded) == (4 * NUM_PICTURES, 0)


class _Suppress:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> bool:
        return True


def test_both_caches_at_once(fit: Fit, options: CacheOptions) -> None:
    """Where the features are lost, the media are still there."""
    plain = fit()
    assert_same(fit(module={"feature_cache": options}, media_cache=options), plain)
    assert len(cached_files(options)) == 2 * NUM_PICTURES
    for path in cached_files(options):
        with safe_open(path, framework="pt") as file:
            is_media = "shape" in file.metadata()
        if not is_media:
            path.unlink()
    assert len(cached_files(options)) == NUM_PICTURES
    assert_same(fit(module={"feature_cache": options}, media_cache=options), plain)
    assert len(cached_files(options)) == 2 * NUM_PICTURES


def test_a_run_with_a_media_cache_is_the_run_without(fit: Fit, options: CacheOptions) -> None:
    plain = fit()
    assert_same(fit(media_cache=options), plain)
    assert len(cached_files(options)) == NUM_PICTURES
    assert_same(fit(media_cache=options, num_workers=1), plain)


def test_an_interrupted_run_goes_on_with_its_cache(fit: Fit, options: CacheOptions, tmp_path: Path) -> None:
    """Also where the frozen weights are in the checkpoint, and others are drawn before it is loaded."""

    def module(cache: CacheOptions | None) -> dict[str, Any]:
        encoder = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=32, layer=2)
        return {"image_encoder": encoder, "feature_cache": cache, "lr_scheduler": constant}

    plain = fit(module=module(None))
    fit(ModelCheckpoint(tmp_path / "saved", save_last=True), module=module(options), epochs=1)
    torch.manual_seed(99)
    resumed = fit(module=module(options), ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert_same(resumed._replace(losses=plain.losses), plain)
    assert resumed.losses == plain.losses[len(plain.losses) // 2 :]
    assert resumed.num_encoded == 0 and len(cached_files(options)) == NUM_PICTURES


def test_random_augmentation_switches_the_caches_off_where_it_is(
    fit: Fit, options: CacheOptions, caplog: pytest.LogCaptureFixture
) -> None:
    augment = ImageAugment()
    plain = fit(augment=augment)
    assert_same(fit(module={"feature_cache": options}, media_cache=options, augment=augment), plain)
    messages = [message for message in caplog.messages if "change at random" in message]
    assert len(messages) == 1 and "rows.jsonl: image media" in messages[0]
    assert len(cached_files(options)) == 2 * NUM_PICTURES, "those of validation"


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_encoder_that_trains_is_not_cached(
    fit: Fit, options: CacheOptions, tiny_clip: Path, mode: Any, recwarn: pytest.WarningsRecorder
) -> None:
    def module(cache: CacheOptions | None) -> dict[str, Any]:
        tune = Tune(mode=mode, lora=LoRA(target_modules=("q_proj",)))
        return {"image_encoder": HFVisionEncoder(str(tiny_clip), layer=-2, tune=tune), "feature_cache": cache}

    assert_same(fit(module=module(options)), fit(module=module(None)))
    assert not cached_files(options)
    messages = [str(warning.message) for warning in recwarn if "feature_cache" in str(warning.message)]
    assert len(messages) == 1 and f"image_encoder trains (tune.mode {mode})" in messages[0]


def test_a_frozen_encoder_in_bfloat16_keeps_its_type(fit: Fit, options: CacheOptions, tiny_clip: Path) -> None:
    def module(cache: CacheOptions | None) -> dict[str, Any]:
        return {"image_encoder": HFVisionEncoder(str(tiny_clip), layer=-2, dtype="bfloat16"), "feature_cache": cache}

    plain = fit(module=module(None))
    for _ in range(2):
        assert_same(fit(module=module(options)), plain)
    for path in cached_files(options):
        with safe_open(path, framework="pt") as file:
            assert file.get_tensor("tensor").dtype == torch.bfloat16


def test_answers_and_samples_are_the_same(
    make_lit_module: Callable[..., MultiModalLitModule], rows: Path, tmp_path: Path, options: CacheOptions
) -> None:
    def answers(cache: CacheOptions | None) -> list[str]:
        torch.manual_seed(4)
        module = make_lit_module(feature_cache=cache)
        predictions: Any = make_trainer(tmp_path).predict(module, make_data(module, rows))
        by_hand = [text for batch in batches(make_data(module, rows), generate=True) for text in module.generate(batch)]
        responses = [row["response"] for batch in predictions for row in batch]
        assert by_hand == responses
        return responses

    plain = answers(None)
    assert answers(options) == plain and answers(options) == plain
    assert len(cached_files(options)) == NUM_PICTURES


class TestEncoderHash:
    def encoder(self, folder: Path, **options: Any) -> HFVisionEncoder:
        encoder = HFVisionEncoder(str(folder), **({"layer": -2} | options))
        encoder.build()
        return encoder

    def test_it_is_the_same_for_the_same_encoder(self, tiny_clip: Path) -> None:
        one, other = self.encoder(tiny_clip), self.encoder(tiny_clip)
        other.train()
        other(torch.zeros(1, 3, 32, 32))
        assert encoder_hash(one) == encoder_hash(other)

    def test_each_bit_of_each_weight_counts(self, tiny_clip: Path) -> None:
        encoder = self.encoder(tiny_clip)
        seen = {encoder_hash(encoder)}
        tensors = [*encoder.parameters(), *(b for b in encoder.buffers() if b.dtype == torch.float32)]
        for tensor in tensors:
            bits = tensor.data.reshape(-1).view(torch.int32)
            bits[len(bits) // 2] ^= 1
            seen.add(encoder_hash(encoder))
        assert len(seen) == 1 + len(tensors) > 30

    def test_two_weights_that_change_places_count(self, tiny_clip: Path) -> None:
        """The sums of a checkpoint's fingerprints would be the same."""
        encoder = self.encoder(tiny_clip)
        before = encoder_hash(encoder)
        weight = next(weight for name, weight in encoder.named_parameters() if "q_proj.weight" in name).data
        weight[[0, 1]] = weight[[1, 0]]
        assert encoder_hash(encoder) != before

    @pytest.mark.parametrize("change", [{"layer": -1}, {"pool": 2}, {"tokens": "all"}, {"dtype": "bfloat16"}, {"image_size": 16}])
    def test_options_count(self, tiny_clip: Path, change: dict[str, Any]) -> None:
        assert encoder_hash(self.encoder(tiny_clip)) != encoder_hash(self.encoder(tiny_clip, **change))

    def test_the_configuration_counts_though_the_weights_are_the_same(self, tiny_clip: Path, tmp_path: Path) -> None:
        folder = tmp_path / "clip"
        shutil.copytree(tiny_clip, folder)
        before = encoder_hash(self.encoder(folder))
        path = folder / "config.json"
        config = json.loads(path.read_text())
        hashes = {before}
        for change in ({"num_attention_heads": 2}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3}):
            path.write_text(json.dumps(config | change))
            hashes.add(encoder_hash(self.encoder(folder)))
        assert len(hashes) == 4

    def test_device_threads_and_precision_count(self) -> None:
        cpu, meta = torch.device("cpu"), torch.device("meta")
        ways = [arithmetic(cpu, "32-true"), arithmetic(cpu, "bf16-mixed"), arithmetic(meta, "32-true")]
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        ways.append(arithmetic(cpu, "32-true"))
        torch.set_num_threads(threads)
        assert len({str(way) for way in ways}) == 4


def test_a_changed_picture_is_seen_though_its_size_and_time_stay(fit: Fit, options: CacheOptions, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", 4)
    for path in tmp_path.glob("own-*.png"):
        Image.open(path).save(path, format="bmp")  # as many bytes for any picture of a size
    data = {name: str(own) for name in ("train_path", "val_path")}
    cached: dict[str, Any] = {"module": {"feature_cache": options}, "media_cache": options}
    first = fit(**data, **cached)
    for path in tmp_path.glob("own-*.png"):
        status = path.stat()
        ImageOps.invert(Image.open(path)).save(path, format="bmp")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    again = fit(**data, **cached)
    assert again.num_encoded == first.num_encoded == 4
    assert again.losses != first.losses
    assert_same(again, fit(**data))
