"""The constructors that torch, numpy and the standard library use to rebuild plain data, done with inert values."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from convert.checkpoint.stored import Global, Storage, StoredTensor, Stub

T = TypeVar("T")


class MalformedError(Exception):
    """The stream breaks the rules of pickle; becomes a `CheckpointError` that names the file."""


_PLAIN = (str, int, float, bytes, type(None))
_NOTHING = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "builtins.list": list,
    "__builtin__.list": list,
    "builtins.tuple": tuple,
    "torch.Size": tuple,
    "builtins.set": lambda values: plain_set(values),
}
_CONTAINERS["__builtin__.set"] = _CONTAINERS["builtins.frozenset"] = _CONTAINERS["builtins.set"]
_BYTES = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")}
_NUMPY_SCALARS = {"f2": "<e", "f4": "<f", "f8": "<d", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B"}
_NUMPY_SCALARS |= {"u2": "<H", "u4": "<I", "u8": "<Q", "b1": "<?"}


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
        raise MalformedError(f"{name}({args[0]!r}), which would take that much memory from another reader")
    if name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str):
        return args[0].encode("latin1", "replace")
    if name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
        return _numpy_scalar(args)
    if name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
        return Stub(args[0])
    return Stub(function, args)


def checked_key(key: T) -> T:
    """Refuse keys whose hash would walk a structure: nested tuples can make that endless, or overflow the C stack.

    Numbers beyond 64 bits are refused with them: Python's hash of a number is the number modulo 2**61 - 1, so that a file
    could choose a hundred thousand that collide.
    """
    parts = key if isinstance(key, tuple) and len(key) < 16 else (key,)
    for part in parts:
        if not isinstance(part, (*_PLAIN, Global, Stub)) or (isinstance(part, int) and not -(2**63) <= part < 2**63):
            raise MalformedError(f"a {type(part).__name__} as a key")
    return key


def plain_set(values: Iterable[object]) -> set[object]:
    """Make a set of the plain values among some."""
    return {checked_key(value) for value in values if isinstance(value, _PLAIN)}


def is_count(value: object) -> bool:
    """Say whether a value is a whole number that can count elements."""
    return type(value) is int and 0 <= value < 2**62  # True and False are numbers to Python, not to safetensors


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, stride = args[:4]
    if not isinstance(shape, (tuple, list)) or not isinstance(stride, (tuple, list)):
        raise MalformedError("a tensor without a shape")
    if len(shape) != len(stride) or len(shape) > 64:
        raise MalformedError(f"a tensor of {len(shape)} axes with {len(stride)} strides")
    if not isinstance(storage, Storage) or not all(map(is_count, (offset, *shape, *stride))):
        raise MalformedError("a tensor without a storage, or with an impossible shape")
    last = storage.start + offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and last > storage.count:
        raise MalformedError(f"a tensor of shape {tuple(shape)} ends behind its storage of {storage.count} elements")
    return StoredTensor(storage, storage.start + offset, shared(tuple(shape)), shared(tuple(stride)))


@functools.lru_cache(10_000)
def shared(value: T) -> T:
    """Return the shape, or the number, that is kept for all that are equal; no boolean is one, or in one."""
    return value


def _dictionary(args: tuple[Any, ...]) -> dict[Any, Any]:
    for value in args:
        if isinstance(value, dict):
            return dict(value)
        if isinstance(value, list):
            return {checked_key(key): item for key, item in value}
    return {}


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    kind, payload = (*args, None, None)[:2]
    if isinstance(kind, Stub) and kind.args and isinstance(kind.args[0], str) and isinstance(payload, bytes):
        layout = _NUMPY_SCALARS.get(kind.args[0])
        order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
        if layout and len(payload) == struct.calcsize(layout):
            return struct.unpack(layout.replace("<", ">") if order == ">" else layout, payload)[0]
    return Stub(Global("numpy", "scalar"), args)
