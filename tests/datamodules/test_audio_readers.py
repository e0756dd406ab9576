import struct
from pathlib import Path

import numpy as np
import pytest

from datamodules.audio_container import ContainerReader
from datamodules.audio_readers import SoundFileReader, open_sound
from datamodules.sources import MediaError
from tests.datamodules.sound_files import tone, write_container, write_sound

RATE = 16_000
FORMATS = {
    "a.wav": {},
    "float.wav": {"subtype": "FLOAT"},
    "adpcm.wav": {"subtype": "IMA_ADPCM"},
    "a.flac": {},
    "a.ogg": {"subtype": "VORBIS"},
    "opus.ogg": {"subtype": "OPUS"},
    "a.mp3": {},
    "a.aiff": {},
    "a.au": {},
}
LOSSY = {"adpcm.wav": 0.02, "a.ogg": 0.05, "opus.ogg": 0.05, "a.mp3": 0.05}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_samples", [1, 1152, 30_011])
def test_libsndfile_knows_the_length_and_reads_it_to_the_sample(tmp_path: Path, name: str, num_samples: int) -> None:
    samples_SC = tone(num_samples, RATE, channels=2)
    path = write_sound(tmp_path / name, samples_SC, RATE, **FORMATS[name])
    with open_sound(path, name) as sound:
        assert isinstance(sound, SoundFileReader)
        assert (sound.sample_rate, sound.num_channels) == (RATE, 2)
        if name != "adpcm.wav":  # whose blocks are always full
            assert sound.num_samples == num_samples
        samples_S = sound.read(0, sound.num_samples)
        if num_samples == 30_011:
            np.testing.assert_allclose(samples_S[500:29_500], samples_SC.mean(1)[500:29_500], atol=LOSSY.get(name, 1e-4))
            for start, stop in ((0, 1), (12_345, 20_001), (30_010, 30_011)):
                np.testing.assert_allclose(sound.read(start, stop), samples_S[start:stop], atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_file_is_read_in_blocks_or_by_ffmpeg(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sound(tmp_path / name, tone(100_011, RATE, channels=2), RATE, **FORMATS[name])
    with open_sound(path, name) as sound:
        expected_S, part_S = sound.read(0, 100_000), sound.read(15_000, 98_000)
        monkeypatch.setattr("datamodules.audio_readers._NUMBERS_AT_ONCE", 2 * 1000)
        np.testing.assert_allclose(sound.read(0, 100_000), expected_S, atol=1e-5)
        np.testing.assert_allclose(sound.read(15_000, 98_000), part_S, atol=1e-5)


def test_bytes_are_read_like_a_file(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.flac", tone(5000, RATE), RATE)
    with open_sound(path, "") as sound, open_sound(path.read_bytes(), "") as same:
        assert np.array_equal(sound.read(0, 5000), same.read(0, 5000))


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    wav = write_sound(tmp_path / "a.wav", tone(5000, RATE), RATE)
    for name in ("a.mp3", "a.raw", "a.mp4", "a"):
        with open_sound(wav.rename(tmp_path / name), name) as sound:
            assert isinstance(sound, SoundFileReader) and sound.num_samples == 5000
        wav = tmp_path / name


def test_mp3_and_flac_that_do_not_know_their_length_go_to_ffmpeg(tmp_path: Path) -> None:
    samples_SC = tone(30_011, RATE)
    counted = write_container(tmp_path / "counted.mp3", samples_SC, RATE, "mp3", "libmp3lame")
    with open_sound(counted, "") as sound:
        assert isinstance(sound, SoundFileReader) and sound.num_samples == 30_011
    uncounted = write_container(tmp_path / "uncounted.mp3", samples_SC, RATE, "mp3", "libmp3lame", write_xing="0")
    flac = bytearray(write_sound(tmp_path / "a.flac", samples_SC, RATE).read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    for found in (uncounted, bytes(flac)):
        with open_sound(found, "") as sound:
            assert isinstance(sound, ContainerReader)
            assert 30_011 <= sound.num_samples <= 30_011 + 3 * 576
            assert np.abs(sound.read(0, sound.num_samples)).max() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("name", ["a.wav", "float.wav", "a.aiff", "a.au", "a.flac", "a.ogg", "opus.ogg", "a.mp3"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, name: str, share: float) -> None:
    data = write_sound(tmp_path / name, tone(60_000, RATE), RATE, **FORMATS[name]).read_bytes()
    with (
        pytest.raises(MediaError, match=f"^the {name} is truncated"),
        open_sound(data[: int(share * len(data))], f"the {name}") as sound,
    ):
        sound.read(0, sound.num_samples)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_that_was_written_to_a_pipe_is_as_long_as_its_file(tmp_path: Path, size: int) -> None:
    data = bytearray(write_sound(tmp_path / "a.wav", tone(5000, RATE), RATE).read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", size)
    with open_sound(bytes(data), "") as sound:
        assert sound.num_samples == 5000


@pytest.mark.parametrize(
    ("place", "value"), [(22, b"\0\0"), (22, b"\xff\xff"), (24, b"\0\0\0\0"), (24, b"\xff\xff\xff\xff"), (20, b"\x77\x77")]
)
def test_an_absurd_header_is_refused(tmp_path: Path, place: int, value: bytes) -> None:
    data = bytearray(write_sound(tmp_path / "a.wav", tone(5000, RATE), RATE).read_bytes())
    data[place : place + len(value)] = value
    with pytest.raises(MediaError, match=r"^a\.wav is truncated or damaged \(libsndfile: \w"), open_sound(bytes(data), "a.wav"):
        pass


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    for data, shown in ((b"<html>not found</html>", "text"), (b"\x89PNG\r\n\x1a\n" + bytes(90), "PNG")):
        with (
            pytest.raises(MediaError, match=rf"^x is not a sound: its first bytes are .*{shown}.*; expected WAV"),
            open_sound(data, "x"),
        ):
            pass
    with pytest.raises(MediaError, match="is not a sound"), open_sound(b"#EXTM3U\n#EXTINF:10,\nhttp://example.org/a.ts\n", "x"):
        pass  # FFmpeg would read the playlist, and what it names
