"""The resampler against its formula, written with einsum.

Shape suffixes: B items, N features, M latents, K latents and features, H heads, D width.
"""

import json

import pytest
import torch
from torch import Tensor

from encoders.base import Projector
from encoders.resampler import PerceiverResampler
from encoders.tuning import Tune

IN, OUT = 6, 10


@pytest.fixture
def resampler(generator: torch.Generator) -> PerceiverResampler:
    """Three latents, two layers, two heads; norms that are not the identity."""
    made = PerceiverResampler(num_latents=3, depth=2, num_heads=2, head_dim=4)
    made.build(IN, OUT)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def by_formula(resampler: PerceiverResampler, features_ND: Tensor) -> Tensor:
    """Figure 5 of Flamingo, of one item."""
    weights = resampler.state_dict()
    latents_MD = weights["latents_MD"]
    for layer in ("layers.0.attention", "layers.1.attention"):
        memory_KD = norm(torch.cat([features_ND, latents_MD]), weights, f"{layer}.memory_norm")
        heads = {name: weights[f"{layer}.{name}_proj.weight"].reshape(2, 4, IN) for name in "qkv"}
        queries_MHd = torch.einsum("md,hed->mhe", norm(latents_MD, weights, f"{layer}.norm"), heads["q"])
        keys_KHd, values_KHd = (torch.einsum("kd,hed->khe", memory_KD, heads[name]) for name in "kv")
        weights_HMK = (torch.einsum("mhe,khe->hmk", queries_MHd, keys_KHd) / 2).exp()
        weights_HMK = weights_HMK / weights_HMK.sum(-1, keepdim=True)
        read_MD = torch.einsum("hmk,khe->mhe", weights_HMK, values_KHd).reshape(3, 8)
        latents_MD = latents_MD + torch.einsum("me,de->md", read_MD, weights[f"{layer}.o_proj.weight"])
        dense = layer.replace("attention", "feed_forward")
        hidden = norm(latents_MD, weights, f"{dense}.norm") @ weights[f"{dense}.up_proj.weight"].T
        latents_MD = latents_MD + torch.where(hidden > 0, hidden**2, 0) @ weights[f"{dense}.down_proj.weight"].T
    return norm(latents_MD, weights, "norm") @ weights["linear.weight"].T + weights["linear.bias"]


def test_it_is_the_formula(resampler: PerceiverResampler, generator: torch.Generator) -> None:
    features_BND = torch.randn(2, 5, IN, generator=generator)
    embeddings_BMD, mask_BM = resampler(features_BND)
    assert embeddings_BMD.shape == (2, 3, OUT) and mask_BM is None
    expected_BMD = torch.stack([by_formula(resampler, features_ND) for features_ND in features_BND])
    torch.testing.assert_close(embeddings_BMD, expected_BMD, rtol=1e-4, atol=1e-4)


def test_padding_counts_for_nothing(resampler: PerceiverResampler, generator: torch.Generator) -> None:
    features_BND = torch.randn(2, 5, IN, generator=generator)
    mask_BN = torch.tensor([[True] * 5, [True, True, True, False, False]])
    features_BND[1, 3:] = torch.tensor([float("inf"), float("nan")])[:, None]
    embeddings_BMD, _ = resampler(features_BND, mask_BN)
    for item, length in enumerate((5, 3)):
        alone_1MD, _ = resampler(features_BND[item : item + 1, :length])
        torch.testing.assert_close(embeddings_BMD[item : item + 1], alone_1MD, rtol=1e-5, atol=1e-5)
    embeddings_BMD.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in resampler.parameters())


def test_the_order_of_features_does_not_matter_but_each_of_them_does(
    resampler: PerceiverResampler, generator: torch.Generator
) -> None:
    features_BND = torch.randn(1, 5, IN, generator=generator)
    embeddings_BMD, _ = resampler(features_BND)
    torch.testing.assert_close(resampler(features_BND[:, [3, 1, 4, 0, 2]])[0], embeddings_BMD, rtol=1e-4, atol=1e-4)
    for feature in range(5):
        changed_BND = features_BND.clone()
        changed_BND[0, feature] += torch.randn(IN, generator=generator)
        assert (resampler(changed_BND)[0] - embeddings_BMD).abs().max() > 1e-3


def test_gradients_reach_everything(resampler: PerceiverResampler, generator: torch.Generator) -> None:
    features_BND = torch.randn(2, 5, IN, generator=generator, requires_grad=True)
    weights_BMD = torch.randn(2, 3, OUT, generator=generator)
    (resampler(features_BND)[0] * weights_BMD).sum().backward()
    assert features_BND.grad is not None and (features_BND.grad.abs().sum(-1) > 0).all()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in resampler.parameters())


def test_it_computes_in_float32(resampler: PerceiverResampler, generator: torch.Generator) -> None:
    features_BND = torch.randn(1, 4, IN, generator=generator).bfloat16()
    assert torch.equal(resampler(features_BND)[0], resampler(features_BND.float())[0])


def test_the_number_of_tokens_and_the_spec() -> None:
    made = PerceiverResampler(num_latents=7, depth=1, tune=Tune(lr=1e-3))
    assert [made.num_tokens(number) for number in (1, 16, 4000)] == [7, 7, 7]
    again = Projector.from_spec(json.loads(json.dumps(made.spec())))
    assert isinstance(again, PerceiverResampler) and again.options == made.options
    again.build(IN, OUT)
    assert again(torch.ones(2, 3, IN))[0].shape == (2, 7, OUT)
    assert sum(p.requires_grad for p in again.parameters()) == len(list(again.parameters()))


@pytest.mark.parametrize("option", ["num_latents", "depth", "num_heads", "head_dim"])
def test_options_that_cannot_be(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} of PerceiverResampler must be at least 1, got 0"):
        PerceiverResampler(**{option: 0})
