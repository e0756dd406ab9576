"""Reward criteria that need the policy's reference, and what is logged of all criteria.

Shape suffixes: A answers, P pairs, O occurrences of media, S supervised positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from datamodules.batch import MODALITIES, Batch, MediaBatch
from datamodules.criteria import CriteriaUse, Criterion, Scores, Terms, difference, pair_margin, pair_weight, terms_of
from lightning_modules.comparison import ScoredAnswers
from lightning_modules.logprobs import AnswerLogps
from lightning_modules.pair_logps import Metrics, each
from models.multimodal import EncodedMedia


class MultimodalConsistencyScorer:
    """How much an answer depends on its media: by how much likelier they make it under the reference.

    g = mean over its tokens of (log p(token | media) - log p(token | blank media)), in nats; the score is
    sigmoid((g - center) / scale). 0.5 is an answer that the media make no likelier, 0.73 one that they make `scale` nats a token
    likelier, below 0.5 is one that they speak against. It says nothing about answers without media. Blank media are zeros in the
    place of what a frozen encoder makes of them, or of what another encoder gets, and not the media of another row: so a score
    does not depend on the batch.

    It measures dependence, not truth: an answer that the picture calls up, and that is false, has a high score. The idea is that
    of contrastive decoding (VCD, Leng et al. 2023, arXiv 2311.16922).

    Args:
        center: The gain a token, in nats, whose score is 0.5.
        scale: How many nats more make it 0.73.
    """

    name: ClassVar[str] = "multimodal_consistency"

    def __init__(self, center: float = 0.0, scale: float = 0.5) -> None:
        if scale <= 0:
            raise ValueError(f"MultimodalConsistencyScorer.scale is a number of nats, above 0, got {scale}")
        self.center = center
        self.scale = scale

    def __call__(self, right: AnswerLogps, blank: AnswerLogps, has_media_A: Tensor) -> Tensor:
        """The score of each answer, score_A; NaN: none.

        Args:
            right: Log-probabilities of the answers behind their media.
            blank: The same behind blank media.
            has_media_A: Which answers have media.
        """
        score_A = torch.sigmoid((right.means() - blank.means() - self.center) / self.scale)
        return torch.where(has_media_A, score_A, math.nan)


@dataclass(frozen=True)
class ReferenceCriterion(Criterion):
    """A scorer that needs the reference, and how much it counts.

    Args:
        scorer: Scores the answers.
    """

    scorer: MultimodalConsistencyScorer


def reference_terms(criteria: Sequence[ReferenceCriterion], use: CriteriaUse, takes_margin: bool, has_pairs: bool) -> Terms:
    """The criteria of a model by their names.

    Raises:
        ValueError: They cannot be used so.
    """
    terms = terms_of([(each.label, each.term) for each in criteria], "model.reward_criteria")
    if use.mode in ("filter", "relabel", "build"):
        raise ValueError(
            f"model.criteria_use.mode is {use.mode}, but a model gets its pairs as they are: take monitor, weight or margin; "
            "filter, relabel and build are modes of data.criteria_use"
        )
    if use.mode != "monitor" and not (terms and has_pairs):
        missing = "model.reward_criteria has none" if not terms else "this objective takes each answer for itself"
        raise ValueError(f"model.criteria_use.mode is {use.mode}, but {missing}: take monitor")
    if use.mode == "margin" and not takes_margin:
        raise ValueError("model.criteria_use.mode is margin, but the loss reads no margin: set model.margin_weight above 0")
    return terms


def judged(scored: ScoredAnswers, scores_A: Mapping[str, Tensor], terms: Terms, use: CriteriaUse) -> ScoredAnswers:
    """Answers with scores of their own beside those that they have, and the weights or margins that follow for their pairs.

    Args:
        scored: The answers.
        scores_A: Scores of each answer by the name of the criterion; NaN: none.
        terms: The criteria.
        use: What is done with their scores; a weight multiplies the one that a pair has.
    """
    scored = replace(scored, scores_A={**scored.scores_A, **scores_A})
    if use.mode not in ("weight", "margin"):
        return scored
    table = {name: column.tolist() for name, column in scores_A.items()}

    def of(answer: int) -> Scores:
        return {name: None if math.isnan(column[answer]) else column[answer] for name, column in table.items()}

    gains = [difference(of(chosen), of(rejected), terms) for chosen, rejected in scored.pairs_P2.tolist()]
    if use.mode == "weight":
        factor_P = scored.weight_P.new_tensor([pair_weight(gain, use.temperature) for gain in gains])
        return replace(scored, weight_P=scored.weight_P * factor_P)
    margins = [pair_margin(gain) for gain in gains]
    own_P = scored.margin_P.new_tensor([math.nan if margin is None else margin for margin in margins])
    return replace(scored, margin_P=torch.where(own_P.isnan(), scored.margin_P, own_P))


@torch.no_grad()
def criteria_metrics(scored: ScoredAnswers) -> list[tuple[Metrics, Tensor]]:
    """What reward criteria say of the answers of a batch.

    Returns:
        `criteria/<name>/chosen` and `criteria/<name>/rejected` (of feedback: of desirable and undesirable answers), and
        `criteria/<name>/agreement`, the share of pairs in which the chosen answer scores higher (a tie is half of one), over
        what the criterion scores.
    """
    found: list[tuple[Metrics, Tensor]] = []
    chosen, rejected = scored.pairs_P2.unbind(1)
    for name, score_A in scored.scores_A.items():
        for side, is_own_A in (
            ("chosen", scored.are("chosen", "desirable")),
            ("rejected", scored.are("rejected", "undesirable")),
        ):
            answer_X = (is_own_A & ~score_A.isnan()).nonzero()[:, 0]
            found.append(({f"criteria/{name}/{side}": each(score_A[answer_X])}, answer_X))
        gain_P = score_A[chosen] - score_A[rejected]
        is_scored_P = ~gain_P.isnan()
        agreement_X = (gain_P[is_scored_P].sign() + 1) / 2
        found.append(({f"criteria/{name}/agreement": each(agreement_X)}, chosen[is_scored_P]))
    return found


def has_media(batch: Batch) -> Tensor:
    """Which answers of a batch have media, in their own sample: has_media_A."""
    answers, segments_BT = batch["answers"], batch["segments_BT"]
    row_A, length = answers["row_A"], segments_BT.shape[1]
    # the sample of an answer is that of its first token
    first_A = (batch["branches_BT"][row_A] == answers["branch_A"].unsqueeze(1)).int().argmax(1)
    sample_A = row_A * (length + 1) + segments_BT[row_A, first_A]
    has_A = torch.zeros_like(row_A, dtype=torch.bool)
    for media in (batch[modality] for modality in MODALITIES if modality in batch):
        row_O, position_O = media["row_O"], media["position_O"].clamp(max=length - 1)
        has_A |= torch.isin(sample_A, row_O * (length + 1) + segments_BT[row_O, position_O])
    return has_A


def blank_media(batch: Batch, features: EncodedMedia) -> tuple[Batch, EncodedMedia]:
    """The batch with zeros in the place of all that is seen and heard, in the same shapes.

    Args:
        batch: A batch with answers.
        features: What frozen encoders make of its media, see `MultiModalModel.features`; they read nothing of the blank batch.

    Returns:
        The batch, and its features.
    """
    blank = dict(batch)
    for modality in MODALITIES:
        if modality in batch:
            blank[modality] = _blank(batch[modality])
    keys = [f"{key}~blank" for key in batch["answers"]["keys"]]
    blank["answers"] = {**batch["answers"], "keys": keys}
    zeros: EncodedMedia = {
        modality: (torch.zeros_like(features_NLD), mask_NL) for modality, (features_NLD, mask_NL) in features.items()
    }
    return blank, zeros  # type: ignore[return-value]


def _blank(media: MediaBatch) -> MediaBatch:
    blank: MediaBatch = {**media, "media": torch.zeros_like(media["media"])}
    if "inputs" in media:
        blank["inputs"] = {
            items: {name: torch.zeros_like(x) if x.is_floating_point() else x for name, x in inputs.items()}
            for items, inputs in media["inputs"].items()
        }
    return blank
