"""DeepSpeed's ZeRO (arXiv 1910.02054), with steps and checkpoints that are those of one device."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_modules.one_file import OneFileStrategy
from lightning_modules.optim import NO_DECAY, check_takes_shares
from lightning_modules.zero_shares import Shares, SharesOfWeights
from models.stored import num_weights
from models.zero import GatheredLayers, check_whole


class ZeroPrecision(DeepSpeedPrecision):
    """Float32, or bf16-mixed as under other strategies: by torch's autocast, and no weight is rounded.

    Raises:
        ValueError: The precision is another.
    """

    def __init__(self, precision: Any) -> None:
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision is {precision}, but ZeroStrategy takes 32-true and bf16-mixed: take one of these"
            )
        super().__init__(precision)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        from deepspeed.accelerator import get_accelerator

        with torch.autocast(get_accelerator().device_name(), torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            yield


class ZeroStrategy(OneFileStrategy, DeepSpeedStrategy):
    """ZeRO-2: each device has the whole model, but a share of the gradients and of the optimizer's state; ZeRO-3: of weights too.

    In stage 3 a device has shares of the decoder's layers, each of which is gathered while it runs. Outside of them all weights
    are whole, since a step needs them from its beginning to its end.

    The engine clips gradients by their norm, and leaves a step out whose gradients are not finite. A checkpoint is one file, as
    on one device: a run goes on from it with any strategy and any number of devices. A share is cut across the weights, so take
    an optimizer that treats each value by itself: AdamW and SGD do, not Adafactor, nor those of 8 bits.

    Args:
        stage: Of ZeRO.
        offload_optimizer: Keep the optimizer's state and the float32 weights in the memory of the machine, and compute its step
            there (arXiv 2101.06840).
        offload_parameters: In stage 3, keep the shares of the weights there, too.
        pin_memory: Of the machine's memory take pages that stay in place, from which a GPU reads faster.
        reduce_bucket_size: So many gradients are summed up at a time.
        process_group_backend: `nccl`, or what else the processes talk by; None: what suits the device.
        timeout: How long they wait for each other.

    Raises:
        ValueError: DeepSpeed is not installed, the environment has another configuration, or stage 2 is to offload weights.
    """

    def __init__(
        self,
        stage: Literal[2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        pin_memory: bool = False,
        reduce_bucket_size: int = 200_000_000,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("trainer.strategy is ZeroStrategy, which needs DeepSpeed: pip install -r requirements-deepspeed.txt")
        if self.DEEPSPEED_ENV_VAR in os.environ:
            raise ValueError(f"{self.DEEPSPEED_ENV_VAR} is set, whose file would replace what trainer.strategy says: unset it")
        if offload_parameters and stage != 3:
            raise ValueError("trainer.strategy.offload_parameters needs shares of the weights, which stage 3 has: set stage to 3")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            pin_memory=pin_memory,
            reduce_bucket_size=reduce_bucket_size,
            logging_batch_size_per_gpu=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # any optimizer, not DeepSpeed's own alone
        self.config["zero_optimization"]["memory_efficient_linear"] = False  # would exchange torch's own function for all
        self.stage = stage
        self._idle: set[str] = set()
        self._left_out: list[tuple[nn.Parameter, Tensor | None]] = []

    def setup_environment(self) -> None:
        """Begins, where there are GPUs.

        Raises:
            ValueError: There are none.
        """
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ValueError(
                f"trainer.strategy is ZeroStrategy, which needs GPUs, and the device is {type(self.accelerator).__name__}: set "
                "trainer.accelerator to gpu, or take configs/strategy/fsdp.yaml, which runs on any device"
            )
        super().setup_environment()

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:  # Lightning gives one of its own
        self._precision_plugin = ZeroPrecision(plugin.precision) if isinstance(plugin, DeepSpeedPrecision) else plugin

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False  # or the last step of an epoch would wait for batches of the next one

    @property
    def was_step_applied(self) -> bool:
        """Whether the last step changed weights; if not, its gradients were not finite."""
        return bool(self.deepspeed_engine.was_step_applied())

    def connect(self, model: Any) -> None:
        """Takes a model, of the same trainer, which may have had an engine before: its hooks go with it."""
        from deepspeed import DeepSpeedEngine

        if isinstance(self.model, DeepSpeedEngine):
            self.model.destroy()
        super().connect(model)

    def init_deepspeed(self) -> None:
        """Makes the engine, for training or weights in shares; whole ones are evaluated without."""
        module: Any = self.lightning_module
        if module.trainer.training:
            check_whole(module.model)
            module.take_fingerprints()  # of the weights, while they are whole
            super().init_deepspeed()
            self.optimizer.register_step_pre_hook(self._leave_out)
            self.optimizer.register_step_post_hook(self._give_back)
        elif self.stage == 3:
            self.model, _ = self._setup_model_and_optimizer(module, None)
        else:
            self.model_to_device()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None) -> Any:
        if optimizer is not None:
            check_takes_shares(optimizer)
        if self.stage == 3:
            model = self._partition(model)
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def _partition(self, module: Any) -> nn.Module:
        """Gives each process its share of the weights, one after the other, so that no device must have all of them."""
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import set_z3_leaf_module

        assert isinstance(self.config, dict)
        gathered = GatheredLayers(module, module.model)
        for layer in gathered.layers:
            set_z3_leaf_module(layer, True)  # is gathered at once, with all that stands in it
        outside = [num_weights(weight) for weight in gathered.parameters(recurse=False)]
        self.config["zero_optimization"] |= {
            # what is outside of the layers comes first, and fills up what is kept whole
            "stage3_param_persistence_threshold": max(outside, default=0),
            "stage3_model_persistence_threshold": sum(outside),
            "stage3_max_reuse_distance": 0,  # no layer is kept, however soon it runs again
        }
        Init(module=gathered, config_dict_or_path=self.config)
        self.model_to_device()  # the rest, of which the engine knows nothing
        return gathered

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        if self.precision_plugin.precision == "bf16-mixed":
            self.config["bf16"] = {"enabled": False}
            # gradients are summed up in float32
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        super()._format_config()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: the engine sums up the gradients of each batch, to keep its share of them alone."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Runs a backward pass, and tells the engine whether the step ends with it."""
        assert self.lightning_module is not None
        is_last = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)  # Lightning has divided already

    def leave_out(self, parts: set[str]) -> None:
        """Parts that the optimizer is to leave alone in the next step: no process has used them.

        Their gradients are 0, as of all that is in a group; to an optimizer with a memory that is not the same as none.
        """
        self._idle = parts

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the model: whole tensors, in float32 what trains, on the first process; others help."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        module: Any = self.lightning_module
        self.model_to_device()  # where they exchange tensors, and from where Lightning takes it when a fit is over
        state, weights = module.model.state_dict(), dict(module.model.named_parameters(remove_duplicate=False))
        held: dict[str, Any] = {}
        for name in sorted(module.saved_names()):
            weight = weights.get(name, state[name])  # a buffer is in the state alone
            with GatheredParameters([] if weight.requires_grad else [weight]):
                whole = safe_get_full_fp32_param(weight) if weight.requires_grad else weight.detach()
                if self.is_global_zero:
                    held[f"model.{name}"] = whole.to("cpu", copy=True)
        return held

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimizer as torch has it, weight by weight, in the same way."""
        return self._shares.whole_state(self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this process's share of the state of the optimizer."""
        (saved,) = checkpoint["optimizer_states"]
        self._shares.load_state(saved)

    @property
    def optimizer(self) -> Optimizer:
        """That of the run, which the engine's is around."""
        optimizer: Optimizer = self.deepspeed_engine.optimizer.optimizer
        return optimizer

    @property
    def _shares(self) -> Shares:
        kind = SharesOfWeights if self.stage == 3 else Shares
        return kind(self.deepspeed_engine.optimizer, self.root_device)

    def _leave_out(self, optimizer: Optimizer, *args: Any) -> None:
        for group in optimizer.param_groups:  # the engine steps group by group
            if group["name"].removesuffix(NO_DECAY) in self._idle:
                self._left_out += [(share, share.grad) for share in group["params"]]
                for share in group["params"]:
                    share.grad = None

    def _give_back(self, *args: Any) -> None:
        for share, gradient in self._left_out:
            share.grad = gradient  # where it is kept in the machine's memory, the engine writes into it again
        self._left_out.clear()
