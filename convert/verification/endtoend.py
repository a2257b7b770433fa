"""From the waveform to the text: each side with its own normalisation, and the known difference of the two, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.audio import Waveform
from convert.errors import Problem
from convert.verification.compare import GENERATED, Stage, Verdict, compare
from convert.verification.inputs import EPSILON, Cut, cut
from convert.verification.reference import Reference, Subject
from convert.verification.target import Target

if TYPE_CHECKING:
    import torch

# transformers' Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm adds another constant to the variance than fairseq
THEIR_EPSILON = 1e-7


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides, from the waveform to the text.

    Args:
        subject: the checkpoint.
        reference, target: the models.
        extractor: transformers' feature extractor.
        spell: turns the best symbols, or tokens, into text with transformers; `None` without a vocabulary.
        clips: the waveforms by name.
    """

    subject: Subject
    reference: Reference
    target: Target
    extractor: Any
    spell: Callable[[Sequence[int]], str] | None
    clips: Mapping[str, Waveform]

    def raw(self, piece: Cut) -> Waveform:
        """A waveform as it was recorded."""
        return cut(dict(self.clips), piece)


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """One waveform, all the way.

    Args:
        input: the waveform's name.
        device: where the models ran.
        verdict: `identical` (the same bits all the way), `explained` (the inputs differ by the two frameworks' constants of
            normalisation, or the bits cannot be the same, and the models are the same on equal inputs), or `different`.
        fairseq_std, hf_std: the standard deviation of each side's normalised waveform.
        max_abs_difference: of the last stage: logits, projections or hidden states.
        stage: that stage.
        same_path: the share of frames with the same most likely symbol; `None` where frames have none.
        fairseq_text, hf_text: the transcripts, or the best labels.
        why: what was found wrong, or what the difference is.
    """

    input: str
    device: str
    verdict: str
    fairseq_std: float
    hf_std: float
    max_abs_difference: float | None
    stage: str
    same_path: float | None
    fairseq_text: str | None
    hf_text: str | None
    why: str


def run(sides: Sides, name: str, piece: Cut, *, exact: bool, proved: bool) -> EndToEnd:
    """Take one waveform through both sides.

    Args:
        sides: both of them.
        name: the input's name in the report.
        piece: the waveform.
        exact: whether the bits can be the same when the inputs are.
        proved: whether the models were found to be the same on equal inputs; only then other inputs explain a difference.
    """
    import numpy as np
    import torch

    reference, target, subject, spell = sides.reference, sides.target, sides.subject, sides.spell
    raw = sides.raw(piece)
    features = sides.extractor(raw, sampling_rate=subject.rate, return_tensors="np")
    mine = np.asarray(features["input_values"][0], np.float32)
    theirs, answer, text = reference.end_to_end(piece)
    why, same_input = _normalisation(raw, mine, theirs, subject.normalize)
    wrong = bool(why)
    last = target.output
    values: dict[str, torch.Tensor] = {}

    def visit(stage: str, value: torch.Tensor) -> None:
        if stage in (last, GENERATED, "pooled"):
            values[stage] = value.clone()

    target.run(torch.from_numpy(mine)[None], None, visit)
    difference = compare(last, answer.stages[last], values[last])
    path = None
    written, spelled = None, text
    if last == "logits" or GENERATED in values:
        stage = last if last == "logits" else GENERATED
        ours, other = (_path(stage, found) for found in (values[stage], _whole(answer.stages[stage])))
        path = None if "pooled" in values else _agreement(ours, other)
        written = spell(ours) if spell else None
        spelled = spell(other) if spell and reference.blank is not None else text
    if difference.note:
        wrong, why = True, difference.note
    elif spelled != text and not wrong:
        wrong, why = True, f"of the same symbols transformers makes {spelled[:40]!r}, fairseq {text[:40]!r}"
    elif not wrong and same_input and exact and not difference.equal:
        wrong, why = True, f"the inputs are the same bits, and {difference}"
    elif not wrong and not proved and not difference.equal:
        wrong, why = True, "the models differ on equal inputs too"
    if not why and not difference.equal:
        constants = f"fairseq adds {EPSILON:g} to the variance before it divides, transformers {THEIR_EPSILON:g}"
        why = "the two sides round differently here" if same_input else constants
    verdict: Verdict | str = "different" if wrong else "identical" if difference.equal else "explained"
    return EndToEnd(
        input=name,
        device=target.device,
        verdict=verdict,
        fairseq_std=float(np.std(_fairseqs(raw, subject.normalize) if theirs is None else theirs, dtype=np.float64)),
        hf_std=float(np.std(mine, dtype=np.float64)),
        max_abs_difference=difference.greatest if difference.greatest < float("inf") else None,
        stage=last,
        same_path=path,
        fairseq_text=text if last == "logits" or GENERATED in values else None,
        hf_text=written,
        why=why,
    )


def _path(stage: str, values: Any) -> list[int]:
    """The best symbol of every frame, or what was generated."""
    found: list[int] = (values[0] if stage == GENERATED else values.argmax(-1)).tolist()
    return found


def _agreement(ours: list[int], theirs: list[int]) -> float:
    if len(ours) != len(theirs):
        return 0.0
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _whole(stage: Stage) -> Any:
    return stage.values.reshape(stage.shape)


def _fairseqs(raw: Waveform, normalize: bool) -> Any:
    import numpy as np

    wide = raw.astype(np.float64)
    return (wide - wide.mean()) / np.sqrt(wide.var() + EPSILON) if normalize else wide


def _normalisation(raw: Waveform, mine: Waveform, theirs: Waveform | None, normalize: bool) -> tuple[str, bool]:
    """Say what is wrong with transformers' input, if anything, and whether both inputs are the same bits.

    The allowance is what float32 makes of these two formulas on this waveform, measured against float64.
    """
    import numpy as np

    wide = raw.astype(np.float64)
    if not normalize:
        if mine.shape != raw.shape or not np.array_equal(mine, raw):
            return "transformers changes the waveform, fairseq's task does not", False
        return "", theirs is None or np.array_equal(mine, theirs)
    meant = (wide - wide.mean()) / np.sqrt(wide.var() + THEIR_EPSILON)
    in_float32 = (raw - raw.mean()) / np.sqrt(raw.var() + np.float32(THEIR_EPSILON))
    allowed = float(np.abs(in_float32 - meant).max())
    if theirs is not None:
        allowed += float(np.abs(theirs - _fairseqs(raw, True)).max())
    apart = float(np.abs(mine - meant).max()) if mine.shape == raw.shape else float("inf")
    if not apart <= allowed:
        found = f"transformers' input is not the normalised waveform: off by {apart:.1e}, allowed {allowed:.1e}"
        return found, False
    return "", theirs is not None and bool(np.array_equal(mine, theirs))


def check_padding(sides: Sides, pieces: Sequence[Cut]) -> list[Problem]:
    """Check that transformers pads a batch as fairseq's datasets do: zeros on the right, and a mask that says so."""
    import numpy as np

    waves = [sides.raw(piece) for piece in pieces]
    features = sides.extractor(waves, sampling_rate=sides.subject.rate, padding=True, return_tensors="np")
    problems = []
    if "attention_mask" not in features:
        detail = "the feature extractor makes no attention mask; fairseq masks the padding of every model"
        return [Problem("padding", "preprocessor_config.json", detail)]
    longest = max(map(len, waves))
    meant = np.stack([np.arange(longest) < len(wave) for wave in waves])
    if not np.array_equal(np.asarray(features["attention_mask"]).astype(bool), meant):
        problems.append(
            Problem("padding", "preprocessor_config.json", "the attention mask is not that of right padding")
        )
    if np.asarray(features["input_values"])[~meant].any():
        problems.append(Problem("padding", "preprocessor_config.json", "the padding is not zero"))
    return problems
