"""What the encoders of pictures share: one size of picture, choice of layer and tokens, pooling.

Shape suffixes: B pictures, C channels, H W pixels, P prefix tokens (class token, registers), N patches, cells of a map or
features, D width.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.base import DTYPES, DType, Encoder, MediaShape, one_line
from encoders.stored import compute_wide, input_type
from encoders.transforms import ImageTransform, Resize
from encoders.tuning import Tune

Tokens = Literal["patch", "cls", "all"]

_FROZEN = Tune(mode="frozen")


class ImageTokens(NamedTuple):
    """What a model gives: prefix_BPD, patches_BND in row-major order, and whether the first prefix token is the class token."""

    prefix_BPD: Tensor
    patches_BND: Tensor
    has_class: bool


@dataclass(frozen=True)
class _Measured:
    num_tokens: int
    hidden_size: int
    unused: frozenset[str]


class ImageEncoder(Encoder):
    """What the encoders of pictures share; a subclass makes a model, loads its weights and runs it.

    Pictures have one size, so each gives the same number of tokens. Sizes come from a run on the meta device, without
    weights; they are kept, and travel with a pickled or copied encoder.

    Args:
        layer: None takes the model's last features, after its final norm where it has one. A number counts as in the
            `hidden_states` of transformers and `vision_feature_layer` of LLaVA: 1 is the output of the first block, -1 of the
            last one, -2 of the one before, always without the final norm. Later blocks are neither kept nor computed.
        tokens: `patch` the patches (of a convolutional network the cells of its last map), `cls` the class token, or for a
            model without one the mean of the patches, `all` class token and registers, then the patches.
        resize: How a picture gets the model's size; None: the model's own way. See `ImageTransform`.
        image_size: Edge of the square pictures in pixels, instead of the model's own; positions are interpolated.
        pool: Average the patches over blocks of `pool` × `pool`: 2 leaves a quarter of the tokens.
        dtype: Type of the frozen weights; what trains is float32.
        compute_dtype: `float32` computes in it with frozen weights of linear layers that stay in `dtype`, each widened while it
            is used: the features of `dtype float32` in half of its memory, of a checkpoint that is bfloat16.
        tune: What of the encoder is trained.

    Raises:
        ValueError: An option that makes no sense.
    """

    def __init__(
        self,
        layer: int | None = None,
        tokens: Tokens = "patch",
        resize: Resize | None = None,
        image_size: int | None = None,
        pool: int = 1,
        dtype: DType = "float32",
        compute_dtype: Literal["float32"] | None = None,
        tune: Tune = _FROZEN,
    ) -> None:
        super().__init__(tune)
        if pool < 1 or (image_size is not None and image_size < 1):
            raise ValueError(f"pool and image_size must be at least 1, got pool {pool} and image_size {image_size}")
        if layer == 0:
            raise ValueError("layer counts from 1, the output of the first block, or from -1, that of the last one; got 0")
        if tokens == "cls" and pool > 1:
            raise ValueError(f"pool averages patches, but tokens is cls, which gives none: set pool to 1 (got {pool})")
        self.layer = layer
        self.tokens = tokens
        self.resize = resize
        self.image_size = image_size
        self.pool = pool
        self.dtype = torch.float32 if tune.mode == "full" else DTYPES[dtype]  # a detour by bfloat16 would round the weights
        self.compute_dtype = compute_dtype

    @cached_property
    @abstractmethod
    def transform(self) -> ImageTransform:
        """An RGB picture to image_CHW."""

    @abstractmethod
    def _create(self) -> nn.Module:
        """The model with random weights, without the blocks after `layer`."""

    @abstractmethod
    def _load(self) -> nn.Module:
        """The same with the weights that the options ask for."""

    @abstractmethod
    def _run(self, model: nn.Module, image_BCHW: Tensor) -> ImageTokens:
        """The tokens at `layer`."""

    @property
    def hidden_size(self) -> int:
        return self._measured.hidden_size

    def num_tokens(self, shape: MediaShape) -> int:
        return self._measured.num_tokens

    def build(self) -> None:
        self.model = self._load().to(self.dtype)
        unused = self._measured.unused
        for name, child in self.model.named_children():
            parameters = {f"{name}.{parameter}" for parameter, _ in child.named_parameters()}
            if parameters and parameters <= unused and not isinstance(child, nn.ModuleList):  # a list is iterated, not called
                self.model.set_submodule(name, nn.Identity())
        if self.compute_dtype is not None:
            compute_wide(self.model, [nn.Linear])  # the vectors of positions are few, and not always looked up
        self.apply_tune(self.model)
        for name, parameter in self.model.named_parameters():
            if name in unused:  # it would never get a gradient, which DDP refuses
                parameter.requires_grad_(False)

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encodes image_BCHW, as `transform` gives it; a picture has no padding, so the mask is None both ways."""
        assert mask is None, "pictures are resized to one size and need no mask"
        return self._features(self.model, media.to(input_type(self.model))), None

    @cached_property
    def _measured(self) -> _Measured:
        height, width = self.transform.size
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            model = self._create().eval()
            try:
                features_BND = self._features(model, torch.empty(1, 3, height, width, dtype=next(model.parameters()).dtype))
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"{type(model).__name__} takes no pictures of {height}x{width} ({one_line(error)}): "
                    "choose another image_size, or leave it null"
                ) from error
            except (AttributeError, TypeError) as error:
                raise ValueError(
                    f"{type(self).__name__} cannot run {type(model).__name__} ({one_line(error)}): choose another model, "
                    "or write an encoder for this one"
                ) from error
            features_BND.sum().backward()
        unused = frozenset(name for name, parameter in model.named_parameters() if parameter.grad is None)
        return _Measured(num_tokens=features_BND.shape[1], hidden_size=features_BND.shape[2], unused=unused)

    def _features(self, model: nn.Module, image_BCHW: Tensor) -> Tensor:
        prefix_BPD, patches_BND, has_class = self._run(model, image_BCHW)
        patches_BND = pool_grid(patches_BND, (image_BCHW.shape[2], image_BCHW.shape[3]), self.pool)
        match self.tokens:
            case "patch":
                return patches_BND
            case "all":
                return torch.cat([prefix_BPD, patches_BND], dim=1)
            case "cls":
                return prefix_BPD[:, :1] if has_class else patches_BND.mean(1, keepdim=True)


def pool_grid(patches_BND: Tensor, image_size: tuple[int, int], pool: int) -> Tensor:
    """Averages blocks of `pool` × `pool` patches; 1 leaves them as they are.

    Args:
        patches_BND: Patches in row-major order.
        image_size: Height and width of the picture, whose proportions the grid has.
        pool: Edge of a block.

    Raises:
        ValueError: The patches are no such grid, or `pool` does not divide it.
    """
    num_patches = patches_BND.shape[1]
    height = round(math.sqrt(num_patches * image_size[0] / image_size[1]))
    width = num_patches // max(height, 1)
    if height * width != num_patches:
        raise ValueError(
            f"the model gives {num_patches} tokens, which are no grid over a picture of {image_size[0]}x{image_size[1]} pixels: "
            "give a model that keeps one token for each patch"
        )
    if height % pool or width % pool:
        raise ValueError(
            f"pool = {pool} does not divide the grid of {height}x{width} patches "
            f"of a picture of {image_size[0]}x{image_size[1]} pixels: choose another pool or image_size"
        )
    if pool == 1:
        return patches_BND
    map_BDHW = patches_BND.transpose(1, 2).unflatten(2, (height, width))
    return F.avg_pool2d(map_BDHW, pool).flatten(2).transpose(1, 2)
