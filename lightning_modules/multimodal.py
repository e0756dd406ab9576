"""Supervised fine-tuning of a composed multimodal model, and the base of every other objective.

Shape suffixes: B rows, T positions, D hidden size, S supervised positions, K choices.
"""

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.batch import Batch
from datamodules.processor import Processor, PromptOptions
from encoders.base import Encoder, Part, Projector
from lightning_modules.losses import AnswerScores, cross_entropy, score_answers, supervised, supervised_rows
from lightning_modules.optim import WarmupCosine, parameter_groups
from models.checkpoint import fingerprints, load_saved, saved_names, start_from
from models.language import Generation, LanguageModel
from models.multimodal import EncodedMedia, MultiModalModel, shuffle_media

Stage = Literal["train", "val", "test"]


class MultiModalLitModule(L.LightningModule):
    """Trains encoders, projectors and a language model to give the answers of the rows.

    What trains, and how fast, is said by each part's own `tune`.

    Args:
        language_model: The language model and its adapters.
        image_encoder: Encoder of pictures; None: text only.
        image_projector: From its features to the language model's embeddings.
        prompt: Chat template, system message, and length limit.
        optimizer: Any optimizer; its lr holds for the parts that do not set their own.
        lr_scheduler: Any scheduler, stepped once an epoch; None: linear warm-up, then cosine to 0, stepped once a step.
        warmup_ratio: Share of the steps that warm up, where `lr_scheduler` is None.
        generation: How answers are decoded in prediction and for the sample page.
        init_from: A checkpoint whose trained weights to start from (a warm start: no optimizer, no place in the data).
            To go on with an interrupted run, use --ckpt_path instead.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        image_encoder: Encoder | None = None,
        image_projector: Projector | None = None,
        prompt: PromptOptions = PromptOptions(),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_ratio: float = 0.03,
        generation: Generation = Generation(),
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"model.warmup_ratio is a share of the steps, in [0, 1), got {warmup_ratio}")
        self.model = MultiModalModel(language_model, image_encoder, image_projector)
        self.processor = Processor(
            language_model.name_or_path,
            prompt,
            encoders={} if image_encoder is None else {"image": image_encoder},
            projectors={} if image_projector is None else {"image": image_projector},
        )
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_ratio = warmup_ratio
        self.generation = generation
        self.init_from = init_from
        self.strict_loading = False  # load_state_dict below is stricter: exactly what a checkpoint must hold
        self._warm_started: set[str] = set()
        self._rng_state: dict[str, Any] | None = None
        self._fingerprints: dict[str, str] = {}
        self._fingerprinted: set[str] | None = None

    def configure_model(self) -> None:
        """Makes the weights, once, on the device and in the shards that the strategy wants."""
        if self.model.is_built:
            return
        self.model.build(self.processor.chat.media_ids)
        if self.init_from is not None:
            self._warm_started, fresh = start_from(self.model, self.init_from)
            parts = sorted({name.split(".")[0] for name in fresh})
            rank_zero_info(f"{len(self._warm_started)} weights from {self.init_from}; new: {', '.join(parts) or 'nothing'}")

    def parts(self) -> dict[str, Part]:
        """The parts of the model by name."""
        return self.model.parts()

    def model_spec(self) -> dict[str, Any]:
        """The composed model as JSON, without weights."""
        return self.model.spec()

    def forward(self, batch: Batch, encoded: EncodedMedia | None = None) -> Tensor:
        """Last hidden states, hidden_BTD."""
        return self.model(batch, encoded)

    def step(self, batch: Batch, stage: Stage) -> Tensor | None:
        """The loss of a batch, logged: mean negative log-likelihood of a supervised token.

        Returns:
            The loss, or None for a batch all of whose rows were skipped.
        """
        if not batch["examples"]:
            return self._loss_of_nothing()
        if stage != "train":
            return self._evaluate(batch, stage)
        language_model = self.model.language_model
        hidden_SD, labels_S = supervised(self(batch), batch["labels_BT"])
        total, count, _ = cross_entropy(
            hidden_SD, language_model.head, labels_S, softcap=language_model.softcap, scale=language_model.logit_scale
        )
        loss = total / count
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["examples"]))
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One training batch."""
        return self.step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """One validation batch."""
        self.step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """One test batch."""
        self.step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers the prompts of a batch: one dictionary a row."""
        return [{**example, "response": text} for example, text in zip(batch["examples"], self.generate(batch), strict=True)]

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
        answers = self.model.generate(batch, self.generation, self.processor.eos_ids, self.processor.pad_id)
        return [self.processor.decode(answer).strip() for answer in answers]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what trains, in groups by part, and the scheduler."""
        groups = parameter_groups({name: (part, part.tune.lr) for name, part in self.parts().items()})
        optimizer = self.optimizer(groups)
        if self.lr_scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError(
                "the cosine schedule needs an end: set trainer.max_steps or trainer.max_epochs, or model.lr_scheduler"
            )
        scheduler = WarmupCosine(optimizer, int(total_steps), round(total_steps * self.warmup_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what cannot be read again from elsewhere, and adds how to make the model and the state of the generators."""
        names = self._saved_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[f"model.{name}"] for name in sorted(names)}
        checkpoint["model"] = self.model.spec()
        if self._fingerprinted != names:  # frozen weights do not change: once a run will do
            self._fingerprints, self._fingerprinted = fingerprints(self.model, names), names
        checkpoint["fingerprints"] = self._fingerprints
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint["rng"] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what `on_save_checkpoint` added."""
        self._rng_state = checkpoint["rng"]
        self._fingerprints = checkpoint["fingerprints"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the weights of a checkpoint of this very run.

        Raises:
            ValueError: The checkpoint is of a model with other parts, adapters or frozen weights.
        """
        return load_saved(self.model, state_dict, self._fingerprints, self._saved_names())

    def on_train_start(self) -> None:
        """Sets the random generators to where the checkpoint left them; the set-up of a resumed run has drawn from them."""
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state["cpu"])
            if self._rng_state["cuda"]:
                torch.cuda.set_rng_state_all(self._rng_state["cuda"])
            self._rng_state = None

    def _evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        encoded = self.model.encode(batch)
        scores = self.score(batch, encoded)
        count = int(scores.count_B.sum())
        loss = scores.nll_B.sum() / count
        self._log_mean(f"{stage}/loss", loss, count)
        self._log_mean(f"{stage}/exact_match", scores.exact_B.float().mean(), len(scores.exact_B))
        if closed := int(scores.closed_B.sum()):
            self._log_mean(f"{stage}/accuracy", scores.choice_B[scores.closed_B].float().mean(), closed)
        if (shuffled := shuffle_media(batch)) is not None:
            other = self.score(shuffled, encoded)
            self._log_mean(f"{stage}/media_gain", other.nll_B.sum() / count - loss, count)
        return loss

    def _log_mean(self, name: str, value: Tensor, weight: int) -> None:
        """Logs the mean over the epoch, each batch weighted by what it is a mean of."""
        self.log(name, value, on_step=False, on_epoch=True, prog_bar=name == "val/loss", batch_size=weight, sync_dist=True)

    def _loss_of_nothing(self) -> Tensor | None:
        """None, which Lightning skips; beside other processes 0 with a gradient of 0, since all of them must step."""
        if self.trainer.world_size == 1 or not self.trainer.training:
            return None
        return torch.stack([0.0 * p.sum() for p in self.parameters() if p.requires_grad]).sum()

    def _saved_names(self) -> set[str]:
        return saved_names(self.model) | self._warm_started
