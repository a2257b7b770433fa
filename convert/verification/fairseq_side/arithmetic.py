"""fairseq's arithmetic in other floating point types."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch


@contextlib.contextmanager
def nothing() -> Any:
    """Change nothing."""
    yield


def forget_positions(w2v: Any) -> None:
    """Let layers make their tables of positions anew: they keep them, whatever becomes of the model's type and weights."""
    for module in w2v.modules():
        if hasattr(module, "seq_len_cached"):
            module.seq_len_cached = 0
        elif type(module).__name__ == "RelPositionalEncoding":
            module.pe = None


@contextlib.contextmanager
def lifted(w2v: Any) -> Any:
    """Let `Fp32GroupNorm`, `Fp32LayerNorm` and fairseq's `gelu`, which compute in float32, compute in their input's type."""
    lifted = []
    for module in w2v.modules():
        if type(module).__name__ in ("Fp32GroupNorm", "Fp32LayerNorm"):
            module.forward = types.MethodType(getattr(type(module).__mro__[1], "forward"), module)  # noqa: B009
            lifted.append((module, "forward", None))
        elif getattr(getattr(module, "activation_fn", None), "__name__", "") == "gelu":
            lifted.append((module, "activation_fn", module.activation_fn))
            module.activation_fn = torch.nn.functional.gelu
    from fairseq import utils

    softmax = utils.softmax
    utils.softmax = lambda x, dim, onnx_trace=False: torch.nn.functional.softmax(x, dim=dim)
    try:
        yield
    finally:
        utils.softmax = softmax
        for module, name, value in lifted:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)
