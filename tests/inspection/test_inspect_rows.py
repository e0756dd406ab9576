"""`inspect` on the rows of the repository, and on rows that are broken."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.lightning_modules.media_fakes import write_media_rows
from train import main

TINY, ALL, DPO = "configs/sft/tiny.yaml", "configs/sft/tiny_all.yaml", "configs/objective/dpo.yaml"


def test_rows_of_all_sources_in_turn(capsys):
    main(["inspect", "--config", ALL, "--num", "3"])
    shown = capsys.readouterr().out
    for source, medium, choice in (
        ("shapes", "<image ×4>", "red"),
        ("clips", "<video ×16>", "left"),
        ("tones", "<audio ×7>", "falls"),
    ):
        (row,) = re.findall(rf"\[{source}\].*?(?=\n\n)", shown, re.S)
        assert medium in row and re.search(rf"choices: .*{choice}", row)
    assert "4 frames of 32 x 32 at 0.12, 0.38, 0.62, 0.88 s; its encoder gets 4 x 3 x 32 x 32" in shown
    assert "0.25 s at 16,000 Hz; its encoder gets 26 x 80" in shown


def test_both_sides_of_a_pair(capsys):
    main(["inspect", "--config", TINY, "--config", DPO, "--id", "1"])
    shown = capsys.readouterr().out
    chosen, rejected = (re.search(rf"\[{role}\] (.*)", shown) for role in ("chosen", "rejected"))
    assert chosen and rejected
    row = json.loads(Path("demo/tiny/train.jsonl").read_text().splitlines()[0])
    assert row["messages"][-1]["content"] in shown[chosen.start() : rejected.start()]
    assert row["rejected_response"] in shown[rejected.start() :]


def test_corrupted_media_are_shown_beside_the_right_ones(capsys, tmp_path):
    """Of mDPO, on each modality."""
    options = ["inspect", "--config", ALL, "--config", "configs/objective/mdpo.yaml", "--num", "3"]
    main(options)
    shown = capsys.readouterr().out
    assert shown.count("[corrupted]") == 3
    for name in ("images/train-red-square-2.png", "train-right-5.mp4", "train-rises-0.wav"):
        right, wrong = re.findall(rf"{re.escape(name)}(.*): .*; its encoder gets (.*)", shown)
        assert (right[0], wrong[0]) == ("", ", corrupted") and right[1] == wrong[1]
    main([*options, "--html", str(tmp_path / "rows.html")])
    html = (tmp_path / "rows.html").read_text(encoding="utf-8")
    pictures = re.findall(r"data:image/[^\"]+", html)
    assert len(pictures) == 2 * (2 + 4 + 1)
    image, wrong_image = pictures[:2], pictures[2:4]
    clip, wrong_clip = pictures[4:8], pictures[8:12]
    assert image[1] != wrong_image[1]  # as the encoder gets them: one part of a square may look like the square
    assert clip != wrong_clip and sorted(clip) == sorted(wrong_clip)  # its frames in another order
    assert pictures[12] != pictures[13]


def test_media_of_a_row_of_which_criteria_leave_an_answer_out(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    row = {"query": "<image>?", "response": "red", "rejected_response": ["you idiot", "red too"], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    criteria = ["--data.reward_criteria", "[{scorer: {class_path: ToxicityScorer}}]", "--data.criteria_use.mode", "filter"]
    shown = shown_of(tmp_path / "rows.jsonl", capsys, "--config", DPO, *criteria)
    assert shown.count("[rejected]") == 1 and "you idiot" in shown and "image a.png: 32 x 32" in shown


def test_a_page_that_needs_nothing_beside_itself(tmp_path):
    page = tmp_path / "rows.html"
    main(["inspect", "--config", ALL, "--num", "3", "--split", "val", "--html", str(page)])
    html = page.read_text(encoding="utf-8")
    assert html.count("<article>") == 3
    assert html.count("data:image/") == 2 + 4 + 1  # a picture twice, four frames, a spectrogram
    assert '<svg class="sound"' in html and "0.38 s" in html
    assert '<span class="special supervised" title="1 tokens">&lt;|im_end|&gt;</span>' in html
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "<script" not in html


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three good rows of growing length, a row without its picture, and one that is no JSON."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    lines = [
        {"id": f"row{number}", "query": f"<image>{'Which colour? ' * number}", "response": "red", "images": ["a.png"]}
        for number in (1, 3, 2)
    ]
    lines.append({"id": "lost", "query": "<image>?", "response": "red", "images": ["lost.png"]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n", encoding="utf-8")
    return path


def shown_of(rows: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    main(["inspect", "--config", TINY, "--data.train_path", str(rows), "--data.val_path", str(rows), *options])
    return capsys.readouterr().out


def test_the_longest_rows(rows, capsys):
    shown = shown_of(rows, capsys, "--longest", "2")
    assert re.findall(r"id (\w+) ", shown) == ["row3", "row2"]


def test_rows_that_cannot_be_used(rows, capsys):
    shown = shown_of(rows, capsys, "--bad")
    assert re.findall(r"rows\.jsonl:(\d+)  cannot be used: ", shown) == ["4", "5"]
    assert "lost.png does not exist" in shown and "not JSON" in shown
    assert "cannot be used" in shown_of(rows, capsys, "--id", "[lost, row1]")


def test_an_id_that_is_not_there(rows, capsys):
    with pytest.raises(ValueError, match=r"no row has the id 'nothing': ids are those of the rows' `id`"):
        shown_of(rows, capsys, "--id", "nothing")


def test_no_row_is_bad(capsys):
    main(["inspect", "--config", TINY, "--bad", "true", "--split", "val"])
    assert "no row of 8 is bad" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_a_ready_model_that_writes_media_in_its_own_way(family, tmp_path, model_folder, capsys):
    rows = write_media_rows(tmp_path / "rows.jsonl", ["i"] if family == "gemma3" else ["iv"])
    ready = {"class_path": "PretrainedMLLM", "init_args": {"name_or_path": str(model_folder(family))}}
    model = {"class_path": "MultiModalLitModule", "init_args": {"language_model": ready}}
    data = {"class_path": "ImageDataModule", "init_args": {"train_path": str(rows), "num_workers": 0}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": model, "data": data}), encoding="utf-8")
    main(["inspect", "--config", str(config)])
    shown = capsys.readouterr().out
    for modality in ("image", "video"):
        told = sum(map(int, re.findall(rf" · ([0-9]+) {modality}", shown)))
        assert sum(map(int, re.findall(rf"<{modality} ×([0-9]+)>", shown))) == told
    assert "<image ×" in shown and "_pad|>" not in shown and "It is a bus." in shown


def test_text_of_the_data_obeys_nobody(tmp_path, capsys):
    row = {"query": "a\x1b[2Jb", "response": "c"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    shown = shown_of(path, capsys)
    assert "a␛[2Jb" in shown and "\x1b[2J" not in shown
