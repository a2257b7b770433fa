"""What can go wrong, each error with the file or key it is about, the remedy, and the exit status of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One reason why something was refused.

    Args:
        code: a stable word for programs, such as `unmapped-source`.
        key: the tensor, setting, file or option the problem is about; empty when there is none.
        detail: what was expected and what was found, for people.
    """

    code: str
    key: str
    detail: str

    def __str__(self) -> str:
        return f"{self.key}: {self.detail}" if self.key else self.detail


class ConvertError(Exception):
    """The base of every error this package raises on purpose.

    Args:
        message: one sentence that says what, where, expected and found.
        code: the code of the single problem, when `problems` is not given.
        key: the key of the single problem.
        hint: the remedy, printed after a blank line.
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
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.status = self.default_status if status is None else status
        self.problems = tuple(sorted(set(problems))) or (Problem(code, key, message),)


class CheckpointError(ConvertError):
    """The file cannot be read as a fairseq checkpoint (exit status 2)."""


class PlanError(ConvertError):
    """The checkpoint was understood and cannot be converted completely (exit status 1)."""

    default_status = 1


class MismatchError(ConvertError, AssertionError):
    """Two things that had to be the same are not (exit status 1)."""

    default_status = 1
