"""Runs a function in a child process, and does something to it at its n-th step that touches the file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from convert.errors import ConvertError
from convert.interrupts import Interrupted, interruptible

# what the interpreter tells an audit hook, just before it does it
OF_PATHS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.listdir", "os.scandir"}
OTHERS = {"fcntl.flock", "ctypes.dlsym"}  # the latter comes before `renameat2`
FAILED, BROKEN = 3, 4


def in_child(work: Callable[[], object], hook: Callable[[int], object], place: Path) -> tuple[int, int]:
    """Run in a fork; return its exit status and how many steps it took.

    Args:
        work: what to run. Refusals and errors of the system end the child with `FAILED`, other exceptions with `BROKEN`,
            Ctrl-C, SIGTERM and SIGHUP with 128 and their number, as on the command line.
        hook: called before each step with its number, from 1.
        place: only what happens below this directory is a step.
    """
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            count = len(pipe.read())
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count
    count, armed, status = 0, True, 0

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        path = isinstance(arguments[0], str | bytes | os.PathLike) if arguments else False
        if armed and (event in OTHERS or (event in OF_PATHS and path and str(place) in os.fsdecode(arguments[0]))):  # type: ignore[arg-type]
            count += 1
            os.write(write, b".")
            hook(count)

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        sys.addaudithook(audit)
        with interruptible():
            work()
    except Interrupted as error:
        status = error.status
    except (OSError, ConvertError):
        status = FAILED
    except BaseException as error:  # noqa: BLE001
        sys.stderr.write(f"{error!r}\n")
        status = BROKEN
    finally:
        armed = False
        os._exit(status)
    raise AssertionError("unreachable")


def at_every_step(
    work: Callable[[], object], act: Callable[[], object], place: Path, prepare: Callable[[], object]
) -> Iterator[int]:
    """Yield the exit statuses of runs in which `act` happens before the first step, the second, ..., and never."""
    for last in range(1, 500):
        prepare()
        status, count = in_child(work, lambda number, last=last: act() if number == last else None, place)
        yield status
        if count < last:
            assert status == 0
            return
    raise AssertionError("it never ends")
