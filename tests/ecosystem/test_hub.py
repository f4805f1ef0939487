"""The hub, faked at its border: what is pushed, when, and what the model card says; ids with revisions."""

import json
import pathlib
import types

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import trifold
from tests.helpers import save_model, trifold_cli
from trifold.compress.card import Card, read_evaluation
from trifold.compress.files import model_folder
from trifold.core.errors import CheckpointError, InputError, ResourceError

RECIPE = {"steps": [{"method": "rtn", "scheme": {"bits": 4, "group_size": 32, "scale_dtype": "float16"}}]}
FRONT = "---\nlicense: mit\nlanguage: [en]\nwidget: x\n---\n\n# The dense model\n"


class FakeHub:
    """Takes the place of HfApi. calls: in order. fails: the name of the call that does not work."""

    calls = None
    fails = None
    error = OSError("no route to host")

    def _called(self, name, **said):
        if name == self.fails:
            raise self.error
        self.calls.append((name, said))

    def whoami(self):
        self._called("whoami")

    def create_repo(self, repo, exist_ok):
        self._called("create_repo", repo=repo, exist_ok=exist_ok)
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        files = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        self._called("upload_folder", repo=repo_id, files=files, never=ignore_patterns)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_model(
        tmp_path_factory.mktemp("hub") / "dense", "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1
    )
    (folder / "README.md").write_text(FRONT)
    return folder


@pytest.fixture(scope="module")
def fold(dense):
    trifold.compress(dense, RECIPE, None, dense.parent / "out", verbosity=-1)
    return dense.parent / "out"


def test_compress_pushes_the_finished_checkpoint(tmp_path, dense, hub):
    report = trifold.compress(dense, RECIPE, None, tmp_path / "out", verbosity=-1, push_to_hub="me/small")
    assert report["pushed_to"] == "https://huggingface.co/me/small"
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    said = hub.calls[-1][1]
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= said["files"]
    assert "*.bin" in said["never"] and "*.pkl" in said["never"]
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "mit" and head["language"] == ["en"] and "widget" not in head
    assert "# me/small" in card and 'trifold.load("me/small")' in card and "The dense model" not in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["steps"][0]["scheme"]["bits"] == 4


def test_the_export_is_what_is_pushed_if_there_is_one(tmp_path, dense, hub):
    report = trifold.compress(
        dense, RECIPE, None, tmp_path / "out", verbosity=-1, export_to="gptq_v2", push_to_hub="me/small"
    )
    assert report["export"]["pushed_to"].endswith("me/small")
    assert [name for name, _ in hub.calls].count("upload_folder") == 1
    assert "quantize_config.json" in hub.calls[-1][1]["files"]
    assert "# me/small" in (tmp_path / "out-gptq_v2" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"to": "awq", "engine": "sglang"}, "sglang does not run it"),
        ({"to": "int-quantized", "evaluation": "absent.json"}, "absent.json: cannot be read"),
        ({"to": "q"}, "unknown export format"),
        ({"to": "awq", "push_to_hub": "no name"}, "no name of a repository"),
    ],
)
def test_nothing_is_pushed_when_anything_failed_before(tmp_path, fold, hub, options, reason):
    with pytest.raises(InputError, match=reason):
        trifold.export(fold, output=tmp_path / "out", **{"push_to_hub": "me/small", **options})
    assert {name for name, _ in hub.calls} <= {"whoami"} and not list(tmp_path.iterdir())


def test_a_failed_proof_is_not_pushed(tmp_path, dense, hub, monkeypatch):
    from trifold.compress import pipeline

    def fail(*_):
        raise trifold.core.errors.ProofError("no")

    monkeypatch.setattr(pipeline, "prove", fail)
    with pytest.raises(trifold.core.errors.ProofError):
        trifold.compress(dense, RECIPE, None, tmp_path / "out", verbosity=-1, push_to_hub="me/small")
    assert [name for name, _ in hub.calls] == ["whoami"]


def answer(status):
    error = HfHubHTTPError.__new__(HfHubHTTPError)  # whose arguments changed with the releases
    error.response = types.SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("fails", "error", "kind", "reason"),
    [
        ("whoami", answer(401), InputError, "the hub refuses the token; run `hf auth login` again"),
        ("whoami", answer(503), ResourceError, "the hub does not answer"),
        ("whoami", LocalTokenNotFoundError("none"), InputError, "not logged in; run `hf auth login`, or set HF_TOKEN"),
        ("whoami", OSError("no route"), ResourceError, r"the hub does not answer \(no route\)"),
        ("upload_folder", OSError("cut off"), ResourceError, r"did not take it \(cut off\); .*out is whole: hf upload"),
    ],
)
def test_a_hub_that_does_not_answer(tmp_path, fold, hub, monkeypatch, fails, error, kind, reason):
    monkeypatch.setattr(hub, "fails", fails)
    monkeypatch.setattr(hub, "error", error)
    with pytest.raises(kind, match=reason):
        trifold.export(fold, "awq", tmp_path / "out", push_to_hub="me/small")
    assert (tmp_path / "out" / "config.json").exists() == (fails == "upload_folder")


def test_offline_is_said_before_any_work(tmp_path, fold):
    code, _, stderr = trifold_cli("export", fold, "--to", "awq", "-o", tmp_path / "out", "--push-to-hub", "me/small")
    assert code == 2 and "HF_HUB_OFFLINE is set" in stderr and not list(tmp_path.iterdir())


def test_the_card_has_the_evaluation_and_the_engines(tmp_path, fold, text):
    options = ("--text", text, "--seqlen", 16, "--max-windows", 2, "--baseline", fold, "--no-speed", "-q")
    assert trifold_cli("eval", fold, *options, "--json", tmp_path / "eval.json")[0] == 0
    scores = json.loads((tmp_path / "eval.json").read_text())
    trifold.export(fold, "compressed-tensors", tmp_path / "out", evaluation=tmp_path / "eval.json")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity | {scores['perplexity']:.4f} | {scores['baseline']['perplexity']:.4f} |" in card
    assert "KL to the dense model" in card and "vllm serve PATH" in card
    assert "sglang" not in card  # whose kernels want multiples of 128 inputs
    assert 'config.quantization_config["dequantize"] = True' in card  # it has zero-points


def test_a_card_with_tasks_of_lm_eval():
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "arc", "sample_len": 3}
    dense = {"arc": {"acc,none": 0.53, "acc_stderr,none": 0.02}}
    found = {"results": {"arc": scores}, "trifold": {"baseline": {"lm_eval": {"results": dense}}}}
    card = Card(None, "org/dense@v2", "awq", ("gptqmodel",), {}, evaluation=found).text()
    assert "| arc | acc | 0.5000 ± 0.0100 | 0.5300 ± 0.0200 |" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/dense"
    assert 'GPTQModel.load("PATH' in card and "vllm" not in card


def test_a_file_that_is_no_evaluation(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="no evaluation; give what `trifold eval --json` wrote"):
        read_evaluation(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "given", "revision"),
    [("a/b", None, None), ("a/b@v1", None, "v1"), ("a/b", "v2", "v2"), ("a/b@refs/pr/3", None, "refs/pr/3")],
)
def test_an_id_with_a_revision(tmp_path, monkeypatch, name, given, revision):
    def snapshot(repo, revision, ignore_patterns):
        assert repo == "a/b" and "*.bin" in ignore_patterns
        return str(tmp_path / str(revision))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert model_folder(name, given) == pathlib.Path(tmp_path / str(revision))


def test_pickles_are_never_read(tmp_path, dense):
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    for call in (trifold.load, lambda folder: trifold.compress(folder, RECIPE, None, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"pickled weights .* are never read: convert them to safetensors"):
            call(tmp_path)
