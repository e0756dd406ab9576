"""Strategies for models that do not fit on one device."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from lightning_modules.checkpoints import CannotSaveError
from lightning_modules.loss_scale import scaler_in
from lightning_modules.optim import check_takes_shares, weights_of
from lightning_modules.recipe import keep_how_computed
from lightning_modules.run_folder import cannot_write
from models.checkpoint import METADATA
from models.manifest import Manifest, discard, fault, file_sums, publish, temporary_name
from models.spread import is_spread, mesh_of, spread_like, whole


def check_at_a_time(optimizer: Optimizer, kind: Callable[[Tensor], object], precision: Precision, split: int | str) -> None:
    """Refuses an optimizer, and a scaler, that would compute with weights at a time of which some are split and others not.

    Args:
        optimizer: The optimizer.
        kind: What must be the same of weights that torch computes with at a time: over which devices they are spread.
        precision: Lightning's plugin.
        split: So many devices split each layer.

    Raises:
        ValueError: It would.
    """

    def are_mixed(weights: Iterable[Tensor]) -> bool:
        return len(set(map(kind, weights))) > 1

    if scaler_in(precision) is not None and are_mixed(weights_of(optimizer)):
        raise ValueError(
            f"trainer.precision is {precision.precision}, whose scaler looks at all gradients at a time, and with "
            f"tensor_parallel_size {split} some are split and others not: take bf16-mixed or 32-true, or set "
            "tensor_parallel_size to 1"
        )
    for group in optimizer.param_groups:
        at_a_time = next((option for option in ("fused", "foreach") if group.get(option)), None)
        if at_a_time and are_mixed(group["params"]):
            raise ValueError(
                f"model.optimizer.{at_a_time} is true, which steps all weights at a time, and with tensor_parallel_size {split} "
                f"some are split and others not: set model.optimizer.{at_a_time} to false"
            )


class ShardWriter(dcp.FileSystemWriter):
    """Torch's writer of a folder of shards, which raises what the disk said.

    Torch hides that behind an error of its own, as its context, which is lost where a process tells the others of it.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the shards of this process.

        Raises:
            OSError: The disk is full, or fails.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 and tensor parallelism by torch, whose checkpoints hold what those of one device hold.

    What is spread how, and over which devices, is said in `models.parallel`. A checkpoint is one file, as on one device: a run
    goes on from it with any strategy and any number of devices.

    Args:
        data_parallel_size: Groups of devices that read rows of their own, over which layers are sharded; auto: as many as there
            can be.
        tensor_parallel_size: Devices of a group, which split each layer between them; auto: those of a machine.
        save_distributed_checkpoint: Write a folder to which each process adds its shard, instead of one file that the first
            process gathers. Any number of processes can go on from it; to use or evaluate the model, or to start another run of
            it, make it one file: `python -m lightning.fabric.utilities.consolidate_checkpoint <folder>`.
        offload: Keep shards, of weights, gradients and the optimizer's state, in the memory of the machine, and compute its step
            there; the device has what is gathered, and what is frozen outside of the layers.
    """

    def __init__(
        self,
        *args: Any,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = False,
        offload: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, *args, **kwargs)
        self.offload = offload

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        """Settles the sizes, of which Lightning would make `auto` the number of machines, and what the processes talk by.

        Raises:
            ValueError: They do not fit the number of devices.
        """
        devices = self.num_nodes * self.num_processes
        split = self.num_processes if self._tensor_parallel_size == "auto" else self._tensor_parallel_size
        groups = devices // split if self._data_parallel_size == "auto" else self._data_parallel_size
        if groups * split != devices:
            raise ValueError(
                f"trainer.strategy: {devices} devices cannot be {groups} groups (data_parallel_size) of {split} "
                "(tensor_parallel_size): the product must be the number of devices"
            )
        if self.offload and groups == 1:
            raise ValueError(
                "trainer.strategy.offload is true, but with data_parallel_size 1 there are no shards to keep in the memory of "
                "the machine: set it to false, or take more devices"
            )
        self._tensor_parallel_size, self._data_parallel_size = split, groups
        if self.offload and self._process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gradients are clipped, and checkpoints gathered, on processors
        super().setup_environment()

    def model_to_device(self) -> None:
        """Moves what is on the processor to the device, but for shards that are to stay there."""
        if not self.offload:
            super().model_to_device()
            return
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not is_spread(tensor):
                tensor.data = tensor.data.to(self.root_device)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Makes the optimizer, where it takes the weights one by one if it has to.

        Raises:
            ValueError: It would take all at a time, of which some are split and others not, or their scaler would; or it needs
                more of a weight than a device has.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if any(map(is_spread, weights_of(optimizer))):
                check_takes_shares(optimizer)
            check_at_a_time(optimizer, mesh_of, trainer.precision_plugin, self._tensor_parallel_size)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the model: shards, or on the first process whole tensors, and nothing on the others."""
        state = self._saved()
        return state if self._save_distributed_checkpoint else self._gathered(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, in the same way."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        state = optimizer.state_dict()
        tensors = {number: self._gathered(values) for number, values in state["state"].items()}
        return {**state, "state": tensors}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a file, or a folder under a temporary name that is then renamed, with its manifest.

        Raises:
            CannotSaveError: It cannot be written; of a folder all processes are told.
        """
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:  # Lightning would first remove a folder that has the name
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, temporary = self.broadcast((Path(filepath), temporary_name(Path(filepath))))
        if problem := self.broadcast(self._write_folder(checkpoint, path, temporary)):
            if self.is_global_zero:
                discard(temporary)
            raise CannotSaveError(problem)

    def _write_folder(self, checkpoint: dict[str, Any], path: Path, temporary: Path) -> str:
        """Writes the shards, on all processes, and the rest on the first; what went wrong, in words, or nothing."""
        shards = {"state_dict": checkpoint.pop("state_dict")}
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            shards[f"optimizer_{number}"] = state
        try:
            dcp.save(shards, storage_writer=ShardWriter(temporary), checkpoint_id=temporary)
            if self.is_global_zero:
                with (temporary / METADATA).open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                step, run_id = checkpoint.get("global_step", 0), checkpoint.get("wandb_run_id")
                publish(temporary, path, Manifest(step, file_sums(temporary, path.name), run_id))
        except dcp.api.CheckpointException as error:  # the same on all processes
            first, _ = next(iter(error.failures.values()))
            return cannot_write(path, first if isinstance(first, OSError) else OSError(None, str(first)))
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch's writer hides what the disk said
            if not isinstance(reason, OSError):
                raise
            return cannot_write(path, reason)
        return ""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any strategy that is a file, or a folder of shards of any number of processes.

        Raises:
            ValueError: It is damaged, or no checkpoint of ours.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path)
        if problem := self.broadcast(fault(path) if self.is_global_zero else ""):
            raise ValueError(f"{path} is not what its manifest says: {problem}. Take another checkpoint of the run")
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(path / METADATA, map_location="cpu", weights_only=True)
        module = cast("Any", self.lightning_module)
        if module.trainer.training:
            module.check_recipe(checkpoint)  # before the state of another optimizer is looked for
        held = {keys[:3] for keys in dcp.FileSystemReader(path).read_metadata().planner_data.values()}
        shards: dict[str, Any] = {"state_dict": {name.removeprefix("model."): x for name, x in self._saved().items()}}
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            state = get_optimizer_state_dict(self.model, optimizer)
            # a part that had no rows yet has none, neither there nor in the optimizer that goes on
            known = cast("dict[str, Any]", state["state"])
            of_weights = {weight: value for weight, value in known.items() if (name, "state", weight) in held}
            shards[name] = {**state, "state": of_weights}
        dcp.load(shards, checkpoint_id=path)
        some = StateDictOptions(strict=False)
        for number, optimizer in enumerate(self.optimizers):
            keep_how_computed(shards[f"optimizer_{number}"]["param_groups"], optimizer.param_groups)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=shards[f"optimizer_{number}"], options=some)
        return checkpoint | {"state_dict": shards["state_dict"], "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Spreads the weights of a checkpoint."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Spreads the state of optimizers; of a folder there is none left to be spread."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            state = {
                number: {
                    name: spread_like(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value
                    for name, value in saved["state"][number].items()
                }
                for number, weight in zip(numbers, weights_of(optimizer), strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _saved(self) -> dict[str, Any]:
        module = cast("Any", self.lightning_module)
        state = module.model.state_dict()
        return {f"model.{name}": state[name] for name in sorted(module.saved_names())}

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """On the first process all tensors whole, on the CPU; the others help, and keep nothing."""
        gathered = {}
        for name, value in state.items():
            full = whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                gathered[name] = full.cpu() if isinstance(full, Tensor) else full
        return gathered
