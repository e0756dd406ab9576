"""A processor as files: whole, made once, and never written where it does not belong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from datamodules import processor as processor_module
from datamodules.batch import Origin
from datamodules.conversation import parse_row
from datamodules.processor import Processor, PromptOptions
from datamodules.processor_files import DESCRIPTION, as_folder, read_files, write_files
from tests.datamodules.loader_fakes import make_processor
from tests.tiny import STYLES, Style, make_tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_the_files_alone_make_the_same_examples(style: Style, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", style)
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}={{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    made = Processor(str(tmp_path / "tokenizer"), PromptOptions(chat_template=str(template), system="é"))
    files, fingerprint = made.files(), made.fingerprint()
    shutil.rmtree(tmp_path / "tokenizer")
    template.unlink()
    again = Processor.from_files(files)
    row = {"messages": [{"role": role, "content": "a bus 🙂"} for role in ("user", "assistant")]}
    sample = parse_row(row, Origin("rows.jsonl", 1))
    assert again(sample) == made(sample) and again(sample, generate=True) == made(sample, generate=True)
    assert again.fingerprint() == fingerprint
    assert (again.files(), again.name_or_path) == (files, made.name_or_path)


def test_files_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    make: Callable[..., dict[str, bytes]] = processor_module.tokenizer_files

    def counting(tokenizer: object) -> dict[str, bytes]:
        calls.append(tokenizer)
        return make(tokenizer)

    monkeypatch.setattr(processor_module, "tokenizer_files", counting)
    made = make_processor(tmp_path / "tokenizer")
    assert made.files() == made.files() and made.files()[DESCRIPTION]
    made.save(tmp_path / "saved")
    assert Processor.load(tmp_path / "saved").files() == made.files()
    assert len(calls) == 1


def test_a_loaded_processor_does_not_need_its_folder(tmp_path: Path) -> None:
    make_processor(tmp_path / "tokenizer").save(tmp_path / "saved")
    loaded = Processor.load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    picture = {"image": [("a", Image.new("RGB", (8, 8), "red"))]}
    row = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}], "images": ["a.png"]}
    assert loaded(parse_row(row, Origin("rows.jsonl", 1)), picture).tokens


def test_a_folder_goes_and_comes_back(tmp_path: Path) -> None:
    files = {DESCRIPTION: b"{}", "tokenizer.json": b"\x00\xff", "more/other.jinja": "é".encode()}
    write_files(tmp_path / "a", files)
    write_files(tmp_path / "a", files)
    (tmp_path / "a" / ".processor-stopped").mkdir()
    (tmp_path / "a" / ".processor-stopped" / "file").write_bytes(b"half")
    assert read_files(tmp_path / "a") == files
    with as_folder(files) as folder:
        assert read_files(folder) == files
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../outside.json", "/tmp/outside.json", "a/../../outside.json"])
def test_no_file_is_written_outside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no path inside a folder"):
        write_files(tmp_path / "a", {DESCRIPTION: b"{}", name: b"evil"})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_no_processor_is_named() -> None:
    with pytest.raises(ValueError, match=r"not the files of a processor: expected processor.json among tokenizer.json"):
        Processor.from_files({"tokenizer.json": b"{}"})
