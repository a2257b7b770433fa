"""float64's own rounding, measured: the model runs in float64 a second time, with its sums in another order."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

UNIT = 2.0**-52  # float64's last place, of numbers from 1 to 2


def another_order() -> AbstractContextManager[Any]:
    """Let torch's linear layers and convolutions add their terms in another order, and move every result by up to a unit.

    What a model computes stays the same but for rounding: input channels are permuted together with the weights', and each
    channel of what linear layers, convolutions and norms return is moved by one unit in float64's last place, up, down or not
    at all. That stands for other threads, vector instructions and libraries; constants, magnitudes and cancellation have
    their part in it as they have in those.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    functions: Any = torch.nn.functional
    moved = (functions.linear, functions.conv1d, functions.layer_norm, functions.group_norm, functions.batch_norm)
    random = torch.Generator().manual_seed(0)
    room = torch.empty(0)  # for the permuted weights

    def permuted(source: Any, weight: Any, *others: Any) -> tuple[Any, ...]:
        nonlocal room
        order = torch.randperm(weight.shape[1], generator=random).to(weight.device)
        if room.numel() < weight.numel() or (room.dtype, room.device) != (weight.dtype, weight.device):
            room = weight.new_empty(weight.numel())
        inner = torch.index_select(weight, 1, order, out=room[: weight.numel()].view(weight.shape))
        if weight.dim() == 2:
            return (source.index_select(-1, order), inner, *others)
        groups = torch.arange(source.shape[1] // len(order), device=weight.device)
        everywhere = (groups[:, None] * len(order) + order).reshape(-1)
        return (source.index_select(1, everywhere), inner, *others)

    class AnotherOrder(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            options = options or {}
            if function in moved[:2]:
                arguments = permuted(*arguments)
            values = function(*arguments, **options)
            if function not in moved:
                return values
            steps = torch.randint(-1, 2, (values.shape[-1],), generator=random)
            return values * (1 + steps.to(values) * UNIT)

    return AnotherOrder()
