"""The vocabulary's comparison: every id names fairseq's symbol, the blank is the blank, and text is spelled alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.errors import Problem
from convert.loading import load
from convert.verification.fairseq_side.tokens import PAD as PADDING
from convert.verification.reference import Subject

BLANK, PAD = "<s>", "<pad>"  # the two names that a conversion exchanges


def load_processor(model_dir: Path, language: str = "") -> Any:
    """Load the processor of a model with a vocabulary with plain transformers; in a language, where one is named.

    Raises:
        ConvertError: `load`, status 1: transformers cannot load it.
    """
    from transformers import AutoProcessor

    chosen: dict[str, Any] = {"target_lang": language} if language else {}
    return load(AutoProcessor, model_dir, status=1, **chosen)


def load_extractor(model_dir: Path) -> Any:
    """Load the feature extractor with plain transformers.

    Raises:
        ConvertError: `load`, status 1: transformers cannot load it.
    """
    from transformers import AutoFeatureExtractor

    return load(AutoFeatureExtractor, model_dir, status=1)


def tokens_of(tokenizer: Any, count: int) -> list[str]:
    """List the tokens by id."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(count)))]


def check_tokens(tokens: Sequence[str], subject: Subject) -> list[Problem]:
    """Compare the tokens with fairseq's symbols, id by id.

    fairseq calls its blank `<s>`, transformers calls it `<pad>`: those two names are exchanged, ids are not. Of a symbol that
    is listed again, the last id has the name, and the others have it with something behind it, each with something else.

    Args:
        tokens: transformers' tokens by id.
        subject: fairseq's dictionary.
    """
    symbols, last = list(subject.symbols), {symbol: index for index, symbol in enumerate(subject.symbols)}
    if subject.blank >= 0 and {BLANK, PAD} <= last.keys() and subject.blank == last[BLANK]:
        symbols[last[BLANK]], symbols[last[PAD]] = PAD, BLANK
    problems = []
    if len(tokens) != len(symbols):
        problems.append(
            Problem("vocabulary", "vocab.json", f"{len(tokens)} tokens, fairseq has {len(symbols)} symbols")
        )
    for index, (token, symbol) in enumerate(zip(tokens, symbols, strict=False)):
        again = last.get(symbol, index) > index  # listed again further down, and therefore not read as this id
        if token != symbol and not (again and token.startswith(symbol) and tokens.count(token) == 1):
            problems.append(Problem("vocabulary", f"id {index}", f"{token!r} here, {symbol!r} in fairseq"))
    return problems


def check_labels(labels: Sequence[str], subject: Subject, spelling: str) -> list[Problem]:
    """Compare a classifier's labels with fairseq's, class by class.

    Args:
        labels: transformers' labels by class.
        subject: fairseq's dictionary.
        spelling: all its labels in order, as fairseq itself names them.
    """
    problems = [
        Problem("labels", f"class {index}", f"{label!r} here, {symbol!r} in fairseq")
        for index, (label, symbol) in enumerate(zip(labels, subject.symbols, strict=False))
        if label != symbol
    ]
    if len(labels) != len(subject.symbols):
        detail = f"{len(labels)} labels, fairseq has {len(subject.symbols)}"
        problems.append(Problem("labels", "config.json's id2label", detail))
    elif not problems and " ".join(labels) != spelling:
        problems.append(Problem("labels", "config.json's id2label", f"fairseq's own dictionary says {spelling[:60]!r}"))
    return problems


def check(processor: Any, config: Mapping[str, Any], subject: Subject, spelling: str) -> list[Problem]:
    """Compare a processor with fairseq's dictionary and its way of making text.

    Args:
        processor: transformers' processor.
        config: the content of config.json.
        subject: fairseq's dictionary.
        spelling: what fairseq makes of a path that holds every ordinary symbol in order, twice.

    Returns:
        One problem for each thing that is not the same.
    """
    tokenizer = processor.tokenizer
    problems = check_tokens(tokens_of(tokenizer, len(tokenizer)), subject)
    ids = {
        "the tokenizer's pad_token_id": tokenizer.pad_token_id,
        "config.json's pad_token_id": config.get("pad_token_id"),
    }
    wanted, what = (subject.blank, "blank") if subject.blank >= 0 else (PADDING, "padding")
    for name, found in ids.items():
        if found != wanted:
            problems.append(Problem("vocabulary", name, f"is {found}; fairseq's {what} is {wanted}"))
    rows = config.get("decoder", config).get("vocab_size")
    if rows != len(subject.symbols):
        detail = f"is {rows}; fairseq has {len(subject.symbols)} symbols"
        problems.append(Problem("vocabulary", "config.json's vocab_size", detail))
    ordinary = [index for index in range(len(subject.symbols)) if index not in subject.special]
    between = [subject.blank] if subject.blank >= 0 else []
    found = transcribe(processor, [part for index in ordinary * 2 for part in (index, *between)], subject)
    if found != spelling:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, spelling, strict=False)) if a != b), min(len(found), len(spelling))
        )
        detail = f"spelled {found[at : at + 20]!r} from character {at} on, fairseq {spelling[at : at + 20]!r}"
        problems.append(Problem("spelling", "tokenizer", detail))
    return problems


def transcribe(processor: Any, path: Sequence[int], subject: Subject) -> str:
    """Turn a greedy path, or the tokens that a decoder generated, into text with transformers, as on fairseq's side.

    In a greedy path, `<pad>` and `</s>`, which no training asks of a frame, count as blank: fairseq writes the one as `<pad>`
    and the other not at all, transformers writes `<s>` and `</s>`.
    """
    if subject.blank < 0:
        return str(processor.tokenizer.decode(list(path), skip_special_tokens=True))
    unwritten = {index for index in subject.special if subject.symbols[index] in ("<pad>", "</s>")}
    kept = [subject.blank if index in unwritten else index for index in path]
    return str(processor.tokenizer.decode(kept))
