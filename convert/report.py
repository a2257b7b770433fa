"""The one place that formats: folded key lists, sizes, errors, and the single JSON object of a command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from convert.errors import ConvertError, Problem

SCHEMA = 1
_NUMBER = re.compile(r"(?<![^. ])\d+(?![^. ])")


def fold(keys: Iterable[str]) -> list[str]:
    """Fold keys that differ in numbers only, such as `layers.{0...11}.fc1.weight`.

    Example:
        >>> fold(["layers.0.fc1", "layers.1.fc1", "layers.2.fc1", "proj"])
        ['layers.{0...2}.fc1', 'proj']
        >>> fold(["a.0 -> b.0", "a.1 -> b.1"])
        ['a.{0,1} -> b.{0,1}']
    """
    groups: dict[str, list[list[int]]] = {}
    for key in dict.fromkeys(keys):
        groups.setdefault(_NUMBER.sub("{}", key.replace("{", "{{").replace("}", "}}")), []).append(
            [int(number) for number in _NUMBER.findall(key)]
        )
    folded = []
    for template, rows in groups.items():
        columns = list(zip(*rows, strict=True))
        total = 1
        for column in set(columns):  # a number that stands there twice counts once
            total *= len(set(column))
        if total == len(rows):  # the rows are a full grid, so that columns can be folded one by one
            folded.append(template.format(*(_numbers(sorted(set(column))) for column in columns)))
        else:
            folded.extend(template.format(*row) for row in rows)
    return folded


def _numbers(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)) and len(values) > 2:
        return f"{{{values[0]}...{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def size(count: int) -> str:
    """Write a number of bytes for people, in powers of 1000.

    Example:
        >>> size(1_269_737_156)
        '1.27 GB'
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """One line for each problem, those that differ only in the key folded into one."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        grouped.setdefault((problem.code, problem.detail), []).append(problem.key)
    lines = []
    for (code, detail), keys in grouped.items():
        lines += [f"{code}: {key}: {detail}" if key else f"{code}: {detail}" for key in fold(keys)]
    return lines


def error_text(error: ConvertError) -> str:
    """Write an error as the command line shows it: the sentence, all problems, the remedy."""
    lines = [f"error: {error.message}"]
    if [problem.detail for problem in error.problems] != [error.message]:
        lines += [f"  {line}" for line in problem_lines(error.problems)]
    if error.hint:
        lines += ["", f"hint: {error.hint}"]
    return "\n".join(lines)


def envelope(command: str, ok: bool, problems: Iterable[Problem] = (), **data: Any) -> str:
    """Write the one JSON object of a command; `data` follows the fixed fields."""
    rows = [{"code": problem.code, "key": problem.key, "detail": problem.detail} for problem in problems]
    head: dict[str, Any] = {"schema": SCHEMA, "command": command, "ok": ok, "problems": rows}
    text = json.dumps(head | data, indent=2, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # a path may be no valid text


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Write a JSON file's bytes the way every file of a model directory is written: sorted keys, UTF-8, one newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
