"""The fixed facts of the little world: people and towns, what is true of them, and how it may be said.

Every form of a sentence ends with the value, so that it can be asked by leaving the end out. Each fact has one
named form that no training text ever uses for it: `Fact.unseen`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from trifold.demo.choices import Choices

PEOPLE, TOWNS = 320, 16


class Attribute(NamedTuple):
    """`forms`: sentences with a subject `{s}` (`{S}` where it begins the sentence) and a value `{v}`.

    `follow`: how a second sentence about the same subject says it.
    """

    forms: tuple[str, ...]
    follow: str
    values: tuple[str, ...]


class Fact(NamedTuple):
    """`value` of an `attribute` of `subject`; `unseen` indexes the form that is kept out of training."""

    subject: str
    pronoun: str
    attribute: Attribute
    value: str
    unseen: int

    def say(self, form: int) -> str:
        """The sentence in one of the attribute's forms."""
        return self.attribute.forms[form].format(s=self.subject, v=self.value)

    def follow(self) -> str:
        """The sentence with a pronoun for the subject."""
        return self.attribute.follow.format(S=self.pronoun, v=self.value)


@cache
def facts() -> tuple[tuple[Fact, ...], ...]:
    """All facts, one tuple for each subject."""
    choices = Choices("the facts of the little world")
    towns, given, family, rivers = (_names(choices, *kind) for kind in _NAMES)
    people = choices.distinct([f"{first} {last}" for first in given for last in family], PEOPLE)
    person, town = _person_attributes(towns), _town_attributes(rivers)
    return tuple(
        tuple(
            Fact(subject, pronoun, attribute, choices.one_of(attribute.values), choices.between(0, 4))
            for attribute in attributes
        )
        for subjects, attributes, pronouns in ((people, person, ("He", "She")), (towns, town, ("It",)))
        for subject in subjects
        for pronoun in (choices.one_of(pronouns),)
    )


_NAMES = (
    (TOWNS, ("bran", "cor", "dun", "el", "har", "kes", "mil", "nor", "ost", "wes"), ("burg", "ford", "ham", "mouth")),
    (20, ("al", "bel", "cas", "dor", "jor", "kar", "lin", "mar", "ros", "tam"), ("da", "la", "na", "ric", "sa", "win")),
    (
        20,
        ("black", "brook", "green", "hill", "lang", "moor", "stone", "under", "west", "wood"),
        ("er", "ley", "man", "son"),
    ),
    (10, ("ash", "bar", "cal", "der", "ty", "wen"), ("ne", "no", "ver", "way")),
)


def _names(choices: Choices, count: int, heads: tuple[str, ...], tails: tuple[str, ...]) -> tuple[str, ...]:
    """Different made-up names."""
    every = [(head + tail).capitalize() for head in heads for tail in tails]
    return tuple(choices.distinct(every, count))


def _person_attributes(towns: tuple[str, ...]) -> tuple[Attribute, ...]:
    return (
        Attribute(
            (
                "{s} lives in {v}.",
                "The home of {s} is in {v}.",
                "You will find {s} in {v}.",
                "{s} has a house in {v}.",
                "Where does {s} live? In {v}.",
            ),
            "{S} lives in {v}.",
            towns,
        ),
        Attribute(
            (
                "{s} works as a {v}.",
                "The job of {s} is that of a {v}.",
                "{s} earns money as a {v}.",
                "By trade {s} is a {v}.",
                "What does {s} work as? A {v}.",
            ),
            "{S} works as a {v}.",
            _words(
                "baker barber carpenter doctor farmer fisher gardener hunter "
                "judge lawyer miller painter sailor smith tailor teacher"
            ),
        ),
        Attribute(
            (
                "{s} keeps a {v}.",
                "The pet of {s} is a {v}.",
                "{s} goes for walks with a {v}.",
                "At home {s} feeds a {v}.",
                "Which animal does {s} keep? A {v}.",
            ),
            "{S} keeps a {v}.",
            _words("cat dog duck ferret goat hamster hen horse lizard parrot rabbit snake"),
        ),
        Attribute(
            (
                "{s} likes the colour {v}.",
                "The favourite colour of {s} is {v}.",
                "{s} wears nothing but {v}.",
                "The door of {s} is painted {v}.",
                "Which colour does {s} like? The answer is {v}.",
            ),
            "{S} likes the colour {v}.",
            _words("black blue brown gold green grey pink purple red silver white yellow"),
        ),
        Attribute(
            (
                "{s} likes to eat {v}.",
                "The favourite food of {s} is {v}.",
                "{s} cooks a lot of {v}.",
                "For dinner {s} has {v}.",
                "What does {s} like to eat? Mostly {v}.",
            ),
            "{S} likes to eat {v}.",
            _words("beans bread cake cheese eggs fish honey nuts pears plums rice soup"),
        ),
        Attribute(
            (
                "{s} plays the {v}.",
                "The instrument of {s} is the {v}.",
                "{s} takes lessons on the {v}.",
                "In the evening {s} practises the {v}.",
                "What does {s} play? The {v}.",
            ),
            "{S} plays the {v}.",
            (
                "banjo",
                "bugle",
                "cello",
                "drum",
                "fiddle",
                "flute",
                "guitar",
                "harp",
                "lute",
                "piano",
                "trumpet",
                "viola",
            ),
        ),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _town_attributes(rivers: tuple[str, ...]) -> tuple[Attribute, ...]:
    return (
        Attribute(
            (
                "{s} lies on the river {v}.",
                "The river through {s} is the {v}.",
                "The bridge of {s} crosses the {v}.",
                "In {s} people swim in the {v}.",
                "On which river does {s} lie? On the {v}.",
            ),
            "{S} lies on the river {v}.",
            rivers,
        ),
        Attribute(
            (
                "{s} is known for its {v}.",
                "The pride of {s} is its {v}.",
                "Visitors come to {s} for the {v}.",
                "On the stamps of {s} you see the {v}.",
                "What is {s} known for? For its {v}.",
            ),
            "{S} is known for its {v}.",
            _words("bells boats castle clocks gardens glass mills museum school tower"),
        ),
        Attribute(
            (
                "In {s} the market is on {v}.",
                "The market of {s} is held every {v}.",
                "The shops of {s} are full on {v}.",
                "Farmers drive to {s} every {v}.",
                "When is the market in {s}? On {v}.",
            ),
            "{S} has its market on {v}.",
            _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
        ),
    )
