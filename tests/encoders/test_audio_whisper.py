import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.collate import pad_time
from encoders.audio import WhisperEncoder
from encoders.tuning import LoRA, Tune
from tests.encoders.audio_fakes import WINDOW, save_audio_model, sound

LENGTHS = [5000, 16_000, 37_000, 320, 48_000, 16_001, 1]
"""In samples; a window is a second."""


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A random Whisper of transformers, and its folder."""
    folder = tmp_path_factory.mktemp("whisper")
    return save_audio_model("whisper", folder), str(folder)


def build(folder: str, **options: Any) -> WhisperEncoder:
    encoder = WhisperEncoder(name_or_path=folder, **options)
    encoder.build()
    return encoder.eval()


def mels(encoder: WhisperEncoder, lengths: list[int] = LENGTHS) -> list[Tensor]:
    return [encoder.transform(sound(length, seed)) for seed, length in enumerate(lengths)]


def test_features_of_a_full_window_equal_transformers_at_every_layer(whisper: tuple[Any, str]) -> None:
    model, folder = whisper
    mel_NTM = torch.stack(mels(build(folder), [16_000, 16_000]))
    layers: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: layers.append(output)) for layer in model.model.encoder.layers]
    last = model.model.encoder(mel_NTM.transpose(1, 2)).last_hidden_state
    for hook in hooks:
        hook.remove()
    for layer, expected in ((None, last), (1, layers[0]), (2, layers[1]), (3, layers[2]), (-1, layers[2]), (-3, layers[0])):
        encoder = build(folder, layer=layer)
        features_BND, mask_BN = encoder(mel_NTM)
        torch.testing.assert_close(features_BND, expected, atol=1e-5, rtol=0)
        assert features_BND.shape == (2, encoder.num_tokens((16_000,)), encoder.hidden_size) and mask_BN is None


def test_with_padding_a_short_sound_gives_what_transformers_gives(whisper: tuple[Any, str]) -> None:
    from transformers import WhisperFeatureExtractor

    model, folder = whisper
    encoder, clip = build(folder, pad_to_30s=True), sound(5000)
    features_BND, _ = encoder(encoder.transform(clip)[None])
    given = WhisperFeatureExtractor(chunk_length=1)(clip.samples_S, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(features_BND, model.model.encoder(given).last_hidden_state, atol=1e-5, rtol=0)
    assert [encoder.num_tokens((length,)) for length in (1, 16_000, 16_001)] == [WINDOW, WINDOW, 2 * WINDOW]


def test_its_own_length_is_the_padded_window_of_which_the_silence_is_not_attended_to(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    short, padded, clip = build(folder), build(folder, pad_to_30s=True), sound(5000)
    mel_TM = short.transform(clip)
    mask_NT = torch.arange(100)[None] < len(mel_TM)
    expected, _ = padded(padded.transform(clip)[None], mask_NT)
    torch.testing.assert_close(short(mel_TM[None])[0], expected[:, : len(mel_TM) // 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"stack": 4}, {"layer": -2, "stack": 3}, {"pad_to_30s": True, "stack": 8}], ids=str)
def test_a_batch_gives_what_each_sound_gives_alone(whisper: tuple[Any, str], options: dict[str, Any]) -> None:
    _, folder = whisper
    encoder = build(folder, **options)
    items = mels(encoder)
    mel_NTM, mask_NT = pad_time(items)
    assert mask_NT is not None
    mel_NTM = mel_NTM.masked_fill(~mask_NT[..., None], 1e6)  # what stands at padded places does not matter
    features_BND, mask_BN = encoder(mel_NTM, mask_NT)
    for number, (mel_TM, length) in enumerate(zip(items, LENGTHS, strict=True)):
        alone_BND, alone_mask = encoder(mel_TM[None])
        assert alone_mask is None
        assert int(mask_BN[number].sum()) == alone_BND.shape[1] == encoder.num_tokens((length,))
        assert mask_BN[number][: alone_BND.shape[1]].all()
        torch.testing.assert_close(features_BND[number][mask_BN[number]], alone_BND[0], atol=1e-5, rtol=0)
    assert not features_BND[~mask_BN].any()
    assert features_BND.shape[2] == encoder.hidden_size == 16 * encoder.stack


def test_a_long_sound_is_its_windows_joined(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    encoder, clip = build(folder), sound(37_000)
    joined_BND, _ = encoder(encoder.transform(clip)[None])
    parts = [type(clip)(clip.samples_S[start:][:16_000]) for start in (0, 16_000, 32_000)]
    expected = torch.cat([encoder(encoder.transform(part)[None])[0] for part in parts], dim=1)
    torch.testing.assert_close(joined_BND, expected, atol=1e-5, rtol=0)
    assert joined_BND.shape[1] == 2 * WINDOW + 16


def test_neighbours_are_stacked_in_order(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    single, double = build(folder), build(folder, stack=2)
    mel_NTM = single.transform(sound(320 * 5))[None]
    features_BMD, stacked_BND = single(mel_NTM)[0], double(mel_NTM)[0]
    assert stacked_BND.shape == (1, 3, 32)
    assert torch.equal(stacked_BND[0, 1], torch.cat([features_BMD[0, 2], features_BMD[0, 3]]))
    assert torch.equal(stacked_BND[0, 2], torch.cat([features_BMD[0, 4], torch.zeros(16)]))


def test_in_full_mode_every_weight_and_the_waveform_have_a_gradient(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    encoder = build(folder, layer=-2, tune=Tune(mode="full")).train()
    samples_S = torch.from_numpy(sound(20_000).samples_S).requires_grad_()
    encoder(encoder.transform.frames(samples_S)[None])[0].square().sum().backward()
    assert samples_S.grad.abs().sum() > 0
    trained = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 + 2 * 15 and "model.embed_positions.weight" not in trained
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())


def test_what_is_frozen_or_adapted(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    frozen = build(folder, dtype="bfloat16")
    features_BND, _ = frozen(frozen.transform(sound(2000))[None])
    assert not features_BND.requires_grad and features_BND.dtype == torch.bfloat16
    adapted = build(folder, tune=Tune(mode="lora", lr=1e-3, lora=LoRA(target_modules=("q_proj", "fc1"))))
    adapted(adapted.transform(sound(2000))[None])[0].square().sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 2 * 2 and all("lora_" in name and p.grad is not None for name, p in trained.items())


def test_it_keeps_only_what_it_uses(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    names = set(build(folder, layer=-2).state_dict())
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    assert not [name for name in names if "decoder" in name or name.startswith("model.layer_norm")]


def test_an_unbuilt_encoder_serves_the_data_side(whisper: tuple[Any, str]) -> None:
    _, folder = whisper
    encoder = WhisperEncoder(name_or_path=folder, stack=4)
    tokens = [encoder.num_tokens((length,)) for length in (1, 1280, 1281, 16_000, 40_000)]
    assert tokens == [1, 1, 2, 13, 32]  # 50 features a second, four of which are a token
    assert (encoder.transform.sample_rate, encoder.transform.min_samples) == (16_000, 1)
    for again in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder), WhisperEncoder.from_spec(encoder.spec())):
        assert [again.num_tokens((length,)) for length in (1, 1280, 1281, 16_000, 40_000)] == tokens
        assert again.transform == encoder.transform and again.hidden_size == 64


def test_random_weights_need_only_the_configuration(whisper: tuple[Any, str], tmp_path: Path) -> None:
    model, _ = whisper
    model.config.save_pretrained(tmp_path)
    encoder = build(str(tmp_path), pretrained=False)
    assert encoder(encoder.transform(sound(2000))[None])[0].shape == (1, 7, 16)
    with pytest.raises(ValueError, match="gives no readable weights"):
        build(str(tmp_path))


def test_what_cannot_be_used_is_refused(whisper: tuple[Any, str], tmp_path: Path, tiny_clip: Path) -> None:
    from transformers import WhisperFeatureExtractor

    model, folder = whisper
    with pytest.raises(ValueError, match="is a model of type 'clip_vision_model', and WhisperEncoder takes whisper"):
        WhisperEncoder(name_or_path=str(tiny_clip)).num_tokens((1,))
    with pytest.raises(ValueError, match=r"layer 4 does not exist in .*, which has 3 layers"):
        WhisperEncoder(name_or_path=folder, layer=4).num_tokens((1,))
    with pytest.raises(ValueError, match="stack is a number .* got 0"):
        WhisperEncoder(name_or_path=folder, stack=0)
    with pytest.raises(ValueError, match="layer counts from 1"):
        WhisperEncoder(name_or_path=folder, layer=0)
    model.config.save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a preprocessor of 128 mel bands and a model of 80"):
        WhisperEncoder(name_or_path=str(tmp_path)).num_tokens((1,))


@pytest.mark.real
def test_how_far_real_features_are_from_those_with_silence() -> None:
    """The figures in the docstring of the class: all of the difference is what attends to the silence."""
    from datamodules.media_audio import AudioLimits, decode_audio
    from datamodules.sources import MediaRoot

    root = Path(__file__).parents[2]
    folder = root / ".cache/demo/whisper-tiny.en"
    if not folder.is_dir():
        pytest.skip("python -m demo.weights makes it")
    short, padded = build(str(folder)), build(str(folder), pad_to_30s=True)
    for seconds, expected in ((1, 0.43), (5, 0.17), (10, 0.10)):
        differences = []
        for end in range(seconds, 31, seconds) if seconds > 1 else (1,):
            media_root, start = MediaRoot(root / "demo/recordings"), end - seconds
            clip = decode_audio("test.flac", media_root, AudioLimits(), 16_000, start=start, end=end)
            mel_TM, mel_padded_TM = short.transform(clip), padded.transform(clip)
            with torch.no_grad():
                own_LD = short(mel_TM[None])[0][0]
                unseen_LD = padded(mel_padded_TM[None], torch.arange(3000)[None] < len(mel_TM))[0][0, : len(own_LD)]
                seen_LD = padded(mel_padded_TM[None])[0][0, : len(own_LD)]
            torch.testing.assert_close(own_LD, unseen_LD, atol=1e-4, rtol=1e-4)
            differences.append(float(((own_LD - seen_LD).norm(dim=1) / seen_LD.norm(dim=1)).mean()))
        assert sum(differences) / len(differences) == pytest.approx(expected, abs=0.02)
