"""Formatting: text from files, folded key lists, sizes, errors, JSON, and the JSON object of a command."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.errors import ConvertError, Problem

VERSION = "0.2.0"  # of this package; reading the installed one's metadata would take 20 ms
SCHEMA = 1
Progress = Callable[[int, int], None]  # called with what is done and what there is in all, from any thread
# a password may hold a slash that should have been escaped; after a port, a slash begins the path
_USER = re.compile(r"(?<=//)(?:[^/\s]*|[^/\s:@\[]*:(?!\d*/)\S*)@")
_NUMBER = re.compile(r"(?<![^. ])(?:0|[1-9][0-9]{0,17})(?![^. ])")


def shown(value: object, keep: str = "") -> str:
    """Write a value that may come from a file for people, on one line: what does not print is escaped.

    That is control characters, among them a terminal's escape codes and line ends, marks that turn the direction of
    writing, and bytes of a file name that are not text.

    Args:
        value: the value.
        keep: characters to leave as they are, such as the line ends of a text of several lines.

    Example:
        >>> shown("a\\x1b[31mb\\u202ec")
        'a\\\\x1b[31mb\\\\u202ec'
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def quoted(name: object) -> str:
    """Write a file's name for a shell to read, whatever it holds.

    Example:
        >>> quoted("my model.pt"), quoted("-x")
        ("'my model.pt'", './-x')
    """
    word = f"./{name}" if str(name).startswith("-") else str(name)
    if word.isprintable():
        return shlex.quote(word)
    letters = (letter if letter.isprintable() and letter not in "\\'" else _octets(letter) for letter in word)
    return f"$'{''.join(letters)}'"


def _octets(letter: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


def without_user(text: str) -> str:
    """Take user and password out of the addresses in a text.

    Example:
        >>> without_user("https://me:secret@example.org/a@b did not answer")
        'https://example.org/a@b did not answer'
    """
    return _USER.sub("", text)


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
        for column in set(columns):  # a number that is repeated counts once
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


def padding_text(one: Mapping[str, Any]) -> str:
    """Say what transformers makes of a padded batch of which fairseq counts other frames."""
    theirs, ours = (", ".join(map(str, one[f"{side}_frames"])) for side in ("fairseq", "transformers"))
    return (
        f"padded batches: of {', '.join(map(str, one['samples']))} samples fairseq counts {theirs} frames, and "
        f"transformers {ours}; {one['stage']} is up to {one['max_abs_difference']:.1e} off then, by design"
    )


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """One line for each problem, those that differ only in the key folded into one."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        grouped.setdefault((problem.code, problem.detail), []).append(problem.key)
    lines = []
    for (code, detail), keys in grouped.items():
        lines += [shown(f"{code}: {key}: {detail}" if key else f"{code}: {detail}") for key in fold(keys)]
    return lines


def error_text(error: ConvertError) -> str:
    """Write an error as the command line shows it: the sentence, all problems, the remedy."""
    lines = [f"error: {shown(error.message)}"]
    if [problem.detail for problem in error.problems] != [error.message]:
        lines += [f"  {line}" for line in problem_lines(error.problems)]
    if error.hint:
        lines += ["", f"hint: {shown(error.hint)}"]
    return "\n".join(lines)


def envelope(command: str, ok: bool, problems: Iterable[Problem] = (), **data: Any) -> str:
    """Write the one JSON object of a command; `data` follows the fixed fields."""
    rows = [problem.row for problem in problems]
    head: dict[str, Any] = {"schema": SCHEMA, "command": command, "ok": ok, "problems": rows}
    return b"".join(_encoded(head | data)).decode()


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Write a JSON file's bytes the way every file of a model directory is written: sorted keys, UTF-8, one newline."""
    return b"".join(json_pieces(value))


def json_pieces(value: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the same in pieces: the record of a model of 1,000 languages has 45 MB."""
    yield from _encoded(value, sort_keys=True)
    yield b"\n"


def _encoded(value: object, sort_keys: bool = False) -> Iterator[bytes]:
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, sort_keys=sort_keys)
    pieces = encoder.iterencode(value if _is_finite(value) else _finite(value))
    while batch := "".join(itertools.islice(pieces, 10_000)):
        yield batch.encode("utf-8", "backslashreplace")  # a file's name may be no valid text


def _is_finite(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite(value: object) -> object:
    """Write the numbers that JSON does not have as texts: `NaN`, `Infinity`, `-Infinity`."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(content: bytes, name: str, made: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON that somebody else may have written.

    Args:
        content: the bytes.
        name: where they come from, for the error.
        made: makes what stands for an object of its keys and values; by default a dict.

    Raises:
        ConvertError: `not-json`: not UTF-8, not JSON, nested too deeply, or a number too long.
    """
    from convert.errors import ConvertError

    try:
        return json.loads(content.decode(), object_pairs_hook=made)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConvertError(f"{name}: not JSON: {reason}", code="not-json", key=name) from None


def library(version: str) -> str:
    """Name the library that a reference was, by what a report keeps of it: fairseq's version alone, or another's with its name.

    Example:
        >>> library("0.12.2")
        'fairseq 0.12.2'
    """
    return version if version.startswith("fairseq") else f"fairseq {version}"


@contextlib.contextmanager
def progress_bar(label: str, *, show: bool) -> Iterator[ProgressBar | None]:
    """Show a progress bar on stderr, if it is a terminal; elsewhere yield `None`, and be silent.

    Args:
        label: the command, or what is done.
        show: whether to show one at all.
    """
    if not (show and sys.stderr.isatty()):
        yield None
        return
    with contextlib.ExitStack() as stack:
        yield ProgressBar(label, stack)


class ProgressBar:
    """A progress bar that appears with the first news; its methods may be called from any thread.

    Args:
        label: what stands before it.
        stack: ends it.
    """

    def __init__(self, label: str, stack: contextlib.ExitStack) -> None:
        import threading

        self._label, self._stack, self._bar, self._lock = label, stack, None, threading.Lock()

    def _started(self) -> Any:
        import click

        if self._bar is None:  # not before: the bar of a download may come first
            bar: Any = click.progressbar(
                length=1000,
                label=self._label,
                file=sys.stderr,
                item_show_func=lambda item: None if item is None else shown(item),
            )
            self._bar = self._stack.enter_context(bar)
        return self._bar

    def __call__(self, done: int, total: int) -> None:
        """Show how much is done; what is known of the total may change."""
        with self._lock:
            bar = self._started()
            step = done * 1000 // max(total, 1) - bar.pos
            if step > 0:
                bar.update(step)

    def doing(self, what: str) -> None:
        """Show what is done next."""
        with self._lock:
            bar = self._started()
            bar.current_item = what
            bar.render_progress()


def counted(progress: Progress | None, total: int, done: int = 0) -> Callable[[int], None]:
    """Make what adds numbers of bytes to those that were done, and tells a progress of them."""

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(min(done, total), total)

    return advance
