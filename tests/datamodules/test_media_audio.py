import base64
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchaudio.functional as AF

from datamodules.batch import Origin
from datamodules.content import Media
from datamodules.conversation import parse_row
from datamodules.media import MediaLimits, decode, probe
from datamodules.media_audio import AudioLimits, decode_audio, num_resampled, probe_audio, resample
from datamodules.sources import MediaError, MediaRoot
from tests.datamodules.sound_files import tone, write_container, write_sound

LIMITS = AudioLimits()


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    return MediaRoot(tmp_path)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 37_800, 44_100, 48_000])
def test_resampling_is_torchaudios_with_the_exact_number_of_samples(rate: int) -> None:
    for num_samples in (1, 999, 40_013):
        samples_S = tone(num_samples, rate)[:, 0]
        expected = AF.resample(torch.from_numpy(samples_S), rate, 16_000).numpy()
        given = resample(samples_S, rate, 16_000)
        assert len(given) == num_resampled(num_samples, rate, 16_000) == -(-num_samples * 16_000 // rate)
        np.testing.assert_allclose(given[: len(expected)], expected, atol=1e-6)
    assert resample(samples_S, rate, rate) is samples_S


def test_no_sample_is_lost_where_torchaudio_loses_one() -> None:
    num_samples = pow(160, -1, 441) + 441 * 2000  # 160 / 441 of it is a 441th above a whole number
    samples_S = np.ones(num_samples, dtype=np.float32)
    torchaudio_S = AF.resample(torch.from_numpy(samples_S), 44_100, 16_000).numpy()
    given_S = resample(samples_S, 44_100, 16_000)
    assert len(given_S) == num_resampled(num_samples, 44_100, 16_000) == len(torchaudio_S) + 1
    assert np.array_equal(given_S[:-1], torchaudio_S) and given_S[-1] > 0.3


def test_any_number_of_threads_resamples_to_the_same_bits() -> None:
    samples_S = tone(200_003, 44_100)[:, 0]
    alone_S = resample(samples_S, 44_100, 16_000)
    torch.set_num_threads(3)
    try:
        assert np.array_equal(resample(samples_S, 44_100, 16_000), alone_S)
    finally:
        torch.set_num_threads(1)


def test_a_sound_is_one_channel_at_the_rate_that_is_wanted(root: MediaRoot) -> None:
    samples_SC = tone(44_100, 44_100, channels=2)
    write_sound(root.path / "a.flac", samples_SC, 44_100, subtype="PCM_24")
    waveform = decode_audio("a.flac", root, LIMITS, 16_000)
    assert waveform.shape == (16_000,) and waveform.sample_rate == 16_000 and waveform.samples_S.dtype == np.float32
    np.testing.assert_allclose(waveform.samples_S, resample(samples_SC.mean(1), 44_100, 16_000), atol=1e-6)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.m4a", "a.webm", "v.mp4"])
def test_the_header_says_how_many_samples_will_come(root: MediaRoot, name: str) -> None:
    samples_SC = tone(3 * 48_000 + 777, 48_000, channels=2)
    if name in ("a.m4a", "a.webm", "v.mp4"):
        container, codec = ("webm", "libopus") if name == "a.webm" else ("mp4", "aac")
        write_container(root.path / name, samples_SC, 48_000, container, codec, num_frames=25 if name == "v.mp4" else 0)
    else:
        write_sound(root.path / name, samples_SC, 48_000)
    header = probe_audio(name, root, LIMITS)
    assert (header.sample_rate, header.num_channels) == (48_000, 2)
    assert header.seconds == pytest.approx(3 + 777 / 48_000, abs=0.03)
    for start, end in ((0.0, None), (0.5, None), (0.25, 2.0), (1.00001, 1.50007)):
        part = probe_audio(name, root, LIMITS, start, end)
        waveform = decode_audio(name, root, LIMITS, 16_000, start=start, end=end)
        assert waveform.shape == part.shape(16_000)
        expected = resample(samples_SC.mean(1)[part.start : part.stop], 48_000, 16_000)
        middle = slice(500, min(len(waveform.samples_S), len(expected)) - 500)
        errors = {n: float(np.abs(np.roll(waveform.samples_S, -n)[middle] - expected[middle]).mean()) for n in range(-20, 21)}
        best = min(errors, key=lambda n: errors[n])
        assert errors[best] < 0.02 and (best == 0 or name == "a.webm")  # it counts milliseconds


def test_a_part_is_taken_to_the_sample(root: MediaRoot) -> None:
    samples_SC = tone(16_000, 16_000)
    write_sound(root.path / "a.wav", samples_SC, 16_000, subtype="FLOAT")
    for start, end, first, last in ((0.25, 0.5, 4000, 8000), (0.1, 1.05, 1600, 16_000), (0.99999, None, 16_000 - 0, 16_000)):
        if first < last:
            part = decode_audio("a.wav", root, LIMITS, 16_000, start=start, end=end)
            np.testing.assert_array_equal(part.samples_S, samples_SC[first:last, 0])
        else:
            with pytest.raises(MediaError, match=r"^a\.wav: no sample lies between start = 0\.99999 and end = None"):
                decode_audio("a.wav", root, LIMITS, 16_000, start=start, end=end)
    for start, end, message in ((1.0, None, r"from start = 1$"), (0.0, 1.5, r"up to end = 1\.5")):
        with pytest.raises(MediaError, match=rf"^a\.wav is 1\.00 seconds long, but the row takes it {message}"):
            probe_audio("a.wav", root, LIMITS, start, end)


def test_limits_are_checked_before_decoding(root: MediaRoot) -> None:
    data = bytearray(write_sound(root.path / "a.flac", tone(16_000, 16_000), 16_000).read_bytes())
    data[21] |= 0x0F
    data[22:26] = bytes([255] * 4)  # 2^36 - 1 samples, it says
    (root.path / "b.flac").write_bytes(data)
    with pytest.raises(MediaError, match=r"^b\.flac lasts 4,294,967\.30 s, above max_seconds = 3600$"):
        decode_audio("b.flac", root, LIMITS, 16_000)
    for function in (probe_audio, lambda *arguments: decode_audio(*arguments, 16_000)):
        with pytest.raises(MediaError, match=r"^a\.flac lasts 1\.00 s, above max_seconds = 0\.5$"):
            function("a.flac", root, AudioLimits(max_seconds=0.5))
        with pytest.raises(MediaError, match=r"^a\.flac is [\d,]+ bytes, above max_bytes = 100$"):
            function("a.flac", root, AudioLimits(max_bytes=100))
    assert decode_audio("a.flac", root, AudioLimits(max_seconds=0.5), 16_000, start=0.25, end=0.75).shape == (8000,)
    with pytest.raises(ValueError, match=r"limits\.audio\.max_seconds must be above 0, got 0"):
        AudioLimits(max_seconds=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 20_000.0])
def test_numbers_that_are_no_amplitudes_are_refused(root: MediaRoot, value: float) -> None:
    samples_SC = tone(16_000, 16_000)
    samples_SC[7777] = value
    write_sound(root.path / "a.wav", samples_SC, 16_000, subtype="FLOAT")
    what = "samples up to 20000" if value == 20_000 else "samples that are infinite or no numbers"
    with pytest.raises(MediaError, match=rf"^a\.wav has {what}, where full scale is from -1 to 1"):
        decode_audio("a.wav", root, LIMITS, 16_000)


def test_what_has_no_sound_or_too_little_is_refused(root: MediaRoot) -> None:
    write_sound(root.path / "none.wav", tone(0, 16_000), 16_000)
    with pytest.raises(MediaError, match=r"^none\.wav has no samples"):
        probe_audio("none.wav", root, LIMITS)
    (root.path / "empty.wav").write_bytes(b"")
    with pytest.raises(MediaError, match=r"^empty\.wav is empty"):
        decode_audio("empty.wav", root, LIMITS, 16_000)
    write_sound(root.path / "short.wav", tone(190, 8000), 8000)
    with pytest.raises(MediaError, match=r"^short\.wav is 380 samples long at 16,000 a second, .* at least 400 \(0\.025 s\)"):
        decode_audio("short.wav", root, LIMITS, 16_000, min_samples=400)
    write_sound(root.path / "odd.wav", tone(9000, 15_991), 15_991)
    with pytest.raises(MediaError, match=r"^odd\.wav has 15,991 samples a second, .*: convert it to 16,000 before"):
        decode_audio("odd.wav", root, LIMITS, 16_000)


def test_uris_and_openai_parts_through_the_door(root: MediaRoot) -> None:
    transform = SimpleNamespace(sample_rate=16_000, min_samples=1)
    samples_SC = tone(32_000, 16_000)
    parts = []
    for name in ("a.wav", "a.mp3"):
        data = base64.b64encode(write_sound(root.path / name, samples_SC, 16_000).read_bytes()).decode()
        parts.append({"type": "input_audio", "input_audio": {"data": data, "format": name[-3:]}})
    parts.append({"type": "audio_url", "audio_url": {"url": f"data:audio/x-wav;base64,{parts[0]['input_audio']['data']}"}})
    parts.append({"type": "audio", "audio": "a.wav"})
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]}
    media = list(parse_row(row, Origin("rows.jsonl", 1)).media("audio"))
    assert len(media) == 4
    for medium in media:
        waveform = decode(medium, root, MediaLimits(), transform)
        assert waveform.shape == (32_000,) == probe(medium, root, MediaLimits(), transform)
        np.testing.assert_allclose(waveform.samples_S[500:-500], samples_SC[500:-500, 0], atol=0.02)
    part = Media("audio", "a.wav", start=0.5, end=1.5)
    assert probe(part, root, MediaLimits(), transform) == decode(part, root, MediaLimits(), transform).shape == (16_000,)
    with pytest.raises(MediaError, match="is not a data URI of this modality"):
        decode(Media("audio", "data:image/png;base64,AAAA"), root, MediaLimits(), transform)
