"""The command line's behaviour: what is linked, where a run lives, and which checkpoint is meant."""

import json
import logging
import os
import pydoc
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.callbacks import ProgressBar
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.cli_errors import explain, reason, show_user_errors
from lightning_modules.cli_yaml import ConfigFile
from lightning_modules.commands import Command, Setup
from lightning_modules.run_folder import CONFIG, checkpoint_folder
from lightning_modules.run_summary import SUMMARY
from lightning_modules.samples import SamplePage
from models.manifest import SUFFIX, manifested, newest, read_manifest

__all__ = ["OmniLitCLI", "Parser", "explain", "find_checkpoint", "quiet_lightning", "show_user_errors"]


class Parser(LightningArgumentParser):
    """A parser that takes no abbreviations, and names the nearest valid option when one is misspelt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one paragraph and exits with 2; inside jsonargparse, which tries out what fits, it raises."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {explain(message, self._option_names())}\n")
        sys.exit(2)

    def _option_names(self) -> list[str]:
        names = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        subcommands = [action.choices for action in self._actions if isinstance(action.choices, Mapping)]
        parsers = [parser for choices in subcommands for parser in choices.values() if isinstance(parser, Parser)]
        return names + [name for parser in parsers for name in parser._option_names()]


class OmniLitCLI(LightningCLI):
    """LightningCLI whose run folder is `trainer.default_root_dir`, and whose data module gets the model's processor.

    Args:
        commands: Subcommands beside those of the trainer, by name; they run without one.
    """

    def __init__(self, *args: Any, commands: Mapping[str, Command] | None = None, **kwargs: Any) -> None:
        self.commands = dict(commands or {})
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of the program and of each subcommand."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="A configuration in YAML; later ones win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what two parts must agree on, and adds the callbacks that every run has."""
        parser.link_arguments("model.processor", "data.init_args.processor", apply_on="instantiate")
        parser.link_arguments("model.answer_form", "data.init_args.answer_form", apply_on="instantiate")
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")
        # another seed is another order, split and augmentation too; int, since it may be a bool
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SamplePage, "samples")
        parser.set_defaults({"trainer.default_root_dir": "runs/default"})

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Adds the trainer's subcommands, then ours: each takes the options of a fit, and the arguments of its function."""
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for name, command in self.commands.items():
            first_line = (command.__doc__ or "").partition("\n")[0]
            subparser = self.init_parser(description=first_line)
            self._add_arguments(subparser)
            own = subparser.add_function_arguments(command, skip={"setup"})
            for action in subparser._actions:
                if action.dest in own and action.default is False:
                    action.nargs, action.const = "?", True  # a flag: --bad is --bad true
            self._subcommand_method_arguments[name] = own
            self._subcommand_parsers[name] = subparser
            parser._subcommands_action.add_subcommand(name, subparser, help=first_line)

    def _parse_ckpt_path(self) -> None:
        """Leaves the checkpoint unread: Lightning would look for hyperparameters in it, and ours hold none."""

    def before_instantiate_classes(self) -> None:
        """Settles the run folder, and finds the checkpoint before anything is built.

        Raises:
            ValueError: There is no such checkpoint, they are to be outside of the run folder, or a class is given as a name.
        """
        if self.subcommand in self.commands:
            return
        config = self.config[self.subcommand] if self.subcommand is not None else self.config
        if "WANDB_SWEEP_ID" in os.environ and (run_id := os.environ.get("WANDB_RUN_ID")):
            # the agent runs one command again and again and says only here which run this is
            config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir) / run_id)
            if isinstance(config.trainer.logger, Namespace):
                config.trainer.logger.init_args.save_dir = config.trainer.default_root_dir
        checkpoint_folder(Path(config.trainer.default_root_dir), config.checkpoint.dirpath)  # before one is looked for
        strategy = config.trainer.strategy
        if isinstance(strategy, str) and "." in strategy:
            raise ValueError(
                f"trainer.strategy is {strategy}, which is no name of a strategy. A class is given by its path: "
                f"--trainer.strategy.class_path {strategy}"
            )
        if config.trainer.enable_progress_bar is not False and not _has_progress_bar(config.trainer.callbacks or []):
            self.trainer_defaults["callbacks"] = [*self.trainer_defaults["callbacks"], ProgressBar()]
        if "ckpt_path" in config:
            self._find_checkpoint(config)
            config.weights_only = True  # a checkpoint is read without running code from it

    def _find_checkpoint(self, config: Namespace) -> None:
        folder, fits = Path(config.trainer.default_root_dir), self.subcommand == "fit"
        if fits and config.ckpt_path is None and "SLURM_RESTART_COUNT" in os.environ and (folder / "config.yaml").is_file():
            config.ckpt_path = "last"  # a job that SLURM started again has the same command
        config.ckpt_path = find_checkpoint(config.ckpt_path, folder, may_begin=fits)
        if fits and config.ckpt_path and Path(config.ckpt_path).is_relative_to(folder):
            manifest = read_manifest(Path(config.ckpt_path))
            if manifest is not None and manifest.wandb_run_id is not None:
                go_on_in_wandb(config.trainer.logger, manifest.wandb_run_id)

    def instantiate_classes(self) -> None:
        """Makes the model, the data module and the trainer; for a command of ours no trainer, and nothing that it would get.

        Raises:
            ValueError: An option has a value that its class refuses.
        """
        try:
            if self.subcommand in self.commands:
                self._instantiate_model_and_data(self.subcommand)
            else:
                super().instantiate_classes()
                path = self.config_init[self.subcommand].get("ckpt_path") if self.subcommand is not None else None
                if path not in (None, "last"):  # which is left of a run that begins anew
                    self.model.goes_on_from = Path(path)
        except (ValueError, MisconfigurationException) as error:
            raise ValueError(reason(error)) from error

    def _instantiate_model_and_data(self, subcommand: str) -> None:
        config = self.config.clone()
        del config[subcommand]["trainer"]  # its loggers and callbacks would be made
        self.config_init = self.parser.instantiate(config, instantiate_groups=False)
        self.model, self.datamodule = (self.config_init[subcommand][name] for name in ("model", "data"))

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs a subcommand, of the trainer or ours."""
        if subcommand not in self.commands:
            super()._run_subcommand(subcommand)
            return
        names = self._subcommand_method_arguments[subcommand]
        options = {name: self.config_init[subcommand][name] for name in names}
        setup = Setup(self.model, self.datamodule, self.config[subcommand].trainer)
        self.commands[subcommand](setup, **options)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, with checkpoints that are checked when they are read."""
        config = self.config_init[self.subcommand] if self.subcommand is not None else self.config_init
        given = config.trainer.plugins or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, CheckpointFile()]
        return super().instantiate_trainer(plugins=plugins, **kwargs)


def _has_progress_bar(callbacks: list[Any]) -> bool:
    classes = [pydoc.locate(callback.class_path) for callback in callbacks]
    return any(isinstance(cls, type) and issubclass(cls, L.callbacks.ProgressBar) for cls in classes)


def find_checkpoint(ckpt_path: str | None, run_folder: Path, may_begin: bool = False) -> str | None:
    """The checkpoint that `--ckpt_path` means: `last` is the newest whole one in the run folder, and it is said which that is.

    Args:
        ckpt_path: The option.
        run_folder: The folder of the run.
        may_begin: A run that was killed before its first checkpoint begins anew.

    Raises:
        ValueError: There is none, or none is whole; nothing starts from step 0 by mistake.
    """
    if ckpt_path is None:
        return None
    folder = checkpoint_folder(run_folder)
    there = sorted(folder.glob("*.ckpt"))
    listing = ", ".join(path.name for path in there) or "nothing"
    if ckpt_path == "last":
        found = newest([folder, run_folder])
        if found is not None:
            left = "".join(f"; left: {reason}" for reason in found.left)
            (rank_zero_warn if left else rank_zero_info)(f"taking {found.path}, step {found.manifest.step:,}{left}")
            return str(found.path)
        if there:
            raise ValueError(
                f"--ckpt_path last: none of the checkpoints in {folder} ({listing}) has a manifest, which says what is whole and "
                "which is the newest. Name one of them"
            )
        if gone := _named_checkpoints(run_folder):
            raise ValueError(
                f"--ckpt_path last: the checkpoints that {run_folder} had are gone ({', '.join(gone)}). Bring one back with its "
                "manifest, or start anew in another folder with --trainer.default_root_dir"
            )
        if may_begin and (run_folder / CONFIG).exists():
            rank_zero_warn(f"{run_folder} holds a run without a checkpoint: it was ended before its first, and begins anew")
            return ckpt_path
        raise ValueError(f"--ckpt_path last: {folder} holds no checkpoint. Start without --ckpt_path, or name the file")
    if not Path(ckpt_path).exists():
        raise ValueError(f"--ckpt_path: there is no {ckpt_path}. {folder} holds {listing}")
    return ckpt_path


def _named_checkpoints(run_folder: Path) -> list[str]:
    """Checkpoints that a run has had, by its manifests and its summary."""
    named = {manifested(file).name for file in checkpoint_folder(run_folder).glob(f"*{SUFFIX}")}
    summary = run_folder / SUMMARY
    if summary.is_file():
        told = json.loads(summary.read_text(encoding="utf-8"))
        named |= {Path(path).name for key in ("best_checkpoint", "last_checkpoint") if (path := told.get(key))}
    return sorted(named)


def go_on_in_wandb(logger: Any, run_id: str) -> None:
    """Sets the configuration of a W&B logger, if that is one and names no run itself, to the run of a checkpoint."""
    loggers = logger if isinstance(logger, list) else [logger]
    for spec in loggers:
        cls = pydoc.locate(spec.class_path) if isinstance(spec, Namespace) else None
        if isinstance(cls, type) and issubclass(cls, WandbLogger) and not (spec.init_args.id or spec.init_args.version):
            spec.init_args.id = run_id


def quiet_lightning() -> None:
    """Leaves out what Lightning says for its own sake: advertisements, and a warning about our frozen parts."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip: For seamless" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # what is frozen stays in eval mode
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # of its own code
