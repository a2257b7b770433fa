"""Working copies of weights, made a layer at a time when the layer runs, and released after it."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

from .blocks import in_blocks
from .numerics import ALIGNMENT

LAYERS = ("conv.", "pos_conv", "layer.", "decoder.layer.")  # stages whose tensors nothing but themselves looks at


class Lending:
    """A model that keeps the tensors of its files, mapped and in their type, and computes in another type.

    Each layer has its tensors in the type of the computation only while it runs, and what is in no layer has them while the
    model runs. Tensors that have this type already, at an address where torch would allocate them, are used as they are.

    Args:
        model: the model; its tensors are replaced while it runs, and put back.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kind = torch.float32  # of the computation
        self.rounded: Any = None  # a half type that weights are rounded to first
        self.unrounded: tuple[Any, ...] = ()  # modules whose tensors are not weights, and stay as they are
        self._layers: dict[int, Any] = {}
        self._parts: dict[int, list[Any]] = {}  # of each layer, its tensors: (module, name)
        self._lent: dict[int, list[Any]] = {}  # of those that run: (module, name, what is kept, what was lent)
        self._spare: dict[Any, list[Any]] = {}
        self._running = False

    def watch(self, module: Any, name: str) -> None:
        """Let the module of a stage, if it is a layer, have its tensors only while it runs, but for those that others share."""
        if name.startswith(LAYERS) and id(module) not in self._layers:
            self._layers[id(module)] = module
            module.register_forward_pre_hook(lambda *_: self._lend(module))
            module.register_forward_hook(lambda *_: self._take_back(module))
            if name.startswith("conv."):
                in_blocks(module)

    @contextlib.contextmanager
    def lent(self) -> Any:
        """Let the model run."""
        if self._running:
            yield
            return
        self._parts, self._running = self._divided(), True
        try:
            self._lend(self.model)
            yield
        finally:
            for layer in [self.model, *self._layers.values()]:
                self._take_back(layer)
            self._running = False
            self._parts, self._spare = {}, {}
            release()

    def made(self, kept: Any, module: Any = None) -> Any:
        """The numbers of a tensor in the type of the computation; the tensor itself, where it is so already."""
        if not kept.is_floating_point():
            return kept
        # float64 is what was made for a computation in float64: of numbers that are rounded already
        rounds = self.rounded is not None and kept.dtype != torch.float64 and module not in self.unrounded
        if kept.dtype == self.kind and not rounds and (kept.device.type != "cpu" or kept.data_ptr() % ALIGNMENT == 0):
            return kept
        spare = self._spare.get((kept.shape, self.kind, kept.device))
        made = spare.pop() if spare else torch.empty(kept.shape, dtype=self.kind, device=kept.device)
        return made.copy_(kept.to(self.rounded) if rounds else kept)

    def _divided(self) -> dict[int, list[Any]]:
        """Divide the tensors among the layers; what several share belongs to the model."""
        inner = {id(module): id(layer) for layer in self._layers.values() for module in layer.modules()}
        places: dict[int, list[Any]] = {}
        for module in self.model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, name))
        parts: dict[int, list[Any]] = {}
        for owners in places.values():
            layers = {inner.get(id(module), id(self.model)) for module, _ in owners}
            parts.setdefault(layers.pop() if len(layers) == 1 else id(self.model), []).append(owners)
        return parts

    def _lend(self, layer: Any) -> None:
        if not self._running or id(layer) in self._lent:
            return
        lent = self._lent[id(layer)] = []
        with torch.no_grad():
            for owners in self._parts.get(id(layer), ()):
                module, name = owners[0]
                kept = _held(module, name)
                made = self.made(kept, module)
                if made is not kept:
                    lent.append((owners, kept, made))
                    _hold(owners, made)

    def _take_back(self, layer: Any) -> None:
        lent = self._lent.pop(id(layer), ())
        self._spare = {} if lent else self._spare  # the next layer is most often like this one
        for owners, kept, made in lent:
            _hold(owners, kept)
            self._spare.setdefault((made.shape, made.dtype, made.device), []).append(made)


def release() -> None:
    """Give freed memory back to the system: glibc keeps what lies below the last block in use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)


def _held(module: Any, name: str) -> Any:
    tensor = module._parameters.get(name)
    return module._buffers[name] if tensor is None else tensor.data


def _hold(owners: list[Any], value: Any) -> None:
    module, name = owners[0]
    if module._parameters.get(name) is not None:
        module._parameters[name].data = value  # the same parameter in all of them
        return
    for module, name in owners:
        module._buffers[name] = value
