"""The command `plan`: says what a run takes before its first step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.commands import Setup


def plan(setup: "Setup", device: str | None = None, world_size: int | None = None, json: str | None = None) -> None:
    """Says what a run takes, before any step: memory of a device, operations, tokens and steps, and the largest batches.

    The model is built by the code that builds it for training, but of tensors without values, and one step runs on shapes alone,
    of the largest batch of the first epoch. No weights are read or made, and no media are decoded: rows are known from their
    text and the headers of their media. Where the memory does not suffice, it says which flags would help.

    Args:
        device: What it is to run on: A100-80GB, H100-80GB, RTX4090-24GB, ..., `cpu`, or a number of GiB. None: the GPU of this
            machine, or else its CPU.
        world_size: Number of devices; None: as the trainer has it.
        json: Also write the plan to this file.

    Raises:
        ValueError: An option, or a file of the data, cannot be used.
    """
    from pathlib import Path

    from lightning_modules.run_folder import write_text
    from planning.advice import advise
    from planning.devices import find_device
    from planning.placement import placement_of
    from planning.run import Run, plan_run
    from planning.show import as_json, show_plan

    if world_size is not None and world_size < 1:
        raise ValueError(f"--world_size is a number of devices, at least 1, got {world_size}")
    placement = placement_of(setup.trainer, world_size)
    run = Run(setup.model, setup.datamodule, setup.trainer, placement, find_device(device))
    planned = plan_run(run)
    advice, refused = ([], []) if planned.fits(run.device) else advise(run, planned)
    if json is not None:
        write_text(Path(json), as_json(run, planned, advice, refused))
    show_plan(run, planned, advice, refused)
