"""What a long run tells: lines in a file, one live line on a terminal, nothing when quiet."""

import io

import pytest
from rich.console import Console

from trifold.compress.progress import Reporter

ENTRY = {"error": 0.001, "bits_per_weight": 4.25}


def told(level, terminal):
    """Everything that a run of two blocks writes, the second after an interruption."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, color_system=None)
    reporter = Reporter(level, console)
    reporter.notice("going on [after] block 1")
    reporter.begin(2, 1)
    reporter.layer("layers.1.q", ENTRY)
    reporter.layer("layers.1.k", ENTRY | {"damping": {"diagonal": False, "dead": 3, "tries": 2, "ratio": 0.1}})
    reporter.block(1, 2, 1, 0.002)
    reporter.end()
    reporter.end()
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_levels(terminal):
    assert told(-1, terminal) == ""
    normal, verbose = told(0, terminal), told(1, terminal)
    for text in (normal, verbose):
        assert "going on [after] block 1" in text
        assert "layers.1.k: 3 inputs never differ from zero" in text and "damping raised to 0.1" in text
    assert "layers.1.q  error 1.000e-03  4.250 bits" in verbose
    assert "error 1.000e-03" not in normal


def test_a_file_gets_a_line_for_every_block():
    (line,) = [line for line in told(0, False).splitlines() if line.startswith("block ")]
    assert line.startswith("block 2/2  mean error 2.000e-03") and "ETA 0 s" in line and "peak memory" in line


def test_a_terminal_gets_a_bar_that_goes_away():
    text = told(0, True)
    assert "layers.1.k" in text and "block 2/2 loss 2.00e-03" in text and "mean error" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, then shown again
