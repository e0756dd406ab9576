"""A row of a batch as it is read: stretches of text, special tokens and media, each supervised or not, in its branch.

Shape suffixes: B rows, T tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

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


def visible(text: str) -> str:
    """A text of the data that is safe to show: control characters, which a terminal would obey, as their signs."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␡" if c == "\x7f" else c for c in text)


def stretches(batch: Batch, row: int, tokenizer: "PreTrainedTokenizerFast", placeholder_ids: Collection[int]) -> list[Stretch]:
    """What a row of a batch holds, padding left out.

    Args:
        batch: The batch.
        row: The number of the row.
        tokenizer: Writes the tokens.
        placeholder_ids: The ids in whose places media come.
    """
    is_real_T = batch["segments_BT"][row] > 0
    tokens, labels = (batch[name][row][is_real_T].tolist() for name in ("tokens_BT", "labels_BT"))
    branches = batch["branches_BT"][row][is_real_T].tolist() if "branches_BT" in batch else [0] * len(tokens)
    roles = {0: ""}
    if "answers" in batch:
        answers = batch["answers"]
        standing = zip(answers["row_A"].tolist(), answers["branch_A"].tolist(), answers["roles"], strict=True)
        roles |= {branch: role for at, branch, role in standing if at == row}
    media = _media_places(batch, row, [place for place, is_real in enumerate(is_real_T.tolist()) if is_real])
    keys = _keys(tokens, labels, media, set(tokenizer.added_tokens_decoder), placeholder_ids)
    found = []
    for branch, places in groupby(range(len(tokens)), key=lambda place: branches[place]):
        pieces: list[Piece] = []
        for key, group in groupby(places, key=lambda place: keys[place]):
            at = [*group]
            outside = [modality for modality, num_tokens in media.get(at[0], []) if num_tokens == 0]
            pieces += [Piece("medium", modality, 0, False) for modality in outside]
            text = key.modality or str(tokenizer.decode([tokens[place] for place in at], skip_special_tokens=False))
            pieces.append(Piece(key.kind, text, len(at), key.supervised))
        found.append(Stretch(roles[branch], tuple(pieces)))
    return found


class _Key(NamedTuple):
    """What the tokens of a piece have in common: `begun` is where the piece begins, as far as its kind does not say it."""

    kind: Literal["text", "special", "medium"]
    supervised: bool
    modality: str
    begun: int


def _keys(
    tokens: Sequence[int],
    labels: Sequence[int],
    media: Mapping[int, Sequence[tuple[Modality, int]]],
    special_ids: Collection[int],
    placeholder_ids: Collection[int],
) -> list[_Key]:
    """What each token is."""
    keys = []
    modality, begun, outside = "", 0, 0
    for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        supervised = label != IGNORE_INDEX
        for kind, num_tokens in media.get(place, []):
            modality, begun = (kind, place) if num_tokens else (modality, begun)
            outside = outside if num_tokens else place
        if token in placeholder_ids:
            keys.append(_Key("medium", supervised, modality, begun))
        elif token in special_ids:
            keys.append(_Key("special", supervised, "", place))
        else:
            keys.append(_Key("text", supervised, "", outside))  # cut where a medium stands that has no token
    return keys


def _media_places(batch: Batch, row: int, real: list[int]) -> dict[int, list[tuple[Modality, int]]]:
    """What media begin at a token, counted without padding, and how many tokens each has in all.

    Those of a ready model may have other tokens among them, such as the times of frames. One that a fusion keeps out of the row
    has none, and begins at the token that follows it.
    """
    index = {place: number for number, place in enumerate(real)}
    found: dict[int, list[tuple[Modality, int]]] = {}
    for modality in MODALITIES:
        if modality not in batch:
            continue
        media = batch[modality]
        standing = zip(media["row_O"].tolist(), media["position_O"].tolist(), media["num_tokens_O"].tolist(), strict=True)
        for at, position, num_tokens in standing:
            if at == row:
                found.setdefault(index[position], []).append((modality, num_tokens))
    return found
