"""What an evaluation measures of the answers, row by row.

Shape suffixes: B rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.batch import Modality
from lightning_modules.epoch_means import RowValues
from lightning_modules.losses import AnswerScores


def answer_values(scores: AnswerScores) -> dict[str, RowValues]:
    """Of the right answers.

    Returns:
        `loss`, of a supervised token (nats); `exact_match`, the share of rows whose answer greedy decoding gives; `accuracy`,
        the share of rows with choices for which it does among these.
    """
    return {
        "loss": (scores.nll_B, scores.count_B),
        "exact_match": (scores.exact_B, torch.ones_like(scores.count_B)),
        "accuracy": (scores.choice_B, scores.closed_B),  # choice_B is False where nothing is closed
    }


def media_gains(scores: AnswerScores, shuffled: AnswerScores, moved: Mapping[Modality, Tensor]) -> dict[str, RowValues]:
    """By how much the loss of a supervised token grows (nats) when a row is shown the media of another: does the model look?

    Args:
        scores: Of the answers, with the right media.
        shuffled: With those of another row.
        moved: By modality moved_B, whether the row has other media of it.

    Returns:
        `media_gain`, over the rows that have other media; and where there are several modalities `media_gain_<modality>`, over
        the rows that have other media of this one alone.
    """
    gain_B = shuffled.nll_B - scores.nll_B

    def of_rows(is_counted_B: Tensor) -> RowValues:
        return torch.where(is_counted_B, gain_B, 0), torch.where(is_counted_B, scores.count_B, 0)

    num_moved_B = torch.stack(list(moved.values())).sum(0)
    alone = {modality: moved_B & (num_moved_B == 1) for modality, moved_B in moved.items()}
    by_modality = {f"media_gain_{modality}": of_rows(alone_B) for modality, alone_B in alone.items()}
    return {"media_gain": of_rows(num_moved_B > 0), **(by_modality if len(moved) > 1 else {})}
