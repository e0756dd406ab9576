"""What DeepSpeed's engine keeps of gradients and of the optimizer's state (ZeRO, arXiv 1910.02054), and when.

As DeepSpeed 0.19 has it, with the options of `ZeroStrategy`: in runtime/zero/stage_1_and_2.py and stage3.py.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from planning.allocations import GRADIENTS, Allocations
from planning.gradients import STATES, UPDATE, Gradients, apart

MASTERS, BUCKETS, GATHERED = "float32 shares", "DeepSpeed's buckets", "gathered layers"

PREFETCHED, LIVE = 50_000_000, 1_000_000_000
"""DeepSpeed's own `stage3_prefetch_bucket_size` and `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Zero:
    """Options of `ZeroStrategy`.

    Args:
        stage: 2 cuts gradients and the optimizer's state into shares, 3 the weights, too.
        offload_optimizer: The optimizer's state and the float32 shares are in the memory of the machine.
        offload_parameters: So are the shares of the weights.
        reduce_bucket_size: So many gradients are summed up at a time.
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket_size: int = 200_000_000


def gathered(layers: Sequence[Sequence[tuple[int, int]]], kept: int = 0) -> int:
    """Bytes of the decoder's layers that are whole at a time in stage 3.

    A layer is gathered in a row, and copied from there weight by weight. While it runs, the engine gathers the next weights, of
    `PREFETCHED` elements or a weight more. Where layers are smaller, it is further ahead with each of them, up to `LIVE` elements
    or all layers, which then stay until they run backward.

    Args:
        layers: Elements and bytes of the weights of each.
        kept: Bytes that autograd keeps of layers that have run: a linear layer of torch saves its weight turned round, in memory
            that the engine then cannot free. Blocks that are computed again do not, nor does LoRA as one operation.
    """
    sizes = [(sum(number for number, _ in layer), sum(size for _, size in layer)) for layer in layers]
    elements, all_bytes = (sum(column) for column in zip(*sizes, strict=True))
    largest, size = max(sizes)
    if largest < PREFETCHED:
        return max(kept, all_bytes * min(LIVE, elements) // elements)
    weight = max(number for layer in layers for number, _ in layer)
    ahead = size * min(PREFETCHED + weight, elements - largest) // largest
    return size + max(size, kept) + ahead


class Shares:
    """How weights are cut: of each group one row, in so many parts (stage 2), or each weight for itself (stage 3).

    Args:
        groups: The weights that train, group by group.
        number: Number of parts.
        stage: Of ZeRO.

    Attributes:
        sizes: Elements of a part, group by group.
        places: By weight who has how much of it.
        rank: Of stage 2 the part that has to do with the most weights.
        whole: Elements of these.
        longest: The most elements of a weight that this part has.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], number: int, stage: int) -> None:
        self.places: dict[nn.Parameter, list[tuple[int, int]]] = {}
        if stage == 3:
            self.sizes = [sum(-(-weight.numel() // number) for weight in group) for group in groups]
            for weight in (weight for group in groups for weight in group):
                self.places[weight] = [(rank, -(-weight.numel() // number)) for rank in range(number)]
        else:
            self.sizes = [2 * -(-sum(weight.numel() for weight in group) // (2 * number)) for group in groups]
            for group, size in zip(groups, self.sizes, strict=True):
                start = 0
                for weight in group:
                    end = start + weight.numel()
                    ranks = range(start // size, (end - 1) // size + 1)
                    self.places[weight] = [(rank, min(end, (rank + 1) * size) - max(start, rank * size)) for rank in ranks]
                    start = end
        wholes = [0] * number
        for weight, ranks_of in self.places.items():
            for rank, _ in ranks_of:
                wholes[rank] += weight.numel()
        self.whole = sum(self.sizes) if stage == 3 else max(wholes)
        self.rank = wholes.index(max(wholes))
        self.longest = max(self.own(weight) for weight in self.places)

    def own(self, weight: nn.Parameter) -> int:
        """Elements of a weight that the part `rank` has."""
        return dict(self.places[weight]).get(self.rank, 0)

    def copied(self, weights: Iterable[nn.Parameter], bucket: int) -> int:
        """Elements that are copied at a time to sum up gradients: those of several ranks are put in a row of a bucket or more."""
        ranks = groupby((place for weight in weights for place in self.places[weight]), lambda place: place[0])
        most = row = pieces = 0
        for size in (sum(size for _, size in run) for _, run in ranks):
            row, pieces = row + size, pieces + 1
            most = max(most, row if pieces > 1 else 0)
            if row > bucket:
                row = pieces = 0
        return most


class ZeroGradients(Gradients):
    """Those of a device under ZeRO.

    A gradient is copied into a bucket as soon as it is known. When that is full it is summed up over the devices, and each copies
    what it has a share of; of stage 2 that is all of a weight of which it has a part. One that is larger than a bucket stays
    where it is until then. Stage 2 has two buckets, from the first gradient of a backward pass to its end, stage 3 has one at
    all times. The optimizer takes one group after the other, whose gradients are put in one row for it.

    Args:
        zero: Options of the strategy.
        number: Number of devices.
    """

    def __init__(self, *args: Any, zero: Zero, number: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zero = zero
        self._layers = self.outline.module.model.language_model.decoder_layers
        self._turned: dict[int, int] = {}
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in self.optimizer.param_groups]
        self.shares = Shares(self.groups, number, zero.stage)
        self.host = Allocations(self.allocations.mode)
        self._kept: list[Tensor] = []
        self._buckets: list[Tensor] = []
        self._own: list[Tensor] = []
        self._filled: list[nn.Parameter] = []
        self._hooks: list[Any] = []

    @property
    def on_host(self) -> Counter[str]:
        return apart(self.host.at_peak, self.host.held[STATES])

    @property
    def beside(self) -> Counter[str]:
        sizes = [[(weight.numel(), self.outline.num_bytes(weight)) for weight in layer.parameters()] for layer in self._layers]
        return Counter({GATHERED: gathered(sizes, sum(self._turned.values())) - gathered(sizes)} if self.zero.stage == 3 else {})

    def forward(self) -> AbstractContextManager[Any]:
        if self.zero.stage == 2:
            return nullcontext()
        sizes = {x.untyped_storage()._cdata: self.outline.num_bytes(x) for layer in self._layers for x in layer.parameters()}

        def pack(x: Tensor) -> Tensor:
            if not isinstance(x, nn.Parameter) and (key := x.untyped_storage()._cdata) in sizes:
                self._turned[key] = sizes[key]
            return x

        return saved_tensors_hooks(pack, lambda x: x)

    def update(self) -> None:
        is_offloaded, shares = self.zero.offload_optimizer, self.shares
        memory = self.host if is_offloaded else self.allocations
        with memory:
            with memory.kept_for(MASTERS):
                for group, size in zip(self.optimizer.param_groups, shares.sizes, strict=True):
                    group["params"] = [nn.Parameter(self._empty(size))]
            if is_offloaded:
                for group in self.optimizer.param_groups:
                    [share] = group["params"]
                    with memory.kept_for(GRADIENTS):
                        share.grad = self._empty(share.numel())
                    with memory.kept_for(BUCKETS):  # what goes to the device, or of stage 3 comes from it
                        self._kept.append(self._empty(share.numel()))
                if self.zero.stage == 2:
                    with memory.kept_for(BUCKETS):
                        self._kept += [self._empty(size) for size in (self._largest, shares.whole if self.accumulates else 0)]
            for _ in range(2):  # the second time all of the state is there
                self._step_by_group(memory)
        with self.allocations:
            with self.allocations.kept_for(BUCKETS):
                if self.zero.stage == 3:
                    self._buckets = [self._empty(self.zero.reduce_bucket_size)]
                elif is_offloaded:
                    self._kept.append(self._empty(self._largest))
            if not is_offloaded and (self.accumulates or self.zero.stage == 3):
                with self.allocations.kept_for(GRADIENTS):
                    self._kept.append(self._empty(shares.whole))

    def begin(self) -> None:
        self._hooks = [weight.register_post_accumulate_grad_hook(self._arrived) for weight in self.weights]

    def end(self) -> None:
        self._reduce()
        for hook in self._hooks:
            hook.remove()

    @property
    def _largest(self) -> int:
        return max(weight.numel() for weight in self.weights)

    def _empty(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.no_grad():
            return self.weights[0].new_empty(size, dtype=dtype)

    def _step_by_group(self, memory: Allocations) -> None:
        is_offloaded, groups = self.zero.offload_optimizer, self.optimizer.param_groups
        with memory.kept_for(GRADIENTS):
            gradients = self._empty(0 if is_offloaded else self.shares.whole)
        with memory.kept_for(UPDATE):
            self._empty(0 if is_offloaded else self.shares.longest, torch.float64)  # for its norm
        for group in groups:
            [share] = group["params"]
            if not is_offloaded:
                with memory.kept_for(UPDATE):
                    share.grad = self._empty(share.numel())
            self.optimizer.param_groups = [group]
            self.step(memory)
            if not is_offloaded:
                share.grad = None
        self.optimizer.param_groups = groups
        del gradients

    def _arrived(self, weight: nn.Parameter) -> None:
        size = self.zero.reduce_bucket_size
        if not self._buckets:
            with self.allocations.kept_for(BUCKETS):
                self._buckets = [self._empty(size) for _ in range(2)]
        if sum(filled.numel() for filled in self._filled) + weight.numel() > size:
            self._reduce()
        self._filled.append(weight)
        if weight.numel() <= size:
            weight.grad = None

    def _reduce(self) -> None:
        weights, self._filled = self._filled, []
        with self.allocations.kept_for(BUCKETS):
            self._empty(self.shares.copied(weights, self.zero.reduce_bucket_size))
            if self.zero.offload_optimizer and weights:
                self._empty(max(map(self.shares.own, weights)), torch.float64)  # for its norm
        if self.zero.stage == 2 and not self.zero.offload_optimizer and not self._own and any(map(self.shares.own, weights)):
            with self.allocations.kept_for(GRADIENTS):
                self._own = [self._empty(self.shares.whole)]
        for weight in weights:
            weight.grad = None
