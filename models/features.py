"""Features of frozen encoders, so that those of an item do not depend on the batch that it happens to be in.

Shape suffixes: N items of a batch, T their first dimension, L features of an item, D width.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from datamodules.batch import MediaBatch, pad_time
from encoders.base import Encoder

TOGETHER = (16, 8, 4)
"""How many items are tried together where one is small."""

SMALL_SECONDS = 0.05
"""An item that takes more CPU time gains little in company: its matrices are large enough for themselves."""


class KeepsTensors(Protocol):
    """A cache of tensors by key."""

    def put(self, key: str, tensor: Tensor, notes: Mapping[str, str] | None = None) -> None:
        """Keeps a tensor, and what is noted beside it."""


class FrozenFeatures:
    """Runs the frozen stretch of encoders without autograd, and keeps what a batch wants kept.

    On a CPU the features of an item are those that it gives alone, bit for bit, without the padding of its batch. The same
    shapes in the same places are computed by the same operations in the same order; but a matrix product of more rows may be
    blocked in another way, and so rounds differently. Items of one shape are run together only in numbers for which a trial
    with random numbers gave the same bits in each place as alone.

    On an accelerator a batch is run as it is; where a cache is in use, items of one shape together. There the features depend
    on the batch by rounding, with and without a cache.

    Attributes:
        cache: Where features are kept; None: nowhere.
        num_read: Media whose features came from a cache.
        num_encoded: Media whose features were computed.
    """

    def __init__(self) -> None:
        self.cache: KeepsTensors | None = None
        self.num_read = self.num_encoded = 0
        self._sizes: dict[tuple[object, ...], list[int]] = {}

    @torch.no_grad()
    def __call__(self, encoder: Encoder, media: MediaBatch) -> tuple[Tensor, Tensor | None]:
        """The features of the unique items of a batch: features_NLD, and mask_NL (None: all real)."""
        cached = media.get("cached")
        if cached is None and media["media"].device.type != "cpu":
            return encoder.features(media["media"], media["mask"])
        new = self._encode(encoder, _split(media["media"], media["mask"]))
        self.num_encoded += len(new)
        if cached is None:
            return pad_time(new)
        for feature_key, features_LD in zip(cached["keys"], new, strict=True):
            if feature_key is not None and self.cache is not None:
                self.cache.put(feature_key.key, features_LD, {"num_features": str(feature_key.num_features)})
        read = _split(cached["features_CLD"], cached["mask_CL"])
        self.num_read += len(read)
        known, others = dict(zip(cached["items"], read, strict=True)), iter(new)
        return pad_time([known[number] if number in known else next(others) for number in range(len(read) + len(new))])

    def _encode(self, encoder: Encoder, items: Sequence[Tensor]) -> list[Tensor]:
        """features_LD of each item."""
        features: dict[int, Tensor] = {}
        by_shape: dict[torch.Size, list[int]] = {}
        for number, item in enumerate(items):
            by_shape.setdefault(item.shape, []).append(number)
        for numbers in by_shape.values():
            while numbers:
                size = self._size(encoder, items[numbers[0]], len(numbers))
                together, numbers = numbers[:size], numbers[size:]
                found = _run(encoder, torch.stack([items[number] for number in together]))
                features |= dict(zip(together, found, strict=True))
        return [features[number] for number in range(len(items))]

    def _size(self, encoder: Encoder, item: Tensor, num_items: int) -> int:
        """How many of `num_items` items of one shape are run together."""
        if item.device.type != "cpu":
            return num_items
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        way = (encoder, item.shape, item.dtype, torch.get_num_threads(), autocast)
        if num_items >= min(TOGETHER) and way not in self._sizes:
            self._sizes[way] = _try_together(encoder, item)
        return next((size for size in self._sizes.get(way, []) if size <= num_items), 1)


def _try_together(encoder: Encoder, item: Tensor) -> list[int]:
    """In which numbers random items like this one give the same bits together as alone; none where that would be no gain."""
    if not item.is_floating_point():
        return []
    noise = torch.randn(max(TOGETHER), *item.shape, generator=torch.Generator().manual_seed(0)).to(item.dtype)
    alone: list[Tensor] = []
    seconds: list[float] = []
    for example in noise:
        start = time.thread_time()
        alone += _run(encoder, example[None].clone())
        seconds.append(time.thread_time() - start)
        if len(seconds) == 3 and min(seconds) > SMALL_SECONDS:  # the first also warms up
            return []
    return [size for size in TOGETHER if all(map(torch.equal, alone, _run(encoder, noise[:size].clone())))]


def _run(encoder: Encoder, media: Tensor) -> list[Tensor]:
    """features_LD of each of a few items of one shape."""
    features_NLD, mask_NL = encoder.features(media)
    return list(features_NLD) if mask_NL is None else [one[real] for one, real in zip(features_NLD, mask_NL, strict=True)]


def _split(media: Tensor, mask_NT: Tensor | None) -> list[Tensor]:
    """The items without their padding."""
    if mask_NT is None:
        return list(media)
    return [item[:length] for item, length in zip(media, mask_NT.sum(1).tolist(), strict=True)]
