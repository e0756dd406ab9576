"""The rows that all of the demo's data come as: a question about one medium, its answer, and the answers to choose from."""

import json
import random
from pathlib import Path
from typing import Any, Literal

Modality = Literal["image", "video", "audio"]
SPLITS = ("train", "val", "test")
SEED = 2017


def make_row(modality: Modality, file: str, question: str, answer: str, choices: list[str]) -> dict[str, Any]:
    """A row in the native form.

    Args:
        modality: What the file is.
        file: Its path below the media root, which also names the row.
        question: What is asked about it.
        answer: The right answer.
        choices: All answers, the right one among them.
    """
    return {
        "id": file.rpartition(".")[0].replace("/", "-"),
        "messages": [{"role": "user", "content": f"<{modality}>{question}"}, {"role": "assistant", "content": answer}],
        f"{modality}s": [file],
        "choices": choices,
    }


def write_rows(rows: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Writes a JSONL file a split, its rows shuffled by a fixed seed.

    Args:
        rows: Those of each split.
        folder: Gets `<split>.jsonl`.
    """
    for split, split_rows in rows.items():
        shuffled = list(split_rows)
        random.Random(SEED).shuffle(shuffled)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shuffled), encoding="utf-8")


def prepared(folder: Path, modality: Modality) -> dict[str, Path]:
    """What `write_rows` wrote: the files `train`, `val` and `test`, and the `media_root` that their paths are below."""
    return {"media_root": folder / f"{modality}s"} | {split: folder / f"{split}.jsonl" for split in SPLITS}
