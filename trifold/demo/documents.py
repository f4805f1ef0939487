"""Documents of the four kinds, each a function of choices; `unseen` allows what training text never shows."""

from __future__ import annotations

from functools import cache

from trifold.demo.choices import Choices
from trifold.demo.facts import Fact, facts

OPENING, CLOSING = "([{", ")]}"
PAIRS, DEPTH = 6, 5  # of brackets
LARGEST = 49  # number to calculate with
FOLLOW = 0.25  # probability that a sentence is about the same subject as the one before

CAST = ("Ana", "Ben", "Carl", "Dora", "Emil", "Finn", "Greta", "Hugo", "Ida", "Jan", "Kim", "Leo")
THINGS = ("apple", "ball", "book", "coin", "cup", "hat", "key", "lamp", "letter", "ring", "rope", "spoon")


def fact_document(choices: Choices, unseen: bool) -> str:
    """Four to eight sentences, each about any fact or about the subject of the one before."""
    sentences: list[str] = []
    subject: tuple[Fact, ...] = ()
    for _ in range(choices.between(4, 8)):
        if subject and choices.flip(FOLLOW):
            sentences.append(choices.one_of(subject).follow())
            continue
        subject, fact = choices.one_of(_subject_facts())
        forms = range(len(fact.attribute.forms))
        sentences.append(fact.say(choices.one_of([form for form in forms if unseen or form != fact.unseen])))
    return " ".join(sentences)


@cache
def _subject_facts() -> tuple[tuple[tuple[Fact, ...], Fact], ...]:
    return tuple((subject, fact) for subject in facts() for fact in subject)


def arithmetic_document(choices: Choices, unseen: bool) -> str:
    """Three to seven lines `a + b = c` or `a - b = c` of numbers from 0 to `LARGEST`."""
    return "\n".join(sum_line(*choices.one_of(sums(unseen))) for _ in range(choices.between(3, 7)))


def sum_line(a: int, sign: str, b: int) -> str:
    """The sum with its answer."""
    return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"


@cache
def sums(unseen: bool) -> tuple[tuple[int, str, int], ...]:
    """The sums of the world, with those that are kept out of training, about a tenth, or without."""
    choices = Choices("the sums of the little world")
    numbers = range(LARGEST + 1)
    every = [(a, sign, b) for a in numbers for sign in "+-" for b in numbers if sign == "+" or b <= a]
    return tuple(each for each in every if not choices.flip(0.1) or unseen)


def bracket_document(choices: Choices, unseen: bool = False) -> str:
    """Three to seven lines of `PAIRS` balanced pairs of brackets of three sorts, at most `DEPTH` deep."""
    return "\n".join(bracket_line(choices) for _ in range(choices.between(3, 7)))


def bracket_line(choices: Choices) -> str:
    """At every step another bracket opens, or the last one closes; where both can be, each half of the time."""
    written: list[str] = []
    open_: list[str] = []
    while len(written) < 2 * PAIRS:
        can_open = len(written) + len(open_) < 2 * PAIRS and len(open_) < DEPTH
        if can_open and (not open_ or choices.flip(0.5)):
            open_.append(choices.one_of(OPENING))
            written.append(open_[-1])
        else:
            written.append(closing(open_.pop()))
    return " ".join(written)


def closing(bracket: str) -> str:
    """The bracket that closes this one."""
    return CLOSING[OPENING.index(bracket)]


class Story:
    """Three things on their way through people's hands, told clause by clause."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.things = choices.distinct(THINGS, 3)
        self.holder: dict[str, str] = {}
        self.clauses: list[str] = []
        for thing in self.things:
            self._give(thing, choices.one_of(CAST))

    def tell(self) -> None:
        """One more thing changes hands, or it is said who has it; either half of the time."""
        thing = self.choices.one_of(self.things)
        if self.choices.flip(0.5):
            self.clauses.append(f"{thing} with {self.holder[thing]}")
        else:
            self._give(thing, self.choices.one_of([person for person in CAST if person != self.holder[thing]]))

    def _give(self, thing: str, person: str) -> None:
        self.holder[thing] = person
        self.clauses.append(f"{thing} to {person}")


def story_document(choices: Choices, unseen: bool = False) -> str:
    """A story that goes on for four to fourteen clauses after the first three."""
    story = Story(choices)
    for _ in range(choices.between(4, 14)):
        story.tell()
    return ", ".join(story.clauses) + "."
