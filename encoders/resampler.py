"""Any number of features to a fixed number of embeddings, by attention of learned latents.

Shape suffixes: B items, N features, M latents, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.attention import CrossAttention, FeedForward
from encoders.base import Projector
from encoders.tuning import Tune

_FULL = Tune(mode="full")


class PerceiverResampler(Projector):
    """Learned latents that read the features: as many embeddings, however many features there are.

    The perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 2.1 and figure 5): in each layer the
    latents attend to the features and to themselves, then go through a feed-forward layer; at the end they are normalised and
    mapped to the language model's width. It knows no order: where and when a feature was must be in the feature, as it is in
    those of transformers. Features that are padding count for nothing.

    Args:
        num_latents: Latents, and so embeddings of a medium.
        depth: Number of layers; Flamingo has 6.
        num_heads: Heads of the attention.
        head_dim: Width of a head.
        tune: What of the projector is trained.
    """

    def __init__(
        self,
        num_latents: int = 64,
        depth: int = 2,
        num_heads: int = 8,
        head_dim: int = 64,
        tune: Tune = _FULL,
    ) -> None:
        super().__init__(tune)
        options = {"num_latents": num_latents, "depth": depth, "num_heads": num_heads, "head_dim": head_dim}
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"{name} of PerceiverResampler must be at least 1, got {value}")
        self.num_latents = num_latents
        self.depth = depth
        self.num_heads = num_heads
        self.head_dim = head_dim

    def build(self, in_features: int, out_features: int) -> None:
        self.latents_MD = nn.Parameter(torch.empty(self.num_latents, in_features, dtype=torch.float32).normal_(std=0.02))
        self.layers = nn.ModuleList(_Layer(in_features, self.num_heads, self.head_dim) for _ in range(self.depth))
        self.norm = nn.LayerNorm(in_features, dtype=torch.float32)
        self.linear = nn.Linear(in_features, out_features, dtype=torch.float32)
        self.apply_tune(self)

    def num_tokens(self, num_features: int) -> int:
        return self.num_latents

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        features_BND = features_BND.to(self.latents_MD.dtype)
        latents_BMD = self.latents_MD.expand(len(features_BND), -1, -1)
        mask_B1K = None
        if mask_BN is not None:
            features_BND = features_BND.masked_fill(~mask_BN[..., None], 0)  # not even as 0 times something that is not finite
            mask_B1K = F.pad(mask_BN, (0, self.num_latents), value=True)[:, None]
        for layer in self.layers:
            latents_BMD = layer(latents_BMD, features_BND, mask_B1K)
        return self.linear(self.norm(latents_BMD)), None


class _Layer(nn.Module):
    def __init__(self, size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention = CrossAttention(size, size, num_heads, head_dim)
        self.feed_forward = FeedForward(size)

    def forward(self, latents_BMD: Tensor, features_BND: Tensor, mask_B1K: Tensor | None) -> Tensor:
        memory_BKD = torch.cat([features_BND, latents_BMD], dim=1)
        latents_BMD = latents_BMD + self.attention(latents_BMD, self.attention.keys_values(memory_BKD), mask_B1K)
        return latents_BMD + self.feed_forward(latents_BMD)
