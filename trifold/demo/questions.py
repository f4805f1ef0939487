"""Multiple-choice questions about the little world, none of whose wording is in the training text.

Facts are asked in the form that training never uses for them, sums are among those kept out of training, and
brackets and stories come from documents of their own. The choices are what the model might confuse: values of the
same sort, sums with one digit wrong, another closing bracket, other people of the story.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trifold.core.embedded import TASKS as FOLDER
from trifold.core.errors import InputError, unknown_name
from trifold.demo.choices import Choices
from trifold.demo.documents import CAST, CLOSING, OPENING, Story, bracket_line, sum_line, sums
from trifold.demo.facts import facts

COUNT = 200  # questions of a task


class Question(NamedTuple):
    """`choices[answer]` is what follows `query` and a space."""

    query: str
    choices: list[str]
    answer: int


def fact_question(choices: Choices) -> Question:
    """What is true of somebody or some town, among four values."""
    fact = choices.one_of([fact for subject in facts() for fact in subject])
    query, value = _cut(fact.say(fact.unseen))
    return _question(choices, query, value, choices.distinct(_without(fact.attribute.values, value), 3))


def arithmetic_question(choices: Choices) -> Question:
    """A sum after two others, among four results that differ in a digit."""
    known = set(sums(unseen=False))
    lines = [sum_line(*choices.one_of(sums(unseen=True))) for _ in range(2)]
    asked = choices.one_of([each for each in sums(unseen=True) if each not in known])
    query, value = _cut("\n".join([*lines, sum_line(*asked)]))
    near = [int(value) + off for off in (-20, -10, -2, -1, 1, 2, 10, 20)]
    return _question(choices, query, value, choices.distinct([str(each) for each in near if each >= 0], 3))


def bracket_question(choices: Choices) -> Question:
    """How a line ends after its last opening bracket, when three or more are open; one bracket differs."""
    tail: list[str] = []
    while len(tail) < 3:
        text = "\n".join(bracket_line(choices) for _ in range(2))
        last = max(text.rindex(bracket) for bracket in OPENING if bracket in text)
        query, tail = text[: last + 1], text[last + 1 :].split()
    place = choices.between(0, len(tail) - 1)
    wrong = [[*tail[:place], bracket, *tail[place + 1 :]] for bracket in _without(CLOSING, tail[place])]
    other = (place + 1) % len(tail)
    wrong.append([*tail[:other], choices.one_of(_without(CLOSING, tail[other])), *tail[other + 1 :]])
    return _question(choices, query, " ".join(tail), [" ".join(each) for each in wrong])


def story_question(choices: Choices) -> Question:
    """Who has a thing at the end of a story, among four people, most of them in it."""
    story = Story(choices)
    for _ in range(choices.between(4, 14)):
        story.tell()
    thing = choices.one_of(story.things)
    holder, query = story.holder[thing], ", ".join([*story.clauses, f"{thing} with"])
    told = [person for person in CAST if person in query and person != holder]
    untold = _without(CAST, holder, *told)
    others = choices.distinct(told, len(told)) + choices.distinct(untold, len(untold))
    return _question(choices, query, holder, others[:3])


KINDS: dict[str, Callable[[Choices], Question]] = {
    "facts": fact_question,
    "arithmetic": arithmetic_question,
    "brackets": bracket_question,
    "stories": story_question,
}


def questions(task: str, count: int = COUNT) -> list[Question]:
    """The first `count` different questions of a task. Raises InputError for an unknown task."""
    if task not in KINDS:
        raise InputError(unknown_name("task", task, KINDS))
    found: dict[str, Question] = {}
    index = 0
    while len(found) < count:
        question = KINDS[task](Choices(f"question {task} {index}"))
        found.setdefault(question.query, question)
        index += 1
    return list(found.values())


def read_questions(task: str) -> list[Question]:
    """The questions of a task as the package ships them."""
    lines = (FOLDER / f"{task}.jsonl").read_text().splitlines()
    return [Question(**json.loads(line)) for line in lines]


def write_questions(folder: Path) -> None:
    """A `.jsonl` file for each task."""
    for task in KINDS:
        lines = [json.dumps(question._asdict()) + "\n" for question in questions(task)]
        (folder / f"{task}.jsonl").write_text("".join(lines))


def _question(choices: Choices, query: str, value: str, others: list[str]) -> Question:
    answer = choices.between(0, len(others))
    return Question(query, [*others[:answer], value, *others[answer:]], answer)


def _cut(text: str) -> tuple[str, str]:
    """A text without its last word, and that word."""
    head, _, word = text.removesuffix(".").rpartition(" ")
    return head, word


def _without(options: tuple[str, ...] | list[str] | str, *unwanted: str) -> list[str]:
    return [each for each in options if each not in unwanted]
