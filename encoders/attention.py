"""Attention to a memory and the feed-forward layer after it: what Flamingo (Alayrac et al. 2022, arXiv 2204.14198) is made of.

Both normalise what they read, leave the residual to who calls them, and have linear layers without bias. Their weights are
float32.

Shape suffixes: B items, T queries, K keys, H heads, D width, E width of the memory.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a memory, both (B, H, K, width of a head)."""


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory.

    Args:
        size: Width D of the queries and of the result.
        memory_size: Width E of the memory.
        num_heads: Number of heads.
        head_dim: Width of a head.
    """

    def __init__(self, size: int, memory_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.norm = nn.LayerNorm(size, dtype=torch.float32)
        self.memory_norm = nn.LayerNorm(memory_size, dtype=torch.float32)
        self.q_proj = nn.Linear(size, inner, bias=False, dtype=torch.float32)
        self.k_proj = nn.Linear(memory_size, inner, bias=False, dtype=torch.float32)
        self.v_proj = nn.Linear(memory_size, inner, bias=False, dtype=torch.float32)
        self.o_proj = nn.Linear(inner, size, bias=False, dtype=torch.float32)

    def keys_values(self, memory_BKE: Tensor) -> KeysValues:
        """What `forward` needs of a memory; it can serve many queries."""
        memory_BKE = self.memory_norm(memory_BKE)
        return self._split(self.k_proj(memory_BKE)), self._split(self.v_proj(memory_BKE))

    def forward(self, hidden_BTD: Tensor, keys_values: KeysValues, mask_BTK: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            hidden_BTD: The queries, as they are before the norm.
            keys_values: Of the memory.
            mask_BTK: True where a query sees a key; it must see one. None: everywhere.
        """
        queries_BHTd = self._split(self.q_proj(self.norm(hidden_BTD)))
        mask_B1TK = None if mask_BTK is None else mask_BTK[:, None]
        read_BHTd = F.scaled_dot_product_attention(queries_BHTd, *keys_values, attn_mask=mask_B1TK)
        return self.o_proj(read_BHTd.transpose(1, 2).flatten(2))

    def _split(self, x_BTI: Tensor) -> Tensor:
        return x_BTI.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Norm, a layer of four times the width, squared ReLU (So et al. 2021, arXiv 2109.08668), and back.

    Args:
        size: Width D.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, dtype=torch.float32)
        self.up_proj = nn.Linear(size, 4 * size, bias=False, dtype=torch.float32)
        self.down_proj = nn.Linear(4 * size, size, bias=False, dtype=torch.float32)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """The change of each position."""
        return self.down_proj(F.relu(self.up_proj(self.norm(hidden_BTD))).square())
