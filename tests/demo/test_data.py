from pathlib import Path

from demo import motion
from demo.data import prepare_all
from tests.demo.row_checks import check_row, read_rows

SHIPPED = Path(__file__).parents[2] / "demo"


def test_all_data_come_as_rows_of_one_form(tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "SPLIT_EMOJI", {"train": 1, "val": 1, "test": 1})
    prepared = prepare_all(tmp_path)
    assert list(prepared) == ["image", "video", "audio"]
    for modality, files in prepared.items():
        splits = ["train", "val", "test", *(["preference"] if modality == "image" else [])]
        assert list(files) == ["media_root", *splits]
        for split in splits:
            rows = read_rows(files[split])
            answers = {check_row(row, modality, files["media_root"], rows[0]["choices"]) for row in rows[:200]}
            assert len(answers) > 3
            assert [row[f"{modality}s"] for row in rows] != sorted(row[f"{modality}s"] for row in rows), "rows come sorted"


def test_what_ships_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file() and file.suffix != ".pyc") < 8_000_000
