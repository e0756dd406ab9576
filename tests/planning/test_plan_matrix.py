"""Every recipe, under every objective and every way to spread it, in rows and packed: it is planned, or refused in words."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import yaml
from jsonargparse import Namespace

from lightning_modules.commands import Setup
from planning.devices import Device
from planning.placement import placement_of
from planning.run import Run, plan_run
from tests.test_recipes import CONFIGS, OBJECTIVES, RECIPES, ROOT, SHORT, Folders
from train import main

STRATEGIES = ("", "ddp", "fsdp", "tp", "deepspeed_zero3_offload")
REFUSED = (
    "model.reference is FrozenCopy, which shares weights",
    "trainer.strategy would shard or split the model, which a reward",
    "model.optimizer.fused is true, which steps all weights at a time, and with tensor_parallel_size",
)
"""What training refuses, too: a reference or a head beside weights in shares, a fused step of weights of which some are split."""


class Combination(NamedTuple):
    """A recipe, what it is to learn, how batches are made, and the overlay that spreads it; empty: one device."""

    recipe: str
    objective: str
    kind: Literal["rows", "packed"]
    strategy: str


ALL = [Combination(*each) for each in product(sorted(RECIPES), ["", *OBJECTIVES], ("rows", "packed"), STRATEGIES)]
FEW = [
    Combination("image", "kto", "rows", "ddp"),
    Combination("audio", "orpo", "packed", "deepspeed_zero3_offload"),
    Combination("image", "", "packed", "tp"),
    Combination("qwen_audio", "mdpo", "rows", ""),
    Combination("qwen_vl", "", "packed", "fsdp"),
    Combination("qwen_vl", "dpo", "rows", "tp"),
    Combination("tiny", "reward", "rows", "ddp"),
    Combination("video", "", "rows", "tp"),
]
"""Each objective but those that share a loss, each strategy, and both kinds of batches."""
MORE = ALL[::37]
"""All 800 would take more than an hour."""

Try = Callable[[Combination], str]


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Iterator[Try]:
    """`plan_of(combination)`: plans it, of parts from the hub tiny local ones; the refusal, or nothing."""
    path = tmp_path_factory.mktemp("matrix")
    setups: dict[tuple[str, str, str], Setup] = {}

    def keep(setup: Setup) -> None:
        """Keeps what `plan` would get."""
        kept.append(setup)

    kept: list[Setup] = []

    def parse(recipe: str, objective: str, kind: str) -> Setup:
        given = {**SHORT, **RECIPES[recipe], "data.batching.kind": kind, "data.batching.max_tokens": "400"}
        options = [f"--{name}={value.format_map(Folders(path, model_folder))}" for name, value in given.items()]
        configs = [f"sft/{recipe}", *([f"objective/{objective}"] if objective else [])]
        main(["plan", *(f"--config=configs/{config}.yaml" for config in configs), *options])
        return kept.pop()

    def run(each: Combination) -> str:
        if each[:3] not in setups:
            setups[each[:3]] = parse(*each[:3])
        setup = setups[each[:3]]
        trainer = setup.trainer.clone()
        if each.strategy:
            trainer.strategy = overlay(each.strategy)
        placement = placement_of(trainer, 2 if each.strategy else 1)
        try:
            plan = plan_run(Run(setup.model, setup.datamodule, trainer, placement, Device("any", 40.0)))
        except ValueError as error:
            return str(error)
        assert plan.flops > 0 and plan.fits(Device("any", 40.0))
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        patch.setattr("train.plan", keep)
        yield run


def overlay(name: str) -> Namespace:
    """`trainer.strategy` as an overlay of configs/strategy has it."""
    spec: dict[str, Any] = yaml.safe_load((CONFIGS / f"strategy/{name}.yaml").read_text(encoding="utf-8"))["trainer"]["strategy"]
    return Namespace(class_path=spec["class_path"], init_args=Namespace(spec["init_args"]))


@pytest.mark.parametrize("each", FEW, ids="-".join)
def test_some_are_planned(each: Combination, plan_of: Try) -> None:
    assert plan_of(each) == ""


@pytest.mark.slow
@pytest.mark.parametrize("each", MORE, ids="-".join)
def test_more_are_planned_or_refused(each: Combination, plan_of: Try) -> None:
    refusal = plan_of(each)
    assert not refusal or refusal.startswith(REFUSED)
