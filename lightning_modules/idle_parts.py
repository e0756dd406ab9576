"""All parts take part in each step, so that no process waits for gradients that another does not have."""

import torch
from torch import Tensor

from datamodules.batch import MODALITIES, Batch
from encoders.base import Part
from models.multimodal import MultiModalModel


def idle_parts(model: MultiModalModel, batch: Batch) -> list[Part]:
    """The parts that a batch has no use for: encoder and projector of the modalities that it lacks, and the fusion of none."""
    if not batch["examples"]:
        return list(model.slots().values())
    absent = [modality for modality in MODALITIES if modality not in batch]
    idle = {f"{modality}_{kind}" for modality in absent for kind in ("encoder", "projector")}
    if len(absent) == len(MODALITIES):
        idle.add("fusion")
    present = [modality for modality in MODALITIES if modality in batch]
    return [part for name, part in model.parts().items() if name in idle or part.is_idle(present)]


def touch_idle_parts(loss: Tensor | None, model: MultiModalModel, batch: Batch) -> Tensor:
    """Adds 0 to a loss, with a gradient of 0 for what trains of the parts that the batch has no use for.

    `DistributedDataParallel` sums up the gradients of all processes bucket by bucket. A process whose rows have no sound never
    offers those of the audio encoder, and the others wait for it, in vain; to search for such parameters
    (`find_unused_parameters`) costs a walk through the graph in each step. A touched parameter offers zeros.

    Args:
        loss: The loss of the batch; None: it has none, since all its rows were skipped.
        model: The model.
        batch: The batch.
    """
    zeros = [p.flatten()[:0].sum() for part in idle_parts(model, batch) for p in part.parameters() if p.requires_grad]
    return sum(zeros, torch.zeros((), device=batch["tokens_BT"].device) if loss is None else loss)
