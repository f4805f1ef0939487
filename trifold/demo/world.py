"""The text of the little world: seeded documents whose probability is known.

Every choice that a document is made of has a known probability and can be read off the document, so the negative
log-probability of the document is exact: no model can predict text of a split with fewer nats on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from trifold.core.errors import InputError, unknown_name
from trifold.demo.choices import Choices
from trifold.demo.documents import arithmetic_document, bracket_document, fact_document, story_document

KINDS: dict[Callable[[Choices, bool], str], float] = {
    fact_document: 0.45,
    arithmetic_document: 0.2,
    bracket_document: 0.05,
    story_document: 0.3,
}
"""Kinds of documents and their probabilities."""

SPLITS = {"train": False, "calibration": False, "heldout": True}
"""Split -> whether its text holds the facts in forms, and the sums, that are kept out of training."""


class Document(NamedTuple):
    """`nats`: the negative natural logarithm of the probability that the generator writes `text`."""

    text: str
    nats: float


def document(split: str, index: int) -> Document:
    """The document of a split with this number. Raises InputError for an unknown split."""
    if split not in SPLITS:
        raise InputError(unknown_name("split", split, SPLITS))
    choices = Choices(f"{split} {index}")
    text = choices.weighted(KINDS)(choices, SPLITS[split])
    return Document(text, choices.nats)


def documents(split: str, count: int, start: int = 0) -> Iterator[Document]:
    """`count` documents of a split, beginning with number `start`."""
    return (document(split, index) for index in range(start, start + count))
