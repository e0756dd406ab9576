"""A run that is planned: its epoch, and the memory and operations of its steps."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from lightning_modules.trainer_options import check_clipping
from planning.blank_rows import blank_batch
from planning.devices import GIB, Device
from planning.epoch import Epoch, open_rows, plan_epoch
from planning.outline import make_outline
from planning.placement import Placement, check_placement, held_bytes, host_bytes
from planning.precision import precision_of
from planning.step import run_step

if TYPE_CHECKING:
    from datamodules.loading import RowDataModule
    from lightning_modules.multimodal import MultiModalLitModule


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Args:
        model: The module, unbuilt.
        datamodule: Its data.
        trainer: The options of the trainer.
        placement: How the model is spread over devices.
        device: Each of them.
    """

    model: "MultiModalLitModule"
    datamodule: "RowDataModule"
    trainer: Namespace
    placement: Placement
    device: Device

    @property
    def accumulated(self) -> int:
        """Batches of a step."""
        return self.trainer.get("accumulate_grad_batches") or 1


@dataclass(frozen=True)
class Part:
    """What a part of the model is.

    Args:
        name: Its path.
        parameters: Its weights, on all devices that split them together.
        trainable: Those that train.
        weight_bytes: What they take on a device.
    """

    name: str
    parameters: int
    trainable: int
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Args:
        parts: The parts of the model.
        epoch: The first epoch.
        memory: Bytes on a device at the peak, by what they are for.
        flops: Operations of the largest batch, on a device.
        epoch_flops: Operations of an epoch, on all devices, as if each token took as many as those of the largest batch.
        on_host: Bytes that a device has in the memory of the machine instead, by an option of the strategy; by kind.
    """

    parts: tuple[Part, ...]
    epoch: Epoch
    memory: Counter[str]
    flops: int
    epoch_flops: float
    on_host: Counter[str]

    @property
    def total(self) -> int:
        """Bytes on a device at the peak."""
        return sum(self.memory.values())

    def fits(self, device: Device) -> bool:
        """Whether a device has as much."""
        return self.total <= device.gib * GIB


def plan_run(run: Run) -> Plan:
    """Plans a run. Neither weights nor media are read.

    Raises:
        ValueError: The model cannot be made, or not be spread so, or the data or an option of the trainer cannot be used.
    """
    check_clipping(run.trainer.get("gradient_clip_val"))
    precision, placement = precision_of(run.trainer.get("precision")), run.placement
    dataset = open_rows(run.datamodule)
    epoch = plan_epoch(run.datamodule, run.trainer, placement.replicas)
    on_cpu = run.device.context_gib == 0
    outline = make_outline(run.model, precision, on_cpu, placement.split)
    check_placement(outline, placement, precision)
    held = held_bytes(outline, placement)
    cost, flops_a_place, on_host = Counter[str](), 0.0, Counter[str]()
    for planned in dict.fromkeys((epoch.largest[0], epoch.most_encoded)):
        batch = blank_batch(dataset, planned.keys)
        step = run_step(outline, batch, precision, run.accumulated > 1, placement, on_cpu)
        flops_a_place = max(flops_a_place, step.flops / planned.places)
        cost = max(cost, step.at_peak, key=lambda own: sum(own.values()))
        on_host = step.on_host
    names = set(outline.weights.values())
    memory = Counter({f"weights of {name}" if name in names else name: size for name, size in held.items()})
    memory.update(cost)
    memory["context of the device"] = round(run.device.context_gib * GIB)
    whole = outline if placement.split == 1 else make_outline(run.model, precision, on_cpu)
    counts, trainable = whole.counts(), whole.counts(trainable=True)
    return Plan(
        parts=tuple(Part(name, counts[name], trainable[name], held[name]) for name in counts),
        epoch=epoch,
        memory=Counter({name: size for name, size in memory.items() if size}),
        flops=round(flops_a_place * epoch.largest[0].places),
        epoch_flops=flops_a_place * epoch.places * placement.split,
        on_host=on_host + Counter({"weights": host_bytes(outline, placement)}),
    )
