"""Toxicity by a list, on texts whose severities can be added up on paper."""

import pickle
from pathlib import Path

import pytest

from datamodules.scorers import Response
from datamodules.toxicity import LEXICON, ToxicityScorer


def score(text: str) -> float | None:
    (found,) = ToxicityScorer()([Response("Who is this?", text)])
    return found


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("A red bus in front of a house.", 0),
        ("", 0),
        ("You idiot.", 1),
        ("You are all idiots, and that idiot's dog is one too.", 2),
        ("IDIOT! Idiot? idiot", 3),
        ("The class assessed a classic grass skirt in Scunthorpe.", 0),  # no entry is a whole word
        ("You are stuuuupid.", 0.5),
        ("1d10t", 1),
        ("@sshole", 1),
        ("You are s t u p i d.", 0.5),
        ("Fuck you.", 2),  # the phrase, and not its first word again
        ("I will kill you!", 3),
        ("He is not an idiot.", 0),
        ("He isn't really an idiot.", 0),
        ("It's not, you idiot.", 1),  # another clause
        ("Nobody says that she is not here with the idiot.", 1),  # more than three words away
        ("Not fucking good.", 1),  # profanity counts always
        ("You are an ídiot.", 1),
    ],
)
def test_severities_add_up(text: str, severity: float) -> None:
    assert score(text) == 2.0**-severity


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.tsv"
    path.write_text("# mine\n\nred bus\t2\tinsult\nbus\t0.5\tprofanity\n")
    scorer = ToxicityScorer(str(path))
    assert scorer([Response("", "A red bus, a bus, no red car, not a red bus, you idiot.")]) == [2.0**-2.5]
    assert pickle.loads(pickle.dumps(scorer))([Response("", "bus")]) == [2.0**-0.5]
    path = tmp_path / "bad.tsv"
    path.write_text("bus\t1\tinsult\nbus\tmuch\tinsult\n")
    with pytest.raises(ValueError, match=r"bad\.tsv:2: expected a phrase, its severity .*, got 'bus\\tmuch\\tinsult'"):
        ToxicityScorer(str(path))([Response("", "bus")])
    with pytest.raises(ValueError, match=r"ToxicityScorer\.lexicon_path: .*none\.tsv cannot be read"):
        ToxicityScorer(str(tmp_path / "none.tsv"))([Response("", "bus")])


def test_each_entry_of_the_list_is_found() -> None:
    entries = [line.split("\t") for line in LEXICON.read_text().splitlines() if not line.startswith("#")]
    assert len(entries) > 50 and entries == sorted(entries, key=lambda entry: ["profanity", "insult", "threat"].index(entry[2]))
    for phrase, severity, _ in entries:
        assert score(f"So {phrase}.") == 2.0 ** -float(severity), phrase
