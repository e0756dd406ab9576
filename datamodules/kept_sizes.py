"""The sizes of rows in the user's cache folder: whatever becomes of these files, they are only looked at again."""

import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.abandoned import sweep_abandoned

if TYPE_CHECKING:
    from datamodules.dataset import MultiModalDataset

log = logging.getLogger(__name__)


def kept_sizes(place: Path, num_rows: int) -> np.ndarray | None:
    """The sizes that are kept in a place, sizes_4R.

    Args:
        place: Of `place_of` or `place_of_run`.
        num_rows: So many there must be.

    Returns:
        None: There are none, or they cannot be read, as of a file that was cut off.
    """
    try:
        sizes_4R = np.load(place, allow_pickle=False)
    except (OSError, EOFError, ValueError):  # what numpy says of a file that is missing, empty, or something else
        return None
    return sizes_4R if sizes_4R.shape == (4, num_rows) and sizes_4R.dtype == np.int32 else None


def keep(place: Path, sizes_4R: np.ndarray) -> None:
    """Keeps sizes for later runs; where that cannot be done, it is said once, and the run goes on."""
    temporary = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep_abandoned(place.parent, "*.npy.*.tmp")
        try:
            with temporary.open("xb") as file:
                np.save(file, sizes_4R)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _warn(place.parent, error.strerror or str(error))


@cache
def _warn(folder: Path, reason: str) -> None:
    log.warning(
        "%s cannot be written (%s): the lengths of rows are not kept there, and will be planned again in the next run. Make room "
        "there, or set the environment variable XDG_CACHE_HOME to a folder that can be written",
        folder,
        reason,
    )


def place_of(source: "MultiModalDataset") -> Path:
    """Where the sizes of a source are kept: under a hash of all that they depend on but the media themselves."""
    status = source.file.path.stat()
    told = (
        "tokens, encoded, num_rows, longest",
        str(source.file.path.resolve()),
        status.st_size,
        status.st_mtime_ns,
        str(source.media_root.path),
        source.prompt_template,
        source.limits,
        source.answer_form,
        source.judge is not None and source.judge.builds,
        source.processor.fingerprint(),
        hashlib.sha256(np.asarray(source.rows, np.int64).tobytes()).hexdigest(),
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "omnilit" / "sizes" / f"{hashlib.sha256(repr(told).encode()).hexdigest()}.npy"


def place_of_run(sources: "Sequence[MultiModalDataset]", own: str) -> Path:
    """Where the sizes that a run began with are kept: later looks at the same rows may find others, and never change these.

    Args:
        sources: Of the rows.
        own: The `hash_of_sizes`.
    """
    places = [place_of(source) for source in sources]
    name = hashlib.sha256(repr([place.stem for place in places]).encode()).hexdigest()
    return places[0].with_name(f"{name}.{own}.npy")
