"""Errors, each with the file or key that it is about, the remedy and the exit status; exceptions of other libraries become such errors."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from convert.report import shown, without_user

# package -> the extra of this one that brings it
_EXTRAS = {"matplotlib": "plot", "datasets": "evaluate", "jiwer": "evaluate", "tqdm": "evaluate"}
_EXTRAS |= dict.fromkeys(("safetensors", "sentencepiece", "soundfile", "torch", "transformers"), "verify")

_NUMBERS = re.compile(r"([0-9]{1,18})")  # longer ones take Python too long to read
_REMEDIES: dict[int | None, str] = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT), "free some space, or write to another disk"
)
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions, and those of its directory")
_REMEDIES |= {errno.EROFS: "name a place that can be written to"}
_REMEDIES |= {errno.EFBIG: "raise the limit (ulimit -f), or write to a file system that takes larger files"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why something was refused; of an address in it, the user and the password are left out.

    Args:
        code: a stable word for programs, such as `unexpected-tensor`.
        key: the tensor, setting, file or option the problem is about; empty when there is none.
        detail: what was expected and what was found, for people.
        hint: the remedy, where there is one.
    """

    code: str
    key: str
    detail: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("key", "detail", "hint"):
            object.__setattr__(self, name, without_user(getattr(self, name)))

    def __lt__(self, other: Problem) -> bool:
        """Sort by code, then by key, whose numbers count as numbers."""
        return self._rank() < other._rank()

    def _rank(self) -> tuple[object, ...]:
        words = [int(word) if index % 2 else word for index, word in enumerate(_NUMBERS.split(self.key))]
        return self.code, words, self.detail, self.hint

    @property
    def row(self) -> dict[str, str]:
        """The problem as JSON keeps it."""
        row = {"code": self.code, "key": self.key, "detail": self.detail}
        return row | ({"hint": self.hint} if self.hint else {})

    def __str__(self) -> str:
        return shown(f"{self.key}: {self.detail}" if self.key else self.detail)


class ConvertError(Exception):
    """The base of every error this package raises on purpose.

    Args:
        message: one sentence that says what, where, expected and found.
        code: the code of the single problem, when `problems` is not given.
        key: the key of the single problem.
        hint: the remedy, printed after a blank line; by default those of the problems.
        status: the exit status: 1 when the answer is no, 2 when there is no answer.
        problems: all reasons, when there are several.

    Example:
        >>> error = ConvertError("model.pt is empty", code="empty-file", key="model.pt", hint="download it again")
        >>> error.problems[0].code, error.status
        ('empty-file', 2)
    """

    default_status = 2

    def __init__(
        self,
        message: str,
        *,
        code: str,
        key: str = "",
        hint: str = "",
        status: int | None = None,
        problems: Iterable[Problem] = (),
    ) -> None:
        message = without_user(message)
        super().__init__(shown(message, keep="\n"))
        self.message = message
        self.code = code
        self.status = self.default_status if status is None else status
        self.problems = tuple(sorted(set(problems))) or (Problem(code, key, message),)
        self.hint = without_user(hint) or "; ".join(
            dict.fromkeys(problem.hint for problem in self.problems if problem.hint)
        )

    @property
    def reasons(self) -> tuple[Problem, ...]:
        """Its problems, to stand among those of another error; where none has a remedy, each has that of all."""
        if any(problem.hint for problem in self.problems):
            return self.problems
        return tuple(replace(problem, hint=self.hint) for problem in self.problems)


class CheckpointError(ConvertError):
    """The file cannot be read as a fairseq checkpoint (exit status 2)."""


class PlanError(ConvertError):
    """The checkpoint was understood and cannot be converted completely (exit status 1)."""

    default_status = 1


class MismatchError(ConvertError, AssertionError):
    """Two things that had to be the same are not (exit status 1)."""

    default_status = 1


@contextlib.contextmanager
def needing(command: str) -> Iterator[None]:
    """Name the extra that a function needs, where a package is missing.

    Args:
        command: the command of the function's name.

    Raises:
        ConvertError: `missing-package`.
    """
    try:
        yield
    except ImportError as error:
        raise explained(error, command) from error


@contextlib.contextmanager
def named_by(option: str) -> Iterator[None]:
    """Put the option that names a file before what is wrong with the file."""
    try:
        yield
    except (ConvertError, OSError) as raised:
        error = explained(raised)
        message, problems = f"{option}: {error.message}", error.problems
        if [problem.detail for problem in problems] == [error.message]:
            problems = (replace(problems[0], detail=message),)
        raise type(error)(message, code=error.code, hint=error.hint, status=error.status, problems=problems) from raised


def explained(error: BaseException, command: str = "") -> ConvertError:
    """Turn any exception into the error that the command line prints, with its exit status.

    Args:
        error: what was raised.
        command: the command that it ended, whose extra brings the packages that are missing.

    Example:
        >>> explained(RecursionError("maximum recursion depth exceeded")).message
        'something is nested too deeply to be read'
    """
    if isinstance(error, ConvertError):
        return error
    return next(make for kind, make in _OTHERS.items() if isinstance(error, kind))(error, command)


def _import(error: ImportError, command: str) -> ConvertError:
    name = (error.name or "").partition(".")[0]
    extra = "evaluate" if command == "evaluate" else _EXTRAS.get(name, "verify")
    missing = isinstance(error, ModuleNotFoundError) and name
    what = f"{name}, which is not installed" if missing else f"a package that cannot be imported: {_first_line(error)}"
    message = f"{command or 'this'} needs {what}"
    return ConvertError(message, code="missing-package", key=name, hint=f"pip install 'fairseq-to-hf[{extra}]'")


def _system(error: OSError, command: str) -> ConvertError:
    name = str(error.filename or "")
    reason = error.strerror or _first_line(error)
    return ConvertError(
        f"{name}: {reason}" if name else reason, code="system", key=name, hint=_REMEDIES.get(error.errno, "")
    )


def _interrupted(error: KeyboardInterrupt, command: str) -> ConvertError:
    number = getattr(error, "number", signal.SIGINT)
    message = f"interrupted by {signal.Signals(number).name}"
    return ConvertError(message, code="interrupted", status=128 + number)


def _memory(error: Exception, command: str) -> ConvertError:
    return ConvertError("not enough memory; nothing was written", code="memory")


def _recursion(error: Exception, command: str) -> ConvertError:
    return ConvertError("something is nested too deeply to be read", code="too-deep", hint="-v shows where")


def _other(error: Exception, command: str) -> ConvertError:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return _memory(error, command)
    message = f"{type(error).__name__}: {_first_line(error)}"
    hint = "this is a bug in fairseq-to-hf: please report it, with the output of -v"
    return ConvertError(message, code="unexpected", hint=hint)


def _first_line(error: Exception) -> str:
    return without_user(next(iter(str(error).strip().splitlines()), "without a message")[:500])


_OTHERS: dict[type[BaseException], Callable[..., ConvertError]] = {
    KeyboardInterrupt: _interrupted,
    ImportError: _import,
    OSError: _system,
    MemoryError: _memory,
    RecursionError: _recursion,
    Exception: _other,
}
