"""Commands of our own beside `fit`: functions that look at a model and its data without training anything.

One is added in one place, the table in `train.py`. Its function takes the `Setup` first; its other arguments are the command's
options, and its docstring their `--help`. Heavy libraries are imported inside it, since every start reads its signature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from datamodules.loading import RowDataModule
    from lightning_modules.multimodal import MultiModalLitModule

Command = Callable[..., None]
"""`command(setup, option=...)`."""


@dataclass(frozen=True)
class Setup:
    """What a command looks at.

    Args:
        model: As a fit would get it; nothing of it is built.
        datamodule: As a fit would get it, with the model's processor; no file is opened yet.
        trainer: The options of the trainer (`default_root_dir`, `devices`, ...), of which none is made.
    """

    model: "MultiModalLitModule"
    datamodule: "RowDataModule"
    trainer: Namespace
