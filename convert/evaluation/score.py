"""Counts word and character errors, and explains an error rate that only letter case causes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from convert.errors import ConvertError
from convert.evaluation.packages import require


def _as_it_stands(text: str) -> str:
    return text


# What is done to reference and hypothesis alike before they are compared; the name stands in the results.
NORMALIZERS: Mapping[str, Callable[[str], str]] = MappingProxyType({"none": _as_it_stands, "lowercase": str.lower})


@dataclass(frozen=True, slots=True)
class Scores:
    """Error rates over a whole dataset, as fractions of the reference: the sum of errors over the sum of words.

    Args:
        wer: word error rate; above 1 when more was inserted than there is.
        cer: character error rate, spaces counted.
        word_errors: substitutions, deletions and insertions.
        words: words of the references.
    """

    wer: float
    cer: float
    word_errors: int
    words: int


def score(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "none") -> Scores:
    """Measure word and character error rate with jiwer.

    Args:
        references: what was said, one text an utterance.
        hypotheses: what was heard, in the same order.
        normalizer: a name of `NORMALIZERS`; `none` compares the texts as they stand.

    Raises:
        ConvertError: jiwer is missing, or the references hold no word.

    Example:
        >>> score(["THE FOX", "RUNS"], ["THE BOX", "RUNS"]).word_errors
        1
    """
    jiwer = require("jiwer")
    change = NORMALIZERS[normalizer]
    pairs = [(change(said), change(heard)) for said, heard in zip(references, hypotheses, strict=True)]
    if not any(said.split() for said, _ in pairs):
        raise ConvertError("the transcripts hold no word, so that there is no error rate", code="no-words")
    said_all, heard_all = [said for said, _ in pairs], [heard for _, heard in pairs]
    found = jiwer.process_words(said_all, heard_all)
    errors = found.substitutions + found.deletions + found.insertions
    words = found.hits + found.substitutions + found.deletions
    return Scores(errors / words, jiwer.process_characters(said_all, heard_all).cer, errors, words)


def case_hint(references: Sequence[str], hypotheses: Sequence[str], scores: Scores, normalizer: str) -> str:
    """Say so in one sentence when most errors are a difference of case only; otherwise nothing.

    Example:
        >>> case_hint(["the fox"], ["THE FOX"], score(["the fox"], ["THE FOX"]), "none")[:54]
        'the model writes upper case, the references lower case'
    """
    if normalizer != "none" or scores.wer < 0.5:
        return ""
    folded = score(references, hypotheses, "lowercase")
    if folded.wer > scores.wer / 2:
        return ""
    writes, said = _case(hypotheses), _case(references)
    return (
        f"the model writes {writes} case, the references {said} case: without case the WER is {folded.wer:.2%}; "
        "texts are compared as they stand unless --normalizer lowercase is given"
    )


def _case(texts: Sequence[str]) -> str:
    joined = "".join(texts)
    return "upper" if joined == joined.upper() else "lower" if joined == joined.lower() else "mixed"
