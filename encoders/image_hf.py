"""Vision encoders from transformers.

Shape suffixes: B pictures, C channels, H W pixels or cells, P prefix tokens (class token, registers), N patches, D width.
"""

import math
from functools import cached_property
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from encoders.hf import load_model, num_blocks, read_config
from encoders.image_base import ImageEncoder, ImageTokens
from encoders.transforms import ImageTransform, default_processor_options, processor_transform

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class HFVisionEncoder(ImageEncoder):
    """A vision model of transformers: CLIP, SigLIP, DINOv2, ViT and others that take pixels alone.

    The vision tower is taken from a whole CLIP or SigLIP checkpoint too. With `layer` null the features are the class's
    `last_hidden_state`: after the final norm for SigLIP, DINOv2 and ViT, before it for CLIP, which normalises only what it
    pools.

    Args:
        name_or_path: Name on the hub, or a folder with `config.json`.
        pretrained: Take the checkpoint's weights; False: random ones, from its configuration alone.
    """

    def __init__(self, name_or_path: str, *args: Any, pretrained: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name_or_path = name_or_path
        self.pretrained = pretrained

    @property
    def has_source(self) -> bool:
        """Whether the weights come from the hub or a folder."""
        return self.pretrained

    @cached_property
    def transform(self) -> ImageTransform:
        from transformers import AutoImageProcessor
        from transformers.models.auto.image_processing_auto import get_image_processor_config

        config = self._config()
        if get_image_processor_config(self.name_or_path):
            options = AutoImageProcessor.from_pretrained(self.name_or_path).to_dict()
        else:
            options = default_processor_options(config.model_type, config.to_dict().get("image_size", 224))
        return processor_transform(options, self.resize, self.image_size)

    def _config(self) -> "PreTrainedConfig":
        """The vision model's configuration, with the blocks up to `layer` only."""
        config = read_config(self.name_or_path)
        if "vision_config" in type(config).sub_configs:
            config = config.vision_config
        if self.layer is not None:
            depth = config.to_dict().get("num_hidden_layers")
            if depth is None:
                raise ValueError(f"{self.name_or_path} ({config.model_type}) has no plain stack of layers: set layer to null")
            config.num_hidden_layers = num_blocks(self.layer, depth, self.name_or_path)
            config.tie_last_hidden_states = False
        return config

    def _create(self) -> nn.Module:
        from transformers import AutoModel

        model = AutoModel.from_config(self._config(), dtype=torch.float32)
        inputs = signature(type(model).forward).parameters.values()
        needed = {p.name for p in inputs if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD} - {"self"}
        if model.main_input_name != "pixel_values" or needed - {"pixel_values"}:
            takes = ", ".join(sorted(needed | {model.main_input_name}))
            raise ValueError(
                f"{self.name_or_path} is a {type(model).__name__}, which takes {takes}: "
                "a vision model that takes pixel_values alone is needed"
            )
        return model

    def _load(self) -> nn.Module:
        from transformers import AutoModel

        if not self.pretrained:
            return self._create()
        return load_model(AutoModel, self.name_or_path, self._config(), self.dtype, unused=self._measured.unused)

    def _run(self, model: Any, image_BCHW: Tensor) -> ImageTokens:
        config, size = model.config.to_dict(), tuple(image_BCHW.shape[2:])
        resized = size != _pair(config.get("image_size", size))
        interpolates = "interpolate_pos_encoding" in signature(type(model).forward).parameters
        arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if resized and interpolates else {}
        if self.layer is not None:
            arguments["output_hidden_states"] = [-1]  # older versions read the list as True and keep them all
        output = model(pixel_values=image_BCHW, **arguments)
        tokens = output.last_hidden_state if self.layer is None else output.hidden_states[-1]
        if tokens.ndim == 4:  # a map, B D H W
            tokens = tokens.flatten(2).transpose(1, 2)
            return ImageTokens(tokens[:, :0], tokens, False)
        num_patches = math.prod(edge // patch for edge, patch in zip(size, _pair(config.get("patch_size", 1)), strict=True))
        num_prefix = max(0, tokens.shape[1] - num_patches)  # a hierarchical model ends with fewer tokens, and no prefix
        return ImageTokens(tokens[:, :num_prefix], tokens[:, num_prefix:], num_prefix > 0)


def _pair(edges: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (edges, edges) if isinstance(edges, int) else (edges[0], edges[1])
