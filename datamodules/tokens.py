"""Pure functions of token ids: cuts where answers start, the trie of closed answers, places of media, the length limit."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from datamodules.batch import IGNORE_INDEX
from datamodules.template import ConversationError


class Tokens(NamedTuple):
    """A conversation as token ids, with one id for each medium.

    `spans` are the ranges of ids that are learnt; `choices` has for each learnt id those that may stand in its place,
    an empty list where the answer is open, and is None if the conversation has no choices.
    """

    ids: list[int]
    spans: list[range]
    choices: list[list[int]] | None


class Encoded(NamedTuple):
    """A row as tokens; see `Example` for what the fields mean.

    `positions` has for the id of each modality where its media stand, see `MediaItem`.
    """

    tokens: list[int]
    labels: list[int]
    choices: list[list[int]] | None
    num_dropped: int
    positions: dict[int, list[int]]


class Cut(NamedTuple):
    """Where an answer starts in a text, and where its end token stands, in characters; `end_id` is None if it has none."""

    start: int
    end: int = 0
    end_id: int | None = None


@dataclass(frozen=True)
class Codec:
    """A tokenizer's two directions, and a special token that can stand in for the text in front of a piece."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    anchor: str

    def encode_after(self, lead: str, text: str) -> list[int]:
        """The ids of a text that stands behind `lead`, a special token or nothing."""
        return self.encode(lead + text)[1 if lead else 0 :]


def tokenize(codec: Codec, text: str, cuts: Sequence[Cut]) -> tuple[list[int], list[int]]:
    """Tokenises a text so that its tokens up to the start of each answer are those of the text up to there alone.

    The ids are those of the whole text unless a token lies across such a cut: then the pieces left and right of it are
    tokenised for themselves, as they are when a model goes on writing after a prompt. What is left of a cut is looked at
    from the end token of the answer before, as no token reaches across a special token.

    Args:
        codec: The tokenizer.
        text: The text.
        cuts: The answers, in order.

    Returns:
        The token ids, and for each cut the number of tokens in front of it.

    Raises:
        ConversationError: The tokenizer cannot write the pieces apart.
    """
    ids, starts = codec.encode(text), []
    lead, sync, num_sync = "", 0, 0  # where a token surely begins: what to put in front, characters, tokens
    for start, end, end_id in cuts:
        left = codec.encode_after(lead, text[sync:start])
        num_left = num_sync + len(left)
        if ids[num_sync:num_left] != left:
            apart = ids[:num_sync] + left + codec.encode_after(codec.anchor, text[start:])
            if codec.decode(apart) != codec.decode(ids):
                raise ConversationError(
                    f"the tokenizer joins the end of the prompt and the start of the answer {text[start : start + 20]!r} into "
                    "one token and cannot write them apart; remove the whitespace at the start of the answer"
                )
            ids, lead, sync, num_sync = apart, codec.anchor, start, num_left
        starts.append(num_left)
        if end_id is not None:
            lead, sync, num_sync = "", end, ids.index(end_id, num_left)
    return ids, starts


def allowed_next(answer: Sequence[int], options: Iterable[Sequence[int]]) -> list[list[int]]:
    """For each token of an answer the sorted ids with which some option goes on after the answer's tokens in front of it."""
    alive = list(options)
    allowed = []
    for position, token in enumerate(answer):
        allowed.append(sorted({option[position] for option in alive if len(option) > position}))
        alive = [option for option in alive if len(option) > position and option[position] == token]
    return allowed


def expand(tokens: Tokens, counts: Mapping[int, Sequence[int]]) -> Encoded:
    """Ids and labels, with each medium's id repeated as often as it has placeholders; with none it is left out.

    Args:
        tokens: The conversation.
        counts: For the id of each modality the placeholders of each of its media, in order.
    """
    labels = [IGNORE_INDEX] * len(tokens.ids)
    for span in tokens.spans:
        labels[span.start : span.stop] = tokens.ids[span.start : span.stop]
    expanded, expanded_labels, done = [], [], 0
    remaining = {media_id: iter(nums) for media_id, nums in counts.items()}
    positions: dict[int, list[int]] = {media_id: [] for media_id in counts}
    for position, token in enumerate(tokens.ids):
        if token in remaining:
            expanded += tokens.ids[done:position]
            positions[token].append(len(expanded))
            expanded += [token] * (num := next(remaining[token]))
            expanded_labels += labels[done:position] + [IGNORE_INDEX] * num
            done = position + 1
    return Encoded(expanded + tokens.ids[done:], expanded_labels + labels[done:], tokens.choices, 0, positions)


def limit_length(encoded: Encoded, max_length: int, media_ids: Collection[int], cut: bool) -> Encoded:
    """Holds a row to a length.

    Args:
        encoded: The row.
        max_length: Most tokens.
        media_ids: Ids that are never cut.
        cut: Drop tokens at the end instead of refusing the row; at least one that is learnt has to remain.

    Raises:
        ConversationError: It is longer and cannot be cut.
    """
    tokens, labels, choices, _, positions = encoded
    if len(tokens) <= max_length:
        return encoded
    num_media = sum(token in media_ids for token in tokens)
    too_long = f"{len(tokens):,} tokens (of them {num_media:,} media) are above prompt.max_length = {max_length:,}"
    if not cut:
        raise ConversationError(
            f"{too_long}; shorten the row, raise prompt.max_length, or set prompt.on_too_long to cut (prompts are never cut)"
        )
    starts = [position for places in positions.values() for position in places]
    if any(token in media_ids for token in tokens[max_length:]) or any(start >= max_length for start in starts):
        raise ConversationError(f"{too_long}, and cutting its end would cut a medium; raise prompt.max_length")
    num_supervised = sum(label != IGNORE_INDEX for label in labels[:max_length])
    if num_supervised == 0:
        raise ConversationError(f"{too_long}, and cutting its end would cut the whole answer; raise prompt.max_length")
    kept = None if choices is None else choices[:num_supervised]
    return Encoded(tokens[:max_length], labels[:max_length], kept, len(tokens) - max_length, positions)
