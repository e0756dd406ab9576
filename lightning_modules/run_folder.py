"""The folder of a run: what is written into it before training, and when a fit may use it."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.run_lock import RunLock

if TYPE_CHECKING:
    from lightning_modules.multimodal import MultiModalLitModule


CONFIG = "config.yaml"
"""The resolved configuration of a run, in its folder."""


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run, the same under every logger: `--trainer.default_root_dir`."""
    return Path(trainer.default_root_dir)


def checkpoint_folder(folder: Path, dirpath: str | Path | None = None) -> Path:
    """Where a run keeps its checkpoints.

    Args:
        folder: The folder of the run.
        dirpath: Where `checkpoint.dirpath` says that they are.

    Raises:
        ValueError: That is elsewhere, where neither `--ckpt_path last` nor another fit in the folder would look for them.
    """
    own = folder / "checkpoints"
    if dirpath is not None and Path(dirpath).expanduser().resolve() != own.expanduser().resolve():
        raise ValueError(
            f"checkpoint.dirpath is {dirpath}, but a run keeps its checkpoints in its own folder, here in {own}: its lock guards "
            "them there, and --ckpt_path last finds them. Leave it out (null), and say with --trainer.default_root_dir where the "
            "run is to be; a checkpoint that is elsewhere can be named with --ckpt_path"
        )
    return own


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: under a temporary name first, then renamed.

    Raises:
        ValueError: The folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(cannot_write(path, error)) from error


class RunFolder(SaveConfigCallback):
    """Writes the resolved config, the model and the processor into the run folder when training starts.

    A fit refuses a folder that already holds a run, unless it resumes that run, and any folder that another process has.
    A resumed run keeps the first `config.yaml`; where its own config differs, it is written beside it as `config-2.yaml`,
    `config-3.yaml`, … A fit that fails before its first step takes its config away again, so that the corrected command may use
    the folder.
    Validation, test and prediction neither write nor refuse.

    The options are those of Lightning's `SaveConfigCallback` (`save_config_kwargs` of the CLI). With `overwrite` a
    folder that holds a run is not refused, and its `config.yaml` is replaced.
    """

    _written: Path | None = None
    _first_step: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = RunLock()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a folder that holds another run, before any weights are made, and keeps others out of it.

        Raises:
            ValueError: The folder holds a run that this fit does not resume, another process has it, or it cannot be written.
        """
        if stage != "fit":
            return
        problem = ""
        if trainer.is_global_zero:
            try:
                self._refuse_other_run(trainer)
                self._lock.take(run_folder(trainer))
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                problem = cannot_write(Path(error.filename or run_folder(trainer)), error)
        _raise_everywhere(trainer, problem)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes config, model and processor, once.

        Raises:
            ValueError: The folder cannot be written, or `--ckpt_path last` found none of the checkpoints that are there.
        """
        if self.already_saved:
            return
        problem = ""
        if trainer.is_global_zero:
            try:
                self._refuse_other_run(trainer)  # on a disk without locks one may have begun while weights were made
                self._refuse_unnoticed_restart(trainer)
                if self.save_to_log_dir:
                    self._write(trainer, cast("MultiModalLitModule", pl_module))
                self.save_config(trainer, pl_module, "fit")
            except ValueError as error:
                problem = str(error)
        _raise_everywhere(trainer, problem)
        self.already_saved = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets others use the folder. A fit that fails keeps them out until its process ends: what it saves comes last of all."""
        self._lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the config of a run that never made a step away again."""
        if self._written is not None and trainer.global_step == self._first_step:
            self._written.unlink(missing_ok=True)
            self._written = None

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the nested config to W&B, where that is the logger."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                run = logger.experiment
                # a sweep agent locks its own keys (also `seed_everything`); to set them again only earns a warning
                locked = set(run.config.keys()) if run.sweep_id else set()
                nested = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
                run.config.update({key: value for key, value in nested.items() if key not in locked}, allow_val_change=True)

    def _refuse_other_run(self, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        present = _present(folder, self.config_filename)
        asked_to_resume = trainer.ckpt_path or self.config.get("ckpt_path")
        if present and not (asked_to_resume or self.already_saved or self.overwrite):
            resume = "go on with the run that is there with --ckpt_path last, " if _checkpoints(folder) else ""
            raise ValueError(
                f"{folder} already holds a run ({', '.join(present)}), and this fit does not resume it. Give another folder "
                f"with --trainer.default_root_dir, {resume}or delete the folder"
            )

    def _refuse_unnoticed_restart(self, trainer: Trainer) -> None:
        # Lightning only warns where `--ckpt_path last` finds nothing: right for a first start, not beside checkpoints
        checkpoints = _checkpoints(run_folder(trainer))
        if checkpoints and not trainer.ckpt_path and not self.overwrite:
            raise ValueError(
                f"--ckpt_path {self.config.get('ckpt_path')} found no checkpoint to resume from, but {run_folder(trainer)} "
                f"holds {_counted(checkpoints)}: name one of them with --ckpt_path, or give another folder with "
                "--trainer.default_root_dir"
            )

    def _write(self, trainer: Trainer, module: "MultiModalLitModule") -> None:
        folder = run_folder(trainer)
        first = folder / self.config_filename
        resumed = first.exists() and not self.overwrite
        self._first_step = trainer.global_step
        text = self.parser.dump(self.config, skip_none=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if resumed:
                newest = max(_numbered(first), key=_number)
                if _without_place(newest.read_text(encoding="utf-8")) != _without_place(text):
                    write_text(first.with_stem(f"{first.stem}-{_number(newest) + 1}"), text)
            elif self.multifile:
                self.parser.save(self.config, str(first), skip_none=False, overwrite=self.overwrite, multifile=True)
            else:
                write_text(first, text)
            self._written = None if resumed else first
            module.processor.save(folder / "processor")
            write_text(folder / "model.json", json.dumps(module.model_spec(), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(cannot_write(folder, error)) from error


def cannot_write(path: Path, error: OSError) -> str:
    """What to say of a file or folder that belongs to a run and cannot be written."""
    return (
        f"{path} cannot be written ({error.strerror}): make room or get the right to write there, "
        "or give another run folder with --trainer.default_root_dir"
    )


def _raise_everywhere(trainer: Trainer, problem: str) -> None:
    # what rank 0 found stops all ranks; one that raised alone would leave the others waiting
    problem = trainer.strategy.broadcast(problem)
    if problem:
        raise ValueError(problem)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(checkpoint_folder(folder).glob("*.ckpt"))


def _counted(checkpoints: list[Path]) -> str:
    return f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''} in {checkpoints[0].parent.name}/"


def _present(folder: Path, config_filename: str) -> list[str]:
    """What of a run is in the folder, in words."""
    checkpoints = _checkpoints(folder)
    config = [config_filename] if (folder / config_filename).exists() else []
    return config + ([_counted(checkpoints)] if checkpoints else [])


def _number(path: Path) -> int:
    match = re.search(r"-(\d+)$", path.stem)
    return int(match[1]) if match else 1


def _numbered(first: Path) -> list[Path]:
    """`config.yaml`, and those of `config-2.yaml`, `config-3.yaml`, … that exist."""
    pattern = re.compile(rf"{re.escape(first.stem)}-\d+{re.escape(first.suffix)}")
    return [first, *(path for path in first.parent.iterdir() if pattern.fullmatch(path.name))]


def _without_place(text: str) -> dict[str, Any]:
    """A configuration without what says only where a resumed run goes on: the checkpoint, and the W&B run."""
    config = yaml.safe_load(text)
    config.pop("ckpt_path", None)
    logger = config.get("trainer", {}).get("logger")
    for spec in logger if isinstance(logger, list) else [logger]:
        if isinstance(spec, dict):
            spec.get("init_args", {}).pop("id", None)
    return config
