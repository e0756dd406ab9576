"""What a run measures, shows and sums up."""

import json
import logging
import signal
import time
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
from lightning_modules.callbacks import ProgressBar, RunSummary, Throughput, _count_line


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


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True
    return caplog


def read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "summary.json").read_text())


def test_summary_of_a_complete_fit(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    saves = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = make_trainer(tmp_path, [RunSummary(), saves], enable_checkpointing=True, max_epochs=2)
    trainer.fit(FakeModule(), datamodule=FakeData([good_batch()] * 3, [good_batch()]))
    summary = read(tmp_path)
    counts = {"rows": 3000, "trained": 2980, "skipped": 15, "not_reached": 5}
    assert summary | counts | {"status": "finished", "steps": 6, "epochs": 2} == summary
    assert summary["best_checkpoint"] == saves.best_model_path and Path(summary["last_checkpoint"]).exists()
    assert summary["metrics"] == {name: pytest.approx(float(value)) for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "val/loss"} <= summary["metrics"].keys()
    # more than a Python with torch needs, less than the machine has; a wrong unit is a factor of 1024
    assert 100e6 < summary["peak_memory_bytes"] < 50e9
    assert "rows: 3,000 = 2,980 trained + 15 skipped + 5 not reached in the last epoch" in log.messages


def test_summary_adds_the_rows_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, [RunSummary()])
    # stands for two processes with equally many rows
    monkeypatch.setattr(trainer.strategy, "reduce", lambda tensor, reduce_op: tensor * 2 if reduce_op == "sum" else tensor)
    trainer.fit(FakeModule(), datamodule=FakeData([good_batch()]))
    assert (read(tmp_path)["rows"], read(tmp_path)["not_reached"]) == (6000, 10)


def test_summary_of_an_epoch_that_saw_all_rows() -> None:
    counts = {"rows": 1200, "trained": 1180, "skipped": 20, "not_reached": 0}
    assert _count_line(counts) == "rows: 1,200 = 1,180 trained + 20 skipped"


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("out of memory"), "failed: RuntimeError: out of memory"), (KeyboardInterrupt(), "interrupted")],
)
def test_summary_of_a_fit_that_stops(tmp_path: Path, error: BaseException, status: str) -> None:
    class Stops(FakeModule):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            if batch_idx == 2:
                raise error

    started = time.monotonic()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((type(error), SystemExit)):
        make_trainer(tmp_path, [RunSummary()]).fit(Stops(), datamodule=FakeData([good_batch()] * 4))
    signal.signal(signal.SIGINT, handler)  # Lightning lets a second Ctrl-C pass, for the rest of the process
    summary = read(tmp_path)
    assert (summary["status"], summary["steps"], summary["epochs"]) == (status, 2, 0)
    assert 0 <= summary["seconds"] <= time.monotonic() - started + 0.1


def test_no_summary_where_training_never_began(tmp_path: Path) -> None:
    class Refuses(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make_trainer(tmp_path, [Refuses(), RunSummary()]).fit(FakeModule(), datamodule=FakeData([good_batch()]))
    assert not (tmp_path / "summary.json").exists()


def test_a_full_disk_does_not_hide_what_stopped_the_run(tmp_path: Path) -> None:
    class Stops(FakeModule):
        def on_train_batch_end(self, *_: Any) -> None:
            (tmp_path / "file").write_text("in the way")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), pytest.warns(UserWarning, match="summary.json cannot be written"):
        make_trainer(tmp_path / "file", [RunSummary()]).fit(Stops(), datamodule=FakeData([good_batch()]))


def test_all_callbacks_can_be_named_from_one_place() -> None:
    assert all(issubclass(vars(callbacks)[name], Callback) for name in callbacks.__all__)
