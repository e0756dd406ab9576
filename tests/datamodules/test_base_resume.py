"""Runs of Lightning that are stopped, and go on with the batches that they would have had."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from datamodules.image import ImageDataModule
from tests.datamodules.lightning_fakes import Model, make_trainer
from tests.datamodules.loader_fakes import ids, same, write_rows
from tests.datamodules.row_fixtures import NUM_ROWS


class SaveOften(Callback):
    """A checkpoint after each batch, each epoch, and when training fails."""

    def __init__(self) -> None:
        self.saved: dict[str, int] = {}

    def save(self, trainer: Trainer, module: Any, name: str) -> None:
        path = Path(trainer.default_root_dir) / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[str(path)] = len(module.trained)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.save(trainer, pl_module, f"batch{len(pl_module.trained)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module, f"epoch{trainer.current_epoch}")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.save(trainer, pl_module, "exception")


@pytest.mark.parametrize(
    ("options", "checkpoint"),
    [
        ({}, "batch2"),
        ({}, "batch4"),
        ({}, "epoch0"),
        ({}, "batch5"),
        ({"max_epochs": -1, "max_steps": 10}, "epoch0"),
        ({"max_epochs": -1, "max_steps": 10}, "batch6"),
        ({"limit_train_batches": 3}, "epoch0"),
        ({"accumulate_grad_batches": 2}, "batch6"),
        ({"num_workers": 2}, "batch5"),
    ],
)
def test_a_run_goes_on_with_the_batches_it_would_have_had(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path, options: dict[str, Any], checkpoint: str
) -> None:
    others = set(multiprocessing.active_children())
    num_workers = options.get("num_workers", 0)
    options = {name: value for name, value in options.items() if name != "num_workers"}
    whole, save, resumed = Model(), SaveOften(), Model()
    make_trainer(tmp_path, save, **options).fit(whole, datamodule=make_image_data(num_workers=num_workers))
    path = str(tmp_path / f"{checkpoint}.ckpt")
    data = make_image_data(num_workers=num_workers)
    make_trainer(tmp_path, **options).fit(resumed, datamodule=data, ckpt_path=path)
    rest = whole.trained[save.saved[path] :]
    assert len(rest) > 1 and len(resumed.trained) == len(rest)
    assert all(same(*pair) for pair in zip(resumed.trained, rest, strict=True))
    counts = data.row_counts()
    assert counts["trained"] + counts["not_reached"] == counts["rows"] == NUM_ROWS
    assert set(multiprocessing.active_children()) <= others  # the workers have ended


@pytest.mark.parametrize("fail_at", [0, 3, 5])
def test_the_batch_that_was_not_finished_comes_again(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path, fail_at: int
) -> None:
    whole, failing, resumed = Model(), Model(fail_at), Model()
    make_trainer(tmp_path).fit(whole, datamodule=make_image_data())
    others = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(tmp_path, SaveOften()).fit(failing, datamodule=make_image_data(num_workers=1))
    assert set(multiprocessing.active_children()) <= others
    data = make_image_data()
    make_trainer(tmp_path).fit(resumed, datamodule=data, ckpt_path=tmp_path / "exception.ckpt")
    assert all(same(*pair) for pair in zip(failing.trained + resumed.trained, whole.trained, strict=True))
    assert data.row_counts()["trained"] == NUM_ROWS


def test_a_second_fit_begins_anew(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    data, models = make_image_data(), [Model(), Model()]
    for model in models:
        make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert all(same(*pair) for pair in zip(*(model.trained for model in models), strict=True))


def test_a_checkpoint_of_other_data_can_be_tested_but_not_resumed(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path
) -> None:
    save = SaveOften()
    make_trainer(tmp_path, save).fit(Model(), datamodule=make_image_data())
    other = str(write_rows(tmp_path / "other.jsonl", 5))
    data, path = make_image_data(train_path=other, val_path=other), next(iter(save.saved))
    make_trainer(tmp_path).validate(model := Model(), datamodule=data, ckpt_path=path, verbose=False)
    assert len(model.validated) == 3
    make_trainer(tmp_path, max_epochs=1).fit(fresh := Model(), datamodule=data)
    assert sorted(sum(ids(fresh.trained), [])) == ["0", "1", "2", "3", "4"]
    make_trainer(tmp_path).validate(Model(), datamodule=data, ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match=r"training rows 7 \(now 5\)"):
        make_trainer(tmp_path).fit(Model(), datamodule=data, ckpt_path=path)
