"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3, on the CPU, learn what one process learns, with rows of any kinds."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders.tuning import Tune
from lightning_modules import zero as zero_module
from lightning_modules.callbacks import FirstStepCheck, PartTable, RunSummary, Throughput
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.dpo import DPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.samples import SamplePage
from lightning_modules.zero import ZeroPrecision, ZeroStrategy
from models.cross_attention import GatedCrossAttentionFusion
from models.generation import Generation
from models.stored import num_weights
from tests.faults.small_runs import end_state
from tests.faults.small_runs import same as identical
from tests.lightning_modules import test_exact_weighting, test_strategies
from tests.lightning_modules.media_fakes import make_all, write_media_rows
from tests.lightning_modules.preference_fakes import sgd
from tests.lightning_modules.processes import MakeStrategy, flat, in_two_processes, zero, zero3
from tests.lightning_modules.run_fakes import make_data, make_trainer
from tests.lightning_modules.test_exact_weighting import Job
from tests.lightning_modules.test_strategies import HOW, LORA, PACKS, same

train, job = test_strategies.train, test_exact_weighting.job  # fixtures


@pytest.fixture
def deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "case", ["lora", "accumulate", "last", "full", "offload", "bf16", "crossing", "narrow", "usual", "packed"]
)
def test_two_processes_learn_what_one_learns(train: Callable[..., None], tmp_path: Path, case: str, stage: int) -> None:
    """With LoRA, and gradients that are clipped; with batches accumulated, the last step of an epoch a shorter one, and a
    process whose batch has no row, also in the last one before validation; in full, not clipped; with the state of the
    optimizer (and the shares of the weights) in the memory of the machine; in bf16-mixed, nearly; with blocks in the decoder that
    look at media; with frozen weights in bfloat16 and activations that are computed again, also in bf16-mixed; and with packs, of
    which one has a single row."""
    options: dict[str, dict[str, Any]] = {
        "lora": {},
        "accumulate": {"accumulate_grad_batches": 2, "bad": 3, "max_epochs": 2},
        "last": {"bad": 9, "max_epochs": 2},
        "full": {"tune": Tune(mode="full"), "gradient_clip_val": None},
        "offload": {"accumulate_grad_batches": 2},
        "bf16": {"precision": "bf16-mixed"},
        "crossing": {"fusion": GatedCrossAttentionFusion(every=2, num_heads=2, head_dim=8), "bad": 3, "max_epochs": 2},
        "narrow": {"tune": replace(LORA, activation_checkpointing=True), "narrow": True},
        "usual": {"tune": replace(LORA, activation_checkpointing=True), "narrow": True, "precision": "bf16-mixed"},
        "packed": {"batching": PACKS},
    }
    strategy = partial(
        zero, stage=stage, offload_optimizer=case == "offload", offload_parameters=case == "offload" and stage == 3
    )
    train(tmp_path / "one", {}, batch_size=2, **options[case])
    assert in_two_processes(train, tmp_path / "two", strategy=strategy, batch_size=1, **options[case]) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", 5e-3 if case in ("bf16", "usual") else 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        *[("zero", "zero"), ("zero", "one"), ("one", "zero"), ("fsdp", "zero"), ("zero", "fsdp")],
        *[("zero3", "zero3"), ("zero3", "one"), ("one", "zero3"), ("zero", "zero3")],
    ],
)
def test_a_run_goes_on_with_another_strategy(train: Callable[..., None], tmp_path: Path, first: str, then: str) -> None:
    """Bit for bit where it is the same one."""

    def run(name: str, folder: Path, **options: Any) -> None:
        strategy, batch_size = (HOW | {"zero": (zero, 1), "zero3": (zero3, 1)})[name]
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
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_is_over_can_be_saved_by_hand(
    tiny_llm: Path, tiny_clip: Path, tiny_whisper: Path, tmp_path: Path, stage: int
) -> None:
    """On a GPU Lightning has moved the model away by then, which here stays where it is: it is brought back in any case."""
    rows = write_media_rows(tmp_path / "rows.jsonl", ("i", "", "va", "i"))

    def run(folder: Path, options: dict[str, Any]) -> None:
        torch.manual_seed(4)
        module, strategy, moves = make_all(tiny_llm, tiny_clip, tiny_whisper), options["strategy"], []
        checkpoint = RunCheckpoint(every_n_train_steps=1)
        trainer = make_trainer(folder, checkpoint, plugins=[CheckpointFile()], **options)
        trainer.fit(module, make_data(module, rows, batch_size=1))
        move = strategy.model_to_device
        strategy.model_to_device = lambda: moves.append(move())
        trainer.save_checkpoint(folder / "by_hand.ckpt")
        assert moves and trainer.global_step == 2

    assert in_two_processes(run, tmp_path / "two", strategy=partial(zero, stage=stage)) == [0, 0]
    names = ("by_hand.ckpt", "checkpoints/last.ckpt")
    by_hand, last = (torch.load(tmp_path / "two" / name, weights_only=True) for name in names)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert identical(by_hand[name], last[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_so_do_pairs(job: Callable[..., Job], tmp_path: Path, stage: int) -> None:
    """Whose loss has terms that count different things."""
    run = job(DPOLitModule, loss_type={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    run(tmp_path / "one", {}, 8, 1)
    assert in_two_processes(run, tmp_path / "two", strategy=partial(zero, stage=stage), batch_size=2, accumulate=2) == [0, 0]
    for rank in range(2):
        test_exact_weighting.same(tmp_path / "one", tmp_path / "two", rank)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [zero, zero3, flat], ids=["zero", "zero3", "flat"])
def test_they_measure_and_answer_as_one_does(
    tiny_llm: Path, tiny_clip: Path, tiny_whisper: Path, tmp_path: Path, strategy: MakeStrategy
) -> None:
    """With a model that was trained so, and a new one from its checkpoint; not so in stage 2, a process has shares of its layers.

    Torch's first FSDP is the same in that."""
    if strategy is not flat:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    has_shares = strategy is not zero
    rows = write_media_rows(tmp_path / "rows.jsonl", ("i", "", "va", "i", "a"))

    def job(folder: Path, how: dict[str, Any], batch_size: int) -> None:
        def make() -> MultiModalLitModule:
            torch.manual_seed(4)
            options: dict[str, Any] = {"generation": Generation(max_new_tokens=6), "optimizer": sgd(0.3)}
            return make_all(tiny_llm, tiny_clip, tiny_whisper, **options)

        def numbers(path: Path | None) -> tuple[dict[str, float], dict[int, str]]:
            data = make_data(module, rows, val_path=str(rows), eval_batch_size=batch_size)
            (metrics,) = trainer.validate(module, data, ckpt_path=path, verbose=False, weights_only=True)
            predicted: Any = trainer.predict(module, data)
            return dict(metrics), {row["line"]: row["response"] for batch in predicted for row in batch}

        module = make()
        callbacks = PartTable(), FirstStepCheck(), Throughput(), RunSummary(), SamplePage(2)  # the first are those of train.py
        trainer = make_trainer(folder, *callbacks, **how, plugins=[CheckpointFile()])
        data = make_data(module, rows, val_path=str(rows), shuffle=False, batch_size=batch_size)
        trainer.fit(module, data)
        trainer.save_checkpoint(folder / "end.ckpt")
        found = [numbers(None)]
        if has_shares and trainer.world_size > 1:
            with pytest.raises(ValueError, match="have been cut into shares.*make a new module"):
                trainer.fit(module, data)
        module = make()
        found.append(numbers(folder / "end.ckpt"))
        layers = list(module.model.language_model.decoder_layers.parameters())
        is_cut = sum(weight.numel() for weight in layers) < 0.6 * sum(num_weights(weight) for weight in layers)
        assert is_cut == (has_shares and trainer.world_size > 1)
        assert module.model.image_encoder is not None and all(x.numel() for x in module.model.image_encoder.parameters())
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    job(tmp_path / "one", {}, 2)
    assert in_two_processes(job, tmp_path / "two", strategy=strategy, batch_size=1) == [0, 0]
    (expected, again), first, second = (
        json.loads((tmp_path / path).read_text()) for path in ("one/0.json", "two/0.json", "two/1.json")
    )
    assert expected == again and len(set(expected[1].values())) > 1
    assert (tmp_path / "two/parts.json").read_text() == (tmp_path / "one/parts.json").read_text()
    for (metrics, answers), (other_metrics, other_answers) in zip(first, second, strict=True):
        assert metrics == pytest.approx(expected[0], abs=1e-5) and other_metrics == pytest.approx(expected[0], abs=1e-5)
        assert answers | other_answers == expected[1] and not answers.keys() & other_answers.keys()


@pytest.mark.usefixtures("deepspeed")
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="offload_parameters needs shares of the weights, which stage 3 has"):
        ZeroStrategy(stage=2, offload_parameters=True)
    with pytest.raises(ValueError, match=r"needs GPUs, and the device is NoneType.*fsdp\.yaml"):
        ZeroStrategy().setup_environment()
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", "zero.json")
    with pytest.raises(ValueError, match=r"PL_DEEPSPEED_CONFIG_PATH is set.*unset it"):
        ZeroStrategy()


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="precision is 16-mixed, but ZeroStrategy takes 32-true and bf16-mixed"):
        ZeroPrecision("16-mixed")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs DeepSpeed: pip install -r requirements-deepspeed\.txt"):
        ZeroStrategy()
