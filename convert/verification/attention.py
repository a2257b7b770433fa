"""An attention for transformers' decoders that does fairseq's arithmetic, so that the bits can be compared."""

from __future__ import annotations

from typing import Any

NAME = "fairseq"


def register() -> str:
    """Make the attention known to transformers as `fairseq`, and return its name; `eager` where transformers takes none.

    fairseq hands self-attention to torch. Cross-attention it writes out: its keys and values stay the same for all tokens
    (`static_kv`), and `MultiheadAttention.forward` then leaves torch's function aside.
    """
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:  # transformers 4.52 and before
        return "eager"

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        if getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True):
            return _written_out(query, key, value, attention_mask, options["scaling"])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _written_out(query: Any, key: Any, value: Any, mask: Any, scaling: float) -> Any:
    """Compute attention as `MultiheadAttention.forward` does: (batch, heads, time, channels), a mask that is true to attend."""
    weights = (query * scaling) @ key.transpose(2, 3)
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    weights = weights.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights
