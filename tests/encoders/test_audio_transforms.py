import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from encoders.audio_transforms import LogMel, Samples
from tests.encoders.audio_fakes import Sound, sound


def log_mel(num_mels: int = 80, window: int = 3000, pad: bool = False) -> LogMel:
    return LogMel(num_mels, window, pad)


def whisper_mel(samples_S: np.ndarray, num_mels: int = 80, seconds: int = 30) -> torch.Tensor:
    """mel_TM by transformers, padded to `seconds`."""
    extractor = WhisperFeatureExtractor(feature_size=num_mels, chunk_length=seconds)
    return torch.from_numpy(extractor(samples_S, sampling_rate=16_000, return_tensors="np").input_features[0]).T


@pytest.mark.parametrize("num_samples", [1, 159, 320, 321, 16_000, 123_457, 479_679, 479_681, 480_000])
def test_frames_are_those_of_transformers_up_to_the_end_of_the_sound(num_samples: int) -> None:
    clip = sound(num_samples)
    mel_TM = log_mel()(clip)
    assert mel_TM.shape == (2 * -(-num_samples // 320), 80) and log_mel().num_steps(num_samples) == len(mel_TM)
    expected = whisper_mel(clip.samples_S)
    torch.testing.assert_close(mel_TM, expected[: len(mel_TM)], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_mel(pad=True)(clip), expected, atol=1e-5, rtol=0)


def test_a_click_at_the_very_end_counts_as_in_transformers() -> None:
    samples_S = sound(3200).samples_S * 1e-3
    samples_S[-1] = 1.0  # the loudest frames lie past the end
    mel_TM = log_mel()(Sound(samples_S))
    torch.testing.assert_close(mel_TM, whisper_mel(samples_S)[:20], atol=1e-5, rtol=0)


def test_silence_and_other_mel_bands() -> None:
    for samples_S in (np.zeros(5000, dtype=np.float32), sound(5000).samples_S):
        mel_TM = log_mel(num_mels=128)(Sound(samples_S))
        torch.testing.assert_close(mel_TM, whisper_mel(samples_S, num_mels=128)[:32], atol=1e-5, rtol=0)


def test_each_window_of_a_long_sound_is_for_itself() -> None:
    clip = sound(16_000 * 2 + 3333)
    mel_TM = log_mel(window=100)(clip)
    parts = [whisper_mel(clip.samples_S[start:][:16_000], seconds=1) for start in (0, 16_000, 32_000)]
    torch.testing.assert_close(mel_TM, torch.cat([parts[0], parts[1], parts[2][:22]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_mel(window=100, pad=True)(clip), torch.cat(parts), atol=1e-5, rtol=0)


def test_gradients_flow_back_to_the_waveform() -> None:
    samples_S = torch.from_numpy(sound(2000).samples_S).requires_grad_()
    (gradient_S,) = torch.autograd.grad(log_mel().frames(samples_S).square().sum(), samples_S)
    assert gradient_S.isfinite().all() and (gradient_S != 0).float().mean() > 0.95


def test_samples_are_normalised_as_by_transformers() -> None:
    clip = sound(9001)
    expected = Wav2Vec2FeatureExtractor()(clip.samples_S, sampling_rate=16_000, return_tensors="np").input_values[0]
    given = Samples(window=16_000, min_samples=400, normalise=True)(clip)
    torch.testing.assert_close(given, torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert torch.equal(Samples(16_000, 400, normalise=False)(clip), torch.from_numpy(clip.samples_S))


def test_a_short_last_window_is_filled_up_to_what_the_encoder_needs() -> None:
    transform = Samples(window=1000, min_samples=400, normalise=False)
    for num_samples, expected in ((400, 400), (1000, 1000), (1001, 1400), (1399, 1400), (1400, 1400), (2500, 2500)):
        samples_T = transform(sound(num_samples))
        assert len(samples_T) == expected == transform.num_steps(num_samples)
        assert torch.equal(samples_T[:num_samples], torch.from_numpy(sound(num_samples).samples_S))
        assert not samples_T[num_samples:].any()
    with pytest.raises(ValueError, match=r"has 399 samples at 16,000 a second, and the encoder needs at least 400 \(0\.025 s\)"):
        transform(sound(399))


@pytest.mark.parametrize("transform", [log_mel(), Samples(1000, 400, normalise=False)])
def test_another_rate_is_refused(transform: LogMel | Samples) -> None:
    with pytest.raises(ValueError, match="has 8,000 samples a second, and the encoder takes 16,000"):
        transform(Sound(sound(1000).samples_S, sample_rate=8000))
