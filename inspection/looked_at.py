"""Rows as training gets them: which ones, and what there is to see of each."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from datamodules.answer_rows import AnswerExample
from datamodules.batch import MODALITIES, Example, Modality, Origin, RowError
from datamodules.collate import collate
from datamodules.dataset import MultiModalDataset
from datamodules.loading import RowDataModule
from datamodules.media import Decoded
from datamodules.row_dataset import RowDataset, RowKey
from inspection.pieces import Stretch, stretches

Split = Literal["train", "val", "test", "predict"]


@dataclass(frozen=True)
class Medium:
    """A medium of a row.

    Args:
        modality: Its kind.
        name: As the row names it, and whether it is corrupted.
        decoded: Decoded and augmented.
        tensor: What its encoder gets; empty of a ready model, whose processor prepares the media of a row together.
        num_tokens: Tokens it takes in the row; 0: it is looked at by cross-attention.
    """

    modality: Modality
    name: str
    decoded: Decoded
    tensor: Tensor
    num_tokens: int


@dataclass(frozen=True)
class LookedAt:
    """A row that can be used.

    Args:
        origin: Where it stands.
        id: Its own id.
        rows: Its stretches, in each row that it takes in a batch.
        media: Those of its sides, each once.
        choices: The closed answers.
        num_dropped_tokens: Tokens that `max_length` cut off.
    """

    origin: Origin
    id: str
    rows: tuple[tuple[Stretch, ...], ...]
    media: tuple[Medium, ...]
    choices: tuple[str, ...]
    num_dropped_tokens: int

    @property
    def num_tokens(self) -> int:
        """All its tokens in the batch."""
        return sum(stretch.num_tokens for stretches in self.rows for stretch in stretches)

    @property
    def num_supervised(self) -> int:
        """Those with a loss."""
        return sum(stretch.num_supervised for stretches in self.rows for stretch in stretches)


def open_split(datamodule: RowDataModule, split: Split) -> RowDataset:
    """The dataset of a split, as a run would open it.

    Raises:
        ValueError: It has no file, or one that cannot be used.
    """
    if split == "train":
        datamodule.setup("fit")
        return datamodule.train_dataset
    if split == "val":
        datamodule.setup("validate")
        return datamodule.val_dataset
    datamodule.setup(split)
    return datamodule.test_dataset if split == "test" else datamodule.predict_dataset


def look_at(dataset: RowDataset, row: int, epoch: int) -> LookedAt:
    """A row, by the code that makes it for training.

    Args:
        dataset: The rows.
        row: Its number.
        epoch: Random augmentation is that of this epoch.

    Raises:
        RowError: It cannot be used.
    """
    key = RowKey(row, epoch)
    example = dataset[key]
    chat = dataset.processor.chat
    batch = collate([example], dataset.processor.pad_id, "left" if dataset.generate else "right")
    rows = [tuple(stretches(batch, at, chat.tokenizer, chat.placeholder_ids)) for at in range(len(batch["tokens_BT"]))]
    return LookedAt(
        origin=example.origin,
        id=example.id,
        rows=tuple(rows),
        media=tuple(_media(dataset, key, example)),
        choices=dataset.sample(row).choices,
        num_dropped_tokens=batch["num_dropped_tokens"],
    )


def _media(dataset: RowDataset, key: RowKey, example: Example) -> Iterator[Medium]:
    source, row = _source_of(dataset, key.row)
    key = key._replace(row=row)
    samples = source.samples(row)
    decoded = [(sample, source.decode(sample, key), "") for sample in samples]
    if source.answer_form.corrupt_media:
        decoded.append((samples[0], source.decode_corrupted(samples[0], key), ", corrupted"))
    named = {
        content: (f"{', '.join(medium.files)}{note}", found)
        for sample, media, note in decoded
        for modality, items in media.items()
        for medium, (content, found) in zip(sample.media(modality), items, strict=True)
    }
    sides = [side for _, side in example.answers] if isinstance(example, AnswerExample) else [example]
    media = [(modality, item) for side in sides for modality in MODALITIES for item in side.media.get(modality, [])]
    for content, (modality, item) in {item.key: (modality, item) for modality, item in media}.items():
        yield Medium(modality, *named[content], item.media, item.num_tokens)


def _source_of(dataset: RowDataset, row: int) -> tuple[MultiModalDataset, int]:
    """The file of a row, and its number there."""
    for source in dataset.sources:
        if row < len(source):
            return source, row
        row -= len(source)
    raise IndexError(f"there is no row {row}")


def choose(
    dataset: RowDataset, num: int, ids: Collection[str], longest: int | None, bad: bool, epoch: int
) -> Iterator[LookedAt | RowError]:
    """The rows to look at; those that cannot be used as their errors.

    Args:
        dataset: The rows.
        num: The first so many of each source in turn, where nothing else is asked for.
        ids: Those with these ids.
        longest: So many with the most tokens, found from their text and the headers of their media.
        bad: All that cannot be used.
        epoch: Whose augmentation is shown.

    Raises:
        ValueError: No row has one of the ids.
    """
    if bad:
        yield from (error for error in (_try(dataset, row, epoch) for row in range(len(dataset))) if isinstance(error, RowError))
        return
    if ids:
        yield from (_try(dataset, row, epoch) for row in _with_ids(dataset, ids))
        return
    rows = (
        _longest(dataset, longest)
        if longest is not None
        else [row for row, _ in zip(dataset.in_turn(), range(num), strict=False)]
    )
    yield from (_try(dataset, row, epoch) for row in rows)


def _try(dataset: RowDataset, row: int, epoch: int) -> LookedAt | RowError:
    try:
        return look_at(dataset, row, epoch)
    except RowError as error:
        return error


def _with_ids(dataset: RowDataset, ids: Collection[str]) -> list[int]:
    found: dict[str, list[int]] = {own: [] for own in ids}
    for row in range(len(dataset)):
        try:
            own = dataset.sample(row).id
        except RowError as error:
            own = str(error.origin.line)
        if own in found:
            found[own].append(row)
    if missing := [own for own, rows in found.items() if not rows]:
        raise ValueError(
            f"no row has the id {' or '.join(map(repr, missing))}: ids are those of the rows' `id`, else their line numbers, "
            f"counted from 1; there are {len(dataset):,} rows"
        )
    return [row for rows in found.values() for row in rows]


def _longest(dataset: RowDataset, num: int) -> list[int]:
    lengths = []
    for row in range(len(dataset)):
        try:
            lengths.append((-dataset.size(row)[0], row))
        except RowError:
            continue  # --bad names it
    return [row for _, row in sorted(lengths)[:num]]
