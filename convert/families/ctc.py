"""The CTC head (`fairseq.models.wav2vec.wav2vec2_asr.Wav2VecCtc`): one projection to the dictionary, on any encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.families.base import Kind, Part, Shapes, Sources
from convert.families.settings import Reader, Value
from convert.rules import Add, Edit, Rename, Set

# fmt: off
HEAD = (
    Rename("w2v_encoder.proj.weight",                              "lm_head.weight",                                               "vocab hidden"),
    Rename("w2v_encoder.proj.bias",                                "lm_head.bias",                                                 "vocab"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Symbols(Part):
    """The geometry of the head.

    Args:
        vocab: the rows of the projection.
    """

    vocab: int

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the head's rules name."""
        return {"vocab": self.vocab}


def _measure(shapes: Shapes) -> Symbols:
    return Symbols(shapes.get("w2v_encoder.proj.bias", (0,))[0])


def _values(sources: Sources) -> list[Value]:
    """What CTC fine-tuning adds: the dropout before the head, and the loss."""
    outer = sources.outer
    return [
        Value("final_dropout", outer.get("final_dropout", float, 0.0), outer.origin("final_dropout")),
        Value("ctc_loss_reduction", "sum", "CtcCriterion sums"),
        Value("ctc_zero_infinity", sources.criterion.get("zero_infinity") is True, "criterion.zero_infinity"),
    ]


def _blank(sources: Sources) -> list[Edit]:
    """`Wav2VecCtc.get_logits`: a constant on the blank's logit becomes part of the head's row 0."""
    outer = sources.outer.values
    weight, mode = outer.get("blank_weight") or 0, outer.get("blank_mode") or "add"
    if not weight:
        return []
    if mode not in ("add", "set"):
        sources.refuse("bad-setting", "blank_mode", f"`add` or `set` expected, {mode!r} found")
        return []
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        sources.refuse("bad-setting", "blank_weight", f"a number expected, {str(weight)[:60]!r} found")
        return []
    reason = f"blank_weight {weight} in mode {mode}"
    if mode == "add":
        return [Edit("lm_head.bias", 0, Add(float(weight)), reason)]
    return [Edit("lm_head.weight", 0, Set(0.0), reason), Edit("lm_head.bias", 0, Set(float(weight)), reason)]


def from_config(config: Reader) -> dict[str, dict[str, Any]]:
    """What fine-tuning with CTC adds to each section of the settings, of `config.json`; see `Kind.from_config`."""
    criterion = {
        "_name": "ctc",
        "zero_infinity": config.get("ctc_zero_infinity", bool, False),
        "post_process": "letter",
    }
    return {"model": tuned(config), "criterion": criterion}


def tuned(config: Reader) -> dict[str, Any]:
    """What every fine-tuned model has, of config.json."""
    names = {"apply_mask": ("apply_spec_augment", bool, True), "final_dropout": ("final_dropout", float, 0.1)}
    return {name: config.get(*field) for name, field in names.items()}


CTC = Kind(
    name="ctc",
    rules=HEAD,
    mark=r"^w2v_encoder\.proj\.",
    ranks={"w2v_encoder.proj.bias": 1},
    measure=_measure,
    nested=True,
    read=frozenset({"apply_mask", "blank_mode", "blank_weight", "final_dropout", "normalize"}),
    symbols="w2v_encoder.proj.bias",
    values=_values,
    edits=_blank,
    from_config=from_config,
    task="audio_finetuning",  # audio_pretraining until June 2021
)
