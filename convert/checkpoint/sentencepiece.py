"""Read a sentencepiece model (`sentencepiece_model.proto`, a protocol buffer) as data, without the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What decides how ids become text.

    Args:
        pieces: the text of every id.
        kinds: its type, such as `CONTROL`.
        ids: the ids of `unk`, `bos`, `eos` and `pad`; -1 for none.
        unk_surface: what an unknown piece becomes.
        dummy_prefix: whether a space is put before a text, and taken away again.
        extra_whitespace: whether spaces at a text's start are taken away.
    """

    pieces: tuple[str, ...]
    kinds: tuple[int, ...]
    ids: Mapping[str, int]
    unk_surface: str
    dummy_prefix: bool
    extra_whitespace: bool


def read_model(data: bytes) -> SentencePieceModel:
    """Read a `.model` file.

    Args:
        data: its content.

    Returns:
        The model; without pieces if the file is something else.
    """
    pieces: list[str] = []
    kinds: list[int] = []
    trainer: dict[int, bytes] = {}
    normalizer: dict[int, bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(value))
            pieces.append(entry.get(1, b"").decode("utf-8", "replace"))
            kinds.append(_varint(entry, 3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    # defaults of TrainerSpec and NormalizerSpec, where a file is silent
    ids = {name: _varint(trainer, number, default) for name, (number, default) in _IDS.items()}
    return SentencePieceModel(
        tuple(pieces),
        tuple(kinds),
        {name: index if index < len(pieces) else -1 for name, index in ids.items()},
        trainer.get(44, " \u2047 ".encode()).decode("utf-8", "replace"),
        _varint(normalizer, 3, 1) != 0,
        _varint(normalizer, 4, 1) != 0,
    )


_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}


def pieces(data: bytes) -> Iterator[str]:
    """List the pieces of a model, in the order of their ids; of another file, none or a few."""
    for number, value in _fields(data):
        if number == 1:
            yield dict(_fields(value)).get(1, b"").decode("utf-8", "replace")


def _varint(fields: Mapping[int, bytes], number: int, default: int) -> int:
    value = _number(fields[number], 0)[0] if number in fields else default
    return value if 0 <= value < 1 << 31 else -1  # a negative int32 takes ten bytes


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Walk the fields of a protocol buffer's message; stop where it is not one."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        lengths = {1: 8, 5: 4}
        if tag & 7 == 0:
            _, end = _number(data, at)
        else:
            length, at = _number(data, at) if tag & 7 == 2 else (lengths.get(tag & 7, -1), at)
            end = at + length
        if tag < 0 or not at <= end <= len(data):
            return
        yield tag >> 3, data[at:end]
        at = end


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint: the number, and where the next byte is; a number below zero where there is none."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * shift)
        if byte < 128:
            return value, at + shift + 1
    return -1, at - 1
