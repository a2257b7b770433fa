"""`convert.interrupts`: Ctrl-C and the signals that end a process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from convert.interrupts import Interrupted, interruptible, shielded

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def test_a_step_is_not_divided() -> None:
    done = []
    with interruptible():
        with pytest.raises(Interrupted) as caught, shielded():
            signal.raise_signal(signal.SIGTERM)
            done.append("the rest")
        assert (done, caught.value.status) == (["the rest"], 143)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)  # the control
        done.append("never")
    assert done == ["the rest"]


def test_one_wish_is_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with interruptible():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a launcher sends both
        assert ended == []
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 4)
        signal.raise_signal(signal.SIGINT)  # who asks again after a while means it
    assert ended == [130]


def test_handlers_are_given_back_and_ignored_signals_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in SIGNALS]
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
            with shielded():
                signal.raise_signal(signal.SIGHUP)
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)
