"""Loaders over rows whose answers may be judged before they are learnt from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.criteria import CriteriaUse, RewardCriterion
from datamodules.dataset import MultiModalDataset
from datamodules.judge import Judge
from datamodules.judgements import Judgements
from datamodules.loading import Loader, RowDataModule
from datamodules.row_dataset import RowDataset
from datamodules.source import Split


class JudgedDataModule(RowDataModule):
    """Base of all data modules: which answers an example has is said by the objective, and reward criteria judge them.

    A reward criterion scores each answer from 0 to 1, or not at all. Several make one score, the mean by their weights; 0 below a
    floor. Scores are logged as `criteria/<name>/chosen`, `/rejected` and `/agreement` (the share of pairs whose chosen answer
    scores higher; a tie is half of one). Rows that they leave out stand in `skipped.jsonl`, those that they change in
    `changed.jsonl`.

    Args:
        reward_criteria: Scorers of the answers that an objective compares, with their weights and floors.
        criteria_use: What is done with their scores.
    """

    def __init__(
        self,
        *args: Any,
        reward_criteria: list[RewardCriterion] | None = None,
        criteria_use: CriteriaUse = CriteriaUse(),  # it is frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not reward_criteria and criteria_use.mode != "monitor":
            raise ValueError(
                f"data.criteria_use.mode is {criteria_use.mode}, but data.reward_criteria is empty: give at least one"
            )
        self.judge = Judge(reward_criteria, criteria_use) if reward_criteria else None

    def source_dataset(self, split: Split, name: str, rows: Sequence[int] | None = None) -> MultiModalDataset:
        """As in the base, with a judge of the answers that the objective compares.

        Raises:
            ValueError: A file or an option cannot be used, or the objective does not read what the criteria say.
        """
        dataset = super().source_dataset(split, name, rows)
        if self.judge is None or (dataset.answer_form.kind == "single" and split == "predict"):
            return dataset
        mode, form = self.judge.use.mode, dataset.answer_form
        if form.kind == "single":
            raise ValueError(
                "data.reward_criteria score the answers that an objective compares, and this one compares none: take one of "
                "configs/objective, or leave them out"
            )
        if form.kind == "feedback" and mode in ("weight", "margin"):
            raise ValueError(
                f"data.criteria_use.mode {mode} is about pairs, and this objective takes each answer for itself: take filter or "
                "relabel"
            )
        if mode == "margin" and not form.takes_margin:
            raise ValueError(
                "data.criteria_use.mode is margin, but the loss reads no margin: set model.margin_weight above 0 (DPO, a "
                "reward model), or take another mode"
            )
        dataset.judge = self.judge if split == "train" else self.judge.monitoring()
        return dataset

    def _loader(self, kind: type[Loader], dataset: RowDataset, batch_size: int, **options: Any) -> Loader:
        if self.judge is not None:
            path = Path(self.trainer.default_root_dir) / "changed.jsonl" if self.trainer is not None else None
            options["judgements"] = Judgements(path, dataset)
        return super()._loader(kind, dataset, batch_size, **options)
