"""Predictions in the run folder: every row, in order, once, and nothing overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
from callback_fakes import FakeData, FakeModule, good_batch, make_trainer

from lightning_modules.predictions import PredictionWriter, _merge


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def predict(folder: Path, module: FakeModule) -> None:
    make_trainer(folder, [PredictionWriter()]).predict(module, datamodule=FakeData([good_batch(), good_batch()]))


def test_rows_are_written_and_earlier_files_stay(tmp_path: Path) -> None:
    module = FakeModule()
    predict(tmp_path, module)
    rows = lines(tmp_path / "predictions.jsonl")
    assert [row["response"] for row in rows] == ["answer r0", "answer r1"] * 2
    assert rows[1] == {"id": "r1", "file": "train.jsonl", "line": 2, "reference": "", "response": "answer r1", "right": None}
    assert [row["right"] for row in rows] == [True, None] * 2
    before = (tmp_path / "predictions.jsonl").read_bytes()
    module.generate = lambda batch: ["été\u2028 <b>", "\U0001f600"]  # type: ignore[method-assign]
    predict(tmp_path, module)
    predict(tmp_path, module)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    second = lines(tmp_path / "predictions-2.jsonl")[0]
    assert (second["response"], second["right"]) == ("été\u2028 <b>", False)
    assert "\U0001f600" in (tmp_path / "predictions-3.jsonl").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.glob("*predictions*")) == [
        "predictions-2.jsonl",
        "predictions-3.jsonl",
        "predictions.jsonl",
    ]


def test_an_interrupted_prediction_keeps_its_rows_under_another_name(tmp_path: Path) -> None:
    module = FakeModule()
    answers = iter([["a", "b"]])

    def fails_at_the_second_batch(batch: Any) -> list[str]:
        try:
            return next(answers)
        except StopIteration:
            raise RuntimeError("out of memory") from None

    module.generate = fails_at_the_second_batch  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(tmp_path, module)
    assert not (tmp_path / "predictions.jsonl").exists()
    assert [row["response"] for row in lines(tmp_path / ".predictions.0.part")] == ["a", "b"]


def test_ranks_are_merged_in_row_order_and_padding_goes(tmp_path: Path) -> None:
    def row(file: str, line: int) -> str:
        return json.dumps({"file": file, "line": line, "response": f"é\u2028{line}"}, ensure_ascii=False) + "\n"

    parts = [tmp_path / f".predictions.{rank}.part" for rank in range(2)]
    # two ranks take turns; the last row is given to both, to make the batches even
    parts[0].write_text(row("b", 1) + row("b", 3) + row("a", 2) + row("b", 1), encoding="utf-8")
    parts[1].write_text(row("b", 2) + row("a", 1) + row("a", 13), encoding="utf-8")
    assert _merge(parts) == 6
    merged = [(got["file"], got["line"], got["response"]) for got in lines(parts[0])]
    assert merged == [("b", n, f"é\u2028{n}") for n in (1, 2, 3)] + [("a", n, f"é\u2028{n}") for n in (1, 2, 13)]
    assert not parts[1].exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\).*--trainer.default_root_dir"):
        predict(tmp_path / "file" / "run", FakeModule())
