"""What running tensors without values allocates, and how many operations it takes."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
_FLASH = _ATEN._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward

GRADIENTS, LOGITS = "gradients", "logits"


class Allocations(TorchDispatchMode):
    """Follows the storages that are made while it is on, and counts floating-point operations.

    Integer tensors keep their values, so that a batch can be indexed and looked at: only what has a fake tensor among its
    arguments is faked. Each storage is of a kind: what `kept_for` says when it is made, but `logits` where its last dimension is
    the vocabulary, and `gradients` as soon as it is the whole gradient of a parameter.

    Args:
        mode: The mode of the fake tensors.
        vocabulary: Entries of the vocabulary.

    Attributes:
        flops: Operations so far; a multiplication and an addition are two.
        held: Bytes at this time, by kind.
        at_peak: The same at the time when they were the most.
    """

    def __init__(self, mode: FakeTensorMode, vocabulary: int = 0) -> None:
        super().__init__()
        self.mode = mode
        self.vocabulary = vocabulary
        self.flops = 0
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._kinds: list[tuple[str, float]] = [("other", 1.0)]
        self._storages: dict[int, tuple[str, float]] = {}
        self._total = self._peak = 0.0

    @property
    def peak(self) -> int:
        """The most bytes at one time."""
        return round(self._peak)

    @property
    def kind(self) -> str:
        """What storages that are made now are for."""
        return self._kinds[-1][0]

    @contextmanager
    def kept_for(self, kind: str, share: float = 1.0) -> Iterator[None]:
        """A context in which storages are of this kind, and a device has a share of each."""
        self.enter(kind, share)
        try:
            yield
        finally:
            self.leave()

    def enter(self, kind: str, share: float = 1.0) -> None:
        """As `kept_for`, until `leave`."""
        self._kinds.append((kind, share))

    def leave(self) -> None:
        """Ends what `enter` began."""
        self._kinds.pop()

    def watch_gradients(self, parameters: Iterable[nn.Parameter], share: float = 1.0) -> None:
        """Lets the gradients of these parameters count as such from now on.

        Args:
            parameters: The parameters.
            share: What of a gradient a device has.
        """

        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = parameter.grad.untyped_storage()._cdata
            if key in self._storages and self._storages[key][0] != GRADIENTS:
                self._change(key, -1)
                self._storages[key] = GRADIENTS, parameter.grad.untyped_storage().nbytes() * share
                self._change(key, 1)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(move)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leaves tensors out that were there before."""
        for tensor in tensors:
            self._storages[tensor.untyped_storage()._cdata] = "before", 0.0

    def forget_peak(self) -> None:
        """Looks for the peak from here on."""
        self._peak, self.at_peak = self._total, self.held.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        is_fake = any(isinstance(x, FakeTensor) for x in tensors) or (not tensors and _makes_floats(func, kwargs))
        if not is_fake:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            if func in (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default):
                args = (args[0], _numbers(args[1]), *args[2:])
                flat, spec = tree_flatten((args, kwargs))
            fake = [self.mode.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x for x in flat]
            args, kwargs = tree_unflatten(fake, spec)
            out = func(*args, **kwargs)
            self._count(func, args, kwargs, out)
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor):
                self._follow(x)
        return out

    def _follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        kind, share = self._kinds[-1]
        is_logits = x.ndim > 1 and x.shape[-1] == self.vocabulary and kind != GRADIENTS
        self._storages[key] = LOGITS if is_logits else kind, storage.nbytes() * share
        self._change(key, 1)
        weakref.finalize(storage, self._free, key).atexit = False
        if self._total > self._peak:
            self.forget_peak()

    def _free(self, key: int) -> None:
        self._change(key, -1)
        del self._storages[key]

    def _change(self, key: int, sign: int) -> None:
        kind, size = self._storages[key]
        self.held[kind] += sign * size  # type: ignore[assignment]  # a share of a storage need not be whole
        self._total += sign * size

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if packet is _FLASH:
            self.flops += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet is _FLASH_BACKWARD:
            self.flops += sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)


def _makes_floats(func: Any, kwargs: Any) -> bool:
    """Whether a function that makes a tensor of none makes one with values that are not whole."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    is_range = func.overloadpacket in (_ATEN.arange, _ATEN.scalar_tensor)
    return dtype.is_floating_point and not is_range


def _numbers(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices without masks, whose number of trues must be known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
