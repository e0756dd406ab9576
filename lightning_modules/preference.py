"""What objectives share that compare answers: one forward pass, a reference, and metrics with TRL's names.

Shape suffixes: B rows, S supervised positions, A answers.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.batch import Batch, answers_of_positions
from datamodules.criteria import CriteriaUse
from datamodules.fingerprint import fingerprint
from datamodules.score_ranges import ScoreRanges
from lightning_modules.comparison import Comparison, ScoredAnswers, row_values, token_metrics, unscored
from lightning_modules.constant_criteria import name_constant
from lightning_modules.criteria import ReferenceCriterion, blank_media, criteria_metrics, has_media, judged, reference_terms
from lightning_modules.dropout import turn_dropout_off
from lightning_modules.epoch_means import EpochMeans, RowValues
from lightning_modules.logprobs import AnswerLogps, Statistic, TokenScores, score_tokens
from lightning_modules.losses import supervised
from lightning_modules.measuring import Stage
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.pair_logps import mean
from lightning_modules.precomputed import PrecomputedReference
from lightning_modules.references import REFERENCE, Reference, default_reference
from models.adapters import is_copy
from models.multimodal import EncodedMedia


class PreferenceLitModule(MultiModalLitModule):
    """Base of objectives that compare answers. A subclass defines `compare`; `answer_form` says which answers it wants.

    Both answers share the forward pass of their prompt, and all share one encoding of their media. Nothing is dropped at random
    in training, since likelihoods are compared. Metrics have the names that TRL gives them, after `train/`, `val/`, `test/`.

    Args:
        lr_factor: Factor of all learning rates, those that parts have in `tune.lr` and the optimizer's own, so that a recipe of
            supervised tuning serves as it is: comparing answers wants smaller steps. The table of parts shows the product.
    """

    def __init__(self, *args: Any, lr_factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if lr_factor <= 0:
            raise ValueError(f"model.lr_factor multiplies learning rates and must be above 0, got {lr_factor}")
        self.lr_factor = lr_factor
        self._step_means = EpochMeans()

    @property
    def answer_form(self) -> AnswerForm:
        return AnswerForm(kind="pairs")

    @property
    def statistics(self) -> Collection[Statistic]:
        """What `compare` wants to know of each token besides its log-probability."""
        return ()

    @abstractmethod
    def compare(self, scored: ScoredAnswers) -> Comparison:
        """The loss of the pairs or answers of a batch."""

    def build_model(self) -> None:
        super().build_model()
        turn_dropout_off(self.model)

    def configure_optimizers(self) -> Any:
        """As in the base, with all learning rates multiplied by `lr_factor`."""
        make = self.optimizer

        def scaled(groups: Any) -> torch.optim.Optimizer:
            optimizer = make(groups)
            for group in optimizer.param_groups:
                group["lr"] *= self.lr_factor
            return optimizer

        self.optimizer = scaled
        try:
            return super().configure_optimizers()
        finally:
            self.optimizer = make

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """The loss of a batch: its sum over pairs (or answers), and their number; of a loss of several terms one of each."""
        if not batch["examples"]:
            return None
        scored = self.score_answers(batch, stage)
        compared = self.compare(scored)
        num_rows = len(batch["examples"])
        values = row_values([*compared.metrics, *token_metrics(scored), *criteria_metrics(scored)], scored.row_A, num_rows)
        if stage == "train" and not self.is_lent:
            self._step_means.add(values, [""] * num_rows)
        elif stage != "train":
            self.measure(batch, {"loss": self._loss_by_source(batch, scored, compared), **values})
        return compared.total, compared.count

    def counts(self, batch: Batch) -> Tensor:
        return self.compare(unscored(batch)).count.reshape(-1)

    def score_answers(self, batch: Batch, stage: Stage) -> ScoredAnswers:
        """The log-probabilities of the answers of a batch, under the reference and then under the policy.

        The reference comes first: what its pass takes is free again before the policy's activations are kept.
        """
        answers, answer_S = batch["answers"], answers_of_positions(batch)
        features = self.model.features(batch)
        encoded = self.model.encode(batch, features)
        logps_S, blank_S = self.reference_logps(batch, features, encoded), self.blank_logps(batch, features, stage)
        tokens = self.score_labels(batch, encoded, self.statistics if stage == "train" else (*self.statistics, *_EVALUATED))
        num_answers = len(answers["roles"])
        reference, blank = (None if x is None else AnswerLogps(x, answer_S, num_answers) for x in (logps_S, blank_S))
        return ScoredAnswers.of(answers, AnswerLogps(tokens.logps_S, answer_S, num_answers), reference, tokens, blank)

    def reference_logps(self, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor | None:
        """Log-probabilities of the labels under the reference, logps_S; None: there is none."""
        return None

    def blank_logps(self, batch: Batch, features: EncodedMedia, stage: Stage) -> Tensor | None:
        """The same behind blank media, logps_S; None: nobody asks for them."""
        return None

    def score_labels(self, batch: Batch, encoded: EncodedMedia, want: Collection[Statistic]) -> TokenScores:
        """What the policy makes of each label of a batch."""
        language_model = self.model.language_model
        hidden_SD, labels_S = supervised(self(batch, encoded), batch["labels_BT"])
        return score_tokens(
            hidden_SD,
            language_model.head,
            labels_S,
            softcap=language_model.softcap,
            scale=language_model.logit_scale,
            want=want,
        )

    def on_train_start(self) -> None:
        super().on_train_start()
        self._step_means.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the step's pairs, on all processes, and logs the means of its metrics."""
        super().on_before_optimizer_step(optimizer)
        for name, value in self.complete(self._step_means.compute(self.trainer)).items():
            self.log(f"train/{name}", value, prog_bar=name == "rewards/accuracies")
        self._step_means.reset()

    def _loss_by_source(self, batch: Batch, scored: ScoredAnswers, compared: Comparison) -> RowValues:
        """The loss of each source of a batch, total and count, at its first row: that of an evaluation is exact by source."""
        sources = [example.get("source", "") for example in batch["examples"]]
        total_B, count_B = (scored.policy.logps_S.new_zeros(len(sources), dtype=torch.float32) for _ in range(2))
        names = list(dict.fromkeys(sources))
        for name in names:
            is_own_B = torch.tensor([source == name for source in sources], device=total_B.device)
            own = compared if len(names) == 1 else self.compare(scored.in_rows(is_own_B))
            first = sources.index(name)
            count = own.count.reshape(-1)[0]
            total_B[first], count_B[first] = mean(own.total.detach(), own.count) * count, count
        return total_B, count_B


class ReferencedLitModule(PreferenceLitModule):
    """Base of objectives that compare the policy with a reference.

    Args:
        reference: The model that the policy is compared with; None: the start of this run, in the least memory that takes:
            the frozen weights without adapters, a second adapter after a warm start that carried some (`init_from`), or a
            copy of what trains where that is more than adapters.
        reward_criteria: Scorers of the answers that need the reference. Each batch that they score costs a forward pass of it
            more, behind blank media.
        criteria_use: What is done with their scores: `monitor` logs them in evaluation, `weight` and `margin` change the
            training pairs as well.
    """

    def __init__(
        self,
        *args: Any,
        reference: Reference | None = None,
        reward_criteria: list[ReferenceCriterion] | None = None,
        criteria_use: CriteriaUse = CriteriaUse(),  # it is frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reference = reference
        self.reward_criteria = reward_criteria or []
        self.criteria_use = criteria_use
        self._ranges = ScoreRanges()

    def build_model(self) -> None:
        """Makes the weights, and the reference of them.

        Raises:
            ValueError: Training would move the reference, or the reward criteria cannot be used so.
        """
        form = self.answer_form
        self._terms = reference_terms(self.reward_criteria, self.criteria_use, form.takes_margin, form.kind == "pairs")
        if isinstance(self.reference, PrecomputedReference) and self.answer_form.mismatched:
            raise ValueError(
                "model.reference is PrecomputedReference, but this objective also compares mismatched answers, which are others "
                "in each epoch: take AdapterOff, SecondAdapter or FrozenCopy, or a loss_type that needs none"
            )
        self._ranges = ScoreRanges(each.label for each in self.reward_criteria)
        super().build_model()
        if self.reference is None:
            self.reference = default_reference(self.model, self._warm_started)
        if self.is_spread:
            self.check_spread(self.zero is not None)
        self.reference.prepare(self.model, self._warm_started, fingerprint(self.processor))
        rank_zero_info(f"reference: {self.reference.description}")

    def check_spread(self, by_engine: bool) -> None:
        if by_engine and self.criteria_use.mode == "weight":
            raise ValueError(
                "model.criteria_use.mode is weight, but ZeroStrategy divides by what the data side counts, before pairs have "
                "weights: take monitor or margin, or configs/strategy/fsdp.yaml"
            )
        assert self.reference is not None
        self.reference.check_spread()

    def reference_logps(self, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor | None:
        assert self.reference is not None
        return self.reference.logps(self.model, batch, features, encoded)

    def blank_logps(self, batch: Batch, features: EncodedMedia, stage: Stage) -> Tensor | None:
        if not self.reward_criteria or (stage == "train" and self.criteria_use.mode == "monitor"):
            return None
        assert self.reference is not None
        return self.reference.logps(self.model, *blank_media(batch, features), {})

    def score_answers(self, batch: Batch, stage: Stage) -> ScoredAnswers:
        """As in the base, and what the reward criteria say of the answers."""
        scored = super().score_answers(batch, stage)
        if scored.blank is None:
            return scored
        has_media_A = has_media(batch)
        scores_A = {each.label: each.scorer(scored.against, scored.blank, has_media_A) for each in self.reward_criteria}
        if not self.is_lent:
            self._ranges.add(scores_A, batch["answers"]["roles"])
        return judged(scored, scores_A, self._terms, self.criteria_use if stage == "train" else CriteriaUse())

    def on_train_epoch_end(self) -> None:
        """Writes the log-probabilities that a later run may read, and names reward criteria that told nothing apart."""
        assert self.reference is not None
        self.reference.flush()
        name_constant(self._ranges, self.trainer)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        assert self.reference is not None
        self.reference.flush()
        if not self.trainer.sanity_checking:
            name_constant(self._ranges, self.trainer)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        name_constant(self._ranges, self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the reference is made again of."""
        super().on_save_checkpoint(checkpoint)
        assert self.reference is not None
        checkpoint[REFERENCE] = self.reference.saved(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what `on_save_checkpoint` added.

        Raises:
            ValueError: The checkpoint is of an objective without a reference, or of another reference.
        """
        super().on_load_checkpoint(checkpoint)
        if REFERENCE not in checkpoint:
            raise ValueError(
                f"the checkpoint has no reference, since it is of another objective than {type(self).__name__}: start from its "
                "weights with model.init_from instead of --ckpt_path"
            )
        assert self.reference is not None
        self.reference.load(self.model, checkpoint[REFERENCE])

    def saved_names(self) -> set[str]:
        return {name for name in super().saved_names() if not is_copy(name, REFERENCE)}


_EVALUATED: tuple[Statistic, ...] = ("entropy", "mean_logit")
"""What is measured in evaluation alone: each costs a pass over the logits."""


def check_numbers(weights: Mapping[str, float], beta: float = 1.0, label_smoothing: float = 0.0) -> None:
    """Refuses options of a loss that are out of range.

    Raises:
        ValueError: One is.
    """
    if beta <= 0:
        raise ValueError(f"model.beta scales the rewards and must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"model.label_smoothing is the probability of a wrong label, in [0, 0.5), got {label_smoothing}")
    for name, weight in weights.items():
        if weight < 0:
            raise ValueError(f"model.{name} is the weight of a term and must be at least 0, got {weight}")
