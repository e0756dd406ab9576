"""Divided space-time attention (Bertasius et al. 2021, "TimeSformer", arXiv 2102.05095), on the features of frames.

Weights are float32. A new block changes nothing: the last layer of each branch starts at 0, so that training begins with the
features as they are, and each branch gets a gradient from its first step on.

Shape suffixes: B clips, F frames, N features of a frame, S sequences, T positions in a sequence, H heads, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpaceTimeBlock(nn.Module):
    """Attention along time at each place, then among the places of each frame, then a layer of four times the width.

    Each branch normalises what it reads and adds to it. The position in time is added where attention along time reads, so
    that it never enters the features themselves.

    Args:
        size: Width D.
        num_heads: Heads of both attentions.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.time_norm = nn.LayerNorm(size, dtype=torch.float32)
        self.time_attention = SelfAttention(size, num_heads)
        self.space_norm = nn.LayerNorm(size, dtype=torch.float32)
        self.space_attention = SelfAttention(size, num_heads)
        self.mlp_norm = nn.LayerNorm(size, dtype=torch.float32)
        self.up_proj = nn.Linear(size, 4 * size, dtype=torch.float32)
        self.down_proj = _zero_linear(4 * size, size)

    def forward(self, features_BFND: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """Lets the frames of each clip see each other.

        Args:
            features_BFND: The features.
            mask_BF: True where a frame is real, which at least one of each clip must be; None: everywhere. What is padding
                is seen by no real frame.
        """
        num_clips, num_frames, num_places, size = features_BFND.shape
        position_FD = time_positions(num_frames, size).to(features_BFND.device)
        time_BFND = self.time_norm(features_BFND) + position_FD[:, None]
        mask_ST = None if mask_BF is None else mask_BF.repeat_interleave(num_places, dim=0)
        change_STD = self.time_attention(time_BFND.transpose(1, 2).flatten(0, 1), mask_ST)
        features_BFND = features_BFND + change_STD.unflatten(0, (num_clips, num_places)).transpose(1, 2)
        change_STD = self.space_attention(self.space_norm(features_BFND).flatten(0, 1))
        features_BFND = features_BFND + change_STD.unflatten(0, (num_clips, num_frames))
        return features_BFND + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(features_BFND))))


class SelfAttention(nn.Module):
    """Multi-head attention of the positions of a sequence to each other.

    Args:
        size: Width D.
        num_heads: Number of heads; it divides the width.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(size, 3 * size, dtype=torch.float32)
        self.o_proj = _zero_linear(size, size)

    def forward(self, hidden_STD: Tensor, mask_ST: Tensor | None = None) -> Tensor:
        """Attends; mask_ST is True where a position may be seen (None: everywhere)."""
        queries, keys, values = self.qkv_proj(hidden_STD).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask_S11T = None if mask_ST is None else mask_ST[:, None, None]
        read_SHTd = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_S11T)
        return self.o_proj(read_SHTd.transpose(1, 2).flatten(2))


def time_positions(num_frames: int, size: int) -> Tensor:
    """Sinusoids of the number of each frame, position_FD, for clips of any length (Vaswani et al. 2017, arXiv 1706.03762, 3.5).

    The first half of the width holds the sines, the second the cosines.
    """
    half = (size + 1) // 2
    rates_D = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles_FD = torch.arange(num_frames, dtype=torch.float32)[:, None] * rates_D
    return torch.cat([angles_FD.sin(), angles_FD.cos()], dim=1)[:, :size]


def _zero_linear(in_size: int, out_size: int) -> nn.Linear:
    linear = nn.Linear(in_size, out_size, dtype=torch.float32)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
