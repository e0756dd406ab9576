"""Answers that share a row, taken apart: for models that cannot let them share, and to try out which can.

Shape suffixes: B rows, T tokens, A answers, L tokens of a row of its own, O occurrences of media, D hidden size.
"""

import inspect
import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from datamodules.batch import MODALITIES, Batch, MediaBatch
from models.attention_blocks import NAME
from models.attention_mask import is_flash, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from models.language import LanguageModel

log = logging.getLogger(__name__)


class Apart(NamedTuple):
    """A batch in which each answer has a row of its own, and where its tokens come from.

    `row_BT` and `place_BT` tell, for each token of the batch that was taken apart, a row and a place in it where it stands now.
    """

    batch: Batch
    row_BT: Tensor
    place_BT: Tensor

    def join(self, hidden_ALD: Tensor) -> Tensor:
        """What was computed of the rows apart in the places of the batch: hidden_BTD."""
        return hidden_ALD[self.row_BT, self.place_BT]


def has_branches(batch: Batch) -> bool:
    """Whether answers share a prompt in a row of the batch, behind which they stand one by one."""
    if "branches_BT" not in batch:
        return False
    branches_BT, segments_BT = batch["branches_BT"], batch["segments_BT"]
    starts_BT = (branches_BT[:, 1:] != branches_BT[:, :-1]) & (segments_BT[:, 1:] == segments_BT[:, :-1])
    return bool((starts_BT & (branches_BT[:, :-1] > 0)).any())


def take_apart(batch: Batch) -> Apart:
    """Gives each answer of a batch a row of its own, behind a copy of the prompt and of the occurrences of its media.

    Media stay unique items, which are encoded once. Labels are left out.

    Args:
        batch: A batch with answers, padded on the right.
    """
    row_A, branch_A = batch["answers"]["row_A"], batch["answers"]["branch_A"]
    branches_BT, segments_BT = batch["branches_BT"], batch["segments_BT"]
    length = branches_BT.shape[1]
    own_AT = branches_BT[row_A]
    is_answer_AT = own_AT == branch_A[:, None]
    segment_A = (segments_BT[row_A] * is_answer_AT).amax(1)
    kept_AT = ((own_AT == 0) | is_answer_AT) & (segments_BT[row_A] == segment_A[:, None])
    place_AT = (kept_AT.cumsum(1) - 1).clamp(min=0)
    size_A = kept_AT.sum(1)
    from_AL = (~kept_AT).long().argsort(dim=1, stable=True)[:, : int(size_A.max())]
    is_real_AL = torch.arange(from_AL.shape[1], device=row_A.device) < size_A[:, None]

    def move(x_BT: Tensor) -> Tensor:
        return x_BT[row_A].gather(1, from_AL) * is_real_AL

    apart = dict(batch)
    for name in ("tokens_BT", "positions_BT", "segments_BT", "token_types_BT"):
        if name in batch:
            apart[name] = move(batch[name])
    for modality in MODALITIES:
        if modality in batch:
            apart[modality] = _move_media(batch[modality], row_A, kept_AT, place_AT)
    for name in ("labels_BT", "branches_BT", "answers"):
        del apart[name]
    # the tokens that all answers of a sample share are computed for each, and read from the first
    first_BS = torch.full((len(branches_BT), int(segments_BT.max()) + 1), length, device=row_A.device)
    first_BS.scatter_reduce_(1, segments_BT, branches_BT.where(branches_BT > 0, length), "amin")
    reads_BT = branches_BT.where(branches_BT > 0, first_BS.gather(1, segments_BT)).where(segments_BT > 0, 1)
    rows_B1 = torch.arange(len(branches_BT), device=row_A.device)[:, None]
    row_BT = torch.searchsorted(row_A * (length + 1) + branch_A, rows_B1 * (length + 1) + reads_BT)
    return Apart(apart, row_BT, place_AT[row_BT, torch.arange(length, device=row_A.device)])  # type: ignore[arg-type]


def _move_media(media: MediaBatch, row_A: Tensor, kept_AT: Tensor, place_AT: Tensor) -> MediaBatch:
    position_O = media["position_O"]
    stands_AO = (row_A[:, None] == media["row_O"]) & kept_AT[:, position_O]
    row_O, old_O = stands_AO.nonzero(as_tuple=True)
    moved: MediaBatch = {
        **media,
        "item_O": media["item_O"][old_O],
        "row_O": row_O,
        "num_tokens_O": media["num_tokens_O"][old_O],
        "position_O": place_AT[row_O, position_O[old_O]],
    }
    return moved


@torch.no_grad()
def can_branch(language_model: "LanguageModel") -> bool:
    """Whether the answers of a row may share their prompt in a language model: it gives each what it gives it alone.

    That is so where each layer is attention with a mask that can be given. A state that is carried along, a convolution, or
    positions that are counted and not given would mix the branches: a trial with a few tokens shows it.
    """
    model = language_model.model
    config = model.config.get_text_config()
    if config._attn_implementation not in (NAME, "sdpa", "eager") or not _attends(model):
        return False
    if config._attn_implementation != NAME:
        log.warning(
            "%s attends by %s: samples that share a row are kept apart by a mask of the whole row, which costs the square of its "
            "length, and not of theirs",
            language_model.name_or_path,
            config._attn_implementation,
        )
    weight = next(model.get_input_embeddings().parameters())
    if weight.is_meta:
        return True
    branches_BT = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4], device=weight.device)
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]], device=weight.device)
    embeddings_BTD = language_model.embed((1 + torch.arange(12, device=weight.device)[None]) % weight.shape[0])
    was_training = model.training
    model.eval()
    together_BTD = language_model(embeddings_BTD, torch.ones_like(branches_BT), positions_BT, branches_BT).float()
    error = 0.0
    for branch in (1, 2):
        own_T = ((branches_BT == 0) | (branches_BT == branch))[0]
        segments_BT, own_positions_BT = torch.ones_like(branches_BT[:, own_T]), positions_BT[:, own_T]
        alone_BTD = language_model(embeddings_BTD[:, own_T], segments_BT, own_positions_BT).float()
        difference = (together_BTD[:, own_T] - alone_BTD).abs().max() / alone_BTD.abs().max().clamp_min(1e-6)
        error = max(error, float(difference))
    model.train(was_training)
    return error <= (1e-4 if embeddings_BTD.dtype == torch.float32 else 5e-2)


def can_pack(language_model: "LanguageModel") -> bool:
    """Whether samples may share a row in a language model: it gives each what it gives it alone.

    That is so where answers may share their prompt, and with flash attention, which can be tried only where it runs.
    """
    model = language_model.model
    is_tried = not is_flash(model.config.get_text_config()._attn_implementation)
    return language_model.takes_branches if is_tried else _attends(model)


def why_no_packs(language_model: "LanguageModel") -> str:
    """What to say of samples that share a row in a language model that cannot keep them apart."""
    reason = (
        "not all of its layers are causal attention to given positions, or it reads media itself and attends by flash attention"
    )
    choice = "set data.batching.kind to padded or rows"
    if language_model.quantize == "int8":
        reason = "in the int8 of LLM.int8() what comes of a token depends on the others of its batch"
        choice += ", or language_model.quantize to nf4"
    return f"{language_model.name_or_path} cannot keep the samples of a packed row apart ({reason}): {choice}"


def _attends(model: "PreTrainedModel") -> bool:
    """Whether nothing but attention and given positions connects the tokens of a row, as far as a model tells."""
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return windows_of(model.config.get_text_config()) is not None and not model._is_stateful and takes_positions
