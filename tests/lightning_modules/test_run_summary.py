"""What a fit leaves as its summary, however it ends."""

import json
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_fakes import Bridge, FakeData, FakeModule, good_batch, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.batch import Batch
from encoders.base import Part
from lightning_modules.run_summary import Counts, RunSummary


def read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "summary.json").read_text())


def test_summary_of_a_complete_fit(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    saves = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = make_trainer(tmp_path, [RunSummary(), saves], enable_checkpointing=True, max_epochs=2)
    trainer.fit(FakeModule(), datamodule=FakeData([good_batch()] * 3, [good_batch()]))
    summary = read(tmp_path)
    counts = {"rows": 3000, "trained": 2980, "skipped": 15, "not_reached": 5}
    media = {"image": 2900, "video": 0, "audio": 0}
    assert summary | counts | {"status": "finished", "steps": 6, "epochs": 2, "media": media} == summary
    assert summary["best_checkpoint"] == saves.best_model_path and Path(summary["last_checkpoint"]).exists()
    assert summary["metrics"] == {name: pytest.approx(float(value)) for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "val/loss"} <= summary["metrics"].keys()
    # more than a Python with torch needs, less than the machine has; a wrong unit is a factor of 1024
    assert 100e6 < summary["peak_memory_bytes"] < 50e9
    line = "rows: 3,000 = 2,980 trained + 15 skipped + 5 not reached in the last epoch; media in them: 2,900 image"
    assert line in log.messages


def test_summary_adds_the_rows_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, [RunSummary()])
    # stands for two processes with equally many rows
    monkeypatch.setattr(trainer.strategy, "reduce", lambda tensor, reduce_op: tensor * 2 if reduce_op == "sum" else tensor)
    trainer.fit(FakeModule(), datamodule=FakeData([good_batch()]))
    assert (read(tmp_path)["rows"], read(tmp_path)["not_reached"], read(tmp_path)["media"]["image"]) == (6000, 10, 5800)


def test_the_line_of_an_epoch_that_saw_all_rows() -> None:
    rows = {"rows": 1200, "trained": 1180, "skipped": 20, "not_reached": 0}
    counts = Counts(rows, {"image": 0, "video": 0, "audio": 7}, {"image": 0, "video": 0, "audio": 9}, {"web": rows})
    assert counts.source_lines() == ["  of web: 1,200 = 1,180 trained + 20 skipped"]
    assert counts.line([]) == "rows: 1,200 = 1,180 trained + 20 skipped; media in them: 7 audio"
    assert counts.line(["image"]).endswith("skipped; media in them: 0 image, 7 audio")


def test_summary_says_what_became_of_each_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    class Mixture(FakeData):
        def source_counts(self) -> dict[str, dict[str, int]]:
            web = {"rows": 2000, "trained": 1985, "skipped": 10, "not_reached": 5}
            return {"web": web, "speech": {"rows": 1000, "trained": 995, "skipped": 5, "not_reached": 0}}

    trainer = make_trainer(tmp_path, [RunSummary()])
    monkeypatch.setattr(trainer.strategy, "reduce", lambda tensor, reduce_op: tensor * 2 if reduce_op == "sum" else tensor)
    trainer.fit(FakeModule(), datamodule=Mixture([good_batch()]))
    assert read(tmp_path)["sources"] == {
        "web": {"rows": 4000, "trained": 3970, "skipped": 20, "not_reached": 10},
        "speech": {"rows": 2000, "trained": 1990, "skipped": 10, "not_reached": 0},
    }
    assert "  of speech: 2,000 = 1,990 trained + 10 skipped" in log.text


class WithEncoders(FakeModule):
    """As if the bridge were the encoder of images, and there were another one for sound, and one for video that is frozen."""

    def parts(self) -> dict[str, Part]:
        others = {"audio_encoder": Bridge(), "video_encoder": Bridge().requires_grad_(False)}
        return {**super().parts(), "image_encoder": self.bridge, **others}


class Media(FakeData):
    """Media counts of an epoch that has just begun, as a checkpoint in its middle may hold."""

    def __init__(self, batches: list[Batch], **counts: int) -> None:
        super().__init__(batches)
        self.counts = {"image": 0, "video": 0, "audio": 0} | counts

    def media_counts(self) -> dict[str, int]:
        return self.counts


@pytest.mark.parametrize(
    ("batches", "counts", "never_seen"),
    [
        ([good_batch()], {}, ["audio"]),
        ([good_batch(False), good_batch()], {"audio": 3}, []),  # before the run was resumed
        ([good_batch(False)], {}, ["image", "audio"]),
    ],
)
def test_an_encoder_that_trains_without_media_is_named(
    tmp_path: Path, batches: list[Batch], counts: dict[str, int], never_seen: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, [RunSummary()]).fit(WithEncoders(), datamodule=Media(batches, **counts))
    said = [str(warning.message) for warning in caught if "have learnt nothing" in str(warning.message)]
    assert [text.split()[3] for text in said] == [f"{modality}_encoder" for modality in never_seen]
    assert all(f"has {modality} media" in text for text, modality in zip(said, never_seen, strict=True))


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


def test_a_run_that_was_killed_after_its_last_step_is_summed_up_when_it_is_resumed(tmp_path: Path) -> None:
    def fit(max_steps: int, **options: Any) -> None:
        saves = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        trainer = make_trainer(tmp_path, [RunSummary(), saves], enable_checkpointing=True, max_epochs=-1, max_steps=max_steps)
        trainer.fit(FakeModule(), datamodule=FakeData([good_batch()] * 3, [good_batch()]), **options)

    fit(4)
    path, whole = tmp_path / "summary.json", read(tmp_path)
    resumed = {"ckpt_path": tmp_path / "checkpoints/last.ckpt", "weights_only": True}
    fit(4, **resumed)
    assert read(tmp_path) == whole  # it has its time and metrics
    for interrupted in ({"status": "interrupted"}, {"steps": 3}):
        path.write_text(json.dumps(whole | interrupted))
        fit(4, **resumed)
        assert {name: read(tmp_path)[name] for name in ("status", "steps")} == {"status": "finished", "steps": 4}
        assert not {"seconds", "peak_memory_bytes"} & read(tmp_path).keys()  # they went with its process
    path.unlink()
    fit(4, **resumed)
    known = {"status": "finished", "rows": 3000, "trained": 2980, "steps": 4, "metrics": {}}
    assert read(tmp_path) | known == read(tmp_path)


def test_a_fit_with_nothing_left_to_do_says_so_and_claims_no_rows(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Of its own folder it sums the run up, as above; into another it has brought none."""

    class Mixture(FakeData):
        def source_counts(self) -> dict[str, dict[str, int]]:
            return {"web": self.row_counts()}

    saves = ModelCheckpoint(tmp_path / "run/checkpoints", save_last=True)
    trainer = make_trainer(tmp_path / "run", [RunSummary(), saves], enable_checkpointing=True, max_epochs=2)
    trainer.fit(FakeModule(), datamodule=Mixture([good_batch()] * 3))
    assert "no step was left" not in log.text
    resumed: dict[str, Any] = {"ckpt_path": tmp_path / "run/checkpoints/last.ckpt", "weights_only": True}
    make_trainer(tmp_path / "other", [RunSummary()], max_epochs=2).fit(
        FakeModule(), datamodule=Mixture([good_batch()] * 3), **resumed
    )
    assert "no step was left to make, and none was made: the checkpoint is of step 6, epoch 2" in log.text
    summary, none = read(tmp_path / "other"), {"rows": 3000, "trained": 0, "skipped": 0, "not_reached": 3000}
    assert summary | none | {"status": "finished", "steps": 6, "sources": {"web": none}} == summary
    assert summary["media"] == {"image": 0, "video": 0, "audio": 0}
    log.clear()
    make_trainer(tmp_path / "run", [RunSummary()], max_epochs=2).fit(
        FakeModule(), datamodule=Mixture([good_batch()] * 3), **resumed
    )
    assert "no step was left to make" in log.text and read(tmp_path / "run")["trained"] == 2980


@pytest.mark.parametrize("max_steps", [6, 9])
def test_an_encoder_that_may_have_had_media_in_an_earlier_epoch_is_not_named(tmp_path: Path, max_steps: int) -> None:
    """Only the last epoch is known of a fit that was killed in its second epoch; it goes on for as long, or for another one."""
    saves = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    options: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": -1}
    batches = [good_batch(False)] * 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, [saves], max_steps=6, **options)
        trainer.fit(WithEncoders(), datamodule=Media(batches))
        trainer = make_trainer(tmp_path, [RunSummary()], max_steps=max_steps, **(options | {"enable_checkpointing": False}))
        resumed: dict[str, Any] = {"ckpt_path": saves.last_model_path, "weights_only": True}
        trainer.fit(WithEncoders(), datamodule=Media(batches), **resumed)
    assert read(tmp_path)["steps"] == max_steps and read(tmp_path)["trained"] == 2980
    assert not [warning for warning in caught if "have learnt nothing" in str(warning.message)]


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


def test_processes_that_share_a_model_count_its_rows_once() -> None:
    """Four processes, of which two each have the same rows."""

    class Strategy:
        root_device = torch.device("cpu")

        def reduce(self, own: torch.Tensor, reduce_op: str) -> torch.Tensor:
            return own * 4

    trainer: Any = SimpleNamespace(world_size=4, strategy=Strategy(), distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})
    counts = Counts({"rows": 5, "trained": 4}, {"image": 3}, {"image": 6}, {"a": {"rows": 5}}).add_up(trainer)
    assert counts == Counts({"rows": 10, "trained": 8}, {"image": 6}, {"image": 12}, {"a": {"rows": 10}})
