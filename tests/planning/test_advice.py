"""What is advised where a run does not fit: first what touches the part that takes most, and nothing that does not help."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from encoders.image import TimmEncoder
from encoders.tuning import LoRA, Tune
from models.language import LanguageModel
from planning.advice import LEAST_GAIN, Advice, advise
from planning.devices import Device
from planning.placement import Placement
from planning.run import Plan, Run, plan_run
from tests.lightning_modules.run_fakes import make_data, write_rows

TOWER, DECODER = (f"--model.{name}.tune.activation_checkpointing true" for name in ("image_encoder", "language_model"))


@pytest.fixture
def advised(
    make_lit_module: Callable[..., Any], tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Plan, list[Advice]]]:
    """The plan of a tiny decoder behind a tower of twelve blocks, and what is advised to get along with a share of its memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def plan(
        tower: Tune, share: float = 0.01, precision: str = "32-true", llm: Path = tiny_llm, **options: Any
    ) -> tuple[Plan, list[Advice]]:
        encoder = TimmEncoder(model_name="vit_tiny_patch16_224", pretrained=False, image_size=160, tune=tower)
        module = make_lit_module(image_encoder=encoder, language_model=LanguageModel(str(llm), **options))
        data = make_data(module, write_rows(tmp_path / "rows.jsonl", 8), batch_size=8)
        trainer = Namespace(devices=1, num_nodes=1, strategy="auto", precision=precision, max_steps=2)
        run = Run(module, data, trainer, Placement(), Device("any", 1e9, context_gib=1e-6))
        planned = plan_run(run)
        small = Device("small", share * planned.total / 2**30, context_gib=1e-6)
        return planned, advise(Run(module, data, trainer, Placement(), small), planned)

    return plan


def test_a_tower_that_trains_is_computed_again_where_it_takes_most(advised: Any) -> None:
    plan, advice = advised(Tune(mode="full"), 0.8)
    of_tower, of_decoder = (plan.memory[f"activations of {name}"] for name in ("image_encoder", "language_model"))
    assert of_tower > 0.5 * plan.total > of_decoder
    [only] = advice
    assert only.flags == TOWER and only.fits and only.total < plan.total - of_tower / 2


def test_each_change_helps_and_what_a_part_does_not_have_is_not_advised(advised: Any) -> None:
    """A frozen tower keeps nothing for a backward pass, and a projector has no blocks."""
    tune = Tune(mode="lora", lora=LoRA(target_modules=("q_proj",)))
    plan, advice = advised(Tune(mode="frozen"), tune=tune)
    flags = [change.flags for change in advice]
    assert flags[0] == "--model.image_encoder.dtype bfloat16", "its weights take most"
    assert any(flag.startswith("--data.batch_size 4 --trainer.accumulate_grad_batches 2") for flag in flags)
    assert TOWER not in flags and not any("projector" in flag for flag in flags)
    totals = [plan.total, *(change.total for change in advice)]
    assert all(after < (1 - LEAST_GAIN) * before for before, after in pairwise(totals))
    assert not advice[-1].fits


def test_an_optimizer_of_8_bits_keeps_the_rates_of_the_other(advised: Any, model_folder: Callable[[str], Path]) -> None:
    _, advice = advised(Tune(mode="frozen"), llm=model_folder("llama_64"), tune=Tune(mode="full"))
    [flags] = [change.flags for change in advice if "AdamW8bit" in change.flags]
    assert flags == "--model.optimizer bitsandbytes.optim.AdamW8bit --model.optimizer.lr 0.0002 --model.optimizer.weight_decay 0"
