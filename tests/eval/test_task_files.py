"""Tasks by name, file and folder, and what cannot be one."""

import lm_eval.tasks.manager
import pytest
import yaml

from tests.eval.task_samples import BOTH, CHOICE, TARGET, write_documents, write_task, write_tasks
from trifold.core.errors import InputError
from trifold.eval import resolve_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("files") / "tasks")


@pytest.fixture(autouse=True)
def stock(tmp_path_factory, monkeypatch):
    """In place of lm-eval's own 14,000 tasks, which take long to read."""
    folder = tmp_path_factory.mktemp("stock")
    remote = {
        **CHOICE,
        "task": "arc_easy",
        "tag": "ai2_arc",
        "dataset_path": "allenai/ai2_arc",
        "dataset_name": "ARC-Easy",
    }
    (folder / "arc_easy.yaml").write_text(yaml.safe_dump(remote))
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(folder / "manager.py"))
    return folder


def roots(tasks):
    return [getattr(item, "task_name", None) or item.name for item in tasks.roots]


def test_all_of_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = resolve_tasks([folder])
    assert sorted(roots(tasks)) == ["both", "generate", "rolling"]  # the group brings the others
    assert sorted(tasks.tasks) == ["choice", "generate", "rolling", "target"]
    monkeypatch.chdir(folder.parent)
    assert sorted(roots(resolve_tasks(["tasks"]))) == sorted(roots(resolve_tasks(["./tasks/"]))) == sorted(roots(tasks))


def test_names_files_and_patterns(folder, monkeypatch):
    assert roots(resolve_tasks(["rolling", "choice"], [folder])) == ["rolling", "choice"]
    assert roots(resolve_tasks([folder / "choice.yaml", "rolling", "rolling"], [folder])) == ["choice", "rolling"]
    assert sorted(roots(resolve_tasks(["*o*i*"], [folder]))) == ["choice", "rolling"]
    for name in ("both", folder / "both.yaml"):
        tasks = resolve_tasks([name], [folder])
        assert roots(tasks) == ["both"] and list(tasks.tasks) == ["choice", "target"]
    monkeypatch.chdir(folder)
    assert roots(resolve_tasks(["choice.yaml"])) == ["choice"]


def test_data_lies_beside_the_file_or_below_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a" / "data").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    write_documents(tmp_path / "a" / "data" / "here.jsonl", 2)
    write_documents(tmp_path / "b" / "there.jsonl", 3)
    write_documents(tmp_path / "b" / "here.jsonl", 4)
    monkeypatch.chdir(tmp_path / "b")
    for data, count in (("data/here.jsonl", 2), ("data/*.jsonl", 2), (["data/here.jsonl"], 2), ("there.jsonl", 3)):
        path = write_task(tmp_path / "a", CHOICE, data)
        assert len(resolve_tasks([path]).tasks["choice"].eval_docs) == count
    write_documents(tmp_path / "a" / "here.jsonl", 5)
    path = write_task(tmp_path / "a", CHOICE, "here.jsonl")
    assert len(resolve_tasks([path]).tasks["choice"].eval_docs) == 5  # the file's folder comes first


def test_a_task_in_a_group_has_data_beside_it_too(tmp_path):
    write_documents(tmp_path / "documents.jsonl", 3)
    config = {**CHOICE, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "documents.jsonl"}}}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "mine", "task": [config]}))
    (task,) = resolve_tasks([tmp_path]).tasks.values()
    assert len(task.eval_docs) == 3


def test_templates_and_functions(tmp_path):
    write_documents(tmp_path / "documents.jsonl", 2)
    (tmp_path / "common.yaml").write_text(yaml.safe_dump({k: v for k, v in CHOICE.items() if k != "task"}))
    (tmp_path / "helpers.py").write_text("def shout(document):\n    return document['question'].upper()\n")
    (tmp_path / "mine.yaml").write_text(
        "include: common.yaml\ntask: mine\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: documents.jsonl}}\ndoc_to_text: !function helpers.shout\n"
    )
    task = resolve_tasks([tmp_path]).tasks["mine"]
    assert task.VERSION == 1.5 and task.doc_to_text(task.eval_docs[0]).startswith("W")


def test_a_file_comes_before_a_folder_and_a_folder_before_lm_eval(tmp_path, folder, stock):
    config = yaml.safe_load((folder / "choice.yaml").read_text())
    for place, version in ((stock, 7), (tmp_path, 8)):
        write_documents(place / "documents.jsonl", 2)
        write_task(place, {**config, "metadata": {"version": version}})
    versions = [
        resolve_tasks(*arguments).tasks["choice"].VERSION
        for arguments in ((["choice"],), (["choice"], [tmp_path]), ([folder / "choice.yaml"], [tmp_path]))
    ]
    assert versions == [7, 8, 1.5]
    with pytest.raises(InputError, match="task 'choice' is also defined in"):
        resolve_tasks([folder / "choice.yaml", tmp_path / "choice.yaml"])


def test_a_group_of_mine_may_hold_a_task_of_lm_evals(tmp_path, stock, folder):
    write_documents(stock / "documents.jsonl", 2)
    write_task(stock, {**TARGET, "task": "theirs"})
    (tmp_path / "group").mkdir()
    write_task(tmp_path / "group", {**BOTH, "group": "mixed", "task": ["theirs"]})
    tasks = resolve_tasks(["mixed"], [tmp_path / "group"])
    assert roots(tasks) == ["mixed"] and list(tasks.tasks) == ["theirs"]


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        (["chioce"], r"unknown task 'chioce'; did you mean choice\?"),
        (["arc_esay"], r"did you mean arc_easy"),
        (["zzzzzz"], r"unknown task 'zzzzzz'; `lm-eval ls tasks` lists"),
        (["zzz*"], r"unknown task 'zzz\*'"),
        ([], "no task is named"),
        (["choice", ""], "--tasks ''"),
        (["./absent"], "'./absent': no such file or folder"),
        (["absent.yaml"], "'absent.yaml': no such file or folder"),
        (["choice", "both"], "Duplicate task 'choice'.*name it once"),
        (
            ["arc_easy"],
            "'arc_easy': its dataset 'allenai/ai2_arc:ARC-Easy' cannot be had .*HF_HUB_OFFLINE.*; run it once",
        ),
    ],
)
def test_what_cannot_be_had(folder, names, fact):
    with pytest.raises(InputError, match=fact) as raised:
        resolve_tasks(names, [folder])
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_a_tag_of_tasks_without_data():
    with pytest.raises(InputError, match="'arc_easy': its dataset"):
        resolve_tasks(["ai2_arc"])


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("task: [unclosed", "not valid YAML"),
        ("- a\n- b\n", "Expected YAML dict"),
        ("task: mine\ninclude: absent.yaml\n", "absent.yaml"),
        ("output_type: multiple_choice\n", "names no `task:` or `group:`"),
        ("task: mine\noutput_type: guess\ndataset_path: json\n", "invalid output_type 'guess'"),
        ("group: wrong.yaml\ntask: [{dataset_path: json}]\n", "in group 'wrong.yaml'.*mend its definition"),
        ("task: [choice]\n", "names no `task:` or `group:`"),
        ("group: mine\ntask: [absent]\n", "unknown task 'absent'"),
        ("task: mine\ndataset_path: json\ndoc_to_text: !function nothing.here\n", "nothing"),
        ("task: mine\nunknown_key: 1\ndataset_path: json\n", "unknown_key"),
    ],
)
def test_a_wrong_file(tmp_path, text, fact):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=fact) as raised:
        resolve_tasks([path])
    assert "wrong.yaml" in str(raised.value) or "absent" in fact


@pytest.mark.parametrize(
    ("change", "data", "fact"),
    [
        ({}, "absent.jsonl", "its data cannot be read .*absent.jsonl"),
        ({}, "broken.jsonl", "mend its definition or data"),
        ({}, "empty.jsonl", "mend its definition or data"),
        ({"doc_to_target": "{{no_such_field}}"}, "documents.jsonl", "no_such_field"),
        ({"test_split": "exam"}, "documents.jsonl", "exam"),
        ({"unsafe_code": True}, "documents.jsonl", "runs code that a model wrote"),
        ({"doc_to_image": "picture"}, "documents.jsonl", "shows images"),
    ],
)
def test_a_wrong_definition(tmp_path, change, data, fact):
    write_documents(tmp_path / "documents.jsonl", 2)
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    (tmp_path / "empty.jsonl").write_text("")
    path = write_task(tmp_path, {**CHOICE, **change}, data)
    with pytest.raises(InputError, match=fact) as raised:
        resolve_tasks([path])
    assert "choice" in str(raised.value)


def test_folders_that_cannot_be(tmp_path, folder):
    with pytest.raises(InputError, match=r"--tasks-path .*absent: no such folder"):
        resolve_tasks(["choice"], [tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"a folder without \*.yaml"):
        resolve_tasks([tmp_path / "empty"])
    write_documents(tmp_path / "documents.jsonl", 2)
    write_task(tmp_path, CHOICE)
    (tmp_path / "again.yaml").write_text((tmp_path / "choice.yaml").read_text())
    with pytest.raises(InputError, match=r"choice.yaml: task 'choice' is also defined in .*again.yaml"):
        resolve_tasks([tmp_path])
    (tmp_path / "again.yaml").write_text("task: [")
    with pytest.raises(InputError, match=r"again\.yaml: not valid YAML"):
        resolve_tasks(["choice"], [tmp_path])
