"""What all readers of a row share: its type, its media keys, and the error for what is wrong with it."""

from typing import Any

from datamodules.modality import MODALITIES

Row = dict[str, Any]

MEDIA_KEYS = tuple(key for modality in MODALITIES for key in (modality, f"{modality}s"))
"""Keys under which a row lists its media."""


class UnusableRowError(ValueError):
    """Why a row cannot be used; `parse_row` adds file and line."""


def kind_of(value: Any) -> str:
    """The type of a JSON value, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def keys_of(row: Row) -> str:
    """The keys of a row, for errors."""
    return f"the keys {', '.join(map(repr, row))}" if row else "no keys"
