"""Numbers: types by name, digests, cuts, distances, and tables that both sides make alike."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from typing import Any

import numpy
import torch

SAMPLE = 512  # numbers kept of an inner stage in a recording, beside its SHA-256
WHOLE = {"logits", "pooled", "quantizer", "codes", "project_q", "project_hid"}  # outputs are kept entirely
WHOLE |= {"decoder.logits", "generated", "generated.second", "generated.margin"}
ALIGNMENT = 64  # bytes: where torch allocates
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def aligned(value: Any) -> Any:
    """Give a tensor an address as torch gives its own: those of a mapped file start anywhere.

    For a single frame, the matrix kernels of x86 processors add in an order that depends on it.
    """
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def crop(name: str, value: Any, frames: list[int]) -> Any:
    """Keep the valid frames of (batch, time, channels), one utterance after the other; what has no frames as it is."""
    if name.startswith("conv.") or value.dim() == 2:  # (batch, channels): pooled over the frames
        return value
    if name.startswith("decoder."):  # every row is a token's, and none is padding
        return value.reshape(-1, value.shape[-1])
    if name.startswith("generated"):
        return value
    return torch.cat([value[index, :count] for index, count in enumerate(frames)])


def same(value: Any) -> Any:
    """Return it as it is."""
    return value


def swap_last(value: Any) -> Any:
    """(batch, channels, time) -> (batch, time, channels)."""
    return value.transpose(1, 2)


def swap_first(value: Any) -> Any:
    """(time, batch, channels) -> (batch, time, channels)."""
    return value.transpose(0, 1)


def digest(value: Any) -> str:
    """SHA-256 of a tensor's numbers; -0.0 counts as 0.0."""
    value = value + 0 if value.is_floating_point() else value
    value = value.float() if value.dtype == torch.bfloat16 else value
    return hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest()


def step_of(name: str, count: int) -> int:
    """Every how many numbers one is kept: odd, so that it meets every channel."""
    return 1 if name in WHOLE else max(1, count // (SAMPLE * 8 if name == "encoder" else SAMPLE)) | 1


def distance(a: Any, b: Any) -> float:
    """The greatest absolute difference; infinite where a number is not finite."""
    if a.numel() == 0:
        return 0.0
    worst = (a.double() - b.double()).abs().max().item()
    return float(worst) if worst == worst else float("inf")


def sinusoids(rows: int, width: int) -> Any:
    """The table of sinusoidal positions that a conversion writes: see `convert.transfer.sinusoids`."""
    half = width // 2
    step = numpy.float32(-(numpy.log(10000) / (half - 1)))
    frequencies = numpy.exp((numpy.arange(half, dtype=numpy.float32) * step).astype(numpy.float64)).astype(
        numpy.float32
    )
    angles = (numpy.arange(rows, dtype=numpy.float32)[:, None] * frequencies).astype(numpy.float64)
    table = numpy.zeros((rows, width), numpy.float32)
    table[:, :half], table[:, half : 2 * half] = numpy.sin(angles), numpy.cos(angles)
    table[1] = 0
    return torch.from_numpy(table)


def environment() -> dict[str, Any]:
    """What bits depend on."""
    capability = "unknown"
    with contextlib.suppress(AttributeError):
        capability = torch.backends.cpu.get_cpu_capability()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": "%s %s" % (platform.machine(), capability),
    }
