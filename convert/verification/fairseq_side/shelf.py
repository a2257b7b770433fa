"""Tensors in mapped temporary files without names, which the system can write out, and which disappear when nothing uses them."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

SMALL = 1 << 20  # bytes: what is smaller is kept in memory


def shelved(value: Any) -> Any:
    """Copy a tensor to keep it; in memory where it is small or on another device, or where there is no room on the disk."""
    size = value.numel() * value.element_size()
    if size < SMALL or value.device.type != "cpu":
        return value.clone()
    try:
        number, path = tempfile.mkstemp(prefix="fairseq-to-hf-")
        try:
            os.posix_fallocate(number, 0, size)  # a mapped file without room would end the process
            kept = torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype)
        finally:
            os.close(number)
            os.unlink(path)
    except (AttributeError, OSError, RuntimeError):
        return value.clone()
    dense = 1 + sum((count - 1) * step for count, step in zip(value.shape, value.stride())) == value.numel()
    return (kept.as_strided(value.shape, value.stride()) if dense else kept.view(value.shape)).copy_(value)
