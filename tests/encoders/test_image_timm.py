import pytest
import torch
from safetensors.torch import save_file

from encoders.image import TimmEncoder
from encoders.tuning import LoRA, Tune


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Makes, once a name, a whole classifier of timm and the file of its weights."""
    import timm

    made = {}

    def make(name):
        if name not in made:
            model = timm.create_model(name).eval()
            path = tmp_path_factory.mktemp(name) / "model.safetensors"
            save_file(model.state_dict(), path)
            made[name] = model, str(path)
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "image_size", "tokens"),
    [
        *[("test_vit", 48, tokens) for tokens in ("patch", "cls", "all")],  # class token
        *[("test_vit2", 32, tokens) for tokens in ("patch", "cls", "all")],  # a register, no class token
        *[("test_convnext", 64, tokens) for tokens in ("patch", "cls", "all")],
        ("test_resnet", 64, "patch"),
        ("test_efficientnet", 64, "patch"),
        ("vit_tiny_patch16_224", 32, "all"),
        ("resnet18", 32, "patch"),
        ("convnext_atto", 64, "patch"),
        ("efficientnet_lite0", 64, "patch"),
        ("swin_tiny_patch4_window7_224", 64, "patch"),  # channels last
    ],
)
def test_sizes_known_before_build_are_those_of_the_features(name, image_size, tokens):
    encoder = TimmEncoder(model_name=name, pretrained=False, image_size=image_size, tokens=tokens)
    num_tokens, hidden_size = encoder.num_tokens((480, 640)), encoder.hidden_size
    assert list(encoder.parameters()) == []
    encoder.build()
    features_BND, mask_BN = encoder(pixels(2, 3, *encoder.transform.size))
    assert features_BND.shape == (2, num_tokens, hidden_size)
    assert mask_BN is None
    assert encoder.transform.size == (image_size, image_size)


@pytest.mark.parametrize(("name", "num_prefix"), [("test_vit", 1), ("test_vit2", 1)])
def test_transformer_equals_timm(checkpoints, name, num_prefix):
    model, path = checkpoints(name)
    image_BCHW = pixels(2, 3, 160, 160)
    expected = model.forward_features(image_BCHW)
    for tokens, part in (("all", expected), ("patch", expected[:, num_prefix:])):
        encoder = TimmEncoder(model_name=name, checkpoint_path=path, tokens=tokens)
        encoder.build()
        torch.testing.assert_close(encoder(image_BCHW)[0], part)
    encoder = TimmEncoder(model_name=name, checkpoint_path=path, tokens="cls")
    encoder.build()
    has_class = name == "test_vit"
    expected_cls = expected[:, :1] if has_class else expected[:, 1:].mean(1, keepdim=True)
    torch.testing.assert_close(encoder(image_BCHW)[0], expected_cls)


@pytest.mark.parametrize("layer", [1, 3, -1, -2])
def test_layers_of_a_transformer_equal_timm(checkpoints, layer):
    model, path = checkpoints("test_vit")
    image_BCHW = pixels(2, 3, 160, 160)
    block = layer - 1 if layer > 0 else layer
    [(patches, prefix)] = model.forward_intermediates(
        image_BCHW, indices=[block], output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    encoder = TimmEncoder(model_name="test_vit", checkpoint_path=path, layer=layer, tokens="all")
    encoder.build()
    torch.testing.assert_close(encoder(image_BCHW)[0], torch.cat([prefix, patches], dim=1))
    kept = {key.split(".")[2] for key in encoder.state_dict() if key.startswith("model.blocks.")}
    assert kept == {str(index) for index in range(len(model.blocks[: block + 1 or None]))}
    assert not [key for key in encoder.state_dict() if key.startswith(("model.norm.", "model.head", "model.fc_norm"))]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_maps_equal_timm(checkpoints, name):
    model, path = checkpoints(name)
    image_BCHW = pixels(2, 3, 64, 96)  # not square: rows and columns cannot be confused
    [stage] = model.forward_intermediates(image_BCHW, indices=[-2], intermediates_only=True)
    for layer, expected in ((None, model.forward_features(image_BCHW)), (-2, stage)):
        encoder = TimmEncoder(model_name=name, checkpoint_path=path, layer=layer)
        encoder.build()
        torch.testing.assert_close(encoder(image_BCHW)[0], expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_positions_are_resized_to_the_image_size(checkpoints):
    import timm

    _, path = checkpoints("test_vit")
    reference = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay={"file": path}, img_size=64).eval()
    encoder = TimmEncoder(model_name="test_vit", checkpoint_path=path, image_size=64, tokens="all")
    encoder.build()
    image_BCHW = pixels(1, 3, 64, 64)
    torch.testing.assert_close(encoder(image_BCHW)[0], reference.forward_features(image_BCHW))


def test_transform_is_the_model_s_own():
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, timm.get_pretrained_cfg("vit_base_patch16_clip_224.openai").to_dict())
    image = Image.fromarray((pixels(201, 133, 3).sigmoid() * 255).to(torch.uint8).numpy())
    transform = TimmEncoder(model_name="vit_base_patch16_clip_224.openai").transform
    torch.testing.assert_close(transform(image), create_transform(**config)(image), atol=1e-5, rtol=0)


def test_weights_that_do_not_fit_are_refused(checkpoints, tmp_path):
    model, path = checkpoints("test_vit")
    with pytest.raises(ValueError, match=r"does not fit test_vit2.*blocks\.6\.norm1\.weight"):
        TimmEncoder(model_name="test_vit2", checkpoint_path=path).build()
    state = model.state_dict()
    del state["blocks.2.attn.qkv.weight"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"does not fit test_vit.*Missing.*blocks\.2\.attn\.qkv\.weight"):
        TimmEncoder(model_name="test_vit", checkpoint_path=str(tmp_path / "partial.pth")).build()
    with pytest.raises(ValueError, match="is no file"):
        TimmEncoder(model_name="test_vit", checkpoint_path=str(tmp_path / "none.pth")).build()
    for content in (b"", b"no weights\n"):
        (tmp_path / "text.pth").write_bytes(content)
        with pytest.raises(ValueError, match="does not fit"):
            TimmEncoder(model_name="test_vit", checkpoint_path=str(tmp_path / "text.pth")).build()


def test_torch_checkpoints_are_read(checkpoints, tmp_path):
    model, _ = checkpoints("test_vit")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    encoder = TimmEncoder(model_name="test_vit", checkpoint_path=str(tmp_path / "model.pth"), tokens="all")
    encoder.build()
    image_BCHW = pixels(1, 3, 160, 160)
    torch.testing.assert_close(encoder(image_BCHW)[0], model.forward_features(image_BCHW))
    assert "state_dict" not in encoder.model.pretrained_cfg


def test_names_and_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"Similar names: .*vit_tiny_patch16_224"):
        TimmEncoder(model_name="vit_tiny_patch16_242", pretrained=False).num_tokens((1, 1))
    with pytest.raises(ValueError, match="hf-hub:owner/model"):
        TimmEncoder(model_name="owner/model", pretrained=False).num_tokens((1, 1))
    with pytest.raises(ValueError, match="layer 7 does not exist in test_vit"):
        TimmEncoder(model_name="test_vit", pretrained=False, layer=7).num_tokens((1, 1))


def test_lora_names_the_layers_there_are():
    with pytest.raises(ValueError, match=r"q_proj.*fc1, fc2, proj, qkv"):
        TimmEncoder(model_name="test_vit", pretrained=False, tune=Tune(mode="lora")).build()
    encoder = TimmEncoder(
        model_name="test_vit", pretrained=False, tune=Tune(mode="lora", lora=LoRA(target_modules=("qkv",))), dtype="bfloat16"
    )
    encoder.build()
    trainable = {name: parameter.dtype for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(encoder.model.blocks)
    assert set(trainable.values()) == {torch.float32}
    assert encoder(pixels(1, 3, 160, 160))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("pit_ti_224", "pit_ti_224 gives 1 class token"),
        ("pit_ti_distilled_224", "pit_ti_distilled_224 gives 2 class token"),
        ("crossvit_tiny_240", "crossvit_tiny_240 gives a list of 2"),
    ],
)
def test_models_without_patches_after_their_last_layer_are_refused(name, given):
    with pytest.raises(ValueError, match=given):
        TimmEncoder(model_name=name, pretrained=False).num_tokens((1, 1))


def test_class_token_that_timm_does_not_declare_is_no_patch():
    assert TimmEncoder(model_name="volo_d1_224", pretrained=False).num_tokens((1, 1)) == (224 // 16) ** 2
    assert TimmEncoder(model_name="pit_ti_224", pretrained=False, tokens="cls").num_tokens((1, 1)) == 1
