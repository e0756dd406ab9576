import copy
import pickle

import pytest
import torch
from torch import nn

from encoders.image import TimmEncoder
from encoders.image_base import pool_grid
from encoders.tuning import LoRA, Tune


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_pool_averages_blocks_of_the_grid():
    patches_BND = pixels(2, 24, 3)
    pooled_BND = pool_grid(patches_BND, (40, 60), 2)  # 4 x 6 patches
    for row in range(2):
        for column in range(3):
            block = [patches_BND[:, (2 * row + i) * 6 + 2 * column + j] for i in range(2) for j in range(2)]
            torch.testing.assert_close(pooled_BND[:, row * 3 + column], torch.stack(block).mean(0))
    assert pool_grid(patches_BND, (40, 60), 1) is patches_BND


def test_pool_refuses_what_it_would_cut():
    with pytest.raises(ValueError, match="pool = 4 does not divide the grid of 4x6 patches of a picture of 40x60"):
        pool_grid(pixels(1, 24, 3), (40, 60), 4)
    with pytest.raises(ValueError, match="gives 23 tokens, which are no grid"):
        pool_grid(pixels(1, 23, 3), (40, 60), 1)
    with pytest.raises(ValueError, match="grid of 10x10 patches"):
        TimmEncoder(model_name="test_vit", pretrained=False, pool=3).num_tokens((1, 1))


def test_pool_keeps_the_prefix():
    encoder = TimmEncoder(model_name="test_vit", pretrained=False, tokens="all", pool=5)
    assert encoder.num_tokens((1, 1)) == 1 + 4
    encoder.build()
    image_BCHW = pixels(1, 3, 160, 160)
    every = encoder.model.forward_features(image_BCHW)
    expected = torch.cat([every[:, :1], pool_grid(every[:, 1:], (160, 160), 5)], dim=1)
    torch.testing.assert_close(encoder(image_BCHW)[0], expected)


@pytest.mark.parametrize(
    "options", [{"pool": 0}, {"image_size": 0}, {"tokens": "cls", "pool": 2}, {"layer": 0}], ids=lambda options: "-".join(options)
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="got"):
        TimmEncoder(model_name="test_vit", **options)


def test_unbuilt_encoder_travels_with_its_sizes():
    encoder = TimmEncoder(model_name="test_vit", pretrained=False, image_size=48)
    num_tokens, hidden_size = encoder.num_tokens((1, 1)), encoder.hidden_size
    data = pickle.dumps(encoder)
    assert len(data) < 10_000
    for again in (pickle.loads(data), copy.deepcopy(encoder)):
        again.model_name = "no such model"  # so the sizes cannot be found anew
        assert (again.num_tokens((1, 1)), again.hidden_size) == (num_tokens, hidden_size)
        assert again.transform == encoder.transform


def test_sizes_are_found_under_inference_mode():
    with torch.inference_mode():
        encoder = TimmEncoder(model_name="test_vit2", pretrained=False)
        assert encoder.num_tokens((1, 1)) == 100
    encoder.build()
    assert all(not parameter.is_inference() for parameter in encoder.parameters())


def test_frozen_stays_as_it_is_in_training():
    encoder = TimmEncoder(model_name="test_resnet", pretrained=False)
    encoder.build()
    assert not encoder.model.training
    nn.ModuleList([encoder]).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    image_BCHW = pixels(4, 3, 64, 64)
    first, second = encoder(image_BCHW)[0], encoder(image_BCHW)[0]
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_full_trains_statistics_and_pixels():
    encoder = TimmEncoder(model_name="test_resnet", pretrained=False, tune=Tune(mode="full"))
    encoder.build()
    assert encoder.model.training
    before = encoder.model.bn1.running_mean.clone()
    image_BCHW = pixels(4, 3, 64, 64).requires_grad_()
    encoder(image_BCHW)[0].square().sum().backward()
    assert image_BCHW.grad.abs().sum() > 0
    assert not torch.equal(encoder.model.bn1.running_mean, before)
    assert [name for name, parameter in encoder.named_parameters() if parameter.requires_grad and parameter.grad is None] == []


def test_measuring_first_does_not_change_random_weights():
    states = []
    for measure_first in (False, True):
        encoder = TimmEncoder(model_name="test_vit", pretrained=False)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            if measure_first:
                encoder.num_tokens((1, 1))
            encoder.build()
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.bfloat16)
    try:
        encoder = TimmEncoder(model_name="test_vit", pretrained=False)
        assert encoder.num_tokens((1, 1)) == 100
        encoder.build()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_weights(dtype):
    encoder = TimmEncoder(model_name="test_vit", pretrained=False, dtype=dtype, layer=2)
    encoder.build()
    assert {parameter.dtype for parameter in encoder.parameters()} == {getattr(torch, dtype)}
    assert encoder(pixels(1, 3, 160, 160))[0].dtype == getattr(torch, dtype)


def test_full_mode_trains_float32_weights_without_a_detour():
    states = []
    for dtype in ("float32", "bfloat16"):
        encoder = TimmEncoder(model_name="test_vit", pretrained=False, image_size=32, dtype=dtype, tune=Tune(mode="full"))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            encoder.build()
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    before = {key: parameter.detach().clone() for key, parameter in encoder.named_parameters()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-5, weight_decay=0.0)
    features_BND, _ = encoder(pixels(2, 3, 32, 32))
    (features_BND * pixels(*features_BND.shape)).sum().backward()
    optimizer.step()
    for key, parameter in encoder.named_parameters():
        used = parameter.grad.abs() > 1e-6
        assert used.any(), key
        assert (parameter != before[key])[used].float().mean() > 0.99, key


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tune", [Tune(mode="full"), Tune(mode="lora", lora=LoRA(target_modules=("qkv", "patch_embed.proj")))])
def test_bfloat16_weights_run_whatever_trains(tune, autocast):
    encoder = TimmEncoder(model_name="test_vit", pretrained=False, image_size=32, dtype="bfloat16", tune=tune)
    encoder.build()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        features_BND, _ = encoder(pixels(2, 3, 32, 32))
    features_BND.float().square().sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trained
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad is not None for parameter in trained)


class Broken(TimmEncoder):
    """A researcher's encoder with a slip."""

    def _run(self, model, image_BCHW):
        return model.no_such_layer(image_BCHW)


def test_slip_in_a_run_is_named_and_keeps_its_cause():
    with pytest.raises(ValueError, match="Broken cannot run VisionTransformer.*no_such_layer") as caught:
        Broken(model_name="test_vit", pretrained=False).num_tokens((1, 1))
    assert isinstance(caught.value.__cause__, AttributeError)
