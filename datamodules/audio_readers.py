"""Readers of sound behind one protocol: libsndfile (by soundfile), and FFmpeg (by PyAV) for what that one cannot read exactly.

The content decides which of them reads a file, not its name. libsndfile reads WAV, FLAC, Ogg Vorbis, Opus, AIFF, AU, and MP3
that counts its own frames (all encoders in use write that), whose number of samples it knows exactly from the header.
FFmpeg reads the rest: other MP3, FLAC of unknown length, and the containers of `AUDIO_FORMATS`, videos included.

Shape suffixes: S samples.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.audio_container import ContainerReader
from datamodules.sources import MediaError, as_file

if TYPE_CHECKING:
    from soundfile import SoundFile

_NUMBERS_AT_ONCE = 1 << 26
"""Read at once, of all channels, which are then averaged: 256 MB."""

_WITHOUT_JUMPS = frozenset({"MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III", "VORBIS"})
"""Codings in which libsndfile lands beside its goal (MP3 of variable bit rate, the last page of Vorbis). soundfile jumps after
each read, so they are read at once and from the start, some 500 seconds of sound in one; FFmpeg reads those that are too long
for that. Long recordings of which many parts are taken are better kept as FLAC or WAV."""

_MAX_MISSING_MP3 = 1152
"""Samples of a frame of MP3: the last one may be missing."""

_CUT_OFF = re.compile(
    r"^ *(?:data|SSND|Data Size) *: (?P<said>\d+) \(should be \d+\)"  # WAV, AIFF, AU
    r"|does not match value from 'ds64' chunk"
    r"|lacks an end-of-stream bit|without an End-Of-Stream flag",  # Ogg: RFC 3533, section 6
    re.MULTILINE,
)
"""What libsndfile notes of a file that ends too early, before it reads what there is as if it were all."""

_UNKNOWN_SIZE = 0x7FFFF000
"""A WAV that was written to a pipe says so, or more; it is as long as its file."""


class SoundReader(Protocol):
    """An open sound.

    Attributes:
        sample_rate: Samples a second.
        num_channels: Channels, which `read` averages.
        num_samples: Exactly as many as `read` can give, known without decoding.
    """

    sample_rate: int
    num_channels: int
    num_samples: int

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """The samples from number `start` to `stop` as samples_S, the mean of all channels.

        Raises:
            MediaError: They cannot be decoded.
        """


@contextmanager
def open_sound(found: Path | bytes, name: str) -> Iterator[SoundReader]:
    """Yields the reader for a file.

    Args:
        found: The file, or its bytes.
        name: Of the source, for errors.

    Raises:
        MediaError: It is no sound, or has none in it, or is damaged.
    """
    with as_file(found, name) as file:
        if not is_for_libsndfile(file):
            yield ContainerReader(found, name)
            return
        import soundfile

        file.seek(0)
        handle: BinaryIO | int = file
        if isinstance(found, Path):  # a file object has a name, which soundfile would look at
            handle = file.fileno()
            os.lseek(handle, 0, os.SEEK_SET)
        try:
            with soundfile.SoundFile(handle, closefd=False) as sound:
                yield SoundFileReader(sound, found, name)
        except soundfile.LibsndfileError as error:
            reason = error.error_string.strip(" .") or f"error {error.code}"
            raise MediaError(f"{name} is truncated or damaged (libsndfile: {reason})") from error


def is_for_libsndfile(file: BinaryIO) -> bool:
    """Whether libsndfile reads a file and knows its exact length."""
    head = file.read(64)
    if head.startswith(b"fLaC"):
        return int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF != 0  # number of samples in STREAMINFO (RFC 9639, 8.2)
    if head.startswith(b"OggS"):
        return head[28:35] == b"\x01vorbis" or head[28:36] == b"OpusHead"
    if re.match(rb"(RIFF|RIFX|RF64).{4}WAVE|FORM.{4}AIF[FC]|\.snd", head, re.DOTALL):
        return True
    return _is_mp3_with_length(file, head)


def _is_mp3_with_length(file: BinaryIO, head: bytes) -> bool:
    """Whether a file is MP3 whose first frame is a Xing or Info tag with the number of frames."""
    start = 0
    if head.startswith(b"ID3"):  # its size has seven bits a byte (ID3v2.4, 3.1)
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
    file.seek(start)
    frame = file.read(64)
    tag = re.match(rb"\xff[\xe2-\xff].{7,34}(?:Xing|Info)\0\0\0(.)", frame, re.DOTALL)
    return tag is not None and tag[1][0] & 1 == 1


class SoundFileReader:
    """A sound that libsndfile reads; see `SoundReader`.

    Args:
        sound: The open file.
        found: The same file, or its bytes.
        name: Of the source, for errors.

    Raises:
        MediaError: The file ends earlier than it says.
    """

    def __init__(self, sound: "SoundFile", found: Path | bytes, name: str) -> None:
        self._sound = sound
        self._found = found
        self._name = name
        self.sample_rate = sound.samplerate
        self.num_channels = sound.channels
        self.num_samples = sound.frames
        note = _CUT_OFF.search(sound.extra_info)
        if note is not None and int(note["said"] or 0) < _UNKNOWN_SIZE:
            raise MediaError(f"{name} is truncated: it ends earlier than it says (libsndfile: {note[0].strip()})")

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        samples_S = np.zeros(stop - start, dtype=np.float32)
        place, at_once = start, _NUMBERS_AT_ONCE // self.num_channels
        if self._sound.subtype in _WITHOUT_JUMPS:
            place = 0
            if stop > at_once:
                return ContainerReader(self._found, self._name).read(start, stop)
        self._sound.seek(place)
        while place < stop:
            block_SC = self._sound.read(min(at_once, stop - place), dtype="float32", always_2d=True)
            if len(block_SC) == 0:
                break
            block_S = block_SC.mean(1)[max(0, start - place) :]
            place += len(block_SC)
            samples_S[place - start - len(block_S) : place - start] = block_S
        if stop - place > (_MAX_MISSING_MP3 if self._sound.format == "MP3" else 0):
            raise MediaError(
                f"{self._name} is truncated or damaged: it says that it has {self.num_samples:,} samples, but after {place:,} of "
                "them none can be decoded"
            )
        return samples_S
