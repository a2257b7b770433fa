"""Ctrl-C, SIGTERM and SIGHUP: one exception for all three, and steps that they do not interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 3.0  # seconds in which what follows the first signal is taken for the same wish, as a launcher repeats it


class Interrupted(KeyboardInterrupt):
    """The process was asked to end by a signal.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells give a process which a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the main thread at the first signal, so that everything is cleaned up.

    For the command line; a library leaves signals to the program that uses it. A signal that is ignored, as `nohup` does
    with SIGHUP, stays so. After `_PATIENCE`, a further signal ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] > _PATIENCE:
            os._exit(128 + number)
        if not first:
            first.append(time.monotonic())
            raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Hold signals back until a step is finished, so that it is done or not done, and never half done."""
    if threading.current_thread() is not threading.main_thread():  # signals raise in the main thread only
        yield
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
