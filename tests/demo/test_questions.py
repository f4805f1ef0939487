"""The questions are well posed, their answers true, their wording unseen, and lm-eval reads them from anywhere."""

import json
import re

import pytest

from trifold.core.embedded import NAME, TASKS
from trifold.core.errors import InputError
from trifold.demo.documents import CAST, sum_line, sums
from trifold.demo.facts import facts
from trifold.demo.questions import COUNT, KINDS, Question, questions, read_questions
from trifold.demo.score import accuracy, choice_scores
from trifold.demo.world import documents


@pytest.fixture(scope="module")
def every():
    return {task: questions(task) for task in KINDS}


def test_the_embedded_questions_are_those_of_the_generator(every):
    for task, some in every.items():
        assert read_questions(task) == some
    assert sum(file.stat().st_size for file in TASKS.iterdir() if file.is_file()) < 400_000


def test_questions_differ_and_so_do_their_choices(every):
    for some in every.values():
        assert len({each.query for each in some}) == COUNT
        sizes = {len(set(each.choices)) for each in some}
        assert sizes == {4}
        for place in range(max(sizes)):  # the answer stands everywhere
            assert sum(each.answer == place for each in some) > COUNT / max(sizes) / 2


def test_fact_questions_are_true_and_use_the_unseen_form(every):
    unseen = {fact.say(fact.unseen): fact for subject in facts() for fact in subject}
    for each in every["facts"]:
        fact = unseen[f"{each.query} {each.choices[each.answer]}."]
        assert set(each.choices) <= set(fact.attribute.values)


def test_sums_are_right_and_kept_out_of_training(every):
    kept = {sum_line(*each) for each in set(sums(unseen=True)) - set(sums(unseen=False))}
    assert all(f"{each.query} {each.choices[each.answer]}".split("\n")[-1] in kept for each in every["arithmetic"])


def test_one_choice_alone_balances_the_brackets(every):
    def balanced(text):
        text = text.replace(" ", "")
        while text != (text := re.sub(r"\(\)|\[\]|\{\}", "", text)):
            pass
        return not text

    for each in every["brackets"]:
        lines = [f"{each.query} {choice}".split("\n")[-1] for choice in each.choices]
        assert [balanced(line) for line in lines] == [place == each.answer for place in range(4)]
        assert all(len(line.split()) == 12 for line in lines)


def test_a_story_says_who_has_the_thing(every):
    for each in every["stories"]:
        *told, asked = (clause.split() for clause in each.query.split(", "))
        holder = {thing: person for thing, _, person in told}  # the last one counts
        assert asked == [asked[0], "with"] and each.choices[each.answer] == holder[asked[0]]
        assert set(each.choices) <= set(CAST)


def test_no_question_is_in_the_text_it_was_learned_from(every):
    text = "\n\n".join(each.text for each in documents("train", 5000))
    for some in every.values():
        assert not [each.query for each in some if f"{each.query} {each.choices[each.answer]}" in text]


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match=r"'fact'.*facts"):
        questions("fact")


@pytest.fixture(scope="module")
def dense():
    from trifold.api import load, load_tokenizer

    return load(NAME, dtype="float32"), load_tokenizer(NAME)


def test_scores_do_not_depend_on_batches(dense, every, monkeypatch):
    model, tokenizer = dense
    some = every["brackets"][:6] + every["facts"][:6]
    together = choice_scores(model, tokenizer, some)
    monkeypatch.setattr("trifold.demo.score.TOKENS", 1)  # each by itself
    for ours, alone in zip(together, choice_scores(model, tokenizer, some), strict=True):
        assert list(ours.values()) == pytest.approx([alone[choice] for choice in ours], abs=1e-4)


def test_a_score_is_the_log_probability_of_the_choice(dense):
    model, tokenizer = dense
    question = Question("36 + 9 =", ["45", "46", "7"], 0)
    scores = choice_scores(model, tokenizer, [question])[0]
    ids = tokenizer("36 + 9 = 46", return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0].log_softmax(-1)
    expected = logits[-3, ids[0, -2]] + logits[-2, ids[0, -1]]
    assert scores[1] == pytest.approx(expected.item(), abs=1e-4)


def test_lm_eval_finds_the_tasks_from_any_folder_and_agrees(dense, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    model, tokenizer = dense
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    found = lm_eval.simple_evaluate(
        wrapped, tasks=["trifold_world"], task_manager=manager, limit=30, bootstrap_iters=0, log_samples=False
    )["results"]
    ours = {task: accuracy(model, tokenizer, read_questions(task)[:30]) for task in KINDS}
    assert {task: found[f"trifold_{task}"]["acc,none"] for task in KINDS} == pytest.approx(ours)
    assert found["trifold_world"]["acc,none"] == pytest.approx(sum(ours.values()) / 4)
    assert {"acc_norm,none"} <= found["trifold_facts"].keys()


def test_the_questions_are_plain_json_lines():
    for file in TASKS.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert set(json.loads(line)) == {"query", "choices", "answer"}
