"""Which options there are, and which checkpoint is meant."""

import os
from pathlib import Path

import pytest

from lightning_modules.cli import find_checkpoint
from train import main

TINY = ["--config", "configs/sft/tiny.yaml", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.warmup_ratio=2"], "model.warmup_ratio is a share of the steps, in [0, 1), got 2.0"),
        (["--model.language_model.tune.lora.r=0"], "lora.r is the rank of the adapters and must be at least 1, got 0"),
        (["--data.batch_size=0"], "data.batch_size is a number of rows, at least 1, got 0"),
        (["--checkpoint.mode=middle"], "`mode` can be min, max but got middle"),
        (["--trainer.accelerator=gpuu"], "You selected an invalid accelerator name"),
    ],
)
def test_what_a_constructor_refuses_is_said_alone(arguments: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        main(["fit", *TINY, "--trainer.default_root_dir", str(tmp_path), *arguments])
    assert str(refusal.value).startswith(expected)


class TestFindCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "checkpoints").mkdir()
        for age, name in enumerate(["last.ckpt", "last-v1.ckpt", "epoch=1-step=8.ckpt"]):
            path = tmp_path / "checkpoints" / name
            path.write_text(name)
            os.utime(path, (1000 - age, 1000 - age))
        os.utime(tmp_path / "checkpoints/last-v1.ckpt", (2000, 2000))
        return tmp_path

    def test_last_is_the_newest(self, folder: Path) -> None:
        assert find_checkpoint("last", folder) == str(folder / "checkpoints/last-v1.ckpt")

    def test_a_file_is_itself(self, folder: Path) -> None:
        path = str(folder / "checkpoints/epoch=1-step=8.ckpt")
        assert find_checkpoint(path, folder / "elsewhere") == path
        assert find_checkpoint(None, folder) is None

    def test_what_is_not_there_is_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"there is no x\.ckpt.*holds epoch=1-step=8\.ckpt, last\.ckpt, last-v1\.ckpt"):
            find_checkpoint("x.ckpt", folder)
        with pytest.raises(ValueError, match="holds no checkpoint"):
            find_checkpoint("last", folder / "elsewhere")


def test_an_abbreviation_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--seed=3"])
    assert "seed is no known name" in capsys.readouterr().err
