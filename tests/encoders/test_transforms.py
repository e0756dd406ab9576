import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.transforms import ImageTransform, default_processor_options, processor_transform, timm_transform

SIZES = [(37, 53), (53, 37), (64, 64), (301, 75), (31, 230), (8, 9)]


def picture(height: int, width: int, seed: int = 5) -> Image.Image:
    generator = torch.Generator().manual_seed(seed + 1000 * height + width)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)  # smooth and rough at once, so that filters differ
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    noise = torch.rand(3, height, width, generator=generator)
    pixels = ((0.7 * smooth + 0.3 * noise) * 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_released", "vit"])
def test_equals_the_processors_of_transformers(kind):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = {
        "clip": CLIPImageProcessorPil,
        "siglip": SiglipImageProcessorPil,
        "dinov2": BitImageProcessorPil,
        "dinov2_released": lambda: BitImageProcessorPil(
            size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ),
        "vit": ViTImageProcessorPil,
    }[kind]()
    transform = processor_transform(processor.to_dict(), None, None)
    assert transform.size == (224, 224)
    for height, width in SIZES:
        image = picture(height, width)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)


def test_centre_crop_larger_than_the_resized_picture_pads_as_transformers_does():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 17}, crop_size={"height": 30, "width": 22})
    transform = processor_transform(processor.to_dict(), None, None)
    for height, width in SIZES:
        image = picture(height, width)
        torch.testing.assert_close(transform(image), processor(image, return_tensors="pt")["pixel_values"][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_lite0"])
@pytest.mark.parametrize("overrides", [{}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"input_size": (3, 96, 64)}])
def test_equals_timm(name, overrides):
    import timm
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(overrides, timm.get_pretrained_cfg(name).to_dict())
    reference = create_transform(**config, is_training=False)
    transform = timm_transform(config, None, None)
    for height, width in SIZES:
        image = picture(height, width)
        torch.testing.assert_close(transform(image), reference(image), atol=1e-5, rtol=0)


def test_pad_keeps_the_whole_picture_between_bars_of_the_mean_colour():
    transform = ImageTransform((20, 20), mean=(0.2, 0.4, 0.6), std=(1.0, 1.0, 1.0), resize="pad")
    image_CHW = transform(picture(10, 40))  # scaled to 5 x 20: bars of 7 and 8 rows
    assert image_CHW[:, :7].abs().max() < 1e-6
    assert image_CHW[:, 12:].abs().max() < 1e-6
    inside = np.asarray(picture(10, 40).resize((20, 5), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor(inside - [0.2, 0.4, 0.6], dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(image_CHW[:, 7:12], expected)


def test_resize_override_takes_the_whole_picture():
    config = {
        "crop_mode": "center",
        "crop_pct": 0.5,
        "input_size": (3, 16, 16),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "interpolation": "bilinear",
    }
    image = picture(40, 23)
    whole = torch.tensor(np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    torch.testing.assert_close(timm_transform(config, "squash", None)(image), whole)
    assert timm_transform(config, None, 32).scale_to == (64, 64)
    assert timm_transform(config, "pad", 32).scale_to == (32, 32)
    options = default_processor_options("dinov2", 224)
    assert processor_transform(options, None, 112).scale_to == (128, 128)
    assert processor_transform(options, None, 112).size == (112, 112)
    assert processor_transform(options, "squash", None) == ImageTransform(
        (224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="squash"
    )


def test_survives_pickling():
    transform = processor_transform(default_processor_options("clip_vision_model", 56), None, None)
    again = pickle.loads(pickle.dumps(transform))
    image = picture(61, 47)
    assert again == transform
    torch.testing.assert_close(again(image), transform(image))
    assert again(image).dtype == torch.float32
    assert again(image).is_contiguous()


def test_refuses_what_it_cannot_do():
    transform = ImageTransform((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match="expects an RGB picture, got mode L"):
        transform(picture(9, 9).convert("L"))
    with pytest.raises(ValueError, match="at least one pixel"):
        ImageTransform((0, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    options = default_processor_options("siglip_vision_model", 32)
    with pytest.raises(ValueError, match="set both image_size and resize"):
        processor_transform(options | {"size": {"longest_edge": 64}}, None, None)
    assert processor_transform(options | {"size": {"longest_edge": 64}}, "pad", 48).size == (48, 48)
    with pytest.raises(ValueError, match="1/255"):
        processor_transform(options | {"rescale_factor": 1 / 127.5}, None, None)
    with pytest.raises(ValueError, match="'swin'"):
        default_processor_options("swin", 224)
