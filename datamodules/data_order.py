"""What the batches of an epoch are a function of: a place among them is one only where all of it is as it was."""

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datamodules.dataset import MultiModalDataset
    from datamodules.packing import RowSizes
    from datamodules.sampler import GlobalBatches

log = logging.getLogger(__name__)

_HASH, _ROWS = "hash of", "rows that were looked at"
NUM_LOOKED_AT, _MENDED, _DIGITS = 32, 0.75, 4
"""Rows of a source by which a file with rows that were mended is told from other data, the largest share of
such rows, and digits of the hash of each."""
_PACKING, _WAY_OF_PACKING = "way of packing", 2
"""Counts up when the same options give other packs, or the same in another order. The first checkpoints have none."""
SIZES = f"{_HASH} the rows' sizes"
"""Under this name the order has `hash_of_sizes`."""


def hash_of_sizes(sizes: "RowSizes") -> str:
    """Tells the sizes of all rows from others."""
    return _hash(*(array.astype(np.int64).tobytes() for array in sizes if array is not None))


def data_order(
    sources: "Sequence[MultiModalDataset]", batches: "GlobalBatches", sizes: "Callable[[], RowSizes]"
) -> dict[str, Any]:
    """The order of the rows, and the rows, in a few words: numbers, options, and hashes of what is long.

    Args:
        sources: Of the rows.
        batches: Of them.
        sizes: Gives the sizes of all rows; asked where they settle which rows come together.
    """
    order: dict[str, Any] = {"sources": " + ".join(source.name for source in sources)} if len(sources) > 1 else {}
    for source, portion in zip(sources, batches.sampler.portions, strict=True):
        of_source = f" of {source.name}" if source.name else ""
        order[f"training rows{of_source}"] = portion.num_rows
        order[f"weight{of_source}"] = portion.weight
        rows = np.asarray(source.rows, np.int64).tobytes()
        order[f"{_HASH} prompt_template and split{of_source}"] = _hash(source.prompt_template, rows)
        order[f"{_ROWS}{of_source}"] = f"{source.file.sha256[:16]} {_looked_at(source)}"
    order["batch_size x processes x accumulate_grad_batches"] = batches.step_size
    if batches.batching.kind != "rows":
        order["batching"], order[_PACKING] = str(batches.batching), _WAY_OF_PACKING
        order[SIZES] = hash_of_sizes(sizes())
    return {**order, "shuffle": batches.sampler.shuffle, "seed": batches.sampler.seed}


def check_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares what `data_order` gave for a checkpoint and gives for the run that goes on from it.

    A row may be mended between the two, as one that stopped the run: that is said. Where most rows are others, it is other data.

    Raises:
        ValueError: They differ.
    """
    if "batching" in saved and "batching" in now and saved.get(_PACKING) != now[_PACKING]:
        raise ValueError(
            "the checkpoint was written by a version of OmniLit that puts rows together in another way, so that its place in the "
            "training data is none in the batches of this one: go on with that version, or start a new run from its weights with "
            "--model.init_from, in another run folder and without --ckpt_path"
        )
    unknown = [name for name in now if name.startswith((_HASH, _ROWS)) and name not in saved]
    names = [name for name in dict.fromkeys([*saved, *now]) if name not in (*unknown, _PACKING)]
    for name in [name for name in names if name.startswith(_ROWS) and name in saved and name in now]:
        (file, _, rows), (own_file, _, own_rows) = (str(order[name]).partition(" ") for order in (saved, now))
        number = len(rows) // _DIGITS
        if file == own_file or not (rows or own_rows):  # nothing is taken from a source without rows, whatever its file
            names.remove(name)
            continue
        others = sum(rows[place : place + _DIGITS] != own_rows[place : place + _DIGITS] for place in range(0, len(rows), _DIGITS))
        if len(rows) == len(own_rows) and others <= _MENDED * number:
            names.remove(name)
            log.warning(
                "the file of training data is another than when the checkpoint was written: %d of %d %s have changed. The run "
                "goes on where it was, in the rows as they are now",
                *(others, number, name),
            )
    changed = [f"{name} {saved.get(name)} (now {now.get(name)})" for name in names if saved.get(name) != now.get(name)]
    if changed:
        are_sizes_other = SIZES in now and saved.get(SIZES) not in (None, now[SIZES])
        kept = (
            ". (The sizes that a run begins with are kept in omnilit/sizes of the user's cache, $XDG_CACHE_HOME or ~/.cache: "
            f"a file whose name ends in {saved.get(SIZES)}.npy. Where data and options are as they were, bring that file back)"
        )
        raise ValueError(
            f"the checkpoint's place in the training data belongs to {', '.join(changed)}: a run is resumed with the data "
            "and options that it had. Set them back, or start a new run from its weights with model.init_from"
            f"{kept if are_sizes_other else ''}"
        )
    if unknown:
        log.warning("the checkpoint is from before a %s was kept: it is not checked", ", ".join(unknown))


def _looked_at(source: "MultiModalDataset") -> str:
    places = np.linspace(0, len(source.rows) - 1, min(NUM_LOOKED_AT, len(source.rows))).astype(int)
    return "".join(_hash(source.file.line(int(source.rows[place])))[:_DIGITS] for place in places)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
