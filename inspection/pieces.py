"""A row of a batch as it is read: stretches of text, special tokens and media, each supervised or not, in its branch.

Shape suffixes: B rows, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from datamodules.batch import IGNORE_INDEX, MODALITIES, Batch, Modality

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other and are alike.

    Args:
        kind: `text`, a `special` token, or a `medium`.
        text: As it reads; of a medium its modality.
        num_tokens: How many they are.
        supervised: Whether there is a loss on them.
    """

    kind: Literal["text", "special", "medium"]
    text: str
    num_tokens: int
    supervised: bool


@dataclass(frozen=True)
class Stretch:
    """The tokens of a prompt, or of an answer that is a branch of it.

    Args:
        role: What the answer is; empty: what all answers share, or a row without branches.
        pieces: In order.
    """

    role: str
    pieces: tuple[Piece, ...]

    @property
    def num_tokens(self) -> int:
        """Its tokens."""
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_supervised(self) -> int:
        """Those with a loss."""
        return sum(piece.num_tokens for piece in self.pieces if piece.supervised)


def stretches(batch: Batch, row: int, tokenizer: "PreTrainedTokenizerFast", media_ids: Mapping[Modality, int]) -> list[Stretch]:
    """What a row of a batch holds, padding left out.

    Args:
        batch: The batch.
        row: The number of the row.
        tokenizer: Writes the tokens.
        media_ids: Id of the placeholder of each modality.
    """
    is_real_T = batch["segments_BT"][row] > 0
    tokens, labels = (batch[name][row][is_real_T].tolist() for name in ("tokens_BT", "labels_BT"))
    branches = batch["branches_BT"][row][is_real_T].tolist() if "branches_BT" in batch else [0] * len(tokens)
    roles = {0: ""}
    if "answers" in batch:
        answers = batch["answers"]
        standing = zip(answers["row_A"].tolist(), answers["branch_A"].tolist(), answers["roles"], strict=True)
        roles |= {branch: role for at, branch, role in standing if at == row}
    media = _media_places(batch, row, [place for place, is_real in enumerate(is_real_T.tolist()) if is_real], media_ids)
    is_supervised = [label != IGNORE_INDEX for label in labels]
    found = []
    for branch, places in groupby(range(len(tokens)), key=lambda place: branches[place]):
        found.append(Stretch(roles[branch], tuple(_pieces([*places], tokens, is_supervised, media, tokenizer))))
    return found


def _media_places(batch: Batch, row: int, real: list[int], media_ids: Mapping[Modality, int]) -> dict[int, tuple[Modality, int]]:
    """By the first of its tokens, counted without padding: what a medium is, and how many tokens it takes."""
    index = {place: number for number, place in enumerate(real)}
    found: dict[int, tuple[Modality, int]] = {}
    for modality in MODALITIES:
        if modality not in batch:
            continue
        media = batch[modality]
        for at, position, num_tokens in zip(
            media["row_O"].tolist(), media["position_O"].tolist(), media["num_tokens_O"].tolist(), strict=True
        ):
            if at == row and num_tokens:
                assert int(batch["tokens_BT"][row, position]) == media_ids[modality], "a medium stands at its placeholders"
                found[index[position]] = modality, num_tokens
    return found


def _pieces(
    places: list[int],
    tokens: list[int],
    is_supervised: list[bool],
    media: Mapping[int, tuple[Modality, int]],
    tokenizer: "PreTrainedTokenizerFast",
) -> list[Piece]:
    special = set(tokenizer.added_tokens_decoder)
    pieces: list[Piece] = []
    text: list[int] = []

    def write(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    def close(supervised: bool) -> None:
        if text:
            pieces.append(Piece("text", write(text), len(text), supervised))
            text.clear()

    place = places[0]
    while place <= places[-1]:
        supervised = is_supervised[place]
        if place in media:
            close(is_supervised[place - 1])
            modality, num_tokens = media[place]
            pieces.append(Piece("medium", modality, num_tokens, False))
            place += num_tokens
            continue
        if text and supervised != is_supervised[place - 1]:
            close(is_supervised[place - 1])
        if tokens[place] in special:
            close(supervised)
            pieces.append(Piece("special", write([tokens[place]]), 1, supervised))
        else:
            text.append(tokens[place])
        place += 1
    close(is_supervised[place - 1])
    return pieces
