"""Is a generated answer right? A strict and a lenient rule; neither needs a model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["lenient_match", "normalise_answer", "strict_match"]

_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset(("a", "an", "the"))
# Openings of a sentence around the answer. They are tried after articles have been dropped.
_OPENING = re.compile(
    r"^(?:(?:(?:correct |right |final )?answer (?:is )?)|(?:(?:it|this|that|there) is )|(?:its )|(?:i think ))+"
)


def strict_match(prediction: str, answer: str, aliases: Iterable[str] = ()) -> bool:
    """Return whether ``prediction`` is exactly ``answer`` after stripping outer white space.

    Aliases count for the lenient rule only; they are accepted here so that both rules share one signature.
    """
    del aliases
    return prediction.strip() == answer.strip()


def lenient_match(prediction: str, answer: str, aliases: Iterable[str] = ()) -> bool:
    """Return whether ``prediction`` means ``answer`` or one of ``aliases``.

    Case, accents, punctuation, articles, number words up to twenty and a surrounding sentence such as
    "The answer is X." make no difference. A longer text that merely contains the answer is wrong: "not spam" is
    not "spam". An empty prediction is never right.
    """
    said = normalise_answer(prediction)
    return bool(said) and said in {normalise_answer(reference) for reference in (answer, *aliases)}


def normalise_answer(text: str) -> str:
    """Return the form in which :func:`lenient_match` compares answers."""
    text = unicodedata.normalize("NFKD", text).casefold()
    text = "".join(char for char in text if not unicodedata.combining(char)).replace("'", "").replace("’", "")
    # A sign or a decimal point between digits carries meaning; all other punctuation separates words.
    text = re.sub(r"(?<!\d)[.,](?=\D|$)|(?<=\d)[.,](?!\d)|[^\w\s.,+-]|(?<=\w)-|[-+](?!\d)|_", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES]
    joined = " ".join(words)
    # An answer such as "a" consists of an article only; do not normalise it away.
    if not joined:
        joined = " ".join(text.split())
    stripped = _OPENING.sub("", joined + " ").strip()
    return stripped or joined
