"""What the encoders of sound share: windows that are joined, neighbours that are stacked, and masks.

Shape suffixes: N sounds, T steps of what the transform gives (mel frames or samples), W windows, V windows of all sounds,
L features of a window, B sounds, M features of a sound, D width. Steps of mel frames have one more dimension, M mel bands.
"""

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.audio_transforms import LogMel, Samples
from encoders.base import DTYPES, DType, Encoder, MediaShape
from encoders.stored import compute_wide, input_type
from encoders.tuning import Tune

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FROZEN = Tune(mode="frozen")


class AudioEncoder(Encoder):
    """An encoder of sound from transformers; a subclass makes a model, loads its weights and runs it on windows.

    A sound may have any length: it is cut into windows, each is encoded for itself, and their features are joined. A batch is
    padded to its longest sound, and masked so that each sound gives the features that it gives alone.

    Args:
        name_or_path: Name on the hub, or a folder with `config.json`.
        pretrained: Take the checkpoint's weights; False: random ones, from its configuration alone.
        layer: None takes the model's last features, after its final norm where it has one. A number counts as in the
            `hidden_states` of transformers: 1 is the output of the first block, -1 of the last one, -2 of the one before,
            always without the final norm. Later blocks are neither kept nor computed.
        stack: Neighbouring features that are joined into one wide feature, so that a sound takes fewer tokens; the last one is
            filled with zeros.
        dtype: Type of the frozen weights; what trains is float32.
        compute_dtype: `float32` computes in it with frozen weights of linear layers that stay in `dtype`, each widened while it
            is used: the features of `dtype float32` in half of its memory, of a checkpoint that is bfloat16.
        tune: What of the encoder is trained.

    Raises:
        ValueError: An option that makes no sense.
    """

    def __init__(
        self,
        name_or_path: str,
        pretrained: bool = True,
        layer: int | None = None,
        stack: int = 1,
        dtype: DType = "float32",
        compute_dtype: Literal["float32"] | None = None,
        tune: Tune = _FROZEN,
    ) -> None:
        super().__init__(tune)
        if layer == 0:
            raise ValueError("layer counts from 1, the output of the first block, or from -1, that of the last one; got 0")
        if stack < 1:
            raise ValueError(f"stack is a number of neighbouring features and must be at least 1, got {stack}")
        self.name_or_path = name_or_path
        self.pretrained = pretrained
        self.layer = layer
        self.stack = stack
        self.dtype = torch.float32 if tune.mode == "full" else DTYPES[dtype]  # a detour by bfloat16 would round the weights
        self.compute_dtype = compute_dtype

    @cached_property
    @abstractmethod
    def transform(self) -> LogMel | Samples:
        """A waveform to the steps that `forward` takes."""

    @cached_property
    @abstractmethod
    def _config(self) -> "PreTrainedConfig":
        """The model's configuration, with the blocks up to `layer` only."""

    @abstractmethod
    def _load(self) -> nn.Module:
        """The model, with the weights that the options ask for."""

    @abstractmethod
    def _num_features(self, num_steps: Any) -> Any:
        """Features of a window of so many steps: of one number, or of each in a tensor."""

    @abstractmethod
    def _run(self, model: Any, windows_VT: Tensor, mask_VT: Tensor | None) -> Tensor:
        """features_VLD of windows; what they give at padded places does not matter."""

    @property
    def has_source(self) -> bool:
        """Whether the weights come from the hub or a folder."""
        return self.pretrained

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size * self.stack

    def num_tokens(self, shape: MediaShape) -> int:
        return -(-self._num_joined(self.transform.num_steps(shape[0])) // self.stack)

    def build(self) -> None:
        self.model = self._load().to(self.dtype)
        if self.compute_dtype is not None:
            compute_wide(self.model, [nn.Linear])  # the vectors of positions are few, and not always looked up
        self.apply_tune(self.model)

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encodes a batch of sounds, as `transform` gives them: mel_NTM or samples_NT, with mask_NT where some are padded."""
        media = media.to(input_type(self.model))
        if mask is None and media.shape[1] <= self.transform.window:
            features_BMD, mask_BM = self._run(self.model, media, None), None
        else:
            is_real = torch.ones(media.shape[:2], dtype=torch.bool, device=media.device) if mask is None else mask
            features_BMD, mask_BM = self._run_windows(media, is_real)
        return stack_neighbours(features_BMD, None if mask is None else mask_BM, self.stack)

    def _run_windows(self, media: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
        """All windows of all sounds in one run; of windows past the end of a sound nothing is computed."""
        num_steps = media.shape[1]
        size = min(self.transform.window, num_steps)
        mask_NWT = split_windows(mask_NT, size)
        is_real_NW = mask_NWT[:, :, 0]
        features_VLD = self._run(self.model, split_windows(media, size)[is_real_NW], mask_NWT[is_real_NW])
        features_NWLD = features_VLD.new_zeros(*is_real_NW.shape, *features_VLD.shape[1:])
        features_NWLD[is_real_NW] = features_VLD
        lengths_B = (self._num_features(mask_NWT.sum(2)) * is_real_NW).sum(1)
        # all windows of a sound but its last are full, so its features are neighbours without a gap
        mask_BM = torch.arange(self._num_joined(num_steps), device=media.device) < lengths_B[:, None]
        features_BMD = features_NWLD.flatten(1, 2)[:, : mask_BM.shape[1]]
        return features_BMD.masked_fill(~mask_BM[..., None], 0), mask_BM

    def _num_joined(self, num_steps: int) -> int:
        """Features of a sound of so many steps, before they are stacked."""
        full, rest = divmod(num_steps, self.transform.window)
        return full * self._num_features(self.transform.window) + (self._num_features(rest) if rest else 0)


def split_windows(steps_NT: Tensor, size: int) -> Tensor:
    """Steps (N, T, ...) in windows (N, W, `size`, ...); the last one is filled with zeros."""
    surplus = -steps_NT.shape[1] % size
    return F.pad(steps_NT, (0, 0) * (steps_NT.ndim - 2) + (0, surplus)).unflatten(1, (-1, size))


def stack_neighbours(features_BMD: Tensor, mask_BM: Tensor | None, stack: int) -> tuple[Tensor, Tensor | None]:
    """Joins each `stack` neighbouring features into a wide one, in order; the last one is filled with zeros.

    Args:
        features_BMD: Features, 0 at padded places.
        mask_BM: True where they are real; None: everywhere.
        stack: How many become one.

    Returns:
        features_BND with N = M / stack, rounded up, and stack × D, and mask_BN.
    """
    if stack == 1:
        return features_BMD, mask_BM
    features_BND = split_windows(features_BMD, stack).flatten(2)
    return features_BND, None if mask_BM is None else split_windows(mask_BM, stack)[:, :, 0]
