"""What all tests share: no network, quiet libraries, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Ran

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small models, threads cost more than they bring
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below nohup, and by the product then too
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell script

pytest_plugins = ["hub_fixtures", "download_server"]  # fixtures: the Hub, the publisher, a model; a server of downloads


# about what the longest files take, in seconds of one core; the others take some seconds each
SECONDS = {
    "test_mutations.py": 300,
    "test_readme.py": 180,
    "test_large.py": 110,
    "test_environments.py": 150,
    "test_irregular.py": 60,
    "test_verify.py": 60,
    "test_saved.py": 60,
    "test_publish.py": 60,
    "test_data2vec.py": 30,
    "test_publish_faults.py": 40,
    "test_benchmarks.py": 100,
    "test_fuzz.py": 75,
    "test_held.py": 70,
    "test_examples.py": 55,
    "test_speech_to_text_verify.py": 50,
    "test_verify_reference.py": 50,
    "test_no_other_text.py": 40,
    "test_fuzz_directory.py": 40,
    "test_seq2seq.py": 40,
    "test_mms.py": 35,
    "test_conformer.py": 30,
    "test_inspect.py": 30,
    "test_fuzz_hub.py": 30,
    "test_fairseq2_folders.py": 30,
    "test_publish_families.py": 25,
    "test_evaluate_processes.py": 27,
    "test_hubert_faults.py": 20,
    "test_bombs.py": 20,
    "test_cli.py": 16,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="run one of n shares of the files, such as 2/6, as `make test` does")


def share(files: Iterable[Path], number: int, count: int) -> set[Path]:
    """Choose the files of one of several parts that take about as long as each other: the longest first."""
    parts: list[list[Path]] = [[] for _ in range(count)]
    taken = [0] * count
    for path in sorted(files, key=lambda path: (-SECONDS.get(path.name, 5), path)):
        at = taken.index(min(taken))
        parts[at].append(path)
        taken[at] += SECONDS.get(path.name, 5)
    return set(parts[number - 1])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    number, count = (int(word) for word in config.getoption("--part").split("/"))
    if count == 1 or not collection_path.name.startswith("test_"):
        return None
    return collection_path not in share((ROOT / "tests").rglob("test_*.py"), number, count) or None


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
