"""Documents of the four kinds, each a function of choices; `unseen` allows what training text never shows."""

from __future__ import annotations

from functools import cache

from trifold.demo.choices import Choices
from trifold.demo.facts import Fact, facts

OPENING, CLOSING = "([{", ")]}"
PAIRS, DEPTH = 6, 5  # of brackets
FOLLOW = 0.25  # probability that a sentence is about the same subject as the one before

CAST = ("Ana", "Ben", "Carl", "Dora", "Emil", "Finn", "Greta", "Hugo", "Ida", "Jan", "Kim", "Leo")
THINGS = ("apple", "ball", "book", "coin", "cup", "hat", "key", "lamp", "letter", "ring", "rope", "spoon")
ROOMS = ("attic", "bathroom", "bedroom", "cellar", "garden", "hall", "kitchen", "stable")
WAYS = ("goes", "runs", "walks")


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
    """Three to seven lines `a + b = c` or `a - b = c` of numbers from 0 to 99 (sums to 198)."""
    return "\n".join(sum_line(*choices.one_of(sums(unseen))) for _ in range(choices.between(3, 7)))


def sum_line(a: int, sign: str, b: int) -> str:
    """The sum with its answer."""
    return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"


@cache
def sums(unseen: bool) -> tuple[tuple[int, str, int], ...]:
    """The sums of the world, with those that are kept out of training, about a tenth, or without."""
    choices = Choices("the sums of the little world")
    every = [(a, sign, b) for a in range(100) for sign in "+-" for b in range(100) if sign == "+" or b <= a]
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
    """Three people and two things on their way through the rooms, told sentence by sentence."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.cast, things, start = choices.distinct(CAST, 3), choices.distinct(THINGS, 2), choices.one_of(ROOMS)
        self.room = dict.fromkeys(self.cast, start)
        self.holder = {thing: choices.one_of(self.cast) for thing in things}
        a, b, c = self.cast
        self.sentences = [f"{a}, {b} and {c} are in the {start}."]
        self.sentences += [f"{holder} has the {thing}." for thing, holder in self.holder.items()]

    def tell(self) -> None:
        """One more event or question."""
        happen = {self.move: 0.3, self.hand: 0.3, self.where: 0.1, self.who: 0.1, self.find: 0.1, self.verify: 0.1}
        self.choices.weighted(happen)()

    def move(self) -> None:
        """Somebody changes rooms."""
        person = self.choices.one_of(self.cast)
        room = self.choices.one_of([room for room in ROOMS if room != self.room[person]])
        self.sentences.append(f"{person} {self.choices.one_of(WAYS)} to the {room}.")
        self.room[person] = room

    def hand(self) -> None:
        """A thing changes hands."""
        thing = self.choices.one_of(list(self.holder))
        giver = self.holder[thing]
        taker = self.choices.one_of([person for person in self.cast if person != giver])
        self.sentences.append(f"{giver} hands the {thing} to {taker}.")
        self.holder[thing] = taker

    def where(self) -> None:
        """Where is somebody?"""
        person = self.choices.one_of(self.cast)
        self.sentences.append(f"Where is {person}? In the {self.room[person]}.")

    def who(self) -> None:
        """Who has a thing?"""
        thing = self.choices.one_of(list(self.holder))
        self.sentences.append(f"Who has the {thing}? It is {self.holder[thing]}.")

    def find(self) -> None:
        """Where is a thing? Where its holder is."""
        thing = self.choices.one_of(list(self.holder))
        self.sentences.append(f"Where is the {thing}? In the {self.room[self.holder[thing]]}.")

    def verify(self) -> None:
        """Is somebody in a room? Half of the time it is so."""
        person, so = self.choices.one_of(self.cast), self.choices.flip(0.5)
        here = self.room[person]
        room = here if so else self.choices.one_of([room for room in ROOMS if room != here])
        self.sentences.append(f"Is {person} in the {room}? {'Yes' if so else 'No'}.")


def story_document(choices: Choices, unseen: bool = False) -> str:
    """A story of four to ten events and questions."""
    story = Story(choices)
    for _ in range(choices.between(4, 10)):
        story.tell()
    return " ".join(story.sentences)
