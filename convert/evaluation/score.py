"""Word and character error rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from convert.errors import ConvertError

# What is done to reference and hypothesis before they are compared; results carry the name.
NORMALIZERS: Mapping[str, Callable[[str], str]] = MappingProxyType({"none": str, "lowercase": str.lower})


@dataclass(frozen=True, slots=True)
class Scores:
    """Error rates over a whole dataset, as fractions: the sum of errors over the sum of reference words.

    Args:
        wer: word error rate; above 1 when more words are inserted than the references have.
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
        references: one text for each utterance.
        hypotheses: what the model wrote, in the same order.
        normalizer: a key of `NORMALIZERS`; `none` compares the texts as they are.

    Raises:
        ConvertError: `no-words`: the references have no word.

    Example:
        >>> score(["THE FOX", "RUNS"], ["THE BOX", "RUNS"]).word_errors
        1
    """
    import jiwer

    change = NORMALIZERS[normalizer]
    expected, found = list(map(change, references)), list(map(change, hypotheses))
    if not any(text.split() for text in expected):
        hint = "check the transcripts, or the column that --text-column names"
        raise ConvertError("the transcripts have no words, so there is no error rate", code="no-words", hint=hint)
    counts = jiwer.process_words(expected, found)
    errors = counts.substitutions + counts.deletions + counts.insertions
    words = counts.hits + counts.substitutions + counts.deletions
    return Scores(errors / words, jiwer.process_characters(expected, found).cer, errors, words)


def case_hint(references: Sequence[str], hypotheses: Sequence[str], scores: Scores, normalizer: str) -> str:
    """Return a sentence when most errors are a difference of case only; otherwise an empty text.

    Example:
        >>> case_hint(["the fox"], ["THE FOX"], score(["the fox"], ["THE FOX"]), "none")[:54]
        'the model writes upper case, the references lower case'
    """
    if normalizer != "none" or scores.wer < 0.5:
        return ""
    folded = score(references, hypotheses, "lowercase")
    if folded.wer > scores.wer / 2:
        return ""
    return (
        f"the model writes {_case(hypotheses)} case, the references {_case(references)} case: "
        f"without case the WER is {folded.wer:.2%}; "
        "texts are compared as they are unless --normalizer lowercase is given"
    )


def _case(texts: Sequence[str]) -> str:
    joined = "".join(texts)
    return "upper" if joined == joined.upper() else "lower" if joined == joined.lower() else "mixed"
