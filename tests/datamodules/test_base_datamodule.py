import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage

from datamodules.base import MultiModalDataModule
from datamodules.image import ImageDataModule
from datamodules.loader import StatefulLoader
from datamodules.media import MediaLimits
from datamodules.media_image import ImageLimits
from tests.datamodules.lightning_fakes import Model, make_trainer
from tests.datamodules.loader_fakes import ids, make_processor, make_row, same, write_rows
from tests.datamodules.row_fixtures import NUM_ROWS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is a number of rows, at least 1, got 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size is a number of rows, at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers is a number of processes, 0 or more"),
        ({"max_skipped": 1.5}, "data.max_skipped is a share of the rows, in .0, 1., got 1.5"),
        ({"max_skipped": float("nan")}, "data.max_skipped"),
        ({"val_fraction": 1.0}, "data.val_fraction is a share of the training rows, in .0, 1., got 1.0"),
        ({"seed": -1}, "data.seed is a whole number"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MultiModalDataModule(**options)


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"train_path": None}, "fit", r"data\.train_path is not set: give the JSONL file of the train rows$"),
        ({"train_path": "no.jsonl"}, "fit", r"data\.train_path: .*no\.jsonl cannot be read \(No such file"),
        ({"val_path": "no.jsonl"}, "fit", r"data\.val_path: .*no\.jsonl cannot be read \(No such file"),
        ({"train_path": "no.jsonl", "val_fraction": 0.5}, "validate", r"data\.train_path: .*no\.jsonl cannot be read"),
        ({}, "validate", r"data\.val_path is not set: .*, or data\.val_fraction to hold some of the training rows out$"),
        ({}, "test", r"data\.test_path is not set"),
        ({}, "predict", r"data\.predict_path is not set"),
        ({"media_root": "no_such_folder"}, "fit", r"media_root .*/no_such_folder does not exist: give the folder"),
        ({"prompt_template": "{a"}, "fit", r"prompt_template '\{a' is malformed"),
        ({"processor": None}, "fit", r"the data module has no processor: run it through train\.py"),
    ],
)
def test_what_is_missing_is_named(
    make_image_data: Callable[..., ImageDataModule], options: dict[str, Any], stage: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_image_data(**options).setup(stage)


def test_parts_that_do_not_fit_are_named_before_workers_start(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path
) -> None:
    data = make_image_data(processor=make_processor(tmp_path / "tokenizer", num_features=3), num_workers=2)
    with pytest.raises(ValueError, match="^an even number of features is needed, got 3$"):
        data.setup("fit")


def test_a_bad_first_row_is_left_to_the_loader(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", NUM_ROWS, {0: json.dumps(make_row(0, "missing.png"))})
    data = make_image_data(train_path=str(path), max_skipped=0.2)
    data.setup("fit")
    assert sorted(sum(ids(list(data.train_dataloader())), [])) == ["1", "2", "3", "4", "5", "6"]
    assert data.row_counts() == {"rows": 7, "trained": 6, "skipped": 1, "not_reached": 0, "dropped_tokens": 0}
    assert data.media_counts() == {"image": 6, "video": 0, "audio": 0}


@pytest.mark.parametrize(("val_fraction", "num_val"), [(0.01, 1), (0.3, 2), (0.5, 4), (0.95, 6)])
def test_a_held_out_share_is_seeded_disjoint_and_complete(
    make_image_data: Callable[..., ImageDataModule], val_fraction: float, num_val: int
) -> None:
    def split(seed: int) -> tuple[list[str], list[str]]:
        data = make_image_data(val_fraction=val_fraction, seed=seed)
        data.setup("fit")
        return sum(ids(list(data.train_dataloader())), []), sum(ids(list(data.val_dataloader())), [])

    train, val = split(5)
    assert len(val) == num_val and sorted(train + val) == [str(row) for row in range(NUM_ROWS)]
    assert split(5) == (train, val)
    assert len({tuple(split(seed)[1]) for seed in range(8)}) > 1
    alone = make_image_data(val_fraction=val_fraction)
    alone.setup("validate")
    assert sum(ids(list(alone.val_dataloader())), []) == val


def test_rows_that_share_a_picture_are_not_split(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    pictures = {0: "0.png", 3: "0.png", 5: "1.png", 1: "1.png"}
    lines = {row: json.dumps(make_row(row, picture)) for row, picture in pictures.items()} | {4: "{"}
    path = write_rows(tmp_path / "pairs.jsonl", NUM_ROWS, lines)
    sides = set()
    for seed in range(8):
        data = make_image_data(train_path=str(path), val_fraction=0.4, seed=seed)
        data.setup("fit")
        train, val = set(data.train_dataset.rows), set(data.val_dataset.rows)
        assert train | val == set(range(NUM_ROWS)) and not train & val and 2 <= len(val) <= 4
        assert all(pair <= train or pair <= val for pair in ({0, 3}, {1, 5}))
        sides.add(tuple(sorted(val)))
    assert len(sides) > 1
    one = write_rows(tmp_path / "one.jsonl", 3, {row: json.dumps(make_row(row, "0.png")) for row in range(3)})
    with pytest.raises(ValueError, match=r"^data\.val_fraction = 0\.4 leaves no training row of the 3 in .*data\.val_path$"):
        make_image_data(train_path=str(one), val_fraction=0.4).setup("fit")


def test_each_split_is_measured_against_its_own_rows(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    """Three bad rows of a file: one of them may be trained on and two validated, or the other way round."""
    data = make_image_data(val_fraction=0.5, seed=2)
    data.setup("fit")
    train, val = data.train_dataset.rows, data.val_dataset.rows
    assert (len(train), len(val)) == (3, 4)
    path = write_rows(tmp_path / "bad.jsonl", NUM_ROWS, {row: json.dumps(make_row(row, "missing.png")) for row in train[:1]})
    lines = path.read_text().splitlines()
    for row in val[:2]:
        lines[row] = json.dumps(make_row(row, f"missing{row}.png"))
    path.write_text("\n\n" + "\n".join(lines))  # blank lines count as lines, and not as rows

    def fit(max_skipped: float, folder: str) -> ImageDataModule:
        data = make_image_data(train_path=str(path), val_fraction=0.5, seed=2, max_skipped=max_skipped)
        make_trainer(tmp_path / folder, max_epochs=1).fit(Model(), datamodule=data)
        return data

    assert fit(0.5, "half").row_counts() == {"rows": 3, "trained": 2, "skipped": 1, "not_reached": 0, "dropped_tokens": 0}
    named = [json.loads(line)["line"] for line in (tmp_path / "half" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(named) == sorted(row + 3 for row in [train[0], *val[:2]])
    with pytest.raises(ValueError, match=r"^2 of 4 rows \(50 %\) from .* allows 1\."):
        fit(0.4, "less")


def test_only_training_is_shuffled_and_augmented(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    limits = MediaLimits(image=ImageLimits(max_pixels=64))
    data = make_image_data(val_path=path, test_path=path, predict_path=path, eval_batch_size=3, limits=limits)
    loaders = {}
    for stage, make_loader in (
        ("fit", data.train_dataloader),
        ("validate", data.val_dataloader),
        ("test", data.test_dataloader),
        ("predict", data.predict_dataloader),
    ):
        data.setup(stage)
        loaders[stage] = make_loader()
    batches = {stage: list(loader) for stage, loader in loaders.items()}
    in_order = [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert [ids(batches[stage]) for stage in ("validate", "test", "predict")] == [in_order] * 3
    assert list(map(len, ids(batches["fit"]))) == [2, 2, 2, 1] and ids(batches["fit"]) != [
        ["0", "1"],
        ["2", "3"],
        ["4", "5"],
        ["6"],
    ]
    assert all(same(*pair) for pair in zip(batches["validate"], loaders["validate"], strict=True))
    assert not any(same(*pair) for pair in zip(batches["fit"], loaders["fit"], strict=True))
    assert (batches["predict"][0]["labels_BT"] == -100).all() and (batches["test"][0]["labels_BT"] != -100).any()
    strict = make_image_data(test_path=str(tmp_path / "rows.jsonl"), limits=MediaLimits(image=ImageLimits(max_pixels=63)))
    assert strict.dataset("test").limits.image.max_pixels == 63


def test_validation_is_whole_each_time(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    """Also after the sanity check, which leaves its loop early, and several times an epoch."""
    model, data = Model(), make_image_data(val_path=str(tmp_path / "rows.jsonl"), eval_batch_size=3)
    make_trainer(tmp_path, val_check_interval=0.5).fit(model, datamodule=data)
    whole = [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert model.validated == whole[:2] + whole * 4
    assert make_image_data(val_path=None).val_dataloader() == []
    assert not isinstance(data.val_dataloader(), StatefulLoader)  # Lightning would save the place of one, and begin there


def test_prediction_gives_every_row_once(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    """Lightning makes the loader of a prediction anew, if it is a DataLoader."""
    data = make_image_data(predict_path=str(tmp_path / "rows.jsonl"), eval_batch_size=3)
    assert make_trainer(tmp_path).predict(Model(), datamodule=data) == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_skipped_rows_are_named_in_the_run_folder(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", NUM_ROWS, {3: "{"})
    data = make_image_data(train_path=str(path), val_path=str(path), max_skipped=0.2)
    make_trainer(tmp_path / "run").fit(Model(), datamodule=data)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert (row["file"], row["line"]) == (str(path), 4) and row["reason"].startswith("not JSON")
    assert data.row_counts() == {"rows": 7, "trained": 6, "skipped": 1, "not_reached": 0, "dropped_tokens": 0}


def test_too_many_skipped_rows_end_a_fit_with_one_paragraph(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path
) -> None:
    data = make_image_data(train_path=str(write_rows(tmp_path / "bad.jsonl", NUM_ROWS, {3: "{", 4: "}"})), num_workers=1)
    others = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match=r"^2 of 7 rows .*and data\.max_skipped = 0\.01 allows 1\. [^\n]*$"):
        make_trainer(tmp_path).fit(Model(), datamodule=data)
    assert set(multiprocessing.active_children()) <= others


def test_overfitting_repeats_the_first_batch(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    make_trainer(tmp_path, overfit_batches=1, max_epochs=3).fit(model, datamodule=make_image_data())
    assert ids(model.trained) == [["0", "1"]] * 3
    assert "data.shuffle is off" in caplog.text


@pytest.mark.parametrize("mode", [RunningStage.TRAINING, RunningStage.VALIDATING, RunningStage.PREDICTING])
def test_lightning_keeps_its_own_samplers_out(
    make_image_data: Callable[..., ImageDataModule], tmp_path: Path, mode: RunningStage
) -> None:
    """With `use_distributed_sampler`, its default, it puts one into every DataLoader of a run on several processes."""
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    data = make_image_data()
    data.setup("fit")
    loader = data.train_dataloader()
    assert trainer._accelerator_connector.is_distributed and trainer._accelerator_connector.use_distributed_sampler
    assert trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=mode) is loader


def test_each_rank_takes_its_share(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    class OneOf(Trainer):
        rank = 0

        @property
        def distributed_sampler_kwargs(self) -> dict[str, Any]:
            return {"num_replicas": 3, "rank": self.rank}

    rows = []
    for rank in range(3):
        data = make_image_data()
        data.trainer = OneOf(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        data.trainer.rank = rank
        data.setup("fit")
        rows.append(sum(ids(list(data.train_dataloader())), []))
        assert len(data.train_dataloader()) == 2
    assert sorted(sum(rows, [])) == [str(row) for row in range(NUM_ROWS)] and list(map(len, rows)) == [3, 2, 2]


def test_hand_made_batches_are_padded_as_asked(make_image_data: Callable[..., ImageDataModule]) -> None:
    data = make_image_data()
    data.setup("fit")
    short, long = data.train_dataset[0], data.train_dataset[1]
    long.tokens, long.labels, long.choices = [*long.tokens, 5], [*long.labels, 5], None
    trained, asked = data.collate([short, long]), data.collate([short, long], generate=True)
    assert trained["segments_BT"][0].tolist() == [1] * len(short.tokens) + [0]
    assert asked["segments_BT"][0].tolist() == [0] + [1] * len(short.tokens)
    assert trained["tokens_BT"][0, -1] == asked["tokens_BT"][0, 0] == data.processor.pad_id


def test_media_lie_beside_the_file_unless_told(make_image_data: Callable[..., ImageDataModule], tmp_path: Path) -> None:
    elsewhere = tmp_path / "rows"
    elsewhere.mkdir()
    (tmp_path / "rows.jsonl").replace(elsewhere / "rows.jsonl")
    data = make_image_data(train_path=str(elsewhere / "rows.jsonl"), media_root=str(tmp_path))
    data.setup("fit")
    assert data.train_dataset[2].id == "2"
    assert make_image_data(train_path=str(elsewhere / "rows.jsonl")).dataset("train").media_root.path == elsewhere.resolve()
