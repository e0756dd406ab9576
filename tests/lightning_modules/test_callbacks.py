"""What a run measures and shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_fakes import FakeData, FakeModule, good_batch, make_batch, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.batch import Batch
from lightning_modules import callbacks
from lightning_modules.callbacks import ProgressBar, Throughput


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


class Timed(FakeModule):
    """A training step takes 3 seconds, a validation step 50, and each batch another 1 second to arrive."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.clock.now += 3
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.clock.now += 50
        super().validation_step(batch, batch_idx)


class SlowData(FakeData):
    def __init__(self, clock: Clock, batches: list[Batch], val_batches: list[Batch]) -> None:
        super().__init__(batches, val_batches)
        self.clock = clock

    def train_dataloader(self) -> Any:
        class Loader:
            def __len__(loader) -> int:  # noqa: N805
                return len(self.batches)

            def __iter__(loader) -> Iterator[Batch]:  # noqa: N805
                for batch in self.batches:
                    self.clock.now += 1
                    yield batch

        return Loader()


class Record(Callback):
    """The figures after each batch."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.figures.append({key.removeprefix("train/"): float(value) for key, value in trainer.callback_metrics.items()})


def padded() -> Batch:
    """7 tokens and 5 of padding; 4 supervised."""
    return make_batch([[-100, 3, 9, -100, -100, -100], [-100, -100, 3, 9, -100, -100]], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


def run(tmp_path: Path, clock: Clock, batches: list[Batch], extra: list[Callback], **options: Any) -> list[dict[str, float]]:
    record = Record()
    data = SlowData(clock, [*batches, good_batch()], [good_batch()] if options.get("val_check_interval") else [])
    make_trainer(tmp_path, [Throughput(), record, *extra], **options).fit(Timed(clock), datamodule=data)
    return record.figures[1:]


def test_throughput_over_the_logging_interval(tmp_path: Path, clock: Clock) -> None:
    first, second, third = run(tmp_path, clock, [padded(), padded(), good_batch(False)], [], log_every_n_steps=2)
    assert (first["tokens_per_s"], first["data_wait"], first["supervised_tokens"]) == pytest.approx((7 / 3, 0.0, 4))
    assert (second["tokens_per_s"], second["data_wait"], second["supervised_tokens"]) == pytest.approx((14 / 7, 1 / 7, 4))
    # the first batch has left the window
    assert (third["tokens_per_s"], third["data_wait"], third["supervised_tokens"]) == pytest.approx((15 / 8, 2 / 8, 4.5))


def test_throughput_counts_supervised_tokens_of_a_whole_step(tmp_path: Path, clock: Clock) -> None:
    figures = run(tmp_path, clock, [padded()] * 4, [], log_every_n_steps=1, accumulate_grad_batches=2)
    assert figures[1]["supervised_tokens"] == figures[3]["supervised_tokens"] == 8
    assert figures[3]["tokens_per_s"] == pytest.approx(14 / 8)


def test_throughput_leaves_validation_and_checkpoints_out(tmp_path: Path, clock: Clock) -> None:
    class SlowToSave(ModelCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            clock.now += 500

    saves = SlowToSave(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    options = {"log_every_n_steps": 9, "num_sanity_val_steps": 0}
    figures = run(tmp_path, clock, [padded()] * 3, [saves], enable_checkpointing=True, **options)
    assert (figures[2]["tokens_per_s"], figures[2]["data_wait"]) == pytest.approx((21 / 9, 0.0))
    figures = run(tmp_path, clock, [padded()] * 3, [], val_check_interval=2, **options)
    assert (figures[2]["tokens_per_s"], figures[2]["data_wait"]) == pytest.approx((21 / 10, 1 / 10))


def test_progress_bar_is_short(tmp_path: Path) -> None:
    bar, shown = ProgressBar(refresh_rate=0), {}

    class Show(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            figures = {"train/tokens_per_s": 2134.6, "train/data_wait": 0.0312, "val/loss": 0.51239, "train/epoch_name": "a"}
            trainer._logger_connector._progress_bar_metrics.update(figures)
            shown.update(bar.get_metrics(trainer, pl_module))

    make_trainer(tmp_path, [bar, Show()], enable_progress_bar=True).fit(FakeModule(), datamodule=FakeData([good_batch()]))
    assert float(shown.pop("loss")) > 0
    assert shown == {"tokens/s": "2.1k", "wait": "3 %", "val/loss": "0.512", "epoch_name": "a"}


def test_all_callbacks_can_be_named_from_one_place() -> None:
    assert all(issubclass(vars(callbacks)[name], Callback) for name in callbacks.__all__)
