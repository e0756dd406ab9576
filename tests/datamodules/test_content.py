"""Media with a part of them that is taken; and a medium in a place that nobody reads is refused, so that no row is trained on
without its pictures."""

from typing import Any

import pytest

from datamodules.batch import Modality, Origin, RowError
from datamodules.content import Media
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


def media(modality: Modality, *items: Any) -> list[Media]:
    """What a row makes of the items of its list, and of the same as parts of a message."""
    question = {"role": "user", "content": f"<{modality}>" * len(items)}
    listed = parse_row({"messages": [question, TURNS[1]], f"{modality}s": list(items)}, ORIGIN).media(modality)
    parts = [{"type": modality, modality: item} for item in items]
    in_message = parse_row({"messages": [{"role": "user", "content": parts}, TURNS[1]]}, ORIGIN).media(modality)
    assert listed == in_message
    return listed


def test_a_part_of_a_video_or_a_sound() -> None:
    items = ["a.mp4", {"path": "a.mp4", "start": 1, "end": 2.5}, {"url": "a.mp4", "end": 3}, {"path": "a.mp4", "start": None}]
    for modality in ("video", "audio"):
        assert media(modality, *items) == [
            Media(modality, "a.mp4"),
            Media(modality, "a.mp4", start=1, end=2.5),
            Media(modality, "a.mp4", end=3),
            Media(modality, "a.mp4"),
        ]


def test_a_video_of_image_files() -> None:
    items = [["0.png", "1.png"], {"path": ["0.png", "1.png"], "fps": 4, "start": 0.25}]
    assert media("video", *items) == [
        Media("video", ("0.png", "1.png")),
        Media("video", ("0.png", "1.png"), start=0.25, fps=4),
    ]
    assert media("video", *items)[0].fps == 2  # where the row does not say
    assert [medium.files for medium in media("video", items[0], "a.mp4")] == [("0.png", "1.png"), ("a.mp4",)]


@pytest.mark.parametrize(
    ("modality", "item", "reason"),
    [
        (
            "video",
            {"path": "a.mp4", "start": 3, "end": 3},
            "item 1 of 'videos' must have 0 <= start < end, in seconds, got start 3",
        ),
        (
            "audio",
            {"path": "a.wav", "end": 0},
            "item 1 of 'audios' must have 0 <= start < end, in seconds, got start 0.0 and end 0",
        ),
        ("video", {"path": "a.mp4", "start": -1}, "must have 0 <= start < end, in seconds, got start -1 and no end"),
        ("video", {"path": "a.mp4", "start": "1:30"}, "item 1 of 'videos': 'start' must be a number, got a text: '1:30'"),
        ("audio", {"path": "a.wav", "end": True}, "item 1 of 'audios': 'end' must be a number, got true or false"),
        ("video", {"path": "a.mp4", "end": float("nan")}, "item 1 of 'videos': 'end' must be a number, got a number: 'nan'"),
        ("video", {"path": ["a.png"], "fps": 0}, "'fps' is the number of frames shown a second, above 0, got 0"),
        ("video", {"path": "a.mp4", "fps": 2}, "item 1 of 'videos' must be a path, a data: URI, a list of image files"),
        (
            "video",
            {"path": "a.mp4", "begin": 2},
            "and if need be 'start' and 'end' in seconds, and the 'fps' of a list of frames",
        ),
        ("video", [], "item 1 of 'videos' must be a path, .* got a list"),
        ("video", ["a.png", ""], "item 1 of 'videos' must be a path, .* got a list"),
        (
            "audio",
            ["a.wav", "b.wav"],
            "item 1 of 'audios' must be a path, a data: URI, or an object with 'path' or 'url', and if",
        ),
        ("audio", {"path": "a.wav", "fps": 2}, "item 1 of 'audios' must be a path"),
        ("image", {"path": "a.png", "end": 2}, "item 1 of 'images' must be a path, a data: URI, or an object with nothing but"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(modality: Modality, item: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        media(modality, item)
