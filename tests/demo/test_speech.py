from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from demo import speech
from demo.make_speech import trim, write_tape
from demo.speech import SAMPLE_RATE, TAPES, WORDS, Clip, prepare, read_table
from tests.demo.row_checks import check_row, read_rows


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    return prepare(tmp_path_factory.mktemp("demo") / "speech")


@pytest.fixture
def tapes(tmp_path, monkeypatch) -> dict[str, Path]:
    """Tapes of two words of noise each, in place of the shipped ones."""
    random = np.random.default_rng(0)
    tapes = {split: tmp_path / split / tape.name for split, tape in TAPES.items()}
    for split, tape in tapes.items():
        sounds = [(word, f"voice-{split}", random.uniform(-0.5, 0.5, 1000 + 7 * number)) for number, word in enumerate(WORDS[:2])]
        write_tape(tape, [(word, voice, samples_S.astype(np.float32)) for word, voice, samples_S in sounds])
    monkeypatch.setattr(speech, "TAPES", tapes)
    return tapes


@pytest.mark.parametrize(("split", "voices"), [("train", 14), ("val", 3), ("test", 1)])
def test_each_voice_says_each_word_once(prepared, split, voices):
    rows = read_rows(prepared[split])
    said = Counter(check_row(row, "audio", prepared["media_root"], choices=WORDS) for row in rows)
    assert said == dict.fromkeys(WORDS, voices)
    for row in rows[:20]:
        file = prepared["media_root"] / row["audios"][0]
        assert file.name.startswith(row["messages"][1]["content"].lower() + "-")
        samples_S, sample_rate = soundfile.read(file)
        assert sample_rate == SAMPLE_RATE
        assert 0.3 < len(samples_S) / sample_rate < 1.6
        assert 0.2 < np.abs(samples_S).max() < 1


def test_no_voice_is_in_two_splits():
    voices = {split: {clip.voice for clip in read_table(tape.with_suffix(".csv"))} for split, tape in TAPES.items()}
    assert len(set.union(*voices.values())) == sum(len(names) for names in voices.values()) == 18
    people = {split: {name.removesuffix("-slow") for name in names} for split, names in voices.items()}
    assert not people["train"] & people["val"]


def test_a_sound_is_its_part_of_the_tape(tapes, tmp_path):
    prepared = prepare(tmp_path / "speech")
    tape_S, _ = soundfile.read(tapes["test"], dtype="int16")
    bravo_S, _ = soundfile.read(prepared["media_root"] / "test" / "bravo-voice-test.wav", dtype="int16")
    assert read_table(tapes["test"].with_suffix(".csv"))[1] == Clip(1000, 2007, "Bravo", "voice-test")
    assert np.array_equal(bravo_S, tape_S[1000:2007])


def test_what_changes_a_tape_makes_the_sounds_anew(tapes, tmp_path):
    first = prepare(tmp_path / "speech")["train"].stat().st_mtime_ns
    assert prepare(tmp_path / "speech")["train"].stat().st_mtime_ns == first
    write_tape(tapes["train"], [("Zulu", "other", np.full(900, 0.25, np.float32))])
    (row,) = read_rows(prepare(tmp_path / "speech")["train"])
    assert row["audios"] == ["train/zulu-other.wav"]


def test_damaged_tapes_and_tables_are_refused(tapes, tmp_path):
    table = tapes["val"].with_suffix(".csv")
    whole = table.read_text()
    table.write_text(whole.replace("1000,2007,Bravo", "900,2007,Bravo"))
    with pytest.raises(ValueError, match=r"val\.csv, line 3: .*start=900.*git checkout"):
        read_table(table)
    table.write_text(whole.replace("Bravo", "Beta"))
    with pytest.raises(ValueError, match="line 3: .*Beta"):
        read_table(table)
    table.write_text(whole.replace("2007", "90000"))
    with pytest.raises(ValueError, match=r"expected one channel at 16000 Hz and at least 90000 samples"):
        prepare(tmp_path / "speech")
    table.unlink()
    with pytest.raises(ValueError, match=r"val\.csv is missing.*git checkout"):
        prepare(tmp_path / "speech")


def test_trim_keeps_a_tenth_of_a_second_around_the_word():
    noise_S = np.random.default_rng(0).normal(0, 0.2, 8000).astype(np.float32)
    silence_S = np.random.default_rng(1).normal(0, 0.0005, 16000).astype(np.float32)
    samples_S = np.concatenate([silence_S, noise_S, silence_S])
    assert np.array_equal(trim(samples_S), samples_S[16000 - 1600 : 24000 + 1600])
    assert np.array_equal(trim(noise_S), noise_S)
