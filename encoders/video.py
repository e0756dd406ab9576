"""Clips to features: an image encoder on each frame, then attention in space and time.

Shape suffixes: B clips, F frames, P real frames of all clips, C channels, H W pixels, N features of a frame, M features of a
clip, D width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from encoders.base import Encoder, MediaShape, MediaTransform
from encoders.sampling import FrameSampling
from encoders.space_time import SpaceTimeBlock
from encoders.tuning import Tune

Pool = Literal["none", "time", "space"]

_FULL = Tune(mode="full")


@dataclass(frozen=True)
class ClipTransform:
    """A clip to frames_FCHW, each as the image encoder takes it.

    Args:
        frame: The transform of one frame, an RGB picture.
        sampling: Which frames of a video are decoded.
    """

    frame: MediaTransform
    sampling: FrameSampling

    def __call__(self, clip: Any) -> Tensor:
        """Transforms the frames, `clip.frames_FHW3`."""
        return torch.stack([self.frame(Image.fromarray(pixels_HW3)) for pixels_HW3 in clip.frames_FHW3])


class VideoEncoder(Encoder):
    """Any image encoder frame by frame, then blocks of divided space-time attention.

    Untrained blocks change nothing, so that training starts with the features of the single frames. Frames know their place
    by their number in the clip. Clips of a batch may have different numbers of frames.

    Args:
        frames: The encoder of a single frame; it has a `tune` of its own.
        sampling: Which frames of a video are taken.
        num_layers: Blocks of space-time attention; 0: the frames do not see each other.
        num_heads: Heads of each attention, a divisor of the width of the features; None: one for each 64 of it.
        pool: What is averaged in the end: `none` gives all features, frame by frame; `time` averages the frames, and gives as
            many as one frame has; `space` averages within each frame, and gives one for each.
        tune: What of the blocks is trained; frames without blocks have nothing to train here.

    Raises:
        ValueError: An option that makes no sense.
    """

    def __init__(
        self,
        frames: Encoder,
        sampling: FrameSampling = FrameSampling(),  # it is frozen
        num_layers: int = 2,
        num_heads: int | None = None,
        pool: Pool = "none",
        tune: Tune = _FULL,
    ) -> None:
        super().__init__(tune)
        if num_layers < 0:
            raise ValueError(f"num_layers is the number of space-time blocks, 0 or more, got {num_layers}")
        if num_heads is not None and num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, or null for one for each 64 of the width, got {num_heads}")
        self.frames = frames
        self.sampling = sampling
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.pool = pool

    @property
    def hidden_size(self) -> int:
        return self.frames.hidden_size

    @cached_property
    def transform(self) -> ClipTransform:
        return ClipTransform(self.frames.transform, self.sampling)

    @property
    def has_frozen_features(self) -> bool:
        """Whether the encoder of the frames is frozen; the blocks may train."""
        return self.frames.tune.mode == "frozen"

    def num_tokens(self, shape: MediaShape) -> int:
        num_frames, height, width = shape
        num_features = self.frames.num_tokens((height, width))
        match self.pool:
            case "none":
                return num_frames * num_features
            case "time":
                return num_features
            case "space":
                return num_frames

    def build(self) -> None:
        heads = self.num_heads or max(1, self.hidden_size // 64)
        if self.hidden_size % heads:
            raise ValueError(
                f"num_heads = {heads} does not divide the width of the features, {self.hidden_size}: set num_heads to a divisor"
            )
        self.frames.build()
        self.blocks = nn.ModuleList(SpaceTimeBlock(self.hidden_size, heads) for _ in range(self.num_layers))
        self.apply_tune(self.blocks)

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encodes clips, frames_BFCHW as `transform` gives them, with mask_BF where some are padded."""
        return self.refine(*self.features(media, mask))

    def features(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of the single frames, one frame after the other; of what is padding nothing is computed."""
        is_real_BF = torch.ones(media.shape[:2], dtype=torch.bool, device=media.device) if mask is None else mask
        features_PND, mask_PN = self.frames(media[is_real_BF])
        assert mask_PN is None, "frames have one size, so none of their features is padding"
        features_BFND = features_PND.new_zeros(*is_real_BF.shape, *features_PND.shape[1:])
        features_BFND[is_real_BF] = features_PND
        mask_BM = None if mask is None else mask.repeat_interleave(features_PND.shape[1], dim=1)
        return features_BFND.flatten(1, 2), mask_BM

    def refine(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The blocks and the pooling, on what `features` gives."""
        num_features = self.frames.num_tokens((224, 224))  # frames have one size after the transform: any shape says it
        features_BFND = features_BND.to(torch.float32).unflatten(1, (-1, num_features))
        mask_BF = None if mask_BN is None else mask_BN[:, ::num_features]
        for block in self.blocks:
            features_BFND = block(features_BFND, mask_BF)
        match self.pool:
            case "none":
                return features_BFND.flatten(1, 2), mask_BN
            case "time":
                return _mean_of_frames(features_BFND, mask_BF), None
            case "space":
                return features_BFND.mean(2), mask_BF


def _mean_of_frames(features_BFND: Tensor, mask_BF: Tensor | None) -> Tensor:
    """Mean over the real frames, features_BND."""
    if mask_BF is None:
        return features_BFND.mean(1)
    weights_BF11 = (mask_BF / mask_BF.sum(1, keepdim=True))[..., None, None]
    return (features_BFND * weights_BF11).sum(1)
