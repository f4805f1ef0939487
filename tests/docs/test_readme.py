"""README.md and CONTRIBUTING.md are true: their code runs, their commands parse, their presets exist."""

import importlib.util
import itertools
import re
import shlex
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from trifold.cli.main import cli
from trifold.compress.plan import make_plan
from trifold.compress.presets import STEPS, preset_names
from trifold.compress.recipe import Recipe
from trifold.core.method import METHODS, LayerProblem
from trifold.core.scheme import Scheme

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands():
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("trifold ")]


def test_the_python_example_runs_and_so_does_plain_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example, plain = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    numbers = [float(number) for number in capsys.readouterr().out.split("\n")[0].split()]
    bits, perplexity, dense, kl = numbers
    assert bits == 4.15625 and dense < perplexity < 1.05 * dense and 0 < kl < 0.02
    loaded = {}
    exec(compile(plain, "README.md", "exec"), loaded)
    with torch.no_grad():
        ids = names["prompt"]["input_ids"]
        assert torch.equal(loaded["model"](ids).logits, names["model"](ids).logits)


def test_every_preset_named_exists_and_every_listed_one_is_named():
    named = set(
        re.findall(r"(?<![\w-])(?:w\d+a\d+|(?:w\d+-)?s\d\d|rank\d\d|w\d-lr\d\d)(?:-[a-z][a-z0-9-]*)?\b", README)
    )
    assert named == set(preset_names())
    for name in named:
        recipe = Recipe.load(name)
        if recipe.steps[0].method in ("wanda", "sparsegpt", "gqsa", "reduced_rank", "svd_llm", "residual", "modegpt"):
            assert not recipe.data_free
            continue
        rounds_only = recipe.steps[-1].method in ("rtn", "hqq") and len(recipe.steps) == 1
        assert recipe.data_free == (rounds_only and not recipe.has_static_inputs)


def test_every_command_parses():
    found = commands()
    assert {arguments[1] for arguments in found} == set(cli.commands)
    for _, name, *arguments in found:
        cli.commands[name].make_context(name, arguments)


def test_the_recipe_and_the_settings_of_its_command(tiny):
    (text,) = blocks("yaml")
    recipe = Recipe.load(yaml.safe_load(text))
    (command,) = [arguments for arguments in commands() if "--set" in arguments]
    settings = [value for option, value in itertools.pairwise(command) if option == "--set"]
    changed = recipe.updated(settings)
    assert settings and changed != recipe
    config = AutoConfig.from_pretrained(tiny())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = make_plan(recipe, model, "model.layers").layers
    assert len(layers) == 14 and not any(".layers.0." in name for name in layers)
    assert {plan.scheme.bits for name, plan in layers.items() if name.endswith("down_proj")} == {8}
    assert {plan.scheme.bits for name, plan in layers.items() if not name.endswith("down_proj")} == {4}


def test_the_links_and_the_place_of_the_table():
    for mark in ("quality", "demo"):
        assert README.count(f"\n<!-- results:{mark} -->\n") == README.count(f"<!-- /results:{mark} -->") == 1
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/format.md", "docs/architecture.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_files_that_the_architecture_page_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = [ROOT / "trifold", ROOT / "trifold" / "compress", ROOT]
    for name in set(re.findall(r"`([\w/]+\.py)`", page)) - {"naive.py"}:
        assert any((folder / name).exists() for folder in folders), name
    for name in set(re.findall(r"`([\w/]+/)`", page)) - {"OUT.partial/"} - {"OUT.partial/journal/"}:
        assert any((folder / name).is_dir() for folder in folders), name


def test_the_method_of_the_contributing_page(tmp_path, monkeypatch):
    (example,) = blocks("python", (ROOT / "CONTRIBUTING.md").read_text())
    path = tmp_path / "weighted.py"
    path.write_text(example)
    spec = importlib.util.spec_from_file_location("weighted", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "weighted", module)
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    spec.loader.exec_module(module)
    assert "weighted" not in STEPS

    recipe = Recipe.load({"steps": [{"method": "weighted", "options": {"norm": 3}}]})
    assert not recipe.data_free and recipe.steps[0].build() == module.Weighted(3.0)
    assert recipe.updated(["norm=2"]).steps[0].build() == module.Weighted()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    x *= torch.randn(96, generator=generator).exp()
    weight = torch.randn(32, 96, generator=generator)
    problem = LayerProblem({"a": weight}, {"a": Scheme(3, 32)}, (x.T @ x).double())
    errors = {}
    for name, method in {"rtn": METHODS.get("rtn")(), "weighted": module.Weighted()}.items():
        difference = method.solve(problem).canonical["a"].dequantize() - weight
        errors[name] = float((x @ difference.T).square().sum())
    assert errors["weighted"] < 0.9 * errors["rtn"]
