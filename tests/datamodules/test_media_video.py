"""From a row's medium to a clip: parts, limits, lists of frames, data: URIs; and whatever is wrong is a `MediaError`."""

import base64
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.content import Media
from datamodules.media import MediaLimits, decode, media_key, probe
from datamodules.media_video import Clip, VideoLimits, decode_video, probe_clip, probe_video
from datamodules.sources import MediaError, MediaRoot
from datamodules.video_reader import Library
from encoders.sampling import FrameSampling
from encoders.video import ClipTransform
from tests.datamodules.video_files import draw, number_of, write_video

FOUR = FrameSampling(num_frames=4)
LIBRARIES = get_args(Library)
LIMITS = VideoLimits()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> MediaRoot:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4")  # 72 frames, 2.88 seconds
    write_video(folder / "first.mp4", container={"movflags": "faststart"})
    write_video(folder / "a.mkv")
    for number in range(6):
        Image.fromarray(draw(number)).save(folder / f"{number}.png")
    Image.fromarray(draw(6, 30, 90)).save(folder / "other.png")
    return MediaRoot(folder)


def clip(root: MediaRoot, medium: Media, sampling: FrameSampling = FOUR, limits: VideoLimits = LIMITS) -> Clip:
    return decode_video(medium, root, limits, sampling)


def numbers(a_clip: Clip) -> list[int]:
    return [number_of(frame) for frame in a_clip.frames_FHW3]


@pytest.mark.parametrize("reader", LIBRARIES)
def test_a_part_is_what_the_whole_shows_there(reader: Library, root: MediaRoot) -> None:
    limits = VideoLimits(reader=reader)
    # the middles of the four segments of 0.8 to 2.4 seconds are 1.0, 1.4, 1.8 and 2.2
    part = clip(root, Media("video", "a.mp4", start=0.8, end=2.4), limits=limits)
    assert numbers(part) == [25, 35, 45, 55]
    np.testing.assert_allclose(part.times_F, [1.0, 1.4, 1.8, 2.2])
    assert numbers(clip(root, Media("video", "a.mp4"), limits=limits)) == [9, 27, 45, 63]
    assert numbers(clip(root, Media("video", "a.mp4", end=0.04), limits=limits)) == [0, 0, 0, 0]
    assert numbers(clip(root, Media("video", "a.mp4", start=2.8), limits=limits)) == [70, 70, 71, 71]


@pytest.mark.parametrize(
    ("medium", "sampling"),
    [
        (Media("video", "a.mp4"), FOUR),
        (Media("video", "a.mkv", start=0.5, end=1.7), FrameSampling(fps=5.0)),
        (Media("video", ("0.png", "1.png", "2.png", "3.png", "4.png"), fps=4.0), FrameSampling(fps=3.0)),
        (Media("video", "a.mp4"), FrameSampling(fps=100.0, max_frames=9)),
    ],
)
def test_the_shape_is_known_from_the_header(medium: Media, sampling: FrameSampling, root: MediaRoot) -> None:
    shape = probe_clip(medium, root, LIMITS, sampling)
    assert shape == clip(root, medium, sampling).shape
    transform = ClipTransform(np.asarray, sampling)  # type: ignore[arg-type]
    assert probe(medium, root, MediaLimits(), transform) == shape
    decoded = decode(medium, root, MediaLimits(), transform)
    assert isinstance(decoded, Clip) and decoded.shape == shape


def test_random_frames_lie_in_their_segments(root: MediaRoot) -> None:
    sampling, length = FrameSampling(num_frames=6), 2.88 / 6
    clips = [decode_video(Media("video", "a.mp4"), root, LIMITS, sampling, random.Random(seed)) for seed in (1, 1, 2)]
    assert numbers(clips[0]) == numbers(clips[1]) != numbers(clips[2])
    for drawn in clips:
        shown = np.array(numbers(drawn)) * 0.04
        assert all(place * length - 0.04 < time < (place + 1) * length for place, time in enumerate(shown))


def test_image_files_are_a_video(root: MediaRoot) -> None:
    medium = Media("video", tuple(f"{number}.png" for number in range(6)))  # 2 a second: 3 seconds
    header = probe_video(medium, root, LIMITS)
    assert (header.seconds, header.fps, header.num_frames, header.height, header.width) == (3.0, 2.0, 6, 48, 80)
    taken = clip(root, medium, FrameSampling(num_frames=3))
    assert numbers(taken) == [1, 3, 5]
    assert taken.times_F.tolist() == [0.5, 1.5, 2.5]
    assert np.array_equal(taken.frames_FHW3[1], draw(3))
    part = Media("video", medium.source, start=0.25, end=0.5, fps=10.0)
    assert numbers(clip(root, part, FrameSampling(num_frames=5))) == [2, 3, 3, 4, 4]
    with pytest.raises(MediaError, match=r"other\.png is 30 x 90 pixels, but the frame 0\.png of its video 48 x 80"):
        clip(root, Media("video", ("0.png", "other.png")), FrameSampling(num_frames=2))
    with pytest.raises(MediaError, match=r"no\.png does not exist"):
        clip(root, Media("video", ("0.png", "no.png")), FrameSampling(num_frames=2))


@pytest.mark.parametrize("reader", LIBRARIES)
def test_data_uris(reader: Library, root: MediaRoot) -> None:
    data = base64.b64encode((root.path / "a.mp4").read_bytes()).decode()
    held = clip(root, Media("video", f"data:video/mp4;base64,{data}"), limits=VideoLimits(reader=reader))
    assert np.array_equal(held.frames_FHW3, clip(root, Media("video", "a.mp4"), limits=VideoLimits(reader=reader)).frames_FHW3)
    with pytest.raises(MediaError, match="not a data URI of this modality"):
        clip(root, Media("video", f"data:image/png;base64,{data}"))


def test_a_part_beyond_the_video_is_refused(root: MediaRoot) -> None:
    for medium, reason in (
        (Media("video", "a.mp4", start=2.9), r"a\.mp4 is 2\.88 seconds long, but the row takes it from start = 2\.9"),
        (Media("video", "a.mp4", end=3.5), r"a\.mp4 is 2\.88 seconds long, but the row takes it up to end = 3\.5: lower it"),
        (Media("video", ("0.png", "1.png"), end=2.0), r"0\.png and the 1 frames after it is 1\.00 seconds long"),
    ):
        with pytest.raises(MediaError, match=reason):
            clip(root, medium)
        with pytest.raises(MediaError, match=reason):
            probe_clip(medium, root, LIMITS, FOUR)
    assert clip(root, Media("video", "a.mp4", end=2.95)).shape[0] == 4  # rounded up by who wrote the row


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (VideoLimits(max_seconds=2.5), r"a\.mp4 is 2\.9 seconds long, above limits\.video\.max_seconds = 2\.5"),
        (VideoLimits(max_frames=60), r"a\.mp4 has 72 frames, above limits\.video\.max_frames = 60"),
        (VideoLimits(max_pixels=3000), r"a\.mp4 is 48 x 80 = 3,840 pixels, above limits\.video\.max_pixels = 3,000"),
        (VideoLimits(max_bytes=1000), r"a\.mp4 is .* bytes, above max_bytes = 1,000"),
    ],
)
def test_limits_hold_before_decoding(limits: VideoLimits, reason: str, root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.media_video.read_by_decord", None)
    with pytest.raises(MediaError, match=reason):
        clip(root, Media("video", "a.mp4"), limits=limits)


def test_frames_are_limited_where_they_are_files_or_not_counted(root: MediaRoot) -> None:
    for medium in (Media("video", ("0.png", "1.png", "0.png")), Media("video", "a.mkv")):
        with pytest.raises(MediaError, match=r"has \d+ frames, above limits\.video\.max_frames = 2"):
            clip(root, medium, limits=VideoLimits(max_frames=2))


@pytest.mark.parametrize(
    "option", ["max_pixels", "max_bytes", "max_seconds", "max_frames", "max_decode_seconds", "max_memory_bytes"]
)
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=rf"limits\.video\.{option} must be above 0, got -1"):
        VideoLimits(**{option: -1})


def _bytes(root: MediaRoot, name: str) -> bytearray:
    return bytearray((root.path / name).read_bytes())


def _sound_only(path: Path) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.random.default_rng(0).normal(0, 0.1, (1, 4096)).astype(np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def write_bad(folder: Path, root: MediaRoot) -> dict[str, str]:
    """Files that are no videos, and what is said of each."""
    whole, first = _bytes(root, "a.mp4"), _bytes(root, "first.mp4")
    absurd = _bytes(root, "a.mkv").replace(b"00:00:02.88", b"99:59:59.99")
    assert absurd != _bytes(root, "a.mkv")
    fragments = write_video(folder / "fragments.mp4", container={"movflags": "frag_keyframe+empty_moov"}).read_bytes()
    files = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"not a video" * 50, "is not a video: its first bytes are b'not a video"),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "is not a video"),
        "picture.mp4": (bytes(_bytes(root, "1.png")), "is an image, not a video; a video of image files is a list"),
        "cut.mp4": (whole[: len(whole) // 2], "is truncated or damaged"),
        "cut_first.mp4": (first[: len(first) * 2 // 3], "is truncated or damaged"),
        "cut.mkv": (_bytes(root, "a.mkv")[:2000], "is truncated or damaged"),
        "head.mkv": (_bytes(root, "a.mkv")[:40], "is truncated or damaged"),
        "absurd.mkv": (absurd, "seconds long, above limits.video.max_seconds = 7200"),
        "no_frames.mp4": (fragments[: fragments.index(b"moof") - 4], "holds no frames"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    _sound_only(folder / "sound.mp4")
    return {name: reason for name, (_, reason) in files.items()} | {"sound.mp4": "holds no video, but audio"}


@pytest.mark.parametrize("reader", LIBRARIES)
def test_bad_files_are_named(reader: Library, root: MediaRoot, tmp_path: Path) -> None:
    for name, reason in write_bad(tmp_path, root).items():
        with pytest.raises(MediaError, match=f"^{name} .*{reason}"):
            clip(MediaRoot(tmp_path), Media("video", name), limits=VideoLimits(reader=reader))


@pytest.mark.parametrize("reader", LIBRARIES)
def test_damaged_files_give_a_clip_or_an_error(reader: Library, root: MediaRoot, tmp_path: Path) -> None:
    """Bytes are flipped, erased, cut out and put in."""
    damaged, num_errors = MediaRoot(tmp_path), 0
    for seed in range(60):
        draws = random.Random(seed)
        data = _bytes(root, draws.choice(["a.mp4", "first.mp4", "a.mkv"]))
        at, size = draws.randrange(len(data)), draws.randrange(1, 400)
        data[at : at + size] = draws.choice([b"", bytes(size), draws.randbytes(size), draws.randbytes(3)])
        (tmp_path / "x.mp4").write_bytes(data)
        try:
            assert clip(damaged, Media("video", "x.mp4"), limits=VideoLimits(reader=reader)).shape[0] == 4
        except MediaError as error:
            assert str(error).startswith("x.mp4 ")
            num_errors += 1
    assert 10 < num_errors < 60


def test_keys_tell_clips_apart(root: MediaRoot) -> None:
    def key(medium: Media, sampling: FrameSampling = FOUR) -> str:
        return media_key(medium, root, ClipTransform(np.asarray, sampling))  # type: ignore[arg-type]

    frames = ("0.png", "1.png")
    keys = [
        key(Media("video", "a.mp4")),
        key(Media("video", "a.mp4", start=0.5)),
        key(Media("video", "a.mp4", end=0.5)),
        key(Media("video", "a.mp4"), FrameSampling(num_frames=5)),
        key(Media("video", "a.mp4"), FrameSampling(fps=1.0)),
        key(Media("video", frames)),
        key(Media("video", frames[::-1])),
        key(Media("video", frames, fps=1.0)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(Media("video", "../" + root.path.name + "/a.mp4", start=0.5)) == keys[1]


class _Clips(Dataset[list[int]]):
    def __init__(self, root: MediaRoot) -> None:
        self.root = root

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[int]:
        return numbers(clip(self.root, Media("video", "a.mp4")))


def test_workers_decode_after_their_parent_has(root: MediaRoot) -> None:
    """A decord reader that stayed open would hang them."""
    here = _Clips(root)[0]
    workers = DataLoader(_Clips(root), batch_size=None, num_workers=2, timeout=60, collate_fn=list)
    assert list(workers) == [here] * 4


def test_a_missing_decord_is_said(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(ValueError, match="decord, which is not installed .* set data.limits.video.reader to pyav") as caught:
        clip(root, Media("video", "a.mp4"))
    assert not isinstance(caught.value, MediaError)  # it is no fault of the row
    assert numbers(clip(root, Media("video", "a.mp4"), limits=VideoLimits(reader="pyav"))) == [9, 27, 45, 63]
