"""Deliberate mistakes as data: what `verify` does to copies of a converted model, each of which its checks must report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Exchange:
    """Exchange the numbers of pairs of tensors."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Change:
    """Change a tensor in place, by a function of torch's tensors."""

    tensor: str
    how: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Configure:
    """Give the configuration other values; `encoder.hidden_act` is that of a part."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Generate:
    """Give the configuration of `generate` other values."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SetLanguage:
    """Load the adapters of another language."""

    language: str


@dataclass(frozen=True, slots=True)
class Absent:
    """A mistake that this model has no place for."""

    reason: str


Damage = Exchange | Change | Configure | Generate | SetLanguage | Absent
Damages = dict[str, Damage]


class Converted(Protocol):
    """A converted model, as transformers loaded it.

    `stages` are those that are compared.
    """

    model: Any
    stages: list[str]

    @property
    def prefix(self) -> str:
        """What stands before the names of the encoder's tensors."""

    @property
    def part(self) -> str:
        """What stands before the names of the encoder's settings."""

    @property
    def base(self) -> Any:
        """The encoder."""

    @property
    def weights(self) -> Mapping[str, Any]:
        """Every parameter and buffer by name."""


def ones(value: Any) -> object:
    """Fill a tensor with ones."""
    return value.fill_(1.0)


def roll(value: Any, dims: int = 0, by: int = 1) -> object:
    """Move a tensor's entries along an axis."""
    return value.copy_(value.roll(by, dims))


def pair(one: str, other: str) -> Exchange:
    """Exchange the weights of two layers, and their biases."""
    return Exchange(tuple((f"{one}.{part}", f"{other}.{part}") for part in ("weight", "bias")))


def blocks(weights: Collection[str], start: str, last: int) -> Exchange:
    """Exchange the first of several layers with the last: what both have."""
    first, other = f"{start}0.", f"{start}{last}."
    pairs = ((name, other + name.removeprefix(first)) for name in weights if name.startswith(first))
    return Exchange(tuple((one, two) for one, two in pairs if two in weights))


def fewer(heads: int) -> int:
    """Choose a wrong number of heads."""
    return heads // 2 if heads % 2 == 0 else 2 * heads


def encoder_damages(
    model: Converted, attention: str = "attention.{}_proj", ffn: str = "feed_forward", shaped: Sequence[str] = ()
) -> Damages:
    """List the mistakes that fit every encoder.

    Args:
        model: the converted model.
        attention: the name of a projection in a layer's attention.
        ffn: that of the block before the end of a layer.
        shaped: ends of the names of tensors whose shape says how many heads there are.
    """
    config, weights, prefix, part = model.base.config, model.weights, model.prefix, model.part
    layers, heads, name = config.num_hidden_layers, config.num_attention_heads, type(model.base).__name__
    middle, last, wrong = layers // 2, layers - 1, fewer(heads)
    projection = f"{prefix}encoder.layers.{middle}.{attention}"
    convolution = f"{prefix}encoder.pos_conv_embed.conv."
    magnitudes = [f"{convolution}parametrizations.weight.original0", f"{convolution}weight_g"]  # torch 2.1, and before
    magnitude = next((one for one in magnitudes if one in weights), "")
    biases = [f"{prefix}encoder.layers.{last}.{ffn}.output_dense.bias", f"{prefix}encoder.layer_norm.bias"]
    bias = next((one for one in biases if one in weights and bool(weights[one].any())), "")
    lost: Damage = Change(magnitude, ones) if magnitude else Absent("its positional convolutions have no weight norm")
    if "pos_conv" not in model.stages:
        lost = Absent(f"{name} does not use its positional convolution")
    stable = getattr(config, "do_stable_layer_norm", None)
    placement: Damage = Configure({f"{part}do_stable_layer_norm": not stable})
    if stable is None or getattr(config, "adapter_attn_dim", None) is not None:
        placement = Absent(f"{name} has one" + ("" if stable is None else " with adapters"))
    number: Damage = Configure({f"{part}num_attention_heads": wrong})
    if config.hidden_size % wrong:
        number = Absent(f"{wrong} does not divide {config.hidden_size}")
    for one in weights:
        if shaped and one.endswith(tuple(shaped)):
            number = Absent(f"the shape of {one} says how many there are: with another number the model does not load")
    return {
        f"q and k of layer {middle} swapped": pair(projection.format("q"), projection.format("k")),
        "weight_g of the positional convolution lost": lost,
        f"layers 0 and {last} exchanged": blocks(weights, f"{prefix}encoder.layers.", last)
        if last
        else Absent("the model has one layer"),
        "a bias set to zero": Change(bias, lambda value: value.zero_())
        if bias
        else Absent("these biases are zero already"),
        "the other norm placement": placement,
        f"{wrong} attention heads instead of {heads}": number,
    }
