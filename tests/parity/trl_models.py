"""TRL's own trainers around the models of model_cases.py, with the same weights and rows. Needs requirements-parity.txt."""

import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from loss_cases import DESIRABLE_A, Case
from model_cases import LORA, MARGIN_P, NUM_PAIRS, Answers, Family, base_model, draw_adapters, labels_of
from peft import LoraConfig
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_losses import DIVERGENCES

from tests.tiny import make_tokenizer

TRAINERS: dict[str, tuple[type, type]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "simpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "reward": (RewardTrainer, RewardConfig),
}
PAIRS = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
FEEDBACK = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}
ROWS = {"kto": FEEDBACK, "reward": {side: PAIRS[side] for side in ("chosen", "rejected")}}
"""What a trainer is made with; its losses are called on other rows."""


class TRLModels:
    """A trainer for each kind of loss, made when it is asked for.

    Args:
        family: Which model.
        folder: Where trainers may write.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family: Family = family
        self.folder = folder
        self.answers = Answers(family)
        self._made: dict[type, Any] = {}

    def trainer(self, loss: str) -> Any:
        """That of a kind of loss; its `model` has the adapters."""
        make, config = TRAINERS[loss]
        if make not in self._made:
            off = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
            own = {"use_weighting": True} if loss == "dpo" else {}  # so that its forward gives what WPO needs
            self._made[make] = trainer = make(
                model=base_model(self.family, rewards=loss == "reward"),
                args=config(output_dir=str(self.folder), max_length=None, per_device_train_batch_size=4, **off, **own),
                train_dataset=Dataset.from_dict(ROWS.get(loss, PAIRS)),
                processing_class=make_tokenizer(self.folder, "chatml"),
                peft_config=LoraConfig(**LORA),
            )
            trainer.model.config.get_text_config().pad_token_id = 0  # with which the rows are padded
            draw_adapters(trainer.model)
        return self._made[make]

    def loss(self, case: Case) -> tuple[nn.Module, Tensor]:
        """The model of a case and the loss that TRL computes of it, with gradients for its adapters."""
        trainer, options = self.trainer(case.loss), dict(case.options)
        rows = dict(self.answers.rows) | self.answers.pixels
        match case.loss:
            case "dpo":
                loss = _dpo(trainer, rows, options)
            case "kto":
                mismatched = {f"KL_{name}": x for name, x in self.answers.mismatched.items()}
                loss = _kto(trainer, rows | mismatched | {"label": DESIRABLE_A}, options)
            case "reward":
                loss = _reward(trainer, rows, options)
            case _:
                loss = self._reference_free(trainer, case)
        return trainer.model, loss

    def _reference_free(self, trainer: Any, case: Case) -> Tensor:
        defaults = {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0, "kind": "sigmoid", "gamma": 0.0, "alpha": 0.0}
        options = defaults | ({"kind": "simpo"} if case.loss == "simpo" else {}) | case.options
        trainer.beta, trainer.loss_type, trainer.label_smoothing = options["beta"], options["kind"], options["label_smoothing"]
        trainer.cpo_alpha, trainer.simpo_gamma, trainer.alpha = options["nll_weight"], options["gamma"], options["alpha"]
        columns = {name: self.answers.rows[name] for name in ("input_ids", "attention_mask")}
        columns["labels"] = labels_of(self.answers.rows)
        batch = {f"chosen_{name}": x[:NUM_PAIRS] for name, x in columns.items()}
        batch |= {f"rejected_{name}": x[NUM_PAIRS:] for name, x in columns.items()}
        # these two hand no pictures on: the model that they are given has them already
        loss, _ = trainer.get_batch_loss_metrics(partial(trainer.model, **self.answers.pixels), batch)
        return loss


def _dpo(trainer: Any, rows: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    trainer.loss_types, trainer.loss_weights = [*options["kinds"]], [*options["kinds"].values()]
    trainer.beta, trainer.label_smoothing = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    divergence = options.get("divergence", "reverse_kl")
    trainer.f_divergence_type = DIVERGENCES.get(divergence, divergence)
    trainer.f_alpha_divergence_coef = options.get("divergence_alpha", 0.5)
    trainer.args.discopop_tau = options.get("discopop_tau", 0.05)
    trainer.ld_alpha, trainer.use_weighting = options.get("ld_alpha"), options.get("wpo", False)
    return trainer._compute_loss(trainer.model, rows, False)


def _kto(trainer: Any, rows: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    trainer.loss_type, trainer.beta = options.get("kind", "kto"), options.get("beta", 0.1)
    trainer.calculate_KL = trainer.loss_type == "kto"
    trainer.desirable_weight = options.get("desirable_weight", 1.0)
    trainer.undesirable_weight = options.get("undesirable_weight", 1.0)
    return trainer._compute_loss(trainer.model, rows, False)


def _reward(trainer: Any, rows: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    trainer.args.center_rewards_coefficient = options.get("centering")
    margin = {"margin": MARGIN_P} if options.get("margin") else {}
    return trainer.compute_loss(trainer.model, {name: x for name, x in rows.items() if name != "completion_mask"} | margin)
