"""The rows that pass, as files of their own, and the others with their reasons."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from datamodules.source import Split
from inspection.findings import Finding
from inspection.records import Part
from inspection.report import Reasons


def clean_path(out: Path, part: Part) -> Path:
    """Where the rows of a part go: training rows to `out` itself, others beside it, `out.val.jsonl`; sources by their names."""
    names = [name for name in (part.source, "" if part.split == "train" else part.split) if name]
    return out.with_suffix("".join(f".{name}" for name in names) + out.suffix)


def rejected_path(out: Path) -> Path:
    """Where the rejected rows of all parts are named."""
    return out.with_suffix(f".rejected{out.suffix}")


def check_clean(parts: Sequence[Part], out: Path) -> list[Path]:
    """Where the rows of each part go.

    Raises:
        ValueError: A file would take the place of one that is read.
    """
    paths = [clean_path(out, part) for part in parts]
    read = {part.file.path.resolve() for part in parts}
    for path in (*paths, rejected_path(out)):
        if path.resolve() in read:
            raise ValueError(f"--clean {out} would write {path}, which is one of the files that are read: give another name")
    return paths


def write_clean(parts: Sequence[Part], rejected: Reasons, out: Path) -> list[Path]:
    """Writes the rows that pass, the very bytes of their lines, and a JSONL of the others; each file whole or not at all.

    Args:
        parts: The files.
        rejected: The rows that do not pass.
        out: Where the training rows go; it says where all others do.

    Returns:
        The file of each part.

    Raises:
        ValueError: A file would take the place of one that was read, or cannot be written.
    """
    paths = check_clean(parts, out)
    for number, (part, path) in enumerate(zip(parts, paths, strict=True)):
        rows = [row for row in range(len(part.dataset)) if (number, row) not in rejected]
        write_lines(path, (part.file.line(part.dataset.rows[row]) for row in rows))
    write_lines(rejected_path(out), (_to_json(parts[key[0]].split, rejected[key]) for key in sorted(rejected)))
    return paths


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Writes a file whole or not at all: under a temporary name first, then renamed.

    Raises:
        ValueError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): give another path, or make room there") from error


def _to_json(split: Split, findings: Sequence[Finding]) -> bytes:
    """A rejected row, with all that is wrong with it."""
    origin = findings[0].origin
    source = {"source": origin.source} if origin.source else {}
    reasons = [{"kind": finding.kind, "reason": finding.reason} for finding in findings]
    row = {"split": split, **source, "file": origin.file, "line": origin.line, "reasons": reasons}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
