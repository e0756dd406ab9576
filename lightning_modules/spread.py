"""The side of a LightningModule that knows of other processes: how its model is spread over them, and who waits for whom."""

from abc import abstractmethod

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from datamodules.batch import Batch
from lightning_modules.autocast import check_trained, check_types
from lightning_modules.flat_shards import FlatShardedStrategy
from lightning_modules.idle_parts import touch_idle_parts, used_parts
from lightning_modules.loss_scale import scaler_of, take_scale_off
from lightning_modules.measuring import MeasuringLitModule
from lightning_modules.optim import clip_gradients, weights_of
from lightning_modules.strategies import ShardedStrategy
from lightning_modules.trainer_options import check_averaging, check_clipping
from lightning_modules.zero import ZeroStrategy
from models.checkpoint import fingerprints
from models.flat import average
from models.multimodal import MultiModalModel
from models.parallel import add_up_own_heads, check_not_quantised, gather, is_sharded, parallelize, release
from models.spread import clip_norm, local
from models.zero import LastGradients

_REFUSED = {
    DeepSpeedStrategy: "its steps are not divided by their tokens, and its checkpoints are pickles, which only as many processes "
    "read. Take configs/strategy/deepspeed_zero2.yaml, or",
    FSDPStrategy: "it does not clip gradients by their norm, and its processes wait in vain for one whose rows have other media. "
    "Take lightning_modules.flat_shards.FlatShardedStrategy, which is made of it, or",
}
"""Strategies that change what a step is, and how."""


class SpreadLitModule(MeasuringLitModule):
    """A module whose model may be sharded or split (`models.parallel`), as `ShardedStrategy` says, or in flat shards
    (`FlatShardedStrategy`), or trained by an engine that keeps gradients and the optimizer's state in shares (`ZeroStrategy`).

    Where layers are sharded a process takes part in the gathering of each layer, so all must run them equally often, whatever
    rows each of them has: `meet` and `agree` see to that.
    """

    model: MultiModalModel

    def __init__(self) -> None:
        super().__init__()
        self._used: set[str] = set()
        self._last_gradients: LastGradients | None = None
        self._fingerprints: dict[str, str] = {}
        self._fingerprinted: set[str] | None = None

    @property
    def zero(self) -> ZeroStrategy | None:
        """The strategy, where it is one by which DeepSpeed's engine has the gradients."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, ZeroStrategy) else None

    @property
    def is_flat(self) -> bool:
        """Whether the strategy is the one by which torch's first FSDP has flat shards."""
        return self._trainer is not None and isinstance(self._trainer.strategy, FlatShardedStrategy)

    @property
    def is_spread(self) -> bool:
        """Whether a process has but a share of what trains, or of its gradients."""
        return self.device_mesh is not None or self.zero is not None or self.is_flat

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled, for float16."""
        return scaler_of(self.trainer) is not None

    def configure_model(self) -> None:
        """Makes the weights, once, and spreads them over the devices as the strategy wants.

        Raises:
            ValueError: The model cannot be made, or not be spread so, or the trainer has an option that no fit can have.
        """
        if self._trainer is not None and self._trainer.training:
            check_clipping(self._trainer.gradient_clip_val)
            check_averaging(self._trainer.callbacks)  # type: ignore[attr-defined]  # set by Lightning
        if self.model.is_built:
            return
        for kind, why in _REFUSED.items():
            if self._trainer is not None and isinstance(self._trainer.strategy, kind) and not self.zero and not self.is_flat:
                raise ValueError(
                    f"trainer.strategy is {type(self._trainer.strategy).__name__}, which is not supported: {why} "
                    "configs/strategy/fsdp.yaml, which shards weights, gradients and the state of the optimizer (as ZeRO-3)"
                )
        if self.is_spread:
            torch.set_rng_state(self.trainer.strategy.broadcast(torch.get_rng_state()))  # each draws what the first one draws
        self.build_model()
        if self._trainer is not None:
            check_types(self.model.parts(), self._trainer.precision)
            if self._trainer.training:
                check_trained(self.model.parts(), self._trainer.precision)
        if not self.is_spread:
            return
        language_model = self.model.language_model
        _ = language_model.takes_branches, language_model.takes_packs  # are tried out, while the weights are whole
        if self.device_mesh is not None:
            strategy = self.trainer.strategy
            parallelize(self.model, self.device_mesh, isinstance(strategy, ShardedStrategy) and strategy.offload)
        elif self.is_flat:
            check_not_quantised(self.model)
        elif self.zero is not None and (self.trainer.training or self.zero.stage == 3):
            check_not_quantised(self.model)
            self._last_gradients = LastGradients(self.model, self.zero.stage == 3)

    @abstractmethod
    def build_model(self) -> None:
        """Makes the weights, whole; called once."""

    def check_spread(self, by_engine: bool) -> None:
        """Refuses to be spread over devices, where the objective does not allow it.

        Args:
            by_engine: By DeepSpeed's engine, which divides gradients by what is known before the forward pass.

        Raises:
            ValueError: It must not be.
        """

    @abstractmethod
    def saved_names(self) -> set[str]:
        """Names of the weights that a checkpoint holds, as the model calls them."""

    def take_fingerprints(self) -> None:
        """Of the frozen weights, which do not change: once a run will do, and before a process has but shares of them."""
        if self._fingerprinted != (names := self.saved_names()):
            self._fingerprints, self._fingerprinted = fingerprints(self.model, names), names

    def meet(self, batch: Batch) -> Batch:
        """Where all processes begin a batch together: one without rows gets those of another to run, which must not count.

        Rows are missing where they were skipped, or where an epoch ends. If no process has any, the batch stays without.
        """
        self.is_lent = False
        if self._last_gradients is not None and self.trainer.training:
            self._last_gradients.begin()
        elif not is_sharded(self.model):
            return batch
        gather(self.model)
        strategy, rank = self.trainer.strategy, self.global_rank
        has_rows_R = torch.zeros(self.trainer.world_size, dtype=torch.int32, device=strategy.root_device)
        has_rows_R[rank] = int(bool(batch["examples"]))
        has_rows = strategy.reduce(has_rows_R, reduce_op="sum").tolist()
        self.is_lent = any(has_rows) and not has_rows[rank]
        if all(has_rows) or not any(has_rows):
            return batch
        lender = has_rows.index(1)
        lent = strategy.broadcast(move_data_to_device(batch, "cpu") if rank == lender else None, src=lender)
        return strategy.batch_to_device(lent, self.device) if self.is_lent else batch

    def agree(self, wanted: bool) -> bool:
        """Whether to run layers once more: where they are sharded, if any process wants to, and else as this one wants."""
        return self.trainer.strategy.reduce_boolean_decision(wanted, all=False) if is_sharded(self.model) else wanted

    def offer_all(self, total: Tensor | None, batch: Batch) -> Tensor | None:
        """The loss of a batch, with a gradient for whatever others wait for; None: it has none."""
        if not self.is_lent:
            self._used |= used_parts(self.model, batch)
        if total is None and self.is_scaled:
            # a scaler leaves steps out whose last batch has no backward pass, and needs a gradient
            release(self.model)
            total = touch_idle_parts(None, self.model, batch)
        elif self.device_mesh is not None or self.is_flat:
            total = torch.zeros((), device=self.device, requires_grad=True) if total is None else total
        elif self._last_gradients is not None:
            self._last_gradients.end()
            total = touch_idle_parts(None, self.model, batch) if total is None else total
        elif self.trainer.world_size > 1:
            total = touch_idle_parts(total, self.model, batch)
        # Lightning divides by the number of batches of a step; what divides by that of tokens is `StepLoss`
        return None if total is None else total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Completes the gradients, and takes away those of parts that no process used in the step, as on one device.

        To an optimizer with a memory a gradient of 0 is not the same as none.
        """
        take_scale_off(self.trainer, optimizer)
        if self.trainer.world_size > 1 or self.zero is not None or self.is_scaled:
            if self.is_flat:
                average(self.parameters())
            parts, used, self._used = self.model.parts(), self._used, set()
            own = torch.tensor([name in used for name in parts], dtype=torch.int32, device=self.trainer.strategy.root_device)
            numbers = self.trainer.strategy.reduce(own, reduce_op="sum").tolist()
            idle = {name for name, number in zip(parts, numbers, strict=True) if not number}
            if self.zero is not None:
                self.zero.leave_out(idle)
            for name in idle:
                for _, weight in parts[name].own_named_parameters():
                    weight.grad = None
        if self.device_mesh is not None:
            add_up_own_heads(self.model.language_model, self.device_mesh)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients, also where a device has but a share of some of them."""
        if self.device_mesh is None or not gradient_clip_val:
            clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        weights = weights_of(optimizer)
        if gradient_clip_algorithm == "value":
            for gradient in (local(weight.grad) for weight in weights if weight.grad is not None):
                gradient.clamp_(-gradient_clip_val, gradient_clip_val)
        else:
            clip_norm(weights, gradient_clip_val)
