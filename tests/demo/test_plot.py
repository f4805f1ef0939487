"""The picture of the demo."""

import struct

import matplotlib

from trifold.demo.plot import draw


def row(recipe, method, bits, kl, accuracy):
    return {"recipe": recipe, "method": method, "bits_per_weight": bits, "kl": kl, "accuracy": accuracy}


RESULT = {
    "floor": 2.4,
    "chance": 0.3,
    "rows": [
        row("dense", "none", 16.0, 0.0, 0.97),
        row("w4a16-rtn", "rtn", 4.16, 0.02, 0.96),
        row("w2a16-rtn", "rtn", 2.14, 1.5, 0.4),
        row("w2a16-gptq", "gptq", 2.14, 0.3, 0.7),
        row("w1a16-rtn", "rtn", 1.14, None, 0.3),  # not finite
        row("w8a16-gptq", "gptq", 8.1, 0.0, 0.97),  # cannot stand on a logarithmic axis
    ],
}


def test_it_is_a_png_of_the_size_of_a_page_and_the_same_each_time(tmp_path):
    before = dict(matplotlib.rcParams)
    draw(RESULT, tmp_path / "a.png")
    draw(RESULT, tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1200 < width < 2400 and 0.3 < height / width < 0.7 and 20_000 < len(data) < 300_000
    assert data == (tmp_path / "b.png").read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_other_figures_give_another_picture(tmp_path):
    draw(RESULT, tmp_path / "a.png")
    changed = {**RESULT, "rows": [*RESULT["rows"][:-1], row("w8a16-gptq", "gptq", 8.1, 1e-4, 0.97)]}
    draw(changed, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
