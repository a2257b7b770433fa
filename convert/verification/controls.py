"""Deliberate mistakes, each of which the same check has to catch; a check that misses one is blind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.conversion import differences
from convert.errors import Problem
from convert.files import header_bytes, scratch_directory, write_file
from convert.reading import read_file
from convert.verification.compare import Difference, first_different
from convert.verification.judge import Judged, compared
from convert.verification.reference import Subject
from convert.verification.target import EncoderDecoderTarget, SpeechToTextTarget, Target
from convert.verification.vocabulary import check_labels, check_tokens

if TYPE_CHECKING:
    import torch

Damage = Callable[[Target], "contextlib.AbstractContextManager[Target]"]


@dataclass(frozen=True, slots=True)
class Control:
    """One deliberate mistake, and whether it was seen.

    Args:
        name: what was done to the model.
        caught: whether the check said `different`.
        by: which check: `outputs` (`outputs, in float64` where float32 rounds the mistake away), `bytes`, `vocabulary`, `labels`, `files`.
        device: where it ran; empty for checks that compute nothing.
        stage, max_abs_difference, allowed: the first stage beyond its floor.
        curve: (stage, greatest difference, what is allowed there) along the model.
    """

    name: str
    caught: bool
    by: str
    device: str = ""
    stage: str = ""
    max_abs_difference: float | None = None
    allowed: float | None = None
    curve: tuple[tuple[str, float, float], ...] = ()


def on_outputs(
    target: Target,
    clip: Judged,
    batch: tuple[torch.Tensor, list[int] | None],
    device: str,
    others: Sequence[str] = (),
) -> tuple[list[Control], dict[str, str]]:
    """Damage copies of the model and run the same comparison.

    Args:
        target: the model; it is as before when this returns.
        clip: the undamaged model's result on one input, with its floors measured and its reference kept.
        batch: that input.
        device: the device's name, for the report.
        others: the languages that the clip was not judged in.

    Returns:
        The controls, and those that this model has no place for, with the reason.
    """
    floors = {difference.stage: difference for difference in clip.differences}
    controls, absent = [], {}
    damages = _damages(target, others)
    for name, damage in damages.items():
        if isinstance(damage, str):
            absent[name] = damage
            continue
        with damage(target) as damaged:
            _, found = compared(damaged, clip.reference, batch)
        judged = [_with_floor(difference, floors.get(difference.stage)) for difference in found]
        first = first_different(judged)
        caught = first is not None and first.verdict == "different"
        known = first if caught else None
        controls.append(
            Control(
                name,
                caught,
                "outputs",
                device,
                known.stage if known else "",
                _finite(known.greatest) if known else None,
                known.allowed if known else None,
                tuple((one.stage, one.greatest, one.allowed) for one in judged if one.stage in floors),
            )
        )
    controls = _in_float64(target, clip, batch, damages, controls)
    _, again = compared(target, clip.reference, batch)
    before = [(one.stage, one.greatest) for one in clip.differences]
    if [(one.stage, one.greatest) for one in again] != before and clip.verdict == "identical":
        controls.append(Control("the undamaged model again, after all of them", False, "outputs", device))
    return controls, absent


def _in_float64(
    target: Target,
    clip: Judged,
    batch: tuple[torch.Tensor, list[int] | None],
    damages: dict[str, Damage | str],
    controls: list[Control],
) -> list[Control]:
    """Judge the mistakes that float32's rounding hides as the model itself is judged: in float64 too."""
    if all(control.caught for control in controls):
        return controls
    allowed = {one.stage: one.exact_allowed for one in clip.differences if one.exact_allowed is not None}
    judged = []
    with target.arithmetic("float64"):
        for control in controls:
            damage = damages[control.name]
            if control.caught or isinstance(damage, str):
                judged.append(control)
                continue
            with damage(target) as damaged:
                _, found = compared(damaged, clip.exact, batch)
            beyond = [one for one in found if one.stage in allowed and one.greatest > allowed[one.stage]]
            if beyond:
                first, by = beyond[0], f"{control.by}, in float64"
                found_there = _finite(first.greatest)
                control = replace(control, caught=True, by=by, stage=first.stage, allowed=allowed[first.stage])
                control = replace(control, max_abs_difference=found_there)
            judged.append(control)
    return judged


def _with_floor(difference: Difference, floor: Difference | None) -> Difference:
    if floor is None:
        return difference
    return replace(difference, allowed=floor.allowed)


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _damages(target: Target, others: Sequence[str]) -> dict[str, Damage | str]:
    if isinstance(target, SpeechToTextTarget):
        return _of_speech_to_text(target)
    config, weights, prefix, part = target.base.config, target.weights, target.prefix, target.part
    layers = config.num_hidden_layers
    middle, last = layers // 2, layers - 1
    layer = f"{prefix}encoder.layers.{middle}."
    attention = (
        f"{layer}attention.{{}}_proj"
        if f"{layer}attention.q_proj.weight" in weights
        else f"{layer}self_attn.linear_{{}}"
    )
    magnitude = f"{prefix}encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    if magnitude not in weights:  # before torch 2.1's parametrizations
        magnitude = f"{prefix}encoder.pos_conv_embed.conv.weight_g"
    biases = [f"{prefix}encoder.layers.{last}.{part}.output_dense.bias" for part in ("feed_forward", "ffn2")]
    biases = [name for name in (*biases, f"{prefix}encoder.layer_norm.bias") if name in weights]
    bias = next((name for name in biases if bool(weights[name].any())), "")
    made: dict[str, Damage | str] = {}
    made[f"q and k of layer {middle} swapped"] = _exchanging(
        [(f"{attention.format('q')}.{part}", f"{attention.format('k')}.{part}") for part in ("weight", "bias")]
    )
    lost, placement = "weight_g of the positional convolution lost", "the other norm placement"
    made[lost] = (
        f"{type(target.base).__name__} does not use its positional convolution"
        if "pos_conv" not in target.stages
        else _setting(magnitude, lambda value: value.fill_(1.0))
        if magnitude in weights
        else "its positional convolutions have no weight norm"
    )
    variance = f"{prefix}encoder.pos_conv_embed.batch_norm.running_var"
    if variance in weights:
        made["running_var of the positional convolution lost"] = _setting(variance, lambda value: value.fill_(1.0))
    if f"{prefix}encoder.pos_conv_embed.layers.1.conv.weight" in weights:
        one, other = (f"{prefix}encoder.pos_conv_embed.layers.{index}.conv." for index in (0, 1))
        made["two positional convolutions exchanged"] = _exchanging(
            [(one + part, other + part) for part in ("weight", "bias")]
        )
    exchanged = f"layers 0 and {last} exchanged"
    names = [name for name in weights if name.startswith(f"{prefix}encoder.layers.0.")]
    other = f"{prefix}encoder.layers.{last}."
    pairs = [(name, other + name.removeprefix(f"{prefix}encoder.layers.0.")) for name in names]
    pairs = [(name, twin) for name, twin in pairs if twin in weights]  # WavLM has a table in layer 0 that serves all
    made[exchanged] = _exchanging(pairs) if last else "the model has one layer"
    zeroed = "a bias set to zero"
    made[zeroed] = _setting(bias, lambda value: value.zero_()) if bias else "these biases are zero already"
    made[placement] = (
        _configured(**{f"{part}do_stable_layer_norm": not config.do_stable_layer_norm})
        if hasattr(config, "do_stable_layer_norm") and getattr(config, "adapter_attn_dim", None) is None
        else f"{type(target.base).__name__} has one"
        + (" with adapters" if hasattr(config, "do_stable_layer_norm") else "")
    )
    if others:
        made[f"the adapters of {others[0]}"] = _speaking(others[0])
    heads = config.num_attention_heads
    wrong = heads // 2 if heads % 2 == 0 else 2 * heads
    absent = "" if config.hidden_size % wrong == 0 else f"{wrong} does not divide {config.hidden_size}"
    for name in weights:
        if name.endswith(("pos_bias_u", "inv_freq", "rel_attn_embed.weight")):
            absent = f"the shape of {name} says how many there are: with another number the model does not load"
    made[f"{wrong} attention heads instead of {heads}"] = absent or _configured(**{f"{part}num_attention_heads": wrong})
    made |= _of_conformers(weights, prefix, layer)
    gate = f"{layer}attention.gru_rel_pos_const"
    if gate in weights:
        made["the gate of the positions lost"] = _setting(gate, lambda value: value.zero_())
        made["half as far in the same buckets"] = _configured(max_bucket_distance=config.max_bucket_distance // 2)
    if hasattr(target.model, "quantizer"):
        made["the codebook moved by one entry"] = _setting(
            "quantizer.codevectors", lambda value: value.copy_(value.roll(1, dims=1))
        )
        made["a bias of project_hid changed"] = _setting("project_hid.bias", lambda value: value.add_(1.0))
    if hasattr(target.model, "projector"):
        made["a bias of the projector changed"] = _setting("projector.bias", lambda value: value.add_(1.0))
        moved = _setting("classifier.weight", lambda value: value.copy_(value.roll(1, dims=0)))
        made["the classes moved by one"] = moved if config.num_labels > 1 else "the model has one class"
    if isinstance(target, EncoderDecoderTarget):
        made |= _decoder_damages(target)
    return made


def _of_speech_to_text(target: SpeechToTextTarget) -> dict[str, Damage | str]:
    config, last = target.model.config, target.model.config.decoder_layers - 1
    attention = f"model.decoder.layers.{last}.encoder_attn."
    parts = ("weight", "bias")
    layers = [name for name in target.weights if name.startswith("model.encoder.layers.0.")]
    other = f"model.encoder.layers.{config.encoder_layers - 1}."
    made: dict[str, Damage | str] = {
        f"q and k of the cross-attention of decoder layer {last} swapped": _exchanging(
            [(f"{attention}q_proj.{part}", f"{attention}k_proj.{part}") for part in parts]
        ),
        "the convolutions' gates exchanged": _setting(
            "model.encoder.conv.conv_layers.0.weight", lambda value: value.copy_(value.roll(len(value) // 2, 0))
        ),
        "the embeddings moved by one symbol": _setting(
            "model.decoder.embed_tokens.weight", lambda value: value.copy_(value.roll(1, 0))
        ),
        "the final norm of the decoder lost": _setting(
            "model.decoder.layer_norm.weight", lambda value: value.fill_(1.0)
        ),
        "the other scale of embeddings": _configured(scale_embedding=not config.scale_embedding),
        "the other activation": _configured(
            activation_function="gelu" if config.activation_function != "gelu" else "relu"
        ),
        f"layers 0 and {config.encoder_layers - 1} of the encoder exchanged": _exchanging(
            [(name, other + name.removeprefix("model.encoder.layers.0.")) for name in layers]
        )
        if config.encoder_layers > 1
        else "the encoder has one layer",
    }
    for side in ("encoder", "decoder"):
        heads = getattr(config, f"{side}_attention_heads")
        wrong = heads // 2 if heads % 2 == 0 else 2 * heads
        name = f"{wrong} attention heads of the {side} instead of {heads}"
        fits = config.d_model % wrong == 0
        changed = _configured(**{f"{side}_attention_heads": wrong})
        made[name] = changed if fits else f"{wrong} does not divide {config.d_model}"
    return made


def _of_conformers(weights: Mapping[str, Any], prefix: str, layer: str) -> dict[str, Damage | str]:
    """What conformer layers have beside that; nothing for other models."""
    variance = f"{layer}conv_module.batch_norm.running_var"
    if variance not in weights:
        return {}
    made: dict[str, Damage | str] = {
        "a running variance lost": _setting(variance, lambda value: value.fill_(1.0)),
        "gelu instead of swish": _configured(hidden_act="gelu"),
    }
    frequencies = f"{prefix}encoder.embed_positions.inv_freq"
    if frequencies in weights:
        made["frequencies of the positions reversed"] = _setting(frequencies, lambda value: value.copy_(value.flip(0)))
    else:
        pair = (f"{layer}self_attn.pos_bias_u", f"{layer}self_attn.pos_bias_v")
        made["pos_bias_u and pos_bias_v swapped"] = _exchanging([pair])
    return made


def _decoder_damages(target: Target) -> dict[str, Damage | str]:
    config, decoder = target.model.config.decoder, "decoder.model.decoder."
    last = config.decoder_layers - 1
    first = f"{decoder}layers.0."
    names = [name.removeprefix(first) for name in target.weights if name.startswith(first)]
    pairs = [(first + name, f"{decoder}layers.{last}.{name}") for name in names]
    attention = f"{decoder}layers.{last}.encoder_attn."
    heads = config.decoder_attention_heads
    wrong = heads // 2 if heads % 2 == 0 else 1
    made: dict[str, Damage | str] = {
        f"q and k of the cross-attention in the decoder's layer {last} swapped": _exchanging(
            [(f"{attention}q_proj.{part}", f"{attention}k_proj.{part}") for part in ("weight", "bias")]
        ),
        f"the decoder's layers 0 and {last} exchanged": _exchanging(pairs) if last else "the decoder has one layer",
        "the decoder's positions moved by one": _setting(
            f"{decoder}embed_positions.weight", lambda value: value.copy_(value.roll(1, dims=0))
        ),
        "the decoder's embeddings not scaled": _configured(**{"decoder.scale_embedding": False}),
        "nothing but the end of the text generated": _mute,
    }
    several = heads > 1
    made[f"{wrong} attention heads in the decoder instead of {heads}"] = (
        _configured(**{"decoder.decoder_attention_heads": wrong}) if several else "the decoder has one attention head"
    )
    return made


@contextlib.contextmanager
def _mute(target: Target) -> Iterator[Target]:
    """Let `generate` end at once, which fairseq never does."""
    config = target.model.generation_config
    kept = config.min_new_tokens, config.suppress_tokens
    symbols = range(target.model.config.decoder.vocab_size)
    config.min_new_tokens, config.suppress_tokens = None, [index for index in symbols if index != config.eos_token_id]
    try:
        yield target
    finally:
        config.min_new_tokens, config.suppress_tokens = kept


def _setting(name: str, change: Callable[[torch.Tensor], Any]) -> Damage:
    @contextlib.contextmanager
    def damaged(target: Target) -> Iterator[Target]:
        tensor = target.weights[name]
        kept = tensor.clone()
        change(tensor)
        try:
            yield target
        finally:
            tensor.copy_(kept)

    return damaged


def _exchanging(pairs: list[tuple[str, str]]) -> Damage:
    @contextlib.contextmanager
    def damaged(target: Target) -> Iterator[Target]:
        def exchange() -> None:
            weights = target.weights
            for one, other in pairs:
                kept = weights[one].clone()
                weights[one].copy_(weights[other])
                weights[other].copy_(kept)

        exchange()
        try:
            yield target
        finally:
            exchange()

    return damaged


def _speaking(language: str) -> Damage:
    @contextlib.contextmanager
    def damaged(target: Target) -> Iterator[Target]:
        target.speak(language)
        try:
            yield target
        finally:
            target.speak("")

    return damaged


def _configured(**changes: Any) -> Damage:
    @contextlib.contextmanager
    def damaged(target: Target) -> Iterator[Target]:
        yield target.like(changes)

    return damaged


def one_unit(model_dir: Path, name: str, compare_weights: Callable[[Path], list[Problem]]) -> Control:
    """Change one number of one tensor by one unit in the last place, and run the byte comparison.

    The damaged copy holds that tensor alone; the comparison has to name it as changed, and must not when it is unchanged.

    Args:
        model_dir: the model directory.
        name: the tensor.
        compare_weights: the byte comparison of a model directory.
    """
    from convert.directory import ModelDirectory

    directory = ModelDirectory(model_dir)
    data = bytearray(directory.read(name))
    changed = bytearray(data)
    changed[0] ^= 1  # numbers are little-endian: this is the last bit of the first number's fraction
    spec = directory.tensors[name].spec
    header = header_bytes([(name, spec.dtype, spec.shape)])

    def named(content: bytearray) -> bool:
        with scratch_directory() as copy:
            for file in ("config.json", "conversion.json"):
                write_file(copy / file, read_file(model_dir / file))
            write_file(copy / "model.safetensors", header + content)
            return any((problem.code, problem.key) == ("bytes", name) for problem in compare_weights(copy))

    return Control("one number off by one unit in the last place", named(changed) and not named(data), "bytes")


def blank_and_pad(tokens: list[str], subject: Subject) -> Control:
    """Exchange the names of the blank and of fairseq's padding, and run the vocabulary's comparison."""
    wrong = list(tokens)
    one = max(subject.blank, 0)  # without a blank, what is as easily confused: `<s>` and `<pad>`
    other = 1 if one == 0 else 0
    wrong[one], wrong[other] = wrong[other], wrong[one]
    name = "blank and pad exchanged" if subject.blank >= 0 else "<s> and <pad> exchanged"
    return Control(name, bool(check_tokens(wrong, subject)), "vocabulary")


def exchanged_labels(labels: list[str], subject: Subject, spelling: str) -> Control:
    """Exchange the names of the first and the last class, and run the labels' comparison."""
    wrong = [labels[-1], *labels[1:-1], labels[0]]
    return Control("two labels exchanged", bool(check_labels(wrong, subject, spelling)), "labels")


def wrong_setting(meant: Mapping[str, Any]) -> Control:
    """Change one value of config.json that no output shows, and run the files' comparison."""
    part = meant.get("encoder", meant)
    name = next(name for name in ("layerdrop", "decoder_layerdrop") if name in part)
    damaged = {name: float(part[name]) + 0.25}
    changed = dict(meant) | ({"encoder": meant["encoder"] | damaged} if "encoder" in meant else damaged)
    found = [*differences("config.json", meant, changed)]
    clean = [*differences("config.json", meant, dict(meant))]
    return Control("a setting of training changed in config.json", bool(found) and not clean, "files")


def missing(controls: list[Control]) -> list[Problem]:
    """List the controls that were not caught."""
    return [
        Problem(
            "blind", control.name, f"this deliberate mistake was not caught by the {control.by}: the check is blind"
        )
        for control in controls
        if not control.caught
    ]
