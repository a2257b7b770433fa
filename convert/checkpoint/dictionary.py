"""fairseq's `Dictionary` (`fairseq/data/dictionary.py`): symbols in the order of their ids, with their counts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeGuard

from convert.checkpoint.beside import read_beside
from convert.checkpoint.sentencepiece import CONTROL, SentencePieceModel, read_model
from convert.checkpoint.stored import Stub
from convert.errors import CheckpointError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A vocabulary.

    Args:
        symbols: the symbol of every id, special symbols included.
        counts: how often each was seen; only kept for the way back.
        special: the names of `bos`, `pad`, `eos` and `unk`; empty for a classification dictionary, which has none; without
            `unk` for the pieces of a sentencepiece model, which prints it.
    """

    symbols: tuple[str, ...]
    counts: tuple[int, ...]
    special: tuple[str, ...] = SPECIAL

    @property
    def labels(self) -> Dictionary:
        """What a file holds beside the special symbols, which come with every file: a classification dictionary."""
        return Dictionary(self.symbols[len(self.special) :], self.counts[len(self.special) :], ())

    def __len__(self) -> int:
        return len(self.symbols)


def is_dictionary(value: object) -> TypeGuard[Stub]:
    """Say whether an unpickled object is a dictionary: fairseq's class, one made of it, or a copy under another name."""
    state = value.state if isinstance(value, Stub) else None
    return isinstance(state, dict) and "symbols" in state and ("indices" in state or "count" in state)


def from_symbols(symbols: Sequence[str], name: str) -> Dictionary:
    """Make a dictionary of its symbols alone, special ones first."""
    return _checked(symbols, [1] * len(symbols), SPECIAL if tuple(symbols[:4]) == SPECIAL else (), name)


def from_pickle(value: object, name: str) -> Dictionary | None:
    """Read a pickled `fairseq.data.dictionary.Dictionary`; `None` when the value is something else.

    Args:
        value: the unpickled object.
        name: the file's name, for errors.

    Raises:
        CheckpointError: `corrupted-dictionary`, when its symbols are not a list of distinct texts.
    """
    if not is_dictionary(value):
        return None
    state = value.state
    symbols, counts = state.get("symbols"), state.get("count")
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        raise _corrupted(name, "its symbols are not a list of texts")
    numbers = isinstance(counts, list) and all(type(n) is int and -(2**63) <= n < 2**63 for n in counts)
    if not isinstance(counts, list) or not numbers or len(counts) != len(symbols):
        counts = [1] * len(symbols)
    words = [state.get(f"{word}_word") for word in ("bos", "pad", "eos", "unk") if f"{word}_index" in state]
    special = tuple(word for word in words if isinstance(word, str) and word in symbols[:4])
    return _checked(symbols, counts, special, name)


def from_file(path: Path) -> Dictionary:
    """Read a `dict.*.txt` file the way `fairseq.data.Dictionary.load` does, or the pieces of a sentencepiece `.model`.

    Each line is `token count`, split at its last space, with an optional ` #fairseq:overwrite`; the four special
    symbols come first.

    Args:
        path: the file, UTF-8.

    Raises:
        CheckpointError: `bad-dictionary`, with the line's number.
    """
    if path.suffix == ".model":
        return of_pieces(read_model(read_beside(path, "sentencepiece model", partial(_bad, path))), path)
    symbols, counts, seen = list(SPECIAL), [1] * len(SPECIAL), set(SPECIAL)
    try:
        # line ends as Python reads a text file's
        text = io.TextIOWrapper(io.BytesIO(read_beside(path, "dictionary", partial(_bad, path))), "utf-8").read()
    except UnicodeDecodeError:
        raise _bad(path, "is not a text file in UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.rstrip():
            continue
        token, _, count = line.rstrip().rpartition(" ")
        overwrite = count == "#fairseq:overwrite"
        if overwrite:
            token, _, count = token.rpartition(" ")
        if not (count.isascii() and count.isdigit() and len(count) < 19) or not token:
            raise CheckpointError(
                f"{path.name}, line {number}: `token count` expected, {line[:40]!r} found",
                code="bad-dictionary",
                key=path.name,
                hint=_HINT,
            )
        if token in seen and not overwrite:
            raise CheckpointError(
                f"{path.name}, line {number}: {token!r} is a duplicate",
                code="bad-dictionary",
                key=path.name,
                hint="fairseq refuses it too, unless the line ends with #fairseq:overwrite",
            )
        symbols.append(token)
        seen.add(token)
        counts.append(int(count))
    return _checked(symbols, counts, SPECIAL, path.name)


def of_pieces(model: SentencePieceModel, path: Path) -> Dictionary:
    """Make a dictionary of a sentencepiece model's pieces.

    Raises:
        CheckpointError: `bad-dictionary`: it has none, as it is something else.
    """
    if not model.pieces:
        raise _bad(path, "is not a sentencepiece model")
    control = {piece for piece, kind in zip(model.pieces, model.kinds, strict=True) if kind == CONTROL}
    special = tuple(piece for piece in model.pieces[: len(SPECIAL)] if piece in SPECIAL and piece in control)
    return _checked(model.pieces, [1] * len(model.pieces), special, path.name)


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name} {what}", code="bad-dictionary", key=path.name, hint=_HINT)


def _checked(symbols: Sequence[str], counts: Sequence[int], special: tuple[str, ...], name: str) -> Dictionary:
    if any("\ud800" <= letter <= "\udfff" for symbol in symbols for letter in symbol):
        raise _corrupted(name, "a symbol is not valid text")
    return Dictionary(tuple(symbols), tuple(counts), special)


def _corrupted(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name}: the dictionary inside is damaged: {why}", code="corrupted-dictionary", key=name)


_HINT = "pass the dict.*.txt that the model was trained with, or its tokenizer's .model"
