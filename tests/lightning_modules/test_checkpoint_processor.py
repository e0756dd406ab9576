"""A checkpoint holds the processor that its examples were made by, and a run goes on with no other."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.processor import Processor, PromptOptions
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule
from models.generation import Generation
from tests.lightning_modules.run_fakes import make_data, make_trainer, write_rows

Make = Callable[..., MultiModalLitModule]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 4)


def run(module: MultiModalLitModule, rows: Path, folder: Path, **options: Any) -> Path:
    trainer = make_trainer(folder, RunCheckpoint(), plugins=[CheckpointFile()], **options)
    trainer.fit(module, make_data(module, rows), ckpt_path=folder / "checkpoints/last.ckpt" if options else None)
    return folder / "checkpoints/last.ckpt"


@pytest.fixture
def folder(make_lit_module: Make, rows: Path, tmp_path: Path) -> Path:
    """A run of one epoch, without a system message."""
    torch.manual_seed(4)
    run(make_lit_module(), rows, tmp_path)
    return tmp_path


def test_it_is_in_the_file_and_makes_the_same_examples(folder: Path, make_lit_module: Make) -> None:
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert Processor.from_files(checkpoint["processor"]).fingerprint() == make_lit_module().processor.fingerprint()


def test_a_run_goes_on_with_other_options_that_make_the_same_examples(folder: Path, make_lit_module: Make, rows: Path) -> None:
    other = make_lit_module(on_non_finite="skip", generation=Generation(max_new_tokens=3))
    run(other, rows, folder, max_epochs=2)
    assert other.trainer.current_epoch == 2


def test_a_run_does_not_go_on_with_other_examples(folder: Path, make_lit_module: Make, rows: Path) -> None:
    other = make_lit_module(prompt=PromptOptions(system="Be kind.", max_length=64))
    changes = r"prompt\.system was None and is 'Be kind\.'; prompt\.max_length was 2048 and is 64\. .*model\.init_from"
    with pytest.raises(ValueError, match=f"trained on other examples than this run would make: {changes}"):
        run(other, rows, folder, max_epochs=2)
    warm = make_lit_module(prompt=PromptOptions(system="Be kind."), init_from=str(folder / "checkpoints/last.ckpt"))
    run(warm, rows, folder / "warm")
    assert warm.trainer.current_epoch == 1


@pytest.mark.parametrize(("system", "is_said"), [("Be kind.", True), (None, False)])
def test_to_look_at_it_with_another_prompt_is_allowed_but_said(
    folder: Path, make_lit_module: Make, rows: Path, system: str | None, is_said: bool
) -> None:
    module = make_lit_module(prompt=PromptOptions(system=system))
    trainer = make_trainer(folder, plugins=[CheckpointFile()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.test(module, make_data(module, rows), ckpt_path=folder / "checkpoints/last.ckpt", verbose=False)
    said = [str(warning.message) for warning in caught if "other examples" in str(warning.message)]
    assert bool(said) == is_said
    assert all("than it is now shown: prompt.system was None and is 'Be kind.'" in text for text in said)
