"""A part of the rows held out, such that nothing in it was seen in training."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import torch


def hold_out(sources: Iterable[Iterable[str]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draws rows to hold out. Rows that share a medium, directly or through other rows, stay on one side.

    Args:
        sources: The media of each row; a row without any stands alone.
        share: Share of the rows to hold out; met as nearly as whole groups of rows allow.
        seed: Seed of the draw.

    Returns:
        Row numbers of the rest and of the rows held out, in order. Both have rows, unless all rows belong together:
        then there is no rest.
    """
    group_of_row = _groups(sources)
    sizes = Counter(group_of_row)
    groups = list(sizes)
    wanted = max(1, round(share * len(group_of_row)))
    num_rows, held_out = 0, set()
    for place in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        size = sizes[groups[place]]
        comes_nearer = size <= 2 * (wanted - num_rows)
        if comes_nearer and num_rows + size < len(group_of_row):
            held_out.add(groups[place])
            num_rows += size
    if not held_out:
        held_out.add(min(groups, key=sizes.__getitem__))
    rest = [row for row, group in enumerate(group_of_row) if group not in held_out]
    return rest, [row for row, group in enumerate(group_of_row) if group in held_out]


def _groups(sources: Iterable[Iterable[str]]) -> list[int]:
    """For each row a row that stands for its group (disjoint sets, with path halving)."""
    parents: list[int] = []
    first_row: dict[bytes, int] = {}

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for row, names in enumerate(sources):
        parents.append(row)
        for name in names:
            # a digest, since a data: URI is as long as its picture
            key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            parents[find(row)] = find(first_row.setdefault(key, row))
    return [find(row) for row in range(len(parents))]
