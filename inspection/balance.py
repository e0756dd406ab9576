"""How often each answer is given, where rows have choices."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inspection.records import Part, RowRecord


@dataclass(frozen=True)
class Balance:
    """The closed answers of a part.

    Args:
        part: Split and source, in words.
        num_rows: Rows with choices.
        answers: How often each answer is the right one, most often first.
        places: How often the right one is the first of the choices, the second, and so on.
    """

    part: str
    num_rows: int
    answers: tuple[tuple[str, int], ...]
    places: tuple[int, ...]

    @property
    def majority(self) -> float:
        """What always giving the most frequent answer scores."""
        return self.answers[0][1] / self.num_rows


def find_balance(records: Iterable[RowRecord], parts: Sequence[Part]) -> list[Balance]:
    """The closed answers of each part that has some, of rows that can be used."""
    answers: dict[int, Counter[str]] = {}
    places: dict[int, Counter[int]] = {}
    for record in records:
        if record.text is not None and record.text.num_choices and not record.problem:
            answers.setdefault(record.part, Counter())[record.text.answer] += 1
            places.setdefault(record.part, Counter())[record.text.place] += 1
    return [
        Balance(
            part=parts[number].name,
            num_rows=counts.total(),
            answers=tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            places=tuple(places[number][place] for place in range(max(places[number]) + 1)),
        )
        for number, counts in answers.items()
    ]
