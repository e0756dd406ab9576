"""The sounds of the demo: single spoken words. Synthetic voices to learn from, real recordings to be tested on.

Each split is one long recording and a table that says where which word is in it: demo/voices/ has `train.ogg` and `val.ogg`,
demo/recordings/ has `test.flac`; demo/make_speech.py made them.
"""

import csv
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demo.once import make_once
from demo.rows import make_row, prepared, write_rows

TAPES = {
    "train": Path(__file__).parent / "voices" / "train.ogg",
    "val": Path(__file__).parent / "voices" / "val.ogg",
    "test": Path(__file__).parent / "recordings" / "test.flac",
}
"""One recording a split; its table has the same name and ends in .csv."""
SAMPLE_RATE = 16_000
WORDS = [
    "Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliet", "Kilo", "Lima", "Mike",
    "November", "Oscar", "Papa", "Quebec", "Romeo", "Sierra", "Tango", "Uniform", "Victor", "Whiskey", "X-ray", "Yankee", "Zulu",
    "Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine",
]  # fmt: skip
"""The answers: how letters and digits are spelled over the telephone."""
QUESTION = "Which word?"
VERSION = 1
"""Raise it when `prepare` comes to write something else."""


@dataclass(frozen=True)
class Clip:
    """A word within a tape.

    Args:
        start: Its first sample.
        end: The sample behind its last one.
        word: One of `WORDS`.
        voice: Who speaks.
    """

    start: int
    end: int
    word: str
    voice: str


def prepare(folder: Path) -> dict[str, Path]:
    """Cuts the demo's tapes into single sounds and writes their rows; does nothing if they are there.

    Training has 14 synthetic voices, validation 3 others, the held-out test one real speaker; each says every word once.

    Args:
        folder: Where to; it may exist only if this function made it.

    Returns:
        The files `train`, `val` and `test` (JSONL, rows shuffled by a fixed seed), and their `media_root`.

    Raises:
        ValueError: The folder holds something else, or a tape or its table is missing or does not fit the other.
    """
    files = [file for tape in TAPES.values() for file in (tape, tape.with_suffix(".csv"))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: it belongs to the repository; restore it with `git checkout -- {file}`")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    make_once(folder, {"version": VERSION, "question": QUESTION, "words": WORDS, "sha256": sums}, partial(_write, TAPES))
    return prepared(folder, "audio")


def read_table(table: Path) -> list[Clip]:
    """The clips of a tape, in order.

    Raises:
        ValueError: A line of the table makes no sense.
    """
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        clips = [Clip(int(row["start"]), int(row["end"]), row["word"], row["voice"]) for row in reader]
    for line, (clip, before) in enumerate(zip(clips, [Clip(0, 0, "", ""), *clips], strict=False), start=2):
        if clip.word not in WORDS or not before.end <= clip.start < clip.end:
            raise ValueError(
                f"{table}, line {line}: {clip} is not a clip of one of the {len(WORDS)} words behind the clip before: "
                f"restore it with `git checkout -- {table}`"
            )
    return clips


def _write(tapes: dict[str, Path], folder: Path) -> None:
    import soundfile

    rows: dict[str, list[dict[str, Any]]] = {}
    for split, tape in tapes.items():
        (folder / "audios" / split).mkdir(parents=True)
        clips = read_table(tape.with_suffix(".csv"))
        samples_S, sample_rate = soundfile.read(tape, dtype="int16")
        if sample_rate != SAMPLE_RATE or samples_S.ndim != 1 or len(samples_S) < clips[-1].end:
            raise ValueError(
                f"{tape} has {samples_S.shape} samples at {sample_rate} Hz, expected one channel at {SAMPLE_RATE} Hz "
                f"and at least {clips[-1].end} samples: restore it with `git checkout -- {tape}`"
            )
        rows[split] = []
        for clip in clips:
            sound = f"{split}/{clip.word.lower()}-{clip.voice}.wav"
            soundfile.write(folder / "audios" / sound, samples_S[clip.start : clip.end], SAMPLE_RATE)
            rows[split].append(make_row("audio", sound, QUESTION, clip.word, WORDS))
    write_rows(rows, folder)
