"""What all tests share: no network, quiet libraries, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Ran

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small models, threads cost more than they bring
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below nohup, and by the product then too

pytest_plugins = ["hub_fixtures", "download_server"]  # fixtures: the Hub, the publisher, a model; a server of downloads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", default="1/1", help="run every n-th test file, such as 2/3: what `make test` starts at once"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = (int(word) for word in config.getoption("--part").split("/"))
    files = set(sorted({item.path for item in items})[number - 1 :: count])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in files])
    items[:] = [item for item in items if item.path in files]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Ran]:
    """Run a command three times, as text, with `--json` and with `-q`, and hold the three against each other.

    `again` prepares the next run, for commands that leave something behind.
    """

    def run(*words: Any, again: Callable[[], Any] = lambda: None) -> Ran:
        line = [sys.executable, "-m", "convert", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = [subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)]
        for flag in ("--json", "-q"):
            again()
            done.append(subprocess.run([*line, flag], cwd=tmp_path, capture_output=True, text=True, env=environment))
        text, as_json, quiet = done
        data = json.loads(as_json.stdout)
        assert text.returncode == as_json.returncode == quiet.returncode, (text, as_json, quiet)
        assert data["schema"] == 1 and data["command"] == words[0]
        assert data["ok"] == (text.returncode == 0)
        assert quiet.stdout == ""
        assert "Traceback" not in text.stderr + as_json.stderr + quiet.stderr
        if text.returncode == 2 or (text.returncode == 1 and not text.stdout):
            assert text.stderr.startswith("error: ") and data["problems"]
        return Ran(text.returncode, text.stdout, text.stderr, data)

    return run
