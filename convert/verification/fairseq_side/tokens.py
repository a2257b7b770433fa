"""Dictionaries, and the tokens that decoders are given."""

from __future__ import annotations

from typing import Any

import torch

PAD = 1  # the id of fairseq's padding symbol


def dictionary_of(symbols: Any) -> Any:
    """fairseq's dictionary of these symbols, special ones included; of two that are alike, the last counts, as there."""
    from fairseq.data import Dictionary

    made = Dictionary()
    made.symbols = [str(symbol) for symbol in symbols]
    made.count = [1] * len(made.symbols)
    made.indices = {symbol: index for index, symbol in enumerate(made.symbols)}
    return made


def forced_tokens(symbols: int, positions: int) -> Any:
    """The tokens that decoders of both sides are given: the end of a sentence, as fairseq begins, then one after the other."""
    ordinary = [4 + (7 * index) % max(1, symbols - 4) for index in range(15)]
    return torch.tensor([[2, *ordinary][:positions]]).clamp(max=symbols - 1)


def generated_length(positions: int) -> int:
    """The most tokens that fairseq generates by default, the end of the sentence among them."""
    return min(200, positions - 1) + 1


def language_of(symbols: Any) -> Any:
    """The symbol that every text starts with where there are languages' tags: the first of them."""
    return next((index for index, symbol in enumerate(symbols) if symbol.startswith("<lang:")), None)
