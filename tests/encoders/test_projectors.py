import pytest
import torch
from torch import nn

from encoders.projectors import LinearProjector, MLPProjector, PixelShuffleMLPProjector
from encoders.tuning import LoRA, Tune


def normal(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mlp_equals_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=12, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=20, num_attention_heads=2),
    )
    reference = LlavaMultiModalProjector(config)
    projector = MLPProjector()
    projector.build(12, 20)
    projector.load_state_dict(reference.state_dict())  # strict: the layers have the same names
    features_BND = normal(2, 5, 12)
    embeddings_BMD, mask_BM = projector(features_BND)
    torch.testing.assert_close(embeddings_BMD, reference(features_BND))
    assert mask_BM is None


def test_linear_is_a_matrix_product():
    projector = LinearProjector()
    projector.build(6, 4)
    features_BND, mask_BN = normal(2, 3, 6), torch.tensor([[True, True, False], [True, False, False]])
    embeddings_BMD, mask_BM = projector(features_BND, mask_BN)
    expected = torch.einsum("bnd,ed->bne", features_BND, projector.linear.weight) + projector.linear.bias
    torch.testing.assert_close(embeddings_BMD, expected)
    assert mask_BM is mask_BN
    assert projector.num_tokens(7) == 7


def test_pixel_shuffle_equals_idefics3():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    projector = PixelShuffleMLPProjector(factor=3, depth=1)
    projector.build(5, 11)
    features_BND = normal(2, 36, 5)
    joined_BMD = Idefics3Connector.pixel_shuffle(None, features_BND, 3)
    expected = nn.functional.linear(joined_BMD, projector.linear_1.weight, projector.linear_1.bias)
    embeddings_BMD, mask_BM = projector(features_BND, torch.ones(2, 36, dtype=torch.bool))
    torch.testing.assert_close(embeddings_BMD, expected)
    assert mask_BM is None
    assert embeddings_BMD.shape[1] == projector.num_tokens(36) == 4


def test_pixel_shuffle_joins_neighbours():
    projector = PixelShuffleMLPProjector(factor=2, depth=1)
    projector.build(1, 4)
    with torch.no_grad():
        projector.linear_1.weight.copy_(torch.eye(4))
        projector.linear_1.bias.zero_()
    cells = torch.arange(16.0).reshape(1, 16, 1)
    assert projector(cells)[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("num_features", [15, 9, 257])
def test_pixel_shuffle_refuses_other_grids(num_features):
    projector = PixelShuffleMLPProjector()
    projector.build(4, 4)
    with pytest.raises(ValueError, match=f"got {num_features} features"):
        projector.num_tokens(num_features)
    with pytest.raises(ValueError, match=f"got {num_features} features"):
        projector(normal(1, num_features, 4))


def test_pixel_shuffle_refuses_padding():
    projector = PixelShuffleMLPProjector()
    projector.build(4, 4)
    with pytest.raises(ValueError, match="padding"):
        projector(normal(1, 4, 4), torch.tensor([[True, True, True, False]]))


@pytest.mark.parametrize(
    ("activation", "module"),
    [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU(approximate="tanh")), ("relu", nn.ReLU()), ("silu", nn.SiLU())],
)
def test_mlp_options(activation, module):
    projector = MLPProjector(depth=3, activation=activation, norm=True, hidden_size=9)
    projector.build(6, 4)
    reference = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), module, nn.Linear(9, 9), module, nn.Linear(9, 4))
    weights = dict(zip(reference.state_dict(), projector.state_dict().values(), strict=True))
    reference.load_state_dict(weights)
    features_BND = normal(2, 3, 6)
    torch.testing.assert_close(projector(features_BND)[0], reference(features_BND))


@pytest.mark.parametrize("projector", [LinearProjector(), MLPProjector(norm=True), PixelShuffleMLPProjector()])
def test_half_features_are_computed_in_float32(projector):
    projector.build(8, 4)
    features_BND = normal(1, 4, 8).to(torch.bfloat16).requires_grad_()
    embeddings_BMD, _ = projector(features_BND)
    torch.testing.assert_close(embeddings_BMD, projector(features_BND.float())[0], atol=0, rtol=0)
    assert embeddings_BMD.dtype == torch.float32
    embeddings_BMD.square().sum().backward()
    assert features_BND.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())


def test_lora_on_a_projector():
    projector = MLPProjector(tune=Tune(mode="lora", lora=LoRA(target_modules=("linear_2",))))
    projector.build(6, 4)
    trainable = {name for name, parameter in projector.named_parameters() if parameter.requires_grad}
    assert trainable == {"linear_2.lora_A.default.weight", "linear_2.lora_B.default.weight"}
    assert projector(normal(1, 2, 6))[0].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"depth": 0}, "at least 1, got 0"), ({"factor": 0}, "at least 1, got 0"), ({"out_rms": 0.0}, "out_rms is .* got 0.0")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PixelShuffleMLPProjector(**options)


def test_embeddings_begin_with_the_root_mean_square_that_is_asked_for():
    projector, plain = MLPProjector(out_rms=0.3), MLPProjector()
    projector.build(6, 8)
    plain.build(6, 8)
    plain.load_state_dict({name: weight for name, weight in projector.state_dict().items() if name != "out_norm.weight"})
    features_BND = normal(2, 3, 6)
    embeddings_BND, wanted_BND = projector(features_BND)[0], plain(features_BND)[0]
    torch.testing.assert_close(embeddings_BND.square().mean(-1), torch.full((2, 3), 0.09))
    torch.testing.assert_close(embeddings_BND, 0.3 * wanted_BND / wanted_BND.square().mean(-1, keepdim=True).sqrt())
    embeddings_BND.sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())
