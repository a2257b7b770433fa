"""The devices to verify on, and torch's settings meanwhile: TF32 off, deterministic algorithms on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from convert.errors import ConvertError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def available() -> list[str]:
    """List the devices here: the CPU, then every CUDA device."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def choose(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Choose the devices.

    Args:
        wanted: as torch names them; empty for the CPU and every CUDA device.

    Returns:
        The devices, and what was not there, with the reason.

    Raises:
        ConvertError: `no-device`, status 2: a device that was asked for is not there.
    """
    there = available()
    if not wanted:
        return there, {} if len(there) > 1 else {"cuda": "no CUDA device here"}
    chosen = []
    for name in wanted:
        full = "cuda:0" if name == "cuda" else name
        if full not in there:
            raise ConvertError(
                f"{name}: no such device here; there are {', '.join(there)}",
                code="no-device",
                key=name,
                hint="run it where the device is, or leave --device out",
            )
        chosen.append(full)
    return list(dict.fromkeys(chosen)), {}


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute without TF32, which rounds the factors of float32 products to 10 bits on CUDA devices."""
    import torch

    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Compute without TF32 and with deterministic algorithms; afterwards everything is as before."""
    import torch

    workspace = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS is deterministic with a fixed workspace only
    filled: Any = torch.utils.deterministic
    kept = torch.backends.cudnn.benchmark, torch.get_deterministic_debug_mode(), filled.fill_uninitialized_memory
    torch.backends.cudnn.benchmark = False
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports the compiler first: seconds
    filled.fill_uninitialized_memory = False  # else a model's memory is all written, before its weights are mapped
    try:
        with without_tf32():
            yield
    finally:
        torch.backends.cudnn.benchmark = kept[0]
        torch.set_deterministic_debug_mode(kept[1])
        filled.fill_uninitialized_memory = kept[2]
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def describe(devices: Sequence[str], attention: Any) -> dict[str, Any]:
    """Describe the surroundings: versions, threads, devices, the model's attention, and what was switched on and off."""
    import numpy
    import torch
    import transformers

    from convert.verification.fairseq_side.numerics import environment

    found: dict[str, Any] = environment()
    found |= {"transformers": transformers.__version__, "numpy": numpy.__version__, "system": platform.system()}
    found |= {
        "tf32": False,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention": attention,
    }
    cudnn: Any = torch.backends.cudnn
    for name in devices:
        if name != "cpu":
            found[name] = torch.cuda.get_device_name(name)
            found |= {"cuda": torch.version.cuda, "cudnn": str(cudnn.version())}
    return found
