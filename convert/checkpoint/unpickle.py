"""Read a pickle as data: a small stack machine that imports nothing, calls nothing, and allocates no more than it reads.

Python's own unpickler looks classes up and calls them; this one keeps every class as an inert `Stub` and understands only
the handful of constructors that torch, numpy and the standard library use to rebuild plain data (`torch._utils`,
`collections.OrderedDict`, `numpy.core.multiarray.scalar`, ...).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from convert.errors import CheckpointError

Buffer = bytes | mmap.mmap


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle refers to; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Stub:
    """An object of a class that was not imported: its constructor's arguments, its state, and its items."""

    type: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:  # without its content, which can be endless where objects hold one another many times
        return f"<{self.type}>"


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers in the file: torch's storage, by key.

    Args:
        key: the storage's name in its container.
        type: torch's storage class, such as `FloatStorage`.
        count: the number of elements the pickle claims.
        start: the first element, for the views of very old files.
    """

    key: str
    type: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that was not read: a view on a storage, in elements (`torch._utils._rebuild_tensor_v2`)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors whose rows, one after the other, are this one's."""
        return (self,)

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie one after the other."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != expected:
                return 0 in self.shape
            expected *= length
        return True


@dataclass(frozen=True, slots=True)
class JoinedTensor(StoredTensor):
    """A tensor that was not read, whose rows lie in several files.

    Args:
        pieces: the rows of each file.
    """

    pieces: tuple[StoredTensor, ...]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors whose rows, one after the other, are this one's."""
        return self.pieces


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a pickle holds.

    Args:
        value: the value.
        globals: every global it names.
        storages: type and number of elements of every storage it names, by key, in use or not.
        end: the position after its last byte.
    """

    value: Any
    globals: frozenset[Global]
    storages: dict[str, tuple[str, int]]
    end: int


class _MalformedError(Exception):
    """The stream breaks the rules of pickle; becomes a `CheckpointError` that names the file."""


_MARK = object()
_PLAIN = (str, int, float, bytes, type(None))
# Limits far above what trainers write: opcodes of a pickle (and one more for every 64 bytes of the file, so that memory stays
# in proportion to it), elements handed to constructors beyond those that were read, sets, bytes of one number, bytes of all
# texts together (a sparse file can claim gigabytes of them and take none of the disk).
_STEPS, _COPIES, _SETS, _NUMBER, _TEXTS = 1_000_000, 1_000_000, 10_000, 256, 1 << 26
_NOTHING = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "builtins.list": list,
    "__builtin__.list": list,
    "builtins.tuple": tuple,
    "torch.Size": tuple,
    "builtins.set": lambda values: _plain_set(values),
}
_CONTAINERS["__builtin__.set"] = _CONTAINERS["builtins.frozenset"] = _CONTAINERS["builtins.set"]
_BYTES = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")}
_NUMPY_SCALARS = {"f2": "<e", "f4": "<f", "f8": "<d", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B"}
_NUMPY_SCALARS |= {"u2": "<H", "u4": "<I", "u8": "<Q", "b1": "<?"}


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
        value = machine.run(_STEPS + len(data) // 64)
    except (
        _MalformedError,
        IndexError,
        struct.error,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
        RecursionError,
    ) as error:
        detail = (
            str(error) if isinstance(error, _MalformedError) else f"{type(error).__name__} at byte {machine.position}"
        )
        raise CheckpointError(
            f"{name}: the pickle cannot be read: {detail}; nothing in it was executed",
            code="corrupted-pickle",
            key=name,
            hint="copy or download the file again; if it is whole, it is no checkpoint of fairseq's",
        ) from None
    return Loaded(value, frozenset(machine.globals), machine.storages, machine.position)


class _Machine:
    def __init__(self, data: Buffer, start: int, end: int) -> None:
        self.data = data
        self.start = self.position = start
        self.end = end
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.globals: set[Global] = set()
        self.storages: dict[str, tuple[str, int]] = {}
        self.copied = 0
        self.taken = 0
        self.sets = 0

    def run(self, steps: int) -> Any:
        data, table = self.data, _TABLE
        for _ in range(steps):
            if self.position >= self.end:
                raise _MalformedError(f"it ends at byte {self.position} without its stop mark")
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise _MalformedError(f"{len(self.stack)} values are left on the stack")
                return self.stack.pop()
            step = table.get(code)
            if step is None:
                raise _MalformedError(f"opcode 0x{code:02x} at byte {self.position - 1} is not one that torch writes")
            step(self)
        raise _MalformedError(f"more than {steps:,} steps, which no trainer writes")

    # Reading

    def take(self, count: int) -> bytes:
        if count < 0 or self.position + count > self.end:
            raise _MalformedError(f"{count} bytes wanted at byte {self.position}, {self.end - self.position} are left")
        if count > _NUMBER:
            self.taken += count
            if self.taken > _TEXTS:
                raise _MalformedError(f"more than {_TEXTS:,} bytes of text, which no trainer writes")
        piece = bytes(self.data[self.position : self.position + count])
        self.position += count
        return piece

    def byte(self) -> int:
        if self.position >= self.end:
            raise _MalformedError(f"it ends at byte {self.position} without its stop mark")
        value = self.data[self.position]
        self.position += 1
        return value

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.end)
        if end < 0:
            raise _MalformedError(f"a line at byte {self.position} has no end")
        piece = self.take(end - self.position)
        self.position += 1
        return piece

    # The stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _MalformedError(f"a mark where a value was wanted, at byte {self.position}")
        return value

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise _MalformedError(f"no mark before byte {self.position}")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _MalformedError(f"no value before byte {self.position}")
        return self.stack[-1]

    # Objects

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str) or not f"{module}{name}".isprintable():
            raise _MalformedError(f"a global without a name at byte {self.position}")
        found = Global(module, name)
        self.globals.add(found)
        return found

    def make(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise _MalformedError(f"a call of something that is no global at byte {self.position}")
        # constructors copy: without a limit, a list that is named again and again would grow without being read again
        self.copied += sum(len(value) for value in args if isinstance(value, (str, bytes, list, tuple, dict, set)))
        if self.copied > _COPIES + self.position - self.start:
            raise _MalformedError(f"a value that is copied again and again, at byte {self.position}")
        return rebuild(function, args)

    def persistent(self, identity: Any) -> Storage | Global:
        """`torch.serialization`'s persistent ids: ('storage', type, key, location, count[, view]), ('module', class, ...)."""
        if not isinstance(identity, tuple):
            raise _MalformedError(f"a persistent id that is no tuple at byte {self.position}")
        if len(identity) == 4 and identity[0] == "module" and isinstance(identity[1], Global):
            return identity[1]  # a class whose source the legacy layout keeps
        if len(identity) not in (5, 6) or identity[0] != "storage":
            raise _MalformedError(f"a persistent id that is no storage at byte {self.position}")
        _, kind, key, _, count = identity[:5]
        if not (isinstance(kind, Global) and isinstance(key, str) and key.isprintable() and _is_count(count)):
            raise _MalformedError(f"a storage without type, key or size at byte {self.position}")
        if self.storages.setdefault(key, (kind.name, count)) != (kind.name, count):
            raise _MalformedError(f"a storage of two types or sizes at byte {self.position}")
        view = identity[5] if len(identity) == 6 else None
        if view is None:
            return Storage(key, kind.name, count)
        _, start, view_count = view
        if not (_is_count(start) and _is_count(view_count) and start + view_count <= count):
            raise _MalformedError(f"a view leaves its storage at byte {self.position}")
        return Storage(key, kind.name, count, start)

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Stub):
            target.state = state
        elif not isinstance(target, (dict, set, StoredTensor)):  # attributes of an OrderedDict are of no use
            raise _MalformedError(f"state for a {type(target).__name__} at byte {self.position}")

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Stub):
            target.items.extend(values)
        else:
            raise _MalformedError(f"items for a {type(target).__name__} at byte {self.position}")

    def setitems(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise _MalformedError(f"a key without a value at byte {self.position}")
        target = self.top()
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            for key, value in pairs:
                target[_key(key)] = value
        elif isinstance(target, Stub):
            target.items.extend(pairs)
        else:
            raise _MalformedError(f"items for a {type(target).__name__} at byte {self.position}")

    def additems(self) -> None:
        values = self.to_mark()
        target = self.top()
        if not isinstance(target, set):
            raise _MalformedError(f"items for a {type(target).__name__} at byte {self.position}")
        target |= _plain_set(values)

    def text(self, count: int) -> str:
        return self.take(count).decode("utf-8", "surrogatepass")

    def old_text(self, count: int) -> Any:
        piece = self.take(count)  # a Python 2 string: text where it can be
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return piece

    def remember(self, index: int) -> None:
        self.memo[_key(index)] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise _MalformedError(f"memo {index} is empty at byte {self.position}")
        self.stack.append(self.memo[index])

    def signed(self, count: int) -> int:
        if count > _NUMBER:
            raise _MalformedError(f"a number of {count} bytes at byte {self.position}")
        return int.from_bytes(self.take(count), "little", signed=True)

    def new_set(self) -> set[Any]:
        self.sets += 1
        if self.sets > _SETS:
            raise _MalformedError(f"more than {_SETS:,} sets, which no trainer writes")
        return set()


def rebuild(function: Global, args: tuple[Any, ...]) -> Any:
    """Do what a known constructor would do with plain data, or keep its name and arguments as a `Stub`."""
    name = str(function)
    if function.module == "torch._utils" and function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        return _tensor(args)
    if function.module == "torch._utils" and function.name.startswith("_rebuild_parameter"):
        return args[0]
    if name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4 and isinstance(args[0], Global):
        return rebuild(args[0], args[2]) if isinstance(args[2], tuple) else Stub(function, args)
    if name in _NOTHING:
        return _dictionary(args)
    if name in _CONTAINERS and len(args) <= 1:
        values = args[0] if args else ()
        return _CONTAINERS[name](values) if isinstance(values, (list, tuple, set)) else Stub(function, args)
    if name in _BYTES and args and not isinstance(args[0], (bytes, str, list, tuple)):
        raise _MalformedError(f"{name}({args[0]!r}), which would take that much memory from another reader")
    if name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str):
        return args[0].encode("latin1", "replace")
    if name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
        return _numpy_scalar(args)
    if name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
        return Stub(args[0])
    return Stub(function, args)


def _key(key: Any) -> Any:
    """Refuse keys whose hash would walk a structure: nested tuples can make that endless, or overflow the C stack.

    Numbers beyond 64 bits are refused with them: Python's hash of a number is the number modulo 2**61 - 1, so that a file
    could choose a hundred thousand that collide.
    """
    parts = key if isinstance(key, tuple) and len(key) < 16 else (key,)
    for part in parts:
        if not isinstance(part, (*_PLAIN, Global, Stub)) or (isinstance(part, int) and not -(2**63) <= part < 2**63):
            raise _MalformedError(f"a {type(part).__name__} as a key")
    return key


def _plain_set(values: Iterable[Any]) -> set[Any]:
    return {_key(value) for value in values if isinstance(value, _PLAIN)}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62  # True and False are numbers to Python, not to safetensors


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, stride = args[:4]
    if not isinstance(shape, (tuple, list)) or not isinstance(stride, (tuple, list)):
        raise _MalformedError("a tensor without a shape")
    if len(shape) != len(stride) or len(shape) > 64:
        raise _MalformedError(f"a tensor of {len(shape)} axes with {len(stride)} strides")
    if not isinstance(storage, Storage) or not all(map(_is_count, (offset, *shape, *stride))):
        raise _MalformedError("a tensor without a storage, or with an impossible shape")
    last = storage.start + offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and last > storage.count:
        raise _MalformedError(f"a tensor of shape {tuple(shape)} ends behind its storage of {storage.count} elements")
    return StoredTensor(storage, storage.start + offset, tuple(shape), tuple(stride))


def _dictionary(args: tuple[Any, ...]) -> dict[Any, Any]:
    for value in args:
        if isinstance(value, dict):
            return dict(value)
        if isinstance(value, list):
            return {_key(key): item for key, item in value}
    return {}


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    kind, payload = (*args, None, None)[:2]
    if isinstance(kind, Stub) and kind.args and isinstance(kind.args[0], str) and isinstance(payload, bytes):
        layout = _NUMPY_SCALARS.get(kind.args[0])
        order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
        if layout and len(payload) == struct.calcsize(layout):
            return struct.unpack(layout.replace("<", ">") if order == ">" else layout, payload)[0]
    return Stub(Global("numpy", "scalar"), args)


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return step


def _text_number(machine: _Machine) -> Any:
    line = machine.line()
    if line in (b"00", b"01"):
        return line == b"01"
    if len(line) > 2 * _NUMBER:
        raise _MalformedError(f"a number of {len(line)} digits before byte {machine.position}")
    return int(line.rstrip(b"L"))


def _quoted(machine: _Machine) -> str:
    line = machine.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise _MalformedError(f"a string without quotes at byte {machine.position}")
    return line[1:-1].decode("unicode_escape")


def _pair_up(machine: _Machine) -> dict[Any, Any]:
    values = machine.to_mark()
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _last(count: int) -> Callable[[_Machine], Any]:
    def make(machine: _Machine) -> tuple[Any, ...]:
        return tuple(machine.pop() for _ in range(count))[::-1]

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
    0x91: _push(lambda m: m.new_set() | _plain_set(m.to_mark())),   # FROZENSET
    0x90: _Machine.additems,
    ord("a"): _one_value,
    ord("e"): lambda m: m.append(m.to_mark()),
    ord("s"): _one_item,
    ord("u"): lambda m: m.setitems(m.to_mark()),
    ord("p"): lambda m: m.remember(_text_number(m)),
    ord("q"): lambda m: m.memo.__setitem__(m.byte(), m.top()),      # these two are half of all steps
    ord("r"): lambda m: m.memo.__setitem__(m.number(4), m.top()),
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
