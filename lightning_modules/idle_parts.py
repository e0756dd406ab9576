"""All parts take part in each step, so that no process waits for gradients that another does not have."""

import torch
from torch import Tensor

from datamodules.batch import MODALITIES, Batch
from encoders.base import Part
from models.multimodal import MultiModalModel
from models.spread import local


def is_idle(name: str, part: Part, batch: Batch) -> bool:
    """Whether a batch has no use for a part: the encoder or projector of a modality that it lacks, or the fusion of none.

    Args:
        name: The path of the part, as in `MultiModalModel.parts`; what a part is made of is idle with it.
        part: The part, which may know more of itself.
        batch: The batch; it has rows.
    """
    present = [modality for modality in MODALITIES if modality in batch]
    slot = name.partition(".")[0]
    if slot == "fusion":
        return not present
    return part.is_idle(present) or slot in {
        f"{modality}_{kind}" for modality in MODALITIES if modality not in present for kind in ("encoder", "projector")
    }


def idle_parts(model: MultiModalModel, batch: Batch) -> list[Part]:
    """The parts that a batch has no use for; all of them, where all its rows were skipped."""
    return [part for name, part in model.parts().items() if not batch["examples"] or is_idle(name, part, batch)]


def used_parts(model: MultiModalModel, batch: Batch) -> set[str]:
    """Names of the parts that a batch uses."""
    return {name for name, part in model.parts().items() if batch["examples"] and not is_idle(name, part, batch)}


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
    weights = [weight for part in idle_parts(model, batch) for _, weight in part.own_named_parameters()]
    zeros = [local(weight).flatten()[:0].sum() for weight in weights if weight.requires_grad]
    return sum(zeros, torch.zeros((), device=batch["tokens_BT"].device) if loss is None else loss)
