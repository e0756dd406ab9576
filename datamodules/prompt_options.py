"""How a conversation becomes tokens: the options of the prompt."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PromptOptions:
    """How a conversation becomes tokens.

    Args:
        chat_template: None: the tokenizer's own; "plain": one for base models, which have none; or the path of a
            .jinja file.
        system: A system message for rows that have none.
        max_length: Most tokens a row may have, media included.
        on_too_long: What happens to a longer row: "skip" refuses it; "cut" drops tokens at its end, but never a medium
            or the whole answer.
    """

    chat_template: str | None = None
    system: str | None = None
    max_length: int = 2048
    on_too_long: Literal["skip", "cut"] = "skip"

    def __post_init__(self) -> None:
        template = self.chat_template
        if template is not None and template != "plain" and not template.endswith(".jinja"):
            raise ValueError(f"prompt.chat_template is null, plain, or the path of a .jinja file, got {template!r}")
        if self.max_length < 1:
            raise ValueError(f"prompt.max_length is a number of tokens, at least 1, got {self.max_length}")
