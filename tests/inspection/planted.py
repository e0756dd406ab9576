"""A data set of images, clips, sounds and text in which each fault is planted once, and what must be found in each line.

Shape suffixes: F frames, H height, W width, S samples.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter

MAX_PIXELS = 12_000
MAX_LENGTH = 64
RATE = 16_000


def mosaic(seed: int, side: int = 96) -> Image.Image:
    """A picture of 8 × 8 cells of random colours: sharp, and unlike that of another seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)


def melody(seed: int, seconds: float = 1.0) -> NDArray[np.float32]:
    """A sound of eight random tones of random loudness one after the other."""
    generator = np.random.default_rng(seed)
    time_S = np.arange(round(seconds * RATE / 8)) / RATE
    tones = zip(np.exp(generator.uniform(4.5, 8.5, 8)), generator.uniform(0.05, 0.5, 8), strict=True)
    return np.concatenate([level * np.sin(2 * np.pi * pitch * time_S) for pitch, level in tones]).astype(np.float32)


def film(seed: int, num_frames: int = 16) -> NDArray[np.uint8]:
    """frames_FHW3: a bright block that wanders over a mosaic."""
    generator = np.random.default_rng(seed)
    frames_FHW3 = np.stack([np.asarray(mosaic(seed, 64)) // 2] * num_frames)
    for number, (top, left) in enumerate(generator.integers(0, 40, (num_frames, 2))):
        frames_FHW3[number, top : top + 24, left : left + 24] = 255
    return frames_FHW3


def write_film(path: Path, frames_FHW3: NDArray[np.uint8], quality: int = 18) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=8, options={"crf": str(quality)})
        stream.height, stream.width, stream.pix_fmt = *frames_FHW3.shape[1:3], "yuv420p"
        for frame in frames_FHW3:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


def row(question: str, answer: str = "this", **columns: Any) -> str:
    places = "".join(f"<{kind}>" for kind in ("image", "video", "audio") if f"{kind}s" in columns)
    messages = [{"role": "user", "content": places + question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **columns})


def plant(folder: Path) -> dict[tuple[str, int], set[str]]:
    """Writes `train.jsonl`, `val.jsonl` and their media into a folder.

    Returns:
        For the split and the line of each row that has any the kinds of what must be found in it.
    """
    _write_images(folder)
    _write_clips_and_sounds(folder)
    train = [
        *((row(f"Is it {number}?", images=[f"good{number}.png"]), set()) for number in range(3)),
        (row("Where is it?", images=["missing.png"]), {"unreadable"}),
        (row("Is it whole?", images=["truncated.png"]), {"unreadable"}),
        ('{"messages": [', {"unreadable"}),
        (row("How big is it?", images=["large.png"]), {"unreadable"}),
        (row("How long is it?", "word " * MAX_LENGTH), {"too_long"}),
        (row("Which colour?", images=["blank.png"]), {"blank"}),
        (row("Is it night?", images=["dark.png"]), {"dark"}),
        (row("Is it day?", images=["bright.png"]), {"bright"}),
        (row("Is it sharp?", images=["blurred.png"]), {"blurred"}),
        (row("Is it a copy?", images=["copy.bmp"]), {"duplicate"}),
        (row("Is it nearly a copy?", images=["near.jpg"]), {"near_duplicate"}),
        (row("Was it seen?", images=["leak.png"]), {"leak"}),
        (row("Was it nearly seen?", images=["near_leak.jpg"]), {"near_leak"}),
        (row("  what comes AFTER one?", "Two."), {"leak"}),
        (row("Is it 0?", images=["good0.png"]), {"repeated_row"}),
        (row("Which is better?", "this", images=["good1.png"], rejected_response="This "), {"identical_sides"}),
        *((row(f"What is sung {number}?", audios=[f"good{number}.wav"]), set()) for number in range(2)),
        (row("Is it heard?", audios=["silent.wav"]), {"silent"}),
        (row("Is it loud?", audios=["clipped.wav"]), {"clipped"}),
        (row("Is it a number?", audios=["nan.wav"]), {"unreadable"}),
        (row("Is it softer?", audios=["softer.flac"]), {"near_duplicate"}),
        *((row(f"What moves {number}?", videos=[f"good{number}.mp4"]), set()) for number in range(2)),
        (row("Is it lit?", videos=["black.mp4"]), {"black"}),
        (row("Does it move?", videos=["frozen.mp4"]), {"frozen"}),
        (row("Is it the same?", videos=["again.mp4"]), {"near_duplicate"}),
        (row("Is there anything?", "No, there is not."), set()),
    ]
    val: list[tuple[str, set[str]]] = [
        (row("Is it new?", images=["val0.png"]), set()),
        (row("Is it newer?", images=["val1.png"]), set()),
        (row("What comes after one?", "two."), set()),
    ]
    expected = {}
    for split, rows in (("train", train), ("val", val)):
        (folder / f"{split}.jsonl").write_text("".join(f"{text}\n" for text, _ in rows), encoding="utf-8")
        expected |= {(split, line): kinds for line, (_, kinds) in enumerate(rows, 1) if kinds}
    return expected


def _write_images(folder: Path) -> None:
    for name, seed in (("good0", 0), ("good1", 1), ("good2", 2), ("val0", 10), ("val1", 11), ("leak", 10)):
        mosaic(seed).save(folder / f"{name}.png")
    (folder / "truncated.png").write_bytes((folder / "good2.png").read_bytes()[:150])
    mosaic(3, 120).save(folder / "large.png")
    Image.new("RGB", (96, 96), (90, 120, 40)).save(folder / "blank.png")
    mosaic(4).point(lambda level: level // 14).save(folder / "dark.png")
    mosaic(5).convert("L").point(lambda level: 250 if level < 128 else 255).save(folder / "bright.png")
    mosaic(6).filter(ImageFilter.GaussianBlur(5)).save(folder / "blurred.png")
    mosaic(0).save(folder / "copy.bmp")
    mosaic(1).resize((88, 88), Image.Resampling.BILINEAR).save(folder / "near.jpg", quality=80)
    mosaic(11).resize((104, 104), Image.Resampling.BILINEAR).save(folder / "near_leak.jpg", quality=80)


def _write_clips_and_sounds(folder: Path) -> None:
    import soundfile

    sounds = {
        "good0.wav": melody(0),
        "good1.wav": melody(1),
        "silent.wav": 1e-4 * melody(2),
        "clipped.wav": np.clip(6 * melody(3), -1, 1),
        "softer.flac": 0.5 * melody(1),
    }
    for name, samples_S in sounds.items():
        soundfile.write(folder / name, samples_S, RATE)
    broken_S = melody(4)
    broken_S[100] = np.nan
    soundfile.write(folder / "nan.wav", broken_S, RATE, subtype="FLOAT")
    write_film(folder / "good0.mp4", film(0))
    write_film(folder / "good1.mp4", film(1))
    write_film(folder / "again.mp4", film(1), quality=30)
    write_film(folder / "black.mp4", film(2) // 20)
    write_film(folder / "frozen.mp4", np.stack([film(3)[0]] * 16))


def write_config(folder: Path, **data: Any) -> Path:
    """The recipe of the tiny models of all modalities with the planted data."""
    config = yaml.safe_load(Path("configs/sft/tiny_all.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["prompt"]["max_length"] = MAX_LENGTH
    options = {
        "train_path": str(folder / "train.jsonl"),
        "val_path": str(folder / "val.jsonl"),
        "limits": {"image": {"max_pixels": MAX_PIXELS}},
        "num_workers": 0,
    }
    config["data"] = {"class_path": "ImageDataModule", "init_args": {**options, **data}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "config.yaml"
