"""Which tokens see which in a row that holds several samples or several answers, as transformers takes it.

Shape suffixes: B rows, T tokens that look, U tokens that are looked at (as many), 1 for all heads.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.attention_blocks import NAME, blocks_of, lengths_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Windows = Mapping[str, int | None]
"""For each kind of layer how far it looks back, in tokens, itself included; None: to the beginning."""

_KINDS = {"full_attention", "sliding_attention"}


def visible(segments_BT: Tensor, branches_BT: Tensor | None, positions_BT: Tensor, window: int | None = None) -> Tensor:
    """Which tokens see which: sees_BTU, boolean.

    A token sees itself and those before it in its segment that have branch 0 or its own, less than `window` positions away.
    Padding sees itself alone, so that a softmax over what is seen is defined everywhere.

    Args:
        segments_BT: The sample that a token belongs to, from 1; 0 is padding.
        branches_BT: The answer that a token belongs to, from 1; 0: all of the sample. None: there are no answers.
        positions_BT: Position of a token in its sample, along its branch.
        window: How far a token looks back.
    """
    length = segments_BT.shape[1]
    before_TU = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    sees_BTU = before_TU & (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, None, :] > 0)
    if branches_BT is not None:
        sees_BTU &= (branches_BT[:, None, :] == 0) | (branches_BT[:, :, None] == branches_BT[:, None, :])
    if window is not None:
        sees_BTU &= positions_BT[:, :, None] - positions_BT[:, None, :] < window
    return sees_BTU | torch.eye(length, dtype=torch.bool, device=segments_BT.device)


def attention_mask(
    segments_BT: Tensor,
    branches_BT: Tensor | None,
    positions_BT: Tensor,
    windows: Windows,
    dtype: torch.dtype | None = None,
) -> Tensor | dict[str, Tensor]:
    """The mask that a model of transformers takes in place of its own: mask_B1TU, or one for each kind of its layers.

    Args:
        segments_BT: See `visible`.
        branches_BT: See `visible`.
        positions_BT: See `visible`.
        windows: Those of the model, as `windows_of` gives them.
        dtype: Numbers to be added to the scores, for eager attention; None: true where a token is seen, for sdpa.
    """
    masks: dict[str, Tensor] = {}
    for kind, window in windows.items():
        sees_B1TU = visible(segments_BT, branches_BT, positions_BT, window)[:, None]
        if dtype is not None:
            sees_B1TU = torch.zeros_like(sees_B1TU, dtype=dtype).masked_fill(~sees_B1TU, torch.finfo(dtype).min)
        masks[kind] = sees_B1TU
    return masks if len(masks) > 1 else next(iter(masks.values()))


def windows_of(config: "PretrainedConfig") -> Windows | None:
    """How far the layers of a language model look back; None: some of them do something else than attend.

    Args:
        config: That of the language model.
    """
    options = config.to_dict()
    window = options.get("sliding_window") if options.get("use_sliding_window", True) else None
    kinds = options.get("layer_types")
    if kinds is None:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds} if set(kinds) <= _KINDS else None


def attention_inputs(
    config: "PretrainedConfig", segments_BT: Tensor, branches_BT: Tensor | None, positions_BT: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """What the model of a configuration takes of who sees whom, by the names of its arguments, in the simplest form.

    Args:
        config: Its configuration.
        segments_BT: See `visible`.
        branches_BT: See `visible`. For flash attention no sample has more than one.
        positions_BT: See `visible`.
        dtype: Type of its hidden states.
    """
    lowest, highest = segments_BT.aminmax()
    if highest <= 1 and (branches_BT is None or branches_BT.max() <= 1):
        return {"attention_mask": None if lowest > 0 else segments_BT}
    text_config = config.get_text_config()
    windows = windows_of(text_config)
    assert windows is not None, "samples that share a row would see each other"
    kind = text_config._attn_implementation
    if is_flash(kind):
        return {"attention_mask": None, **lengths_of(segments_BT)}
    if kind == NAME:
        blocks = {kind: blocks_of(segments_BT, branches_BT, window) for kind, window in windows.items()}
        return {"attention_mask": blocks if len(blocks) > 1 else next(iter(blocks.values()))}
    return {"attention_mask": attention_mask(segments_BT, branches_BT, positions_BT, windows, dtype if kind == "eager" else None)}


def is_flash(attn_implementation: str) -> bool:
    """Whether an attention of transformers is one of the flash attentions, which take lengths in the place of a mask."""
    return "flash" in attn_implementation
