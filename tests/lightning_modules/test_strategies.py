"""Models spread over two processes learn what one process learns: losses and weights are the same, with rows of any kinds."""

import errno
import os
import pickle
import resource
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.batching import Batching
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.dpo import DPOLitModule
from lightning_modules.flat_shards import FlatPrecision, FlatShardedStrategy
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.reward_model import RewardLitModule
from lightning_modules.strategies import METADATA, ShardedStrategy, ShardWriter
from models.checkpoint import read_checkpoint
from models.cross_attention import GatedCrossAttentionFusion
from models.fusion import Fusion
from models.language import LanguageModel
from models.manifest import read_manifest
from models.multimodal import MultiModalModel
from tests.lightning_modules import test_exact_weighting
from tests.lightning_modules.media_fakes import make_all, write_media_rows
from tests.lightning_modules.preference_fakes import make_module
from tests.lightning_modules.processes import MakeStrategy, ddp, flat, gathered, in_two_processes, sharded
from tests.lightning_modules.run_fakes import Watch, make_data, make_trainer, weights
from tests.lightning_modules.test_exact_weighting import Job

job = test_exact_weighting.job  # a fixture
LORA = Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")))
ROWS, PACKS = Batching(), Batching(kind="packed", max_tokens=76)
KINDS = ("i", "", "va", "i", "a", "", "iv", "a", "", "")
"""Of rows, which two processes take in turn: in most batches they have media of other kinds."""


fsdp, split = partial(sharded, tensor_parallel_size=1), partial(sharded, tensor_parallel_size=2)


def momentum(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def adam(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-3, **options)


def steady(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.fixture
def train(tiny_llm: Path, tiny_clip: Path, tiny_whisper: Path, tmp_path: Path) -> Callable[..., None]:
    """`train(folder, trainer_options, batch_size, ...)`: fits a model of all modalities; keeps losses, metrics and weights."""
    rows = write_media_rows(tmp_path / "rows.jsonl", KINDS)

    def job(
        folder: Path,
        trainer_options: dict[str, Any],
        batch_size: int,
        llm: Path = tiny_llm,
        tune: Tune = LORA,
        narrow: bool = False,
        fusion: Fusion | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] = momentum,
        batching: Batching = ROWS,
        resume: Path | None = None,
        bad: int | None = None,
        on_save_error: Literal["stop", "go_on"] = "stop",
        **more: Any,
    ) -> None:
        torch.manual_seed(4)
        stored: dict[str, Any] = {"dtype": "bfloat16", "compute_dtype": "float32"} if narrow else {}
        parts = {"language_model": LanguageModel(str(llm), tune=tune, **stored), "fusion": fusion}
        module = make_all(llm, tiny_clip, tiny_whisper, **parts, optimizer=optimizer, lr_scheduler=steady)
        path = rows
        if bad is not None:  # a row that cannot be used: a process has none in that batch
            lines = rows.read_text().splitlines()
            lines[bad] = "{}"
            path = rows.with_name("bad.jsonl")
            path.write_text("\n".join(lines) + "\n")
        losses: list[Tensor] = []

        def look(trainer: Any, module: Any) -> None:
            if trainer.global_step > len(losses) + start:
                losses.append(trainer.callback_metrics["train/loss"].clone())

        start = 0 if resume is None else 3
        batches: dict[str, Any] = {"batch_size": batch_size, "eval_batch_size": 2, "batching": batching}
        data = make_data(module, path, **batches, val_path=str(path), max_skipped=0.5, shuffle=False)
        callbacks = [Watch(look), RunCheckpoint(every_n_train_steps=3, on_save_error=on_save_error)]
        options = {"gradient_clip_val": 0.2, "plugins": [CheckpointFile()], **trainer_options, **more}
        trainer = make_trainer(folder, *callbacks, **options)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        folder.mkdir(exist_ok=True)
        with gathered(module):
            torch.save([weights(module), losses, metrics], folder / f"{trainer.global_rank}.pt")

    return job


def same(folder: Path, other: Path, error: float = 1e-6, first_step: int = 0) -> None:
    expected, all_losses, metrics = torch.load(folder / "0.pt", weights_only=True)
    losses = all_losses[first_step:]
    for rank in range(2):
        got, own_losses, own_metrics = torch.load(other / f"{rank}.pt", weights_only=True)
        assert len(losses) > 1 and losses[0] != losses[1]
        assert torch.allclose(torch.stack(losses), torch.stack(own_losses), atol=5 * error, rtol=0)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(got[name], tensor, atol=error, rtol=0), f"{name} {(got[name] - tensor).abs().max():.1e}"
        for name in ("val/loss", "val/exact_match"):
            assert own_metrics[name] == pytest.approx(metrics[name], abs=10 * error), name


@pytest.mark.parametrize(
    ("strategy", "batch_size", "error"),
    [
        pytest.param(fsdp, 1, 1e-6, id="fsdp"),
        pytest.param(flat, 1, 1e-6, id="flat"),
        pytest.param(ddp, 1, 1e-6, id="ddp", marks=pytest.mark.slow),
        pytest.param(split, 2, 1e-5, id="split", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(
    train: Callable[..., None], tmp_path: Path, strategy: MakeStrategy, batch_size: int, error: float
) -> None:
    train(tmp_path / "one", {}, batch_size=2)
    assert in_two_processes(train, tmp_path / "two", strategy=strategy, batch_size=batch_size) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "batch_size"), [(ddp, 1), (fsdp, 1), (flat, 1), (split, 2)], ids=["ddp", "fsdp", "flat", "split"]
)
@pytest.mark.parametrize("case", ["accumulate", "bad", "value", "precise"])
def test_so_they_do_in_other_ways(
    train: Callable[..., None], tmp_path: Path, strategy: MakeStrategy, batch_size: int, case: str
) -> None:
    """With batches accumulated; with a process whose batch has no row; clipped by value; not clipped, by another optimizer."""
    options: dict[str, dict[str, Any]] = {
        "accumulate": {"accumulate_grad_batches": 2},
        "bad": {"bad": 3},
        "value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        "precise": {"gradient_clip_val": None, "max_epochs": 2},
    }
    train(tmp_path / "one", {}, batch_size=2, **options[case])
    assert in_two_processes(train, tmp_path / "two", strategy=strategy, batch_size=batch_size, **options[case]) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", 1e-5 if strategy is split else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "batch_size"), [(fsdp, 1), (flat, 1), (split, 2)], ids=["fsdp", "flat", "split"])
@pytest.mark.parametrize("case", ["narrow", "crossing", "adam", "packed", "mixed"])
def test_so_do_models_of_other_kinds(
    train: Callable[..., None], tmp_path: Path, strategy: MakeStrategy, batch_size: int, case: str
) -> None:
    """With frozen weights in bfloat16 and activations that are computed again; with blocks in the decoder that look at media;
    with Adam, which where layers are sharded may step all weights at a time; with packs, of which one has a single row; and in
    bf16-mixed, nearly."""
    options: dict[str, dict[str, Any]] = {
        "narrow": {"tune": replace(LORA, activation_checkpointing=True), "narrow": True},
        "crossing": {"fusion": GatedCrossAttentionFusion(every=2, num_heads=2, head_dim=8), "bad": 3, "max_epochs": 2},
        "adam": {"optimizer": partial(adam, fused=strategy is not split)},
        "packed": {"batching": PACKS},
        "mixed": {"tune": Tune(mode="full"), "precision": "bf16-mixed"},
    }
    train(tmp_path / "one", {}, batch_size=2, **options[case])
    assert in_two_processes(train, tmp_path / "two", strategy=strategy, batch_size=batch_size, **options[case]) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", 5e-3 if case == "mixed" else 1e-5 if strategy is split else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "batch_size"), [(fsdp, 2), (flat, 2), (split, 4)], ids=["fsdp", "flat", "split"])
def test_so_do_pairs(job: Callable[..., Job], tmp_path: Path, strategy: MakeStrategy, batch_size: int) -> None:
    run = job(DPOLitModule, loss_type={"sigmoid": 0.8, "sft": 1.0})
    run(tmp_path / "one", {}, 8, 1)
    assert in_two_processes(run, tmp_path / "two", strategy=strategy, batch_size=batch_size, accumulate=2) == [0, 0]
    for rank in range(2):
        test_exact_weighting.same(tmp_path / "one", tmp_path / "two", rank)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_no_optimizer_steps_split_and_whole_weights_at_a_time(train: Callable[..., None], tmp_path: Path, option: str) -> None:
    def refused(folder: Path, trainer_options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"model.optimizer.{option} is true.*tensor_parallel_size 2.*to false"):
            train(folder, trainer_options, batch_size=2, optimizer=partial(adam, **{option: True}))

    assert in_two_processes(refused, tmp_path, strategy=split) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "granite"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_families_are_split(
    train: Callable[..., None], model_folder: Callable[[str], Path], tmp_path: Path, family: str, mode: str
) -> None:
    options = {"llm": model_folder(family), "tune": LORA if mode == "lora" else Tune(mode="full")}
    train(tmp_path / "one", {}, batch_size=2, **options)
    assert in_two_processes(train, tmp_path / "two", strategy=split, batch_size=2, **options) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [fsdp, flat, partial(flat, sharding_strategy="SHARD_GRAD_OP")], ids=["fsdp", "flat", "late"])
@pytest.mark.parametrize("family", ["qwen2", "gptj"])
def test_layers_of_any_family_are_sharded(
    train: Callable[..., None], model_folder: Callable[[str], Path], tmp_path: Path, family: str, strategy: MakeStrategy
) -> None:
    """In full: the embeddings are tied to the head."""
    options = {"llm": model_folder(family), "tune": Tune(mode="full")}
    train(tmp_path / "one", {}, batch_size=2, **options)
    assert in_two_processes(train, tmp_path / "two", strategy=strategy, batch_size=1, **options) == [0, 0]
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_layers_are_split_and_sharded(train: Callable[..., None], tmp_path: Path) -> None:
    train(tmp_path / "one", {}, batch_size=2)
    assert in_two_processes(train, tmp_path / "four", strategy=split, number=4, batch_size=1) == [0, 0, 0, 0]
    same(tmp_path / "one", tmp_path / "four", 1e-5)


@pytest.mark.slow
def test_one_process_has_nothing_to_cut(train: Callable[..., None], tmp_path: Path) -> None:
    """And leaves out what has no rows in a step, as it does without a strategy."""
    train(tmp_path / "one", {}, batch_size=2)
    assert in_two_processes(train, tmp_path / "alone", strategy=flat, number=1, batch_size=2) == [0]
    (tmp_path / "alone/1.pt").symlink_to(tmp_path / "alone/0.pt")
    same(tmp_path / "one", tmp_path / "alone")


HOW: dict[str, tuple[MakeStrategy | None, int]] = {
    "one": (None, 2),
    "fsdp": (fsdp, 1),
    "flat": (flat, 1),
    "split": (split, 2),
    "offload": (partial(fsdp, offload=True), 1),
    "fsdp_folder": (partial(fsdp, folder=True), 1),
    "split_folder": (partial(split, folder=True), 2),
}
"""By name a strategy, and the rows of a batch on each process."""
LAST = "run/checkpoints/last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        *[("fsdp", "fsdp"), ("one", "fsdp"), ("fsdp", "one"), ("fsdp", "split")],
        *[("fsdp_folder", "split"), ("split_folder", "fsdp"), ("offload", "offload")],
        *[("flat", "flat"), ("one", "flat"), ("flat", "one"), ("fsdp", "flat")],
    ],
)
def test_a_run_goes_on_with_another_strategy(train: Callable[..., None], tmp_path: Path, first: str, then: str) -> None:
    def run(name: str, folder: Path, **options: Any) -> None:
        strategy, batch_size = HOW[name]
        if strategy is None:
            train(folder, {}, batch_size=batch_size, **options)
            (folder / "1.pt").symlink_to(folder / "0.pt")
        else:
            assert in_two_processes(train, folder, strategy=strategy, batch_size=batch_size, **options) == [0, 0]

    train(tmp_path / "whole", {}, batch_size=2, max_steps=5)
    run(first, tmp_path / "first", max_steps=3)
    checkpoint = tmp_path / "first/checkpoints/last.ckpt"
    assert checkpoint.is_dir() == first.endswith("folder")
    assert not list(checkpoint.parent.glob(".*"))
    run(then, tmp_path / "then", resume=checkpoint, max_steps=5)
    same(tmp_path / "whole", tmp_path / "then", 1e-5 if "split" in first + then else 1e-6, first_step=3)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no sound in the rows of the first three steps, which so have trained no part of it."""
    monkeypatch.setattr(f"{__name__}.KINDS", ("i", "", "iv", "i", "", "vi", "a", "", "a", ""))


@pytest.mark.slow
@pytest.mark.parametrize("then", ["fsdp_folder", "fsdp"])
def test_a_folder_without_what_a_part_has_not_learnt_yet(
    late: None, train: Callable[..., None], tmp_path: Path, then: str
) -> None:
    """A run goes on from it, with shards or in one file, which takes the folder's place."""
    train(tmp_path / "whole", {}, batch_size=2, max_steps=5)
    for name, options in (("fsdp_folder", {"max_steps": 3}), (then, {"resume": LAST, "max_steps": 5})):
        strategy, batch_size = HOW[name]
        assert strategy is not None
        options = {key: tmp_path / value if key == "resume" else value for key, value in options.items()}
        codes = in_two_processes(train, tmp_path / "run", strategy=strategy, batch_size=batch_size, **options)
        assert codes == [0, 0]
    same(tmp_path / "whole", tmp_path / "run", 1e-6, first_step=3)
    assert (tmp_path / LAST).is_dir() == then.endswith("folder") and not list((tmp_path / LAST).parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "what"), [(0, "shard"), (1, "shard"), (0, "rest")])
@pytest.mark.parametrize("on_save_error", ["stop", "go_on"])
def test_a_full_disk_under_a_folder_is_said_by_all(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, what: str, on_save_error: Any
) -> None:
    """The checkpoint from before stays, and no process waits for another."""
    pwd, fsync, run = tmp_path / "two", os.fsync, partial(train, tmp_path / "two")

    def full(file: int) -> None:
        name = str(Path(f"/proc/self/fd/{file}").readlink())
        if (
            (name.endswith(METADATA) if what == "rest" else name.endswith(".distcp"))
            and "last" in name
            and (pwd / "full").exists()
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    def job(trainer_options: dict[str, Any], **options: Any) -> None:
        if int(os.environ["RANK"]) == rank:
            monkeypatch.setattr("os.fsync", full)
        run(trainer_options, **options)

    folder = partial(fsdp, folder=True)
    assert in_two_processes(job, strategy=folder, batch_size=1, max_steps=3) == [0, 0]
    (pwd / "full").touch()
    resume = pwd / "checkpoints/last.ckpt"
    more = {"batch_size": 1, "resume": resume, "max_steps": 5, "on_save_error": on_save_error}
    assert in_two_processes(job, strategy=folder, **more) == ([1, 1] if on_save_error == "stop" else [0, 0])
    manifest = read_manifest(resume)
    assert manifest is not None and manifest.step == 3 and not list(resume.parent.glob(".*"))


def test_a_disk_that_is_full_while_a_shard_is_written_is_said_by_its_own_words(tmp_path: Path) -> None:
    """Also to the other processes, to which no context of an error comes."""
    big = {"weight": torch.zeros(100_000)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as a full disk: writing fails in the middle
    try:
        said = ShardedStrategy()._write_folder({"state_dict": big}, tmp_path / "last.ckpt", tmp_path / "temporary")
        with pytest.raises(dcp.api.CheckpointException) as info:
            dcp.save(big, storage_writer=ShardWriter(tmp_path / "other"), no_dist=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert said.startswith(f"{tmp_path}/last.ckpt cannot be written (File too large): make room")
    told = pickle.loads(pickle.dumps(info.value.failures[0][0]))
    assert isinstance(told, OSError) and told.errno == errno.EFBIG


@pytest.mark.slow
def test_a_folder_of_shards_goes_on_in_more_processes(train: Callable[..., None], tmp_path: Path) -> None:
    folder, steps = partial(fsdp, folder=True), {"max_epochs": 3}
    train(tmp_path / "whole", {}, batch_size=4, max_steps=6, **steps)
    assert in_two_processes(train, tmp_path / "first", strategy=folder, batch_size=2, max_steps=3, **steps) == [0, 0]
    options = {"batch_size": 1, "resume": tmp_path / "first/checkpoints/last.ckpt", "max_steps": 6, **steps}
    assert in_two_processes(train, tmp_path / "then", strategy=folder, number=4, timeout_seconds=60, **options) == [0, 0, 0, 0]
    same(tmp_path / "whole", tmp_path / "then", first_step=3)


@pytest.mark.slow
def test_a_folder_of_shards_becomes_one_file(train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command that `ShardedStrategy` names: from the file the model is made again, with the weights of the run."""
    from lightning.fabric.utilities import consolidate_checkpoint

    folder = partial(fsdp, folder=True)
    assert in_two_processes(train, tmp_path / "two", strategy=folder, batch_size=1, max_steps=3) == [0, 0]
    path = tmp_path / "two/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        read_checkpoint(path)
    monkeypatch.setattr("sys.argv", ["consolidate_checkpoint", str(path)])
    runpy.run_module(consolidate_checkpoint.__name__, run_name="__main__")
    model = MultiModalModel.from_checkpoint(path.with_suffix(".ckpt.consolidated"))
    weights, *_ = torch.load(tmp_path / "two/0.pt", weights_only=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_lightning_s_fsdp_clips_no_norm() -> None:
    """One reason why there is one of our own: if it does one day, it is worth another look."""
    with pytest.raises(MisconfigurationException, match="gradient_clip_algorithm='norm'"):
        FSDPPrecision("32-true").clip_grad_by_norm(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 1.0)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, r"FSDPStrategy, which is not supported: it does not clip.*FlatShardedStrategy.*or configs.*fsdp\.yaml"),
        (
            DeepSpeedStrategy,
            r"DeepSpeedStrategy, which is not supported: its steps.*deepspeed_zero2\.yaml, or configs/strategy/fsdp\.yaml",
        ),
    ],
)
def test_other_strategies_are_refused(tiny_llm: Path, strategy: type[Strategy], message: str) -> None:
    module = MultiModalLitModule(LanguageModel(str(tiny_llm)))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer._accelerator_connector.strategy = object.__new__(strategy)  # DeepSpeed's needs its package to be made
    with pytest.raises(ValueError, match=message):
        module.configure_model()


def test_there_must_be_shards_to_be_offloaded() -> None:
    strategy = ShardedStrategy(tensor_parallel_size="auto", offload=True)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(ValueError, match="offload is true, but with data_parallel_size 1 there are no shards"):
        strategy.setup_environment()


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=f"precision is {precision}, but FlatShardedStrategy takes 32-true and bf16-mixed"):
        FlatPrecision(precision, "cpu")


def test_quantised_weights_are_not_in_flat_shards(tiny_llm: Path) -> None:
    module = MultiModalLitModule(LanguageModel(str(tiny_llm), quantize="int8"))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer._accelerator_connector.strategy = FlatShardedStrategy()
    with pytest.raises(ValueError, match=r"\d+ weights are quantised.*ddp\.yaml"):
        module.configure_model()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DPOLitModule, r"FrozenCopy, which shares weights.*AdapterOff or SecondAdapter.*ddp\.yaml"),
        (RewardLitModule, r"which a reward model does not support.*ddp\.yaml"),
    ],
)
def test_what_cannot_be_spread_is_refused(tiny_llm: Path, tiny_clip: Path, kind: type[PreferenceLitModule], message: str) -> None:
    """A reference that is a copy of what trains, here of a projector; and a reward model."""
    module = make_module(kind, tiny_llm, tiny_clip, image_projector=MLPProjector())
    module._device_mesh = cast("Any", object())  # as a strategy sets it
    with pytest.raises(ValueError, match=message):
        module.build_model()
