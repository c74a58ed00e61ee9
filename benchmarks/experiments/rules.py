"""True scores that need no judge, and what the policies of a sweep are measured on."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "example_configs" / "quickstart"))

from prompts import HELD_OUT_PER_DOMAIN, SUBJECTS, make_prompts
from sampling import sentiment

SHORT_TASKS = (
    "Answer with one word: how is {}?",
    "What do you think of {}? Say it in one word.",
)
MORE_TASKS = (
    "Write a postcard from somebody who has to do with {}.",
    "Write two sentences for a travel guide about {}.",
    "What would a child say about {}?",
    "Write a headline about {}, with one sentence below it.",
    "Complain or give praise, in two sentences: {}.",
    "How did you like {}?",
    "Write a note to yourself about {}.",
    "Tell me something that happened with {}.",
    "Give your opinion of {}, briefly.",
    "Would you recommend {}? Say why, in a sentence.",
)
MAX_LETTERS = 12
ARTICLES = frozenset(("the", "a", "an"))
_WORD = re.compile(r"[A-Za-z]+")


def letters_per_word(text: str) -> float:
    """The mean number of letters of a word.

    A word counts at most ``MAX_LETTERS``: otherwise one garbled word would be the best response.
    """
    words = _WORD.findall(text)
    return sum(min(len(word), MAX_LETTERS) for word in words) / max(1, len(words))


def articles(text: str) -> float:
    """The share of words that are articles."""
    words = _WORD.findall(text)
    return sum(word.lower() in ARTICLES for word in words) / max(1, len(words))


class Rule(NamedTuple):
    """A true score, and by how much two responses to one prompt must differ to be a pair."""

    score: Callable[[str], float]
    min_gap: float


RULES = {
    "sentiment": Rule(sentiment, 0.3),
    "letters": Rule(letters_per_word, 0.5),
    "articles": Rule(articles, 0.05),
}


def subjects(heldout: bool) -> list[str]:
    """The quickstart's subjects: those of its training prompts, or the held-out ones."""
    part = slice(-HELD_OUT_PER_DOMAIN, None) if heldout else slice(-HELD_OUT_PER_DOMAIN)
    return [subject for domain in SUBJECTS.values() for subject in domain[part]]


def short_prompts(heldout: bool) -> list[str]:
    """Prompts for answers of one word: 256 to train, 64 held out."""
    return [task.format(subject) for subject in subjects(heldout) for task in SHORT_TASKS]


class Measure(NamedTuple):
    """By which rule, and on responses to which held-out prompts, a sweep's policies are scored."""

    rule: str = "sentiment"
    prompts: Callable[[], list[str]] = lambda: make_prompts().heldout


MEASURES = {
    "letters": Measure(rule="letters"),
    "articles": Measure(rule="articles"),
    "short": Measure(prompts=lambda: short_prompts(heldout=True)),
}
"""By sweep; all others have ``Measure()``."""
