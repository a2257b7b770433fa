"""Which bits this process computes, measured: digests of fixed computations of every kind that the models are made of.

Where two processes have the same digests, one model computes the same bits in both. Names of processors, of vector
extensions and of versions do not say that. The shapes are those of real layers and of single frames, large enough for the
ways in which libraries divide sums among blocks and threads.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy
import torch


def bits() -> dict[str, str]:
    """Compute with the threads that torch has now.

    Returns:
        The SHA-256 of every kind of computation; kinds that this torch does not have are left out.
    """
    return dict(_bits(torch.get_num_threads()))


@functools.lru_cache(maxsize=None)
def _bits(threads: int) -> dict[str, str]:
    found = {}
    with torch.no_grad():
        for kind, compute in KINDS.items():
            sha = hashlib.sha256()
            try:
                for value in compute():
                    sha.update(value.contiguous().numpy().tobytes())
            except AttributeError:
                continue
            found[kind] = sha.hexdigest()
    return found


def _numbers(*shape: int, start: int = 0) -> Any:
    """Numbers between -1 and 1 without a pattern, the same everywhere: 24 bits of an integer each."""
    count = int(numpy.prod(shape))
    mixed = numpy.arange(start, start + count, dtype=numpy.uint32) * numpy.uint32(2654435761)
    mixed = (mixed ^ (mixed >> numpy.uint32(15))) * numpy.uint32(2246822519)
    whole = (mixed >> numpy.uint32(8)).astype(numpy.float32)
    return torch.from_numpy(whole / numpy.float32(1 << 23) - numpy.float32(1)).reshape(shape).clone()


def _products() -> Any:
    linear = torch.nn.functional.linear
    for rows, inner, outer in PRODUCTS:
        weight, bias = _numbers(outer, inner), _numbers(outer)
        yield linear(_numbers(1, rows, inner), weight, bias)
        yield linear(_numbers(rows, 1, inner), weight, bias)  # fairseq: (time, batch, channels)
    yield linear(_numbers(3, 49, 768), _numbers(32, 768))


def _convolutions() -> Any:
    convolution = torch.nn.functional.conv1d
    yield convolution(_numbers(1, 1, 6400), _numbers(512, 1, 10), None, 5)
    yield convolution(_numbers(1, 1, 6400), _numbers(32, 1, 10), _numbers(32), 5)
    yield convolution(_numbers(1, 512, 401), _numbers(512, 512, 3), _numbers(512), 2)
    yield convolution(_numbers(1, 512, 100), _numbers(512, 512, 2), None, 2)
    yield convolution(_numbers(2, 32, 401), _numbers(32, 32, 3), None, 2)


def _grouped_convolutions() -> Any:
    convolution = torch.nn.functional.conv1d
    yield convolution(_numbers(1, 768, 49), _numbers(768, 48, 128), _numbers(768), 1, 64, 1, 16)
    yield convolution(_numbers(2, 64, 99), _numbers(64, 16, 16), _numbers(64), 1, 8, 1, 4)
    yield convolution(_numbers(1, 256, 99), _numbers(256, 1, 31), None, 1, 15, 1, 256)
    yield torch._weight_norm(_numbers(64, 16, 128), _numbers(1, 1, 128), 2)


def _norms() -> Any:
    functions = torch.nn.functional
    yield functions.group_norm(_numbers(1, 512, 1279), 512, _numbers(512), _numbers(512))
    yield functions.group_norm(_numbers(2, 32, 99), 32, _numbers(32), _numbers(32))
    for width in (32, 64, 512, 768, 1024):
        yield functions.layer_norm(_numbers(1, 99, width), (width,), _numbers(width), _numbers(width))
    yield functions.layer_norm(_numbers(6400), (6400,))
    yield functions.batch_norm(_numbers(1, 256, 99), _numbers(256), _numbers(256).abs() + 1, _numbers(256))


def _attention() -> Any:
    for frames, heads, width in ((1, 12, 64), (49, 12, 64), (99, 4, 16), (499, 4, 64)):
        query, key, value = (_numbers(1, heads, frames, width, start=start) for start in (0, 7, 11))
        scores = (query * 9 * width**-0.5) @ key.transpose(2, 3)
        yield scores
        yield scores.softmax(-1) @ value
        yield torch.bmm(query[0] * width**-0.5, key[0].transpose(1, 2))
        yield torch.nn.functional.scaled_dot_product_attention(query * 9, key, value)


def _softmax() -> Any:
    for shape in ((12, 99, 99), (4, 1, 1), (1, 99, 32), (1, 499, 499)):
        yield (_numbers(*shape) * 20).softmax(-1)
        yield (_numbers(*shape) * 20).log_softmax(-1)


def _functions() -> Any:
    line = torch.cat([_numbers(20011) * 6, _numbers(503) * 60])
    yield torch.nn.functional.gelu(line)
    yield torch.nn.functional.silu(line)
    for function in (torch.tanh, torch.sigmoid, torch.exp, torch.sin, torch.cos):
        yield function(line)
    yield torch.nn.functional.glu(_numbers(1, 128, 99), 1)
    yield _numbers(99, 768).mean(0)


PRODUCTS = [(1, 768, 768), (1, 1024, 4096), (1, 4096, 1024), (49, 64, 96), (99, 768, 3072), (99, 3072, 768)]
PRODUCTS += [(299, 512, 1024), (1499, 512, 512)]
KINDS = {
    "products": _products,
    "convolutions": _convolutions,
    "grouped convolutions": _grouped_convolutions,
    "norms": _norms,
    "attention": _attention,
    "softmax": _softmax,
    "functions": _functions,
}
