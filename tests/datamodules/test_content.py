"""A medium in a place that nobody reads is refused, so that no row is trained on without its pictures."""

from typing import Any

import pytest

from datamodules.batch import Origin, RowError
from datamodules.conversation import parse_row

ORIGIN = Origin("rows.jsonl", 7)
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

UNREAD: dict[str, Any] = {
    "image_path": "a.jpg",
    "img": "deep/er/my photo.JPEG",
    "picture": ["no", "b.webp"],
    "image_file": "https://host/c.png?size=2#top",
    "images_path": ["c.gif"],
    "image_url": {"url": "data:image/png;base64,iVBO\nRw0K"},
    "frames": [{"bytes": None, "path": "0001.tif"}],
    "clip": " d.mp4 ",
    "sound": "e.flac",
}


@pytest.mark.parametrize(("key", "value"), UNREAD.items(), ids=UNREAD.keys())
@pytest.mark.parametrize("template", [None, "{question}"])
def test_a_medium_under_an_unread_key_is_refused(key: str, value: Any, template: str | None) -> None:
    row = {"messages": TURNS} if template is None else {"question": "q", "answer": "a"}
    with pytest.raises(RowError, match=rf"'{key}' holds '.*which looks like a medium, but is not read") as caught:
        parse_row({**row, key: value}, ORIGIN, prompt_template=template)
    assert all(repr(name) in caught.value.reason for name in ("image", "images", "video", "videos", "audio", "audios"))


@pytest.mark.parametrize(
    "value",
    ["What is a.jpg?", "See a.jpg.", "jpg", ".jpg", "two lines\nb.png", "https://host/page", "data:text/plain,x", 3, None],
)
def test_other_columns_stay(value: Any) -> None:
    columns = {"note": value, "more": [value, {"of": value}]}
    assert parse_row({"messages": TURNS, **columns}, ORIGIN).columns == columns


def test_what_is_read_may_look_like_a_medium() -> None:
    row = {"id": "a.jpg", "name": "b.jpg", "answer": "c.jpg", "choices": ["c.jpg", "d.jpg"]}
    sample = parse_row(row, ORIGIN, prompt_template="What is in {name}?")
    assert (sample.id, sample.messages[0].text, sample.columns) == ("a.jpg", "What is in b.jpg?", {})
    with pytest.raises(RowError, match="'name' holds 'b.jpg'"):  # where there are messages, the template is not used
        parse_row({"messages": TURNS, "name": "b.jpg"}, ORIGIN, prompt_template="What is in {name}?")
