"""Commands beside those of the trainer: what they get, what is made for them, and what is refused."""

from pathlib import Path

import pytest

import train  # noqa: F401  # so that a YAML can name its classes
from datamodules.loading import RowDataModule
from lightning_modules.callbacks import PartTable
from lightning_modules.cli import OmniLitCLI
from lightning_modules.commands import Setup
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.run_folder import RunFolder

TINY = ["--config", "configs/sft/tiny.yaml"]


def run(*arguments: str) -> list[tuple[Setup, str | None, int]]:
    """What a command with two options of its own is called with."""
    calls: list[tuple[Setup, str | None, int]] = []

    def look(setup: Setup, html: str | None = None, num: int = 4, bad: bool = False) -> None:
        """Looks at something.

        Args:
            html: Where to write the page.
            num: How many.
            bad: Only what is bad.
        """
        calls.append((setup, "bad" if bad else html, num))

    OmniLitCLI(
        MultiModalLitModule,
        RowDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        save_config_callback=RunFolder,
        trainer_defaults={"callbacks": [PartTable()]},
        commands={"look": look},
        args=[*arguments],
    )
    return calls


def test_a_command_gets_its_options_and_what_a_fit_would_get(tmp_path: Path) -> None:
    ((setup, html, num),) = run("look", *TINY, "--num=7", "--data.batch_size=3", "--trainer.default_root_dir", str(tmp_path))
    assert (html, num) == (None, 7)
    assert setup.datamodule.batch_size == 3
    assert setup.datamodule.processor is setup.model.processor
    assert setup.datamodule.seed == 42
    assert setup.trainer.default_root_dir == str(tmp_path)
    assert setup.trainer.max_epochs == 20


@pytest.mark.parametrize(("arguments", "shown"), [(["--bad"], "bad"), (["--bad", "--num=7"], "bad"), (["--bad=false"], None)])
def test_a_switch_needs_no_value(arguments: list[str], shown: str | None) -> None:
    ((_, html, _),) = run("look", *TINY, *arguments)
    assert html == shown


def test_nothing_is_built_or_written_and_no_trainer_is_made(tmp_path: Path) -> None:
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.mode=middle"]
    absent = ["--trainer.accelerator=gpuu", *stopping]  # a fit refuses both
    ((setup, _, _),) = run("look", *TINY, "--trainer.default_root_dir", str(tmp_path / "run"), *absent)
    assert not list(setup.model.parameters())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["look", *TINY, "--nun=3"], "nun is no known name here. Did you mean num?"),
        (["look", *TINY, "--num=three"], "num is three, expected int"),
        (["look", *TINY, "--trainer.max_step=3"], "trainer.max_step is no known name here. Did you mean trainer.max_steps?"),
        (["look", *TINY, "--ht=page.html"], "ht is no known name here"),
        (["look"], "Give a configuration, such as --config configs/sft/tiny.yaml"),
        (["lok", *TINY], "there is no command lok: the commands are fit, validate, test, predict, look. Did you mean look?"),
        (["xyzzy", *TINY], "there is no command xyzzy: the commands are fit, validate, test, predict, look\n"),
        (["fit", *TINY, "--num=3"], "num is no known name here"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert expected in error


def test_what_a_constructor_refuses_is_said_alone() -> None:
    with pytest.raises(ValueError, match=r"^data.batch_size is a number of rows, at least 1, got 0$"):
        run("look", *TINY, "--data.batch_size=0")


def test_its_docstring_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["look", "--help"]):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert "Looks at something." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("look", "--help")
    assert "Where to write the page." in capsys.readouterr().out
