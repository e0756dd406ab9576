"""What a module says of its objective and its optimizer, and which differences are refused."""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR, StepLR

from lightning_modules.criteria import MultimodalConsistencyScorer, ReferenceCriterion
from lightning_modules.dpo import DPOLitModule
from lightning_modules.optim import WarmupCosine
from lightning_modules.recipe import (
    check_objective,
    check_optimizer,
    describe,
    describe_optimizer,
    describe_schedule,
    given_options,
    keep_how_computed,
    new_curve,
)
from lightning_modules.reward_model import RewardLitModule
from models.reward_head import RewardHead
from tests.lightning_modules.preference_fakes import make_module


class Base:
    def __init__(self, model: str, rate: float = 0.5, *, kept: bool = False) -> None: ...


class Silent(Base):
    """Has no constructor of its own."""


class Own(Silent):
    def __init__(self, *args: Any, rate: float = 0.25, own: int = 1, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("cls", "args", "kwargs", "expected"),
    [
        (Base, ("a",), {}, {"model": "a", "rate": 0.5, "kept": False}),
        (Base, ("a", 0.1), {"kept": True}, {"model": "a", "rate": 0.1, "kept": True}),
        (Own, ("a",), {"own": 3}, {"model": "a", "rate": 0.25, "kept": False, "own": 3}),
        (Own, (), {"model": "b", "kept": True}, {"model": "b", "rate": 0.25, "kept": True, "own": 1}),
    ],
)
def test_options_have_their_names(cls: type, args: Any, kwargs: Any, expected: Any) -> None:
    assert given_options(cls, args, kwargs) == expected


@dataclass(frozen=True)
class Options:
    sizes: tuple[int, ...] = (1, 2)
    folder: Path = Path("a/b")


class Slotted:
    __slots__ = ("a",)


def test_options_are_described_as_json() -> None:
    module = f"{__name__}."
    assert describe({"a": (1, None, "b"), 2: {"z", "y"}}) == {"a": [1, None, "b"], "2": ["y", "z"]}
    assert describe([Options(), Base]) == [{"class_path": f"{module}Options", "sizes": [1, 2], "folder": "a/b"}, f"{module}Base"]
    assert describe(torch.sigmoid) != describe(torch.tanh)
    assert describe(partial(Base, "a", rate=1)) == {"partial": f"{module}Base", "args": ["a"], "rate": 1}
    assert describe(Slotted()) == {"class_path": f"{module}Slotted"}
    scorer = describe(ReferenceCriterion(weight=2.0, scorer=MultimodalConsistencyScorer(scale=0.75)))["scorer"]
    assert (scorer["center"], scorer["scale"]) == (0.0, 0.75)  # of an object that is no dataclass, too


class TestObjective:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"beta": 5.0}, r"model\.beta = 0\.1, but here it is 5\.0\. A run.*--model\.init_from instead of --ckpt_path"),
            (
                {"loss_type": {"sigmoid": 0.8, "sft": 0.2}, "label_smoothing": 0.1},
                r"model\.loss_type = sigmoid, but here it is \{'sigmoid': 0\.8.*\}; model\.label_smoothing = 0\.0, .* 0\.1",
            ),
            ({"warmup_ratio": 0.5}, r"model\.warmup_ratio = 0\.03"),
            ({"reward_criteria": [ReferenceCriterion(scorer=MultimodalConsistencyScorer(center=1.0))]}, "reward_criteria"),
        ],
    )
    def test_another_option_is_refused(self, tiny_llm: Path, options: Any, match: str) -> None:
        saved, now = (make_module(DPOLitModule, tiny_llm, None, **given).objective() for given in ({}, options))
        check_objective(saved, saved)
        with pytest.raises(ValueError, match=match):
            check_objective(now, saved)

    def test_what_changes_nothing_that_is_learnt_may_be_another(self, tiny_llm: Path) -> None:
        free = {"on_non_finite": "skip", "init_from": "other.ckpt", "lr_factor": 0.5}  # the rates are compared
        saved, now = (make_module(DPOLitModule, tiny_llm, None, **given).objective() for given in ({}, free))
        assert saved == now

    def test_a_subclass_adds_such_options(self, tiny_llm: Path) -> None:
        class Plotted(DPOLitModule):
            free_options = DPOLitModule.free_options | {"plot_every"}

            def __init__(self, *args: Any, plot_every: int = 10, margin: float = 0.0, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        options = ({}, {"plot_every": 5, "on_non_finite": "skip"}, {"margin": 0.5})
        saved, free, other = (make_module(Plotted, tiny_llm, None, **given).objective() for given in options)
        assert saved == free
        with pytest.raises(ValueError, match=r"model\.margin = 0\.0, but here it is 0\.5"):
            check_objective(other, saved)

    def test_another_class_is_refused(self, tiny_llm: Path) -> None:
        saved, now = (make_module(kind, tiny_llm, None).objective() for kind in (DPOLitModule, RewardLitModule))
        with pytest.raises(
            ValueError, match=r"with DPOLitModule \(lightning_modules\.dpo.*the model is RewardLitModule.*init_from"
        ):
            check_objective(now, saved)

    def test_so_is_another_part_that_is_not_the_models(self, tiny_llm: Path) -> None:
        class Scaled(RewardHead):
            def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        def objective(**options: Any) -> dict[str, Any]:
            return make_module(RewardLitModule, tiny_llm, None, **options).objective()

        check_objective(objective(reward_head=RewardHead()), objective())
        with pytest.raises(ValueError, match=r"trained with reward_head\.scale = 1\.0, but here it is 2\.0"):
            check_objective(objective(reward_head=Scaled(scale=2.0)), objective(reward_head=Scaled()))

    def test_a_copy_has_it_too(self, tiny_llm: Path) -> None:
        module = make_module(DPOLitModule, tiny_llm, None, beta=0.7)
        assert copy.deepcopy(module).objective() == module.objective()
        assert module.objective()["init_args"]["beta"] == 0.7


def groups(*rates: float, **options: Any) -> list[dict[str, Any]]:
    return [{"name": f"part{i}", "params": [nn.Parameter(torch.ones(2))], "lr": lr, **options} for i, lr in enumerate(rates)]


def recipe(optimizer: torch.optim.Optimizer, *schedules: Any) -> dict[str, Any]:
    return {"optimizers": [describe_optimizer(optimizer)], "schedules": [describe_schedule(made) for made in schedules]}


class TestOptimizer:
    def test_is_described_before_its_first_step(self) -> None:
        optimizer = torch.optim.AdamW(groups(1e-3, 2e-4), weight_decay=0.1, fused=True)
        plain = recipe(torch.optim.AdamW(groups(1e-3, 2e-4), weight_decay=0.1, foreach=False))
        found = recipe(optimizer, WarmupCosine(optimizer, 10, 5))
        assert optimizer.param_groups[0]["lr"] == 0.0
        assert found["optimizers"] == plain["optimizers"]
        assert (
            found["optimizers"][0]["groups"]["part1"].items() >= {"lr": 2e-4, "betas": [0.9, 0.999], "weight_decay": 0.1}.items()
        )
        assert found["schedules"][0]["curve"] == {"total_steps": 10, "warmup_steps": 5, "min_ratio": 0.0}

    @pytest.mark.parametrize(
        ("now", "match"),
        [
            (torch.optim.AdamW(groups(1e-3, 3e-4)), r"with lr = 0\.0002, but here it is 0\.0003 \(of part1\)\. A run goes on"),
            (torch.optim.AdamW(groups(1e-5, 1e-5)), r"lr = 0\.0002, .*\(of part1\); lr = 0\.001, .*\(of part0\)"),
            (torch.optim.AdamW(groups(1e-3, 2e-4), betas=(0.9, 0.95)), r"betas = \[0\.9, 0\.999\].*\(of part0, part1\)"),
            (torch.optim.AdamW(groups(1e-3)), r"the groups part0, part1, but here they are part0"),
            (torch.optim.SGD(groups(1e-3, 2e-4)), r"AdamW as optimizer, but here it is torch\.optim\.sgd\.SGD.*init_from"),
        ],
    )
    def test_another_is_refused(self, now: torch.optim.Optimizer, match: str) -> None:
        saved = recipe(torch.optim.AdamW(groups(1e-3, 2e-4)))
        with pytest.raises(ValueError, match=match):
            check_optimizer(recipe(now), saved)

    def test_so_is_another_schedule(self) -> None:
        def made(kind: Any, **options: Any) -> dict[str, Any]:
            optimizer = torch.optim.SGD(groups(0.1))
            return recipe(optimizer, kind(optimizer, **options))

        def in_turn(optimizer: Any, milestone: int) -> SequentialLR:
            both = [StepLR(optimizer, 3), CosineAnnealingLR(optimizer, 9)]
            return SequentialLR(optimizer, both, milestones=[milestone])

        check_optimizer(made(StepLR, step_size=3), made(StepLR, step_size=3))
        check_optimizer(made(in_turn, milestone=4), made(in_turn, milestone=4))
        with pytest.raises(ValueError, match=r"StepLR\.gamma = 0\.1, but here it is 0\.5"):
            check_optimizer(made(StepLR, step_size=3, gamma=0.5), made(StepLR, step_size=3))
        with pytest.raises(ValueError, match=r"SequentialLR\._milestones = \[4\]"):
            check_optimizer(made(in_turn, milestone=5), made(in_turn, milestone=4))
        with pytest.raises(ValueError, match=r"StepLR as schedule, but here it is .*WarmupCosine"):
            check_optimizer(made(WarmupCosine, total_steps=9, warmup_steps=0), made(StepLR, step_size=3))

    def test_a_run_of_another_length_is_no_other_schedule_but_is_said(self) -> None:
        def made(total: int, warmup: int) -> dict[str, Any]:
            optimizer = torch.optim.SGD(groups(0.1))
            return recipe(optimizer, WarmupCosine(optimizer, total, warmup))

        check_optimizer(made(40, 4), made(10, 0))
        assert new_curve(made(10, 1), made(10, 1), 10) == ""
        said = new_curve(made(20, 0), made(10, 0), 10)
        assert "is now one of 20 steps, and was one of 10" in said and "with 0.5 of the full rate instead of 0" in said

    def test_how_a_step_is_computed_is_said_by_the_run_at_hand(self) -> None:
        saved, own = (torch.optim.AdamW(groups(0.1, 0.2), fused=fused) for fused in (False, True))
        state = saved.state_dict()
        keep_how_computed(state["param_groups"], own.param_groups)
        assert [(group["fused"], group["lr"]) for group in state["param_groups"]] == [(True, 0.1), (True, 0.2)]
        keep_how_computed(state["param_groups"], torch.optim.SGD(groups(0.1, 0.2), fused=False).param_groups)
        assert "momentum" not in state["param_groups"][0] and state["param_groups"][0]["fused"] is False
