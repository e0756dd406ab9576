"""What the tests of the demo's data share."""

import json
from pathlib import Path
from typing import Any

from datamodules.batch import Modality, Origin
from datamodules.conversation import parse_row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with an id of its own."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return rows


def check_row(row: dict[str, Any], modality: Modality, media_root: Path, choices: list[str]) -> str:
    """Checks that the row can be trained on and asks about one medium, which is there; gives the right answer."""
    sample = parse_row(row, Origin("rows.jsonl", 1))
    (medium,) = sample.media(modality)
    assert (media_root / medium.source).is_file()
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert list(sample.choices) == choices
    answer = sample.messages[-1].text
    assert answer in choices
    return answer
