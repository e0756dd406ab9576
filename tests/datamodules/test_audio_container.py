from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.audio_container import ContainerReader
from datamodules.sources import MediaError
from tests.datamodules.sound_files import tone, write_container, write_sound

RATE = 48_000
NUM_SAMPLES = 3 * RATE + 777
FILES: dict[str, dict[str, Any]] = {
    "a.m4a": {"format": "mp4", "codec": "aac"},
    "alac.m4a": {"format": "mp4", "codec": "alac"},
    "fragmented.mp4": {"format": "mp4", "codec": "aac", "movflags": "frag_keyframe+empty_moov"},
    "a.aac": {"format": "adts", "codec": "aac"},
    "a.mka": {"format": "matroska", "codec": "aac"},
    "a.webm": {"format": "webm", "codec": "libopus"},
    "a.ts": {"format": "mpegts", "codec": "aac"},
    "flac.ogg": {"format": "ogg", "codec": "flac"},
    "uncounted.mp3": {"format": "mp3", "codec": "libmp3lame", "write_xing": "0"},
    "video.mp4": {"format": "mp4", "codec": "aac", "num_frames": 50},
    "video.mkv": {"format": "matroska", "codec": "libmp3lame", "num_frames": 100},
    "video.avi": {"format": "avi", "codec": "pcm_s16le", "num_frames": 50},
}


def offset(samples_S: np.ndarray, expected_S: np.ndarray) -> int:
    """How many samples `samples_S` comes later than expected, by their second half second."""
    part_S = expected_S[RATE // 2 : RATE]
    return max(range(-3000, 3000), key=lambda later: float(part_S @ samples_S[RATE // 2 + later :][: len(part_S)]))


@pytest.mark.parametrize("name", FILES)
def test_the_packets_say_how_long_a_sound_is_and_any_part_of_it_can_be_read(tmp_path: Path, name: str) -> None:
    samples_SC = tone(NUM_SAMPLES, RATE, channels=2)
    sound = ContainerReader(write_container(tmp_path / name, samples_SC, RATE, **FILES[name]), name)
    assert (sound.sample_rate, sound.num_channels) == (RATE, 2)
    assert abs(sound.num_samples - NUM_SAMPLES) <= 2 * 1152
    whole_S = sound.read(0, sound.num_samples)
    assert len(whole_S) == sound.num_samples
    # without an edit list, a decoder's delay stays at the start: a frame or so
    assert 0 <= offset(whole_S, samples_SC.mean(1)) <= 1152
    part_S = sound.read(2 * RATE, 3 * RATE)
    later = min(
        range(-48, 49), key=lambda later: float(np.abs(part_S[48:-48] - whole_S[2 * RATE + 48 + later :][: RATE - 96]).max())
    )
    assert later == 0 or name in ("a.mka", "a.webm", "video.mkv")  # these count milliseconds: 48 samples
    np.testing.assert_allclose(part_S[48:-48], whole_S[2 * RATE + 48 + later :][: RATE - 96], atol=1e-3)


def test_a_part_is_found_by_jumping(tmp_path: Path) -> None:
    path = write_container(tmp_path / "a.m4a", tone(20 * RATE, RATE), RATE, "mp4", "aac")
    sound = ContainerReader(path, "a.m4a")
    places = [place for place, _ in sound._blocks(18 * RATE)]
    assert 17 * RATE < places[0] < 18 * RATE and len(places) < 130


def test_a_gap_in_the_time_stamps_stays_as_silence(tmp_path: Path) -> None:
    samples_SC = tone(2 * RATE, RATE)
    path = write_container(tmp_path / "a.mkv", samples_SC, RATE, "matroska", "pcm_s16le", skip_seconds=0.5)
    sound = ContainerReader(path, "a.mkv")
    assert sound.num_samples == pytest.approx(2.5 * RATE, abs=48)
    samples_S = sound.read(0, sound.num_samples)
    np.testing.assert_allclose(samples_S[:RATE], samples_SC[:RATE, 0], atol=1e-4)
    assert not samples_S[RATE + 48 : int(1.5 * RATE) - 48].any()
    assert np.abs(samples_S[int(1.5 * RATE) : 2 * RATE]).max() > 0.25


@pytest.mark.parametrize("name", ["a.m4a", "fragmented.mp4", "a.mka", "a.webm", "video.mp4", "video.mkv", "video.avi", "a.aac"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, name: str, share: float) -> None:
    data = write_container(tmp_path / name, tone(NUM_SAMPLES, RATE), RATE, **FILES[name]).read_bytes()
    with pytest.raises(MediaError, match=f"^the {name} is truncated"):
        sound = ContainerReader(data[: int(share * len(data))], f"the {name}")
        sound.read(0, sound.num_samples)


def test_a_video_without_sound_says_so(tmp_path: Path) -> None:
    import av

    with av.open(tmp_path / "silent.mp4", "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8))))
        container.mux(video.encode())
    with pytest.raises(MediaError, match=r"^silent\.mp4 has no sound: it holds video only"):
        ContainerReader(tmp_path / "silent.mp4", "silent.mp4")


def test_a_sound_that_decodes_to_another_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = ContainerReader(write_container(tmp_path / "a.m4a", tone(RATE, RATE), RATE, "mp4", "aac"), "a.m4a")
    for number in (sound.num_samples + 6000, sound.num_samples - 6000):
        monkeypatch.setattr(sound, "num_samples", number)
        with pytest.raises(MediaError, match=r"^a\.m4a is truncated or damaged: [\d,]+ samples were expected by its packets"):
            sound.read(0, sound.num_samples)


def test_wav_can_be_read_by_no_accident(tmp_path: Path) -> None:
    """FFmpeg's reader of WAV is not among those that are opened: what it makes of a damaged header is not exact."""
    path = write_sound(tmp_path / "a.wav", tone(5000, RATE), RATE)
    with pytest.raises(MediaError, match="is not a sound"):
        ContainerReader(path, "a.wav")
