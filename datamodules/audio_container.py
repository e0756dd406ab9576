"""Sound in containers, that of videos included, read by FFmpeg (PyAV).

Headers of containers are rounded, estimated or missing. So the length of a sound is taken from its packets, which are read
without decoding them (about 3 microseconds each), and what is decoded is cut or padded with silence to that length:
at most `_MAX_DIFFERENCE` samples, since codecs fill their last frame; more is an error. A file that was cut off is told by what
its container claims; a plain stream (AAC, MP3 without a count, FLAC in Ogg) that ends between two frames looks whole.

Shape suffixes: S samples.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.sources import MediaError, as_file
from datamodules.video_file import VIDEO_FORMATS

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

AUDIO_FORMATS: dict[str, re.Pattern[bytes]] = {
    **{name: pattern for name, pattern in VIDEO_FORMATS.items() if name != "gif"},
    "aac": re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"),
    "mp3": re.compile(rb"ID3|\xff[\xe2-\xff]"),
    "flac": re.compile(rb"fLaC"),
    "amr": re.compile(rb"#!AMR"),
    "caf": re.compile(rb"caff"),
    "ac3": re.compile(rb"\x0b\x77"),
    "wv": re.compile(rb"wvpk"),
}
"""What a file starts with, by the name of FFmpeg's reader of it; one of another format is not opened."""

_SHOWN = "WAV, FLAC, MP3, Ogg, Opus, AIFF, AU, M4A, AAC, AMR, CAF, AC-3, WavPack, or a video: MP4, MOV, MKV, WebM, AVI, WMV"

_WITHOUT_INDEX = frozenset({"aac", "mp3", "flac", "amr", "ac3", "ogg"})
"""In these FFmpeg guesses how long they are, or where a time lies: a part is found by decoding from the start."""

_MAX_DIFFERENCE = 4096
"""Two frames of the longest codec (HE-AAC)."""

_PRE_ROLL_SECONDS = 0.5
"""Decoded before a part and dropped: a decoder needs earlier frames before its output is right (MP3 and Opus up to 0.3)."""

_GAP_SECONDS = 0.1
"""Where time stamps jump by more, nothing was recorded: it stays silence, so that what follows keeps its time."""

_CLAIM_SECONDS = 0.5
"""A container that says it is longer by more than its last packet shows was cut off."""


class ContainerReader:
    """The main sound of a file; see `SoundReader`. It begins with its first sample, as FFmpeg's command does.

    Args:
        found: The file, or its bytes.
        name: Of the source, for errors.

    Raises:
        MediaError: There is no sound in it, or it is damaged.
    """

    def __init__(self, found: Path | bytes, name: str) -> None:
        self._found = found
        self._name = name
        first: int | None = None
        end, end_of_all = 0, Fraction(0)
        with _open(found, name) as (container, stream):
            for packet in container.demux():
                time = packet.dts if packet.pts is None else packet.pts
                if packet.size == 0 or time is None:  # the end of a stream, or of no known time
                    continue
                if packet.is_corrupt:
                    raise MediaError(f"{name} is truncated or damaged after {float(time * packet.time_base):.2f} s")
                duration = packet.duration or 0
                stop = time + (duration if duration < 1 << 31 else duration - (1 << 32))  # negative in short files of Vorbis
                end_of_all = max(end_of_all, stop * Fraction(packet.time_base))
                if packet.stream.index == stream.index:
                    first, end = time if first is None else first, max(end, stop)
            claimed = 0.0 if container.format.name in _WITHOUT_INDEX else (container.duration or 0) / 1_000_000
            unit, start = Fraction(stream.time_base or 1), stream.start_time
            self.sample_rate, self.num_channels = stream.codec_context.sample_rate, stream.codec_context.channels
        if first is None:
            raise MediaError(f"{name} has a sound track with nothing in it")
        if claimed > end_of_all + _CLAIM_SECONDS:
            raise MediaError(
                f"{name} is truncated: it says that it lasts {claimed:.2f} s, and ends after {float(end_of_all):.2f} s"
            )
        self._start = (first if start is None else max(first, start)) * unit  # before it lies what the decoder drops
        self.num_samples = round((end * unit - self._start) * self.sample_rate)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        samples_S = np.zeros(stop - start, dtype=np.float32)
        end = 0
        for place, block_S in self._blocks(start):
            end = place + len(block_S)
            first, last = max(place, start), min(end, stop)
            if first < last:
                samples_S[first - start : last - start] = block_S[first - place : last - place]
            if end >= stop and stop < self.num_samples:
                return samples_S
        if abs(end - self.num_samples) > _MAX_DIFFERENCE:
            raise MediaError(
                f"{self._name} is truncated or damaged: {self.num_samples:,} samples were expected by its packets, and "
                f"{end:,} can be decoded"
            )
        return samples_S

    def _blocks(self, start: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Decoded blocks, each with the number of its first sample; the first ends before `start`, or near it."""
        import av

        with _open(self._found, self._name) as (container, stream):
            seconds = start / self.sample_rate - _PRE_ROLL_SECONDS
            if seconds > 0 and container.format.name not in _WITHOUT_INDEX:
                container.seek(int((self._start + Fraction(seconds)) / Fraction(stream.time_base or 1)), stream=stream)
            to_float = av.AudioResampler(format="fltp")
            place = None
            for frame in container.decode(stream):
                if frame.sample_rate != self.sample_rate:
                    raise MediaError(
                        f"{self._name} changes its rate from {self.sample_rate} to {frame.sample_rate} samples a second: "
                        "encode it again with one rate"
                    )
                stamp = self._place(frame)
                if place is None or stamp > place + _GAP_SECONDS * self.sample_rate:
                    place = stamp
                for block in to_float.resample(frame):
                    block_S = block.to_ndarray().mean(0)
                    yield place, block_S
                    place += len(block_S)

    def _place(self, frame: Any) -> int:
        if frame.pts is None:
            return 0
        return round((frame.pts * Fraction(frame.time_base) - self._start) * self.sample_rate)


@contextmanager
def _open(found: Path | bytes, name: str) -> "Iterator[tuple[InputContainer, AudioStream]]":
    """Yields the container and its main sound; what FFmpeg then raises for the file is a `MediaError`."""
    import av
    from av.audio.stream import AudioStream

    file = io.BytesIO(found) if isinstance(found, bytes) else str(found)
    try:
        with av.open(file, mode="r", format=_container_of(found, name), metadata_errors="replace") as container:
            stream = container.streams.best("audio")
            if not isinstance(stream, AudioStream):
                raise MediaError(
                    f"{name} has no sound: it holds {', '.join(s.type for s in container.streams) or 'nothing'} only"
                )
            if stream.codec_context is None or not stream.codec_context.sample_rate:
                raise MediaError(f"{name} has sound that FFmpeg cannot decode: encode it again, for example as FLAC")
            stream.codec_context.thread_count = 1  # loader workers are the parallel processes
            yield container, stream
    except av.FFmpegError as error:
        raise MediaError(f"{name} is truncated or damaged (FFmpeg: {error.strerror or error})") from error


def _container_of(found: Path | bytes, name: str) -> str:
    with as_file(found, name) as file:
        head = file.read(512)
    for container, pattern in AUDIO_FORMATS.items():
        if pattern.match(head):
            return container
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    shown = f"text ({head[:32].decode('ascii')!r})" if is_text else repr(head[:16])
    raise MediaError(f"{name} is not a sound: its first bytes are {shown}; expected {_SHOWN}")
