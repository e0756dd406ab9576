"""Rows with answers that were sampled, none of which is the chosen one yet."""

from datamodules.dialects import recognise
from datamodules.prompt_template import PromptTemplate
from datamodules.rows import Row, UnusableRowError, keys_of, kind_of

_ANSWERS = "answers"
_TURNS = {"messages": {"role": "assistant", "content": ""}, "conversations": {"from": "gpt", "value": ""}}
_CONTENT = {"messages": "content", "conversations": "value"}


def preference_form(row: Row, prompt_template: str | None = None, answer_column: str = "answer") -> Row:
    """A row with `answers` as a preference row: the first stands where the chosen answer does, against all others.

    Args:
        row: A row of any form that ends with the user, and a list of texts as its `answers`.
        prompt_template: Makes the user's text of a row without messages.
        answer_column: Column where the answer of such a row would be.

    Raises:
        UnusableRowError: It is not such a row.
    """
    answers = row.get(_ANSWERS)
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise UnusableRowError(
            f"criteria_use.mode build makes a pair of the row's 'answers', a list of at least two texts, got {kind_of(answers)} "
            f"among {keys_of(row)}"
        )
    rest = {key: value for key, value in row.items() if key != _ANSWERS}
    first, others = answers[0], answers[1:]
    for key, content in _CONTENT.items():
        if isinstance(turns := rest.get(key), list):
            return rest | {key: [*turns, _TURNS[key] | {content: first}], "rejected_responses": others}
    if prompt_template is None and rest.get("prompt") is not None:
        return rest | {"chosen": first, "rejected": others}
    dialect = recognise(rest, None if prompt_template is None else PromptTemplate(prompt_template), answer_column)
    return rest | {dialect.answer_key: first, "rejected_responses": others}
