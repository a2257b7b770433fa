"""The tensors that a file is written of, and how the bytes of each are made of the checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from convert.checkpoint.container import Container, release
from convert.checkpoint.stored import StoredTensor
from convert.errors import Problem
from convert.files import PIECE as CHUNK
from convert.files import WIDTHS
from convert.planner import Plan
from convert.rules import FLOATS, Add, Edit, Identity, Sinusoids, TensorSpec, What, Zeros

if TYPE_CHECKING:
    import numpy as np

# safetensors dtype -> numpy's; it has no bfloat16, whose bits are taken
NUMBERS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
NUMBERS |= {"U8": "u1", "BOOL": "?"}
_BEHIND = 1 << 24  # bytes that were yielded and may still be in use


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor to write: where its bytes come from and where they go.

    Args:
        spec: name, shape and dtype as written.
        source: the tensor in the checkpoint; `None` when a rule makes it.
        made: makes the bytes of a tensor that cannot be copied as it lies.
    """

    spec: TensorSpec
    source: StoredTensor | None
    made: Callable[[], bytes] | None

    @property
    def count(self) -> int:
        """The number of bytes written."""
        return WIDTHS[self.spec.dtype] * math.prod(self.spec.shape)


def pieces(container: Container, plan: Plan, tensors: Mapping[str, StoredTensor], dtype: str) -> list[Piece]:
    """List the tensors to write, in the order of their bytes in the source, those that a rule makes last.

    Args:
        container: the mapped checkpoint.
        plan: a proved plan.
        tensors: where each source tensor is.
        dtype: `keep`, or the safetensors dtype of every floating point tensor.
    """
    edits: dict[str, list[Edit]] = {}
    for edit in plan.table.edits:
        edits.setdefault(edit.target, []).append(edit)
    listed = []
    for source, target in plan.renames.items():
        tensor, spec = without_rows(tensors[source], plan.table.skips.get(target, 0)), plan.target[target]
        kind = spec.dtype if dtype == "keep" or spec.dtype not in FLOATS else dtype
        out = TensorSpec(target, spec.shape, kind)
        if tensor.is_contiguous and kind == spec.dtype and target not in edits:
            listed.append(Piece(out, tensor, None))
        else:
            listed.append(Piece(out, tensor, _maker(container, tensor, spec.dtype, kind, edits.get(target, []))))
    listed.sort(key=lambda piece: (_start(container, piece.source) if piece.source else (0, 0), piece.spec.name))
    by_target = {target: source for source, target in plan.renames.items()}
    for fill in plan.fills:
        spec = plan.target[fill.target]
        kind = spec.dtype if dtype == "keep" else dtype
        listed.append(
            Piece(
                TensorSpec(fill.target, spec.shape, kind),
                None,
                _filler(container, fill.what, spec.shape, kind, tensors, by_target),
            )
        )
    return sorted(listed, key=lambda piece: -WIDTHS[piece.spec.dtype])  # stable; keeps every tensor aligned


def not_repeated(container: Container, plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Compare the tensors that a plan drops as repetitions with what they should repeat, byte for byte.

    Args:
        container: the mapped checkpoint.
        plan: a proved plan.
        tensors: where each source tensor is.
    """
    return [
        Problem(
            "not-repeated", drop.source, f"is not what {drop.repeats} is, and one of them has a place: {drop.reason}"
        )
        for drop in plan.drops
        if drop.repeats
        and read_array(container, tensors[drop.source]).tobytes()
        != read_array(container, tensors[drop.repeats]).tobytes()
    ]


def split(listed: list[Piece], limit: int) -> list[list[Piece]]:
    """Split tensors into files of at most `limit` bytes each, as far as single tensors allow."""
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in listed:
        if files[-1] and size + piece.count > limit:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.count
    return files


def tensor_bytes(container: Container, piece: Piece) -> Iterator[Any]:
    """Yield the bytes of a tensor as they are written, in chunks, mapped from the checkpoint where they can be."""
    if piece.source is None or piece.made is not None:
        yield piece.made() if piece.made else b""
        return
    for part in piece.source.parts:
        yield from part_bytes(container, part)


def part_bytes(container: Container, part: StoredTensor) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous tensor in chunks, mapped from the checkpoint."""
    start, count = range_of(container, part)
    data = container.files[container.storages[part.storage.key].file].data
    for at in range(start, start + count, CHUNK):
        yield memoryview(data)[at : min(at + CHUNK, start + count)]
        release(data, max(0, at - _BEHIND), CHUNK)  # tensors come in the file's order


def without_rows(tensor: StoredTensor, count: int) -> StoredTensor:
    """Leave out the first rows of a tensor: the rest of it, where it lies."""
    if not count:
        return tensor
    shape = (tensor.shape[0] - count, *tensor.shape[1:])
    return replace(tensor, offset=tensor.offset + count * tensor.stride[0], shape=shape)


def _start(container: Container, tensor: StoredTensor) -> tuple[int, int]:
    """In which of the container's files a tensor starts, and where."""
    where = container.storages[tensor.parts[0].storage.key]
    return where.file, where.start + tensor.parts[0].offset * container.dtype(tensor)[1]


def range_of(container: Container, part: StoredTensor) -> tuple[int, int]:
    """Where the bytes of a contiguous tensor start in its file, and how many they are."""
    return _start(container, part)[1], math.prod(part.shape) * container.dtype(part)[1]


def read_array(container: Container, tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """Read a tensor's numbers, whatever its strides, as a contiguous, read-only array; bfloat16 comes as raw `uint16`."""
    import numpy as np

    name, width = container.dtype(tensor)
    if len(tensor.parts) > 1:
        return np.concatenate([read_array(container, part) for part in tensor.parts])
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, NUMBERS[name])
    file, start = _start(container, tensor)
    span = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
    flat = np.frombuffer(container.files[file].data[start : start + span * width], NUMBERS[name])
    strides = [step * width for step in tensor.stride]
    return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False), order="C")


def _wide(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Numbers that numpy can compute with: bfloat16, which it does not know, as float32."""
    import numpy as np

    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def cast(array: np.ndarray[Any, Any], source: str, target: str) -> bytes:
    """Round numbers to another floating point type, to nearest, ties to even, as torch does.

    Args:
        array: the numbers; bfloat16 as raw `uint16`.
        source, target: safetensors dtypes.
    """
    import numpy as np

    if source == target:
        return array.tobytes()
    wide = _wide(array, source)
    if target != "BF16":
        with np.errstate(over="ignore"):  # too large for the type: becomes infinite, which the finite check reports
            return wide.astype(NUMBERS[target]).tobytes()
    bits = np.ascontiguousarray(wide.astype(np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded).astype(np.uint16).tobytes()


def _maker(
    container: Container, tensor: StoredTensor, source: str, target: str, edits: list[Edit]
) -> Callable[[], bytes]:
    def make() -> bytes:
        array, kind = read_array(container, tensor), source
        if edits:  # on numbers of our own: what was read may be a read-only view, and bfloat16 comes as raw bits
            array = _wide(array, source).copy()
            kind = "F32" if source == "BF16" else source
        for edit in edits:
            number = array.dtype.type(edit.what.value)
            array[edit.row] = array[edit.row] + number if isinstance(edit.what, Add) else number
        return cast(array, kind, target)

    return make


def sinusoids(rows: int, width: int) -> np.ndarray[Any, Any]:
    """Compute the table of `fairseq.modules.SinusoidalPositionalEmbedding`, whose row 1 is the padding's: zeros.

    Every step is rounded to float32 as fairseq's is, each function correctly. torch's functions may be off by one unit in
    the last place, differently from machine to machine.
    """
    import numpy as np

    half = width // 2
    step = np.float32(-(math.log(10000) / (half - 1)))
    frequencies = np.exp((np.arange(half, dtype=np.float32) * step).astype(np.float64)).astype(np.float32)
    angles = (np.arange(rows, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    table = np.zeros((rows, width), np.float32)
    table[:, :half], table[:, half : 2 * half] = np.sin(angles), np.cos(angles)
    table[1] = 0.0
    return table


def _filler(
    container: Container,
    what: What,
    shape: tuple[int, ...],
    dtype: str,
    tensors: Mapping[str, StoredTensor],
    by_target: Mapping[str, str],
) -> Callable[[], bytes]:
    def numbers() -> np.ndarray[Any, Any]:
        import numpy as np

        if isinstance(what, Zeros):
            return np.zeros(shape, np.float32)
        if isinstance(what, Identity):
            return np.eye(*shape, dtype=np.float32)
        if isinstance(what, Sinusoids):
            return sinusoids(what.first + shape[0], shape[1])[what.first :]
        tensor = tensors[by_target[what.key]]
        array = _wide(read_array(container, tensor), container.dtype(tensor)[0])
        squares = (array.astype(np.float64) ** 2).sum(axis=tuple(range(array.ndim - 1)))
        return np.asarray(np.sqrt(squares), np.float32).reshape(shape)

    return lambda: cast(numbers(), "F32", dtype)
