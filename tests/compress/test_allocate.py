"""A sparsity that layers share, divided by measured curves or by OWL, in a run that may be broken off."""

import json

import pytest

import trifold
from tests.helpers import contents, trifold_cli
from trifold.compress import journal, pipeline
from trifold.compress.recipe import Recipe
from trifold.core.errors import RecipeError

SMALL = {"nsamples": 8, "seqlen": 32, "verbosity": -1}


def shares(report, kind="sparsity"):
    return {name: entry[kind] for name, entry in report["layers"].items()}


def weights(report, folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    return {name: spec["shape"][0] * spec["shape"][1] for name, spec in config.items()}


@pytest.mark.parametrize("by", ["curves", "owl", "uniform"])
@pytest.mark.parametrize("method", ["wanda", "gqsa"])
def test_the_whole_is_as_sparse_as_was_asked(tmp_path, tiny, text, by, method):
    options = {"global_sparsity": 0.5, "allocation": by}
    step = {"method": method, "options": options, **({"scheme": {"group_size": 4}} if method == "gqsa" else {})}
    report = trifold.compress(tiny(), {"steps": [step]}, text, tmp_path / "out", **SMALL)
    found, sizes = shares(report), weights(report, tmp_path / "out")
    mean = sum(found[name] * sizes[name] for name in found) / sum(sizes.values())
    assert mean == pytest.approx(0.5, abs=0.06 if method == "gqsa" else 0.03)
    blocks = {name.split(".")[2]: share for name, share in found.items()}
    if by == "uniform":
        assert max(found.values()) - min(found.values()) < 0.1
    elif by == "curves":
        assert max(found.values()) - min(found.values()) > 0.2
    else:
        assert len(set(blocks.values())) > 1


def test_what_loses_little_gives_up_more(tmp_path, tiny, text):
    def mean_error(name, **options):
        step = {"method": "wanda", "options": {"refit": False, **options}}
        return trifold.compress(tiny(), {"steps": [step]}, text, tmp_path / name, **SMALL)["mean_error"]

    assert mean_error("a", global_sparsity=0.5) < 0.95 * mean_error("b", sparsity=0.5)


def test_a_run_that_is_broken_off_keeps_its_division(tmp_path, tiny, text, monkeypatch):
    command = ("-r", "s50-wanda", "--set", "global_sparsity=0.4", "--calib", text)
    command = ("compress", tiny(), *command, "--nsamples", "8", "--seqlen", "32", "-o", tmp_path / "out")
    assert trifold_cli(*command)[0] == 0
    whole = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    write, calls = journal.Journal.write_block, []

    def broken(self, *args):
        write(self, *args)
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "write_block", broken)
    assert trifold_cli(*command)[0] == 130
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "journal" / "allocation.json").exists()
    monkeypatch.setattr(pipeline, "allocate_shares", lambda walk: 1 / 0)  # not measured again
    code, _, stderr = trifold_cli(*command)
    assert code == 0, stderr
    again = contents(tmp_path / "out")
    assert {k: v for k, v in again.items() if k != "report.json"} == {
        k: v for k, v in whole.items() if k != "report.json"
    }


def test_what_cannot_be_divided():
    with pytest.raises(RecipeError, match=r"sparsity=0.5 is of each layer and global_sparsity=0.4 of all.*leave one"):
        Recipe.load({"steps": [{"method": "wanda", "options": {"sparsity": 0.5, "global_sparsity": 0.4}}]})
    with pytest.raises(RecipeError, match=r"global_sparsity=1.5 is outside"):
        Recipe.load("s50-wanda").updated(["global_sparsity=1.5"])


def test_two_of_four_has_nothing_to_divide(tmp_path, tiny, text):
    step = {"method": "wanda", "options": {"pattern": "2:4", "global_sparsity": 0.5}}
    with pytest.raises(RecipeError, match=r"q_proj: global_sparsity=0.5 cannot be divided with pattern='2:4'"):
        trifold.compress(tiny(), {"steps": [step]}, text, tmp_path / "out", **SMALL)


def test_the_later_wish_wins():
    """`sparsity` of each layer and `global_sparsity` of all of them take each other's place."""

    def options(recipe, *settings):
        found = Recipe.load(recipe).updated(settings).steps[0].options
        return found["sparsity"], found["global_sparsity"]

    assert options("w4-s50-gqsa") == (0.5, None)
    assert options("w4-s50-gqsa", "global_sparsity=0.4") == (None, 0.4)
    assert options("w4-s50-gqsa", "gqsa.global_sparsity=0.4", "sparsity=0.3") == (0.3, None)
    assert options("w4-s50-gqsa", "global_sparsity=null") == (0.5, None)
    step = {"method": "wanda", "options": {"global_sparsity": 0.4}}
    step["overrides"] = [{"match": "*mlp*", "options": {"sparsity": 0.2}}]
    built = Recipe.load({"steps": [step]}).steps[0].build({"sparsity": 0.2})
    assert built.sparsity == 0.2 and built.budget is None
