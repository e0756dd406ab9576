import csv
import json

import numpy as np
import pytest
from PIL import Image

from demo.data import prepare_all
from demo.figures import RIGHT, WRONG, draw_report, draw_sheet, num_shown
from demo.scores import TASKS


def colours(path, colour: str) -> int:
    """How many pixels have about this colour."""
    wanted_3 = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    with Image.open(path) as picture:
        return int((np.abs(np.asarray(picture.convert("RGB")).astype(int) - wanted_3).max(-1) < 24).sum())


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """By modality rows as predictions have them, and where their media are; every answer is right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demo.motion.SPLIT_EMOJI", {"train": 1, "val": 1, "test": 1})
        data = prepare_all(tmp_path_factory.mktemp("demo"))
    answers = {}
    for modality, files in data.items():
        read = [json.loads(line) for line in files["test"].read_text().splitlines()[: num_shown(modality)]]
        texts = [[message["content"] for message in row["messages"]] for row in read]
        more = [{"prompt": prompt, "response": answer, "reference": answer, "right": True} for prompt, answer in texts]
        answers[modality] = [row | own for row, own in zip(read, more, strict=True)]
    return answers, {modality: files["media_root"] for modality, files in data.items()}


def test_the_sheet_shows_what_is_right_and_what_is_wrong(rows, tmp_path):
    answers, roots = rows
    assert {modality: len(own) for modality, own in answers.items()} == {"image": 16, "video": 6, "audio": 12}
    draw_sheet(answers, roots, tmp_path / "right.png")
    wrong = {modality: [row | {"response": "", "right": False} for row in own] for modality, own in answers.items()}
    draw_sheet(wrong, roots, tmp_path / "wrong.png")
    assert (tmp_path / "right.png").stat().st_size < 400_000
    assert colours(tmp_path / "right.png", RIGHT) > 4 * colours(tmp_path / "wrong.png", RIGHT)
    assert colours(tmp_path / "wrong.png", WRONG) > 4 * colours(tmp_path / "right.png", WRONG)


def test_the_report_is_drawn_of_what_was_logged(tmp_path):
    scores = {"accuracy_before": 0.1, "accuracy_after": 0.8}
    names = ["step", "train/loss", *(f"val/{task.source}/accuracy" for task in TASKS.values())]
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({"step": step, "train/loss": 5 - step} for step in range(4))
        writer.writerow({"step": 3, **dict.fromkeys(names[2:], 0.6)})
    draw_report(dict.fromkeys(TASKS, scores), tmp_path / "metrics.csv", tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size[0] > 1000
    with pytest.raises(KeyError, match="image"):
        draw_report({}, tmp_path / "metrics.csv", tmp_path / "report.png")
