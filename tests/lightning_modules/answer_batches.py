"""Batches of answers made by hand: each answer is a row of its own."""

from collections.abc import Callable, Sequence

import torch

from datamodules.batch import AnswerRole, Answers, Batch

PAIR: tuple[AnswerRole, AnswerRole] = ("chosen", "rejected")


def with_answers(batch: Batch, roles: Sequence[AnswerRole] | None = None) -> Batch:
    """The batch, whose rows are answers with these roles; None: a chosen and a rejected one in turn."""
    num_rows = len(batch["tokens_BT"])
    given = list(roles or [PAIR[row % 2] for row in range(num_rows)])
    chosen, rejected, corrupted = ([row for row, role in enumerate(given) if role == name] for name in (*PAIR, "corrupted"))
    pairs_P2 = torch.tensor(list(zip(chosen, rejected, strict=False)), dtype=torch.long).view(-1, 2)
    media_pairs_M2 = torch.tensor(list(zip(chosen, corrupted, strict=False)), dtype=torch.long).view(-1, 2)
    answers = Answers(
        row_A=torch.arange(num_rows),
        example_A=[*range(num_rows)],
        branch_A=torch.ones(num_rows, dtype=torch.long),
        roles=given,
        keys=[f"{hash(tuple(row)):x}" for row in batch["tokens_BT"].tolist()],
        pairs_P2=pairs_P2,
        margin_P=torch.zeros(len(pairs_P2)),
        weight_P=torch.ones(len(pairs_P2)),
        media_pairs_M2=media_pairs_M2,
        continues_B=[False] * num_rows,
    )
    return {**batch, "branches_BT": (batch["segments_BT"] > 0).long(), "answers": answers}  # type: ignore[typeddict-item,return-value]


def pair_batch(make_batch: Callable[..., Batch], num_pairs: int = 2, seed: int = 0, picture: bool = True) -> Batch:
    """Random pairs with answers of different lengths; both sides of a pair have the same picture, and another prompt."""
    layouts = []
    for number in range(num_pairs):
        media = [f"picture {number}"] if picture else []
        layouts += [[3, *media, 2, 3 + number], [3, *media, 2, 5 - number]]
    return with_answers(make_batch(layouts, seed=seed))
