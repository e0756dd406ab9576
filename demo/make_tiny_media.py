"""Draws the clips and tones of configs/sft/tiny_all.yaml, and makes its audio encoder's folder, without weights.

`python -m demo.make_tiny_media` wrote what is in demo/tiny/clips and demo/tiny/tones; run it again to change that.

Shape suffixes: S samples.
"""

import json
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from demo.make_tiny import COLOURS, another

FOLDER = Path(__file__).parent / "tiny"
DIRECTIONS = {"left": (-2, 0), "right": (2, 0), "up": (0, -2), "down": (0, 2)}
TONES = {"rises": (400, 1200), "falls": (1200, 400)}
NUM_FRAMES = 8
FRAMES_A_SECOND = 8
SAMPLE_RATE = 8000
TONE_SECONDS = 0.25


def film(path: Path, direction: str, generator: random.Random) -> None:
    """A coloured disc that moves in a direction for a second, 32 x 32 pixels."""
    import av

    colour = generator.choice(list(COLOURS.values()))
    left, top = generator.randint(8, 12), generator.randint(8, 12)
    right, down = DIRECTIONS[direction]
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAMES_A_SECOND, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(NUM_FRAMES):
            image = Image.new("RGB", (32, 32), (245, 245, 240))
            x, y = left + (number - NUM_FRAMES // 2) * right, top + (number - NUM_FRAMES // 2) * down
            ImageDraw.Draw(image).ellipse((x, y, x + 10, y + 10), fill=colour)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def play(path: Path, tone: str, generator: random.Random) -> None:
    """A tone that changes its pitch steadily, 16 bit."""
    start, end = (pitch * generator.uniform(0.9, 1.1) for pitch in TONES[tone])
    time_S = np.arange(int(SAMPLE_RATE * TONE_SECONDS)) / SAMPLE_RATE
    phase_S = 2 * np.pi * (start * time_S + (end - start) * time_S**2 / (2 * TONE_SECONDS))
    samples_S = (generator.uniform(0.2, 0.6) * 32767 * np.sin(phase_S)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples_S.tobytes())


def write_rows(
    folder: str, key: str, suffix: str, question: str, answers: list[str], make: Callable[[Path, str, random.Random], None]
) -> None:
    """Training and validation rows, with a medium of each answer in turn."""
    generator = random.Random(21)
    (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    for split, num_rows in (("train", 16), ("val", 4)):
        rows = []
        for number in range(num_rows):
            answer = answers[number % len(answers)]
            name = f"{split}-{answer}-{number}.{suffix}"
            make(FOLDER / folder / name, answer, generator)
            messages = [{"role": "user", "content": f"<{key}>{question}"}, {"role": "assistant", "content": answer}]
            wrong = another(answers, answer, number // len(answers))
            rows.append({"messages": messages, "rejected_response": wrong, f"{key}s": [name], "choices": answers})
        generator.shuffle(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def write_audio_encoder() -> None:
    """The configuration of a two-layer Whisper for windows of a second."""
    from transformers import WhisperConfig, WhisperFeatureExtractor

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        max_source_positions=50,
    )
    config.save_pretrained(FOLDER / "whisper")
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(FOLDER / "whisper")


def main() -> None:
    """Writes the rest of demo/tiny."""
    write_rows("clips", "video", "mp4", "Which way?", list(DIRECTIONS), film)
    write_rows("tones", "audio", "wav", "How does it go?", list(TONES), play)
    write_audio_encoder()


if __name__ == "__main__":
    main()
