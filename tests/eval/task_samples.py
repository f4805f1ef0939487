"""A folder of small local tasks, in words of the tests' tokenizer, and lm-eval run on it by hand."""

import json

import torch
import yaml

from tests.helpers import WORDS

MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    "metadata": {"version": 1.5},
}
TARGET = {
    "task": "target",
    "output_type": "loglikelihood",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", **MEAN},
    ],
}
ROLLING = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
GENERATE = {
    "task": "generate",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["w9"], "max_gen_toks": 5, "do_sample": False},
    "metric_list": [{"metric": "exact_match", **MEAN}],
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(w\\d+)"}, {"function": "take_first"}]}
    ],
}
BOTH = {
    "group": "both",
    "task": ["choice", "target"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


def write_documents(path, count=24, seed=4):
    """Questions of 4 to 40 words, each with three choices of 1 to 3 words."""
    generator = torch.Generator().manual_seed(seed)

    def words(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(2, len(WORDS), (length,), generator=generator).tolist())

    with path.open("w") as out:
        for number in range(count):
            document = {"question": words(4, 40), "choices": [words(1, 3) for _ in range(3)], "answer": number % 3}
            out.write(json.dumps(document) + "\n")


def write_task(folder, config, data="documents.jsonl"):
    """One YAML file whose data lies beside it, by relative path."""
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}}
    path = folder / f"{config.get('group') or config['task']}.yaml"
    path.write_text(yaml.safe_dump(config if "group" in config else {**local, **config}))
    return path


def write_tasks(folder):
    """`choice`, `target`, `rolling`, `generate`, and the group `both` of the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(folder / "documents.jsonl")
    for config in (CHOICE, TARGET, ROLLING, GENERATE, BOTH):
        write_task(folder, config)
    return folder
