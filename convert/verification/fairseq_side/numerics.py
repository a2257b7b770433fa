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
# bytes: where torch allocates. For a single frame, the matrix kernels of x86 processors add in an order that depends on the
# address, and the tensors of a mapped file start anywhere
ALIGNMENT = 64
CHUNK = 1 << 18  # numbers that are compared at a time: they stay in the processor's cache
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def crop(name: str, value: Any, frames: list[int]) -> Any:
    """Keep the valid frames of (batch, time, channels), one utterance after the other; what has no frames as it is."""
    if name.startswith("conv.") or value.dim() == 2:  # (batch, channels): pooled over the frames
        return value
    if name.startswith("decoder."):  # every row is a token's, and none is padding
        return value.reshape(-1, value.shape[-1])
    if name.startswith("generated"):
        return value
    rows = [value[index, :count] for index, count in enumerate(frames)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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
    sha = hashlib.sha256()
    for piece in chunks(value):
        piece = piece + 0 if piece.is_floating_point() else piece
        piece = piece.float() if piece.dtype == torch.bfloat16 else piece
        sha.update(piece.cpu().numpy().tobytes())
    return sha.hexdigest()


def step_of(name: str, count: int) -> int:
    """Every how many numbers one is kept: odd, so that it meets every channel."""
    return 1 if name in WHOLE else max(1, count // (SAMPLE * 8 if name == "encoder" else SAMPLE)) | 1


def distance(a: Any, b: Any) -> float:
    """The greatest absolute difference; infinite where a number is not finite."""
    return greatest(a, b)[0]


def greatest(a: Any, b: Any) -> tuple[float, int]:
    """The greatest absolute difference and where it is, counted along the rows; infinite where a number is not finite."""
    found, index, start = 0.0, 0, 0
    for one, other in zip(chunks(a), chunks(b)):
        apart = (one.double() - other.to(one.device).double()).abs_()
        worst = float(apart.max())
        worst = worst if worst == worst else float("inf")
        if worst > found:
            found, index = worst, start + int(apart.argmax())
        start += len(apart)
    return found, index


def finite(value: Any) -> bool:
    """Whether every number is: NaN and infinity are the least or the greatest of whatever they are among."""
    return all(bool(torch.isfinite(end)) for piece in chunks(value) for end in torch.aminmax(piece))


def chunks(value: Any) -> Any:
    """Walk through a tensor's numbers, flat, some of them at a time."""
    flat = value.reshape(-1)
    return (flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK))


def sinusoids(rows: int, width: int) -> Any:
    """The table of sinusoidal positions that a conversion writes: see `convert.pieces.sinusoids`."""
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
