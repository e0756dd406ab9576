"""What the data side hands to the model side: one `Batch`, written down once.

Shape suffixes: B rows, T tokens, N unique media items, O occurrences of media in the rows, S supervised positions,
K choices, A answers, P pairs, M pairs of media.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.modality import MODALITIES as MODALITIES
from datamodules.modality import Modality as Modality

IGNORE_INDEX = -100
"""Label of a position without loss (the convention of torch and Hugging Face)."""


@dataclass(frozen=True)
class Origin:
    """Where a row stands: file, line counted from 1, and the name of its source in a mixture (empty: none)."""

    file: str
    line: int
    source: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class RowError(ValueError):
    """A row that cannot be used. Its text starts with file and line, then gives the reason.

    Args:
        origin: Where the row stands.
        reason: What was got, what was expected, what to do.
    """

    def __init__(self, origin: Origin, reason: str) -> None:
        super().__init__(origin, reason)  # both in args, so that it can be pickled from a worker
        self.origin = origin
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class FilteredRowError(RowError):
    """A row that is left out because reward criteria say so: it is named like others, and is no fault of the data."""


class RowChange:
    """What reward criteria changed in a row.

    Args:
        origin: Where the row stands.
        reason: What was changed, and why.
    """

    def __init__(self, origin: Origin, reason: str) -> None:
        self.origin = origin
        self.reason = reason


class FeatureKey(NamedTuple):
    """Under which key a cache keeps the features of a medium, and how many its encoder makes of it in the end."""

    key: str
    num_features: int


@dataclass
class MediaItem:
    """One transformed medium of a row.

    Args:
        key: The same for two items with the same content, so that a batch encodes it once.
        media: What the encoder's transform gave; where `has_features`, the features themselves, (L, D), read from a cache.
        num_tokens: Placeholders it occupies in the row's tokens; 0 where the fusion keeps media out of the row.
        position: Where it stands in the row's tokens: the index of its first placeholder, or else of the token after it.
        has_features: Whether a frozen encoder has nothing to do for it any more.
        feature_key: Under which a cache keeps the features once they are there; None: not at all.
    """

    key: str
    media: Tensor
    num_tokens: int
    position: int
    has_features: bool = False
    feature_key: FeatureKey | None = None


@dataclass
class Example:
    """One row, ready for a batch.

    Args:
        origin: Where the row stands.
        id: The row's own id, or its line number.
        tokens: Token ids, media placeholders expanded; for generation they end where the answer begins.
        labels: Like tokens, `IGNORE_INDEX` where there is no loss; for generation that is everywhere.
        media: Items by modality, in reading order.
        choices: For each supervised position the token ids that some choice continues with; None: an open answer.
        prompt: The last user message as text, for tables and predictions.
        reference: The last answer as text; empty if the row has none.
        num_dropped_tokens: Tokens that `max_length` cut off.
        inputs: What a ready model reads of the row's media, by modality and name of its argument; its items then hold nothing.
        token_types: For a ready model the kind of each token: 0 text, 1 image, 2 video, 3 audio.
        positions: Position of each token; None: 0, 1, 2, …
        branches: The answer that each token belongs to, see `Batch`; None: the row has one sequence.
        slot: Examples with the same number share a row of the batch; None: it has one of its own.
    """

    origin: Origin
    id: str
    tokens: list[int]
    labels: list[int]
    media: dict[str, list[MediaItem]] = field(default_factory=dict)
    choices: list[list[int]] | None = None
    prompt: str = ""
    reference: str = ""
    num_dropped_tokens: int = 0
    inputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_types: list[int] | None = None
    positions: list[int] | None = None
    branches: list[int] | None = None
    slot: int | None = None


class CachedFeatures(TypedDict):
    """What a cache has, and is to get, of the features of a frozen encoder.

    `features_CLD` are those of the C items that it has, padded where `mask_CL` is False (None: nowhere), and `items` the numbers
    of these items, ascending. `keys` tells of each other item, in order, under which key its features are to be kept; None: not
    at all.
    """

    features_CLD: Tensor
    mask_CL: Tensor | None
    items: list[int]
    keys: list[FeatureKey | None]


class MediaBatch(TypedDict):
    """The media of one modality in a batch; each unique item is stacked, and encoded, once.

    `media` is (N, ...); `mask`, (N, T), marks what is real along its first dimension after N (None: all); `item_O` gives the
    unique item of each occurrence, in reading order (row by row); `row_O` its row; `num_tokens_O` its placeholders;
    `position_O` its place in the padded row: the index of its first placeholder, or else of the token after it.

    Where a cache of features is in use, `cached` is there, and `media` and `mask` hold only those of the N items that are to
    be encoded, in their order; a batch without such an item has an empty `media`.

    For a ready model `media` is empty. `inputs` has what it reads of the media of a sample, by the name of its argument, under
    the numbers of the sample's items in order.
    """

    media: Tensor
    mask: Tensor | None
    item_O: Tensor
    row_O: Tensor
    num_tokens_O: Tensor
    position_O: Tensor
    cached: NotRequired[CachedFeatures]
    inputs: NotRequired[dict[tuple[int, ...], dict[str, Tensor]]]


AnswerRole = Literal["chosen", "rejected", "corrupted", "mismatched", "desirable", "undesirable"]
"""`corrupted` is the chosen answer behind corrupted media, `mismatched` the answer of another row."""


class Answers(TypedDict):
    """The answers that an objective compares, in the order of (row, branch).

    `row_A` and `branch_A` tell where each stands, `roles` what it is, and `keys` has the same text for the same answer behind
    the same prompt and media, in any run. `pairs_P2` holds the numbers of a chosen and of a rejected answer, with the
    `margin_P` that the row gives (else 0) and a `weight_P` of 1; of several rejected answers of a row each makes a pair with the
    chosen one, and one that is the chosen answer again makes a pair of that with itself. `media_pairs_M2` holds those of a chosen
    answer and of its corrupted one. `continues_B` tells which rows of the batch belong to the same row of the data as the one
    before; where rows are packed, which of their samples do. `example_A` is the entry of `examples` that an answer belongs to.

    Where reward criteria judge the answers, `scores_A` has by the name of each its score of each answer (NaN: none), and
    `changes` what they changed in the rows.
    """

    row_A: Tensor
    branch_A: Tensor
    roles: list[AnswerRole]
    keys: list[str]
    pairs_P2: Tensor
    margin_P: Tensor
    weight_P: Tensor
    media_pairs_M2: Tensor
    continues_B: list[bool]
    example_A: list[int]
    scores_A: NotRequired[dict[str, Tensor]]
    changes: NotRequired[list[RowChange]]


class Batch(TypedDict):
    """A batch. A modality that no row has is absent.

    `segments_BT` numbers the samples packed into a row from 1; 0 is padding. `positions_BT` starts anew in each segment.
    `choices_SK` holds, for each supervised position in row-major order, the ids among which a closed-set answer is
    chosen, padded with -1; a row of -1 means that the answer is open. `num_tokens` counts the tokens that are not padding,
    `num_supervised` the labels with a loss that have a token before them in their row: plain numbers, for which no one
    has to wait for a device. `token_types_BT`, for a ready model, tells text (0) from image (1), video (2) and audio (3).
    `step_counts` is what the terms of the loss count in all batches of the optimizer step, where that is known before it begins
    (`step_counts.count_ahead`).

    Where an objective compares answers, `answers` tells of them, and `branches_BT` has 0 for the tokens of a prompt that answers
    share (and for padding), else the number of the answer in its row, from 1. A token sees those before it in its segment that
    have branch 0 or its own. A branch begins with a copy of the last token of its prompt, without a label, so that the token
    before a label is always the one that predicts it; positions go on from the prompt in each branch.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor
    choices_SK: Tensor
    examples: list[dict[str, Any]]
    skipped: list[RowError]
    num_tokens: int
    num_supervised: int
    num_dropped_tokens: int
    image: NotRequired[MediaBatch]
    video: NotRequired[MediaBatch]
    audio: NotRequired[MediaBatch]
    token_types_BT: NotRequired[Tensor]
    branches_BT: NotRequired[Tensor]
    answers: NotRequired[Answers]
    step_counts: NotRequired[Tensor]


def answers_of_positions(batch: Batch) -> Tensor:
    """The number of the answer that each supervised position belongs to: answer_S, in the order of `losses.supervised`.

    Args:
        batch: A batch with answers.
    """
    answers, branches_BT = batch["answers"], batch["branches_BT"]
    row_S, before_S = (batch["labels_BT"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    num_places = branches_BT.shape[1] + 1  # more than there are branches
    place_A = answers["row_A"] * num_places + answers["branch_A"]
    return torch.searchsorted(place_A, row_S * num_places + branches_BT[row_S, before_S + 1])


def pad_time(items: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks tensors that differ in their first dimension only; padding is 0.

    Returns:
        The stack (N, T, ...), and mask_NT, True where it is real; None where all have one length.
    """
    lengths = [len(item) for item in items]
    if len(set(lengths)) == 1:
        return torch.stack(list(items)), None
    mask_NT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pad_sequence(list(items), batch_first=True), mask_NT.to(items[0].device)
