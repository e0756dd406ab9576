"""A table of what the model answered to the same rows over time, and that table as one HTML page.

The page needs nothing beside itself: pictures are data URIs, there is no script and no address.
"""

import json
from dataclasses import asdict, dataclass, field
from html import escape
from string import Template
from typing import Literal, Self

from lightning_modules.answers import is_right

Verdict = Literal["right", "wrong", "open"]

LONGEST_EXACT_ANSWER = 4
"""Words of a reference that a model can be expected to say exactly; a longer one is only called right or left open."""


@dataclass(frozen=True)
class Row:
    """One validation row.

    Args:
        id: The row's id.
        origin: File and line.
        question: The last user message.
        reference: The answer of the data.
        closed: Whether the answer is one of given choices.
        pictures: Small pictures of its media, as data URIs.
    """

    id: str
    origin: str
    question: str
    reference: str
    closed: bool = False
    pictures: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether an answer other than the reference is wrong."""
        return self.closed or len(self.reference.split()) <= LONGEST_EXACT_ANSWER

    def judge(self, answer: str) -> Verdict:
        """What to call an answer: right, wrong, or open where a long reference can be met in other words."""
        if is_right(answer, self.reference):
            return "right"
        return "wrong" if self.is_exact else "open"


@dataclass(frozen=True)
class Column:
    """What the model said to all rows at one time.

    Args:
        name: Head of the column.
        step: Optimisation step of the fit; None: a validation outside a fit.
        val_loss: Loss over all validation rows then, in nats a token; None: unknown.
        answers: One a row.
        losses: Loss of each reference answer, in nats a token.
    """

    name: str
    step: int | None
    val_loss: float | None
    answers: tuple[str, ...]
    losses: tuple[float, ...]


@dataclass
class SampleTable:
    """Rows and columns, oldest column first."""

    rows: list[Row]
    columns: list[Column] = field(default_factory=list)

    def add(self, column: Column) -> None:
        """Adds a column. One of the same name goes, and in a fit those of later steps: the run was resumed before them."""

        def stays(old: Column) -> bool:
            later = column.step is not None and old.step is not None and old.step >= column.step
            return old.name != column.name and not later

        self.columns = [*filter(stays, self.columns), column]

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The table that `to_json` wrote.

        Raises:
            ValueError: The text is no such table.
        """
        try:
            table = json.loads(text)
            rows = [Row(**{**row, "pictures": tuple(row["pictures"])}) for row in table["rows"]]
            columns = [
                Column(**{**column, "answers": tuple(column["answers"]), "losses": tuple(column["losses"])})
                for column in table["columns"]
            ]
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"not a table of samples: {error}") from error
        return cls(rows, columns)

    def to_html(self, title: str) -> str:
        """The table as a page, newest column first."""
        columns = self.columns[::-1]
        head = "".join(_head(self.rows, column) for column in columns)
        body = "\n".join(_row(row, [(c.answers[i], c.losses[i]) for c in columns]) for i, row in enumerate(self.rows))
        return _PAGE.substitute(title=escape(title), head=head, body=body)


def _head(rows: list[Row], column: Column) -> str:
    verdicts = [row.judge(answer) for row, answer in zip(rows, column.answers, strict=True)]
    facts = [f"val/loss {column.val_loss:.3f}"] if column.val_loss is not None else []
    facts.append(f"{verdicts.count('right')} of {len(verdicts)} right")
    return f"<th>{escape(column.name)}<small>{'<br>'.join(facts)}</small></th>"


def _row(row: Row, answers: list[tuple[str, float]]) -> str:
    pictures = "".join(f'<img src="{escape(uri)}" alt="">' for uri in row.pictures)
    question = escape(row.question)
    for modality in ("image", "video", "audio"):
        question = question.replace(f"&lt;{modality}&gt;", f"<i>{modality}</i>")
    cells = "".join(_answer(row, answer, loss) for answer, loss in answers)
    return (
        f'<tr><td class="picture">{pictures}</td>'
        f'<td class="question">{question}<small>{escape(row.id)} · {escape(row.origin)}</small></td>'
        f'<td class="reference">{escape(row.reference)}</td>{cells}</tr>'
    )


def _answer(row: Row, answer: str, loss: float) -> str:
    verdict = row.judge(answer)
    mark = {"right": "✓ ", "wrong": "✗ ", "open": ""}[verdict]
    text = escape(answer) if answer.strip() else "<em>empty</em>"
    return f'<td class="{verdict}">{mark}{text}<small title="loss of the reference answer">{loss:.3f}</small></td>'


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1d2125; --quiet: #68717a; --line: #e3e6e9; --head: #f5f6f7;
  --right: #14683a; --right-back: #e5f4ea; --wrong: #a3281f; --wrong-back: #fbe9e7; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181b; --text: #dfe3e6; --quiet: #939ca5; --line: #2c3136; --head: #1d2125;
    --right: #7fd6a1; --right-back: #16301f; --wrong: #f2a39a; --wrong-back: #3a1d1a; }
}
body { display: flex; flex-direction: column; box-sizing: border-box; height: 100vh; margin: 0; padding: 1.5rem;
  background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.15rem; font-weight: 600; }
p { flex: none; margin: 0 0 1rem; color: var(--quiet); font-size: .9rem; max-width: 60rem; }
.table { overflow: auto; min-height: 0; max-width: 100%; align-self: flex-start;
  border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; width: max-content; }
th, td { padding: .55rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; z-index: 2; background: var(--head); font-weight: 600; white-space: nowrap; }
small { display: block; margin-top: .15rem; color: var(--quiet); font-size: .78rem; font-weight: 400;
  font-variant-numeric: tabular-nums; }
td { min-width: 6rem; max-width: 11rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.picture, th:first-child { position: sticky; left: 0; z-index: 1; background: var(--back); min-width: 0; }
th:first-child { z-index: 3; background: var(--head); }
.picture img { display: block; width: 88px; height: 88px; object-fit: contain; margin-bottom: 4px; border-radius: 3px; }
.question { max-width: 15rem; }
.question i { color: var(--quiet); font-size: .78rem; border: 1px solid var(--line); border-radius: 3px; padding: 0 .25rem;
  margin-right: .3rem; }
.reference { font-weight: 600; border-right: 1px solid var(--line); }
.right { color: var(--right); background: var(--right-back); }
.wrong { color: var(--wrong); background: var(--wrong-back); }
em { color: var(--quiet); }
</style>
</head>
<body>
<h1>$title</h1>
<p>The same validation rows at every validation, newest first. Green answers are the reference word for word, which is
what exact_match counts; red ones differ; where a longer reference was not met word for word, the answer is left unmarked. The
small figure is the loss of the reference answer.</p>
<div class="table"><table>
<thead><tr><th>media</th><th>question</th><th>reference</th>$head</tr></thead>
<tbody>
$body
</tbody>
</table></div>
</body>
</html>
""")
