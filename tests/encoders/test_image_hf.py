import logging

import pytest
import torch
from torch import nn

from encoders.image import HFVisionEncoder
from encoders.transforms import default_processor_options, processor_transform
from encoders.tuning import Tune

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
NUM_PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 5, "vit": 1}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def make_model(kind: str) -> nn.Module:
    import transformers

    config = {
        "clip": lambda: transformers.CLIPVisionConfig(**SIZES),
        "siglip": lambda: transformers.SiglipVisionConfig(**SIZES),
        "dinov2": lambda: transformers.Dinov2Config(**SIZES),
        "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**SIZES),
        "vit": lambda: transformers.ViTConfig(**SIZES),
        "whole_clip": lambda: transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT),
        "whole_siglip": lambda: transformers.SiglipConfig(vision_config=SIZES, text_config=TEXT),
        "aimv2": lambda: transformers.Aimv2VisionConfig(**SIZES),
        "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        "naflex": lambda: transformers.Siglip2VisionConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}),
        "bert": lambda: transformers.BertConfig(**TEXT),
    }[kind]()
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases away from 1 and 0, so that leaving one out shows
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes, once a kind, a model and the folder that holds it."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = make_model(kind)
            model.save_pretrained(folder)
            made[kind] = model, str(folder)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", list(NUM_PREFIX))
def test_features_equal_transformers_at_every_layer(saved, kind):
    model, folder = saved(kind)
    image_BCHW = pixels(2, 3, 32, 32)
    output = model(pixel_values=image_BCHW, output_hidden_states=True)
    for layer in (None, 1, 2, 3, 4, -2):
        encoder = HFVisionEncoder(name_or_path=folder, layer=layer, tokens="all")
        num_tokens, hidden_size = encoder.num_tokens((9, 9)), encoder.hidden_size
        encoder.build()
        features_BND, mask_BN = encoder(image_BCHW)
        expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
        torch.testing.assert_close(features_BND, expected)
        assert features_BND.shape == (2, num_tokens, hidden_size)
        assert mask_BN is None


@pytest.mark.parametrize("kind", list(NUM_PREFIX))
def test_tokens_are_chosen(saved, kind):
    model, folder = saved(kind)
    image_BCHW = pixels(2, 3, 32, 32)
    every = model(pixel_values=image_BCHW).last_hidden_state
    patches = every[:, NUM_PREFIX[kind] :]
    assert patches.shape[1] == 16
    for tokens, expected in (("patch", patches), ("cls", every[:, :1] if NUM_PREFIX[kind] else patches.mean(1, keepdim=True))):
        encoder = HFVisionEncoder(name_or_path=folder, tokens=tokens)
        assert encoder.num_tokens((9, 9)) == expected.shape[1]
        encoder.build()
        torch.testing.assert_close(encoder(image_BCHW)[0], expected)


def test_what_is_not_used_is_not_kept(saved):
    _, folder = saved("siglip")
    encoder = HFVisionEncoder(name_or_path=folder, layer=-2)
    encoder.build()
    kept = {key.split(".")[3] for key in encoder.state_dict() if ".layers." in key}
    assert kept == {"0", "1", "2"}
    assert not [key for key in encoder.state_dict() if "head" in key or "post_layernorm" in key]


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "vit"])
def test_in_full_mode_every_weight_and_the_pixels_have_a_gradient(saved, kind):
    _, folder = saved(kind)
    encoder = HFVisionEncoder(name_or_path=folder, tune=Tune(mode="full"), layer=-2)
    encoder.build()
    image_BCHW = pixels(1, 3, 32, 32).requires_grad_()
    encoder(image_BCHW)[0].square().sum().backward()
    assert image_BCHW.grad.abs().sum() > 0
    trainable = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert len(trainable) > 40
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []


@pytest.mark.parametrize("whole", ["clip", "siglip"])
def test_tower_of_a_whole_checkpoint(saved, whole, caplog, monkeypatch):
    model, folder = saved(f"whole_{whole}")
    encoder = HFVisionEncoder(name_or_path=folder, layer=-2, tokens="all")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    encoder.build()
    assert caplog.text == ""  # no list of the text tower's weights
    image_BCHW = pixels(1, 3, 32, 32)
    expected = model.vision_model(pixel_values=image_BCHW, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(encoder(image_BCHW)[0], expected)


def test_random_weights_need_only_the_configuration(tmp_path, saved):
    model, _ = saved("clip")
    model.config.save_pretrained(tmp_path)
    encoder = HFVisionEncoder(name_or_path=str(tmp_path), pretrained=False, layer=-2)
    encoder.build()
    assert encoder(pixels(1, 3, 32, 32))[0].shape == (1, encoder.num_tokens((1, 1)), 16)
    with pytest.raises(ValueError, match="gives no readable weights"):
        HFVisionEncoder(name_or_path=str(tmp_path)).build()


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_another_image_size_interpolates_positions(saved, kind):
    model, folder = saved(kind)
    encoder = HFVisionEncoder(name_or_path=folder, image_size=48, tokens="all")
    encoder.build()
    image_BCHW = pixels(1, 3, 48, 48)
    expected = model(pixel_values=image_BCHW, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder(image_BCHW)[0], expected)
    assert encoder.transform.size == (48, 48)
    assert encoder.num_tokens((1, 1)) == 36 + NUM_PREFIX[kind]


def test_transform_comes_from_the_checkpoint_or_else_from_its_type(tmp_path, saved):
    from transformers import SiglipImageProcessor

    model, folder = saved("clip")
    own = HFVisionEncoder(name_or_path=folder).transform
    assert own == processor_transform(default_processor_options("clip_vision_model", 32), None, None)
    model.config.save_pretrained(tmp_path)
    processor = SiglipImageProcessor(size={"height": 40, "width": 40}, image_mean=[0.1, 0.2, 0.3], resample=2)
    processor.save_pretrained(tmp_path)
    transform = HFVisionEncoder(name_or_path=str(tmp_path)).transform
    assert (transform.size, transform.resize, transform.interpolation) == ((40, 40), "squash", "bilinear")
    assert transform.mean == (0.1, 0.2, 0.3)
    assert HFVisionEncoder(name_or_path=str(tmp_path), resize="pad").transform.resize == "pad"


def test_convolutional_network_gives_its_map(tmp_path):
    from transformers import ConvNextImageProcessor

    model = make_model("resnet")
    model.save_pretrained(tmp_path)
    ConvNextImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set both image_size and resize"):
        HFVisionEncoder(name_or_path=str(tmp_path)).num_tokens((1, 1))
    encoder = HFVisionEncoder(name_or_path=str(tmp_path), resize="crop", image_size=48)
    encoder.build()
    image_BCHW = pixels(2, 3, 48, 48)
    map_BDHW = model(pixel_values=image_BCHW).last_hidden_state
    torch.testing.assert_close(encoder(image_BCHW)[0], map_BDHW.permute(0, 2, 3, 1).flatten(1, 2))
    with pytest.raises(ValueError, match="no plain stack of layers"):
        HFVisionEncoder(name_or_path=str(tmp_path), layer=-2).num_tokens((1, 1))


def test_unfit_checkpoints_are_refused(tmp_path, saved):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"gives no config\.json"):
        HFVisionEncoder(name_or_path=str(tmp_path / "nothing")).num_tokens((1, 1))
    _, folder = saved("clip")
    with pytest.raises(ValueError, match=r"layer 5 does not exist in .*, which has 4 layers"):
        HFVisionEncoder(name_or_path=folder, layer=5).num_tokens((1, 1))
    make_model("clip").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layers.1.mlp.fc1.bias"]
    state["pre_layrnorm.weight"] = torch.rand(15)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"2 tensors .*encoder\.layers\.1\.mlp\.fc1\.bias, pre_layrnorm\.weight \(15,\) instead of"
    ):
        HFVisionEncoder(name_or_path=str(tmp_path)).build()


def test_model_of_one_picture_size_refuses_another(saved):
    from transformers import CLIPImageProcessor

    _, folder = saved("aimv2")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    assert HFVisionEncoder(name_or_path=folder).num_tokens((1, 1)) == 16
    with pytest.raises(ValueError, match="Aimv2VisionModel takes no pictures of 48x48"):
        HFVisionEncoder(name_or_path=folder, image_size=48).num_tokens((1, 1))


@pytest.mark.parametrize(("kind", "needs"), [("naflex", "spatial_shapes"), ("bert", "input_ids")])
def test_models_that_take_more_than_pixels_are_refused(tmp_path, kind, needs):
    make_model(kind).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{needs}.*pixel_values alone is needed"):
        HFVisionEncoder(name_or_path=str(tmp_path), pretrained=False).build()
