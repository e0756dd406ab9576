import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from demo.pictures import CLASSES, COLUMNS, SHEETS, TILE, TILES, cut, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    return prepare(tmp_path_factory.mktemp("demo") / "fashion")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(prepared: dict[str, Path], row: dict) -> bytes:
    with Image.open(prepared["media_root"] / row["images"][0]) as picture:
        assert (picture.size, picture.mode) == ((28, 28), "L")
        return picture.tobytes()


def test_cut_goes_row_by_row(tmp_path):
    sheet = Image.new("L", (3 * TILE, 2 * TILE))
    for number in range(6):
        sheet.paste(10 * number + 1, (number % 3 * TILE, number // 3 * TILE, (number % 3 + 1) * TILE, (number // 3 + 1) * TILE))
    sheet.save(tmp_path / "sheet.png")
    tiles = cut(tmp_path / "sheet.png", columns=3, count=6)
    assert [tile.getextrema() for tile in tiles] == [(value, value) for value in (1, 11, 21, 31, 41, 51)]


def test_cut_refuses_a_missing_or_wrong_sheet(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png is missing.*git checkout"):
        cut(tmp_path / "none.png", columns=3, count=6)
    Image.new("L", (30, 30)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"\(30, 30\) pixels, expected \(84, 56\)"):
        cut(tmp_path / "small.png", columns=3, count=6)


def test_the_shipped_sheets_are_small_and_complete():
    sheets = sorted(SHEETS.glob("*.png"))
    assert [sheet.stem for sheet in sheets] == sorted(f"{split}_{name}" for split in TILES for name in CLASSES)
    assert sum(sheet.stat().st_size for sheet in sheets) < 3e6


@pytest.mark.parametrize(("split", "each"), [("train", 290), ("val", 10), ("test", 50), ("preference", 200)])
def test_rows_are_balanced_shuffled_and_name_their_pictures(prepared, split, each):
    rows = read(prepared[split])
    answers = [row["messages"][1]["content"] for row in rows]
    assert Counter(answers) == dict.fromkeys(CLASSES.values(), each)
    assert len(set(answers[:30])) > 5, "rows come class by class"
    assert len({row["id"] for row in rows}) == len(rows)
    for row, answer in zip(rows, answers, strict=True):
        assert CLASSES[Path(row["images"][0]).parent.name] == answer
        assert row["messages"][0]["content"].count("<image>") == len(row["images"]) == 1
        assert row["choices"] == list(CLASSES.values())


def test_no_picture_is_in_two_splits(prepared):
    seen = {split: {pixels(prepared, row) for row in read(prepared[split])} for split in ("train", "val", "test", "preference")}
    assert [len(pictures) for pictures in seen.values()] == [2900, 100, 500, 2000]
    assert len(set.union(*seen.values())) == 5500


def test_a_picture_is_the_tile_of_its_number(prepared):
    tile = cut(SHEETS / "test_bag.png", COLUMNS["test"], TILES["test"])[11]
    assert pixels(prepared, {"images": ["test/bag/0012.png"]}) == tile.tobytes()


def test_a_second_call_changes_nothing_and_a_first_one_elsewhere_gives_the_same(prepared, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in prepared["train"].parent.rglob("*")}
    assert prepare(prepared["train"].parent) == prepared
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = prepare(tmp_path / "again")
    assert all(again[split].read_bytes() == prepared[split].read_bytes() for split in ("train", "val", "test"))
