"""Log-probabilities of a reference in a folder, which any run reads that compares the same answers with the same reference.

Shape suffixes: L tokens of an answer.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

HEADER = "reference.json"
FLUSH_AT = 4096
"""Answers that are kept in memory before they are written."""


class LogpStore:
    """The log-probabilities of answers by key; a file holds many, and is written whole or not at all.

    Several processes and runs may write at a time: each writes files of its own, and reads those that were there when it began.

    Args:
        folder: Made where it is not there.
        made_of: What the log-probabilities depend on besides the answers, by names that a user knows.

    Raises:
        ValueError: The folder cannot be used, or what it holds is of another reference.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, str]) -> None:
        self.folder = folder
        self._new: dict[str, Tensor] = {}
        self._places: dict[str, Any] = {}  # the open file that holds a key
        header = folder / HEADER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not header.exists():
                _write(header, json.dumps(dict(made_of), indent=2).encode())
            found = json.loads(header.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"the folder {folder} of the reference's log-probabilities cannot be used: {error}") from error
        names = dict.fromkeys([*found, *made_of])
        if changed := [name for name in names if found.get(name) != made_of.get(name)]:
            raise ValueError(
                f"the log-probabilities in {folder} are stale: they were computed with another value of {_listed(changed)}. Set "
                "that back, or give model.reference another folder, in which they are computed anew"
            )
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path)

    def get(self, key: str) -> Tensor | None:
        """The log-probabilities of the tokens of an answer, logps_L; None: they are not there."""
        if key in self._new:
            return self._new[key]
        return self._places[key].get_tensor(key) if key in self._places else None

    def put(self, key: str, logps_L: Tensor) -> None:
        """Keeps the log-probabilities of an answer; `flush` writes them."""
        self._new[key] = logps_L.detach().float().cpu().clone()
        if len(self._new) >= FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Writes what is new.

        Raises:
            ValueError: It cannot be written.
        """
        from safetensors.torch import save

        if not self._new:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            _write(path, save(self._new))
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}): make room, or give another folder") from error
        self._new = {}
        self._open(path)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, "pt")
            self._places |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and its log-probabilities are computed again") from error


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
