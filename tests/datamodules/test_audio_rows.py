"""Rows with sound all the way to the model: lengths from headers, augmentation, bad rows, and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.audio import AudioDataModule
from datamodules.augment import rng
from datamodules.augment_audio import AudioAugment, SpecAugment
from datamodules.batch import Example, RowError
from datamodules.collate import collate
from datamodules.dataset import MultiModalDataset, RowKey
from datamodules.media_audio import AudioLimits, decode_audio
from datamodules.processor import Processor
from datamodules.sources import MediaRoot
from encoders.audio import Wav2Vec2Encoder, WhisperEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import Tune
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from tests.datamodules.sound_files import tone, write_container, write_sound

AUGMENT = AudioAugment(noise=1.0, spec=SpecAugment(max_time=20))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five rows: three sounds of different lengths, rates and formats, a part of one, and text alone."""
    write_sound(tmp_path / "0.wav", tone(11_025, 22_050, channels=2), 22_050)
    write_sound(tmp_path / "1.mp3", tone(24_000, 16_000), 16_000)
    write_container(tmp_path / "2.mp4", tone(40_000, 48_000), 48_000, "mp4", "aac", num_frames=20)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "That."}], "audios": [source]}
        for source in ("0.wav", "1.mp3", "2.mp4", {"path": "1.mp3", "start": 0.5, "end": 0.75})
    ]
    rows.append({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def processor(tiny_llm: Path, tiny_whisper: Path) -> Processor:
    encoder = WhisperEncoder(name_or_path=str(tiny_whisper), stack=4)
    return Processor(str(tiny_llm), encoders={"audio": encoder}, projectors={"audio": MLPProjector()})


def dataset(path: Path, processor: Processor, augment: AudioAugment | None = None) -> MultiModalDataset:
    return MultiModalDataset(str(path), str(path.parent), processor, modality="audio", augment=augment, seed=11)


def test_a_row_takes_the_tokens_that_its_header_promises(path: Path, processor: Processor) -> None:
    rows = dataset(path, processor)
    examples = [rows[number] for number in range(5)]
    assert [rows.num_tokens(number) for number in range(5)] == [len(example.tokens) for example in examples]
    seconds = (0.5, 1.5, 40_000 / 48_000, 0.25)
    for example, expected in zip(examples, seconds, strict=False):
        (item,) = example.media["audio"]
        assert item.num_tokens == pytest.approx(12.5 * expected, abs=1) and item.media.shape[1] == 80
        assert example.tokens.count(processor.chat.media_ids["audio"]) == item.num_tokens
    assert not examples[4].media
    waveform = decode_audio("1.mp3", MediaRoot(path.parent), AudioLimits(), 16_000, start=0.5, end=0.75)
    assert torch.equal(examples[3].media["audio"][0].media, processor.encoders["audio"].transform(waveform))


def test_augmentation_is_a_function_of_seed_epoch_and_row(path: Path, processor: Processor) -> None:
    rows, plain = dataset(path, processor, AUGMENT), dataset(path, processor)
    keys = [RowKey(row, epoch) for epoch in (0, 2) for row in range(4)]
    once = {key: rows[key].media["audio"][0] for key in keys}
    assert all(torch.equal(rows[key].media["audio"][0].media, once[key].media) for key in reversed(keys))
    assert len({item.key for item in once.values()}) == len(keys)
    waveform = decode_audio("0.wav", MediaRoot(path.parent), AudioLimits(), 16_000)
    mel_TM = processor.encoders["audio"].transform(AUGMENT(waveform, rng(11, 2, 0, 0)))
    expected = SpecAugment(max_time=20)(mel_TM, rng(11, 2, 0, 0, stage=1))
    assert torch.equal(once[RowKey(0, 2)].media, expected)
    for key in keys:
        assert once[key].media.shape == plain[key].media["audio"][0].media.shape


def test_a_bad_sound_costs_one_row(path: Path, processor: Processor) -> None:
    (path.parent / "1.mp3").write_bytes(b"no sound")
    write_sound(path.parent / "0.wav", tone(0, 16_000), 16_000)
    items = dataset(path, processor).__getitems__(list(range(5)))
    assert [type(item) for item in items] == [RowError, RowError, Example, RowError, Example]
    assert "rows.jsonl:1: 0.wav has no samples" in str(items[0]) and "1.mp3 is not a sound" in str(items[1])


def test_a_sound_that_is_too_short_for_the_encoder_costs_one_row(path: Path, tiny_llm: Path, tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config

    Wav2Vec2Config().save_pretrained(tmp_path / "wav2vec2")
    encoder = Wav2Vec2Encoder(name_or_path=str(tmp_path / "wav2vec2"), normalise=True)
    processor = Processor(str(tiny_llm), encoders={"audio": encoder}, projectors={"audio": MLPProjector()})
    write_sound(path.parent / "0.wav", tone(300, 16_000), 16_000)
    rows = dataset(path, processor)
    for read in (rows.__getitem__, rows.num_tokens):
        with pytest.raises(RowError, match=r"rows\.jsonl:1: 0\.wav is 300 samples long .* at least 400"):
            read(0)
    assert rows.num_tokens(1) == len(rows[1].tokens)


def test_the_data_module_augments_what_it_trains_on(path: Path, processor: Processor) -> None:
    data = AudioDataModule(train_path=str(path), val_path=str(path), augment=AUGMENT, num_workers=0, processor=processor)
    data.setup("fit")
    train, val, plain = data.train_dataset[0], data.val_dataset[0], dataset(path, processor)[0]
    assert not torch.equal(train.media["audio"][0].media, plain.media["audio"][0].media)
    assert torch.equal(val.media["audio"][0].media, plain.media["audio"][0].media)
    waveforms = AudioDataModule(train_path=str(path), num_workers=0, processor=processor)
    assert not waveforms.augment


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_gradients_reach_the_log_mel_of_a_tower_that_trains(
    path: Path, processor: Processor, tiny_llm: Path, tiny_whisper: Path, mode: Any
) -> None:
    encoder = WhisperEncoder(name_or_path=str(tiny_whisper), stack=4, tune=Tune(mode=mode))
    model = MultiModalModel(LanguageModel(str(tiny_llm)), audio_encoder=encoder, audio_projector=MLPProjector())
    model.build(processor.chat.media_ids)
    model.train()
    rows = dataset(path, processor)
    batch = collate([rows[number] for number in range(5)], processor.pad_id)
    if mode == "full":
        batch["audio"]["media"].requires_grad_()
    model(batch).square().sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    if mode == "frozen":
        assert not gradients and batch["audio"]["media"].grad is None
    else:
        assert len(gradients) == sum(parameter.requires_grad for parameter in encoder.parameters()) > 0
        assert batch["audio"]["media"].grad.abs().sum((1, 2)).gt(0).all()
        assert not batch["audio"]["media"].grad[~batch["audio"]["mask"]].any()
    assert all(parameter.grad is not None for parameter in model.audio_projector.parameters())
