"""Both frameworks' models of one checkpoint: loading, outputs, the measured distance from float64, edited checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairseq_models
import torch
import transformers
from fairseq import checkpoint_utils
from fairseq.data import Dictionary

from convert.verification.fairseq_side.arithmetic import lifted

EVEN, ODD = (4120, 16040), (4160, 16000)  # samples that the feature convolutions make even and odd numbers of frames of


def load(directory: Path, target: str = "") -> torch.nn.Module:
    """Load with plain transformers, strictly: nothing missing, unexpected or mismatched."""
    name = target or json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        directory, output_loading_info=True, attn_implementation="sdpa"
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def outputs(model: torch.nn.Module, wave: torch.Tensor) -> list[torch.Tensor]:
    """fairseq's outputs: logits, or hidden states, chosen codes and both projections."""
    if hasattr(model, "w2v_encoder"):
        return [model.get_logits(model(source=wave, padding_mask=None)).transpose(0, 1)]
    features = model.extract_features(source=wave, padding_mask=None)
    hidden, unmasked = features["x"], features["features"]
    if model.quantizer is None:
        return [hidden]
    codes = model.quantizer(unmasked, produce_targets=True)
    return [hidden, codes["targets"], model.project_q(codes["x"]), model.final_proj(hidden)]


@torch.no_grad()
def counterpart_outputs(model: torch.nn.Module, wave: torch.Tensor) -> list[torch.Tensor]:
    """The same of transformers' model."""
    if isinstance(model, transformers.Wav2Vec2ForCTC):
        return [model(wave).logits]
    if isinstance(model, transformers.Wav2Vec2Model):
        return [model(wave).last_hidden_state]
    made = model.wav2vec2(wave)
    quantizer = model.quantizer
    scores = quantizer.weight_proj(made.extract_features)
    groups = scores.view(*scores.shape[:2], quantizer.num_groups, -1).argmax(-1)
    quantized, _ = quantizer(made.extract_features)
    return [made.last_hidden_state, groups, model.project_q(quantized), model.project_hid(made.last_hidden_state)]


def distance_from_float64(reference: torch.nn.Module, twin: torch.nn.Module, wave: torch.Tensor) -> float:
    """A measured floor: how far float32 is from float64 on either side, each side measured against itself.

    Measured against one side's float64, the other's mistakes would be part of what is allowed.
    """
    rounded = (outputs(reference, wave), counterpart_outputs(twin, wave))
    with lifted(reference.double()):
        exact = (outputs(reference, wave.double()), counterpart_outputs(twin.double(), wave.double()))
    reference.float(), twin.float()  # as they were: float64 holds every float32
    return sum(
        max(float((side - best).abs().max()) for side, best in zip(*pair, strict=True) if side.is_floating_point())
        for pair in zip(rounded, exact, strict=True)
    )


def config(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return loaded


def write_dictionary(path: Path, symbols: tuple[str, ...] = tuple(fairseq_models.LETTERS)) -> Path:
    path.write_text("".join(f"{symbol} 1\n" for symbol in symbols), "utf-8")
    return path


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)
    return path


torch.serialization.add_safe_globals([Dictionary])  # fairseq's loader leaves torch.load at its default, weights only


def fairseq_loads(path: Path, **overrides: Any) -> tuple[torch.nn.Module, Any]:
    """Load with fairseq's own loader; the overrides are those of its sections."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
    return model.eval(), task
