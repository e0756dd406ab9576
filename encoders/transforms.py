"""Pictures to tensors: Pillow's resize, a centred cut or pad, normalisation.

Shape suffixes: C colour channels, H W pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Resize = Literal["squash", "crop", "pad"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class ImageTransform:
    """An RGB picture to a normalised float32 tensor of one size.

    Args:
        size: Height and width of the result, in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        resize: How the picture meets the box `scale_to`: `squash` fills it and changes the proportions, `crop` covers it
            and keeps them, `pad` fits into it and keeps them. What is then larger than `size` is cut around the centre,
            what is smaller is padded, with the mean colour (`pad`) or with black.
        scale_to: Height and width of that box; None: `size`.
        interpolation: Filter of Pillow's resize.
        rounding: Where a cut by an odd number of pixels begins: `floor`, as in transformers, or `even`, as in
            torchvision and timm, which round halves to the even number.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "squash"
    scale_to: tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"
    rounding: Literal["floor", "even"] = "floor"

    def __post_init__(self) -> None:
        for name, edges in (("size", self.size), ("scale_to", self.scale_to or self.size)):
            if len(edges) != 2 or min(edges) < 1:
                raise ValueError(f"{name} must be a height and a width of at least one pixel, got {edges}")

    def __call__(self, image: Image.Image) -> Tensor:
        """The picture as image_CHW.

        Raises:
            ValueError: The picture is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"the transform expects an RGB picture, got mode {image.mode}: convert it while decoding")
        height, width = self._scaled(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if (height, width) != self.size:
            image = self._centred(image)
        image_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(255)
        mean_C11, std_C11 = torch.tensor([self.mean, self.std])[..., None, None]
        return image_CHW.sub_(mean_C11).div_(std_C11).contiguous()

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        box = self.scale_to or self.size
        if self.resize == "squash":
            return box
        if self.resize == "crop" and box[0] == box[1]:  # transformers and torchvision truncate the longer edge here
            edge, short = box[0], min(height, width)
            return (edge, int(edge * width / short)) if height <= width else (int(edge * height / short), edge)
        ratios = height / box[0], width / box[1]
        ratio = max(ratios) if self.resize == "pad" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _centred(self, image: Image.Image) -> Image.Image:
        colour = [round(255 * value) if self.resize == "pad" else 0 for value in self.mean]
        canvas = Image.new("RGB", self.size[::-1], (colour[0], colour[1], colour[2]))
        canvas.paste(image, (-self._cut(image.width, self.size[1]), -self._cut(image.height, self.size[0])))
        return canvas

    def _cut(self, length: int, target: int) -> int:
        """Pixels cut off at the start of an edge; negative: pixels padded there."""
        surplus = length - target
        if surplus < 0 and self.resize == "pad":
            return -(-surplus // 2)  # of an odd number the larger half comes last, as in LLaVA and timm
        return round(surplus / 2) if self.rounding == "even" else surplus // 2


def timm_transform(config: Mapping[str, Any], resize: Resize | None, image_size: int | None) -> ImageTransform:
    """The evaluation transform of a timm model.

    Args:
        config: What `timm.data.resolve_data_config` gives.
        resize: Instead of the model's own; one that differs from it takes the whole picture, without the model's margin.
        image_size: Edge of a square result, instead of the model's own size.
    """
    own: dict[str, Resize] = {"center": "crop", "border": "pad", "squash": "squash"}
    own_resize = own[config["crop_mode"]]
    height, width = (image_size, image_size) if image_size else config["input_size"][-2:]
    margin = config["crop_pct"] if resize in (None, own_resize) else 1.0
    return ImageTransform(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=resize or own_resize,
        scale_to=(math.floor(height / margin), math.floor(width / margin)),
        interpolation=config["interpolation"],
        rounding="even",
    )


def processor_transform(options: Mapping[str, Any], resize: Resize | None, image_size: int | None) -> ImageTransform:
    """What an image processor of transformers does, on its PIL backend.

    Args:
        options: The processor's options, as its `to_dict` gives them.
        resize: Instead of the processor's own.
        image_size: Edge of a square result, instead of the processor's own size.

    Raises:
        ValueError: The processor does something else than resize, cut and normalise.
    """
    factor = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0
    if not math.isclose(factor, 1 / 255):
        raise ValueError(f"expected a preprocessor that scales pixels by 1/255, got one that scales them by {factor}")
    normalise = options.get("do_normalize", True)
    colours = options if normalise else {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    if resize is not None and image_size is not None:
        size, scale_to = (image_size, image_size), None
    else:
        own_resize, size, scale_to = _processor_geometry(options)
        if image_size is not None:
            scale_to = (scale_to[0] * image_size // size[0], scale_to[1] * image_size // size[1])
            size = (image_size, image_size)
        if resize not in (None, own_resize):
            scale_to = None
        resize = resize or own_resize
    return ImageTransform(
        size=size,
        mean=tuple(colours["image_mean"]),
        std=tuple(colours["image_std"]),
        resize=resize,
        scale_to=scale_to,
        interpolation=_interpolation(options.get("resample")),
    )


def default_processor_options(model_type: str, image_size: int) -> dict[str, Any]:
    """Options of the image processor that released checkpoints of a model type have, for pictures of `image_size`.

    Raises:
        ValueError: The type is not known here.
    """
    square = {"height": image_size, "width": image_size}
    cut = {"do_center_crop": True, "crop_size": square, "resample": Image.Resampling.BICUBIC}
    dino = cut | _IMAGENET | {"size": {"shortest_edge": image_size * 256 // 224}}
    known: dict[str, dict[str, Any]] = {
        "clip_vision_model": cut | _CLIP | {"size": {"shortest_edge": image_size}},
        "siglip_vision_model": _HALF | {"size": square, "resample": Image.Resampling.BICUBIC},
        "dinov2": dino,
        "dinov2_with_registers": dino,
        "vit": _HALF | {"size": square, "resample": Image.Resampling.BILINEAR},
    }
    if model_type not in known:
        raise ValueError(
            f"the checkpoint has no preprocessor_config.json, and no defaults are known for its type {model_type!r} "
            f"(only for {', '.join(known)}): save its image processor beside the weights"
        )
    return known[model_type]


def _processor_geometry(options: Mapping[str, Any]) -> tuple[Resize, tuple[int, int], tuple[int, int]]:
    """How a processor resizes, the size of its result, and the box it scales to."""
    size = {name: edge for name, edge in (options.get("size") or {}).items() if edge}
    crop = options["crop_size"] if options.get("do_center_crop") else None
    plain = options.get("do_resize", True) and not options.get("do_pad") and not options.get("crop_pct")
    if plain and set(size) == {"shortest_edge"} and crop:
        return "crop", (crop["height"], crop["width"]), (size["shortest_edge"],) * 2
    if plain and set(size) == {"height", "width"}:
        box = (size["height"], size["width"])
        return "squash", (crop["height"], crop["width"]) if crop else box, box
    shown = {
        name: value for name, value in options.items() if "size" in name or name in ("do_resize", "do_center_crop", "do_pad")
    }
    raise ValueError(
        f"the checkpoint's preprocessor gives no fixed size that is known here ({shown}): "
        "set both image_size and resize of the encoder"
    )


def _interpolation(resample: int | None) -> Interpolation:
    names: dict[int, Interpolation] = {
        Image.Resampling.NEAREST: "nearest",
        Image.Resampling.BOX: "box",
        Image.Resampling.BILINEAR: "bilinear",
        Image.Resampling.HAMMING: "hamming",
        Image.Resampling.BICUBIC: "bicubic",
        Image.Resampling.LANCZOS: "lanczos",
    }
    return names[Image.Resampling.BILINEAR if resample is None else resample]
