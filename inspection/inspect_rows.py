"""The command `inspect`: shows a few rows exactly as training gets them."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lightning_modules.commands import Setup


def inspect(
    setup: "Setup",
    split: Literal["train", "val", "test", "predict"] = "train",
    num: int = 5,
    id: int | str | list[int | str] | None = None,  # what the rows call it
    longest: int | None = None,
    bad: bool = False,
    epoch: int = 0,
    html: str | None = None,
) -> None:
    """Shows rows as training gets them, by the very code of training, without a model.

    Of each row: its tokens, with special ones, those that have a loss green, bold and underlined, and each medium as
    `<image ×256>` with the number of its tokens; both sides of a preference row; its closed answers; and its media, decoded and
    augmented, with the shape of what the encoder gets.

    Args:
        split: Whose rows.
        num: The first so many, of each source in turn.
        id: Those with these ids instead: `--id 7`, or `--id [7, 9]`. A row without an id has the number of its line.
        longest: So many with the most tokens instead, found without decoding.
        bad: All that cannot be used instead, with reasons.
        epoch: Random augmentation is that of this epoch.
        html: Write a page with pictures, clips and sounds to this file instead.

    Raises:
        ValueError: An option, or a file of the data, cannot be used.
    """
    from pathlib import Path

    from rich import get_console

    from inspection.clean import write_lines
    from inspection.look_page import make_page
    from inspection.look_text import row_text
    from inspection.looked_at import choose, open_split

    for option, value in (("num", num), ("longest", longest)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} is a number of rows, at least 1, got {value}")
    dataset = open_split(setup.datamodule, split)
    ids = [] if id is None else [str(own) for own in (id if isinstance(id, list) else [id])]
    rows = choose(dataset, num, ids, longest, bad, epoch)
    if html is not None:
        page = make_page(f"Rows of {split}", list(rows))
        write_lines(Path(html), [page.encode("utf-8", "backslashreplace")])
        return
    console, has_shown = get_console(), False
    for row in rows:
        console.print(row_text(row), soft_wrap=True)
        has_shown = True
    if not has_shown:
        console.print(f"no row of {len(dataset):,} is bad" if bad else "no row to look at")
