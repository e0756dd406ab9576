"""Which answer a supervised position belongs to."""

import torch

from datamodules.batch import Answers, Batch, answers_of_positions


def test_positions_are_numbered_by_row_and_branch() -> None:
    labels_BT = torch.tensor([[-100, -100, -100, 7, 8, -100, 9], [-100, 5, 6, -100, -100, -100, -100]])
    branches_BT = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0, 0]])
    answers = Answers(
        row_A=torch.tensor([0, 0, 1]),
        branch_A=torch.tensor([1, 2, 1]),
        roles=["chosen", "rejected", "corrupted"],
        keys=["a", "b", "c"],
        pairs_P2=torch.tensor([[0, 1]]),
        margin_P=torch.zeros(1),
        weight_P=torch.ones(1),
        media_pairs_M2=torch.tensor([[0, 2]]),
        continues_B=[False, True],
    )
    batch = Batch(
        tokens_BT=torch.zeros(2, 7, dtype=torch.long),
        labels_BT=labels_BT,
        positions_BT=torch.zeros(2, 7, dtype=torch.long),
        segments_BT=torch.ones(2, 7, dtype=torch.long),
        choices_SK=torch.empty(5, 0),
        examples=[{}, {}],
        skipped=[],
        num_tokens=14,
        num_supervised=5,
        num_dropped_tokens=0,
        branches_BT=branches_BT,
        answers=answers,
    )
    assert answers_of_positions(batch).tolist() == [0, 0, 1, 2, 2]
