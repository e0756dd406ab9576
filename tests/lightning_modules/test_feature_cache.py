"""Runs with caches give the losses of runs without, bit for bit, and what is stale is never used."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageOps
from safetensors import safe_open

from datamodules.augment import ImageAugment
from datamodules.cache import CacheOptions
from encoders.audio import WhisperEncoder
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.tuning import LoRA, Tune
from lightning_modules.feature_cache import arithmetic, encoder_hash
from lightning_modules.multimodal import MultiModalLitModule
from models.language import Generation
from tests.lightning_modules.media_fakes import make_all, write_media_rows
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import Watch, batches, make_data, make_trainer, weights, write_rows
from train import main

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

    class Forbid(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # the first row was tried before
            monkeypatch.setattr("datamodules.dataset.decode", never)
            monkeypatch.setattr(HFVisionEncoder, "forward", never)

    again = fit(Forbid(), module={"feature_cache": options})
    assert_same(again, first)
    assert (again.num_read, again.num_encoded) == (4 * NUM_PICTURES, 0)


def test_two_processes_share_a_cache(
    fit: Fit, options: CacheOptions, make_lit_module: Callable[..., MultiModalLitModule], rows: Path, tmp_path: Path
) -> None:
    """Each of them reads in the second epoch what the other one has written in the first."""

    def job(folder: Path, cache: CacheOptions | None, trainer_options: dict[str, Any]) -> None:
        torch.manual_seed(4)
        module = make_lit_module(feature_cache=cache)
        trainer = make_trainer(folder, max_epochs=2, **trainer_options)
        trainer.fit(module, make_data(module, rows, batch_size=2))
        features = module.model.frozen_features
        counts = {"read": torch.tensor(features.num_read), "encoded": torch.tensor(features.num_encoded)}
        torch.save(weights(module) | counts, folder / f"{trainer.global_rank}.pt")

    kept = []
    for cache in (None, options):
        folder = tmp_path / f"{cache is None}"
        folder.mkdir()
        assert in_two_processes(job, folder, cache) == [0, 0]
        kept.append([torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)])
    plain, cached = kept
    for without, with_cache in zip(plain, cached, strict=True):
        for counts in (without, with_cache):
            read, encoded = int(counts.pop("read")), int(counts.pop("encoded"))
        assert read + encoded in (6, 7, 8) and encoded in (3, 4)
        assert all(torch.equal(tensor, with_cache[name]) for name, tensor in without.items())
    assert len(cached_files(options)) == NUM_PICTURES


def test_all_kinds_of_media_in_a_row(
    tiny_llm: Path, tiny_clip: Path, tiny_whisper: Path, options: CacheOptions, tmp_path: Path
) -> None:
    """Space-time blocks that train on the frozen features of frames, and give fewer; sounds and clips of two lengths."""
    rows = write_media_rows(tmp_path / "rows.jsonl", ["iva", "va", "", "ai", "vv", "a", "ia"])
    counts, runs = [], []
    for cache in (None, options, options):
        torch.manual_seed(4)
        audio_encoder = WhisperEncoder(name_or_path=str(tiny_whisper), layer=2, stack=5)
        module = make_all(tiny_llm, tiny_clip, tiny_whisper, audio_encoder=audio_encoder, feature_cache=cache)
        losses: list[float] = []
        watch = Watch(lambda trainer, _, seen=losses: seen.append(float(trainer.callback_metrics["train/loss"])))
        trainer = make_trainer(tmp_path, watch, max_epochs=2)
        trainer.fit(module, make_data(module, rows, batch_size=3, media_cache=cache))
        features = module.model.frozen_features
        counts.append((features.num_read, features.num_encoded))
        runs.append(Run(losses, {"none": 0.0}, weights(module), *counts[-1]))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])
    assert counts == [(0, 24), (12, 12), (24, 0)]
    assert len(cached_files(options)) == 2 * 12


def test_a_yaml_sets_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "caches.yaml"
    caches = {"model": {"init_args": {"feature_cache": {"folder": "a"}}}, "data": {"init_args": {"media_cache": {"folder": "b"}}}}
    overlay.write_text(yaml.safe_dump(caches))
    for more in (
        ["--config", str(overlay)],
        ["--model.feature_cache.folder=a", "--data.media_cache.folder=b"],
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "configs/sft/tiny.yaml", *more, "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["model"]["init_args"]["feature_cache"] == {"folder": "a", "max_gb": 20.0}
        assert config["data"]["init_args"]["media_cache"] == {"folder": "b", "max_gb": 20.0}


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
    assert len(messages) == 1 and "image_encoder computes first is trained" in messages[0]


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
        module = make_lit_module(feature_cache=cache, generation=Generation(max_new_tokens=3))
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
