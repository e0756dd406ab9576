from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.collate import pad_time
from encoders.audio import Wav2Vec2Encoder
from encoders.tuning import LoRA, Tune
from tests.encoders.audio_fakes import KINDS, make_audio_model, save_audio_model, sound

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # of WavLM in transformers

LENGTHS = [5000, 16_000, 37_000, 40, 48_000, 16_001]
"""In samples; a window of the tests is a second, and 40 samples are the fewest that the tiny models take."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`saved(kind)`: a random model of transformers, and its folder, made once a kind."""
    made: dict[str, tuple[Any, str]] = {}

    def make(kind: str) -> tuple[Any, str]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = save_audio_model(kind, folder), str(folder)
        return made[kind]

    return make


def build(folder: str, **options: Any) -> Wav2Vec2Encoder:
    encoder = Wav2Vec2Encoder(name_or_path=folder, **options)
    encoder.build()
    return encoder.eval()


def exact(folder: str, **options: Any) -> Wav2Vec2Encoder:
    """In float64, where what is equal but for the order of its sums is equal to 1e-10, whatever weights were drawn."""
    return build(folder, **options).double()


def waves(encoder: Wav2Vec2Encoder, lengths: list[int] = LENGTHS) -> list[Tensor]:
    dtype = next(encoder.parameters()).dtype
    return [encoder.transform(sound(length, seed)).to(dtype) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_transformers_at_every_layer(saved: Any, kind: str) -> None:
    model, folder = saved(kind)
    samples_NT = torch.stack(waves(exact(folder), [9001, 9001]))
    output = model.double()(samples_NT, output_hidden_states=True)
    for layer in (None, 1, 2, 3, -2):
        encoder = exact(folder, layer=layer)
        features_BND, mask_BN = encoder(samples_NT)
        expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
        torch.testing.assert_close(features_BND, expected, atol=1e-10, rtol=0)
        assert features_BND.shape == (2, encoder.num_tokens((9001,)), encoder.hidden_size) and mask_BN is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("layer")])
def test_a_padded_batch_equals_transformers_with_its_mask(saved: Any, kind: str) -> None:
    """Where the norms of the convolutions are over channels, transformers takes a mask."""
    model, folder = saved(kind)
    encoder = exact(folder)
    samples_NT, mask_NT = pad_time(waves(encoder, [5000, 9001, 700]))
    features_BND, mask_BN = encoder(samples_NT, mask_NT)
    expected = model.double()(samples_NT, attention_mask=mask_NT.long()).last_hidden_state
    assert [int(number) for number in mask_BN.sum(1)] == [
        int(model._get_feat_extract_output_lengths(n)) for n in (5000, 9001, 700)
    ]
    torch.testing.assert_close(features_BND[mask_BN], expected[mask_BN], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", [1, 4])
def test_a_batch_gives_what_each_sound_gives_alone(saved: Any, kind: str, stack: int) -> None:
    _, folder = saved(kind)
    encoder = exact(folder, window_seconds=1.0, stack=stack)
    items = waves(encoder)
    samples_NT, mask_NT = pad_time(items)
    samples_NT = samples_NT.masked_fill(~mask_NT, 1e6)  # what stands at padded places does not matter
    features_BND, mask_BN = encoder(samples_NT, mask_NT)
    for number, (samples_T, length) in enumerate(zip(items, LENGTHS, strict=True)):
        alone_BND, _ = encoder(samples_T[None])
        assert int(mask_BN[number].sum()) == alone_BND.shape[1] == encoder.num_tokens((length,))
        torch.testing.assert_close(features_BND[number][mask_BN[number]], alone_BND[0], atol=1e-10, rtol=0)
    assert not features_BND[~mask_BN].any()


def test_a_long_sound_is_its_windows_joined(saved: Any) -> None:
    _, folder = saved("wav2vec2-group")
    encoder = exact(folder, window_seconds=1.0, normalise=False)
    (samples_T,) = waves(encoder, [32_010])
    joined_BND, _ = encoder(samples_T[None])
    assert len(samples_T) == 32_040  # the last window is filled up to one feature
    expected = torch.cat([encoder(part_T[None])[0] for part_T in samples_T.split(16_000)], dim=1)
    torch.testing.assert_close(joined_BND, expected, atol=1e-10, rtol=0)


def test_released_checkpoints_have_fifty_features_a_second_of_at_least_400_samples(tmp_path: Path) -> None:
    from transformers import HubertConfig

    HubertConfig().save_pretrained(tmp_path)  # that of hubert-base
    encoder = Wav2Vec2Encoder(name_or_path=str(tmp_path), normalise=True)
    assert encoder.transform.min_samples == 400 and encoder.hidden_size == 768
    assert [encoder.num_tokens((n,)) for n in (400, 719, 720, 16_000, 480_000, 480_001)] == [1, 1, 2, 49, 1499, 1500]
    with pytest.raises(ValueError, match=r"has 399 samples .* at least 400 \(0\.025 s\)"):
        encoder.num_tokens((399,))


@pytest.mark.parametrize("kind", KINDS)
def test_in_full_mode_every_weight_and_the_waveform_have_a_gradient(saved: Any, kind: str) -> None:
    _, folder = saved(kind)
    encoder = build(folder, layer=-2, tune=Tune(mode="full")).train()
    samples_NT, mask_NT = pad_time([wave.requires_grad_() for wave in waves(encoder, [3000, 5000])])
    samples_NT.retain_grad()
    encoder(samples_NT, mask_NT)[0].square().sum().backward()
    assert samples_NT.grad[mask_NT].abs().sum() > 0
    assert not samples_NT.grad[0, 3000:].any()
    trained = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert len(trained) > 40
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


def test_what_is_frozen_or_adapted(saved: Any) -> None:
    _, folder = saved("hubert-layer")
    frozen = build(folder, dtype="bfloat16")
    features_BND, _ = frozen(*pad_time(waves(frozen, [3000, 5000])))
    assert not features_BND.requires_grad and features_BND.dtype == torch.bfloat16
    adapted = build(folder, tune=Tune(mode="lora")).train()
    adapted(waves(adapted, [3000])[0][None])[0].square().sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 2 * 2 and all("lora_" in name and p.grad is not None for name, p in trained.items())


def test_adapters_that_wavlm_would_pass_by_are_refused(saved: Any) -> None:
    _, folder = saved("wavlm-group")
    with pytest.raises(ValueError, match="adapters on them would do nothing: set lora.target_modules"):
        build(folder, tune=Tune(mode="lora"))
    adapted = build(folder, tune=Tune(mode="lora", lora=LoRA(target_modules=("intermediate_dense", "output_dense")))).train()
    adapted(waves(adapted, [3000])[0][None])[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_training_draws_nothing_but_dropout(saved: Any) -> None:
    """The released checkpoints mask features and drop layers at random, which would leave weights without a gradient."""
    _, folder = saved("wav2vec2-layer")
    encoder = build(folder, tune=Tune(mode="full")).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in encoder.model.encoder.layers:
        layer.attention.dropout = 0.0
    samples_NT = waves(encoder, [9001])[0][None]
    assert torch.equal(encoder(samples_NT)[0], encoder(samples_NT)[0])
    assert "masked_spec_embed" not in encoder.model.state_dict()


def test_normalisation_comes_from_the_checkpoint(saved: Any, tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    model, folder = saved("wavlm-group")
    assert Wav2Vec2Encoder(name_or_path=folder).transform.normalise
    assert not Wav2Vec2Encoder(name_or_path=folder, normalise=False).transform.normalise
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say whether its sounds are normalised .* or set normalise"):
        Wav2Vec2Encoder(name_or_path=str(tmp_path)).num_tokens((16_000,))
    Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000).save_pretrained(tmp_path)
    transform = Wav2Vec2Encoder(name_or_path=str(tmp_path)).transform
    assert (transform.normalise, transform.sample_rate, transform.window) == (False, 8000, 240_000)


def test_what_cannot_be_used_is_refused(tmp_path: Path, tiny_clip: Path) -> None:
    with pytest.raises(ValueError, match="type 'clip_vision_model', and Wav2Vec2Encoder takes wav2vec2, hubert, wavlm"):
        Wav2Vec2Encoder(name_or_path=str(tiny_clip)).num_tokens((16_000,))
    make_audio_model("wav2vec2-layer", add_adapter=True).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has add_adapter in its config.json, which is not supported"):
        Wav2Vec2Encoder(name_or_path=str(tmp_path)).num_tokens((16_000,))
    with pytest.raises(ValueError, match="window_seconds must be at least 1, got 0.5"):
        Wav2Vec2Encoder(name_or_path=str(tmp_path), window_seconds=0.5)
