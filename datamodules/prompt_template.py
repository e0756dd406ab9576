"""The prompt of flat rows, made from their columns."""

import re
from dataclasses import dataclass
from string import Formatter

from datamodules.rows import MEDIA_KEYS, Row, UnusableRowError, keys_of, kind_of

_COLUMN_NAME = re.compile(r"[^\W\d][\w -]*")


@dataclass(frozen=True)
class PromptTemplate:
    """Makes the user's text of a flat row from its columns: "Question: {question}\\nAnswer:".

    `{name}` is a column of the row; `{{` and `}}` are braces; `<image>`, `<video>` and `<audio>` say where the media
    of the row stand (without them: before the text).

    Args:
        text: The template.

    Raises:
        ValueError: A field is not the plain name of a text column.
    """

    text: str

    def __post_init__(self) -> None:
        advice = "write {name} for a column of the row, and {{ or }} for a brace"
        try:
            fields = [field[1:] for field in Formatter().parse(self.text) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"prompt_template {self.text!r} is malformed ({error}): {advice}") from error
        for name, format_spec, conversion in fields:
            if not _COLUMN_NAME.fullmatch(name or "") or format_spec or conversion:
                raise ValueError(f"prompt_template {self.text!r} has a field that is not the plain name of a column: {advice}")
            if name in MEDIA_KEYS:
                raise ValueError(
                    f"prompt_template {self.text!r} has {{{name}}}: write <{name.rstrip('s')}> where the medium stands"
                )

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the template names."""
        return frozenset(name for _, name, _, _ in Formatter().parse(self.text) if name is not None)

    def render(self, row: Row) -> str:
        """The text for one row.

        Raises:
            UnusableRowError: A column is missing, or holds neither text nor a number.
        """
        missing = sorted(self.columns - row.keys())
        if missing:
            raise UnusableRowError(
                f"prompt_template names the column {', '.join(map(repr, missing))}, but the row has {keys_of(row)}"
            )
        return self.text.format_map({name: read_cell(row, name) for name in self.columns})


def read_cell(row: Row, column: str) -> str:
    """The text or number in a column, as text.

    Raises:
        UnusableRowError: It is something else.
    """
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableRowError(f"the column {column!r} must hold a text or a number, got {kind_of(value)}")
    return str(value)
