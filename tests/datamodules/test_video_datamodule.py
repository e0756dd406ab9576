"""Rows with videos become examples; their lengths are known without decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.augment import ImageAugment, rng
from datamodules.augment_video import VideoAugment
from datamodules.batch import Modality, RowError
from datamodules.content import Media
from datamodules.dataset import MultiModalDataset, RowKey
from datamodules.media_video import Clip, VideoLimits, decode_video
from datamodules.processor import Processor, PromptOptions
from datamodules.sources import MediaRoot
from datamodules.video import VideoDataModule
from encoders.base import Encoder, MediaShape
from encoders.sampling import FrameSampling
from encoders.tuning import Tune
from tests.datamodules.loader_fakes import EvenProjector, PixelEncoder
from tests.datamodules.video_files import draw, number_of, write_video
from tests.tiny import make_tokenizer


class Bits:
    """A clip as the numbers drawn on its frames, bits_F7."""

    sampling = FrameSampling(fps=2.0, max_frames=6)

    def __call__(self, clip: Clip) -> Tensor:
        return torch.tensor([[number_of(frame) >> bit & 1 for bit in range(7)] for frame in clip.frames_FHW3])


class BitEncoder(Encoder):
    """Two features a frame."""

    transform = Bits()
    hidden_size = 7

    def __init__(self) -> None:
        super().__init__(Tune())

    def build(self) -> None:
        raise AssertionError("the data side needs no weights")

    def num_tokens(self, shape: MediaShape) -> int:
        return 2 * shape[0]

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the data side runs no model")


ROWS: list[dict[str, Any]] = [
    {"videos": ["a.mp4"], "text": "<video>What?"},
    {"videos": [{"path": "a.mp4", "start": 1.0, "end": 2.2}], "images": ["3.png"], "text": "<image>And <video>?"},
    {"videos": [["1.png", "2.png", "3.png"], "a.mkv"], "text": "<video> or <video>?"},
    {"text": "Nothing?"},
    {"videos": [{"path": "a.mp4", "start": 4.0}], "text": "<video>Too late?"},
]
BAD_ROW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_video(folder / "a.mp4")
    write_video(folder / "a.mkv")
    for number in range(4):
        Image.fromarray(draw(number)).save(folder / f"{number}.png")
    lines = []
    for row in ROWS:
        messages = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "That."}]
        lines.append(json.dumps({"messages": messages} | {key: row[key] for key in ("images", "videos") if key in row}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(tokenizer, "chatml")
    encoders: dict[Modality, Encoder] = {"image": PixelEncoder(), "video": BitEncoder()}
    return Processor(str(tokenizer), PromptOptions(), encoders, {modality: EvenProjector() for modality in encoders})


def make(folder: Path, processor: Processor, augment: VideoAugment | None = None, **options: Any) -> MultiModalDataset:
    data = VideoDataModule(train_path=str(folder / "rows.jsonl"), augment=augment, processor=processor, seed=4, **options)
    return data.dataset("train")


def seen(media: Tensor) -> list[int]:
    return (media << torch.arange(7)).sum(1).tolist()


@pytest.mark.parametrize("generate", [False, True])
def test_lengths_are_known_without_decoding(
    generate: bool, folder: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(folder, processor)
    dataset.generate = generate
    lengths = [len(dataset[row].tokens) for row in range(4)]
    assert len(set(lengths)) >= 3
    for function in ("decode_image", "decode_video"):
        monkeypatch.setattr(f"datamodules.media.{function}", None)
    assert [dataset.num_tokens(row) for row in range(4)] == lengths


def test_a_bad_row_is_named_by_both(folder: Path, processor: Processor) -> None:
    dataset = make(folder, processor)
    for look in (dataset.__getitem__, dataset.num_tokens):
        with pytest.raises(RowError, match=r"rows\.jsonl:5: a\.mp4 is 2\.88 seconds long, but the row takes it from start = 4"):
            look(BAD_ROW)


def test_the_rows_clips(folder: Path, processor: Processor) -> None:
    dataset = make(folder, processor)
    assert [seen(item.media) for item in dataset[0].media["video"]] == [[6, 18, 30, 42, 54, 66]]  # 2.88 s: 6 frames
    assert [seen(item.media) for item in dataset[1].media["video"]] == [[32, 47]]  # the middles of two times 0.6 seconds
    assert [seen(item.media) for item in dataset[2].media["video"]] == [[1, 2, 3], [6, 18, 30, 42, 54, 66]]
    keys = [item.key for row in range(3) for item in dataset[row].media["video"]]
    assert len(set(keys)) == 4
    batch = VideoDataModule(processor=processor).collate([dataset[row] for row in range(3)])
    assert batch["video"]["mask"] is not None and batch["video"]["mask"].sum(1).tolist() == [6, 2, 3, 6]


def test_training_clips_have_random_frames_by_epoch_and_row(folder: Path, processor: Processor) -> None:
    still = ImageAugment(crop_scale=(1, 1), brightness=0, contrast=0, saturation=0)
    dataset = make(folder, processor, VideoAugment(images=still))
    keys = [RowKey(row, epoch) for row in (0, 2) for epoch in (0, 1)]
    drawn = {key: [seen(item.media) for item in dataset[key].media["video"]] for key in keys}
    assert len({str(clips) for clips in drawn.values()}) == 4
    assert drawn == {key: [seen(item.media) for item in dataset[key].media["video"]] for key in reversed(keys)}
    by_hand = decode_video(Media("video", "a.mp4"), MediaRoot(folder), VideoLimits(), Bits.sampling, rng(4, 1, 0, 0))
    assert drawn[RowKey(0, 1)] == [seen(Bits()(by_hand))]
    middle = make(folder, processor, VideoAugment(images=still, random_frames=False, reverse=1.0))
    assert seen(middle[RowKey(0, 1)].media["video"][0].media) == [66, 54, 42, 30, 18, 6]
    plain = VideoDataModule(val_path=str(folder / "rows.jsonl"), augment=VideoAugment(), processor=processor).dataset("val")
    assert seen(plain[0].media["video"][0].media) == [6, 18, 30, 42, 54, 66]


def test_rows_that_share_a_video_stay_together(folder: Path, processor: Processor) -> None:
    data = VideoDataModule(train_path=str(folder / "rows.jsonl"), processor=processor, val_fraction=0.4, num_workers=0)
    data.setup("fit")
    sides = [set(dataset.rows) for dataset in (data.train_dataset, data.val_dataset)]
    assert all(sides) and sides[0] | sides[1] == set(range(5))
    # rows 0, 1, 2 and 4 are tied by a.mp4 and 3.png
    assert {3} in sides
    assert max(sides, key=len) == {0, 1, 2, 4}
