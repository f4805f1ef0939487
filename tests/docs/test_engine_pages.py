"""The pages of engines: their commands run, in order; Python too, where what it needs is installed."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.ecosystem.test_peers import ALONE, peer
from tests.helpers import trifold_cli

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page for page in sorted((ROOT / "docs" / "engines").glob("*.md"))}
HERE = [name for name in PAGES if name != "llama.cpp"]  # that page has a test of its own
NEEDS = {"gptqmodel": "gptqmodel", "transformers": "compressed_tensors", "trifold": None}
QUICK = ("--nsamples", "4", "--seqlen", "32", "-q")


def blocks(name):
    """(language, code) of each block of a page."""
    return re.findall(r"```(bash|python)\n(.*?)```", PAGES[name].read_text(), re.DOTALL)


@pytest.mark.parametrize("name", HERE)
def test_the_blocks_of_a_page_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for language, code in blocks(name):
        if language == "python":
            module = NEEDS[re.search(r"(?:from|import) (\w+)", code)[1]]
            if module is None:
                exec(compile(code, name, "exec"), {})
            elif peer(module):
                done = subprocess.run([peer(module), "-c", code], capture_output=True, text=True, env=ALONE)
                assert done.returncode == 0, done.stderr[-2000:]
            continue
        for line in code.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] == ["trifold"]:
                code, _, stderr = trifold_cli(*command[1:], *(QUICK if command[1] == "compress" else ()))
                assert code == 0, (line, stderr)
                ran += 1
    assert ran >= 3


def test_engines_have_pages_and_links_lead_somewhere():
    assert {"vllm", "sglang", "transformers", "gptqmodel"} <= PAGES.keys()
    for page in PAGES.values():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_the_table_of_peers_is_what_was_measured():
    table = (ROOT / "benchmarks" / "results" / "peers.md").read_text()
    assert f"<!-- results:peers -->\n{table}<!-- /results:peers -->" in PAGES["gptqmodel"].read_text()


def test_the_tools_that_are_not_ours_are_named_as_they_are():
    """A command of a page is either ours, run above, or one of these."""
    known = {"trifold", "vllm", "pip", "python", "TRIFOLD_PEER_PYTHON=/path/to/python"}
    for name in HERE:
        for language, code in blocks(name):
            if language == "bash":
                assert {line.split()[0] for line in code.replace("\\\n", " ").splitlines()} <= known
