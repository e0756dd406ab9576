"""How demo/voices/ and demo/recordings/ were made.

    python -m demo.make_speech SOUNDS_FOLDER

It needs the programs `espeak-ng` and `flite` (Debian packages of these names), and as SOUNDS_FOLDER the G.722 recordings of
Asterisk's English prompts (Debian package `asterisk-core-sounds-en-g722`: `usr/share/asterisk/sounds/en_US_f_Allison`). The
demo needs none of them.

Shape suffix: S samples.
"""

import argparse
import csv
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torchaudio.functional import resample

from demo.speech import SAMPLE_RATE, TAPES, WORDS, Clip

FloatSamples = NDArray[np.float32]


@dataclass(frozen=True)
class Espeak:
    """A voice of espeak-ng.

    Args:
        voice: Its name and, behind a plus sign, its variant.
        words_per_minute: Its speed.
        pitch: From 0 to 99.
    """

    voice: str
    words_per_minute: int
    pitch: int

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return f"espeak-{self.voice}".replace("+", "-").lower()

    def say(self, word: str, file: Path) -> None:
        """Speaks into a file."""
        options = ["-v", self.voice, "-s", str(self.words_per_minute), "-p", str(self.pitch)]
        subprocess.run(["espeak-ng", *options, "-w", file, word.lower()], check=True)


@dataclass(frozen=True)
class Flite:
    """A voice of flite.

    Args:
        voice: Its name.
        stretch: How much longer than usual it speaks.
    """

    voice: str
    stretch: float = 1.0

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return f"flite-{self.voice}" + ("-slow" if self.stretch > 1 else "")

    def say(self, word: str, file: Path) -> None:
        """Speaks into a file."""
        text = FLITE_SPELLING.get(word, word.lower())
        options = ["-voice", self.voice, "--setf", f"duration_stretch={self.stretch}"]
        subprocess.run(["flite", *options, "-t", text, "-o", file], check=True)


FLITE_SPELLING = {"Kilo": "keelo", "Lima": "leema"}
"""Words that flite would say otherwise."""
VOICES: dict[str, list[Espeak | Flite]] = {
    "train": [
        *(Flite(voice, stretch) for voice in ("kal16", "awb", "slt") for stretch in (1.0, 1.2)),
        Espeak("en-us", 120, 45),
        Espeak("en-us+m3", 105, 50),
        Espeak("en-us+f2", 105, 55),
        Espeak("en-us+f3", 135, 45),
        Espeak("en-us+f4", 150, 55),
        Espeak("en-us+Annie", 120, 45),
        Espeak("en-us+Alicia", 105, 55),
        Espeak("en-gb+Andrea", 135, 50),
    ],
    "val": [Flite("rms", 1.1), Espeak("en-us+steph", 125, 50), Espeak("en-gb", 115, 50)],
}
RECORDINGS = {word: f"phonetic/{word[0].lower()}_p" for word in WORDS[:26]} | {
    word: f"digits/{digit}" for digit, word in enumerate(WORDS[26:])
}
"""Asterisk's name of each word."""

PEAK = 0.6
"""Of a synthetic voice."""
SILENCE_DECIBELS = -40.0
"""What is quieter, relative to the loudest 10 ms of a clip, is cut off its ends."""
MARGIN_SECONDS = 0.1
"""Kept before and behind the word."""


def trim(samples_S: FloatSamples) -> FloatSamples:
    """Cuts silence off both ends."""
    block = SAMPLE_RATE // 100
    energy = np.square(samples_S[: len(samples_S) // block * block].reshape(-1, block)).mean(1)
    loud = np.flatnonzero(energy > energy.max() * 10 ** (SILENCE_DECIBELS / 10))
    margin = round(MARGIN_SECONDS * SAMPLE_RATE)
    return samples_S[max(0, loud[0] * block - margin) : (loud[-1] + 1) * block + margin]


def speak(voice: Espeak | Flite, word: str) -> FloatSamples:
    """A word in a synthetic voice, trimmed, at the level of all of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "word.wav"
        voice.say(word, file)
        samples_S, sample_rate = soundfile.read(file, dtype="float32")
    samples_S = trim(resample(torch.from_numpy(samples_S), sample_rate, SAMPLE_RATE).numpy())
    return samples_S * (PEAK / np.abs(samples_S).max())


def read_g722(file: Path) -> FloatSamples:
    """A recording in G.722, which has no header: 16 kHz, one channel."""
    import av

    with av.open(file, format="g722") as container:
        samples_S = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return samples_S.astype(np.float32) / 2**15


def write_tape(tape: Path, sounds: list[tuple[str, str, FloatSamples]]) -> None:
    """Joins sounds into one recording, and writes its table.

    Args:
        tape: The recording; its suffix says how it is stored.
        sounds: Word, voice and samples of each.
    """
    tape.parent.mkdir(exist_ok=True)
    ends = np.cumsum([len(samples_S) for _, _, samples_S in sounds]).tolist()
    clips = [Clip(end - len(samples_S), end, word, voice) for (word, voice, samples_S), end in zip(sounds, ends, strict=True)]
    with tape.with_suffix(".csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["start", "end", "word", "voice"])
        writer.writerows([clip.start, clip.end, clip.word, clip.voice] for clip in clips)
    subtype = "OPUS" if tape.suffix == ".ogg" else "PCM_16"
    with soundfile.SoundFile(tape, "w", SAMPLE_RATE, channels=1, subtype=subtype) as file:
        for _, _, samples_S in sounds:
            file.write(samples_S)


def make_speech(sounds_folder: Path) -> None:
    """Writes the tapes of all splits.

    Args:
        sounds_folder: Asterisk's recordings.
    """
    for split, voices in VOICES.items():
        write_tape(TAPES[split], [(word, voice.name, speak(voice, word)) for voice in voices for word in WORDS])
    recorded = [(word, "allison-smith", read_g722(sounds_folder / f"{name}.g722")) for word, name in RECORDINGS.items()]
    write_tape(TAPES["test"], recorded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sounds_folder", type=Path)
    make_speech(parser.parse_args().sounds_folder)
