import pytest


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one: what is chosen then."""
    monkeypatch.setattr("trifold.kernels.native.load", lambda variant, bits: "there is no C compiler")
    monkeypatch.setattr("trifold.kernels.weight_only.halves.lacking", lambda variant: "there is no C compiler")
