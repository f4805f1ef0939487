"""The little world: its text is seeded, its splits are apart, and its probabilities are those it claims."""

import json
import math
import re
from collections import Counter

import pytest

from trifold.core.embedded import TEXTS
from trifold.core.errors import InputError
from trifold.demo import documents as kinds
from trifold.demo.choices import Choices
from trifold.demo.documents import CAST, DEPTH, FOLLOW, PAIRS, THINGS, sums
from trifold.demo.facts import facts
from trifold.demo.texts import FILES
from trifold.demo.world import document, documents

FACTS = 320 * 6 + 16 * 3
LOG2, LOG3 = math.log(2), math.log(3)


# -- choices -------------------------------------------------------------------------------------------------


def test_the_nats_of_a_stream_are_those_worked_out_by_hand():
    choices = Choices("seed")
    choices.one_of("abcd")
    assert choices.nats == pytest.approx(math.log(4))
    choices.between(3, 7)
    assert choices.nats == pytest.approx(math.log(20))
    choices.distinct("abcde", 3)
    assert choices.nats == pytest.approx(math.log(20 * 5 * 4 * 3))
    before = choices.nats
    flipped = choices.flip(0.25)
    assert choices.nats - before == pytest.approx(-math.log(0.25 if flipped else 0.75))
    before = choices.nats
    assert choices.one_of(["only"]) == "only" and choices.nats == before


def test_choices_come_as_often_as_they_claim():
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    choices = [Choices(f"{index}") for index in range(4000)]
    drawn = Counter(each.weighted(weights) for each in choices)
    for option, weight in weights.items():
        share = weight / 8
        assert abs(drawn[option] - 4000 * share) < 4.5 * math.sqrt(4000 * share * (1 - share))
    mean = sum(each.nats for each in choices) / 4000  # the entropy of (1/8, 1/4, 5/8)
    assert mean == pytest.approx(0.125 * 3 * LOG2 + 0.25 * 2 * LOG2 + 0.625 * math.log(1.6), abs=0.03)


def test_distinct_takes_nothing_twice_and_every_order():
    orders = Counter(tuple(Choices(f"{index}").distinct("abc", 2)) for index in range(1200))
    assert set(orders) == {(a, b) for a in "abc" for b in "abc" if a != b}
    assert min(orders.values()) > 140  # of 200


# -- documents -----------------------------------------------------------------------------------------------


def test_documents_are_numbered_and_the_same_each_time():
    every = list(documents("train", 30))
    assert every == list(documents("train", 30))
    assert every[10:15] == list(documents("train", 5, start=10))
    assert every[7] == document("train", 7) != document("heldout", 7)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match=r"'validation'.*calibration"):
        document("validation", 0)


def test_no_document_is_in_two_splits():
    seen = {split: {each.text for each in documents(split, 6000)} for split in ("train", "calibration", "heldout")}
    assert all(len(texts) == 6000 for texts in seen.values())
    assert len(set.union(*seen.values())) == 18000
    assert min(each.nats for each in documents("train", 6000)) > 18  # so that a repetition is next to impossible


def test_training_text_keeps_out_what_heldout_text_asks():
    unseen = {fact.say(fact.unseen) for subject in facts() for fact in subject}
    held_sums = set(sums(unseen=True)) - set(sums(unseen=False))
    assert 0.08 < len(held_sums) / len(sums(unseen=True)) < 0.12
    held_lines = {kinds.sum_line(*each) for each in held_sums}
    found = {}
    for split in ("train", "calibration", "heldout"):
        pieces = Counter(
            piece for each in documents(split, 3000) for piece in re.split(r"\n|(?<=[.]) ", each.text) if piece
        )
        found[split] = (len(unseen & pieces.keys()), len(held_lines & pieces.keys()))
    assert found["train"] == found["calibration"] == (0, 0)
    assert min(found["heldout"]) > 100


def test_every_fact_can_be_told_from_its_sentence():
    every = [fact for subject in facts() for fact in subject]
    sentences = [fact.say(form) for fact in every for form in range(5)]
    assert len(every) == FACTS and len(set(sentences)) == len(sentences) == 5 * FACTS
    assert all(sentence.endswith(f" {fact.value}.") for fact, sentence in zip(every, sentences[::5], strict=True))


def test_the_embedded_texts_are_the_first_documents_of_their_splits():
    for split, (file, count) in FILES.items():
        records = [json.loads(line) for line in file.read_text().splitlines()]
        expected = list(documents(split, count))
        assert [record["text"] for record in records] == [each.text for each in expected]
        assert [record["nats"] for record in records] == pytest.approx([each.nats for each in expected])
    assert set(TEXTS.values()) == {file for file, _ in FILES.values()}


# -- probabilities, read off the text by code that knows nothing of the generator's choices -----------------------


def nats_of_facts(text, unseen):
    told = {fact.say(form): (subject, fact, form) for subject in facts() for fact in subject for form in range(5)}
    sentences = re.split(r"(?<=\.) ", text)
    nats, subject = math.log(5), None
    for sentence in sentences:
        if sentence in told:
            nats -= math.log(1 - FOLLOW) if subject else 0
            subject, fact, form = told[sentence]
            assert unseen or form != fact.unseen
            nats += math.log(FACTS) + math.log(5 if unseen else 4)
        else:
            assert sentence in [fact.follow() for fact in subject]
            nats += -math.log(FOLLOW) + math.log(len(subject))
    assert 4 <= len(sentences) <= 8
    return nats


def nats_of_sums(text, unseen):
    lines = text.split("\n")
    for line in lines:
        a, sign, b, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line).groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert (int(a), sign, int(b)) in sums(unseen)
    return math.log(5) + len(lines) * math.log(len(sums(unseen)))


def nats_of_brackets(text, _unseen):
    nats = math.log(5)
    for line in text.split("\n"):
        open_, used = [], 0
        for bracket in line.split():
            free = 0 < len(open_) < DEPTH and used < PAIRS
            nats += LOG2 if free else 0
            if bracket in "([{":
                open_.append(bracket)
                used += 1
                nats += LOG3
            else:
                assert open_.pop() + bracket in ("()", "[]", "{}")
        assert used == PAIRS and not open_
    return nats


def nats_of_story(text, _unseen):
    clauses = [re.fullmatch(r"(\w+) (to|with) (\w+)", clause).groups() for clause in text.removesuffix(".").split(", ")]
    holder = {thing: person for thing, word, person in clauses[:3] if word == "to"}
    assert len(holder) == 3 and holder.keys() <= set(THINGS)
    assert {person for _, _, person in clauses} <= set(CAST)
    nats = math.log(12 * 11 * 10) + 3 * math.log(12)
    nats += math.log(11)  # four to fourteen more clauses
    assert 7 <= len(clauses) <= 17
    for thing, word, person in clauses[3:]:
        assert (word == "with") == (holder[thing] == person)
        nats += LOG3 + LOG2 + (0 if word == "with" else math.log(11))
        holder[thing] = person
    return nats


def nats_of(text, unseen):
    """-log p of a document, from the text alone; also checks that the text is true and well formed."""
    if text[0].isdigit():
        return nats_of_sums(text, unseen) - math.log(0.2)
    if text[0] in "([{":
        return nats_of_brackets(text, unseen) - math.log(0.05)
    if text.partition(" ")[0] in THINGS:
        return nats_of_story(text, unseen) - math.log(0.3)
    return nats_of_facts(text, unseen) - math.log(0.45)


@pytest.mark.parametrize(("split", "unseen"), [("train", False), ("heldout", True)])
def test_the_nats_of_a_document_follow_from_its_text(split, unseen):
    for each in documents(split, 250):
        assert each.nats == pytest.approx(nats_of(each.text, unseen), rel=1e-9), each.text


def test_the_probabilities_of_all_bracket_lines_sum_to_one(monkeypatch):
    monkeypatch.setattr(kinds, "PAIRS", 2)
    lines = {}
    for index in range(600):
        choices = Choices(f"{index}")
        line = kinds.bracket_line(choices)
        assert lines.setdefault(line, choices.nats) == choices.nats
    assert len(lines) == 2 * 3**2  # shapes of two pairs, kinds of brackets
    assert math.fsum(math.exp(-nats) for nats in lines.values()) == pytest.approx(1)


def test_kinds_come_as_often_as_they_claim():
    firsts = Counter("sum" if each.text[0].isdigit() else each.text[0] in "([{" for each in documents("train", 4000))
    assert abs(firsts["sum"] - 800) < 4.5 * math.sqrt(4000 * 0.2 * 0.8)
    assert abs(firsts[True] - 200) < 4.5 * math.sqrt(4000 * 0.05 * 0.95)
