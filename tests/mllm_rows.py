"""Rows for ready models, as ours and as transformers takes them: several media a row, in several turns, of different sizes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.batch import MODALITIES, Example, Modality, Origin
from datamodules.conversation import Sample, parse_row
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from datamodules.processor import Processor

RATE = 16_000
FPS = 10.0
"""Frames a second of the videos that the clips are taken from."""

Piece = str | tuple[Modality, str]
"""A text, or a medium by its name: that of an image is its size (`"60x80"`), that of a clip the indices of its frames
(`"0,5,10"`), that of a sound its seconds (`"1.5"`)."""

Row = list[tuple[str, list[Piece]]]
"""Role and content of each message."""


def rows_of(family: str) -> list[Row]:
    """Rows with all kinds of media that a family takes, and one without any."""
    text: Row = [("user", ["How many birds are there?"]), ("assistant", ["There are three birds."])]
    if family == "qwen2_audio":
        return [
            [("user", [("audio", "1.5"), "What is this?"]), ("assistant", ["The animal is a dog."])],
            text,
            [
                ("system", ["You are a helpful assistant."]),
                ("user", ["Is ", ("audio", "0.7"), " or ", ("audio", "3.9"), " a cat?"]),
                ("assistant", ["The cat is white."]),
                ("user", [("audio", "0.7"), "And this?"]),
                ("assistant", ["It is a boat on the water."]),
            ],
        ]
    images: list[Row] = [
        [("user", [("image", "60x80"), "What is in this picture?"]), ("assistant", ["A red bus waits."])],
        text,
        [
            ("user", ["Is ", ("image", "90x40"), " or ", ("image", "30x30"), " a cat?"]),
            ("assistant", ["The cat is white."]),
            ("user", [("image", "60x80"), "And this?"]),
            ("assistant", ["It is a picture of a boat."]),
        ],
    ]
    clips: list[Row] = [
        [("user", ["What happens?", ("video", "0,5,10,15")]), ("assistant", ["A bus waits."])],
        [
            ("user", [("video", "3,6,9,12"), "and ", ("image", "60x80"), " are?"]),
            ("assistant", ["The animal is a dog."]),
        ],
    ]
    return images if family in ("llava", "gemma3") else images + clips


def media_of(row: Row, modality: Modality) -> list[str]:
    """Names of the media of a row, in order."""
    return [piece[1] for _, content in row for piece in content if not isinstance(piece, str) and piece[0] == modality]


def decoded(modality: Modality, name: str) -> Any:
    """The medium of a name: random pixels or samples, always the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def pixels(*shape: int) -> Any:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()

    match modality:
        case "image":
            height, width = map(int, name.split("x"))
            return Image.fromarray(pixels(height, width, 3))
        case "video":
            frames = [int(number) for number in name.split(",")]
            return Clip(pixels(len(frames), 56, 70, 3), np.array(frames) / FPS)
        case "audio":
            return Waveform(torch.randn(round(float(name) * RATE), generator=generator).mul(0.1).numpy(), RATE)


def sample_of(row: Row, number: int = 0) -> Sample:
    """The row as ours."""
    messages = [
        {"role": role, "content": "".join(piece if isinstance(piece, str) else f"<{piece[0]}>" for piece in content)}
        for role, content in row
    ]
    lists = {f"{modality}s": media_of(row, modality) for modality in MODALITIES if media_of(row, modality)}
    return parse_row({"messages": messages, **lists}, Origin("rows.jsonl", number + 1))


def example_of(row: Row, processor: Processor, number: int = 0, generate: bool = False) -> Example:
    """The row as an example of a processor."""
    media = {m: [(name, decoded(m, name)) for name in media_of(row, m)] for m in MODALITIES if media_of(row, m)}
    return processor(sample_of(row, number), media, generate=generate)


def hugging_face_batch(rows: Sequence[Row], ready: Any, side: str = "right", generate: bool = False) -> dict[str, Any]:
    """What the processor of transformers makes of rows, padded."""
    texts = []
    for row in rows:
        chat = [
            {
                "role": role,
                "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0]} for p in content],
            }
            for role, content in (row[:-1] if generate else row)
        ]
        texts.append(ready.apply_chat_template(chat, add_generation_prompt=generate))
    options: dict[str, Any] = {}
    if any(media_of(row, "image") for row in rows):
        options["images"] = [[decoded("image", name) for name in media_of(row, "image")] for row in rows]
    if any(media_of(row, "video") for row in rows):
        names = [name for row in rows for name in media_of(row, "video")]
        options["videos"] = [torch.from_numpy(decoded("video", name).frames_FHW3).permute(0, 3, 1, 2) for name in names]
        options |= {"video_metadata": [_metadata(name) for name in names], "do_sample_frames": False}
    if any(media_of(row, "audio") for row in rows):
        options["audio"] = [decoded("audio", name).samples_S for row in rows for name in media_of(row, "audio")]
        options["sampling_rate"] = RATE
    return dict(ready(text=texts, padding=True, padding_side=side, return_tensors="pt", **options))


def _metadata(name: str) -> dict[str, Any]:
    """As the decoder of transformers tells it of a file whose frames were taken at even distances."""
    indices = [int(number) for number in name.split(",")]
    step = indices[1] - indices[0]
    return {"total_num_frames": step * len(indices), "fps": FPS, "frames_indices": indices}
