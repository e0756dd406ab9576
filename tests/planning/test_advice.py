"""What is advised where a run does not fit: first what touches the part that takes most, and nothing that does not help."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from encoders.image import TimmEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.dpo import DPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from models.language import LanguageModel
from planning.advice import LEAST_GAIN, Advice, Refused, advise
from planning.devices import Device
from planning.gradients import STATES
from planning.outline import make_outline
from planning.placement import ONE_DEVICE, Placement, check_placement
from planning.run import Plan, Run, plan_run
from planning.zero import MASTERS, Zero
from tests.lightning_modules.media_fakes import write_media_rows
from tests.lightning_modules.preference_fakes import make_module
from tests.lightning_modules.run_fakes import make_data, write_rows
from tests.planning.test_outline import SMALL, language_model
from train import main

VIT = "vit_tiny_patch16_224"
TOWER, DECODER = (f"--model.{name}.tune.activation_checkpointing true" for name in ("image_encoder", "language_model"))
Advised = tuple[Plan, list[Advice], list[Refused]]


@pytest.fixture
def advise_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Advised]:
    """The plan of a module on rows with pictures, and what is advised to get along with a share of its memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def plan(module: MultiModalLitModule, share: float = 0.01, placement: Placement = ONE_DEVICE) -> Advised:
        data = make_data(module, write_rows(tmp_path / "rows.jsonl", 8), batch_size=8)
        trainer = Namespace(devices=1, num_nodes=1, strategy="auto", precision="32-true", max_steps=2)
        run = Run(module, data, trainer, placement, Device("any", 1e9, context_gib=1e-6))
        planned = plan_run(run)
        small = Device("small", share * planned.total / 2**30, context_gib=1e-6)
        return planned, *advise(replace(run, device=small), planned)

    return plan


@pytest.fixture
def advised(make_lit_module: Callable[..., Any], tiny_llm: Path, advise_on: Callable[..., Advised]) -> Callable[..., Advised]:
    """The same of a tiny decoder behind a tower of twelve blocks, or another one."""

    def plan(tower: Tune, share: float = 0.01, llm: Path = tiny_llm, name: str = VIT, **options: Any) -> Advised:
        encoder = TimmEncoder(model_name=name, pretrained=False, image_size=160, tune=tower)
        return advise_on(make_lit_module(image_encoder=encoder, language_model=LanguageModel(str(llm), **options)), share)

    return plan


def test_a_tower_that_trains_is_computed_again_where_it_takes_most(advised: Any) -> None:
    plan, advice, _ = advised(Tune(mode="full"), 0.8)
    of_tower, of_decoder = (plan.memory[f"activations of {name}"] for name in ("image_encoder", "language_model"))
    assert of_tower > 0.5 * plan.total > of_decoder
    [only] = advice
    assert only.flags == TOWER and only.fits and only.total < plan.total - of_tower / 2


def test_each_change_helps_and_what_a_part_does_not_have_is_not_advised(advised: Any) -> None:
    """A frozen tower keeps nothing for a backward pass, and a projector has no blocks."""
    tune = Tune(mode="lora", lora=LoRA(target_modules=("q_proj",)))
    plan, advice, _ = advised(Tune(mode="frozen"), tune=tune)
    flags = [change.flags for change in advice]
    assert flags[0] == "--model.image_encoder.dtype bfloat16", "its weights take most"
    assert any(flag.startswith("--data.batch_size 4 --trainer.accumulate_grad_batches 2") for flag in flags)
    assert TOWER not in flags and not any("projector" in flag for flag in flags)
    totals = [plan.total, *(change.total for change in advice)]
    assert all(after < (1 - LEAST_GAIN) * before for before, after in pairwise(totals))
    assert not advice[-1].fits


def test_an_optimizer_of_8_bits_keeps_the_rates_of_the_other(advised: Any, model_folder: Callable[[str], Path]) -> None:
    _, advice, _ = advised(Tune(mode="frozen"), llm=model_folder("llama_64"), tune=Tune(mode="full"))
    [flags] = [change.flags for change in advice if "AdamW8bit" in change.flags]
    assert flags == "--model.optimizer bitsandbytes.optim.AdamW8bit --model.optimizer.lr 0.0002 --model.optimizer.weight_decay 0"


def test_a_refusal_is_shown(advised: Any) -> None:
    """Blocks whose batch norms train cannot be computed again."""
    _, advice, refused = advised(Tune(mode="full"), 0.95, name="resnet10t")
    assert advice and TOWER not in [change.flags for change in advice]
    [why] = [change.why for change in refused if change.flags == TOWER]
    assert "running statistics of its batch norms" in why


@pytest.mark.parametrize(("mode", "gib"), [("full", 0.0273), ("frozen", 0.023)])
def test_the_tower_of_a_ready_model(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, gib: float
) -> None:
    """Is computed again where it trains, by an option of the model. With what is advised the run takes what was promised."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("planning.devices.find_device", lambda name: Device("small", float(name), context_gib=1e-6))
    rows = {
        name: str(write_media_rows(tmp_path / f"{name}.jsonl", [kind] * 4)) for name, kind in (("images", "i"), ("clips", "v"))
    }
    paths = [
        f"--data.sources.{name}.{option}={value}"
        for name, path in rows.items()
        for option, value in (("train_path", path), ("media_root", str(tmp_path)))
    ]
    of_model = {"name_or_path": model_folder("qwen2_5_vl"), "vision_tune.mode": mode, "image_resize.shortest_edge": 200_000}
    options = [*paths, *(f"--model.language_model.{name}={value}" for name, value in of_model.items())]

    def planned(gib: float, *flags: str) -> dict[str, Any]:
        path = tmp_path / "plan.json"
        main(["plan", "--config=configs/sft/qwen_vl.yaml", *options, f"--device={gib}", f"--json={path}", *flags])
        return json.loads(path.read_text(encoding="utf-8"))

    [change] = planned(gib)["advice"]
    assert (change["flags"] == "--model.language_model.vision_tune.activation_checkpointing true") == (mode == "full")
    if mode == "full":
        assert planned(1.0, *change["flags"].split())["total"] == change["total"]


def test_state_may_be_offloaded(advise_on: Any, make_lit_module: Callable[..., Any], model_folder: Callable[[str], Path]) -> None:
    module = make_lit_module(language_model=LanguageModel(str(model_folder("llama_64")), tune=Tune(mode="full")))
    plan, advice, _ = advise_on(module, 0.6, Placement(2, is_sharded=True, zero=Zero(3, reduce_bucket_size=1000)))
    place = [change.flags for change in advice].index("--trainer.strategy.offload_optimizer true")
    before = advice[place - 1].total if place else plan.total
    assert advice[place].total <= before - plan.memory[STATES] - plan.memory[MASTERS]
    plan, advice, _ = advise_on(module, 0.6, Placement(2, is_sharded=True))
    place = [change.flags for change in advice].index("--trainer.strategy.offload true")
    before = advice[place - 1].total if place else plan.total
    assert advice[place].total <= before - plan.memory[STATES]


def test_weights_may_be_cut(
    advise_on: Any, make_lit_module: Callable[..., Any], tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a decoder of 12 layers, of which one and a copy of it are whole at a time."""
    monkeypatch.setattr("planning.zero.PREFETCHED", 1000)
    config = SMALL | {"vocab_size": 1000, "intermediate_size": 1024, "num_hidden_layers": 12}
    decoder = language_model(tmp_path, tiny_llm, config, tune=Tune(mode="lora", activation_checkpointing=True))
    _, advice, _ = advise_on(make_lit_module(language_model=decoder), 0.9, Placement(8, zero=Zero(reduce_bucket_size=1000)))
    assert advice[0].flags == "--trainer.strategy.stage 3"


def test_what_training_refuses_is_refused(tiny_llm: Path, tiny_clip: Path) -> None:
    """A reference that is a copy of a projector cannot stand beside weights in shards."""
    outline = make_outline(make_module(DPOLitModule, tiny_llm, tiny_clip, image_projector=MLPProjector()))
    check_placement(outline, Placement(2, has_buckets=True))
    for placement in (Placement(2, is_sharded=True), Placement(2, zero=Zero())):
        with pytest.raises(ValueError, match=r"model\.reference is FrozenCopy"):
            check_placement(outline, placement)
