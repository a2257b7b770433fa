"""From the waveform to the text: each side with its own normalisation, and the known difference of the two, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.audio import Waveform
from convert.errors import Problem
from convert.verification.compare import GENERATED, Stage, Verdict, compare
from convert.verification.fairseq_side.tokens import PAD, language_of
from convert.verification.inputs import EPSILON, Cut, cut
from convert.verification.reference import Reference, Subject
from convert.verification.target import SpeechToTextTarget, Target

if TYPE_CHECKING:
    import torch

# transformers' Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm adds another constant to the variance than fairseq
THEIR_EPSILON = 1e-7


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


def run(
    reference: Reference,
    target: Target,
    extractor: Any,
    spell: Callable[[Sequence[int]], str] | None,
    clips: Mapping[str, Waveform],
    name: str,
    piece: Cut,
    subject: Subject,
    *,
    exact: bool,
    proved: bool,
) -> EndToEnd:
    """Take one waveform through both sides.

    Args:
        reference, target: the models.
        extractor: transformers' feature extractor.
        spell: turns the best symbols into text with transformers; `None` without a vocabulary.
        clips: the waveforms by name.
        name: the input's name in the report.
        piece: the waveform.
        subject: the checkpoint.
        exact: whether the bits can be the same when the inputs are.
        proved: whether the models were found to be the same on equal inputs; only then other inputs explain a difference.
    """
    import numpy as np
    import torch

    raw = cut(dict(clips), piece)
    features = extractor(raw, sampling_rate=subject.rate, return_tensors="np")
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


def check_padding(extractor: Any, clips: Mapping[str, Waveform], pieces: list[Cut], subject: Subject) -> list[Problem]:
    """Check that transformers pads a batch as fairseq's datasets do: zeros on the right, and a mask that says so."""
    import numpy as np

    waves = [cut(dict(clips), piece) for piece in pieces]
    features = extractor(waves, sampling_rate=subject.rate, padding=True, return_tensors="np")
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


def generate(
    reference: Reference,
    target: SpeechToTextTarget,
    spell: Callable[[list[int]], str],
    clips: Mapping[str, Waveform],
    name: str,
    piece: Cut,
    subject: Subject,
) -> list[EndToEnd]:
    """Let both sides transcribe one waveform, from the same features: with a beam of one, and with the recipe's.

    Args:
        reference, target: the models.
        spell: turns tokens into text with transformers.
        clips: the waveforms by name.
        name: the input's name in the report.
        piece: the waveform.
        subject: the checkpoint.
    """
    import numpy as np
    import torch

    raw = cut(dict(clips), piece)
    waveform, language = torch.from_numpy(raw), language_of(subject.symbols)
    _, answer, theirs = reference.end_to_end(piece)
    values: dict[str, torch.Tensor] = {}

    def visit(stage: str, value: torch.Tensor) -> None:
        if stage == target.output:
            values[stage] = value.clone()

    target.run(waveform[None], None, visit)
    difference = compare(target.output, answer.stages[target.output], values[target.output])
    spread = float(np.std(raw, dtype=np.float64))

    def made(name: str, theirs: str, beam: bool) -> EndToEnd:
        try:
            tokens = target.generate(waveform, language, beam=beam)
            ours, why = spell(tokens), ""
        except (IndexError, RuntimeError, ValueError) as error:  # what wrong settings of generation end in
            tokens, ours, why = [], "", f"transformers cannot generate: {type(error).__name__}: {error}"
        failed = bool(why)
        if beam and not failed and _written(tokens) != answer.beams[0][0]:
            why = _by_forced_tokens(target, waveform, _written(tokens), answer.beams[0][0], language, subject)
            failed = not why
        if (failed and not why) or (not why and ours != theirs):
            failed, why = True, f"transformers writes {ours[:40]!r}, fairseq {theirs[:40]!r}"
        if not why and not difference.equal:
            why = "the two sides round differently here"
        return EndToEnd(
            input=name,
            device=target.device,
            verdict="different" if failed else "explained" if why else "identical",
            fairseq_std=spread,
            hf_std=spread,
            max_abs_difference=difference.greatest if difference.greatest < float("inf") else None,
            stage=target.output,
            same_path=None,  # the texts say what is the same
            fairseq_text=theirs,
            hf_text=ours,
            why=why,
        )

    found = [made(name, theirs, beam=False)]
    if answer.beams:
        found.append(made(f"{name}, beam {subject.beam}", answer.beams[0][1], beam=True))
    return found


def _written(tokens: list[int]) -> list[int]:
    """The tokens without the one that transformers starts with, and without padding."""
    return [token for token in tokens[1:] if token != PAD]


def _by_forced_tokens(
    target: SpeechToTextTarget,
    waveform: torch.Tensor,
    ours: list[int],
    theirs: list[int],
    language: int | None,
    subject: Subject,
) -> str:
    """Say how transformers came to prefer another text, if by nothing but what it forces; otherwise nothing.

    transformers takes a token that it forces for certain: the end of a text that has the greatest length, and the symbol of a
    language. fairseq counts their probability. Each side has to prefer its own text by its own count.
    """
    longest = target.model.generation_config.max_length - 1

    def scores(tokens: list[int]) -> tuple[float, float]:
        each = target.log_probabilities(waveform, tokens)
        forced = (each[0] if language is not None else 0.0) + (each[-1] if len(tokens) == longest else 0.0)
        length = len(tokens) ** subject.length_penalty
        return sum(each) / length, (sum(each) - forced) / length

    (our_true, our_free), (their_true, their_free) = scores(ours), scores(theirs)
    if not (their_true >= our_true and our_free >= their_free):
        return ""
    forced = "the end at the greatest length" + ("" if language is None else " and the language's symbol")
    return (
        f"transformers takes {forced} for certain: by that its text scores {our_free:.3f}, fairseq's {their_free:.3f}; by "
        f"probability {our_true:.3f}, fairseq's {their_true:.3f}"
    )


def check_features(extractor: Any, clips: Mapping[str, Waveform], piece: Cut) -> list[Problem]:
    """Compare how transformers normalises filter banks with `UtteranceCMVN`, and how it pads a batch with fairseq's datasets.

    The allowance is what float32 makes of fairseq's formula on these numbers, measured against float64, on both sides.
    """
    import copy

    import numpy as np

    raw = cut(dict(clips), piece)
    plain = copy.copy(extractor)
    plain.do_ceptral_normalize = False
    banks = plain(raw, sampling_rate=extractor.sampling_rate)["input_features"][0]
    batch = extractor([raw, raw[: len(raw) // 2]], sampling_rate=extractor.sampling_rate, padding=True)
    found, mask = np.asarray(batch["input_features"]), np.asarray(batch["attention_mask"]).astype(bool)
    problems = []

    def normalised(values: Any) -> Any:
        if not extractor.do_ceptral_normalize:
            return values
        mean, spread = (
            values.mean(0),
            np.sqrt(np.maximum((values**2).sum(0) / len(values) - values.mean(0) ** 2, 1e-10)),
        )
        values = values - mean if extractor.normalize_means else values
        return values / spread if extractor.normalize_vars else values

    exact = normalised(banks.astype(np.float64))
    allowed = 2 * float(np.abs(normalised(banks) - exact).max())
    apart = float(np.abs(found[0] - exact).max()) if found[0].shape == exact.shape else float("inf")
    if not apart <= allowed:
        detail = f"its features are off by {apart:.1e} from fairseq's normalisation, allowed {allowed:.1e}"
        problems.append(Problem("features", "preprocessor_config.json", detail))
    shorter = len(plain(raw[: len(raw) // 2], sampling_rate=extractor.sampling_rate)["input_features"][0])
    meant = np.stack([np.arange(len(banks)) < count for count in (len(banks), shorter)])
    if not np.array_equal(mask, meant):
        detail = "the attention mask is not that of right padding"
        problems.append(Problem("padding", "preprocessor_config.json", detail))
    elif found[~meant].any():
        problems.append(Problem("padding", "preprocessor_config.json", "the padding is not zero"))
    return problems
