"""Rows with answers through datasets and data modules: one decode a pair, each row accounted for, any place to go on from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

import datamodules.dataset
from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample
from datamodules.augment import ImageAugment
from datamodules.batch import Example, RowError
from datamodules.cache import CacheOptions
from datamodules.corrupt import MediaCorruption
from datamodules.dataset import MultiModalDataset
from datamodules.mixture import MixtureDataModule
from datamodules.preference import PreferenceDataModule
from datamodules.processor import Processor, PromptOptions
from datamodules.row_dataset import RowKey
from datamodules.source import MediaAugment, Source
from tests.datamodules.lightning_fakes import Model, make_trainer
from tests.datamodules.loader_fakes import PixelEncoder, make_processor, make_row, same, write_rows

PAIRS = AnswerForm("pairs")
MDPO = AnswerForm("pairs", corrupt_media=True)
JITTER = ImageAugment(crop_scale=(0.3, 0.9), flip=0.5, brightness=0.5)


def pair(number: int, rejected: Any = "Nothing.", **other: Any) -> str:
    return json.dumps(make_row(number, f"{number}.png") | {"rejected_response": rejected} | other)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six pairs, one of two rejected answers, one with a rejected picture, and one that is broken."""
    lines = {number: pair(number) for number in range(6)}
    lines[1] = pair(1, ["Nothing.", "A house."])
    lines[2] = pair(2, "Nothing.", rejected_images=["0.png"])
    lines[4] = json.dumps(make_row(4, "4.png"))
    return write_rows(tmp_path / "rows.jsonl", 6, lines)


def make(rows: Path, processor: Processor, form: AnswerForm = PAIRS, augment: ImageAugment | None = None) -> MultiModalDataset:
    return MultiModalDataset(str(rows), str(rows.parent), processor, augment=augment, seed=11, answer_form=form)


def sides(example: Example) -> list[tuple[str, Example]]:
    assert isinstance(example, AnswerExample)
    return [*example.answers]


def test_the_sides_are_what_the_processor_makes_of_each_conversation(rows: Path, row_processor: Processor) -> None:
    dataset = make(rows, row_processor)
    got = sides(dataset[1])
    assert [role for role, _ in got] == ["chosen", "rejected", "rejected"]
    for (_, side), answer in zip(got, ("It is 1.", "Nothing.", "A house."), strict=True):
        alone = rows.parent / "alone.jsonl"
        alone.write_text(json.dumps(make_row(1, "1.png", answer)) + "\n")
        expected = make(alone, row_processor, AnswerForm())[0]
        assert (side.tokens, side.labels) == (expected.tokens, expected.labels)
        assert torch.equal(side.media["image"][0].media, expected.media["image"][0].media)
    assert dataset.num_tokens(1) == sum(len(side.tokens) for _, side in got)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded."""
    found: list[str] = []
    decode = datamodules.dataset.decode

    def counting(medium: Any, *args: Any) -> Any:
        found.append(medium.source)
        return decode(medium, *args)

    monkeypatch.setattr(datamodules.dataset, "decode", counting)
    return found


class CountingEncoder(PixelEncoder):
    """Counts the pictures that are transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def transform(self, image: Image.Image) -> torch.Tensor:  # type: ignore[override]
        self.count += 1
        return super().transform(image)


def test_a_picture_is_decoded_and_transformed_once_for_all_answers(
    rows: Path, row_processor: Processor, decodes: list[str]
) -> None:
    encoder = CountingEncoder()
    processor = Processor(row_processor.name_or_path, PromptOptions(), {"image": encoder}, row_processor.projectors)
    dataset = make(rows, processor)
    first = dataset[0]
    assert (decodes, encoder.count) == (["0.png"], 1)
    (_, chosen), (_, rejected) = sides(first)
    assert chosen.media["image"][0].media is rejected.media["image"][0].media
    dataset[1], dataset[2]
    assert decodes == ["0.png", "1.png", "2.png", "0.png"]
    make(rows, processor, MDPO)[0]
    assert (decodes[4:], encoder.count) == (["0.png"], 6)  # the corrupted picture is made of the decoded one


def test_rejected_media_are_those_of_the_row(rows: Path, row_processor: Processor) -> None:
    dataset = make(rows, row_processor)
    (_, chosen), (_, rejected) = sides(dataset[2])
    pictures = [sides(dataset[number])[0][1].media["image"][0].media for number in (2, 0)]
    assert torch.equal(chosen.media["image"][0].media, pictures[0])
    assert torch.equal(rejected.media["image"][0].media, pictures[1])


def test_both_answers_see_the_same_augmented_picture(rows: Path, row_processor: Processor) -> None:
    dataset, single = make(rows, row_processor, PAIRS, JITTER), make(rows, row_processor, AnswerForm(), JITTER)
    for epoch in (0, 1):
        (_, chosen), (_, rejected) = sides(dataset[RowKey(3, epoch)])
        assert torch.equal(chosen.media["image"][0].media, rejected.media["image"][0].media)
        assert torch.equal(chosen.media["image"][0].media, single[RowKey(3, epoch)].media["image"][0].media)
    assert not torch.equal(*(sides(dataset[RowKey(3, epoch)])[0][1].media["image"][0].media for epoch in (0, 1)))


def test_caches_hold_the_pictures_of_pairs(rows: Path, row_processor: Processor, tmp_path: Path, decodes: list[str]) -> None:
    plain, cached = make(rows, row_processor, MDPO), make(rows, row_processor, MDPO)
    cached.open_caches(CacheOptions(str(tmp_path / "cache")))
    expected = plain[0]
    for _ in range(2):
        for (role, one), (_, other) in zip(sides(expected), sides(cached[0]), strict=True):
            assert one.tokens == other.tokens
            assert torch.equal(one.media["image"][0].media, other.media["image"][0].media), role


def test_corrupted_media_depend_on_the_seed_and_the_row_alone(rows: Path, row_processor: Processor) -> None:
    dataset = make(rows, row_processor, MDPO)

    def corrupted(row: int, epoch: int = 0) -> Example:
        (role, example), *_ = reversed(sides(dataset[RowKey(row, epoch)]))
        assert role == "corrupted"
        return example

    one, again, chosen = corrupted(0), corrupted(0, epoch=3), sides(dataset[0])[0][1]
    assert one.tokens == chosen.tokens and one.labels == chosen.labels
    assert torch.equal(one.media["image"][0].media, again.media["image"][0].media)
    assert not torch.equal(one.media["image"][0].media, chosen.media["image"][0].media)
    assert one.media["image"][0].key == again.media["image"][0].key != chosen.media["image"][0].key
    for kind in ("noise", "other"):
        form = AnswerForm("pairs", corrupt_media=True, corruption=MediaCorruption(image=kind))  # type: ignore[arg-type]
        other = sides(make(rows, row_processor, form)[0])[-1][1]
        assert not torch.equal(other.media["image"][0].media, chosen.media["image"][0].media)
        assert not torch.equal(other.media["image"][0].media, one.media["image"][0].media)


def test_a_pair_that_is_too_long_is_refused_by_name(rows: Path, tmp_path: Path) -> None:
    length = max(len(side.tokens) for _, side in sides(make(rows, make_processor(tmp_path))[0]))
    skip = make(rows, make_processor(tmp_path, PromptOptions(max_length=length)))
    assert len(sides(skip[0])) == 2
    with pytest.raises(RowError, match=rf"rows\.jsonl:2: rejected answer 2: .* are above prompt\.max_length = {length}"):
        write_rows(rows, 6, {1: pair(1, ["No.", "A house with very many windows and doors, behind the trees of the street."])})
        make(rows, make_processor(tmp_path, PromptOptions(max_length=length)))[1]
    cut = make(rows, make_processor(tmp_path, PromptOptions(max_length=length, on_too_long="cut")))
    *_, (_, long) = sides(cut[1])
    assert len(long.tokens) == length and long.labels[-1] == long.tokens[-1] and long.num_dropped_tokens > 0


def described(batches: Sequence[Any]) -> list[str]:
    return [example["id"] for batch in batches for example in batch["examples"]]


def test_trained_and_skipped_are_the_rows_of_the_file(rows: Path, row_processor: Processor, tmp_path: Path) -> None:
    data = PreferenceDataModule(
        train_path=str(rows), batch_size=2, num_workers=0, processor=row_processor, answer_form=MDPO, max_skipped=1.0
    )
    model = Model()
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=data)
    assert data.row_counts() == {"rows": 6, "trained": 5, "skipped": 1, "not_reached": 0, "dropped_tokens": 0}
    assert data.media_counts()["image"] == 6  # five rows, and a rejected picture
    assert len(described(model.trained)) == 5 + 5  # the corrupted ones
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 5 and "there is no rejected answer" in json.loads(line)["reason"]


class SaveAt(Callback):
    """A checkpoint after so many batches."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if len(pl_module.trained) == self.num_batches:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"batch{self.num_batches}.ckpt")


def test_a_run_with_pairs_goes_on_where_it_was(rows: Path, row_processor: Processor, tmp_path: Path) -> None:
    def make_data() -> PreferenceDataModule:
        return PreferenceDataModule(
            train_path=str(rows),
            batch_size=2,
            num_workers=0,
            seed=4,
            processor=row_processor,
            answer_form=PAIRS,
            augment=MediaAugment(image=JITTER),
            max_skipped=1.0,
        )

    whole, rest = Model(), Model()
    make_trainer(tmp_path, SaveAt(4)).fit(whole, datamodule=make_data())
    data = make_data()
    make_trainer(tmp_path).fit(rest, datamodule=data, ckpt_path=str(tmp_path / "batch4.ckpt"))
    assert len(whole.trained) == 6 and len(rest.trained) == 2
    assert all(map(same, rest.trained, whole.trained[4:]))
    assert data.row_counts() == {"rows": 6, "trained": 5, "skipped": 1, "not_reached": 0, "dropped_tokens": 0}


def test_a_mixture_of_pairs(rows: Path, row_processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    text = tmp_path / "text" / "rows.jsonl"
    text.write_text("".join(json.dumps({"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."}) + "\n" for n in range(3)))
    sources = {"web": Source(train_path=str(rows)), "text": Source(train_path=str(text))}
    data = MixtureDataModule(sources, batch_size=4, num_workers=0, processor=row_processor, answer_form=PAIRS, max_skipped=1.0)
    model = Model()
    make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    counts = data.source_counts()
    assert counts["text"] == {"rows": 3, "trained": 3, "skipped": 0, "not_reached": 0}
    assert counts["web"] == {"rows": 6, "trained": 5, "skipped": 1, "not_reached": 0}


def test_the_same_rows_without_an_objective_that_compares(rows: Path, row_processor: Processor) -> None:
    data = PreferenceDataModule(train_path=str(rows), num_workers=0, processor=row_processor, batch_size=6)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert "answers" not in batch and len(batch["examples"]) == 6


def test_a_batch_of_one_row_has_no_mismatched_answers(
    rows: Path, row_processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    form = AnswerForm("feedback", mismatched=True)
    lines = {number: json.dumps(make_row(number, f"{number}.png") | {"label": number % 2 == 0}) for number in range(6)}
    write_rows(rows, 6, lines)
    options: dict[str, Any] = {"train_path": str(rows), "num_workers": 0, "processor": row_processor, "answer_form": form}
    for batch_size in (1, 3):
        caplog.clear()
        data = PreferenceDataModule(batch_size=batch_size, **options)
        data.setup("fit")
        roles = [role for batch in data.train_dataloader() for role in batch["answers"]["roles"]]
        assert roles.count("mismatched") == (0 if batch_size == 1 else 6)
        assert (roles.count("desirable"), roles.count("undesirable")) == (3, 3)
        assert caplog.text.count("the divergence is not estimated") == (batch_size == 1)


def test_validation_rows_share_no_media_with_the_rejected_sides(tmp_path: Path, row_processor: Processor) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 4, {n: pair(n, rejected_images=[f"{(n + 2) % 4}.png"]) for n in range(4)})
    data = PreferenceDataModule(
        train_path=str(path), val_fraction=0.5, num_workers=0, processor=row_processor, answer_form=PAIRS, shuffle=False
    )
    data.setup("fit")
    held = [
        [example["id"] for batch in loader for example in batch["examples"]]
        for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    assert sorted(map(sorted, map(set, held))) == [["0", "2"], ["1", "3"]]
