"""Two processes under DeepSpeed's ZeRO-2, on the CPU, learn what one process learns, with rows of any kinds."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from encoders.tuning import Tune
from lightning_modules import zero as zero_module
from lightning_modules.dpo import DPOLitModule
from lightning_modules.zero import ZeroPrecision, ZeroStrategy
from tests.faults.small_runs import end_state
from tests.faults.small_runs import same as identical
from tests.lightning_modules import test_exact_weighting, test_strategies
from tests.lightning_modules.processes import in_two_processes, zero
from tests.lightning_modules.test_exact_weighting import Job
from tests.lightning_modules.test_strategies import HOW, same

train, job = test_strategies.train, test_exact_weighting.job  # fixtures


@pytest.fixture
def deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("case", ["lora", "accumulate", "last", "full", "offload", "bf16"])
def test_two_processes_learn_what_one_learns(train: Callable[..., None], tmp_path: Path, case: str) -> None:
    """With LoRA, and gradients that are clipped; with batches accumulated, the last step of an epoch a shorter one, and a
    process whose batch has no row, also in the last one before validation; in full, not clipped; with the state of the
    optimizer in the memory of the machine; and in bf16-mixed, nearly."""
    options: dict[str, dict[str, Any]] = {
        "lora": {},
        "accumulate": {"accumulate_grad_batches": 2, "bad": 3, "max_epochs": 2},
        "last": {"bad": 9, "max_epochs": 2},
        "full": {"tune": Tune(mode="full"), "gradient_clip_val": None},
        "offload": {"accumulate_grad_batches": 2},
        "bf16": {"precision": "bf16-mixed"},
    }
    strategy = partial(zero, offload_optimizer=True) if case == "offload" else zero
    train(tmp_path / "one", {}, batch_size=2, **options[case])
    assert in_two_processes(train, tmp_path / "two", strategy=strategy, batch_size=1, **options[case]) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", 5e-3 if case == "bf16" else 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("first", "then"), [("zero", "zero"), ("zero", "one"), ("one", "zero"), ("fsdp", "zero"), ("zero", "fsdp")]
)
def test_a_run_goes_on_with_another_strategy(train: Callable[..., None], tmp_path: Path, first: str, then: str) -> None:
    """Bit for bit where it is the same one."""

    def run(name: str, folder: Path, **options: Any) -> None:
        strategy, batch_size = (HOW | {"zero": (zero, 1)})[name]
        if strategy is None:
            train(folder, {}, batch_size=batch_size, **options)
            (folder / "1.pt").symlink_to(folder / "0.pt")
        else:
            assert in_two_processes(train, folder, strategy=strategy, batch_size=batch_size, **options) == [0, 0]

    run("one" if then != first else first, tmp_path / "whole", max_steps=5)
    run(first, tmp_path / "first", max_steps=3)
    run(then, tmp_path / "then", resume=tmp_path / "first/checkpoints/last.ckpt", max_steps=5)
    same(tmp_path / "whole", tmp_path / "then", first_step=3)
    whole, resumed = end_state(tmp_path / "whole"), end_state(tmp_path / "then")
    if first == then:
        assert all(identical(whole[name], resumed[name]) for name in ("state_dict", "optimizer_states", "lr_schedulers"))
    assert whole["optimizer_states"][0]["state"].keys() == resumed["optimizer_states"][0]["state"].keys()


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
def test_so_do_pairs(job: Callable[..., Job], tmp_path: Path) -> None:
    """Whose loss has terms that count different things."""
    run = job(DPOLitModule, loss_type={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    run(tmp_path / "one", {}, 8, 1)
    assert in_two_processes(run, tmp_path / "two", strategy=zero, batch_size=2, accumulate=2) == [0, 0]
    for rank in range(2):
        test_exact_weighting.same(tmp_path / "one", tmp_path / "two", rank)


@pytest.mark.usefixtures("deepspeed")
def test_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stage is 3, and only 2.*media of other kinds.*fsdp\.yaml"):
        ZeroStrategy(stage=3).setup_environment()
    with pytest.raises(ValueError, match="stage is 1, and only 2"):
        ZeroStrategy(stage=1).setup_environment()


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="precision is 16-mixed, but ZeroStrategy takes 32-true and bf16-mixed"):
        ZeroPrecision("16-mixed")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs DeepSpeed: pip install -r requirements-deepspeed\.txt"):
        ZeroStrategy()
