import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from callback_fakes import FakeData, FakeModule, good_batch, make_trainer
from torch import Tensor, nn

from encoders.base import Part
from encoders.tuning import Tune
from lightning_modules.optim import WarmupCosine, check_takes_shares, clip_gradients, parameter_groups


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.table = nn.Module()
        self.table.bias = nn.Parameter(torch.randn(2, 2, generator=torch.Generator().manual_seed(20)))


def part(module: nn.Module, lr: float | None = None) -> Part:
    made = Part(Tune(mode="full", lr=lr))
    made.module = module
    return made


class TestParameterGroups:
    def test_parts_and_decay(self) -> None:
        projector, model = Gated(), nn.Linear(2, 2, bias=False)
        groups = parameter_groups({"image_projector": part(projector, 1e-3), "language_model": part(model)})

        decay, no_decay, language = groups
        assert decay == {"name": "image_projector", "params": [projector.linear.weight], "lr": 1e-3}
        assert {name: no_decay[name] for name in ("name", "weight_decay", "lr")} == {
            "name": "image_projector/no_decay",
            "weight_decay": 0.0,
            "lr": 1e-3,
        }
        expected = [projector.gate, projector.linear.bias, projector.norm.weight, projector.norm.bias, projector.table.bias]
        assert {id(p) for p in no_decay["params"]} == {id(p) for p in expected}
        assert len(no_decay["params"]) == len(expected)
        assert language == {"name": "language_model", "params": [model.weight]}

    def test_optimizer_takes_them(self) -> None:
        parts = {"image_projector": part(Gated(), 1e-3), "language_model": part(nn.Linear(2, 2))}
        optimizer = torch.optim.AdamW(parameter_groups(parts), lr=2e-4, weight_decay=0.1)
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
            ("image_projector", 1e-3, 0.1),
            ("image_projector/no_decay", 1e-3, 0.0),
            ("language_model", 2e-4, 0.1),
            ("language_model/no_decay", 2e-4, 0.0),
        ]
        torch.optim.Rprop(parameter_groups(parts))  # has no weight decay

    def test_shared_and_frozen_parameters(self) -> None:
        first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        second.weight = first.weight
        frozen = nn.Linear(2, 2).requires_grad_(False)
        groups = parameter_groups({"a": part(first), "b": part(second), "c": part(frozen, 1e-3)})
        assert [(g["name"], [id(p) for p in g["params"]]) for g in groups] == [
            ("a", [id(first.weight)]),
            ("b/no_decay", [id(second.bias)]),
        ]

    def test_nothing_to_train_is_refused(self) -> None:
        frozen = nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(ValueError, match=r"\(image_encoder, language_model\).*tune\.mode"):
            parameter_groups({"image_encoder": part(frozen), "language_model": part(frozen)})


def optimizer_of(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs])


def rates(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


class TestWarmupCosine:
    @pytest.mark.parametrize(("total", "warmup"), [(20, 5), (20, 0), (1, 0), (7, 7), (4, 9)])
    @pytest.mark.parametrize("min_ratio", [0.0, 0.1])
    def test_is_that_of_transformers(self, total: int, warmup: int, min_ratio: float) -> None:
        from transformers.optimization import (
            get_cosine_schedule_with_warmup,
            get_cosine_with_min_lr_schedule_with_warmup,
        )

        ours, theirs = optimizer_of(1e-3, 2e-4), optimizer_of(1e-3, 2e-4)
        if min_ratio == 0:
            expected = get_cosine_schedule_with_warmup(theirs, warmup, total)
        else:
            expected = get_cosine_with_min_lr_schedule_with_warmup(theirs, warmup, total, min_lr_rate=min_ratio)
        got = rates(ours, WarmupCosine(ours, total, warmup, min_ratio), total + 1)
        for a, b in zip(got, rates(theirs, expected, total + 1), strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-18)

    def test_literal_values(self) -> None:
        optimizer = optimizer_of(1.0)
        got = rates(optimizer, WarmupCosine(optimizer, total_steps=6, warmup_steps=2, min_ratio=0.2), 9)
        cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * p)) for p in (0, 0.25, 0.5, 0.75)]
        assert [lr for (lr,) in got] == pytest.approx([0, 0.5, *cosine, 0.2, 0.2, 0.2])  # and stays at its end

    def test_resumes(self) -> None:
        optimizer = optimizer_of(1e-3, 2e-4)
        schedule = WarmupCosine(optimizer, 20, 5, 0.1)
        rates(optimizer, schedule, 8)
        saved = optimizer.state_dict(), schedule.state_dict()
        expected = rates(optimizer, schedule, 12)

        resumed = optimizer_of(1e-3, 2e-4)
        resumed_schedule = WarmupCosine(resumed, 20, 5, 0.1)
        resumed.load_state_dict(saved[0])
        resumed_schedule.load_state_dict(saved[1])
        assert rates(resumed, resumed_schedule, 12) == expected

    def test_a_longer_run_decays_to_its_own_end(self) -> None:
        optimizer = optimizer_of(1.0)
        schedule = WarmupCosine(optimizer, 10, 0)
        rates(optimizer, schedule, 5)
        longer = optimizer_of(1.0)
        longer_schedule = WarmupCosine(longer, 40, 0)
        longer.load_state_dict(optimizer.state_dict())
        longer_schedule.load_state_dict(schedule.state_dict())
        got = [lr for (lr,) in rates(longer, longer_schedule, 36)]
        assert got == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 40)) for step in range(5, 41)])

    def test_so_does_one_whose_rate_is_a_tensor(self) -> None:
        optimizer, longer = (optimizer_of(torch.tensor(1.0), torch.tensor(0.5)) for _ in range(2))  # type: ignore[arg-type]
        schedule, longer_schedule = WarmupCosine(optimizer, 4, 0), WarmupCosine(longer, 8, 0)
        for _ in range(4):
            optimizer.step()
            schedule.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.0, 0.0]
        longer.load_state_dict(optimizer.state_dict())
        longer_schedule.load_state_dict(schedule.state_dict())
        assert [float(group["lr"]) for group in longer.param_groups] == pytest.approx([0.5, 0.25])

    @pytest.mark.parametrize(
        ("total", "warmup", "min_ratio", "message"),
        [(0, 0, 0.0, "total_steps"), (math.inf, 0, 0.0, "max_steps"), (5, -1, 0.0, "warmup_steps"), (5, 1, 1.5, "min_ratio")],
    )
    def test_options_out_of_range_are_refused(self, total: float, warmup: int, min_ratio: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WarmupCosine(optimizer_of(1.0), total, warmup, min_ratio)


def clipped(folder: Path, precision: Any, **options: Any) -> list[Tensor]:
    """The weights after two steps with clipping."""
    torch.manual_seed(2)

    class Module(FakeModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, eps=1.0, **options)

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    module = Module()
    trainer = make_trainer(folder, [], precision=precision, gradient_clip_val=1e-3, max_steps=2)
    trainer.fit(module, datamodule=FakeData([good_batch(), good_batch()]))
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_optimizer_is_clipped_like_another(tmp_path: Path, precision: Any) -> None:
    fused, plain = (clipped(tmp_path, precision, fused=on) for on in (True, False))
    for own, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_optimizer_of_8_bits_trains_nearly_like_one_of_32(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(7)
    start, gradients = torch.randn(80, 80, generator=generator), torch.randn(5, 80, 80, generator=generator)
    ends = []
    for make in (AdamW8bit, torch.optim.AdamW):
        weight = nn.Parameter(start.clone())
        optimizer = make([{"name": "part", "params": [weight]}], lr=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
        if make is AdamW8bit:
            assert optimizer.state[weight]["state1"].dtype == torch.uint8
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            torch.load(tmp_path / "state.pt", weights_only=True)
    assert (ends[0] - ends[1]).norm() < 0.1 * ends[1].norm()


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon, torch.optim.LBFGS, AdamW8bit])
def test_optimizers_that_need_whole_weights_take_no_shares(kind: type[torch.optim.Optimizer]) -> None:
    weights = [torch.nn.Parameter(torch.randn(4, 4))]
    with pytest.raises(ValueError, match=f"{kind.__name__}, which looks at more than one value.*ddp.yaml"):
        check_takes_shares(kind(weights))
    for fine in (torch.optim.AdamW, torch.optim.SGD):
        check_takes_shares(fine(weights))
