"""Torch's first FSDP, with flat shards, whose steps and checkpoints are those of one device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_modules.one_file import OneFileStrategy
from lightning_modules.optim import check_takes_shares, weights_of
from models.flat import Sharding, clip_flat, flatten, own_state, whole_state
from models.flat_layer import cut_of
from models.zero import check_whole


def _drop_gradients(optimizer: Optimizer, *args: Any) -> None:
    optimizer.zero_grad()


class FlatPrecision(FSDPPrecision):
    """Float32, or bf16-mixed as under other strategies: by torch's autocast, and no weight is rounded.

    Args:
        precision: One of the two.
        device_type: Where the model runs.

    Raises:
        ValueError: The precision is another.
    """

    def __init__(self, precision: Any, device_type: str) -> None:
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision is {precision}, but FlatShardedStrategy takes 32-true and bf16-mixed: take one of these"
            )
        super().__init__(precision)
        self.device_type = device_type

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            yield

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scales all gradients down so that their norm is at most `clip_val`; of a weight in shards each process has others."""
        clip_flat(weights_of(optimizer), clip_val)


class FlatShardedStrategy(OneFileStrategy, FSDPStrategy):
    """Torch's first FSDP: decoder layers in flat shards, each of which is gathered while it runs.

    Torch calls FSDP2 (`ShardedStrategy`) its successor: take this one for runs that are to be as others under it were. What
    trains outside of the layers is whole on each device, with its gradients and the optimizer's state, and so are adapters.

    A checkpoint is one file, as on one device: a run goes on from it with any strategy and any number of devices. A shard is cut
    across the weights, so take an optimizer that treats each value by itself: AdamW and SGD do, not Adafactor, nor those of 8
    bits.

    Args:
        sharding_strategy: FULL_SHARD: a layer is gathered anew for its backward pass; SHARD_GRAD_OP: it stays until then.
        process_group_backend: `nccl`, or what else the processes talk by; None: what suits the device.
        timeout: How long they wait for each other.
    """

    def __init__(
        self,
        sharding_strategy: Sharding = "FULL_SHARD",
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(sharding_strategy=sharding_strategy, process_group_backend=process_group_backend, timeout=timeout)
        self._sharding: Sharding = sharding_strategy

    @property
    def precision_plugin(self) -> FSDPPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:  # Lightning gives one of its own
        device_type = "cuda" if isinstance(self.accelerator, CUDAAccelerator) else "cpu"
        self._precision_plugin = None if plugin is None else FlatPrecision(plugin.precision, device_type)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        module: Any = model
        if module.trainer.training:
            check_whole(module.model)
            module.take_fingerprints()  # of the weights, while they are whole
        return flatten(module, module.model, self.root_device, self._sharding)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Makes the optimizer, whose steps end without gradients.

        Of a row torch takes a weight that has none, such as one of a part without rows, beside others that have for one that does
        not train any more.

        Raises:
            ValueError: It needs more of a weight than a device has.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if any(cut_of(weight) is not None for weight in weights_of(optimizer)):
                check_takes_shares(optimizer)
            optimizer.register_step_post_hook(_drop_gradients)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the model: whole tensors on the first process; others help."""
        module: Any = self.lightning_module
        state, weights = module.model.state_dict(), dict(module.model.named_parameters(remove_duplicate=False))
        held: dict[str, Any] = {}
        for name in sorted(module.saved_names()):
            cut = cut_of(weights.get(name, state[name]))  # a buffer is in the state alone
            whole = state[name] if cut is None else cut.whole(state[name])
            if self.is_global_zero:
                held[f"model.{name}"] = whole.cpu()
        return held

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimizer as torch has it, weight by weight, in the same way."""
        state = optimizer.state_dict()
        return {**state, "state": whole_state(state["state"], weights_of(optimizer), self.is_global_zero)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads what belongs to this process of the state of optimizers."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            weights = dict(zip(numbers, weights_of(optimizer), strict=True))
            optimizer.load_state_dict({**saved, "state": own_state(saved["state"], weights)})
