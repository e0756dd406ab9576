"""A part of the rows held out, such that nothing in it was seen in training.

Shape suffixes: G groups of rows, F files.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from datamodules.batch import MODALITIES, RowError
from datamodules.dataset import MultiModalDataset
from datamodules.source import source_option
from datamodules.sources import full_name

Rows = Mapping[str, Sequence[int]]
"""Row numbers by the name of their source."""


def hold_out_rows(datasets: Mapping[str, MultiModalDataset], shares: Mapping[str, float], seed: int) -> tuple[Rows, Rows]:
    """Draws validation rows from training rows, such that none of their media are trained on.

    Args:
        datasets: All training rows, by the name of their source.
        shares: Which share of the rows of each source to hold out.
        seed: Seed of the draw.

    Returns:
        The rows of each source to train on, and those to validate on.

    Raises:
        ValueError: No row of a source is left to train on.
    """
    splits = hold_out([_media_of_rows(dataset) for dataset in datasets.values()], [shares[name] for name in datasets], seed)
    for (name, dataset), (rest, _) in zip(datasets.items(), splits, strict=True):
        if not rest:
            option = source_option(name)
            raise ValueError(
                f"{option}.val_fraction = {shares[name]} leaves no training row of the {len(dataset)} in {dataset.file.path}, "
                f"since all of them share media: give the validation rows a file of their own with {option}.val_path"
            )
    by_name = dict(zip(datasets, splits, strict=True))
    return {name: rest for name, (rest, _) in by_name.items()}, {name: out for name, (_, out) in by_name.items()}


def _media_of_rows(dataset: MultiModalDataset) -> Iterator[list[str]]:
    """The names of each row's media; none for a row that cannot be used."""
    for row in range(len(dataset)):
        try:
            samples = dataset.samples(row)
        except RowError:  # its loader names it
            yield []
        else:
            media = [medium for sample in samples for modality in MODALITIES for medium in sample.media(modality)]
            yield [full_name(file, dataset.media_root) for medium in media for file in medium.files]


def hold_out(files: Sequence[Iterable[Iterable[str]]], shares: Sequence[float], seed: int) -> list[tuple[list[int], list[int]]]:
    """Draws rows to hold out. Rows that share a medium, directly or through other rows, of other files too, stay on one side.

    Args:
        files: The media of each row, file by file; a row without any stands alone.
        shares: Share of the rows of each file to hold out; met as nearly as whole groups of rows allow.
        seed: Seed of the draw.

    Returns:
        For each file the row numbers of the rest and of the rows held out, in order. Both have rows, unless too many rows
        belong together: then there may be no rest.
    """
    file_of_row, group_of_row = _groups(files)
    num_rows = [file_of_row.count(file) for file in range(len(files))]
    wanted = [max(1, round(share * rows)) for share, rows in zip(shares, num_rows, strict=True)]
    sizes = _sizes(file_of_row, group_of_row, len(files))
    held_out: set[int] = set()
    held = [0] * len(files)

    def take(group: int) -> None:
        held_out.add(group)
        held[:] = [rows + size for rows, size in zip(held, sizes[group], strict=True)]

    for group in torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist():
        counts = zip(sizes[group], held, wanted, num_rows, strict=True)
        # nearer to what is wanted of each file, and something is left to train on
        if all(size <= 2 * (want - rows) and rows + size < most for size, rows, want, most in counts if size):
            take(group)
    for file, rows in enumerate(held):
        if rows == 0:
            take(min((group for group, size in enumerate(sizes) if size[file]), key=lambda group: sum(sizes[group])))
    splits: list[tuple[list[int], list[int]]] = [([], []) for _ in files]
    for file, group in zip(file_of_row, group_of_row, strict=True):
        rest, out = splits[file]
        (out if group in held_out else rest).append(len(rest) + len(out))
    return splits


def _sizes(file_of_row: Sequence[int], group_of_row: Sequence[int], num_files: int) -> list[list[int]]:
    """For each group its rows in each file."""
    sizes_GF = torch.zeros(max(group_of_row) + 1, num_files, dtype=torch.long)
    index = torch.tensor(group_of_row), torch.tensor(file_of_row)
    return sizes_GF.index_put_(index, torch.ones_like(index[0]), accumulate=True).tolist()


def _groups(files: Sequence[Iterable[Iterable[str]]]) -> tuple[list[int], list[int]]:
    """For each row of all files its file, and the number of its group (disjoint sets, with path halving)."""
    file_of_row: list[int] = []
    parents: list[int] = []
    first_row: dict[bytes, int] = {}

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for file, rows in enumerate(files):
        for names in rows:
            row = len(parents)
            file_of_row.append(file)
            parents.append(row)
            for name in names:
                # a digest, since a data: URI is as long as its picture
                key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                parents[find(row)] = find(first_row.setdefault(key, row))
    numbers: dict[int, int] = {}
    return file_of_row, [numbers.setdefault(find(row), len(numbers)) for row in range(len(parents))]
