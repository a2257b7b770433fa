"""Write a checkpoint in torch's zip layout, so that fairseq's own loader takes it; needs neither torch nor fairseq.

The pickle is emitted by hand because Python's pickler insists on importing the classes it names, and
`fairseq.data.dictionary.Dictionary` cannot be imported where fairseq does not install.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convert.checkpoint.container import DTYPES
from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.checkpoint.zip_writer import ZipWriter
from convert.files import PIECE, create

T = TypeVar("T")
_STORAGE = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write: its safetensors dtype, its shape, and what yields its bytes."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class NewNamespace:
    """An `argparse.Namespace` to write."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Lazy(Mapping[str, T]):
    """A mapping whose values are made whenever they are asked for, and not kept: 1,000 languages are not in memory at once.

    Args:
        names: the keys, in order.
        make: makes the value of one.
    """

    names: Collection[str]
    make: Callable[[str], T]

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_checkpoint(
    path: Path,
    model: Mapping[str, Any],
    state: Mapping[str, Any],
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a checkpoint.

    Args:
        path: the file to make; it must not exist.
        model: the tensors of `model`, some perhaps once more in a dict among them.
        state: the other entries of the top level: plain data, `Dictionary`, `NewNamespace` and further tensors included. It is
            read twice, and mappings may be `Lazy`.
        advance: called with numbers of bytes that were written.
    """
    whole = {**state, "model": dict(model)}
    shared = frozenset(id(tensor) for tensor in model.values())
    prefix = path.name.partition(".")[0] or "archive"
    with create(path) as file, ZipWriter(file) as archive:
        with archive.entry(f"{prefix}/data.pkl") as write:
            _Emitter(write, shared).dump(whole)
        _add(archive, f"{prefix}/byteorder", [b"little"])
        for index, tensor in enumerate(_once(_tensors(whole), shared)):
            _add(archive, f"{prefix}/data/{index}", counting(tensor.pieces(), advance))
        _add(archive, f"{prefix}/version", [b"3\n"])


def _add(archive: ZipWriter, name: str, pieces: Iterable[bytes]) -> None:
    with archive.entry(name) as write:
        for piece in pieces:
            write(piece)


def _tensors(value: Any) -> Iterator[NewTensor]:
    if isinstance(value, NewTensor):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _tensors(child)


def counting(pieces: Iterable[bytes], advance: Callable[[int], object]) -> Iterator[bytes]:
    """Yield pieces of bytes, and tell the size of each once it was taken."""
    for piece in pieces:
        yield piece
        advance(len(piece))


def _once(tensors: Iterable[NewTensor], shared: frozenset[int]) -> Iterator[NewTensor]:
    """Leave out what comes again, of the tensors that are kept and so have an identity of their own."""
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen |= shared & {id(tensor)}
            yield tensor


class _Emitter:
    """Emits pickle protocol 2 for plain data, tensors and fairseq dictionaries.

    Args:
        write: takes the bytes.
        shared: the ids of the tensors that may come again.
    """

    def __init__(self, write: Callable[[bytes], None], shared: frozenset[int]) -> None:
        self.write, self.shared = write, shared
        self.out = bytearray()
        self.known: dict[int, int] = {}
        self.count = 0

    def dump(self, value: Any) -> None:
        self.out += b"\x80\x02"
        self.put(value)
        self.write(bytes(self.out + b"."))

    def put(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + len(data).to_bytes(4, "little") + data
        elif isinstance(value, (list, tuple)):
            self.out += b"](" if isinstance(value, list) else b"("
            for item in value:
                self.put(item)
            self.out += b"e" if isinstance(value, list) else b"t"
        elif isinstance(value, Mapping):
            self.out += b"}("
            for key, item in value.items():
                self.put(key)
                self.put(item)
            self.out += b"u"
        elif isinstance(value, NewTensor):
            self.tensor(value)
        elif isinstance(value, Dictionary):
            self.dictionary(value)
        elif isinstance(value, NewNamespace):
            self.instance("argparse", "Namespace", value.values)
        else:
            raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    def named(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()

    def number(self, tensor: NewTensor) -> int:
        """A tensor's place among those that are written."""
        if id(tensor) in self.known:
            return self.known[id(tensor)]
        if id(tensor) in self.shared:
            self.known[id(tensor)] = self.count
        self.count += 1
        return self.count - 1

    def tensor(self, tensor: NewTensor) -> None:
        """`torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)`."""
        if len(self.out) > PIECE:
            self.write(bytes(self.out))
            self.out.clear()
        stride, step = [], 1
        for length in reversed(tensor.shape):
            stride.append(step)
            step *= length
        self.named("torch._utils", "_rebuild_tensor_v2")
        self.out += b"("
        self.out += b"("
        self.put("storage")
        self.named("torch", _STORAGE[tensor.dtype])
        for part in (str(self.number(tensor)), "cpu", math.prod(tensor.shape)):
            self.put(part)
        self.out += b"tQ"  # the tuple is a persistent id
        for value in (0, tensor.shape, tuple(reversed(stride)), False):
            self.put(value)
        self.named("collections", "OrderedDict")
        self.out += b")R" + b"tR"

    def dictionary(self, dictionary: Dictionary) -> None:
        """An instance of `fairseq.data.dictionary.Dictionary`."""
        keys = ("bos", "pad", "eos", "unk")
        names = dict(zip(keys, dictionary.special, strict=False))
        words = names or dict(zip(keys, SPECIAL, strict=True))  # one of labels knows the words, and gives them no ids
        state: dict[str, Any] = {f"{key}_word": name for key, name in words.items()}
        state |= {f"{key}_index": dictionary.symbols.index(name) for key, name in names.items()}
        state |= {"symbols": list(dictionary.symbols), "count": list(dictionary.counts)}
        state |= {"nspecial": len(names)} if names else {}
        state["indices"] = {symbol: index for index, symbol in enumerate(dictionary.symbols)}
        self.instance("fairseq.data.dictionary", "Dictionary", state)

    def instance(self, module: str, name: str, state: Mapping[str, Any]) -> None:
        """An object, built without calling its constructor."""
        self.named(module, name)
        self.out += b")\x81"
        self.put(state)
        self.out += b"b"
