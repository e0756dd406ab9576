"""Supervised fine-tuning of a composed multimodal model, and the base of every other objective.

Shape suffixes: B rows, T positions, D hidden size, S supervised positions, K choices.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.batch import Batch
from datamodules.cache import CacheOptions
from datamodules.prompt_options import PromptOptions
from encoders.base import Encoder, Projector
from lightning_modules.answer_metrics import answer_values, media_gains
from lightning_modules.feature_cache import report, share_features
from lightning_modules.losses import AnswerScores, cross_entropy, score_answers, supervised, supervised_rows
from lightning_modules.measuring import Stage
from lightning_modules.non_finite import OnNonFinite
from lightning_modules.optim import WarmupCosine, parameter_groups, scheduled, take_into_memory
from lightning_modules.processors import make_processor
from lightning_modules.resume import ResumableLitModule
from lightning_modules.run_state import StepStart, add_place, check_processor, set_rng_state, settle_place, take_place
from lightning_modules.step_loss import StepLoss
from models.checkpoint import check_options, load_saved, saved_names
from models.fusion import Fusion
from models.language import Generation, LanguageModel
from models.media_shuffle import rows_with_other_media, shuffle_media
from models.multimodal import EncodedMedia, MultiModalModel


class MultiModalLitModule(ResumableLitModule):
    """Trains encoders, projectors and a language model to give the answers of the rows.

    What trains, and how fast, is said by each part's own `tune`. Validation and test log the metrics of `answer_metrics`, over
    all rows and by source; a subclass adds its own with `measure`.

    Args:
        language_model: The language model and its adapters.
        image_encoder: Encoder of images; None: the model takes none.
        image_projector: From its features to the language model's embeddings.
        video_encoder: Encoder of clips; None: the model takes none.
        video_projector: From its features to the language model's embeddings.
        audio_encoder: Encoder of sound; None: the model takes none.
        audio_projector: From its features to the language model's embeddings.
        fusion: How media enter the language model; None: `ConcatFusion`, each embedding in the place of a token.
        prompt: Chat template, system message, and length limit.
        optimizer: Any optimizer; its lr holds for the parts that do not set their own.
        lr_scheduler: Any scheduler; None: linear warm-up, then cosine to 0.
        lr_scheduler_interval: When `lr_scheduler` is stepped.
        warmup_ratio: Share of the steps that warm up, where `lr_scheduler` is None.
        generation: How answers are decoded in prediction and for the sample page.
        feature_cache: Keeps the features of frozen encoders on disk, so that each medium is encoded once, in this run or another
            with the same encoder; None: does not. Media that are augmented at random are encoded each time.
        init_from: A checkpoint whose trained weights to start from (a warm start: no optimizer, no place in the data).
            To go on with an interrupted run, use --ckpt_path instead.
        on_non_finite: What to do at a step whose loss or gradients are not finite, which changes no weight in any case.
    """

    generates = True
    """Whether it answers prompts."""

    def __init__(
        self,
        language_model: LanguageModel,
        image_encoder: Encoder | None = None,
        image_projector: Projector | None = None,
        video_encoder: Encoder | None = None,
        video_projector: Projector | None = None,
        audio_encoder: Encoder | None = None,
        audio_projector: Projector | None = None,
        fusion: Fusion | None = None,
        prompt: PromptOptions = PromptOptions(),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        warmup_ratio: float = 0.03,
        generation: Generation = Generation(),
        feature_cache: CacheOptions | None = None,
        init_from: str | None = None,
        on_non_finite: OnNonFinite = "stop",
    ) -> None:
        super().__init__()
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"model.warmup_ratio is a share of the steps, in [0, 1), got {warmup_ratio}")
        image, video = (image_encoder, image_projector), (video_encoder, video_projector)
        self.model = MultiModalModel(language_model, *image, *video, audio_encoder, audio_projector, fusion)
        self.processor = make_processor(self.model, prompt)
        self.optimizer, self.warmup_ratio = optimizer, warmup_ratio
        self.lr_scheduler, self.lr_scheduler_interval = lr_scheduler, lr_scheduler_interval
        self.generation, self.feature_cache = generation, feature_cache
        self.init_from, self.on_non_finite = init_from, on_non_finite
        self.strict_loading = False  # load_state_dict below is stricter: exactly what a checkpoint must hold
        self._rng: Mapping[str, Any] | None = None
        self._step_start: StepStart | None = None
        self._step_loss = StepLoss(on_non_finite)

    @property
    def answer_form(self) -> AnswerForm:
        """Which answers of a row the objective wants in an example; the data module gets it."""
        return AnswerForm()

    def setup(self, stage: str) -> None:
        """Tells the data side where features are kept, and what a step counts."""
        super().setup(stage)
        share_features(self.model, self.processor, self.feature_cache, self.trainer)
        self._step_loss.prepare(self.trainer, self.counts)

    def teardown(self, stage: str) -> None:
        """Says what the feature cache was good for."""
        report(self.model)

    def build_model(self) -> None:
        """Makes the weights; a subclass adds what it needs besides, before they may be spread over devices."""
        self.model.build(self.processor.chat.media_ids)
        self.start()

    def model_spec(self) -> dict[str, Any]:
        """The composed model as JSON, without weights."""
        return self.model.spec()

    def forward(self, batch: Batch, encoded: EncodedMedia | None = None) -> Tensor:
        """Last hidden states, hidden_BTD."""
        return self.model(batch, encoded)

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """The loss of a batch: negative log-likelihood of its supervised tokens (nats), and their number.

        Returns:
            Sum and count, of each term if there are several; who calls it divides once. None for a batch without rows.
        """
        if not batch["examples"]:
            return None
        if stage != "train":
            return self._evaluate(batch)
        language_model = self.model.language_model
        hidden_SD, labels_S = supervised(self(batch), batch["labels_BT"])
        total, count, _ = cross_entropy(
            hidden_SD, language_model.head, labels_S, softcap=language_model.softcap, scale=language_model.logit_scale
        )
        return total, count

    def counts(self, batch: Batch) -> Tensor:
        """What `step` will count in a training batch, by term: counts_K. The batch is on the CPU, and may have no rows."""
        return torch.tensor([float(batch["num_supervised"])])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One training batch: its summed loss. Lightning leaves a batch without a loss out."""
        shares, batch = self._step_loss.shares(batch, self.trainer), self.meet(batch)
        total = self._step_loss.add(self.step(batch, "train"), shares, None if self.is_lent else batch["examples"])
        return self.offer_all(total, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the step's supervised tokens, on all processes; clipping comes after.

        Raises:
            ValueError: The loss or a gradient is not finite, and `on_non_finite` is `stop`.
        """
        super().on_before_optimizer_step(optimizer)
        if self.zero is None:
            self.log_step(self._step_loss.divide(self.trainer, self.parameters()))
            self.log_dict(self._step_loss.overflows.metrics(self.trainer))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Makes a step, after which an engine says whether its gradients were finite."""
        super().optimizer_step(*args, **kwargs)
        if self.zero is not None:
            self.log_step(self._step_loss.end(self.trainer, self.zero.was_step_applied))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """One validation batch."""
        self.step(self.meet(batch), "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """One test batch."""
        self.step(self.meet(batch), "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers the prompts of a batch: one dictionary a row."""
        batch = self.meet(batch)
        answers = zip(batch["examples"], self.generate(batch), strict=True)
        return [{**example, "response": text} for example, text in answers if not self.is_lent]

    @torch.no_grad()
    def score(self, batch: Batch, encoded: EncodedMedia | None = None) -> AnswerScores:
        """Likelihood of the right answers by row, and whether greedy decoding would give them.

        Args:
            batch: Rows with their answers.
            encoded: Their media, where they are encoded already.
        """
        language_model = self.model.language_model
        hidden_SD, labels_S = supervised(self(batch, encoded), batch["labels_BT"])
        return score_answers(
            hidden_SD,
            language_model.head,
            labels_S,
            batch["choices_SK"],
            supervised_rows(batch["labels_BT"]),
            softcap=language_model.softcap,
            scale=language_model.logit_scale,
            num_rows=len(batch["examples"]),
        )

    def generate(self, batch: Batch) -> list[str]:
        """Answers left-padded prompts, as `generation` says."""
        if not batch["examples"]:
            return []
        answers = self.model.generate(batch, self.generation, self.processor.eos_ids, self.processor.pad_id)
        return [self.processor.decode(answer).strip() for answer in answers]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what trains, in groups by part, and the scheduler."""
        optimizer = self.optimizer(parameter_groups(self.parts()))
        optimizer.register_load_state_dict_post_hook(take_into_memory)
        if self.lr_scheduler is not None:
            return scheduled(optimizer, self.lr_scheduler(optimizer), self.lr_scheduler_interval)
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("the cosine schedule needs an end: set trainer.max_steps, trainer.max_epochs or model.lr_scheduler")
        return scheduled(optimizer, WarmupCosine(optimizer, int(total_steps), round(total_steps * self.warmup_ratio)), "step")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what cannot be read again from elsewhere, and adds how to make the model and the state of the generators."""
        names = self.saved_names()
        state = checkpoint["state_dict"]  # where it is spread, the first process alone may have it
        checkpoint["state_dict"] = {name: state[f"model.{name}"] for name in sorted(names) if state}
        checkpoint["model"] = self.model.spec()
        checkpoint["processor"] = self.processor.files()
        self.take_fingerprints()
        checkpoint["fingerprints"] = self._fingerprints
        super().on_save_checkpoint(checkpoint)
        add_place(checkpoint, self.trainer, self._step_start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what `on_save_checkpoint` added.

        Raises:
            ValueError: A part has another option than in the run that wrote the checkpoint, or training would go on with
                another objective or optimizer, or other examples.
        """
        super().on_load_checkpoint(checkpoint)
        check_options(self.model.spec()["parts"], checkpoint["model"]["parts"])
        resumes = self._trainer is not None and self._trainer.training
        check_processor(self.processor, checkpoint["processor"], resumes)
        self._rng = take_place(checkpoint, self.trainer) if resumes else None
        self._fingerprints = checkpoint["fingerprints"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the weights of a checkpoint of this very run.

        Raises:
            ValueError: The checkpoint is of a model with other parts, adapters or frozen weights.
        """
        return load_saved(self.model, state_dict, self._fingerprints, self.saved_names())

    def on_train_start(self) -> None:
        """Sets the random generators to where the checkpoint left them; the set-up of a resumed run has drawn from them."""
        self._step_start = None
        self._step_loss.reset()
        self._used.clear()
        settle_place(self.trainer)
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keeps where an optimizer step began, for a checkpoint that is written before the step is over."""
        if self._step_start is None or not self._step_start.is_open(self.trainer):
            self._step_start = StepStart.now(self.trainer)

    def saved_names(self) -> set[str]:
        """Names of the weights that a checkpoint holds, as the model calls them."""
        return saved_names(self.model) | self._warm_started

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        encoded = self.model.encode(batch)
        scores = self.score(batch, encoded)
        values = answer_values(scores)
        shuffled = shuffle_media(batch)
        if self.agree(shuffled is not None):
            others = self.score(batch if shuffled is None else shuffled, encoded)
            if shuffled is not None:
                moved = {modality: rows_with_other_media(batch, shuffled, modality) for modality in self.model.modalities}
                values |= media_gains(scores, others, moved)
        self.measure(batch, values)
        return scores.nll_B.sum(), scores.count_B.sum()
