"""A reward model: which of two answers is better, as one number for each.

Shape suffixes: B rows, A answers, S supervised positions, P pairs.
"""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.batch import IGNORE_INDEX, Batch, answers_of_positions
from encoders.base import Part
from lightning_modules.comparison import Comparison, ScoredAnswers
from lightning_modules.logprobs import AnswerLogps
from lightning_modules.losses import supervised_rows
from lightning_modules.measuring import Stage
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.reference_free_losses import bradley_terry
from models.checkpoint import read_checkpoint
from models.reward_head import RewardHead

HEAD = "reward_head"


class RewardLitModule(PreferenceLitModule):
    """A reward model by Bradley and Terry: the chosen answer is to have the higher reward.

    The reward is a scalar head on the hidden state of an answer's last token. `predict` gives the `score` of the answer of each
    row. A usual learning rate is 1e-4 for LoRA, 1e-5 for full weights. Checkpoints hold the head, and `init_from` takes it up.

    Args:
        centering: Weight of the square of the sum of both rewards, which keeps them about 0 (arXiv 2312.09244 has 0.01).
        margin_weight: How much of a row's `margin` the difference of rewards is to exceed (arXiv 2307.09288, equation 2).
        reward_head: The scalar head.
    """

    generates = False

    def __init__(
        self,
        *args: Any,
        centering: float = 0.0,
        margin_weight: float = 1.0,
        reward_head: RewardHead | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if centering < 0:
            raise ValueError(f"model.centering is the weight of a term and must be at least 0, got {centering}")
        self.centering = centering
        self.margin_weight = margin_weight
        self.reward_head = RewardHead() if reward_head is None else reward_head

    @property
    def answer_form(self) -> AnswerForm:
        return replace(super().answer_form, scores_answers=True, takes_margin=self.margin_weight != 0)

    def check_spread(self, by_engine: bool) -> None:
        raise ValueError(
            "trainer.strategy would shard or split the model, which a reward model does not support: take "
            "configs/strategy/ddp.yaml"
        )

    def build_model(self) -> None:
        if self.is_spread:
            self.check_spread(self.zero is not None)
        super().build_model()
        self.reward_head.build(self.model.language_model.hidden_size)
        embedded = set(self.model.language_model.model.get_input_embeddings().parameters())
        for weight in self.model.language_model.head.parameters():
            if weight not in embedded:  # nothing of the loss passes the language model's own head
                weight.requires_grad_(False)
        if self.init_from is not None and self.goes_on_from is None and HEAD in (checkpoint := read_checkpoint(self.init_from)):
            self.reward_head.load_state_dict(checkpoint[HEAD])
            rank_zero_info(f"the reward head too is from {self.init_from}")

    def parts(self) -> dict[str, Part]:
        return super().parts() | {HEAD: self.reward_head}

    def score_answers(self, batch: Batch, stage: Stage) -> ScoredAnswers:
        """The rewards of the answers of a batch, in the place of log-probabilities."""
        reward_A = self.rewards(batch)
        number_A = torch.arange(len(reward_A), device=reward_A.device)
        return ScoredAnswers.of(batch["answers"], AnswerLogps(reward_A, number_A, len(reward_A)))

    def rewards(self, batch: Batch) -> Tensor:
        """The reward of each answer, reward_A; of a batch that compares none, of the answer of each row."""
        row_S, before_S = (batch["labels_BT"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        if "answers" in batch:
            row_A, answer_S = batch["answers"]["row_A"], answers_of_positions(batch)
        else:
            row_A = torch.arange(len(batch["labels_BT"]), device=row_S.device)
            answer_S = supervised_rows(batch["labels_BT"])
        last_A = torch.zeros_like(row_A).scatter_reduce(0, answer_S, before_S + 1, "amax")
        return self.reward_head(self(batch)[row_A, last_A])

    def compare(self, scored: ScoredAnswers) -> Comparison:
        reward_A, pairs_P2 = scored.policy.sums(), scored.pairs_P2
        chosen_P, rejected_P = reward_A[pairs_P2[:, 0]], reward_A[pairs_P2[:, 1]]
        margin_P = self.margin_weight * scored.margin_P
        loss = bradley_terry(chosen_P, rejected_P, margin_P, self.centering, scored.weights)
        return Comparison.of(loss, pairs_P2[:, 0])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Scores the answers of a batch: one dictionary a row."""
        if not batch["examples"]:
            return []
        scores = self.rewards(batch).tolist()
        return [{**example, "score": score} for example, score in zip(batch["examples"], scores, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the head."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[HEAD] = self.reward_head.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the head.

        Raises:
            ValueError: The checkpoint has none.
        """
        super().on_load_checkpoint(checkpoint)
        if HEAD not in checkpoint:
            raise ValueError("the checkpoint has no reward head: start from its weights with model.init_from, not --ckpt_path")
        self.reward_head.load_state_dict(checkpoint[HEAD])
