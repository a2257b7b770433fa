"""Shares an evaluation among the processes of `accelerate launch`, so that the result is that of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from convert.errors import ConvertError
from convert.evaluation.packages import require

T = TypeVar("T")
# How launchers say how many processes there are: torch's and accelerate's, then those of MPI.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_main() -> bool:
    """Whether this process is the one that reports; known once `join` was called."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the others.

    Args:
        rank: its number, from 0.
        count: how many there are.
        device: where it computes.
    """

    rank: int
    count: int
    device: str

    def gather(self, rows: list[T]) -> list[T]:
        """Collect the rows of all processes in each of them; their order says nothing."""
        if self.count == 1:
            return rows
        gathered: list[T] = require("accelerate.utils").gather_object(rows)
        return gathered

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            require("accelerate").PartialState().wait_for_everyone()


def join(device: str | None) -> Processes:
    """Find out where this process computes and which others there are.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; by default CUDA where there is a device, else the CPU.

    Raises:
        ConvertError: the device is unknown or absent; it is never replaced by another.
    """
    torch = require("torch")
    present: int = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = device or ("cuda" if present else "cpu")
    kind, _, number = chosen.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ConvertError(f"unknown device {chosen!r}, expected cpu, cuda or cuda:N", code="device", key=chosen)
    if kind == "cuda" and int(number or 0) >= present:
        raise ConvertError(f"device {chosen} was asked for, {present} CUDA devices are here", code="device", key=chosen)
    if all(int(os.environ.get(name, "1")) == 1 for name in COUNTS):
        return Processes(0, 1, chosen)
    # A process waits for the slowest: an hour, where torch gives up after some minutes.
    state: Any = require("accelerate").PartialState(cpu=kind == "cpu", timeout=timedelta(hours=1))
    return Processes(state.process_index, state.num_processes, str(state.device))


@contextmanager
def exact() -> Iterator[None]:
    """Compute without TF32, which rounds the factors of float32 products to 10 bits on CUDA devices."""
    torch = require("torch")
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
