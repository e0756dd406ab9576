"""Texts as words, for scorers that compare them."""

import re
import unicodedata


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without accents and without a possessive 's.

    Args:
        text: In a language that puts spaces between words.
    """
    stripped = (word.removesuffix("'s").strip("'") for word in _WORD.findall(plain(text)))
    return [word for word in stripped if word]


def plain(text: str) -> str:
    """A text in lower case, without accents and with straight apostrophes."""
    letters = unicodedata.normalize("NFKD", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).casefold()
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


_WORD = re.compile(r"[\w@$']+")
