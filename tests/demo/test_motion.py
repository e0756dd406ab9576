from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from demo import motion
from demo.motion import EMOJI, FRAMES, SHEET, SIZE, STEPS, draw_clip, prepare, read_sheet, write_video
from tests.demo.row_checks import check_row, read_rows


def test_the_shipped_sheet_is_small_and_holds_different_emoji():
    assert SHEET.stat().st_size < 1_000_000
    tiles = read_sheet(SHEET)
    assert len({tile.tobytes() for tile in tiles}) == len(tiles) == len(set(EMOJI)) == sum(motion.SPLIT_EMOJI.values())
    assert all(tile.getextrema()[3] == (0, 255) for tile in tiles), "an emoji has no transparent ground"


def test_the_sheet_is_read_row_by_row_and_another_one_refused(tmp_path):
    sheet = Image.new("RGBA", (motion.COLUMNS * motion.TILE, 8 * motion.TILE))
    for number in range(len(EMOJI)):
        x, y = number % motion.COLUMNS * motion.TILE, number // motion.COLUMNS * motion.TILE
        sheet.paste((number, 0, 0, 255), (x, y, x + motion.TILE, y + motion.TILE))
    sheet.save(tmp_path / "sheet.png")
    assert [tile.getextrema()[0] for tile in read_sheet(tmp_path / "sheet.png")] == [(i, i) for i in range(len(EMOJI))]
    Image.new("RGBA", (30, 30)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"\(30, 30\) pixels, expected \(576, 384\).*git checkout"):
        read_sheet(tmp_path / "small.png")
    with pytest.raises(ValueError, match="is missing"):
        read_sheet(tmp_path / "none.png")


@pytest.mark.parametrize("direction", STEPS)
def test_a_clip_goes_its_way_and_no_other(direction):
    emoji = Image.new("RGBA", (48, 48), (255, 0, 255, 255))
    for seed in range(20):
        frames_FHW3 = draw_clip(emoji, direction, np.random.default_rng(seed))
        assert (frames_FHW3.shape, frames_FHW3.dtype) == ((FRAMES, SIZE, SIZE, 3), np.uint8)
        there_FHW = (frames_FHW3 == (255, 0, 255)).all(-1)
        assert np.ptp(there_FHW.sum((1, 2))) == 0, "it changes its size, or leaves the frame"
        centres_F2 = np.array([np.argwhere(there_HW).mean(0)[::-1] for there_HW in there_FHW])
        moved_2 = centres_F2[-1] - centres_F2[0]
        along, across = (0, 1) if STEPS[direction][0] else (1, 0)
        assert 29 <= moved_2[along] * STEPS[direction][along] <= 49
        assert moved_2[across] == 0
        assert (np.diff(centres_F2[:, along]) * STEPS[direction][along] > 0).all()
        still_HW = ~there_FHW.any(0)
        assert (frames_FHW3[:, still_HW] == frames_FHW3[0, still_HW]).all()


def test_a_written_video_shows_its_frames(tmp_path):
    import av

    frames_FHW3 = draw_clip(read_sheet(SHEET)[0], "up", np.random.default_rng(0))
    write_video(frames_FHW3, tmp_path / "clip.mp4")
    with av.open(tmp_path / "clip.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.frames, stream.average_rate) == ("h264", FRAMES, motion.FRAMES_PER_SECOND)
        got_FHW3 = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert got_FHW3.shape == frames_FHW3.shape
    assert np.abs(got_FHW3.astype(int) - frames_FHW3).mean() < 6


def test_prepared_clips_are_balanced_and_no_emoji_is_in_two_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "SPLIT_EMOJI", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(motion, "CLIPS_EACH", 2)
    drawn, write_video = [], motion.write_video
    monkeypatch.setattr(motion, "write_video", lambda frames, path: drawn.append(frames) or write_video(frames, path))
    prepared = prepare(tmp_path / "motion")
    emoji = defaultdict(set)
    for split, count in motion.SPLIT_EMOJI.items():
        rows = read_rows(prepared[split])
        ways = Counter()
        for row in rows:
            answer = check_row(row, "video", prepared["media_root"], choices=list(STEPS))
            number, direction, _ = row["videos"][0].removeprefix(f"{split}/").split("-")
            assert answer == direction
            emoji[split].add(number)
            ways[number, direction] += 1
        assert len(emoji[split]) == count
        assert len(ways) == 4 * count
        assert set(ways.values()) == {2}
    assert not emoji["test"] & (emoji["train"] | emoji["val"])
    assert not emoji["train"] & emoji["val"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "motion").rglob("*")}
    assert prepare(tmp_path / "motion") == prepared
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = prepare(tmp_path / "again")
    assert all(again[split].read_bytes() == prepared[split].read_bytes() for split in motion.SPLIT_EMOJI)
    half = len(drawn) // 2  # how frames are encoded is the library's
    assert half and all(np.array_equal(one, other) for one, other in zip(drawn[:half], drawn[half:], strict=True))
