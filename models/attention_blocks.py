"""Attention of packed rows sample by sample: each costs the square of its own length, and no mask of the whole row is made.

Shape suffixes: B rows, T tokens, H heads, D size of a head, K blocks, L tokens of a block, U tokens that they look at.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_blocks"
"""What transformers calls the attention of this file: that of sdpa, which takes blocks, too, in the place of a mask."""


def blocks_of(segments_BT: Tensor, branches_BT: Tensor | None, window: int | None = None) -> Tensor:
    """Which tokens see which, as a short table, which lets each layer attend block by block: blocks_11K3, int64.

    A block is a stretch of tokens that see each other back to the first, such as a sample, its prompt, or one of the answers
    behind that. It has its length, the number of the block that its tokens see before their own (-1: none), and how far they
    look back (0: to the beginning). The blocks of all rows follow each other; padding is one of its own. The table has the form
    of a mask because models hand those on to their layers unchanged.

    Args:
        segments_BT: The sample that a token belongs to, from 1; 0 is padding.
        branches_BT: The answer that a token belongs to, from 1; 0: all of the sample, whose first tokens these are. None: there
            are no answers.
        window: How far a token looks back, in tokens, itself included.
    """
    rows_BT = torch.arange(len(segments_BT))[:, None].expand(segments_BT.shape)
    branches_BT = torch.zeros_like(segments_BT) if branches_BT is None else branches_BT
    names_N3 = torch.stack([rows_BT, segments_BT.cpu(), branches_BT.cpu()], dim=-1).flatten(0, 1)
    names_K3, length_K = torch.unique_consecutive(names_N3, dim=0, return_counts=True)
    _, sample_K = torch.unique_consecutive(names_K3[:, :2], dim=0, return_inverse=True)
    first_K, branch_K = torch.searchsorted(sample_K, sample_K), names_K3[:, 2]
    is_first_K = first_K == torch.arange(len(first_K))
    assert bool((is_first_K | (branch_K > branch_K.roll(1))).all()), "answers stand one by one behind what they share"
    shared_K = torch.where(~is_first_K & (branch_K[first_K] == 0), first_K, -1)
    return torch.stack([length_K, shared_K, torch.full_like(length_K, window or 0)], dim=-1)[None, None]


def attend_in_blocks(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,  # what else models give to an attention function of transformers
) -> tuple[Tensor, None]:
    """Attention as transformers' own by sdpa, but block by block where `mask` is what `blocks_of` gives: outputs_BTHD.

    Args:
        module: The layer.
        query_BHTD: Queries.
        key_BHTD: Keys, of fewer heads where these are shared.
        value_BHTD: Values.
        mask: Blocks, or a mask of sdpa.
        dropout: Probability with which weights are dropped.
        scaling: Factor on the scores.
        options: See `sdpa_attention_forward` of transformers.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is None or mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, mask, dropout, scaling, **options)
    blocks = mask[0, 0].tolist()
    lengths = [length for length, _, _ in blocks]
    # split, unlike slices, has a backward pass that writes each gradient once
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (query_BHTD, key_BHTD, value_BHTD))
    outputs: list[Tensor] = []
    for number, (_, shared, window) in enumerate(blocks):
        query_LHD, key_UHD, value_UHD = queries[number], keys[number], values[number]
        if shared >= 0:
            key_UHD, value_UHD = torch.cat([keys[shared], key_UHD]), torch.cat([values[shared], value_UHD])
        query_1HLD, key_1HUD, value_1HUD = (x.transpose(0, 1)[None] for x in (query_LHD, key_UHD, value_UHD))
        sees_11LU = _sees(len(query_LHD), len(key_UHD), window, query_LHD.device)
        output_1LHD, _ = sdpa_attention_forward(module, query_1HLD, key_1HUD, value_1HUD, sees_11LU, dropout, scaling)
        outputs.append(output_1LHD)
    return torch.cat(outputs, dim=1).view(*query_BHTD.transpose(1, 2).shape[:3], -1), None


def _sees(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor | None:
    """The mask of a block whose queries are the last of its keys; None: causal, as without a mask."""
    if num_queries == num_keys and not 0 < window < num_keys:
        return None
    offset = num_keys - num_queries
    sees_LU = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    return (sees_LU.triu(offset - window + 1) if window else sees_LU)[None, None]


def use_blocks(model: "PreTrainedModel") -> None:
    """Lets the decoder of a model attend in blocks, if it attends by sdpa and asks transformers for the function that does it.

    Args:
        model: A model of transformers with its weights.

    Raises:
        ValueError: It caps the scores of attention (Gemma 2, arXiv 2408.00118, section 2), which sdpa would leave out.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    decoder = model.get_decoder()
    if decoder.config._attn_implementation != "sdpa":
        return
    if decoder.config.to_dict().get("attn_logit_softcapping") is not None:
        raise ValueError(
            f"{type(model).__name__} caps the scores of attention (attn_logit_softcapping), which attn_implementation sdpa would "
            "leave out: set language_model.attn_implementation to eager"
        )
    if decoder._can_set_attn_implementation():
        AttentionInterface.register(NAME, attend_in_blocks)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        decoder.set_attn_implementation(NAME)


def lengths_of(segments_BT: Tensor) -> dict[str, Any]:
    """The samples of packed rows as flash attention takes them, which attends to each alone.

    Args:
        segments_BT: The sample that a token belongs to, from 1; 0 is padding, which is one of its own.
    """
    length_K = blocks_of(segments_BT, None)[0, 0, :, 0]
    ends_K = torch.nn.functional.pad(length_K.cumsum(0), (1, 0)).to(segments_BT.device, torch.int32)
    longest = int(length_K.max())
    return {"cu_seq_lens_q": ends_K, "cu_seq_lens_k": ends_K, "max_length_q": longest, "max_length_k": longest}
