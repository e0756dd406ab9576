"""Rows with pictures, clips and sounds, and a tiny model that takes all of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from encoders.audio import WhisperEncoder
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.sampling import FrameSampling
from encoders.tuning import LoRA, Tune
from encoders.video import VideoEncoder
from lightning_modules.multimodal import MultiModalLitModule
from models.language import LanguageModel
from tests.datamodules.sound_files import write_sound

FULL = Tune(mode="full")


def make_all(
    llm: Path, clip: Path, whisper: Path, kind: type[MultiModalLitModule] = MultiModalLitModule, **options: Any
) -> MultiModalLitModule:
    """An unbuilt module with an encoder of each modality; those of video and sound are trained, that of images is frozen."""
    frames = HFVisionEncoder(str(clip), layer=-2)
    sampling = FrameSampling(fps=2, max_frames=4)
    parts: dict[str, Any] = {
        "language_model": LanguageModel(str(llm), tune=Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "v_proj")))),
        "image_encoder": HFVisionEncoder(str(clip), layer=-2),
        "image_projector": MLPProjector(),
        "video_encoder": VideoEncoder(frames=frames, sampling=sampling, num_layers=1, num_heads=2, pool="space", tune=FULL),
        "video_projector": MLPProjector(),
        "audio_encoder": WhisperEncoder(name_or_path=str(whisper), layer=2, stack=5, tune=FULL),
        "audio_projector": MLPProjector(),
    }
    return kind(**(parts | options))


def write_media_rows(path: Path, kinds: Sequence[str], answer: str = "It is a bus.") -> Path:
    """A file of rows, each with new media. A kind is a word of letters in reading order: i a picture, v a clip, a a sound; an
    empty one is text. Clips have two or three frames, sounds 0.3 or 0.4 seconds."""
    rng = np.random.default_rng(len(kinds))
    lines = []
    for number, kind in enumerate(kinds):
        row: dict[str, Any] = {"id": str(number), "images": [], "videos": [], "audios": []}
        text = f"Row {number}:"
        for place, letter in enumerate(kind):
            name = f"{path.stem}-{number}-{place}"
            match letter:
                case "i":
                    row["images"].append(_picture(path.parent / f"{name}.png", rng))
                    text += " <image>"
                case "v":
                    frames = range(2 + number % 2)
                    row["videos"].append([_picture(path.parent / f"{name}-{frame}.png", rng) for frame in frames])
                    text += " <video> then"
                case "a":
                    samples_SC = rng.normal(0, 0.1, (4800 + 1600 * (number % 2), 1)).astype(np.float32)
                    row["audios"].append(write_sound(path.parent / f"{name}.wav", samples_SC, 16_000).name)
                    text += " <audio> and"
        row["messages"] = [{"role": "user", "content": f"{text} what?"}, {"role": "assistant", "content": answer}]
        row["rejected_response"] = f"Not {answer}"  # which supervised training does not look at
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _picture(path: Path, rng: np.random.Generator) -> str:
    Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return path.name
