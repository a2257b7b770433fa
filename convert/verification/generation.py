"""What speech-to-text models write: both sides generate from the same features, and how transformers makes features is compared."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from convert.errors import Problem
from convert.verification.compare import compare
from convert.verification.endtoend import EndToEnd, Sides
from convert.verification.fairseq_side.tokens import PAD, language_of
from convert.verification.inputs import Cut
from convert.verification.reference import Subject
from convert.verification.target import SpeechToTextTarget

if TYPE_CHECKING:
    import torch


def generate(sides: Sides, target: SpeechToTextTarget, name: str, piece: Cut) -> list[EndToEnd]:
    """Let both sides transcribe one waveform, from the same features: with a beam of one, and with the recipe's.

    Args:
        sides: both of them.
        target: transformers' side.
        name: the input's name in the report.
        piece: the waveform.
    """
    import numpy as np
    import torch

    raw, subject = sides.raw(piece), sides.subject
    waveform, language = torch.from_numpy(raw), language_of(subject.symbols)
    _, answer, theirs = sides.reference.end_to_end(piece)
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
            ours, why = sides.spell(tokens) if sides.spell else "", ""
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


def check_features(sides: Sides, piece: Cut) -> list[Problem]:
    """Compare how transformers normalises filter banks with `UtteranceCMVN`, and how it pads a batch with fairseq's datasets.

    The allowance is what float32 makes of fairseq's formula on these numbers, measured against float64, on both sides.
    """
    import numpy as np

    extractor, raw = sides.extractor, sides.raw(piece)
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
