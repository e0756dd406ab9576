"""Recommendations, by hand."""

import numpy as np
import pytest
import yaml

from inspection.excess import Excess
from inspection.recommend import (
    Line,
    as_yaml,
    recommend_limits,
    recommend_max_length,
    recommend_max_skipped,
    recommend_validation,
)


@pytest.mark.parametrize(
    ("lengths", "max_length", "expected"),
    [
        ([100] * 99 + [1000], 90, "128"),  # the line of 99 %, in steps of 32
        ([100] * 99 + [120], 90, "128"),  # the longest, which is near
        ([100] * 98 + [1000] * 2, 512, "1024"),
        ([100] * 100, 128, None),
        ([100] * 100, 2048, "128"),  # nothing comes near the limit
        ([100] * 99 + [1000], 128, None),  # one row in a hundred is what the limit is for
        ([100] * 99 + [1000], 1500, None),
        ([], 128, None),
    ],
)
def test_the_limit_follows_the_line_of_99_percent(lengths: list[int], max_length: int, expected: str | None) -> None:
    lines = recommend_max_length(np.array(lengths, dtype=np.int64), max_length, "skip")
    assert [line.value for line in lines] == ([] if expected is None else [expected])


def test_the_reason_has_the_figures() -> None:
    (line,) = recommend_max_length(np.array([100] * 198 + [999] * 2), 90, "cut")
    assert line.option == "model.prompt.max_length"
    assert line.reason == (
        "99 % of the rows have at most 100 tokens, the longest has 999; max_length = 90 cuts 100 % of them, this one 1 %"
    )


@pytest.mark.parametrize(
    ("unusable", "max_skipped", "expected"),
    [
        ({"train": (1, 50)}, 0.01, None),  # one row may be skipped in any case
        ({"train": (1, 50)}, 0.0, "0.02"),
        ({"train": (3, 200)}, 0.01, "0.015"),
        ({"train": (2, 200)}, 0.01, None),
        ({"a/train": (3, 200), "b/train": (9, 100)}, 0.01, "0.09"),
        ({"train": (200, 200)}, 0.01, None),  # no share helps where nothing is left
    ],
)
def test_rows_that_stop_a_run_are_told(unusable: dict[str, tuple[int, int]], max_skipped: float, expected: str | None) -> None:
    lines = recommend_max_skipped(unusable, max_skipped)
    assert [line.value for line in lines] == ([] if expected is None else [expected])


def test_limits_are_raised_to_the_largest() -> None:
    media = [("data.limits", Excess("audio.max_seconds", seconds), 60.0) for seconds in (61.5, 90.2)]
    (line,) = recommend_limits(media)
    assert (line.option, line.value) == ("data.limits.audio.max_seconds", "91")
    assert line.reason == "2 media are above 60 and can be read otherwise; the largest is 90.2"


def test_validation_rows_are_held_out_where_there_are_none() -> None:
    assert recommend_validation(True, "data", 1000) == []
    assert recommend_validation(False, "data", 10) == []
    assert recommend_validation(False, "data", 1000)[0].value == "0.05"
    assert recommend_validation(False, "data.sources.web", 1_000_000)[0] == Line(
        "data.sources.web.val_fraction", "0.005", "there are no validation rows, so that overfitting would go unseen"
    )


def test_lines_become_a_configuration() -> None:
    lines = [
        Line("model.prompt.max_length", "64", "c"),
        Line("data.limits.video.max_pixels", "5", "b"),
        Line("data.limits.image.max_pixels", "4", "a"),
        Line("data.max_skipped", "0.02", "d"),
    ]
    assert yaml.safe_load(as_yaml(lines)) == {
        "data": {"init_args": {"limits": {"image": {"max_pixels": 4}, "video": {"max_pixels": 5}}, "max_skipped": 0.02}},
        "model": {"init_args": {"prompt": {"max_length": 64}}},
    }
    assert as_yaml(lines).count("#") == 4
    assert as_yaml([]) == ""
