"""The processes of `accelerate launch` that share an evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from convert.verification.devices import available, choose

T = TypeVar("T")
# How launchers pass the number of processes: torch's and accelerate's variable, then those of MPI.
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
        """Collect the rows of all processes in each of them, in no order."""
        if self.count == 1:
            return rows
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(rows)
        return gathered

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def join(device: str | None) -> Processes:
    """Choose this process's device and find the others.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; by default CUDA where there is a device, else the CPU.

    Raises:
        ConvertError: `no-device`: the device is not here; it is never replaced by another.
    """
    (chosen,), _ = choose([device or available()[:2][-1]])  # the CPU comes first, then CUDA devices
    if all(int(os.environ.get(name, "1")) == 1 for name in COUNTS):
        return Processes(0, 1, chosen)
    from accelerate import PartialState

    # A process waits for the slowest: an hour, where torch gives up after some minutes.
    state: Any = PartialState(cpu=chosen == "cpu", timeout=timedelta(hours=1))
    return Processes(state.process_index, state.num_processes, str(state.device))
