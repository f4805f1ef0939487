"""Settings and tiny models that the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family, **config) -> folder of a random model with a word tokenizer, made once a session."""
    from tests.helpers import save_model

    made = {}

    def make(family="llama", dtype=torch.float32, **config):
        key = (family, dtype, tuple(sorted(config.items())))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(family) / "model", family, dtype, **config)
        return made[key]

    return make


@pytest.fixture
def text(tmp_path):
    """A calibration file of 40 lines."""
    from tests.helpers import write_text

    return write_text(tmp_path / "calib.jsonl")
