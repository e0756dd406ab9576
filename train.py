"""Trains, validates, tests and predicts: `python train.py fit --config configs/sft/tiny.yaml`."""

import os
import sys

# a tokenizer's threads do not survive the fork of loader workers; each worker tokenises for itself
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# imported so that a YAML can name their classes without a path
import datamodules.audio
import datamodules.image
import datamodules.mixture
import datamodules.preference
import datamodules.relevance
import datamodules.toxicity
import datamodules.video  # noqa: F401
import encoders.audio
import encoders.image
import encoders.projectors
import encoders.resampler
import encoders.video  # noqa: F401
import lightning_modules.cpo
import lightning_modules.kto
import lightning_modules.mdpo
import lightning_modules.orpo
import lightning_modules.precomputed
import lightning_modules.reward_model
import lightning_modules.rewards
import lightning_modules.simpo  # noqa: F401
import models.cross_attention
import models.language
import models.pretrained  # noqa: F401
from datamodules.loading import RowDataModule
from inspection.doctor import doctor
from inspection.inspect_rows import inspect
from lightning_modules.callbacks import FirstStepCheck, PartTable, PredictionWriter, RunSummary, Throughput
from lightning_modules.cli import OmniLitCLI, quiet_lightning, show_user_errors
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.run_folder import RunFolder
from planning.plan import plan


def main(args: list[str] | None = None) -> OmniLitCLI:
    """Runs the command line.

    Args:
        args: The arguments; None: those of the process.
    """
    callbacks = [PartTable(), FirstStepCheck(), Throughput(), RunSummary(), PredictionWriter()]
    return OmniLitCLI(
        MultiModalLitModule,
        RowDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        save_config_callback=RunFolder,
        trainer_defaults={"callbacks": callbacks, "use_distributed_sampler": False, "enable_model_summary": False},
        commands={"inspect": inspect, "doctor": doctor, "plan": plan},
        args=args,
    )


if __name__ == "__main__":
    quiet_lightning()
    sys.excepthook = show_user_errors(sys.excepthook)
    main()
