"""A video file that is opened: which container it is, and its main stream.

The content decides what a file is, not its name, and only the containers below are opened: FFmpeg also knows playlists, which
would open other files.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.media_image import IMAGE_FORMATS
from datamodules.sources import MediaError, as_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_FORMATS: dict[str, re.Pattern[bytes]] = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL),  # MP4, QuickTime
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
    "mpegts": re.compile(rb"\x47.{187}\x47|.{4}\x47.{191}\x47", re.DOTALL),
    "mpeg": re.compile(rb"\x00\x00\x01\xba"),
    "flv": re.compile(rb"FLV\x01"),
    "asf": re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # WMV
    "ogg": re.compile(rb"OggS"),
    "gif": re.compile(rb"GIF8[79]a"),
}
"""What a container starts with, by the name of FFmpeg's reader of it."""

_WITH_ALL_IN_HEADER = frozenset({"mov"})
"""Others leave to their frames how large these are, or when the first one is shown."""


@dataclass(frozen=True)
class VideoFile:
    """A video that was found.

    Args:
        found: The file, or its bytes.
        name: Of the source, for errors.
    """

    found: Path | bytes
    name: str

    @cached_property
    def container(self) -> str:
        """The container, told by its first bytes: a name of `VIDEO_FORMATS`.

        Raises:
            MediaError: It is none of them.
        """
        with as_file(self.found, self.name) as file:
            head = file.read(512)
        for container, pattern in VIDEO_FORMATS.items():
            if pattern.match(head):
                return container
        if any(pattern.match(head) for pattern, _ in IMAGE_FORMATS.values()):
            raise MediaError(
                f"{self.name} is an image, not a video; a video of image files is a list of its own, within the list of videos"
            )
        raise MediaError(
            f"{self.name} is not a video: its first bytes are {head[:16]!r}; "
            "expected MP4, MOV, MKV, WebM, AVI, MPEG, FLV, WMV, Ogg or GIF"
        )

    @contextmanager
    def open(self, for_header: bool = False) -> "Iterator[tuple[InputContainer, VideoStream]]":
        """Yields the container and its main video stream; what FFmpeg then raises for the file is a `MediaError`.

        Args:
            for_header: Frames are not asked for. FFmpeg decodes one of them when it opens a file, which costs more than all the
                rest; a container that says all by itself is opened without.
        """
        import av
        from av.video.stream import VideoStream

        options = {"codec_whitelist": "none"} if for_header and self.container in _WITH_ALL_IN_HEADER else {}
        file = io.BytesIO(self.found) if isinstance(self.found, bytes) else str(self.found)
        try:
            with av.open(file, "r", format=self.container, options=options, metadata_errors="replace") as container:
                stream = container.streams.best("video")
                if not isinstance(stream, VideoStream):
                    kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
                    raise MediaError(f"{self.name} holds no video, but {kinds}")
                if stream.codec_context is None or stream.time_base is None:
                    raise MediaError(f"{self.name} is coded in a way that FFmpeg cannot decode: encode it as H.264, for example")
                stream.codec_context.thread_count = 1  # loader workers are the parallel processes
                yield container, stream
        except av.FFmpegError as error:
            raise MediaError(f"{self.name} is truncated or damaged: {error.strerror or error}") from error
