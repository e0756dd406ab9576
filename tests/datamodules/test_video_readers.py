"""Frames are those that are shown at the times that were asked for, whatever the container and the coding, by both readers."""

import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from datamodules.sources import MediaError
from datamodules.video_decord import read_by_decord
from datamodules.video_file import VideoFile
from datamodules.video_header import read_header
from datamodules.video_packets import read_packets
from datamodules.video_pyav import read_by_pyav
from datamodules.video_reader import VideoReader
from tests.datamodules.video_files import EVEN, OPEN_GROUPS, UNEVEN, corner_of, hide_first, number_of, write_video

READERS: dict[str, VideoReader] = {"decord": read_by_decord, "pyav": read_by_pyav}
FRAMES = list(range(72))
MPEG4 = {"g": "12", "bf": "2", "q": "2"}
HEVC = {"x265-params": "open-gop=1:bframes=4:keyint=12:log-level=none", "preset": "ultrafast"}
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}

Write = Callable[[Path], Path]
VIDEOS: dict[str, tuple[Write, list[int]]] = {
    "even.mp4": (write_video, EVEN),
    "uneven.mp4": (lambda path: write_video(path, UNEVEN), UNEVEN),
    "uneven.mkv": (lambda path: write_video(path, UNEVEN), UNEVEN),
    "uneven.webm": (lambda path: write_video(path, UNEVEN, "libvpx-vp9", VP9), UNEVEN),
    "late.mp4": (lambda path: write_video(path, [5000 + time for time in EVEN]), EVEN),
    "late.mkv": (lambda path: write_video(path, [5000 + time for time in EVEN]), EVEN),
    "open.mp4": (lambda path: write_video(path, options=OPEN_GROUPS), EVEN),
    "open.mkv": (lambda path: write_video(path, options=OPEN_GROUPS), EVEN),
    "hevc.mp4": (lambda path: write_video(path, UNEVEN, "libx265", HEVC), UNEVEN),
    "fragments.mp4": (lambda path: write_video(path, container={"movflags": "frag_keyframe+empty_moov"}), EVEN),
    "one.mp4": (lambda path: write_video(path, [0]), [0]),
    "two_way.avi": (lambda path: write_video(path, FRAMES, "mpeg4", MPEG4, Fraction(1, 25)), EVEN),
    "h264.avi": (lambda path: write_video(path, FRAMES, unit=Fraction(1, 25)), EVEN),
    "stream.mpg": (lambda path: write_video(path, FRAMES, "mpeg2video", MPEG4, Fraction(1, 25)), EVEN),
    "even.flv": (write_video, EVEN),
    "even.wmv": (lambda path: write_video(path, FRAMES, "wmv2", {"g": "12", "q": "2"}, Fraction(1, 25)), EVEN),
    "even.gif": (lambda path: write_video(path, [4 * n for n in FRAMES], "gif", {}, Fraction(1, 100), "rgb8"), EVEN),
    "even.ts": (write_video, EVEN),
    "uneven.av1.mp4": (lambda path: write_video(path, UNEVEN, "libsvtav1", {"preset": "13", "crf": "20"}), UNEVEN),
}
"""By name: how to write it, and when its frames are shown in milliseconds."""
BEYOND_DECORD = {"even.gif", "even.ts", "uneven.av1.mp4"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VideoFile]:
    folder = tmp_path_factory.mktemp("videos")

    def get(name: str) -> VideoFile:
        path = folder / name
        return VideoFile(path if path.exists() else VIDEOS[name][0](path), name)

    return get


def some_times(seconds: float, seed: int) -> list[float]:
    if seed == 0:
        return [0.0, 0.0, seconds / 3, seconds]
    return sorted(np.random.default_rng(seed).uniform(0, seconds, 5).tolist())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", VIDEOS)
def test_the_frames_that_are_shown(name: str, reader: str, written: Callable[[str], VideoFile]) -> None:
    video, shown = written(name), np.array(VIDEOS[name][1]) / 1000
    header = read_header(video)
    if reader == "decord" and name in BEYOND_DECORD:
        with pytest.raises(MediaError, match=f"{name} is .*, which decord does not read: set data.limits.video.reader to pyav"):
            READERS[reader](video, header, [0.0])
        return
    for seed in range(4):
        times = some_times(min(header.seconds, shown[-1] + 0.03), seed)
        frames_FHW3, times_F = READERS[reader](video, header, times)
        expected = np.maximum(np.searchsorted(shown, np.array(times) + 1e-6, side="right") - 1, 0)
        np.testing.assert_allclose(times_F, shown[expected], atol=1.1e-3)  # Matroska counts in milliseconds
        if "av1" not in name:  # its blocks are not sharp enough for single bits
            assert [number_of(frame) for frame in frames_FHW3] == expected.tolist()


@pytest.mark.parametrize("name", ["even.mp4", "uneven.webm", "open.mkv", "two_way.avi"])
def test_bytes_are_read_like_files(name: str, written: Callable[[str], VideoFile]) -> None:
    file = written(name)
    assert isinstance(file.found, Path)
    held = VideoFile(file.found.read_bytes(), name)
    assert read_header(held) == read_header(file)
    for read in READERS.values():
        ours, theirs = (read(video, read_header(video), [0.2, 1.9]) for video in (held, file))
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["even.mp4", "uneven.mp4"])
def test_the_header_of_an_mp4_is_read_without_a_decoder(name: str, written: Callable[[str], VideoFile]) -> None:
    video = written(name)
    with video.open(for_header=True) as (_, stream):
        assert stream.codec_context.pix_fmt is None  # which only a frame says
    with video.open() as (_, stream):
        assert stream.codec_context.pix_fmt == "yuv420p"
        header = read_header(video)
        assert (header.height, header.width) == (stream.codec_context.height, stream.codec_context.width)


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_leaves_no_frames_to_the_garbage_collector(reader: str, written: Callable[[str], VideoFile]) -> None:
    """It would free them at any later time, also in a worker that was forked meanwhile."""
    video = written("even.mp4")
    header = read_header(video)
    gc.collect()
    gc.disable()
    try:
        READERS[reader](video, header, [0.1, 2.5])
        assert not [found for found in gc.get_objects() if isinstance(found, av.VideoFrame)]
    finally:
        gc.enable()


@pytest.mark.parametrize("reader", READERS)
def test_an_edit_list_hides_frames(reader: str, tmp_path: Path) -> None:
    for name, options in (("closed", {"g": "72"}), ("open", OPEN_GROUPS)):
        video = VideoFile(hide_first(write_video(tmp_path / f"{name}.mp4", options=options), tmp_path / "cut.mp4", 10), "cut.mp4")
        header = read_header(video)
        assert header.seconds == pytest.approx(2.48)
        frames_FHW3, times_F = READERS[reader](video, header, [0.0, 0.5, 1.3, 2.47])
        assert [number_of(frame) for frame in frames_FHW3] == [10, 22, 42, 71]
        np.testing.assert_allclose(times_F, [0.0, 0.48, 1.28, 2.44], atol=1e-6)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_stand_upright(degrees: int, container: str, tmp_path: Path) -> None:
    video = VideoFile(write_video(tmp_path / f"turned.{container}", EVEN[:20], degrees=degrees, size=(64, 96)), "turned")
    with av.open(str(video.found)) as file:
        assert next(file.decode(video=0)).rotation % 360 == degrees  # against the clock, as FFmpeg tells it of a frame
    header = read_header(video)
    assert header.turns == degrees // 90
    assert (header.height, header.width) == ((64, 96) if degrees == 180 else (96, 64))
    for read in READERS.values():
        frames_FHW3, _ = read(video, header, [0.3])
        assert frames_FHW3.shape[1:3] == (header.height, header.width)
        assert corner_of(frames_FHW3[0]) == {90: (True, False), 180: (True, True), 270: (False, True)}[degrees]


def test_a_mirrored_video_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "a.mp4", EVEN[:5]).read_bytes())
    at = data.index(b"tkhd") + 44  # of the matrix, behind the kind of the box
    assert data[at : at + 4] == b"\x00\x01\x00\x00"
    data[at : at + 4] = b"\xff\xff\x00\x00"
    with pytest.raises(MediaError, match=r"a\.mp4 asks to be shown mirrored"):
        read_header(VideoFile(bytes(data), "a.mp4"))


def test_the_readers_see_the_same_colours(written: Callable[[str], VideoFile]) -> None:
    video = written("even.mp4")
    ours, theirs = (read(video, read_header(video), [1.0])[0].astype(int) for read in READERS.values())
    assert np.abs(ours - theirs).max() <= 8


def test_headers(written: Callable[[str], VideoFile]) -> None:
    headers = {name: read_header(written(name)) for name in ("even.mp4", "uneven.webm", "late.mkv", "two_way.avi")}
    assert {name: header.codec for name, header in headers.items()} == {
        "even.mp4": "h264",
        "uneven.webm": "vp9",
        "late.mkv": "h264",
        "two_way.avi": "mpeg4",
    }
    assert (headers["even.mp4"].num_frames, headers["uneven.webm"].num_frames) == (72, None)
    assert headers["late.mkv"].seconds == pytest.approx(2.88, abs=0.01)
    assert headers["even.mp4"].fps == 25
    assert headers["uneven.webm"].seconds == pytest.approx(UNEVEN[-1] / 1000 + 0.04, abs=0.01)


def test_a_length_that_no_header_says_is_that_of_the_packets(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.webm", UNEVEN, "libvpx-vp9", VP9).read_bytes()
    for name in (b"\x44\x89", b"DURATION"):  # of the file, and of the stream
        assert data.count(name) == 1
        data = data.replace(name, b"\xec\x80"[: len(name)] if len(name) == 2 else b"DURATI__")
    broken = VideoFile(data, "live.webm")
    with broken.open() as (container, stream):
        assert (container.duration, stream.duration) == (None, None)
    assert read_header(broken).seconds == pytest.approx(UNEVEN[-1] / 1000 + 0.04, abs=0.01)


def test_open_groups_are_noticed(written: Callable[[str], VideoFile]) -> None:
    are_closed = {
        name: read_packets(written(name), read_header(written(name)).start).are_groups_closed
        for name in ("even.mp4", "uneven.webm", "open.mp4", "open.mkv", "hevc.mp4", "fragments.mp4")
    }
    assert are_closed == {
        "even.mp4": True,
        "uneven.webm": True,
        "open.mp4": False,
        "open.mkv": False,
        "hevc.mp4": False,
        "fragments.mp4": True,
    }
