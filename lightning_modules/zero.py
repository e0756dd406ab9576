"""DeepSpeed's ZeRO (arXiv 1910.02054), with steps and checkpoints that are those of one device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_modules.optim import NO_DECAY


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


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO-2: each device has the whole model, and a share of the gradients and of the optimizer's state.

    The engine clips gradients by their norm, and leaves a step out whose gradients are not finite. A checkpoint is one file, as
    on one device: a run goes on from it with any strategy and any number of devices. A share is cut across the weights, so take
    an optimizer that treats each value by itself: AdamW and SGD do, not Adafactor, nor those of 8 bits.

    Args:
        stage: Of ZeRO.
        offload_optimizer: Keep the optimizer's state and the float32 weights in the memory of the machine, and compute its step
            there (arXiv 2101.06840).
        pin_memory: Of the machine's memory take pages that stay in place, from which a GPU reads faster.
        reduce_bucket_size: So many gradients are summed up at a time.
        process_group_backend: `nccl`, or what else the processes talk by; None: what suits the device.
        timeout: How long they wait for each other.

    Raises:
        ValueError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        pin_memory: bool = False,
        reduce_bucket_size: int = 200_000_000,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("trainer.strategy is ZeroStrategy, which needs DeepSpeed: pip install -r requirements-deepspeed.txt")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            pin_memory=pin_memory,
            reduce_bucket_size=reduce_bucket_size,
            logging_batch_size_per_gpu=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # any optimizer, not DeepSpeed's own alone
        self._idle: set[str] = set()
        self._left_out: list[tuple[nn.Parameter, Tensor | None]] = []

    def setup_environment(self) -> None:
        """Begins, where the stage is one that is supported.

        Raises:
            ValueError: It is not.
        """
        assert isinstance(self.config, dict)
        if (stage := self.config.get("zero_optimization", {}).get("stage", 0)) != 2:
            raise ValueError(
                f"trainer.strategy: stage is {stage}, and only 2 is supported. In stage 3 DeepSpeed wants each device to run the "
                "same modules in each step, and rows have media of other kinds. Take configs/strategy/fsdp.yaml, which shards "
                "the weights too"
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
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def was_step_applied(self) -> bool:
        """Whether the last step changed weights; if not, its gradients were not finite."""
        return bool(self.deepspeed_engine.was_step_applied())

    def init_deepspeed(self) -> None:
        """Makes the engine, for training; the weights are whole, so nothing else needs one."""
        assert self.lightning_module is not None
        if not self.lightning_module.trainer.training:
            self.model_to_device()
            return
        super().init_deepspeed()
        optimizer = self._engine_optimizer.optimizer
        optimizer.register_step_pre_hook(self._leave_out)
        optimizer.register_step_post_hook(self._give_back)

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
        from deepspeed.utils import safe_get_full_fp32_param

        module: Any = self.lightning_module
        state, trained = module.model.state_dict(), _trained(module.model)
        held: dict[str, Any] = {}
        for name in sorted(module.saved_names()):
            whole = safe_get_full_fp32_param(trained[name]) if name in trained else state[name]
            if self.is_global_zero:
                held[f"model.{name}"] = whole.detach().cpu()
        return held

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimizer as torch has it, weight by weight, in the same way."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for weights, share, group in self._shares():
            groups.append({**group, "params": list(range(number, number + len(weights)))})
            values = self._engine_optimizer.optimizer.state.get(share, {})
            for weight in weights:
                own = {name: _gathered(value, share, weight) for name, value in values.items()}
                if own and self.is_global_zero:
                    state[number] = own
                number += 1
        return {"state": state, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a file, as on one device."""
        DDPStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any strategy that is a file.

        Raises:
            ValueError: It is a folder, damaged, or no checkpoint of ours.
        """
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the weights of a checkpoint, also into the shares of what trains."""
        from deepspeed.utils import safe_set_full_fp32_param

        module: Any = self.lightning_module
        state = checkpoint["state_dict"]
        module.load_state_dict(state, strict=strict)
        if module.trainer.training:
            for name, weight in _trained(module.model).items():
                safe_set_full_fp32_param(weight, state[name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this process's share of the state of the optimizer."""
        (saved,) = checkpoint["optimizer_states"]
        state: dict[int, dict[str, Any]] = {}
        for number, ((weights, share, _), group) in enumerate(zip(self._shares(), saved["param_groups"], strict=True)):
            of_weights = [saved["state"].get(of_weight, {}) for of_weight in group["params"]]
            for name in {name: None for values in of_weights for name in values}:
                values = [values.get(name) for values in of_weights]
                state.setdefault(number, {})[name] = _share(name, values, share, weights)
        groups = [{**group, "params": [number]} for number, group in enumerate(saved["param_groups"])]
        self._engine_optimizer.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @property
    def _engine_optimizer(self) -> Any:
        return self.deepspeed_engine.optimizer

    def _shares(self) -> list[tuple[list[nn.Parameter], Tensor, dict[str, Any]]]:
        """By group the weights, the share of them that this process trains, in one row, and the options."""
        zero = self._engine_optimizer
        groups = zero.optimizer.param_groups
        return [(weights, group["params"][0], group) for weights, group in zip(zero.bit16_groups, groups, strict=True)]

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


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}


def _gathered(value: Any, share: Tensor, weight: nn.Parameter) -> Any:
    """The whole of a state, of which each process has its share; the processes must meet here."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value  # such as the number of steps
    if value.shape != share.shape:
        raise ValueError(
            "trainer.strategy: ZeroStrategy cuts weights into shares without regard to their shape, and the optimizer keeps what "
            "is not one number a value: take one that treats each value by itself, such as AdamW, or configs/strategy/ddp.yaml"
        )
    whole = value.new_zeros(weight.numel(), device=weight.device)
    if (place := weight._hp_mapping) is not None:  # type: ignore[attr-defined]  # set by the engine: which part of it is here
        mine, here = place.lp_fragment_address, place.hp_fragment_address
        whole[mine.start : mine.start + mine.numel] = value[here.start : here.start + here.numel].to(weight.device)
    dist.all_reduce(whole)
    return whole.view(weight.shape).cpu()


def _share(name: str, values: Sequence[Any], share: Tensor, weights: Sequence[nn.Parameter]) -> Any:
    """The share of a state that is given by weight; None: a weight has none yet."""
    first = next(value for value in values if value is not None)
    if name == "step" or not isinstance(first, Tensor):
        return first
    own = torch.zeros_like(share, dtype=first.dtype)
    for value, weight in zip(values, weights, strict=True):
        if value is not None and (place := weight._hp_mapping) is not None:  # type: ignore[attr-defined]  # set by the engine
            mine, here = place.lp_fragment_address, place.hp_fragment_address
            own[here.start : here.start + here.numel] = value.flatten()[mine.start : mine.start + mine.numel]
    return own
