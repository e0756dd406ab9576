"""What the command line says where it is given something that cannot be used."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_modules.cli import find_checkpoint
from lightning_modules.cli_errors import explain, reason, show_user_errors
from train import main

TINY = ["--config", "configs/sft/tiny.yaml", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]


class Strict:
    def __init__(self, size: int) -> None:
        raise ValueError(f"size is {size}, which is too big")


class TestExplain:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--trainer.max_step=3"], "trainer.max_step is no known name here. Did you mean trainer.max_steps?"),
            (["--model.image_encoder.layerr=3"], "layerr is no known name in model.image_encoder. Did you mean layer?"),
            (
                ["--model.language_model.tune.lora.rank=3"],
                "tune.lora.rank is no known name in model.language_model. Did you mean tune.lora.r?",
            ),
            (
                ["--model.generation.max_tokens=3"],
                "generation.max_tokens is no known name in model. Did you mean generation.max_new",
            ),
            (
                ["--model.image_encoder=TimmEncodr"],
                "TimmEncodr is no known name in model.image_encoder. Did you mean TimmEncoder?",
            ),
            (["--model.image_encoder=MLPProjector"], "model.image_encoder cannot be MLPProjector: expected Encoder or null"),
            (["--model.optimizer=AdmW"], "AdmW is no known name in model.optimizer. Did you mean AdamW?"),
            (
                ["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentm=0.9"],
                "momentm is no known name in model.optimizer. Did you mean mom",
            ),
            (["--model.lr_scheduler=StepLR"], "model.lr_scheduler: the following arguments are required: step_size"),
            (
                ["--model.language_model.dtype=fp8"],
                "model.language_model.dtype is fp8, expected 'float32', 'bfloat16', 'float16'",
            ),
            (["--model.language_model.tune.lora.target_modules=q"], "target_modules is q, expected a list such as [a, b]"),
            (
                ["--model.language_model.tune.lr=null"],
                "model.language_model.tune.lr: null cannot be given on the command line so deep: give it in a YAML file",
            ),
            (["--data=ImageDataModul"], "ImageDataModul is no known name in data. Did you mean ImageDataModule?"),
            (["--data.batch_size=eight"], "data.batch_size is eight, expected int"),
            (["--trainer.logger=CSVLoger"], "CSVLoger is no known name in trainer.logger. Did you mean CSVLogger?"),
            (
                ["--trainer.callbacks+=EarlyStoping"],
                "EarlyStoping is no known name in trainer.callbacks. Did you mean EarlyStopping?",
            ),
            (["--checkpoint.moniter=val/loss"], "checkpoint.moniter is no known name here. Did you mean checkpoint.monitor?"),
            (["--samples.num=3"], "samples.num is no known name here. Did you mean samples.num_samples?"),
            (["--xyzzy"], "xyzzy is no known name here. See --help"),
            (["--config=nowhere.yaml"], "config: File does not exist:"),
        ],
    )
    def test_an_option(self, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *TINY, *arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert expected in error

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("trainer: {max_epoch: 3}", "trainer.max_epoch is no known name here. Did you mean trainer.max_epochs?"),
            ("modell: {class_path: X}", "modell.class_path is no known name here. Did you mean model?"),
            ("model: {init_args: {language_model: {init_args: {tune: {lora: {rank: 8}}}}}}", "Did you mean tune.lora.r?"),
            ("model: {init_args: {image_projector: {init_args: {dept: 8}}}}", "model.image_projector. Did you mean depth?"),
            (
                "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: val/loss}}]}",
                "monitr is no known name in trainer.callbacks. Did you mean monitor?",
            ),
            ("model: [", "while parsing"),
        ],
    )
    def test_a_yaml(self, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(text)
        with pytest.raises(SystemExit):
            main(["fit", *TINY, "--config", str(overlay)])
        assert expected in capsys.readouterr().err.splitlines()[-1]

    def test_a_command_without_a_configuration(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["fit"])
        assert "--config configs/sft/tiny.yaml" in capsys.readouterr().err

    def test_the_scorer_of_a_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["doctor", "--config", "configs/sft/tiny.yaml", "--scorer=CLIPScorr"])
        assert "CLIPScorr is no known name in scorer. Did you mean CLIPScorer?" in capsys.readouterr().err

    def test_a_name_that_several_classes_have(self) -> None:
        message = "Multiple subclasses with name SGD. Give the full class path to avoid ambiguity: torch.optim.SGD, b.SGD."
        assert explain(f'Parser key "model":\n  Parser key "optimizer":\n    - Expected a path\n    - {message}', []) == (
            "model.optimizer: SGD is the name of several classes. Give the whole path of one: torch.optim.SGD, b.SGD"
        )

    def test_an_unknown_message_becomes_one_paragraph(self) -> None:
        assert explain("Something\n  new\n\n is wrong", []) == "Something new is wrong"


def seen(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """What the hook writes for an error, and how often it hands it on."""
    handed_on: list[Any] = []
    hook = show_user_errors(lambda *arguments: handed_on.append(arguments))
    hook(type(error), error, error.__traceback__)
    return capsys.readouterr().err, len(handed_on)


def caught(function: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as info:
        function()
    return info.value


class TestShowUserErrors:
    def test_a_value_error_of_ours_is_its_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = caught(lambda: find_checkpoint("nowhere.ckpt", Path("nowhere")))
        assert seen(error, capsys) == (f"\nerror: {error}\n", 0)

    def test_other_errors_keep_their_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        def ours_wrongly() -> None:
            int("three")

        def by_zip() -> None:
            list(zip([1], [], strict=True))

        def other_kind() -> None:
            raise KeyError("x")

        for function in (ours_wrongly, by_zip, other_kind, lambda: json.loads("{"), lambda: torch.zeros(2).reshape(3)):
            assert seen(caught(function), capsys) == ("", 1)

    def test_a_full_disk_is_said_in_a_paragraph(self, capsys: pytest.CaptureFixture[str]) -> None:
        def library() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` says it, without a name

        text, handed_on = seen(caught(library), capsys)
        assert text.startswith("\nerror: No space left on device: make room") and text.endswith(
            "--ckpt_path last goes on from there\n"
        )
        assert text.count("\n") == 2 and handed_on == 0

    def test_one_without_a_traceback_is_handed_on(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert seen(ValueError("x"), capsys) == ("", 1)

    def test_a_reason_is_looked_for_no_deeper_than_ours(self) -> None:
        def deep() -> None:
            try:
                find_checkpoint("deep.ckpt", Path())
            except ValueError as error:
                raise ValueError("ours") from error

        assert reason(caught(deep)) == "ours"

    def test_of_several_types_it_is_what_the_class_says(self) -> None:
        """Whose error is the cause of none; jsonargparse takes that of the first type for the cause."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--made", type=str | Strict)  # type: ignore[arg-type]  # any type will do
        given = parser.parse_object({"made": {"class_path": f"{__name__}.Strict", "init_args": {"size": 3}}})

        def make() -> None:
            parser.instantiate_classes(given)

        assert reason(caught(make)) == "size is 3, which is too big"
