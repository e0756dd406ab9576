"""TRL's own trainers and ours compute the same: on fresh numbers, on a tiny Llama and on a tiny LLaVA, each with LoRA.

Needs requirements-parity.txt; left out where TRL is not installed. The models' gradients are those of all adapters.

Shape suffixes: B rows, T tokens, S supervised positions, A answers, P pairs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_TOKEN, LLAMA, VISION, randomise_adapters
from torch import Tensor, nn

from lightning_modules.dpo_kinds import DPOOptions
from lightning_modules.feedback_losses import kto, mismatched_kl
from lightning_modules.logprobs import AnswerLogps, score_tokens
from lightning_modules.losses import supervised, supervised_rows
from lightning_modules.pair_logps import Loss, pair_logps, token_nll, wpo_importance
from lightning_modules.preference_losses import dpo
from lightning_modules.reference_free_losses import cpo, orpo, simpo

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-parity.txt")
pytestmark = pytest.mark.slow

from datasets import Dataset
from loss_cases import CASES, Case, our_loss, random_inputs
from peft import LoraConfig
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_losses import DIVERGENCES, trl_loss

from tests.tiny import make_tokenizer

TEXTS = [
    ("What is in this picture?", " A red bus waits.", " There are three birds at the corner."),
    ("How many birds are there?", " There are three birds in it.", " Two."),
    ("Is the cat black or white?", " The cat is white.", " It is a boat on the water, a blue one."),
    ("Name the animal.", " The animal is a small brown dog.", " A cat."),
]
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=r".*(q_proj|v_proj|down_proj)", task_type="CAUSAL_LM")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_losses_on_fresh_numbers(name: str, seed: int) -> None:
    inputs = random_inputs(seed)
    gradients = []
    values = []
    for loss_of in (our_loss, trl_loss):
        policy_S = inputs.policy_S.clone().requires_grad_()
        result = loss_of(CASES[name], inputs, policy_S)
        loss = result[0] / result[1] if loss_of is our_loss else result[0]
        loss.backward()
        values.append(loss.detach())
        gradients.append(policy_S.grad)
    torch.testing.assert_close(*values, **TOLERANCE)
    torch.testing.assert_close(*gradients, **TOLERANCE)


def spread(model: nn.Module) -> nn.Module:
    """Weights so large that each token matters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def tiny_llama() -> LlamaForCausalLM:
    return spread(LlamaForCausalLM(LlamaConfig(**LLAMA)))


def tiny_llava() -> LlavaForConditionalGeneration:
    return spread(
        LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**VISION),
                text_config=LlamaConfig(**LLAMA | {"vocab_size": IMAGE_TOKEN + 1}),
                image_token_id=IMAGE_TOKEN,
                vision_feature_layer=-2,
            )
        )
    )


def settings(folder: Path) -> dict[str, Any]:
    off = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
    return {"output_dir": str(folder), "max_length": None, "per_device_train_batch_size": 4, **off}


def train_with(make: type, config: Any, model: nn.Module, rows: dict[str, list], folder: Path) -> Any:
    trainer = make(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=make_tokenizer(folder, "chatml"),
        peft_config=LORA,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        randomise_adapters(trainer.model)
    return trainer


def pair_rows() -> dict[str, list]:
    return {name: [text[i] for text in TEXTS] for i, name in enumerate(("prompt", "chosen", "rejected"))}


@pytest.fixture(scope="module")
def dpo_trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TRL's trainer around a Llama and around a LLaVA, and a batch for each: for LLaVA each prompt has a picture."""
    folder = tmp_path_factory.mktemp("dpo")
    config = DPOConfig(**settings(folder), use_weighting=True)  # so that its forward gives what WPO needs
    trainers = {
        name: train_with(DPOTrainer, config, make(), pair_rows(), folder)
        for name, make in (("llama", tiny_llama), ("llava", tiny_llava))
    }
    collate = trainers["llama"].data_collator
    batch = collate([trainers["llama"].train_dataset[i] for i in range(len(TEXTS))])
    pictures = torch.randn(len(TEXTS), 3, 32, 32, generator=torch.Generator().manual_seed(5)).repeat(2, 1, 1, 1)
    placeholders = torch.full((len(pictures), 16), IMAGE_TOKEN)
    with_pictures = {
        "input_ids": torch.cat([placeholders, batch["input_ids"]], 1),
        "attention_mask": F.pad(batch["attention_mask"], (16, 0), value=1),
        "completion_mask": F.pad(batch["completion_mask"], (16, 0)),
        "pixel_values": pictures,
    }
    return {"llama": (trainers["llama"], batch), "llava": (trainers["llava"], with_pictures)}


def our_answers(trainer: Any, batch: dict[str, Tensor], labels_BT: Tensor) -> tuple[AnswerLogps, Tensor]:
    """Log-probabilities of a batch with one answer a row, by our operator, and log sum p^2."""
    base = trainer.model.get_base_model()
    inputs = {name: x for name, x in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    hidden_SD, labels_S = supervised(base.model(**inputs, use_cache=False).last_hidden_state, labels_BT)
    scores = score_tokens(hidden_SD, base.lm_head, labels_S, chunk_size=7, want=("log_square",))
    return AnswerLogps(scores.logps_S, supervised_rows(labels_BT), len(labels_BT)), scores.statistics["log_square"]


def with_reference(trainer: Any, batch: dict[str, Tensor], labels_BT: Tensor) -> tuple[AnswerLogps, AnswerLogps, Tensor]:
    policy, log_square_S = our_answers(trainer, batch, labels_BT)
    with trainer.model.disable_adapter(), torch.no_grad():
        reference, _ = our_answers(trainer, batch, labels_BT)
    return policy, reference, log_square_S


def assert_same(trainer: Any, theirs: Tensor, ours: Tensor) -> None:
    """Loss and the gradients of all adapters."""
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapters
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # LLaVA does not use the last layer of its vision tower
    gradients, expected = (
        torch.autograd.grad(loss, list(adapters.values()), allow_unused=True, materialize_grads=True) for loss in (ours, theirs)
    )
    assert max(x.abs().max() for x in expected) > 1e-3
    for name, gradient, wanted in zip(adapters, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


def mean(loss: Loss) -> Tensor:
    return loss[0] / loss[1]


@pytest.mark.parametrize("model", ["llama", "llava"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loss == "dpo"])
def test_dpo(dpo_trainers: dict[str, Any], model: str, name: str) -> None:
    trainer, batch = dpo_trainers[model]
    options = dict(CASES[name].options)
    kinds, ld_alpha, wpo = options.pop("kinds"), options.pop("ld_alpha", None), options.pop("wpo", False)
    numbers = DPOOptions(**options)
    trainer.loss_types, trainer.loss_weights = list(kinds), list(kinds.values())
    trainer.beta, trainer.label_smoothing = numbers.beta, numbers.label_smoothing
    trainer.f_divergence_type = DIVERGENCES.get(numbers.divergence, numbers.divergence)
    trainer.f_alpha_divergence_coef, trainer.args.discopop_tau = numbers.divergence_alpha, numbers.discopop_tau
    trainer.ld_alpha, trainer.use_weighting = ld_alpha, wpo
    theirs = trainer._compute_loss(trainer.model, dict(batch), False)

    labels_BT = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    pairs_P2 = torch.arange(len(labels_BT)).view(2, -1).T
    policy, reference, log_square_S = with_reference(trainer, batch, labels_BT)
    importance_P = wpo_importance(policy, log_square_S, pairs_P2) if wpo else None
    alpha = 1.0 if ld_alpha is None else ld_alpha
    loss = dpo(
        pair_logps(policy, pairs_P2, alpha), pair_logps(reference, pairs_P2, alpha), kinds, numbers, importance_P=importance_P
    )
    assert_same(trainer, theirs, mean(loss))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loss == "kto"])
def test_kto(tmp_path: Path, name: str) -> None:
    options = CASES[name].options
    weights = {side: options[side] for side in ("desirable_weight", "undesirable_weight") if side in options}
    config = KTOConfig(**settings(tmp_path), loss_type=options.get("kind", "kto"), beta=options.get("beta", 0.1), **weights)
    rows = {"prompt": [t[0] for t in TEXTS], "completion": [t[1 + i % 2] for i, t in enumerate(TEXTS)]}
    trainer = train_with(KTOTrainer, config, tiny_llama(), rows | {"label": [True, False, False, True]}, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(TEXTS))])
    theirs = trainer._compute_loss(trainer.model, dict(batch), False)

    labels_BT = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    policy, reference, _ = with_reference(trainer, batch, labels_BT)
    kl = torch.tensor(0.0)
    if "KL_input_ids" in batch:
        mismatched = {name.removeprefix("KL_"): x for name, x in batch.items() if name.startswith("KL_")}
        labels_KT = mismatched["input_ids"].masked_fill(mismatched["completion_mask"] == 0, -100)
        policy_kl, reference_kl, _ = with_reference(trainer, mismatched, labels_KT)
        total, count = mismatched_kl(policy_kl.sums(), reference_kl.sums())
        kl = total / count
    assert_same(trainer, theirs, mean(kto(policy.sums(), reference.sums(), batch["label"].bool(), kl, **options)))


def concatenated(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """TRL's batch of CPO and ORPO as rows: chosen, then rejected."""
    width = max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))

    def rows(field: str, padding: int) -> Tensor:
        sides = (batch[f"{side}_{field}"] for side in ("chosen", "rejected"))
        return torch.cat([F.pad(x, (0, width - x.shape[1]), value=padding) for x in sides])

    return {"input_ids": rows("input_ids", 0), "attention_mask": rows("attention_mask", 0)}, rows("labels", -100)


def reference_free(make: type, config: Any, folder: Path) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """TRL's trainer, rows and labels of its batch, and its loss."""
    trainer = train_with(make, config, tiny_llama(), pair_rows(), folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(TEXTS))])
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    return trainer, *concatenated(batch), theirs


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loss in ("cpo", "simpo")])
def test_cpo_and_simpo(tmp_path: Path, name: str) -> None:
    case: Case = CASES[name]
    options = {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0} | case.options
    is_simpo = case.loss == "simpo"
    config = CPOConfig(
        **settings(tmp_path),
        loss_type="simpo" if is_simpo else options.get("kind", "sigmoid"),
        beta=options["beta"],
        label_smoothing=options["label_smoothing"],
        cpo_alpha=options["nll_weight"],
        simpo_gamma=options.get("gamma", 0.0),
        alpha=options.get("alpha", 0.0),
    )
    trainer, rows, labels_BT, theirs = reference_free(CPOTrainer, config, tmp_path)
    policy, _ = our_answers(trainer, rows, labels_BT)
    pairs = pair_logps(policy, torch.arange(len(labels_BT)).view(2, -1).T)
    assert_same(trainer, theirs, mean((simpo if is_simpo else cpo)(pairs, **case.options)))


def test_orpo_but_for_the_likelihood_of_the_prompt(tmp_path: Path) -> None:
    """TRL's likelihood goes over the prompt, ours over the answer: with its own in the place of ours, the two are the same."""
    trainer, rows, labels_BT, theirs = reference_free(ORPOTrainer, ORPOConfig(**settings(tmp_path), beta=0.3), tmp_path)
    policy, _ = our_answers(trainer, rows, labels_BT)
    pairs = pair_logps(policy, torch.arange(len(labels_BT)).view(2, -1).T)
    whole_BT = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)[: len(TEXTS)]
    whole, _ = our_answers(trainer, {name: x[: len(TEXTS)] for name, x in rows.items()}, whole_BT)
    loss = mean(orpo(pairs, beta=0.3))
    assert (loss - theirs).abs() > 1e-2
    assert_same(trainer, theirs, loss - token_nll(pairs) - whole.logps_S.mean())
