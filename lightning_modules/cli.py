"""The command line's behaviour: what is linked, where a run lives, and errors that a user can act on."""

import dataclasses
import difflib
import inspect
import logging
import os
import pydoc
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, get_args

import lightning.pytorch as L
from lightning.pytorch.cli import ActionConfigFile, LightningArgumentParser, LightningCLI

from encoders.base import Part
from lightning_modules.callbacks import ProgressBar
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.samples import SamplePage

ROOT = Path(__file__).resolve().parent.parent


class Parser(LightningArgumentParser):
    """A parser that takes no abbreviations, and names the nearest valid option when one is misspelt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one paragraph and exits with 2."""
        sys.stderr.write(f"error: {explain(message, self._option_names())}\n")
        sys.exit(2)

    def _option_names(self) -> list[str]:
        return [option.removeprefix("--") for action in self._actions for option in action.option_strings]


class OmniLitCLI(LightningCLI):
    """LightningCLI whose run folder is `trainer.default_root_dir`, and whose data module gets the model's processor."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of the program and of each subcommand."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A configuration in YAML; later ones win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what two parts must agree on, and adds the callbacks that every run has."""
        parser.link_arguments("model.processor", "data.init_args.processor", apply_on="instantiate")
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SamplePage, "samples")
        parser.set_defaults({"trainer.default_root_dir": "runs/default"})

    def before_instantiate_classes(self) -> None:
        """Settles the run folder, and finds the checkpoint before anything is built.

        Raises:
            ValueError: There is no such checkpoint.
        """
        config = self.config[self.subcommand] if self.subcommand is not None else self.config
        if "WANDB_SWEEP_ID" in os.environ and (run_id := os.environ.get("WANDB_RUN_ID")):
            # the agent runs one command again and again and says only here which run this is
            config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir) / run_id)
            config.trainer.logger.init_args.save_dir = config.trainer.default_root_dir
        if config.trainer.enable_progress_bar is not False and not _has_progress_bar(config.trainer.callbacks or []):
            self.trainer_defaults["callbacks"] = [*self.trainer_defaults["callbacks"], ProgressBar()]
        if "ckpt_path" in config:
            config.ckpt_path = find_checkpoint(config.ckpt_path, Path(config.trainer.default_root_dir))
            config.weights_only = True  # a checkpoint is read without running code from it


def _has_progress_bar(callbacks: list[Any]) -> bool:
    classes = [pydoc.locate(callback.class_path) for callback in callbacks]
    return any(isinstance(cls, type) and issubclass(cls, L.callbacks.ProgressBar) for cls in classes)


def find_checkpoint(ckpt_path: str | None, run_folder: Path) -> str | None:
    """The file that `--ckpt_path` means: `last` is the newest in the run folder.

    Raises:
        ValueError: There is none; nothing starts from step 0 by mistake.
    """
    if ckpt_path is None:
        return None
    folder = run_folder / "checkpoints"
    there = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    listing = ", ".join(path.name for path in there) or "nothing"
    if ckpt_path == "last":
        if not there:
            raise ValueError(f"--ckpt_path last: {folder} holds no checkpoint. Start without --ckpt_path, or name the file")
        return str(there[-1])
    if not Path(ckpt_path).exists():
        raise ValueError(f"--ckpt_path: there is no {ckpt_path}. {folder} holds {listing}")
    return ckpt_path


def explain(message: str, option_names: list[str]) -> str:
    """The reason of a parser's error in one paragraph, with the nearest valid name where a name is wrong."""
    name = next((found for pattern in _WRONG_NAME for found in re.findall(pattern, message)), None)
    if name is None:
        return " ".join(line.strip() for line in message.splitlines() if line.strip())
    known = {*option_names, *_signature_names()}
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean {nearest[0]}?" if nearest else " See --help, or --model.help CLASS for the options of a class."
    return f"{name} is no known name here.{hint}"


_WRONG_NAME = (
    r"unrecognized arguments: --([\w.]+)",
    r"Option '([\w.]+)' is not accepted",
    r"Key '([\w.]+)' is not expected",
    r'Key "([\w.]+)" is not expected',
    r"Expected a dot import path string: (\w+)",
)


def _signature_names() -> Iterator[str]:
    """Names of all parts, modules and their options that are imported, options of dataclasses included."""
    pending: list[Any] = [Part, L.LightningModule, L.LightningDataModule]
    seen: set[Any] = set()
    while pending:
        cls = pending.pop()
        if cls in seen:
            continue
        seen.add(cls)
        pending += cls.__subclasses__()
        yield cls.__name__
        for parameter in inspect.signature(cls).parameters.values():
            yield parameter.name
            for kind in (parameter.annotation, *get_args(parameter.annotation)):
                if dataclasses.is_dataclass(kind):
                    pending.append(kind)


def quiet_lightning() -> None:
    """Leaves out what Lightning says for its own sake: advertisements, and a warning about our frozen parts."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip: For seamless" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # what is frozen stays in eval mode
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # of its own code


def show_user_errors(hook: Callable[..., None]) -> Callable[..., None]:
    """An exception hook that shows a ValueError of our own as its text alone: it is written for the user.

    Any other exception, also a ValueError from inside a library, goes to `hook` with its traceback.
    """

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        raised_in = Path(traceback.extract_tb(trace)[-1].filename) if trace is not None else ROOT
        ours = raised_in.is_relative_to(ROOT) and "site-packages" not in raised_in.parts
        if isinstance(error, ValueError) and ours:
            sys.stderr.write(f"\nerror: {error}\n")
        else:
            hook(kind, error, trace)

    return show
