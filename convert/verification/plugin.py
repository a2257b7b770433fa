"""A pytest plugin: a repository of converted models asserts in a few lines that they are what they were made from.

    def test_my_model(assert_same_model):
        assert_same_model("checkpoint_best.pt", "my-model", reference="reference.safetensors")

Options: `--fairseq-python PYTHON`, `--fairseq-reference FILE` and `--fairseq-device NAME` are the defaults of every call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from convert.verification import Verification


class AssertSameModel(Protocol):
    """The fixture's type: `convert.verification.assert_identical`, with the command line's options as defaults."""

    def __call__(self, checkpoint: str | Path, model_dir: str | Path, **options: Any) -> Verification:
        """Raise unless the directory is the checkpoint's model; return what was found."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    group = parser.getgroup("fairseq-to-hf")
    group.addoption("--fairseq-python", metavar="PYTHON", help="an interpreter with torch and fairseq")
    group.addoption("--fairseq-reference", metavar="FILE", help="a recording of fairseq-to-hf record")
    group.addoption("--fairseq-device", action="append", default=[], metavar="NAME", help="such as cpu or cuda")


@pytest.fixture
def assert_same_model(request: pytest.FixtureRequest) -> AssertSameModel:
    """Return `convert.verification.assert_identical`, with the command line's options as defaults."""
    given = {"devices": request.config.getoption("--fairseq-device")}
    for option, name in (("--fairseq-python", "fairseq_python"), ("--fairseq-reference", "reference")):
        if request.config.getoption(option):
            given[name] = request.config.getoption(option)

    def check(checkpoint: str | Path, model_dir: str | Path, **options: Any) -> Verification:
        from convert.verification import assert_identical

        defaults = dict(given)
        if {"reference", "fairseq_python"} & set(options):  # the call chooses its own reference
            defaults = {"devices": given["devices"]}
        return assert_identical(checkpoint, model_dir, **defaults | options)

    return check
