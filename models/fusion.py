"""How features of media enter the language model.

Shape suffixes: B rows, T positions, D hidden size, O occurrences of media, M embeddings of an item, P placeholders.
"""

import torch
from torch import Tensor


def concatenate(
    embeddings_BTD: Tensor,
    placeholder_BT: Tensor,
    media_OMD: Tensor,
    mask_OM: Tensor | None,
    row_O: Tensor,
    num_tokens_O: Tensor,
) -> Tensor:
    """Writes the embeddings of media into their placeholders, in reading order (LLaVA, Liu et al. 2023, arXiv 2304.08485).

    Args:
        embeddings_BTD: Embedded tokens.
        placeholder_BT: True at the placeholders of this modality.
        media_OMD: Projected media, one entry an occurrence, in the order of the placeholders.
        mask_OM: Which of them are real; None: all.
        row_O: The row of each occurrence, ascending.
        num_tokens_O: How many placeholders each occurrence has.

    Raises:
        ValueError: An occurrence has another number of placeholders than of embeddings.
    """
    if mask_OM is None:
        mask_OM = torch.ones(media_OMD.shape[:2], dtype=torch.bool, device=media_OMD.device)
    _check_counts(placeholder_BT.sum(1), mask_OM.sum(1), row_O, num_tokens_O)
    media_PD = media_OMD[mask_OM].to(embeddings_BTD.dtype)
    rows_P, positions_P = placeholder_BT.nonzero(as_tuple=True)
    return embeddings_BTD.index_put((rows_P, positions_P), media_PD)


def _check_counts(placeholders_B: Tensor, embeddings_O: Tensor, row_O: Tensor, num_tokens_O: Tensor) -> None:
    expected_B = torch.zeros_like(placeholders_B).index_add_(0, row_O, num_tokens_O)
    if not torch.equal(expected_B, placeholders_B):
        row = int((expected_B != placeholders_B).nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has {int(placeholders_B[row])} media placeholders, but its media take "
            f"{int(expected_B[row])}: its tokens were cut or changed after they were expanded"
        )
    if not torch.equal(embeddings_O, num_tokens_O):
        occurrence = int((embeddings_O != num_tokens_O).nonzero()[0])
        raise ValueError(
            f"row {int(row_O[occurrence])} of the batch has {int(num_tokens_O[occurrence])} placeholders for a medium that gives "
            f"{int(embeddings_O[occurrence])} embeddings: num_tokens of the encoder or of the projector is not what its forward "
            "gives"
        )
