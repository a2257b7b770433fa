"""Damages a checkpoint in thousands of ways and converts each, in a process that has nothing else in it.

`python damage.py MUTATION CHECKPOINT FOLDER [OPTIONS]` prints how often each outcome was seen, as JSON, or the traceback of what
should never be seen. Address space is bounded a little above what the process holds after one undamaged conversion, so
that the bound is the same whatever ran before, and an allocation of a size that the file only claims is a `MemoryError`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickletools
import random
import resource
import shutil
import signal
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.package import compare_weights, convert

CASES = 150  # for each container, mutation and further kind of model: 2,550 in all
SECONDS = 10  # for one file, most of which take some milliseconds
BYTES = 32_000_000  # beyond what an undamaged conversion left; its buffers take 13 MB
# one arena and no pools: what is reserved is what is asked for
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
Mutation = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    """Change some bits anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Keep the beginning, more often a nearly whole one, or lose the beginning."""
    at = rng.choice((rng.randrange(len(data)), len(data) - rng.randrange(1, 200), rng.randrange(64)))
    return data[at:] if rng.random() < 0.1 else data[:at]


def splice(rng: random.Random, data: bytes) -> bytes:
    """Copy, move, repeat or remove a piece."""
    start, to = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 4, 30, 300, 3000))]
    if rng.random() < 0.3:
        return data[:start] + data[start + len(piece) :]
    return data[:to] + piece * rng.choice((1, 1, 2)) + data[to + rng.choice((0, len(piece))) :]


def directory(rng: random.Random, data: bytes) -> bytes:
    """Damage the zip's directory or its end record."""
    start = data.index(b"PK\x01\x02")
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        out[rng.randrange(start, len(out))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(out)


def headers(rng: random.Random, data: bytes) -> bytes:
    """Damage a header before an entry."""
    starts = [at for at in range(len(data) - 4) if data[at : at + 4] == b"PK\x03\x04"]
    at = rng.choice(starts) + rng.randrange(30)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def tokens(rng: random.Random, pickle: bytes) -> bytes:
    """Remove, repeat, exchange or replace whole opcodes, or change an argument."""
    starts = [position for _, _, position in pickletools.genops(pickle)] + [len(pickle)]
    pieces = [pickle[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, other = rng.randrange(1, len(pieces)), rng.randrange(1, len(pieces))
        kind = rng.randrange(6)
        if kind == 0:
            del pieces[at]
        elif kind == 1:
            pieces.insert(at, pieces[other])
        elif kind == 2:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == 3:
            pieces[at] = bytes([rng.randrange(256)]) + pieces[at][1:]
        elif kind == 4:
            pieces.insert(at, rng.choice(ODD))
        elif len(pieces[at]) > 1:
            where = rng.randrange(1, len(pieces[at]))
            pieces[at] = pieces[at][:where] + bytes([rng.randrange(256)]) + pieces[at][where + 1 :]
    return b"".join(pieces)


def letters(rng: random.Random, pickle: bytes) -> bytes:
    """Change single bytes of the pickle, which mostly hits names and settings."""
    return flip(rng, pickle)


def values(rng: random.Random, pickle: bytes) -> bytes:
    """Put a value of another type or size where one stands, so that the pickle stays well formed."""
    found = [(op.name, position) for op, _, position in pickletools.genops(pickle)]
    starts = [position for _, position in found] + [len(pickle)]
    pieces = [pickle[a:b] for a, b in itertools.pairwise(starts)]
    places = [at for at, (name, _) in enumerate(found) if name in PUSHES]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.choice(places)
        pieces[at] = rng.choice(VALUES) if rng.random() < 0.7 else pieces[rng.choice(places)]
    return b"".join(pieces)


PUSHES = {
    "BINUNICODE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "EMPTY_TUPLE",
}
PUSHES |= {"EMPTY_DICT", "EMPTY_LIST"}
# fmt: off
VALUES = [
    b'N', b'\x88', b'\x89', b']', b'}', b')', b'\x8f', b'](K\x01e', b'(NNt', b'cos\npath\n', b'ctorch\nSize\n',
    b'K\x00', b'K\x03', b'J\xff\xff\xff\xff', b'J\xff\xff\xff\x7f', b'\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f',
    b'\x8a\t\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f', b'G\x7f\xf8\x00\x00\x00\x00\x00\x00',
    b'G\x7f\xf0\x00\x00\x00\x00\x00\x00', b'G\x00\x00\x00\x00\x00\x00\x00\x01', b'X\x00\x00\x00\x00',
    b'X\x04\x00\x00\x00${a}', b'X\x03\x00\x00\x00\xed\xa0\x80', b'X\x02\x00\x00\x00\n\x1b',
    b'X\x0c\x00\x00\x00[(1,1,1)]*64', b'C\x02\xff\x00',
]
# fmt: on
# fmt: off
ODD = [
    b'N', b'\x88', b']', b'}', b')', b'(', b'0', b'1', b'2', b'\x8f', b'R', b'b', b'\x81', b'Q', b's', b'u', b'a',
    b'e', b'K\xff', b'J\xff\xff\xff\xff', b'J\xff\xff\xff\x7f', b'\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f',
    b'G\x7f\xf8\x00\x00\x00\x00\x00\x00', b'X\x04\x00\x00\x00${a}', b'X\x03\x00\x00\x00\xed\xa0\x80',
    b'X\xff\xff\xff\x7f', b'cos\nsystem\n', b'cbuiltins\ndict\n', b'h\x01', b'\x85', b'\x86', b'\x87', b't', b'q\x01',
    b'\x82\x01', b'I1\n', b'F1e400\n', b"S'x'\n", b'\x95\xff\xff\xff\xff\xff\xff\xff\xff',
]
# fmt: on


def in_zip(mutation: Mutation) -> Mutation:
    """Change data.pkl and write the zip anew, its CRC right, so that the change reaches the unpickler."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, mutation(rng, content) if name.endswith("data.pkl") else content)
        return made.getvalue()

    return mutate


def in_legacy(mutation: Mutation) -> Mutation:
    """Change the pickle that holds the model, the fourth of a legacy file."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        stream = io.BytesIO(data)
        ends = [0]
        for _ in range(4):
            list(pickletools.genops(stream))
            ends.append(stream.tell())
        return data[: ends[3]] + mutation(rng, data[ends[3] : ends[4]]) + data[ends[4] :]

    return mutate


MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "zip-flip": ("zip", flip),
    "zip-truncate": ("zip", truncate),
    "zip-splice": ("zip", splice),
    "zip-directory": ("zip", directory),
    "zip-headers": ("zip", headers),
    "zip-tokens": ("zip", in_zip(tokens)),
    "zip-letters": ("zip", in_zip(letters)),
    "zip-values": ("zip", in_zip(values)),
    "legacy-truncate": ("legacy", truncate),
    "legacy-splice": ("legacy", splice),
    "legacy-tokens": ("legacy", in_legacy(tokens)),
    "legacy-letters": ("legacy", in_legacy(letters)),
    "legacy-values": ("legacy", in_legacy(values)),
}


PICKLED = "zip-letters,zip-values,zip-tokens,zip-flip,zip-splice"


class _HangError(BaseException):
    pass


def _hang(*_: object) -> None:
    raise _HangError(f"more than {SECONDS} seconds")


def outcome(data: bytes, folder: Path, options: dict[str, Any]) -> str:
    """Convert a damaged file with some options; anything but a verified success or a clean refusal raises."""
    path, out = folder / "damaged.pt", folder / "model"
    path.write_bytes(data)
    signal.alarm(SECONDS)
    try:
        convert(path, out, **options)
        assert compare_weights(path, out) == []
        shutil.rmtree(out)
        found = "converted"
    except ConvertError as error:
        assert error.status in (1, 2)
        assert all(problem.code and problem.detail for problem in error.problems)
        assert error.code != "threads", "no memory for a thread's stack"
        found = error.code
    finally:
        signal.alarm(0)
    left = sorted(entry.name for entry in folder.iterdir())
    assert left == ["damaged.pt"], f"left behind: {left}"
    assert threading.active_count() == 1, f"left behind: {threading.enumerate()}"
    return found


def main(name: str, checkpoint: str, folder: str, options: str = "{}") -> None:
    """Run the cases of one mutation, or of several, which stand between commas and take turns."""
    mutations, original = [MUTATIONS[one][1] for one in name.split(",")], Path(checkpoint).read_bytes()
    asked = json.loads(options)
    os.fsync = lambda descriptor: None  # the disk need not be waited for
    threading.stack_size(8 << 20)  # whatever this machine's limit is
    signal.signal(signal.SIGALRM, _hang)
    assert outcome(original, Path(folder), asked) == "converted"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        try:
            data = mutations[case % len(mutations)](random.Random(f"{name} {case}"), original)
            outcomes[outcome(data, Path(folder), asked)] += 1
        except BaseException:
            print(f"{name}, case {case}:", file=sys.stderr)
            raise
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
