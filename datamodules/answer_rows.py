"""Answers on their way into a batch: what belongs to one row of the data, and what a batch says of its answers.

Shape suffixes: A answers, P pairs, M pairs of media, B rows.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch

from datamodules.answer_form import AnswerForm
from datamodules.batch import AnswerRole, Answers, Example, RowChange
from datamodules.branches import answer_start, in_order, join


class Judged(NamedTuple):
    """What reward criteria say of an answer; see `Candidate`."""

    scores: Mapping[str, float | None] = {}
    weight: float = 1.0
    margin: float | None = None


@dataclass
class AnswerExample(Example):
    """A row whose answers are compared: the example of its first answer, and what else there is.

    Args:
        role: What the first answer is.
        others: The other answers, each with its role, behind its own prompt and media.
        margin: By how much the chosen one is better, in units of reward.
        judged: What reward criteria say of the answers, in order; where it ends they say nothing.
        change: What they changed in the row; empty: nothing.
        form: What the objective wants.
        max_length: Most tokens of a prompt with an answer.
    """

    role: AnswerRole = "chosen"
    others: list[tuple[AnswerRole, Example]] = field(default_factory=list)
    margin: float = 0.0
    judged: list[Judged] = field(default_factory=list)
    change: str = ""
    form: AnswerForm = field(default_factory=AnswerForm)
    max_length: int = 2048

    @property
    def answers(self) -> list[tuple[AnswerRole, Example]]:
        """All answers, the first one included."""
        own = {each.name: vars(self)[each.name] for each in fields(Example)}
        return [(self.role, Example(**own)), *self.others]


class _Placed(NamedTuple):
    """An answer of a batch: the row of the data that it is of, counted from 0, and its row and branch in the batch."""

    of: int
    row: int
    branch: int
    role: AnswerRole
    key: str
    margin: float
    judged: Judged


def answer_rows(examples: Sequence[Example]) -> tuple[list[Example], Answers | None]:
    """The rows of a batch, and what their answers are; None where no answers are compared.

    Args:
        examples: One a row of the data.
    """
    compared = [example for example in examples if isinstance(example, AnswerExample)]
    if not compared:
        return list(examples), None
    assert len(compared) == len(examples), "some rows have answers to be compared, and others have one alone"
    rows: list[Example] = []
    continues: list[bool] = []
    placed: list[_Placed] = []
    for number, (example, mismatched) in enumerate(zip(compared, map(_Mismatched(compared), compared), strict=True)):
        sides = [*example.answers, *mismatched]
        judged = [*example.judged, *[Judged()] * (len(sides) - len(example.judged))]
        answers = [(*side, judgement) for side, judgement in zip(sides, judged, strict=True)]
        # those behind corrupted media share nothing with the others
        groups = [[answer for answer in answers if answer[0] != "corrupted"]]
        groups += [[answer] for answer in answers if answer[0] == "corrupted"]
        num_before = len(rows)
        for group in groups:
            own_rows = join([side for _, side, _ in group], example.form.shared_prompt)
            for place, (role, side, judgement) in enumerate(group):
                row, branch = (place, 1) if len(own_rows) > 1 else (0, place + 1)
                key, margin = answer_key(side), example.margin if judgement.margin is None else judgement.margin
                placed.append(_Placed(number, len(rows) + row, branch, role, key, margin, judgement))
            rows += own_rows
        continues += [place > 0 for place in range(len(rows) - num_before)]
    stacked = _stack(placed, continues)
    if names := dict.fromkeys(name for answer in placed for name in answer.judged.scores):
        scores = {name: [answer.judged.scores.get(name) for answer in placed] for name in names}
        stacked["scores_A"] = {
            name: torch.tensor([math.nan if score is None else score for score in own]) for name, own in scores.items()
        }
        stacked["changes"] = [RowChange(example.origin, example.change) for example in compared if example.change]
    return rows, stacked


def answer_key(example: Example) -> str:
    """A text that is the same for the same answer behind the same prompt and media, in any run.

    Args:
        example: Prompt and answer.
    """
    media = [(modality, item.key, item.position, item.num_tokens) for modality, item in in_order(example)]
    text = json.dumps([example.tokens, example.labels, media])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _stack(placed: Sequence[_Placed], continues: list[bool]) -> Answers:
    first = {answer.of: number for number, answer in reversed([*enumerate(placed)])}
    pairs, media_pairs = (
        [(first[answer.of], number) for number, answer in enumerate(placed) if answer.role == role]
        for role in ("rejected", "corrupted")
    )
    # identical answers are compared as one, whose gradients cancel to the last bit
    compared = [(chosen, chosen if placed[chosen].key == placed[rejected].key else rejected) for chosen, rejected in pairs]
    return Answers(
        row_A=torch.tensor([answer.row for answer in placed]),
        branch_A=torch.tensor([answer.branch for answer in placed]),
        roles=[answer.role for answer in placed],
        keys=[answer.key for answer in placed],
        pairs_P2=torch.tensor(compared, dtype=torch.long).view(-1, 2),
        margin_P=torch.tensor([placed[rejected].margin for _, rejected in pairs], dtype=torch.float32),
        weight_P=torch.tensor([placed[rejected].judged.weight for _, rejected in pairs], dtype=torch.float32),
        media_pairs_M2=torch.tensor(media_pairs, dtype=torch.long).view(-1, 2),
        continues_B=continues,
        example_A=[answer.row for answer in placed],
    )


class _Mismatched:
    """The answers of another row of the batch behind the prompt and the media of this one.

    They are those of the next row, in a circle, that has another prompt, answers without media, and fits `max_length`.
    """

    def __init__(self, examples: Sequence[AnswerExample]) -> None:
        self.examples = examples

    def __call__(self, example: AnswerExample) -> list[tuple[AnswerRole, Example]]:
        if not example.form.mismatched:
            return []
        place = next(number for number, other in enumerate(self.examples) if other is example)
        for other in (*self.examples[place + 1 :], *self.examples[:place]):
            if _prompt(other) != _prompt(example):
                moved = [_behind(example, side) for role, side in other.answers if role != "corrupted"]
                if all(side is not None and len(side.tokens) <= example.max_length for side in moved):
                    return [("mismatched", side) for side in moved if side is not None]
        return []


def _prompt(example: Example) -> tuple[list[int], list[str]]:
    return example.tokens[: answer_start(example)], [item.key for _, item in in_order(example)]


def _behind(example: Example, other: Example) -> Example | None:
    """The answer of another example behind the prompt of this one; None: it holds media."""
    start, other_start = answer_start(example), answer_start(other)
    if any(item.position > other_start for _, item in in_order(other)):
        return None
    answer = other.tokens[other_start:]
    return Example(
        origin=example.origin,
        id=example.id,
        tokens=example.tokens[:start] + answer,
        labels=example.labels[:start] + other.labels[other_start:],
        media={modality: [item for item in items if item.position <= start] for modality, items in example.media.items()},
        inputs=example.inputs,
        token_types=None if example.token_types is None else example.token_types[:start] + [0] * len(answer),
    )
