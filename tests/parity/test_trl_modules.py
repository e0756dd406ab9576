"""Our LitModules on rows of a file, prompts shared, against TRL's trainers on the same tokens, each answer in a row of its own.

The weights are the same, with the same LoRA; loss and the gradients of all adapters are compared. Needs requirements-parity.txt.

Shape suffixes: A answers, T tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_adapters
from torch import Tensor, nn

from datamodules.batch import Example
from lightning_modules.cpo import CPOLitModule
from lightning_modules.dpo import DPOLitModule
from lightning_modules.kto import KTOLitModule
from lightning_modules.orpo import ORPOLitModule
from lightning_modules.pair_logps import mean
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.reward_model import RewardLitModule
from lightning_modules.simpo import SimPOLitModule
from tests.lightning_modules.preference_fakes import LORA, make_module, write_pairs
from tests.lightning_modules.run_fakes import examples, make_data

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-parity.txt")
pytestmark = pytest.mark.slow

from datasets import Dataset
from model_cases import llava_with_rewards
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
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.tiny_configs import LLAMA, VISION

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

    def theirs(self, make: type, config: Any, model: nn.Module, rows: dict[str, list], llm: Path) -> Any:
        """A trainer of TRL around a model of transformers."""
        layers = "language_model" if "image" in self.batch else "layers"
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
        mean(total, count).backward()
        torch.testing.assert_close(mean(total, count).detach(), theirs.detach(), **TOLERANCE)
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


def pixels(sides: list[Example]) -> dict[str, Tensor]:
    """The pictures of answers, as a model of transformers takes them."""
    items = [item.media for side in sides for item in side.media.get("image", [])]
    return {"pixel_values": torch.stack(items)} if items else {}


@pytest.fixture(params=[None, "clip"], ids=["text", "pictures"])
def clip(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Path | None:
    """The vision tower of the module; None: its rows have no pictures."""
    return None if request.param is None else model_folder(request.param)


@pytest.fixture
def compare(clip: Path | None, tiny_llm: Path, tmp_path: Path) -> Callable[..., Compared]:
    """`compare(kind, **options)`: a module with four pairs."""

    def make(kind: type[PreferenceLitModule], **options: Any) -> Compared:
        rows = write_pairs(tmp_path / "rows.jsonl", 4, pictures=clip is not None)
        return Compared(make_module(kind, tiny_llm, clip, **options), rows)

    return make


def their_model(module: PreferenceLitModule, llm: Path, clip: Path | None) -> nn.Module:
    """A model of transformers with the weights of our parts."""
    return AutoModelForCausalLM.from_pretrained(llm) if clip is None else llava_of(module, llm, clip)


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


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_dpo(loss_type: Any, compare: Callable[..., Compared], clip: Path | None, tiny_llm: Path, tmp_path: Path) -> None:
    compared = compare(DPOLitModule, loss_type=loss_type, beta=0.3)
    config = DPOConfig(**settings(tmp_path), beta=0.3, loss_type=[loss_type])
    trainer = compared.theirs(DPOTrainer, config, their_model(compared.module, tiny_llm, clip), PAIRS, tiny_llm)
    sides = [*with_role(compared, "chosen"), *with_role(compared, "rejected")]
    compared.assert_same(trainer, trainer._compute_loss(trainer.model, stacked(sides) | pixels(sides), False))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: Any, compare: Callable[..., Compared], clip: Path | None, tiny_llm: Path, tmp_path: Path) -> None:
    compared = compare(KTOLitModule, loss_type=loss_type, undesirable_weight=1.5)
    config = KTOConfig(**settings(tmp_path), loss_type=loss_type, undesirable_weight=1.5)
    trainer = compared.theirs(KTOTrainer, config, their_model(compared.module, tiny_llm, clip), FEEDBACK, tiny_llm)
    answers = compared.batch["answers"]
    sides = with_role(compared, "desirable", "undesirable")
    batch = stacked(sides) | pixels(sides)
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
def test_without_a_reference(
    kind: type[PreferenceLitModule], compare: Callable[..., Compared], clip: Path | None, tiny_llm: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"beta": 2.0, "gamma": 0.7} if kind is SimPOLitModule else {"beta": 0.2, "nll_weight": 0.5}
    compared = compare(kind, **options)
    own = (
        {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}
        if kind is SimPOLitModule
        else {"loss_type": "sigmoid", "cpo_alpha": 0.5}
    )
    config = CPOConfig(**settings(tmp_path), beta=options["beta"], **own)
    trainer = compared.theirs(CPOTrainer, config, their_model(compared.module, tiny_llm, clip), PAIRS, tiny_llm)
    compared.assert_same(trainer, loss_of_sides(compared, trainer))


def loss_of_sides(compared: Compared, trainer: Any) -> Tensor:
    """The loss of those of TRL's trainers that take chosen and rejected answers apart."""
    sides = {role: with_role(compared, role) for role in ("chosen", "rejected")}
    batch = {f"{role}_{name}": x for role, own in sides.items() for name, x in stacked(own, "labels").items()}
    # TRL's hands no pictures on: the model that it is given has them already
    model = partial(trainer.model, **pixels([*sides["chosen"], *sides["rejected"]]))
    return trainer.get_batch_loss_metrics(model, batch)[0]


def test_orpo(compare: Callable[..., Compared], clip: Path | None, tiny_llm: Path, tmp_path: Path) -> None:
    """TRL's likelihood is that of prompt and answer; that of the answer, by transformers, is put in its place."""
    compared = compare(ORPOLitModule, odds_weight=0.3)
    config = ORPOConfig(**settings(tmp_path), beta=0.3)
    trainer = compared.theirs(ORPOTrainer, config, their_model(compared.module, tiny_llm, clip), PAIRS, tiny_llm)
    chosen = with_role(compared, "chosen")
    rows = stacked(chosen, "labels") | pixels(chosen)
    whole = rows | {"labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)}
    of_answer, of_both = (trainer.model(**x).loss for x in (rows, whole))
    compared.assert_same(trainer, loss_of_sides(compared, trainer) - of_both + of_answer)


def _to_its_end(side: Example) -> Example:
    """TRL scores the last token of a sequence, ours the end token, which the template lets a line break follow."""
    end = max(place for place, label in enumerate(side.labels) if label != -100) + 1
    return replace(side, tokens=side.tokens[:end], labels=side.labels[:end])


def test_reward_model(compare: Callable[..., Compared], clip: Path | None, tiny_llm: Path, tmp_path: Path) -> None:
    compared = compare(RewardLitModule, centering=0.1)
    if clip is None:
        model = LlamaForSequenceClassification.from_pretrained(tiny_llm, num_labels=1)
    else:
        llava = llava_of(compared.module, tiny_llm, clip)
        llava.config.num_labels = 1
        model = llava_with_rewards(llava.config)
        model.model.load_state_dict(llava.model.state_dict())
    config = RewardConfig(**settings(tmp_path), center_rewards_coefficient=0.1)
    rows = {name: PAIRS[name] for name in ("chosen", "rejected")}
    trainer = compared.theirs(RewardTrainer, config, model, rows, tiny_llm)
    trainer.model.config.get_text_config().pad_token_id = 0  # with which `stacked` pads
    head, own = trainer.model.get_submodule("base_model.model.score").weight, compared.module.reward_head.score.weight
    with torch.no_grad():
        head.copy_(own)
    head.requires_grad_()
    sides = [_to_its_end(side) for role in ("chosen", "rejected") for side in with_role(compared, role)]
    batch = {name: x for name, x in stacked(sides).items() if name != "completion_mask"} | pixels(sides)
    compared.assert_same(trainer, trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(own.grad, head.grad, **TOLERANCE)
