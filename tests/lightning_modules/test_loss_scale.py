"""float16 by torch's own scaler, on the CPU: a step that overflows is left out; what is not finite at any scale stops the run."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, Batch
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.first_step import FirstStepCheck
from lightning_modules.multimodal import MultiModalLitModule, Stage
from lightning_modules.orpo import ORPOLitModule
from models.language import LanguageModel
from models.spread import local
from tests.faults.small_runs import end_state, fit, make_module, same
from tests.lightning_modules import test_exact_weighting
from tests.lightning_modules.processes import MakeStrategy, ddp, gathered, in_two_processes
from tests.lightning_modules.run_fakes import Watch, make_data, weights, write_rows
from tests.lightning_modules.test_exact_weighting import Job
from tests.lightning_modules.test_strategies import fsdp, split

job = test_exact_weighting.job  # a fixture
IN_ORDER = {"shuffle": False}
NAMES = ("loss", "loss_scale", "overflows")


def half(init_scale: float = 256.0, growth_interval: int = 3) -> MixedPrecision:
    """What `trainer.precision 16-mixed` is on a GPU, on the CPU, where Lightning would take bf16-mixed instead."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", "cpu", scaler)


class ScaledFloat32(MixedPrecision):
    """Scales the loss, and computes in float32: a power of two changes no digit."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class Overflowing(MultiModalLitModule):
    """The gradients of some rows overflow at scales above a bound; the loss of others is not finite."""

    overflow: frozenset[str] = frozenset()
    above: float = 0.0
    nan: frozenset[str] = frozenset()

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        loss = super().step(batch, stage)
        if loss is None or stage != "train":
            return loss
        ids, scaler = {example["id"] for example in batch["examples"]}, self.trainer.precision_plugin.scaler
        if ids & self.overflow and scaler.get_scale() > self.above:
            loss[0].register_hook(lambda gradient: gradient * math.inf)
        return (loss[0] * math.nan, loss[1]) if ids & self.nan else loss


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 16)


@pytest.fixture
def make(tiny_llm: Path, tiny_clip: Path) -> Callable[..., Overflowing]:
    """`make(overflow=("5",), above=100, nan=(), **options)`: by ids of rows."""

    def overflowing(overflow: tuple[str, ...] = (), above: float = 0.0, nan: tuple[str, ...] = (), **options: Any) -> Overflowing:
        module = make_module(tiny_llm, tiny_clip, Overflowing, **options)
        assert isinstance(module, Overflowing)
        module.overflow, module.above, module.nan = frozenset(overflow), above, frozenset(nan)
        return module

    return overflowing


def adam(fused: bool) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=fused)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def steps_made(trainer: Any) -> set[int]:
    return {int(state["step"]) for state in trainer.optimizers[0].state.values()}


class PlainLoop:
    """Steps of torch's own recipe for mixed precision, with the loss of whole logits."""

    def __init__(
        self, module: MultiModalLitModule, optimizer: torch.optim.Optimizer, plugin: MixedPrecision, clip: float
    ) -> None:
        assert plugin.scaler is not None
        self.module, self.optimizer, self.scaler, self.clip = module, optimizer, plugin.scaler, clip
        self.losses: list[float] = []

    def step(self, batches: list[Batch], overflows: bool) -> None:
        total = sum(batch["num_supervised"] for batch in batches)
        self.losses.append(0.0)
        self.optimizer.zero_grad()
        for batch in batches:
            with torch.autocast("cpu", torch.float16):
                logits_BTV = self.module.model.language_model.head(self.module(batch))
            logits_SV, labels_S = logits_BTV[:, :-1].flatten(0, 1).float(), batch["labels_BT"][:, 1:].flatten()
            loss = F.cross_entropy(logits_SV, labels_S, ignore_index=IGNORE_INDEX, reduction="sum") / total
            self.losses[-1] += loss.item()
            self.scaler.scale(loss * math.inf if overflows else loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_([w for group in self.optimizer.param_groups for w in group["params"]], self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize(("fused", "clip"), [(False, 0.2), (True, 0.2), (False, 1e6)])
def test_it_trains_as_a_plain_loop(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path, fused: bool, clip: float) -> None:
    """Losses, scales, which steps are left out, and weights, of gradients that are clipped or not; a step has two batches, of
    other lengths."""

    def built() -> Overflowing:
        options: dict[str, Any] = {
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, fused=fused),
            "lr_scheduler": constant,
        }
        module = Overflowing(LanguageModel(str(tiny_llm)), HFVisionEncoder(str(tiny_clip), layer=-2), MLPProjector(), **options)
        torch.manual_seed(4)
        module.configure_model()
        module.overflow = frozenset({"5"})
        return module

    module, plain = built(), built()
    before, seen, plugin = weights(module), [], half()

    def look(trainer: Any, module: Any) -> None:
        if len(seen) < trainer.global_step:
            seen.append({name: float(trainer.callback_metrics[f"train/{name}"]) for name in NAMES})

    fit(module, tmp_path, rows, Watch(look), plugins=[plugin], data=IN_ORDER, max_epochs=1, gradient_clip_val=clip)
    data = make_data(plain, rows, **IN_ORDER)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len({batch["num_supervised"] for batch in batches}) > 1
    groups = [{"params": [weight for weight in plain.parameters() if weight.requires_grad]}]
    loop, scales = PlainLoop(plain, plain.optimizer(groups), other := half(), clip), []
    for number in range(0, len(batches), 2):
        scales.append(loop.scaler.get_scale())
        loop.step(batches[number : number + 2], overflows=number == 2)
    assert [step["loss_scale"] for step in seen] == scales == [256, 256, 128, 128]
    assert plugin.state_dict() == other.state_dict() and [step["overflows"] for step in seen] == [0, 1, 1, 1]
    assert [step["loss"] for step in seen] == pytest.approx(loop.losses, rel=1e-3)
    for name, start in before.items():
        ours, theirs = weights(module)[name] - start, weights(plain)[name] - start
        assert (ours - theirs).norm() <= 0.02 * theirs.norm(), name
    assert sum(bool((weights(module)[name] != start).any()) for name, start in before.items()) > 5


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_is_left_out(
    make: Callable[..., Overflowing], rows: Path, tmp_path: Path, log: pytest.LogCaptureFixture, fused: bool
) -> None:
    module, seen = make(("0", "9"), above=100.0, optimizer=adam(fused)), []
    watch = Watch(lambda trainer, module: seen.append((weights(module), dict(trainer.callback_metrics))))
    with pytest.warns() as warned:
        options = {"gradient_clip_val": 0.5, "max_epochs": 1, "accumulate_grad_batches": 1}
        trainer = fit(module, tmp_path, rows, watch, FirstStepCheck(), plugins=[half()], data=IN_ORDER, **options)
    before = [float(metrics["train/overflows"]) for _, metrics in seen]
    assert before == [1, 1, 1, 1, 2, 2, 2, 2] and [float(metrics["train/loss_scale"]) for _, metrics in seen] == [
        *(256, 128, 128, 128),
        *(256, 128, 128, 128),
    ]
    assert same(seen[3][0], seen[4][0]) and not same(seen[4][0], seen[5][0]) and not same(seen[0][0], seen[1][0])
    assert steps_made(trainer) == {6} and trainer.global_step == 8
    assert all(math.isfinite(metrics["train/loss"]) for _, metrics in seen)
    told = [text for text in log.messages if "overflow float16 at a loss scale of 256" in text]
    assert len(told) == 1 and told[0].startswith("step 0: ") and not (tmp_path / "non_finite").exists()
    assert not [str(warning.message) for warning in warned if "lr_scheduler" in str(warning.message)]


class TestNotFinite:
    def test_a_gradient_that_is_so_at_any_scale_stops_the_run(
        self, make: Callable[..., Overflowing], rows: Path, tmp_path: Path
    ) -> None:
        module = make(tuple(map(str, range(16))))
        message = r"^the gradient of step 3 is not finite \(loss [\d.]+; loss scale 1; rows .*rows\.jsonl:7, .*rows\.jsonl:8\)"
        with pytest.raises(ValueError, match=message):
            fit(module, tmp_path, rows, plugins=[half(8.0)], data=IN_ORDER, accumulate_grad_batches=1)
        kept = torch.load(tmp_path / "non_finite/step=3.ckpt", weights_only=True)
        assert kept["global_step"] == 3 and kept["MixedPrecision"]["scale"] == 1.0
        assert not module.trainer.optimizers[0].state

    def test_it_is_left_out_where_that_is_asked_for(self, make: Callable[..., Overflowing], rows: Path, tmp_path: Path) -> None:
        module, seen = make(tuple("2345"), on_non_finite="skip"), []
        watch = Watch(lambda trainer, module: seen.append(weights(module)))
        with pytest.warns(UserWarning, match=r"gradient of step 2 is not finite .* loss scale 1; .* The step is left out"):
            options = {"max_epochs": 1, "accumulate_grad_batches": 1}
            trainer = fit(module, tmp_path, rows, watch, plugins=[half(2.0, 100)], data=IN_ORDER, **options)
        assert same(seen[0], seen[2]) and not same(seen[2], seen[3]) and steps_made(trainer) == {6}
        assert trainer.precision_plugin.state_dict()["scale"] == 0.5

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_loss_that_is_so_is_no_overflow(
        self, make: Callable[..., Overflowing], rows: Path, tmp_path: Path, fused: bool
    ) -> None:
        module = make(nan=("6",), optimizer=adam(fused))
        with pytest.raises(ValueError, match=r"^the loss of step 1 is not finite .* rows .*rows\.jsonl:7, .*rows\.jsonl:8\)"):
            fit(module, tmp_path / "stop", rows, plugins=[half()], data=IN_ORDER)
        assert steps_made(module.trainer) == {1}
        module = make(nan=("6",), optimizer=adam(fused), on_non_finite="skip")
        with pytest.warns(UserWarning, match=r"^the loss of step 1 is not finite"):
            trainer = fit(module, tmp_path / "skip", rows, plugins=[half()], data=IN_ORDER, max_epochs=1)
        assert steps_made(trainer) == {3} and trainer.callback_metrics["train/overflows"] == 0


class TestCheckpoints:
    def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(
        self, make: Callable[..., Overflowing], rows: Path, tmp_path: Path
    ) -> None:
        def run(name: str, **options: Any) -> dict[str, Any]:
            module = make(("5", "12"), above=200.0, lr_scheduler=constant)
            checkpoint = RunCheckpoint(every_n_train_steps=1)
            fit(module, tmp_path / name, rows, checkpoint=checkpoint, plugins=[half()], max_epochs=3, **options)
            scaler = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["MixedPrecision"]
            return {**end_state(tmp_path / name), "scaler": scaler}

        whole = run("whole")
        for stopped_after in (2, 5):
            first = run(f"first-{stopped_after}", max_steps=stopped_after)
            resume = tmp_path / f"first-{stopped_after}/checkpoints/last.ckpt"
            assert same(run(f"then-{stopped_after}", resume=resume), whole) and first["scaler"] != half().state_dict()
        assert whole["scaler"]["_growth_tracker"] and whole["scaler"]["scale"] != 256

    def test_a_run_may_go_on_in_another_precision(self, tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
        last = "checkpoints/last.ckpt"
        fit(make_module(tiny_llm, tiny_clip), tmp_path / "wide", rows, max_steps=2)
        with pytest.warns(UserWarning, match=r"another precision and goes on in 16-mixed: its loss scale begins at 512"):
            module, resume = make_module(tiny_llm, tiny_clip), tmp_path / "wide" / last
            trainer = fit(module, tmp_path / "narrow", rows, plugins=[half(512.0)], resume=resume, max_steps=4)
        assert steps_made(trainer) == {4}
        for precision in ("32-true", "bf16-mixed"):
            with pytest.warns(UserWarning, match=f"of a run in 16-mixed and goes on in {precision}, without its loss scale"):
                module, resume = make_module(tiny_llm, tiny_clip), tmp_path / "narrow" / last
                fit(module, tmp_path / precision, rows, precision=precision, resume=resume, max_steps=5)


@pytest.mark.parametrize(("dtype", "compute_dtype"), [("float16", None), ("float16", "float32"), ("bfloat16", "float32")])
def test_what_is_frozen_may_be_narrow(
    tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path, dtype: Any, compute_dtype: Any
) -> None:
    stored = {"dtype": dtype, "compute_dtype": compute_dtype}
    parts: dict[str, Any] = {"language_model": LanguageModel(str(tiny_llm), **stored), "image_projector": MLPProjector()}
    module = MultiModalLitModule(**parts, image_encoder=HFVisionEncoder(str(tiny_clip), layer=-2, **stored))
    trainer = fit(module, tmp_path, rows, FirstStepCheck(), plugins=[half()], max_epochs=1)
    types = {(weight.requires_grad, weight.dtype) for weight in module.parameters()}
    assert {(True, torch.float32), (False, getattr(torch, dtype))} <= types
    assert types <= {(True, torch.float32), (False, getattr(torch, dtype)), (False, torch.float32)}
    assert steps_made(trainer) == {4} and 5 < trainer.callback_metrics["train/loss"] < 8


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "16-mixed"), ("float16", "bf16-mixed")])
@pytest.mark.parametrize("part", ["language_model", "image_encoder"])
def test_two_narrow_types_are_refused(
    tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path, dtype: Any, precision: Any, part: str
) -> None:
    of = {name: {"dtype": dtype} if name == part else {} for name in ("language_model", "image_encoder")}
    language_model = LanguageModel(str(tiny_llm), **of["language_model"])
    encoder = HFVisionEncoder(str(tiny_clip), layer=-2, **of["image_encoder"])
    module = MultiModalLitModule(language_model, encoder, MLPProjector())
    with pytest.raises(ValueError, match=f"^{part} has weights of {dtype}, and trainer.precision is {precision}"):
        fit(module, tmp_path, rows, plugins=[MixedPrecision(precision, "cpu")])


@pytest.mark.parametrize("kind", [MultiModalLitModule, ORPOLitModule])
def test_the_mean_of_a_step_is_that_of_an_unscaled_loss(
    job: Callable[..., Job], tmp_path: Path, kind: type[MultiModalLitModule]
) -> None:
    """Whatever batches and processes its rows came in."""
    run = job(kind)
    run(tmp_path / "plain", {}, 8, 1)
    for batch_size, accumulate in ((8, 1), (1, 8)):
        run(tmp_path / f"{batch_size}", {"plugins": [ScaledFloat32()]}, batch_size, accumulate)
        test_exact_weighting.same(tmp_path / "plain", tmp_path / f"{batch_size}")

    def one_of_two(folder: Path, strategy: dict[str, Any]) -> None:
        run(folder, {"plugins": [ScaledFloat32()], **strategy}, 2, 2)

    assert in_two_processes(one_of_two, tmp_path / "two") == [0, 0]
    for rank in range(2):
        test_exact_weighting.same(tmp_path / "plain", tmp_path / "two", rank)


def spoil(rows: Path, lines: range) -> Path:
    """Cuts lines off, which are skipped then."""
    told = rows.read_text().splitlines()
    rows.write_text("".join(text[: 9 if number in lines else None] + "\n" for number, text in enumerate(told)))
    return rows


def test_rows_that_are_skipped_take_no_others_with_them(make: Callable[..., Overflowing], rows: Path, tmp_path: Path) -> None:
    """The last batch of a step has none; in the next step no batch has any."""
    spoil(rows, range(2, 8))
    seen: list[dict[str, Tensor]] = []
    watch = Watch(lambda trainer, module: seen.append(weights(module)))
    trainer = fit(make(), tmp_path, rows, watch, plugins=[half()], max_epochs=1, data=IN_ORDER | {"max_skipped": 0.9})
    assert not same(seen[0], seen[1]) and same(seen[1], seen[3]) and not same(seen[3], seen[5])
    assert steps_made(trainer) == {3} and trainer.global_step == 4


@pytest.mark.parametrize("how", [ddp, pytest.param(fsdp, marks=pytest.mark.slow)])
def test_processes_leave_a_step_out_together(
    make: Callable[..., Overflowing], rows: Path, tmp_path: Path, how: MakeStrategy
) -> None:
    """An infinite gradient is in the rows of one process, or in the shard of one; in a step no process has rows."""
    spoil(rows, range(8, 12))

    class OfOneProcess(Overflowing):
        def on_after_backward(self) -> None:
            if how is fsdp and self.global_rank == 1 and self.trainer.global_step == 1:
                weight = next(weight for weight in self.parameters() if weight.grad is not None and local(weight.grad).numel())
                local(weight.grad).view(-1)[0] = math.inf

    def run(folder: Path, strategy: dict[str, Any]) -> None:
        module, seen = make(() if how is fsdp else ("5",), optimizer=adam(False), lr_scheduler=constant), []
        module.__class__ = OfOneProcess
        watch = Watch(lambda trainer, module: seen.append(weights(module)))
        options = {"accumulate_grad_batches": 1, "max_epochs": 1, "gradient_clip_val": 0.5}
        data = IN_ORDER | {"max_skipped": 0.9}
        trainer = fit(module, folder, rows, watch, plugins=[half()], data=data, **options, **strategy)
        assert trainer.global_step == 4 and steps_made(trainer) == {2} and trainer.callback_metrics["train/overflows"] == 1
        assert same(seen[0], seen[1]) and same(seen[1], seen[2]) and not same(seen[2], seen[3])
        with gathered(module):
            torch.save([weights(module), trainer.precision_plugin.state_dict()], folder / f"{trainer.global_rank}.pt")

    assert in_two_processes(partial(run, tmp_path / "two"), strategy=how) == [0, 0]
    first, second = (torch.load(tmp_path / f"two/{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second) and first[1]["scale"] == 128.0 and first[1]["_growth_tracker"] == 2


def test_layers_that_are_split_are_refused(make: Callable[..., Overflowing], rows: Path, tmp_path: Path) -> None:
    def run(folder: Path, strategy: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^trainer\.precision is 16-mixed, whose scaler .* tensor_parallel_size 2 some are"):
            fit(make(), folder, rows, plugins=[half()], **strategy)

    assert in_two_processes(partial(run, tmp_path / "two"), strategy=split) == [0, 0]
