"""Jobs in two processes of this machine, which talk to each other as those of a cluster do."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_modules.flat_shards import FlatShardedStrategy
from lightning_modules.strategies import ShardedStrategy

if TYPE_CHECKING:
    from lightning_modules.zero import ZeroStrategy

MakeStrategy = Callable[[timedelta], Strategy]


def ddp(timeout: timedelta) -> Strategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timeout)


def zero(timeout: timedelta, reduce_bucket_size: int = 1000, **options: Any) -> "ZeroStrategy":
    """The product's strategy, which takes GPUs alone, on the CPU: what it does differently concerns the device."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from lightning_modules.zero import ZeroStrategy

    class OnCPU(ZeroStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)  # the engine wants a number

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)  # without the check for GPUs

        def setup_distributed(self) -> None:
            deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # else it compiles for a minute
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    return OnCPU(process_group_backend="gloo", timeout=timeout, reduce_bucket_size=reduce_bucket_size, **options)


zero3 = partial(zero, stage=3)


def sharded(timeout: timedelta, tensor_parallel_size: int = 1, folder: bool = False, offload: bool = False) -> Strategy:
    return ShardedStrategy(
        tensor_parallel_size=tensor_parallel_size,
        save_distributed_checkpoint=folder,
        offload=offload,
        process_group_backend="gloo",
        timeout=timeout,
    )


def flat(timeout: timedelta, **options: Any) -> Strategy:
    return FlatShardedStrategy(process_group_backend="gloo", timeout=timeout, **options)


@contextmanager
def gathered(module: LightningModule) -> Iterator[None]:
    """Within it all weights are whole, of which ZeRO-3 or torch's first FSDP has given each process a share."""
    if isinstance(module.trainer.strategy, FlatShardedStrategy):
        with FullyShardedDataParallel.summon_full_params(module.trainer.strategy.model):
            yield
        return
    if not any("ds_tensor" in vars(weight) for weight in module.parameters()):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(module.parameters())):
        yield


def in_two_processes(
    job: Callable[..., None],
    *arguments: Any,
    timeout_seconds: float = 30.0,
    strategy: MakeStrategy = ddp,
    number: int = 2,
    **options: Any,
) -> list[int | None]:
    """Runs a job in each of two (or another number of) forked processes; returns their exit codes. Processes that wait for each
    other in vain give up after `timeout_seconds`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier test: Lightning would seed with it again
        # as torchrun tells it
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in {**names, **address}.items()})
        job(*arguments, {"strategy": strategy(timedelta(seconds=timeout_seconds)), "devices": number}, **options)

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
