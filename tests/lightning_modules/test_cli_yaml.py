"""Keys that stand twice in a configuration, and options of one source of a mixture."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.cli_yaml import repeated_keys
from train import main


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: {a: 2}\nc: [{a: 3}, {a: 4}]\n", []),
        ("a: 1\nb: 2\na: 3\n", ["has the key a twice, in lines 1 and 3"]),
        ("s:\n  web: {x: 1}\n  web: {x: 2}\n", ["has the key web twice, in lines 2 and 3"]),
        ("- {x: 1}\n- x: 1\n  x: 2\n", ["has the key x twice, in lines 2 and 3"]),
        ("", []),
        ("a: [", []),
    ],
)
def test_repeated_keys(text: str, expected: list[str]) -> None:
    assert repeated_keys(text) == expected


def test_two_sources_with_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "two.yaml"
    overlay.write_text("data:\n  init_args:\n    sources:\n      web: {train_path: a.jsonl}\n      web: {train_path: b.jsonl}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/sft/all.yaml", "--config", str(overlay)])
    assert f"error: config: {overlay} has the key web twice, in lines 4 and 5: rename one" in capsys.readouterr().err


def test_a_flag_changes_one_option_of_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    def sources(*flags: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main(["fit", "--config", "configs/sft/all.yaml", *flags, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["sources"]

    before, after = sources(), sources("--data.sources.speech.weight=0.7", "--data.sources.clips.limits.video.max_seconds=30")
    assert after["speech"].pop("weight") == 0.7 != before["speech"].pop("weight")
    assert after["clips"]["limits"]["video"].pop("max_seconds") == 30 != before["clips"]["limits"]["video"].pop("max_seconds")
    assert after == before


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--data.sources.speech.wait=0.5", r"wait is no known name in data.sources.*Did you mean weight"),
        ("--data.sources.speech.weight=much", r"weight is much, expected float"),
    ],
)
def test_what_is_wrong_with_such_a_flag_is_named(flag: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/sft/all.yaml", flag])
    assert re.search(expected, capsys.readouterr().err)


def test_a_misspelt_source_is_no_source() -> None:
    with pytest.raises(
        ValueError, match=r"data\.sources\.speach has no file: .* The sources are images, clips, speech, text, speach"
    ):
        main(["fit", "--config", "configs/sft/all.yaml", "--trainer.accelerator=cpu", "--data.sources.speach.weight=0.5"])
