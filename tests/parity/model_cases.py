"""A tiny Llama and a tiny LLaVA, each with LoRA, and answers for them: what losses are computed on to the last adapter.

All numbers are drawn by numpy's RandomState, which draws the same in all versions: a file holds what TRL makes of them.

Shape suffixes: S tokens, A answers, T tokens of a row, D width, R rewards.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from conftest import IMAGE_TOKEN
from loss_cases import LENGTHS, PAIRS_P2, Case, Inputs, our_loss
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX
from lightning_modules.logprobs import score_tokens
from lightning_modules.losses import supervised
from lightning_modules.pair_logps import mean
from tests.tiny_configs import LLAMA, VISION

Family = Literal["llama", "llava"]
FAMILIES: tuple[Family, ...] = ("llama", "llava")
GOLDEN = Path(__file__).parent / "golden_models.json"
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": r".*(q_proj|v_proj|down_proj)"}
NUM_PAIRS = len(PAIRS_P2)
PROMPT_LENGTHS = [5, 3, 6, 4]
"""Tokens of the prompts, behind the picture; answer number i belongs to prompt i modulo 4."""

MARGIN_P = torch.tensor([0.3, 0.0, 1.2, 0.7])


def base_model(family: Family, rewards: bool = False) -> nn.Module:
    """A model of transformers with drawn weights, so large that each token matters; with `rewards` it has a scalar head."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
    from transformers import LlamaForSequenceClassification as LlamaWithRewards

    text = LlamaConfig(**LLAMA | {"vocab_size": IMAGE_TOKEN + 1, "pad_token_id": 0, "num_labels": 1})
    if family == "llama":
        model = (LlamaWithRewards if rewards else LlamaForCausalLM)(text)
    else:
        vision = CLIPVisionConfig(**VISION)
        options = {"image_token_id": IMAGE_TOKEN, "vision_feature_layer": -2, "num_labels": 1}
        config = LlavaConfig(vision_config=vision, text_config=text, **options)
        model = (llava_with_rewards if rewards else LlavaForConditionalGeneration)(config)
    return draw(model, 3, std=0.2)


def llava_with_rewards(config: Any) -> nn.Module:
    """LLaVA with a scalar head: transformers has none, but what all such models of its own are made of."""
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

    class LlavaForSequenceClassification(GenericForSequenceClassification, LlavaPreTrainedModel):
        pass

    return LlavaForSequenceClassification(config)


def draw(model: nn.Module, seed: int, std: float, only: str = "") -> nn.Module:
    """Draws the weights whose names hold `only`."""
    numbers = np.random.RandomState(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if only in name:
                weight.copy_(torch.from_numpy(std * numbers.standard_normal(tuple(weight.shape))))
    return model


def with_adapters(family: Family, rewards: bool = False) -> nn.Module:
    """The model with its adapters, by PEFT."""
    from peft import LoraConfig, get_peft_model

    return draw_adapters(get_peft_model(base_model(family, rewards), LoraConfig(**LORA)))


def draw_adapters(model: nn.Module) -> nn.Module:
    """Adapters that count, LoRA's B among them."""
    return draw(model, 4, std=0.3, only="lora_")


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def along_directions(model: nn.Module, loss: Tensor) -> list[float]:
    """The derivative of a loss for each adapter along a drawn direction of length 1: one number that the whole gradient is in."""
    numbers = np.random.RandomState(11)
    weights = [weight for _, weight in sorted(adapters(model).items())]
    found = []
    # LLaVA does not use the last layer of its vision tower
    for gradient in torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True):
        direction = torch.from_numpy(numbers.standard_normal(tuple(gradient.shape)))
        found.append(float((gradient.double() * direction).sum() / direction.norm()))
    return found


class Answers:
    """Eight answers to four prompts, those of LLaVA behind pictures, as rows that are padded on the right."""

    def __init__(self, family: Family) -> None:
        numbers = np.random.RandomState(7)
        self.family = family
        self.prompts = [numbers.randint(3, LLAMA["vocab_size"], length) for length in PROMPT_LENGTHS]
        self.answers = [numbers.randint(3, LLAMA["vocab_size"], length) for length in LENGTHS]
        self.pictures = torch.from_numpy(numbers.standard_normal((NUM_PAIRS, 3, 32, 32))).float()

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Each answer behind its own prompt: the chosen ones, then the rejected ones."""
        return self._rows(range(len(LENGTHS)))

    @cached_property
    def mismatched(self) -> dict[str, Tensor]:
        """To each prompt the answer that is the next row's."""
        return self._rows([(number + 1) % len(LENGTHS) for number in range(len(LENGTHS))])

    @property
    def pixels(self) -> dict[str, Tensor]:
        """The picture of each row, as a model takes it."""
        return {} if self.family == "llama" else {"pixel_values": self.pictures.repeat(2, 1, 1, 1)}

    def _rows(self, numbers: Any) -> dict[str, Tensor]:
        picture = [IMAGE_TOKEN] * (16 if self.family == "llava" else 0)
        prompts = [[*picture, *self.prompts[row % NUM_PAIRS]] for row in range(len(LENGTHS))]
        rows = [(prompt, [*self.answers[number]]) for prompt, number in zip(prompts, numbers, strict=True)]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        sides = {"input_ids": (0, 0, 0), "attention_mask": (1, 1, 0), "completion_mask": (0, 1, 0)}
        columns: dict[str, list[list[int]]] = {name: [] for name in sides}
        for prompt, answer in rows:
            padding = width - len(prompt) - len(answer)
            columns["input_ids"].append([*map(int, prompt), *map(int, answer), *[0] * padding])
            for name in ("attention_mask", "completion_mask"):
                before, of_answer, after = sides[name]
                columns[name].append([before] * len(prompt) + [of_answer] * len(answer) + [after] * padding)
        return {name: torch.tensor(column) for name, column in columns.items()}


def labels_of(rows: dict[str, Tensor], mask: str = "completion_mask") -> Tensor:
    """The tokens that a loss is on."""
    return rows["input_ids"].masked_fill(rows[mask] == 0, IGNORE_INDEX)


def _hidden(model: Any, rows: dict[str, Tensor], answers: Answers) -> Tensor:
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")} | answers.pixels
    return model.get_base_model().model(**inputs, use_cache=False).last_hidden_state


def _scores(model: Any, rows: dict[str, Tensor], answers: Answers, labels_AT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability and log sum p^2 of each token, by our operator."""
    hidden_SD, labels_S = supervised(_hidden(model, rows, answers), labels_of(rows) if labels_AT is None else labels_AT)
    scores = score_tokens(hidden_SD, model.get_base_model().lm_head, labels_S, chunk_size=7, want=("log_square",))
    return scores.logps_S, scores.statistics["log_square"]


@torch.no_grad()
def inputs_of(model: Any, answers: Answers) -> Inputs:
    """What losses take, of a model with adapters: its own, and without them those of the reference."""
    policy_S, log_square_S = _scores(model, answers.rows, answers)
    mismatched_S, _ = _scores(model, answers.mismatched, answers)
    with model.disable_adapter():
        reference_S, _ = _scores(model, answers.rows, answers)
        against_S, _ = _scores(model, answers.mismatched, answers)
    lengths = [LENGTHS[(number + 1) % len(LENGTHS)] for number in range(len(LENGTHS))]
    policy_A, reference_A = (torch.stack([own.sum() for own in x.split(lengths)]) for x in (mismatched_S, against_S))
    return Inputs(policy_S, reference_S, log_square_S, policy_A, reference_A, MARGIN_P)


def our_model_loss(case: Case, model: Any, answers: Answers, inputs: Inputs | None) -> Tensor:
    """A case as this repository computes it, of a model; `inputs` are of it, and a reward model has none.

    That of ORPO has the likelihood over prompt and answer, as TRL has it, in the place of that over the answer.
    """
    if case.loss == "reward":
        last_A = answers.rows["attention_mask"].sum(1) - 1
        rewards_R = model.get_base_model().score(_hidden(model, answers.rows, answers))[torch.arange(len(last_A)), last_A, 0]
        ends_S = torch.tensor(LENGTHS).cumsum(0) - 1
        policy_S = rewards_R.new_zeros(sum(LENGTHS)).index_add(0, ends_S, rewards_R)  # whose sums are the rewards
        inputs = Inputs(*[policy_S] * 5, MARGIN_P)  # of which only the margins are read
    else:
        assert inputs is not None
        policy_S, _ = _scores(model, answers.rows, answers)
    total, count, _ = our_loss(case, inputs, policy_S)
    if case.loss != "orpo":
        return mean(total, count)
    whole_S, _ = _scores(model, answers.rows, answers, _of_chosen(labels_of(answers.rows, "attention_mask")))
    chosen_S = policy_S[: sum(LENGTHS[:NUM_PAIRS])]
    return mean(total, count) + chosen_S.mean() - whole_S.mean()


def _of_chosen(labels_AT: Tensor) -> Tensor:
    return torch.cat([labels_AT[:NUM_PAIRS], torch.full_like(labels_AT[NUM_PAIRS:], IGNORE_INDEX)])
