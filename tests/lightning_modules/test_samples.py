"""The sample page: the same rows each time, every answer judged, nothing lost on resume, nothing from outside."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from callback_fakes import FakeData, FakeModule, good_batch, make_trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from datamodules.thumbnails import THUMBNAIL_PIXELS, data_uri
from lightning_modules import samples
from lightning_modules.sample_table import Column, Row, SampleTable
from lightning_modules.samples import SamplePage


def data() -> FakeData:
    return FakeData([good_batch()] * 4, [good_batch()])


def fit(folder: Path, module: FakeModule, num_samples: int = 8, **options: Any) -> None:
    make_trainer(folder, [SamplePage(num_samples)], val_check_interval=2, **options).fit(module, datamodule=data())


def table(folder: Path) -> SampleTable:
    return SampleTable.from_json((folder / "samples.json").read_text(encoding="utf-8"))


def test_a_column_for_each_validation_but_none_for_the_sanity_check(tmp_path: Path) -> None:
    module = FakeModule()
    fit(tmp_path, module)
    kept = table(tmp_path)
    assert [row.id for row in kept.rows] == ["0", "2", "3", "4"]  # row 1 is bad
    assert [len(row.pictures) for row in kept.rows] == [1, 0, 1, 1]  # row 2 is text only
    assert kept.rows[0] == Row("0", "val.jsonl:1", "<image>What is 0 < 5?", "answer 0", True, kept.rows[0].pictures)
    assert [column.step for column in kept.columns] == [2, 4]
    for column in kept.columns:
        assert column.answers == ("answer 0", "answer 2", "answer 3", "answer 4")
        assert column.losses == (0.5, 1.0, 1.5, 2.0)
        assert column.val_loss is not None and column.val_loss > 0
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert page.index("step 4") < page.index("step 2")
    assert len(module.asked) == 2 and not any(batch["labels_BT"].ne(-100).any() for batch in module.asked)  # prompts alone


def test_no_more_rows_than_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, FakeModule(), num_samples=2)
    assert [row.id for row in table(tmp_path).rows] == ["0", "2"]
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        SamplePage(0)


def test_a_resumed_run_goes_on_with_the_page(tmp_path: Path) -> None:
    fit(tmp_path, FakeModule(), max_steps=2)
    module = FakeModule()
    module.generate = lambda batch: ["other"] * len(batch["examples"])  # type: ignore[method-assign]
    make_trainer(tmp_path, [SamplePage()]).validate(module, datamodule=data(), verbose=False)
    assert [column.name for column in table(tmp_path).columns] == ["step 2", "validate"]
    make_trainer(tmp_path, [SamplePage()]).validate(FakeModule(), datamodule=data(), verbose=False)
    kept = table(tmp_path).columns
    assert [column.name for column in kept] == ["step 2", "validate"] and kept[1].answers[0] == "answer 0"
    fit(tmp_path, module)  # from the start again
    assert [(column.name, column.answers[0]) for column in table(tmp_path).columns][1:] == [
        ("step 2", "other"),
        ("step 4", "other"),
    ]
    fit(tmp_path, module, num_samples=1)  # other rows are another page
    assert len(table(tmp_path).rows) == 1


def test_a_page_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"samples.json cannot be read \(not a table of samples.*\): delete it"):
        fit(tmp_path, FakeModule())


def test_where_no_row_can_be_used_training_goes_on(tmp_path: Path) -> None:
    empty = data()
    empty.val_dataset.num_rows = 0
    trainer = make_trainer(tmp_path, [SamplePage()])
    trainer.fit(FakeModule(), datamodule=empty)
    assert trainer.global_step == 4 and not (tmp_path / "samples.html").exists()


class FakeLogger(WandbLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict[str, Any]] = []

    @property
    def experiment(self) -> Any:
        return self

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_table(self, key: str, **options: Any) -> None:  # type: ignore[override]
        self.tables.append({"key": key, **options})


def test_wandb_gets_a_table_instead_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_wandb_image", lambda picture: picture)
    logger = FakeLogger()
    fit(tmp_path, FakeModule(), logger=logger)
    assert [(logged["key"], logged["step"]) for logged in logger.tables] == [("val/samples", 2), ("val/samples", 4)]
    assert [row[-2] for row in logger.tables[0]["data"]] == [True, True, False, False]
    rows = [dict(zip(logger.tables[0]["columns"], row, strict=True)) for row in logger.tables[0]["data"]]
    assert [(row["id"], row["answer"], row["loss"]) for row in rows] == [
        (i, f"answer {i}", n / 2) for n, i in enumerate("0234", 1)
    ]
    assert rows[1]["picture"] is None and rows[0]["picture"].size == (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS * 3 // 4)
    assert not (tmp_path / "samples.html").exists()


@pytest.mark.parametrize(
    ("reference", "closed", "answer", "verdict"),
    [
        ("A red bus.\n", False, " A red bus.", "right"),
        ("A red bus.", False, "a red bus", "wrong"),
        ("A red bus.", False, "A blue bus.", "wrong"),
        ("bus", False, "", "wrong"),
        ("3.5", False, "35", "wrong"),
        ("A red bus waits at the corner of a street.", False, "A bus at a corner.", "open"),
        ("A red bus waits at the corner of a street.", False, "A red bus waits at the corner of a street.", "right"),
        ("A red bus waits at the corner of a street.", True, "A bus at a corner.", "wrong"),
    ],
)
def test_judge(reference: str, closed: bool, answer: str, verdict: str) -> None:
    assert Row("1", "a:1", "?", reference, closed).judge(answer) == verdict


class Page(HTMLParser):
    """Text by class of the cell, and all addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append((given.get("class") or tag, ""))

    def handle_data(self, data: str) -> None:
        if self.cells:
            kind, text = self.cells[-1]
            self.cells[-1] = (kind, text + data)


def test_page_is_safe_and_self_contained() -> None:
    evil = '<script>alert("x")</script> & <b>'
    uri = data_uri(Image.new("RGB", (20, 30), "red"))
    rows = [Row(evil, evil, f"<image>{evil}", evil, False, (uri, uri)), Row("2", "a:2", "Name it", "bus")]
    columns = [
        Column("step 10", 10, 0.75, (evil, "car"), (0.5, 1.25)),
        Column("step 1,000", 1000, None, ("", "bus"), (0.25, 2.0)),
    ]
    text = SampleTable(rows, columns).to_html(evil)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "b", "link"})
    assert page.addresses == [uri, uri] and "url(" not in text and "@import" not in text
    assert re.match(r"data:image/png;base64,[A-Za-z0-9+/=]+$", uri)
    heads = [cell.strip() for kind, cell in page.cells if kind == "th"][3:]
    assert heads == ["step 1,0001 of 2 right", "step 10val/loss 0.7501 of 2 right"]
    answers = [(kind, text.strip()) for kind, text in page.cells if kind in ("right", "wrong", "open")]
    assert answers[:2] == [("wrong", "✗ empty0.250"), ("right", f"✓ {evil}0.500")]
    assert answers[2:] == [("right", "✓ bus2.000"), ("wrong", "✗ car1.250")]
    assert next(text for kind, text in page.cells if kind == "question").startswith(f"image{evil}")


def test_json_keeps_the_table() -> None:
    rows = [Row("1", "a:1", "é?", "\u2028", True, ("data:x",)), Row("2", "a:2", "?", "!")]
    before = SampleTable(rows, [Column("validate", None, None, ("a", "b"), (0.5, 1.0))])
    assert SampleTable.from_json(before.to_json()) == before
    assert json.loads(before.to_json())["rows"][0]["question"] == "é?"
