"""Mixtures of sources: each row accounted for, and batches that depend on nothing but seed, epoch and row."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.augment import ImageAugment
from datamodules.batch import Batch
from datamodules.loader import StatefulLoader
from datamodules.media import MediaLimits
from datamodules.media_image import ImageLimits
from datamodules.mixture import MixtureDataModule
from datamodules.processor import Processor
from datamodules.row_dataset import RowKey
from datamodules.skipped import SkippedRows
from datamodules.source import MediaAugment, Source
from tests.datamodules.lightning_fakes import Model, make_trainer
from tests.datamodules.loader_fakes import epochs, make_row, same, take, write_rows

JITTER = MediaAugment(image=ImageAugment(crop_scale=(0.3, 0.9), flip=0.5, brightness=0.5))
SIZES = {"web": 9, "birds": 6, "notes": 4}
WEIGHTS = {"web": 0.5, "birds": 1.0, "notes": 2.0}
ROWS_AN_EPOCH = {"web": 5, "birds": 6, "notes": 8}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Source]:
    """Three files in folders of their own, the last one without pictures."""
    found = {}
    for name, size in SIZES.items():
        (tmp_path / name).mkdir()
        lines = {row: json.dumps(make_row(row)) for row in range(size)} if name == "notes" else None
        path = str(write_rows(tmp_path / name / "rows.jsonl", size, lines))
        found[name] = Source(train_path=path, val_path=path, weight=WEIGHTS[name], augment=JITTER)
    return found


@pytest.fixture
def make(sources: dict[str, Source], row_processor: Processor) -> Callable[..., MixtureDataModule]:
    def data(sources: dict[str, Source] = sources, stage: str | None = "fit", **options: Any) -> MixtureDataModule:
        defaults = {"batch_size": 4, "num_workers": 0, "seed": 5, "processor": row_processor}
        module = MixtureDataModule(sources, **(defaults | options))
        if stage is not None:
            module.setup(stage)
        return module

    return data


def rows(batches: list[Batch]) -> list[list[tuple[str, int]]]:
    """Source and row number of what is in each batch."""
    return [[(example["source"], example["line"] - 1) for example in batch["examples"]] for batch in batches]


def change_line(source: Source, number: int, line: str) -> None:
    path = Path(str(source.train_path))
    lines = path.read_text().splitlines()
    lines[number] = line
    path.write_text("\n".join(lines) + "\n")


def test_each_epoch_passes_over_the_sources_as_often_as_their_weights_say(make: Callable[..., MixtureDataModule]) -> None:
    loader, seen = make().train_dataloader(), Counter[tuple[str, int]]()
    for _ in range(4):
        epoch = rows(list(loader))
        assert [len(batch) for batch in epoch] == [4, 4, 4, 4, 3]
        assert Counter(name for batch in epoch for name, _ in batch) == ROWS_AN_EPOCH
        assert max(len({name for name, _ in batch}) for batch in epoch) > 1
        seen.update(row for batch in epoch for row in batch)
    for name, size in SIZES.items():
        counts = [seen[name, row] for row in range(size)]
        assert sum(counts) == 4 * ROWS_AN_EPOCH[name] and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("taken", [0, 3, 5, 12])
def test_batches_are_the_same_with_workers_and_after_a_resume(make: Callable[..., MixtureDataModule], taken: int) -> None:
    whole = epochs(make().train_dataloader(), 3)
    with_workers = make(num_workers=2).train_dataloader()
    got = take(with_workers, taken)
    state = json.loads(json.dumps(with_workers.state_dict()))
    with_workers.stop_workers()
    resumed = make().train_dataloader()
    resumed.load_state_dict(state)
    got += take(resumed, 3)
    assert all(same(*pair) for pair in zip(got, whole, strict=False))
    assert len(str(state)) < 1_000  # a few numbers, however many rows there are


def test_a_row_and_its_augmentation_do_not_depend_on_the_other_sources(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source]
) -> None:
    mixed = make().train_dataset
    alone = make({"birds": sources["birds"]}).train_dataset
    for row, earlier in ((0, 0), (5, 0), (5, 3)):
        one, other = mixed[RowKey(SIZES["web"] + row, earlier)], alone[RowKey(row, earlier)]
        assert one.origin == other.origin and one.tokens == other.tokens
        assert torch.equal(one.media["image"][0].media, other.media["image"][0].media)
    again = mixed[RowKey(SIZES["web"] + 5, 1)]
    assert not torch.equal(again.media["image"][0].media, one.media["image"][0].media)
    fewer = {name: source for name, source in sources.items() if name != "birds"}
    order = make(fewer).train_dataloader().rows.portions
    assert order == tuple(portion for portion in make().train_dataloader().rows.portions if portion.num_rows != 6)


def test_two_sources_with_the_same_picture_keep_their_own_augmentation(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source]
) -> None:
    """In one batch a picture that is changed in two ways must not be taken for one."""
    plain = replace(sources["web"], augment=MediaAugment())
    items = [
        make({"a": replace(sources["web"], weight=1.0), "b": sources["web"], "c": plain}).train_dataset[row].media["image"][0]
        for row in (3, 9 + 3, 18 + 3)
    ]
    assert len({item.key for item in items}) == 3
    assert len({str(item.media.tolist()) for item in items}) == 3


def test_the_rows_of_each_source_are_trained_or_named(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source], tmp_path: Path
) -> None:
    change_line(sources["birds"], 2, "{")
    change_line(sources["notes"], 0, json.dumps({"id": 1}))
    data = make(stage=None, max_skipped=0.5)
    make_trainer(tmp_path / "run", max_epochs=3).fit(model := Model(), datamodule=data)
    assert data.source_counts() == {
        "web": {"rows": 5, "trained": 5, "skipped": 0, "not_reached": 0},
        "birds": {"rows": 6, "trained": 5, "skipped": 1, "not_reached": 0},
        "notes": {"rows": 8, "trained": 6, "skipped": 2, "not_reached": 0},
    }
    assert data.row_counts() == {"rows": 19, "trained": 16, "skipped": 3, "not_reached": 0, "dropped_tokens": 0}
    named = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert sorted((row["source"], row["line"]) for row in named) == [("birds", 3), ("notes", 1)]
    assert {row["file"] for row in named} == {sources["birds"].train_path, sources["notes"].train_path}
    assert len(model.trained) == 15


def test_the_account_of_all_processes_goes_on_after_a_resume(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source], tmp_path: Path
) -> None:
    """The checkpoint is that of the first process."""
    change_line(sources["birds"], 2, "{")
    change_line(sources["notes"], 0, json.dumps({"id": 1}))

    def loaders() -> list[StatefulLoader]:
        dataset = make().train_dataset
        return [
            StatefulLoader(
                dataset,
                2,
                {
                    source.name: SkippedRows(
                        tmp_path / "skipped.jsonl", str(source.file.path), len(source), 1.0, source=source.name
                    )
                    for source in dataset.sources
                },
                weights=WEIGHTS,
                shuffle=True,
                seed=5,
                rank=rank,
                world_size=2,
            )
            for rank in range(2)
        ]

    def account(loaders: list[StatefulLoader]) -> dict[str, Counter[str]]:
        counts = [loader.source_counts() for loader in loaders]
        return {name: Counter(counts[0][name]) + Counter(counts[1][name]) for name in SIZES}

    for taken in range(1, 5):
        stopped = loaders()
        for loader in stopped:
            take(loader, taken)
        resumed = loaders()
        for loader in resumed:
            loader.load_state_dict(stopped[0].state_dict())
        assert account(resumed) == account(stopped) != account(loaders())
        for loader in resumed:
            list(loader)
        assert account(resumed)["birds"] == Counter(rows=6, trained=5, skipped=1)
        assert account(resumed)["notes"] == Counter(rows=8, trained=6, skipped=2)


def test_a_bad_row_of_one_source_leaves_a_gap_and_changes_nothing_else(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source]
) -> None:
    good = rows(epochs(make().train_dataloader(), 2))
    change_line(sources["birds"], 2, "{")
    gaps = rows(epochs(make().train_dataloader(), 2))
    assert gaps == [[row for row in batch if row != ("birds", 2)] for batch in good] != good


def test_too_many_bad_rows_are_counted_by_source(make: Callable[..., MixtureDataModule], sources: dict[str, Source]) -> None:
    """Two of 19 rows are not many, but two of the six birds are."""
    change_line(sources["birds"], 2, "{")
    change_line(sources["birds"], 4, "{")
    with pytest.raises(
        ValueError, match=r"^2 of 6 rows .* from .*rows\.jsonl \(source 'birds'\) could not be used, .* allows 1\."
    ):
        list(make(max_skipped=0.2).train_dataloader())
    for row in range(SIZES["notes"]):
        change_line(sources["notes"], row, json.dumps({"id": row}))
    with pytest.raises(ValueError, match=r"^4 of 4 rows \(100 %\) .*\(source 'notes'\) could not be used, so none is left"):
        list(make(max_skipped=1.0).train_dataloader())


def test_an_evaluation_takes_each_row_once_and_its_first_batches_a_share_of_each_source(
    make: Callable[..., MixtureDataModule],
) -> None:
    data = make(stage="validate")
    order = sum(rows(list(data.val_dataloader())), [])
    assert sorted(order) == [(name, row) for name, size in sorted(SIZES.items()) for row in range(size)]
    for name, size in SIZES.items():
        assert [row for source, row in order if source == name] == list(range(size))
        for num_taken in range(len(order) + 1):
            share = size * num_taken / len(order)
            assert abs(sum(source == name for source, _ in order[:num_taken]) - share) <= 1
    first = [data.val_dataset.sample(row).origin for row in data.val_dataset.in_turn()][:4]
    assert [(origin.source, origin.line) for origin in first] == [("web", 1), ("birds", 1), ("notes", 1), ("web", 2)]


def test_sources_take_part_in_the_splits_that_they_have_files_for(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source]
) -> None:
    only_val = {**sources, "birds": replace(sources["birds"], train_path=None), "notes": replace(sources["notes"], val_path=None)}
    data = make(only_val)
    assert {name for batch in rows(list(data.train_dataloader())) for name, _ in batch} == {"web", "notes"}
    assert {name for batch in rows(list(data.val_dataloader())) for name, _ in batch} == {"web", "birds"}


def test_no_picture_is_trained_on_in_one_source_and_held_out_in_another(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source], tmp_path: Path
) -> None:
    """Questions and captions about the same pictures, named from different folders."""
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(make_row(row, f"web/{row}.png")) + "\n" for row in (4, 3, 2, 1, 0, 3)))
    held_out = {
        "web": replace(sources["web"], val_path=None, val_fraction=0.3, weight=1.0),
        "captions": Source(train_path=str(captions), val_fraction=0.4),
        "notes": sources["notes"],
    }
    for seed in range(4):
        data = make(held_out, seed=seed)
        pictures = [
            {str(medium.source) for row in range(len(dataset)) for medium in dataset.sample(row).media("image")}
            for dataset in (data.train_dataset, data.val_dataset)
        ]
        train, val = ({name.removeprefix("web/") for name in names} for names in pictures)
        assert train and val and not train & val
        assert {source.name for source in data.val_dataset.sources} == {"web", "captions", "notes"}


def test_each_source_is_read_in_its_own_way(
    make: Callable[..., MixtureDataModule], row_processor: Processor, tmp_path: Path
) -> None:
    """One file, read twice: with other prompts, folders and limits."""
    for folder in ("small", "large"):
        write_rows(tmp_path / f"{folder}.jsonl", 1)
        (tmp_path / folder).mkdir()
    shutil.copy(tmp_path / "0.png", tmp_path / "small/0.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "large/0.png")
    flat = tmp_path / "flat.jsonl"
    flat.write_text(json.dumps({"image": "0.png", "thing": "it", "answer": "Well."}) + "\n")
    source = Source(train_path=str(flat), media_root=str(tmp_path / "small"), prompt_template="What is {thing}?")
    strict = MediaLimits(image=ImageLimits(max_pixels=63))
    other = replace(source, media_root=str(tmp_path / "large"), prompt_template="Name {thing}.", limits=strict)
    dataset = make({"asked": source, "told": replace(other, limits=MediaLimits()), "strict": other}).train_dataset
    assert [dataset[row].prompt for row in (0, 1)] == ["<image>What is it?", "<image>Name it."]
    (error,) = (item for item in dataset.__getitems__([0, 1, 2]) if isinstance(item, Exception))
    assert error.origin.source == "strict" and "max_pixels" in str(error)
    with pytest.raises(IndexError, match="rows 0 to 2, got 3"):
        dataset[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1.0}, r"training data belongs to weight of web 0\.5 \(now 1\.0\): a run is resumed with the data"),
        (None, r"belongs to sources web \+ birds \+ notes \(now birds \+ notes\), training rows of web 9 \(now None\)"),
    ],
)
def test_a_place_in_another_mixture_is_refused(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source], change: dict[str, Any] | None, message: str
) -> None:
    state = make().train_dataloader().state_dict()
    web = {} if change is None else {"web": replace(sources["web"], **change)}
    others = {name: source for name, source in sources.items() if name != "web"}
    with pytest.raises(ValueError, match=message):
        make({**web, **others}).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, r"^data\.sources\.web\.weight is a number of passes .* an epoch, above 0 .*, got 0\.0$"),
        ({"weight": float("nan")}, r"^data\.sources\.web\.weight is .*, got nan$"),
        ({"weight": float("inf")}, r"^data\.sources\.web\.weight is .*, got inf$"),
        ({"val_fraction": 1.0}, r"^data\.sources\.web\.val_fraction is a share .*, got 1\.0$"),
        ({"train_path": None}, r"^data\.sources\.web has no train_path, but a weight or a val_fraction"),
        ({"train_path": None, "val_path": None, "weight": 1.0}, r"^data\.sources\.web has no file: .* The sources are web, bir"),
        ({"train_path": "no.jsonl"}, r"^data\.sources\.web\.train_path: .*no\.jsonl cannot be read"),
        ({"val_path": "no.jsonl"}, r"^data\.sources\.web\.val_path: .*no\.jsonl cannot be read"),
        ({"media_root": "nowhere"}, r"^data\.sources\.web: media_root .*nowhere does not exist"),
        ({"prompt_template": "{a"}, r"^data\.sources\.web: prompt_template '\{a' is malformed"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(
    make: Callable[..., MixtureDataModule], sources: dict[str, Source], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make({**sources, "web": replace(sources["web"], **changes)})


def test_what_is_wrong_with_all_sources_is_named(make: Callable[..., MixtureDataModule], sources: dict[str, Source]) -> None:
    with pytest.raises(ValueError, match=r"^data\.sources is empty: name at least one"):
        make({})
    for name in ("a/b", "a.b", ""):  # they stand in names of metrics and of flags
        with pytest.raises(ValueError, match=rf"^data\.sources has the name '{name}': a name is of letters"):
            make({name: sources["web"]})
    with pytest.raises(
        ValueError, match=r"^none of the sources web, birds, notes has test rows: .* data\.sources\.<name>\.test_path"
    ):
        make(stage="test")
    shared = replace(sources["web"], val_path=None, val_fraction=0.5)
    for row in range(SIZES["web"]):
        change_line(shared, row, json.dumps(make_row(row, "0.png")))
    with pytest.raises(
        ValueError, match=r"^data\.sources\.web\.val_fraction = 0\.5 leaves no training row .*sources\.web\.val_path$"
    ):
        make({"web": shared})
