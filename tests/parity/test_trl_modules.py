"""Our LitModules on rows of a file, prompts shared, against TRL's trainers on the same tokens, each answer in a row of its own.

The weights are the same, with the same LoRA; loss and the gradients of all adapters are compared. Needs requirements-parity.txt.

Shape suffixes: A answers, T tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, VISION, randomise_adapters
from torch import Tensor, nn

from datamodules.batch import Example
from lightning_modules.cpo import CPOLitModule
from lightning_modules.dpo import DPOLitModule
from lightning_modules.kto import KTOLitModule
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.reward_model import RewardLitModule
from lightning_modules.simpo import SimPOLitModule
from tests.lightning_modules.preference_fakes import LORA, make_module, write_pairs
from tests.lightning_modules.run_fakes import examples, make_data

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-parity.txt")
pytestmark = pytest.mark.slow

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
PAIRS = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
FEEDBACK = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}


class Compared:
    """A module with a batch, and TRL's trainer with the same weights."""

    def __init__(self, module: PreferenceLitModule, rows: Path) -> None:
        self.module = module
        with torch.random.fork_rng():
            torch.manual_seed(4)
            module.configure_model()
            randomise_adapters(module)
        data = make_data(module, rows)
        self.batch = data.collate(examples(data))
        self.sides = [side for example in examples(data) for side in example.answers]

    def theirs(self, make: type, config: Any, model: nn.Module, rows: dict[str, list], llm: Path, layers: str) -> Any:
        """A trainer of TRL; `layers` is the name of the language model's layers in its model."""
        lora = LORA.lora
        adapters = LoraConfig(r=lora.r, lora_alpha=int(lora.alpha), target_modules=rf".*{layers}.*(q_proj|v_proj)")
        trainer = make(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(llm),
            peft_config=adapters,
        )
        trainer.model.eval()
        self.adapters = dict(name.split("layers.")[::-1] for name, _ in _adapters(trainer.model))  # by their end
        with torch.no_grad():
            weights = dict(trainer.model.named_parameters())
            for name, weight in _adapters(self.module):
                weights[self._name(name)].copy_(weight)
        return trainer

    def assert_same(self, trainer: Any, theirs: Tensor) -> None:
        self.module.zero_grad()
        total, count = self.module.step(self.batch, "train") or (None, None)
        (total / count).backward()
        torch.testing.assert_close((total / count).detach(), theirs.detach(), **TOLERANCE)
        trainer.model.zero_grad()
        theirs.backward()
        expected = dict(trainer.model.named_parameters())
        assert max(float(weight.grad.abs().max()) for _, weight in _adapters(self.module)) > 1e-3
        for name, weight in _adapters(self.module):
            torch.testing.assert_close(weight.grad, expected[self._name(name)].grad, **TOLERANCE)

    def _name(self, name: str) -> str:
        end = name.split("layers.")[1]
        return f"{self.adapters[end]}layers.{end}"


def _adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if "lora_" in name and ".ref." not in name]


def settings(folder: Path) -> dict[str, Any]:
    off = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
    return {"output_dir": str(folder), "max_length": None, "per_device_train_batch_size": 4, **off}


def stacked(sides: list[Example], completion: str = "completion_mask") -> dict[str, Tensor]:
    """Answers as rows of TRL's batches."""
    length = max(len(side.tokens) for side in sides)
    tokens_AT = torch.tensor([side.tokens + [0] * (length - len(side.tokens)) for side in sides])
    labels_AT = torch.tensor([side.labels + [-100] * (length - len(side.labels)) for side in sides])
    lengths_A = torch.tensor([len(side.tokens) for side in sides])
    mask_AT = (torch.arange(length) < lengths_A[:, None]).long()
    supervised = labels_AT if completion == "labels" else (labels_AT != -100).long()
    return {"input_ids": tokens_AT, "attention_mask": mask_AT, completion: supervised}


def with_role(compared: Compared, *roles: str) -> list[Example]:
    return [side for role, side in compared.sides if role in roles]


def text_rows(folder: Path) -> Path:
    return write_pairs(folder / "rows.jsonl", 4, pictures=False)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_dpo_on_text(loss_type: Any, tiny_llm: Path, tmp_path: Path) -> None:
    compared = Compared(make_module(DPOLitModule, tiny_llm, None, loss_type=loss_type, beta=0.3), text_rows(tmp_path))
    config = DPOConfig(**settings(tmp_path), beta=0.3, loss_type=[loss_type])
    model = AutoModelForCausalLM.from_pretrained(tiny_llm)
    trainer = compared.theirs(DPOTrainer, config, model, PAIRS, tiny_llm, "layers")
    batch = stacked([*with_role(compared, "chosen"), *with_role(compared, "rejected")])
    compared.assert_same(trainer, trainer._compute_loss(trainer.model, batch, False))


def llava_of(module: PreferenceLitModule, llm: Path, clip: Path) -> LlavaForConditionalGeneration:
    """LLaVA of transformers with the weights of our parts."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**LLAMA),
        image_token_id=module.processor.chat.media_ids["image"],
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model, language = LlavaForConditionalGeneration(config), AutoModelForCausalLM.from_pretrained(llm)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(clip).state_dict())
    model.model.multi_modal_projector.load_state_dict(module.model.image_projector.state_dict())
    return model


def test_dpo_on_pictures(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    compared = Compared(make_module(DPOLitModule, tiny_llm, tiny_clip, beta=0.3), write_pairs(tmp_path / "rows.jsonl", 4))
    model = llava_of(compared.module, tiny_llm, tiny_clip)
    trainer = compared.theirs(DPOTrainer, DPOConfig(**settings(tmp_path), beta=0.3), model, PAIRS, tiny_llm, "language_model")
    sides = [*with_role(compared, "chosen"), *with_role(compared, "rejected")]
    batch = stacked(sides) | {"pixel_values": torch.stack([item.media for side in sides for item in side.media["image"]])}
    compared.assert_same(trainer, trainer._compute_loss(trainer.model, batch, False))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: Any, tiny_llm: Path, tmp_path: Path) -> None:
    module = make_module(KTOLitModule, tiny_llm, None, loss_type=loss_type, undesirable_weight=1.5)
    compared = Compared(module, text_rows(tmp_path))
    config = KTOConfig(**settings(tmp_path), loss_type=loss_type, undesirable_weight=1.5)
    model = AutoModelForCausalLM.from_pretrained(tiny_llm)
    trainer = compared.theirs(KTOTrainer, config, model, FEEDBACK, tiny_llm, "layers")
    answers = compared.batch["answers"]
    batch = stacked(with_role(compared, "desirable", "undesirable"))
    batch["label"] = torch.tensor([role == "desirable" for role, _ in compared.sides])
    if loss_type == "kto":
        mismatched = [_row(compared, number) for number, role in enumerate(answers["roles"]) if role == "mismatched"]
        batch |= {f"KL_{name}": values for name, values in stacked(mismatched).items()}
    compared.assert_same(trainer, trainer._compute_loss(trainer.model, batch, False))


def _row(compared: Compared, number: int) -> Example:
    """An answer of the batch as a sequence of its own: its prompt and its branch, without the bridge."""
    answers, batch = compared.batch["answers"], compared.batch
    row, branch = int(answers["row_A"][number]), int(answers["branch_A"][number])
    branches_T = batch["branches_BT"][row]
    is_own_T = (batch["segments_BT"][row] > 0) & ((branches_T == 0) | (branches_T == branch))
    tokens, labels = (batch[name][row][is_own_T].tolist() for name in ("tokens_BT", "labels_BT"))
    return Example(compared.sides[0][1].origin, "", tokens, labels)


@pytest.mark.parametrize("kind", [CPOLitModule, SimPOLitModule])
def test_without_a_reference(kind: type[PreferenceLitModule], tiny_llm: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"beta": 2.0, "gamma": 0.7} if kind is SimPOLitModule else {"beta": 0.2, "nll_weight": 0.5}
    compared = Compared(make_module(kind, tiny_llm, None, **options), text_rows(tmp_path))
    own = (
        {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}
        if kind is SimPOLitModule
        else {"loss_type": "sigmoid", "cpo_alpha": 0.5}
    )
    config = CPOConfig(**settings(tmp_path), beta=options["beta"], **own)
    model = AutoModelForCausalLM.from_pretrained(tiny_llm)
    trainer = compared.theirs(CPOTrainer, config, model, PAIRS, tiny_llm, "layers")
    batch = {
        f"{role}_{name}": values
        for role in ("chosen", "rejected")
        for name, values in stacked(with_role(compared, role), "labels").items()
    }
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    compared.assert_same(trainer, loss)


def _to_its_end(side: Example) -> Example:
    """TRL scores the last token of a sequence, ours the end token, which the template lets a line break follow."""
    end = max(place for place, label in enumerate(side.labels) if label != -100) + 1
    return replace(side, tokens=side.tokens[:end], labels=side.labels[:end])


def test_reward_model(tiny_llm: Path, tmp_path: Path) -> None:
    compared = Compared(make_module(RewardLitModule, tiny_llm, None, centering=0.1), text_rows(tmp_path))
    model = LlamaForSequenceClassification.from_pretrained(tiny_llm, num_labels=1)
    config = RewardConfig(**settings(tmp_path), center_rewards_coefficient=0.1)
    rows = {name: PAIRS[name] for name in ("chosen", "rejected")}
    trainer = compared.theirs(RewardTrainer, config, model, rows, tiny_llm, "layers")
    trainer.model.config.pad_token_id = 0  # with which `stacked` pads
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "score" in name and name.endswith("weight"):
                weight.copy_(compared.module.reward_head.score.weight)
    batch = stacked([_to_its_end(side) for role in ("chosen", "rejected") for side in with_role(compared, role)])
    compared.assert_same(
        trainer, trainer.compute_loss(trainer.model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    )
