"""Read a pickle as data: a small stack machine that imports nothing, calls nothing, and allocates no more than it reads.

Python's own unpickler looks classes up and calls them; this one keeps every class as an inert `Stub` and understands only
the handful of constructors that torch, numpy and the standard library use to rebuild plain data (`torch._utils`,
`collections.OrderedDict`, `numpy.core.multiarray.scalar`, ...).
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert.checkpoint.constructors import MalformedError, checked_key, is_count, plain_set, rebuild, shared
from convert.checkpoint.container import release
from convert.checkpoint.stored import Global, Storage, StoredTensor, Stub
from convert.errors import CheckpointError
from convert.files import PIECE

Buffer = bytes | mmap.mmap


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a pickle holds.

    Args:
        value: the value.
        globals: every global it names.
        storages: every storage it names as a whole, by key, in use or not.
        end: the position after its last byte.
    """

    value: Any
    globals: frozenset[Global]
    storages: dict[str, Storage]
    end: int


_MARK = object()
# Limits far above what trainers write. Opcodes of a pickle: some, one more for every 32 bytes of the file, so that memory stays
# in proportion to it, and never more than the last number, however large a sparse file pretends to be. torch writes 33 for a
# tensor, and the largest file, MMS's of 1,162 languages, has 338,000 tensors and so 11 million.
_STEPS, _BYTES, _MOST = 1_000_000, 32, 24_000_000
# Elements handed to constructors beyond those that were read, sets, bytes of one number, bytes of all texts together.
_COPIES, _SETS, _NUMBER, _TEXTS = 1_000_000, 10_000, 256, 1 << 26
_PICKLE, _RECALLED = 1 << 28, 100_000  # bytes of a pickle that are searched, numbers of the memo that are told apart
_LONGEST = 11  # bytes of a GET
_LONG_GET = re.compile(rb"j(?=(.{4}))|g(?=(\d{1,9})\n)", re.DOTALL)


def load(data: Buffer, start: int, name: str, end: int | None = None) -> Loaded:
    """Read one pickle.

    Args:
        data: the whole file, whose size bounds the work and the memory.
        start: where the pickle starts.
        name: the file's name, for errors.
        end: where its bytes end; by default, with the file.

    Returns:
        Its value, and what it names.

    Raises:
        CheckpointError: `corrupted-pickle`, when the stream is not a pickle of plain data.
    """
    machine = _Machine(data, start, len(data) if end is None else end)
    try:
        value = machine.run(min(_STEPS + len(data) // _BYTES, _MOST))
    except (
        MalformedError,
        IndexError,
        struct.error,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
        RecursionError,
    ) as error:
        detail = (
            str(error) if isinstance(error, MalformedError) else f"{type(error).__name__} at byte {machine.position}"
        )
        raise CheckpointError(
            f"{name}: the pickle cannot be read: {detail}; nothing in it was executed",
            code="corrupted-pickle",
            key=name,
            hint="copy or download the file again; if it is whole, it is not a fairseq checkpoint",
        ) from None
    return Loaded(value, frozenset(machine.globals), machine.storages, machine.position)


class _Machine:
    def __init__(self, data: Buffer, start: int, end: int) -> None:
        self.data = data
        self.start = self.position = start
        self.end = end
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.used = start
        self.recalled = _recalled(data, start, end)
        self.globals: set[Global] = set()
        self.storages: dict[str, Storage] = {}
        self.copied = 0
        self.taken = 0
        self.sets = 0

    def run(self, steps: int) -> Any:
        data, table = self.data, _TABLE
        for _ in range(steps):
            if self.position >= self.end:
                raise MalformedError(f"it ends at byte {self.position} without its stop mark")
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise MalformedError(f"{len(self.stack)} values are left on the stack")
                return self.stack.pop()
            step = table.get(code)
            if step is None:
                raise MalformedError(f"opcode 0x{code:02x} at byte {self.position - 1} is not one that torch writes")
            step(self)
        raise MalformedError(f"more than {steps:,} steps, which no trainer writes")

    # Reading

    def take(self, count: int) -> bytes:
        if count < 0 or self.position + count > self.end:
            raise MalformedError(f"{count} bytes wanted at byte {self.position}, {self.end - self.position} are left")
        if count > _NUMBER:
            self.taken += count
            if self.taken > _TEXTS:
                raise MalformedError(f"more than {_TEXTS:,} bytes of text, which no trainer writes")
        piece = bytes(self.data[self.position : self.position + count])
        self.position += count
        return piece

    def byte(self) -> int:
        if self.position >= self.end:
            raise MalformedError(f"it ends at byte {self.position} without its stop mark")
        value = self.data[self.position]
        self.position += 1
        return value

    def number(self, count: int) -> int:
        piece = self.data[self.position : min(self.position + count, self.end)]
        if len(piece) < count:
            raise MalformedError(f"{count} bytes wanted at byte {self.position}, {len(piece)} are left")
        self.position += count
        return int.from_bytes(piece, "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.end)
        if end < 0:
            raise MalformedError(f"a line at byte {self.position} has no end")
        piece = self.take(end - self.position)
        self.position += 1
        return piece

    # The stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedError(f"a mark where a value was wanted, at byte {self.position}")
        return value

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise MalformedError(f"no mark before byte {self.position}")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise MalformedError(f"no value before byte {self.position}")
        return self.stack[-1]

    # Objects

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str) or not f"{module}{name}".isprintable():
            raise MalformedError(f"a global without a name at byte {self.position}")
        found = Global(module, name)
        self.globals.add(found)
        return found

    def make(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise MalformedError(f"a call of something that is not a global at byte {self.position}")
        # constructors copy: without a limit, a list that is named again and again would grow without being read again
        self.copied += sum(len(value) for value in args if isinstance(value, (str, bytes, list, tuple, dict, set)))
        if self.copied > _COPIES + self.position - self.start:
            raise MalformedError(f"a value that is copied again and again, at byte {self.position}")
        return rebuild(function, args)

    def persistent(self, identity: Any) -> Storage | Global:
        """`torch.serialization`'s persistent ids: ('storage', type, key, location, count[, view]), ('module', class, ...)."""
        if not isinstance(identity, tuple):
            raise MalformedError(f"a persistent id that is not a tuple at byte {self.position}")
        if len(identity) == 4 and identity[0] == "module" and isinstance(identity[1], Global):
            return identity[1]  # a class whose source the legacy layout keeps
        if len(identity) not in (5, 6) or identity[0] != "storage":
            raise MalformedError(f"a persistent id that is not a storage at byte {self.position}")
        _, kind, key, _, count = identity[:5]
        if not (isinstance(kind, Global) and isinstance(key, str) and key.isprintable() and is_count(count)):
            raise MalformedError(f"a storage without type, key or size at byte {self.position}")
        whole = self.storages.setdefault(key, Storage(key, kind.name, shared(count)))
        if (whole.type, whole.count) != (kind.name, count):
            raise MalformedError(f"a storage of two types or sizes at byte {self.position}")
        view = identity[5] if len(identity) == 6 else None
        if view is None:
            return whole
        _, start, view_count = view
        if not (is_count(start) and is_count(view_count) and start + view_count <= count):
            raise MalformedError(f"a view leaves its storage at byte {self.position}")
        return Storage(key, kind.name, count, start)

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Stub):
            target.state = state
        elif not isinstance(target, (dict, set, StoredTensor)):  # attributes of an OrderedDict are of no use
            raise MalformedError(f"state for a {type(target).__name__} at byte {self.position}")

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Stub):
            target.items.extend(values)
        else:
            raise MalformedError(f"items for a {type(target).__name__} at byte {self.position}")

    def setitems(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise MalformedError(f"a key without a value at byte {self.position}")
        if self.position - self.used > PIECE:  # a pickle of 60 MB need not stay mapped
            _used(self.data, self.used, self.position - self.used)
            self.used = self.position
        target = self.top()
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            for key, value in pairs:
                target[sys.intern(key) if type(key) is str else checked_key(key)] = value  # each language has the same
        elif isinstance(target, Stub):
            target.items.extend(pairs)
        else:
            raise MalformedError(f"items for a {type(target).__name__} at byte {self.position}")

    def additems(self) -> None:
        values = self.to_mark()
        target = self.top()
        if not isinstance(target, set):
            raise MalformedError(f"items for a {type(target).__name__} at byte {self.position}")
        target |= plain_set(values)

    def text(self, count: int) -> str:
        return self.take(count).decode("utf-8", "surrogatepass")

    def old_text(self, count: int) -> Any:
        piece = self.take(count)  # a Python 2 string: text where it can be
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return piece

    def remember(self, index: int) -> None:
        value = self.top()
        if self.recalled is None or index in self.recalled:
            self.memo[checked_key(index)] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise MalformedError(f"memo {index} is empty at byte {self.position}")
        self.stack.append(self.memo[index])

    def signed(self, count: int) -> int:
        if count > _NUMBER:
            raise MalformedError(f"a number of {count} bytes at byte {self.position}")
        return int.from_bytes(self.take(count), "little", signed=True)

    def new_set(self) -> set[Any]:
        self.sets += 1
        if self.sets > _SETS:
            raise MalformedError(f"more than {_SETS:,} sets, which no trainer writes")
        return set()


def _recalled(data: Buffer, start: int, end: int) -> set[int] | None:
    """Say which numbers of the memo a pickle may ask for again, if not any.

    torch remembers eight values a tensor and asks for a few again. These are the numbers behind every byte that could be the
    code of a GET; the small ones are all kept.
    """
    if end - start > _PICKLE or data[start : start + 2] not in (b"\x80\x02", b"\x80\x03"):  # MEMOIZE counts the memo
        return None
    found = set(range(256))
    for at in range(start, end, PIECE):
        for match in _LONG_GET.finditer(data, at, min(at + PIECE + _LONGEST, end)):
            found.add(int(match[2]) if match[2] else int.from_bytes(match[1], "little"))
        if len(found) > _RECALLED:
            return None
        _used(data, at, PIECE)
    return found


def _used(data: Buffer, start: int, count: int) -> None:
    if isinstance(data, mmap.mmap):
        release(data, start, count)


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return step


def _text_number(machine: _Machine) -> Any:
    line = machine.line()
    if line in (b"00", b"01"):
        return line == b"01"
    if len(line) > 2 * _NUMBER:
        raise MalformedError(f"a number of {len(line)} digits before byte {machine.position}")
    return int(line.rstrip(b"L"))


def _quoted(machine: _Machine) -> str:
    line = machine.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise MalformedError(f"a string without quotes at byte {machine.position}")
    return line[1:-1].decode("unicode_escape")


def _pair_up(machine: _Machine) -> dict[Any, Any]:
    values = machine.to_mark()
    return {checked_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _last(count: int) -> Callable[[_Machine], Any]:
    def make(machine: _Machine) -> tuple[Any, ...]:
        values = tuple(machine.stack[-count:])
        if len(values) < count or _MARK in values:
            raise MalformedError(f"a mark or nothing where a value was wanted, at byte {machine.position}")
        del machine.stack[-count:]
        return values

    return make


def _call(machine: _Machine) -> Any:
    args = machine.pop()
    return machine.make(machine.pop(), args)


def _call_new(machine: _Machine) -> Any:
    machine.pop()  # keyword arguments: of no use to an inert stand-in
    return _call(machine)


def _call_inst(machine: _Machine) -> Any:
    target = machine.named(machine.line().decode(), machine.line().decode())
    return machine.make(target, tuple(machine.to_mark()))


def _call_obj(machine: _Machine) -> Any:
    target, *args = machine.to_mark()
    return machine.make(target, tuple(args))


def _name_from_stack(machine: _Machine) -> Global:
    name = machine.pop()
    return machine.named(machine.pop(), name)


def _one_item(machine: _Machine) -> None:
    value = machine.pop()
    machine.setitems([machine.pop(), value])


def _one_value(machine: _Machine) -> None:
    machine.append([machine.pop()])


def _nothing(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.take(count)

    return step


# fmt: off
_TABLE: dict[int, Callable[[_Machine], None]] = {
    0x80: _nothing(1),                                              # PROTO
    0x95: _nothing(8),                                              # FRAME
    ord("("): lambda m: m.stack.append(_MARK),                      # MARK
    ord("0"): lambda m: m.stack.pop() and None,                     # POP
    ord("1"): lambda m: m.to_mark().clear(),                        # POP_MARK
    ord("2"): lambda m: m.stack.append(m.top()),                    # DUP
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("I"): _push(_text_number),
    ord("L"): _push(_text_number),
    ord("J"): _push(lambda m: m.signed(4)),
    ord("K"): _push(lambda m: m.byte()),
    ord("M"): _push(lambda m: m.number(2)),
    0x8A: _push(lambda m: m.signed(m.byte())),
    0x8B: _push(lambda m: m.signed(m.number(4))),
    ord("F"): _push(lambda m: float(m.line())),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("S"): _push(_quoted),
    ord("T"): _push(lambda m: m.old_text(m.number(4))),
    ord("U"): _push(lambda m: m.old_text(m.byte())),
    ord("V"): _push(lambda m: m.line().decode("raw-unicode-escape")),
    ord("X"): _push(lambda m: m.text(m.number(4))),
    0x8C: _push(lambda m: m.text(m.byte())),
    0x8D: _push(lambda m: m.text(m.number(8))),
    ord("B"): _push(lambda m: m.take(m.number(4))),
    ord("C"): _push(lambda m: m.take(m.byte())),
    0x8E: _push(lambda m: m.take(m.number(8))),
    0x96: _push(lambda m: m.take(m.number(8))),                     # BYTEARRAY8
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.to_mark())),
    0x85: _push(_last(1)),
    0x86: _push(_last(2)),
    0x87: _push(_last(3)),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(lambda m: m.to_mark()),
    ord("}"): _push(lambda m: {}),
    ord("d"): _push(_pair_up),
    0x8F: _push(_Machine.new_set),
    0x91: _push(lambda m: m.new_set() | plain_set(m.to_mark())),   # FROZENSET
    0x90: _Machine.additems,
    ord("a"): _one_value,
    ord("e"): lambda m: m.append(m.to_mark()),
    ord("s"): _one_item,
    ord("u"): lambda m: m.setitems(m.to_mark()),
    ord("p"): lambda m: m.remember(_text_number(m)),
    ord("q"): lambda m: m.memo.__setitem__(m.byte(), m.top()),      # these two are half of all steps
    ord("r"): lambda m: m.remember(m.number(4)),
    0x94: lambda m: m.remember(len(m.memo)),                        # MEMOIZE
    ord("g"): lambda m: m.recall(_text_number(m)),
    ord("h"): lambda m: m.recall(m.byte()),
    ord("j"): lambda m: m.recall(m.number(4)),
    ord("c"): _push(lambda m: m.named(m.line().decode(), m.line().decode())),
    0x93: _push(_name_from_stack),                                  # STACK_GLOBAL
    ord("R"): _push(_call),
    0x81: _push(_call),                                             # NEWOBJ
    0x92: _push(_call_new),                                         # NEWOBJ_EX
    ord("i"): _push(_call_inst),
    ord("o"): _push(_call_obj),
    ord("b"): _Machine.build,
    ord("Q"): _push(lambda m: m.persistent(m.pop())),               # BINPERSID
}
# fmt: on
