"""Rows of well-known preference data as rows of the common forms."""

import json
from collections.abc import Sequence
from typing import Any

from datamodules.rows import MEDIA_KEYS, Row, UnusableRowError, keys_of, kind_of

_PICTURES = ("image_path", "img_path")
"""Keys under which some data sets name a picture, beside its content or instead of it."""


def common_form(row: Row, has_template: bool = False) -> Row:
    """A row of RLHF-V, RLAIF-V, VLFeedback, LLaVA-RLHF or LLaMA-Factory with its answers where other rows have them.

    Any other row comes back as it is.

    Args:
        row: The JSON object.
        has_template: Whether a prompt template makes the question, so that its columns stay.

    Raises:
        UnusableRowError: It is such a row, but its answers cannot be told.
    """
    if isinstance(row.get("output_1"), dict) and isinstance(row.get("output_2"), dict):
        return _llava_rlhf(row)
    if isinstance(row.get("completions"), list | dict) and row.get("messages") is None:
        return _vl_feedback(row)
    if (text := _rlhf_v(row)) is not None:
        row = {key: value for key, value in row.items() if key != "text"} | text
    if row.get("chosen") is not None and row.get("prompt") is None:
        if isinstance(row.get("conversations"), list):
            return _sharegpt(row)
        if isinstance(row.get("question"), str):
            named = {"prompt" if key == "question" and not has_template else key: value for key, value in row.items()}
            return _with_picture(named)
    return row


def _rlhf_v(row: Row) -> Row | None:
    """The texts of a row of RLHF-V (Yu et al. 2023, arXiv 2312.00849), which are JSON in one column; None: it is none."""
    text = row.get("text")
    if not isinstance(text, str) or not text.lstrip().startswith("{") or row.get("chosen") is not None:
        return None
    try:
        texts = json.loads(text)
    except ValueError:
        return None
    return texts if isinstance(texts, dict) and {"question", "chosen", "rejected"} <= texts.keys() else None


def _llava_rlhf(row: Row) -> Row:
    """LLaVA-RLHF (Sun et al. 2023, arXiv 2309.14525): a conversation that ends with the user, two answers, and the better one."""
    better = row.get("preference")
    if better not in (1, 2) or isinstance(better, bool):
        raise UnusableRowError(f"'preference' must be 1 or 2, the better one of 'output_1' and 'output_2', got {better!r}")
    if not isinstance(row.get("conversations"), list):
        raise UnusableRowError(f"a row with 'output_1' and 'output_2' needs 'conversations', but has {keys_of(row)}")
    chosen, rejected = (_value(row[f"output_{number}"], f"'output_{number}'") for number in (better, 3 - better))
    rest = {key: value for key, value in row.items() if key not in ("output_1", "output_2", "preference")}
    return rest | {"conversations": [*row["conversations"], {"from": "gpt", "value": chosen}], "rejected_response": rejected}


def _sharegpt(row: Row) -> Row:
    """LLaMA-Factory: a conversation that ends with the user, and both answers as its next turn."""
    chosen, rejected = (_value(row.get(key), repr(key)) for key in ("chosen", "rejected"))
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    return rest | {"conversations": [*row["conversations"], {"from": "gpt", "value": chosen}], "rejected_response": rejected}


def _value(turn: Any, where: str) -> str:
    text = turn.get("value") if isinstance(turn, dict) else turn
    if not isinstance(text, str):
        raise UnusableRowError(f"{where} must be a text, or a turn with a text as its 'value', got {kind_of(turn)}")
    return text


def _vl_feedback(row: Row) -> Row:
    """VLFeedback (Li et al. 2023, arXiv 2312.10665): the answer with the best mean rating against all that have a lower one."""
    rated = [(_mean_rating(annotations), response) for annotations, response in _completions(row["completions"])]
    best = max((rating for rating, _ in rated), default=0.0)
    chosen = [response for rating, response in rated if rating == best]
    rejected = [response for rating, response in rated if rating < best]
    if not rejected:
        raise UnusableRowError(f"the {len(rated)} 'completions' have one mean rating, so that none of them is better")
    rest = {key: value for key, value in row.items() if key not in ("completions", "models")}
    return _with_picture(rest | {"chosen": chosen[0], "rejected": rejected})


def _completions(completions: Any) -> Sequence[tuple[Any, str]]:
    """Annotations and response of each: a list of objects, or an object of lists."""
    if isinstance(completions, dict):
        columns = [completions.get(key) for key in ("annotations", "response")]
        pairs = list(zip(*columns, strict=False)) if all(isinstance(column, list) for column in columns) else []
    else:
        pairs = [(item.get("annotations"), item.get("response")) for item in completions if isinstance(item, dict)]
    if not pairs or not all(isinstance(response, str) for _, response in pairs):
        raise UnusableRowError("each of the 'completions' must have 'annotations' and a text as its 'response'")
    return pairs


def _mean_rating(annotations: Any) -> float:
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    try:
        ratings = [float(aspect["Rating"]) for aspect in aspects]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableRowError(
            f"an aspect of the 'annotations' has no number as its 'Rating': {str(annotations)[:120]}"
        ) from error
    if not ratings:
        raise UnusableRowError(f"the 'annotations' of a completion have no ratings: {str(annotations)[:120]}")
    return sum(ratings) / len(ratings)


def _with_picture(row: Row) -> Row:
    """The row with the picture that it names, unless it has media already; the name beside them is left out."""
    names = [row[key] for key in _PICTURES if row.get(key) is not None]
    rest = {key: value for key, value in row.items() if key not in _PICTURES}
    if any(row.get(key) is not None for key in MEDIA_KEYS):
        return rest
    return rest | ({"image": names[0]} if names else {})
