"""The files around the product agree with each other: version, supported Pythons, tools."""

from __future__ import annotations

import re
from typing import Any

import yaml
from command_line import ROOT
from conftest import SECONDS, share

PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def workflow(name: str) -> Any:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))


def found(pattern: str, text: str) -> list[str]:
    values = re.findall(pattern, text, re.MULTILINE)
    assert values, pattern
    return values


def test_the_version_heads_the_changelog() -> None:
    (version,) = found(r'^VERSION = "(.*?)"', (ROOT / "convert/report.py").read_text("utf-8"))
    assert found(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"))[0] == version


def test_every_python_that_is_named_is_tested() -> None:
    named = found(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert workflow("test.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"] == named
    assert found(r'^requires-python = ">=(.*)"$', PROJECT) == named[:1]
    assert f"Python {named[0]} to {named[-1]}" in (ROOT / "README.md").read_text("utf-8")


def test_a_release_is_tested_first() -> None:
    jobs = workflow("release.yml")["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml"
    assert set(jobs["publish"]["needs"]) == {"test", "build"}


def test_commits_are_formatted_by_the_same_ruff() -> None:
    (rev,) = (repo["rev"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"])
    assert found(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text("utf-8")) == [rev.removeprefix("v")]


def test_make_runs_what_contributing_names() -> None:
    targets = set(found(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8")))
    named = found(r"`make ([a-z]+)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert set(named) <= targets


def test_every_file_of_tests_is_in_one_part() -> None:
    (count,) = {int(one) for one in found(r"--part \$\*/(\d+)", (ROOT / "Makefile").read_text("utf-8"))}
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    parts = [share(files, number, count) for number in range(1, count + 1)]
    assert sorted(path for part in parts for path in part) == files
    assert all(parts) and SECONDS.keys() <= {path.name for path in files}
