"""Features of an encoder to embeddings of the language model.

Each computes in its own float32 parameters, whatever the features' type.

Shape suffixes: B items, N features, M embeddings, D width.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.base import Projector
from encoders.tuning import Tune

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

_FULL = Tune(mode="full")


class LinearProjector(Projector):
    """One linear layer, as in the first LLaVA (Liu et al. 2023, arXiv 2304.08485)."""

    def __init__(self, tune: Tune = _FULL) -> None:
        super().__init__(tune)

    def build(self, in_features: int, out_features: int) -> None:
        self.linear = nn.Linear(in_features, out_features, dtype=torch.float32)
        self.apply_tune(self)

    def num_tokens(self, num_features: int) -> int:
        return num_features

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.linear(features_BND.to(next(self.parameters()).dtype)), mask_BN


class MLPProjector(Projector):
    """Linear layers with an activation between them; `depth` 2 is LLaVA-1.5's (Liu et al. 2023, arXiv 2310.03744).

    The layers are called `linear_1`, `linear_2`, …, as in Hugging Face's `LlavaMultiModalProjector`.

    Args:
        depth: Number of linear layers.
        activation: `gelu` is the exact one, `gelu_tanh` its approximation.
        norm: Normalise the features first (LayerNorm).
        hidden_size: Width between the layers; None: the language model's.
        out_rms: Normalise the embeddings (RMSNorm with weights) so that they begin with this root mean square; None: they are as
            large as the last layer makes them, which grows in training, the faster the wider the features are.
        tune: What of the projector is trained.
    """

    def __init__(
        self,
        depth: int = 2,
        activation: Activation = "gelu",
        norm: bool = False,
        hidden_size: int | None = None,
        out_rms: float | None = None,
        tune: Tune = _FULL,
    ) -> None:
        super().__init__(tune)
        if depth < 1:
            raise ValueError(f"depth is the number of linear layers and must be at least 1, got {depth}")
        if out_rms is not None and not 0 < out_rms < math.inf:
            raise ValueError(f"out_rms is the root mean square of an embedding's numbers and must be above 0, got {out_rms}")
        self.depth = depth
        self.activation = activation
        self.norm_features = norm
        self.hidden_size = hidden_size
        self.out_rms = out_rms

    def build(self, in_features: int, out_features: int) -> None:
        hidden = self.hidden_size or out_features
        widths = [in_features, *[hidden] * (self.depth - 1), out_features]
        self.norm = nn.LayerNorm(in_features, dtype=torch.float32) if self.norm_features else nn.Identity()
        for index in range(self.depth):
            self.add_module(f"linear_{index + 1}", nn.Linear(widths[index], widths[index + 1], dtype=torch.float32))
        self.out_norm: nn.Module = nn.Identity()
        if self.out_rms is not None:
            self.out_norm = nn.RMSNorm(out_features, dtype=torch.float32)
            nn.init.constant_(self.out_norm.weight, self.out_rms)
        self.apply_tune(self)

    def num_tokens(self, num_features: int) -> int:
        return num_features

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden_BND = self.norm(features_BND.to(next(self.parameters()).dtype))
        for index in range(self.depth):
            if index > 0:
                hidden_BND = _activate(hidden_BND, self.activation)
            hidden_BND = self.get_submodule(f"linear_{index + 1}")(hidden_BND)
        return self.out_norm(hidden_BND), mask_BN


class PixelShuffleMLPProjector(MLPProjector):
    """Joins `factor` × `factor` neighbours of the patch grid into one wide feature, then an MLP on it.

    So a quarter of the tokens remain for factor 2 (InternVL-1.5: Chen et al. 2024, arXiv 2404.16821; Idefics3: Laurençon et al.
    2024, arXiv 2408.12637). The channels of a joined feature are ordered by row within the block, then column, then the
    feature's own channel.

    Args:
        factor: Edge of the block of patches that becomes one token.
    """

    def __init__(self, *args: Any, factor: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if factor < 1:
            raise ValueError(f"factor is the edge of a block of patches and must be at least 1, got {factor}")
        self.factor = factor

    def build(self, in_features: int, out_features: int) -> None:
        super().build(in_features * self.factor**2, out_features)

    def num_tokens(self, num_features: int) -> int:
        return (self._edge(num_features) // self.factor) ** 2

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Joins, then projects.

        Raises:
            ValueError: The features are no square grid that `factor` divides, or some of them are padding.
        """
        if mask_BN is not None and not mask_BN.all():
            raise ValueError("PixelShuffleMLPProjector joins neighbours of a full grid, but some features are padding")
        edge = self._edge(features_BND.shape[1]) // self.factor
        blocks = features_BND.unflatten(1, (edge, self.factor, edge, self.factor))
        joined_BMD = blocks.transpose(2, 3).flatten(3).flatten(1, 2)
        return super().forward(joined_BMD, None)

    def _edge(self, num_features: int) -> int:
        edge = math.isqrt(num_features)
        if edge**2 != num_features or edge % self.factor:
            raise ValueError(
                f"PixelShuffleMLPProjector takes a square grid whose edge is a multiple of factor = {self.factor}, "
                f"got {num_features} features: set the encoder's tokens to patch, or its image_size to one that gives such a grid"
            )
        return edge


def _activate(hidden: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(hidden)
        case "gelu_tanh":
            return F.gelu(hidden, approximate="tanh")
        case "relu":
            return F.relu(hidden)
        case "silu":
            return F.silu(hidden)
