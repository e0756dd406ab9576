"""Asking a trained model on the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile

from deployment.ask import ask, load, main
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule
from models.language import Generation, LanguageModel
from tests.datamodules.video_files import EVEN, write_video
from tests.lightning_modules.media_fakes import make_all, write_media_rows
from tests.lightning_modules.run_fakes import make_data, make_trainer, write_rows

ANSWERS = ("red", "It is a bus.", "blue", "white")


def train(folder: Path, module: MultiModalLitModule, rows: Path) -> Path:
    """A run folder, as a fit leaves it."""
    make_trainer(folder, RunCheckpoint(), max_epochs=2).fit(module, make_data(module, rows))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 3 and 5 have a picture, row 4 has none, row 6 has two."""
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 6, ANSWERS)
    message = {"role": "user", "content": "First <image>, then <image>\n: which is brighter?"}
    two = {"messages": [message, {"role": "assistant", "content": "red"}], "images": ["rows-2.png", "rows-0.png"]}
    path.write_text(path.read_text() + json.dumps(two) + "\n")
    return path


@pytest.fixture(scope="module")
def module(tiny_llm: Path, tiny_clip: Path) -> MultiModalLitModule:
    return MultiModalLitModule(
        LanguageModel(str(tiny_llm)),
        HFVisionEncoder(str(tiny_clip), layer=-2),
        MLPProjector(),
        generation=Generation(max_new_tokens=9),
    )


@pytest.fixture(scope="module")
def run(module: MultiModalLitModule, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return train(tmp_path_factory.mktemp("run"), module, rows)


@pytest.fixture(scope="module")
def predicted(
    module: MultiModalLitModule, run: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    trainer = make_trainer(tmp_path_factory.mktemp("predicted"))
    batches = trainer.predict(module, make_data(module, rows, batch_size=3), ckpt_path=run / "checkpoints/last.ckpt")
    assert batches is not None
    return [row for batch in batches for row in batch]


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([*map(str, arguments), "--max_new_tokens=9"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("row", "pictures"), [(0, ["rows-0.png"]), (4, []), (6, ["rows-2.png", "rows-0.png"])])
def test_the_answer_is_that_of_predict(
    run: Path, rows: Path, predicted: list[dict[str, Any]], row: int, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [rows.parent / name for name in pictures]
    expected = predicted[row]["response"]
    assert expected and len({entry["response"] for entry in predicted}) > 3
    assert say(capsys, run, predicted[row]["prompt"], *paths) == f"{expected}\n"


def test_pictures_stand_before_a_question_that_says_nothing_of_them(
    run: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [rows.parent / "rows-1.png", rows.parent / "rows-2.png"]
    first = say(capsys, run, "Which?", *pictures)
    assert first == say(capsys, run, "<image><image>Which?", *pictures)
    assert first != say(capsys, run, "<image><image>Which?", *reversed(pictures))


def test_a_link_to_a_picture_elsewhere_is_the_picture(
    run: Path, rows: Path, predicted: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.png").symlink_to(rows.parent / "rows-0.png")
    assert say(capsys, run, predicted[0]["prompt"], tmp_path / "link.png").strip() == predicted[0]["response"]


def test_one_model_answers_many_questions(run: Path, rows: Path, predicted: list[dict[str, Any]]) -> None:
    model, processor = load(run)
    for row in (0, 1):
        path = rows.parent / f"rows-{row}.png"
        answer = ask(model, processor, predicted[row]["prompt"], {"image": [path]}, Generation(max_new_tokens=9))
        assert answer == predicted[row]["response"]


def test_a_checkpoint_is_enough(
    run: Path, rows: Path, predicted: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "sent.ckpt")
    assert say(capsys, alone, predicted[0]["prompt"], rows.parent / "rows-0.png").strip() == predicted[0]["response"]


def test_files_are_decoded_in_a_process_of_their_own(
    run: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        pytest.fail(f"{self} is decoded in this process")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert say(capsys, run, "What?", rows.parent / "rows-0.png").strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}/nowhere", "What?"], r"there is no checkpoint .*nowhere"),
        (["{rows}", "What?"], r"there is no checkpoint .*/checkpoints/last\.ckpt; there is no checkpoint in that folder"),
        (["{run}", "What?", "{rows}/nowhere.png"], r"there is no file .*nowhere\.png"),
        (["{run}", "What?", "nowhere/at/all.png"], r"there is no file nowhere/at/all\.png"),
        (["{run}", "What?", "{rows}/rows.jsonl"], r"rows\.jsonl is not an image"),
        (["{run}", "What?", "{rows}"], r"a folder"),
        (["{run}", "<image> and <image>?", "{rows}/rows-0.png"], r"2 <image> in the messages, but 1"),
        (["{run}", "<image>?"], r"1 <image> in the messages, but 0"),
        (["{run}", " "], r"the user message is empty"),
        (["{run}", "What?", "--video", "{rows}/rows-0.png"], r"the row has video in it, but the model has no encoder"),
        (["{run}", "<audio>What?"], r"1 <audio> in the messages, but 0"),
        (["{run}/checkpoints/x.ckpt", "What?"], r"there is no checkpoint .*x\.ckpt; that folder has .*last\.ckpt"),
        (["{run}", "What?", "--max_new_tokens=0"], r"max_new_tokens must be at least 1"),
        (["{run}", "word " * 3000], r"max_length"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(run: Path, rows: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{expected}") as stop:
        main([argument.replace("{run}", str(run)).replace("{rows}", str(rows.parent)) for argument in arguments])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code  # which exits with 1


def test_a_checkpoint_that_is_cut_off_is_named(run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((run / "checkpoints/last.ckpt").read_bytes()[:-500])
    with pytest.raises(SystemExit, match=r"^error: .*cut\.ckpt"):
        main([str(cut), "What?"])


def test_a_model_of_text_alone_takes_no_picture(
    tiny_llm: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_rows(tmp_path / "text.jsonl", 2)
    lines = [json.loads(line) for line in text.read_text().splitlines()]
    for line in lines:
        line["messages"][0]["content"], line["images"] = "What?", []
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = train(tmp_path / "run", MultiModalLitModule(LanguageModel(str(tiny_llm))), text)
    assert say(capsys, folder, "What?").strip()
    with pytest.raises(SystemExit, match="the model has no encoder for that"):
        main([str(folder), "What?", str(rows.parent / "rows-0.png")])


def test_clips_and_sounds_are_asked_about_as_predict_does(
    tiny_llm: Path, tiny_clip: Path, tiny_whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_media_rows(tmp_path / "rows.jsonl", ["a", "ai", "i"])
    film = write_video(tmp_path / "film.mp4", EVEN[:40])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clip = {"messages": [{"role": "user", "content": "<video>Which way?"}], "videos": [film.name], "images": [], "audios": []}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, clip]))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = make_all(tiny_llm, tiny_clip, tiny_whisper, generation=Generation(max_new_tokens=9))
        folder = train(tmp_path / "run", module, write_media_rows(tmp_path / "train.jsonl", ["a", "v", "i"]))
    trainer = make_trainer(tmp_path / "predicted")
    batches = trainer.predict(module, make_data(module, path), ckpt_path=folder / "checkpoints/last.ckpt")
    assert batches is not None
    sound, both, _, moved = [row for batch in batches for row in batch]
    assert len({sound["response"], both["response"], moved["response"]}) == 3
    sounds = [f"--audio={tmp_path / row['audios'][0]}" for row in rows[:2]]
    assert say(capsys, folder, sound["prompt"], sounds[0]).strip() == sound["response"]
    assert say(capsys, folder, both["prompt"], sounds[1], tmp_path / rows[1]["images"][0]).strip() == both["response"]
    assert say(capsys, folder, "Which way?", f"--video={film}").strip() == moved["response"]
    with pytest.raises(SystemExit, match=r"rows-2-0\.png"):
        main([str(folder), "What?", f"--audio={tmp_path / rows[2]['images'][0]}"])


def test_the_picture_is_looked_at(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = set()
    for colour in ("black", "white", "red"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
        answers.add(say(capsys, run, "What is this?", tmp_path / f"{colour}.png"))
    assert len(answers) > 1
