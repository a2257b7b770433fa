"""Convolutions in float64 a block of frames at a time: torch lays out the input of every frame, which takes gigabytes for a long one."""

from __future__ import annotations

from typing import Any

import torch

FRAMES = 4096  # of a block: those of 1.3 seconds


def in_blocks(layer: Any) -> None:
    """Let a layer around one convolution compute long inputs of float64 in blocks, if each of its frames depends on no other."""
    inner = [module for module in layer.modules() if isinstance(module, torch.nn.Conv1d)]
    over_time = any(isinstance(module, torch.nn.GroupNorm) for module in layer.modules())
    if len(inner) != 1 or over_time or inner[0].padding != (0,) or inner[0].dilation != (1,):
        return
    plain, kernel, stride = layer.forward, inner[0].kernel_size[0], inner[0].stride[0]

    def forward(source: Any, *others: Any) -> Any:
        frames = (source.shape[-1] - kernel) // stride + 1
        if source.dtype != torch.float64 or source.dim() != 3 or frames <= FRAMES:
            return plain(source, *others)
        made: Any = None
        for start in range(0, frames, FRAMES):
            end = min(start + FRAMES, frames)
            block = plain(source[..., start * stride : (end - 1) * stride + kernel], *others)
            if made is None:
                made = block.new_empty((*block.shape[:-1], frames))
            made[..., start:end] = block
        return made

    layer.forward = forward
