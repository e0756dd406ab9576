"""Reward criteria of the model that tell nothing apart."""

import logging

from lightning.pytorch import Trainer
from torch import Tensor

from datamodules.score_ranges import ScoreRanges
from lightning_modules.run_summary import num_with_same_rows

log = logging.getLogger(__name__)


def name_constant(ranges: ScoreRanges, trainer: Trainer) -> None:
    """Names, once, the criteria that gave the same to all answers of all processes, which must meet here.

    Args:
        ranges: What they gave in this process, by names that all processes know.
        trainer: Knows the processes.
    """

    def over_processes(own: Tensor, reduce_op: str) -> Tensor:
        total = trainer.strategy.reduce(own.to(trainer.strategy.root_device), reduce_op=reduce_op)
        return total // num_with_same_rows(trainer) if reduce_op == "sum" else total

    for said in ranges.constant(reduce=over_processes):
        if trainer.is_global_zero:
            log.warning(said)
