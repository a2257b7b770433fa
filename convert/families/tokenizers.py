"""Vocabulary, tokenizer and feature extractor, so that Hugging Face decodes and normalises what fairseq would.

fairseq's CTC blank is id 0, named `<s>` (`blank_symbol` of its tasks, `CtcCriterion.blank_idx`), also where a dictionary
lists `<ctc_blank>`, which is an ordinary symbol then; Hugging Face calls the blank `<pad>`. Only the two names are exchanged:
ids and weights stay. fairseq turns ids into text by joining symbols with spaces and applying the criterion's `post_process`
(`fairseq.data.data_utils.post_process`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.errors import Problem
from convert.families.settings import Reader

SUBWORDS = "sentencepiece.bpe.model"  # what transformers' Speech2TextTokenizer calls it
Steps = Sequence[Mapping[str, Any]]  # of a decoder of the `tokenizers` library


def _replace(what: str, by: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: what}, "content": by}


# not `Strip`, which panics where nothing is left to strip, as of silence
_STRIP = _replace(r"^\s+|\s+$", "", "Regex")


def _words(delimiter: str) -> Steps:
    return ({"type": "Fuse"}, _replace(" ", ""), _replace(delimiter, " "), _STRIP)


# a space between two symbols; no symbol starts with this prefix, which would be taken away
_ONE_BY_ONE = ({"type": "WordPiece", "prefix": "\U0010fffd", "cleanup": False}, {"type": "Fuse"})
# fairseq's name of a `post_process` -> what it does to the symbols
POST_PROCESS: dict[str, Steps] = {
    "letter": _words("|"),
    "sentencepiece": _words("▁"),
    "wordpiece": _words("_"),
    "_EOW": _words("_EOW"),
    "silence": (*_ONE_BY_ONE, _replace("<SIL>", ""), _replace(" +", " ", "Regex"), _STRIP),
    "subword_nmt": (*_ONE_BY_ONE, _replace("@@( |$)", "", "Regex"), _replace(r"\s+$", "", "Regex")),
    "@@ ": (*_ONE_BY_ONE, _replace("@@( |$)", "", "Regex"), _replace(r"\s+$", "", "Regex")),
    "@@": (*_ONE_BY_ONE, _replace("@@", ""), _replace(r"\s+$", "", "Regex")),
    "none": _ONE_BY_ONE,
}


@dataclass(frozen=True, slots=True)
class Processor:
    """The files beside the weights.

    Args:
        files: file name -> JSON content.
        ids: the special tokens' ids for `config.json`; empty without a vocabulary.
        decoding: how text is made: `letter`, `sentencepiece`, `phonemes`, or empty without a vocabulary.
    """

    files: Mapping[str, Any]
    ids: Mapping[str, int]
    decoding: str


def make_processor(
    dictionary: Dictionary | None,
    criterion: Mapping[str, Any],
    task: Reader,
    problems: list[Problem],
    post_process: str = "",
) -> Processor:
    """Make the processor's files.

    Args:
        dictionary: the target dictionary; `None` for a model without a vocabulary.
        criterion: the criterion's settings: `post_process`.
        task: the task's settings: `sample_rate`, `normalize`, `labels`.
        problems: what cannot be represented is added here.
        post_process: what the caller asks for in place of the criterion's.
    """
    features = waveform_features(task.get("normalize", bool), task.count("sample_rate", 16000))
    if dictionary is None:
        features["processor_class"] = "Wav2Vec2FeatureExtractor"  # or AutoProcessor looks for a tokenizer, and fails
        return Processor({"preprocessor_config.json": features}, {}, "")
    features["processor_class"] = "Wav2Vec2Processor"
    if not set(dictionary.special) >= {"<s>", "<pad>"}:
        problems.append(Problem("bad-dictionary", "dictionary", "has no <s> and <pad>: no CTC vocabulary"))
    vocabulary, mark = vocab(dictionary), mark_of(dictionary.symbols)
    again = [unique(dictionary.symbols)[0], mark] if mark else []  # `Dictionary.string` never writes id 0
    marks = [text for text in again if text.endswith(mark)]
    named = post_process_of(criterion, task.values, post_process)
    if named not in POST_PROCESS:
        problems.append(_unknown(named, "criterion.post_process"))
    decoding = "phonemes" if named == "none" else named
    tokenizer: dict[str, Any] = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "processor_class": "Wav2Vec2Processor",
        "unk_token": "<unk>",
    }
    files: dict[str, Any] = {"vocab.json": vocabulary, "preprocessor_config.json": features}
    if decoding == "phonemes" and not mark:
        tokenizer |= {
            "tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer",
            "do_phonemize": False,
            "phonemizer_lang": "en-us",
        }
        tokenizer |= {"phone_delimiter_token": " ", "word_delimiter_token": None}
    elif decoding == "letter" and is_plain(dictionary) and not mark:
        tokenizer |= {"tokenizer_class": "Wav2Vec2CTCTokenizer", "replace_word_delimiter_char": " "}
        tokenizer["word_delimiter_token"] = "|" if "|" in vocabulary else None
    else:
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        special = ("<pad>", *(name for name in ("<s>", "</s>", "<unk>") if name in vocabulary))
        delimiter = "▁" if decoding == "sentencepiece" else "|"  # which nothing reads, without `cleanup`
        collapse = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": delimiter, "cleanup": False}
        files["tokenizer.json"] = _fast(vocabulary, special, _decoder(POST_PROCESS.get(named, ()), marks, collapse))
    files["tokenizer_config.json"] = tokenizer
    ids = {
        "pad_token_id": vocabulary.get("<pad>", 0),
        "bos_token_id": vocabulary.get("<s>", 1),
        "eos_token_id": vocabulary.get("</s>", 2),
    }
    return Processor(files, ids, decoding)


def waveform_features(normalize: bool, rate: int) -> dict[str, Any]:
    """Make `preprocessor_config.json` of a model that takes waveforms, but for `processor_class`."""
    return {
        "do_normalize": normalize,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # transformers' own converter says false for group norm models; fairseq always masks the padding, and so does fairseq2
        "return_attention_mask": True,
        "sampling_rate": rate,
    }


def post_process_of(criterion: Mapping[str, Any], task: Mapping[str, Any], asked: str = "") -> str:
    """Name fairseq's `post_process` of a model with a CTC head; the symbols of phone labels stay separated by spaces.

    Args:
        criterion, task: their settings.
        asked: what the caller asks for in their place.
    """
    if not asked and labels_of(task) in ("phn", "phones"):
        return "none"
    return asked or str(criterion.get("post_process") or criterion.get("remove_bpe") or "letter")


def _unknown(named: str, where: str) -> Problem:
    detail = f"{named[:60]!r} is not one of fairseq's ways to make text: {', '.join(POST_PROCESS)}"
    hint = "correct it with --post-process NAME, or leave the vocabulary out: --head encoder"
    return Problem("unsupported-setting", where, detail, hint)


def make_sequence_processor(
    dictionary: Dictionary | None, task: Reader, problems: list[Problem], post_process: str = ""
) -> Processor:
    """Make the processor's files of a model whose decoder writes the dictionary's symbols: none of them is a blank.

    Text is what `Dictionary.string` makes of ids: `<s>` and `</s>` are left out, `<unk>` is written.

    Args:
        dictionary: the target dictionary.
        task: the task's settings: `eval_wer`, `eval_wer_post_process`, `labels`, and those of `make_processor`.
        problems: what cannot be represented is added here.
        post_process: what the caller asks for in place of the task's.
    """
    features = make_processor(None, {}, task, problems).files["preprocessor_config.json"]
    if dictionary is None:
        return Processor({"preprocessor_config.json": features}, {}, "")
    if dictionary.symbols[:4] != SPECIAL or any(symbol in SPECIAL for symbol in dictionary.symbols[4:]):
        detail = f"{', '.join(SPECIAL)} must come first, and nowhere else"
        problems.append(Problem("bad-dictionary", "dictionary", detail))
    decoding = sequence_decoding(dictionary.symbols, task.values, post_process)
    if decoding not in POST_PROCESS:
        problems.append(_unknown(decoding, "eval_wer_post_process"))
    mark = mark_of(dictionary.symbols)
    names = {name: index for index, name in enumerate(unique(dictionary.symbols))}
    steps = () if decoding == "none" and not mark else POST_PROCESS.get(decoding, ())
    tokenizer = {"bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer |= {"processor_class": "Wav2Vec2Processor", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {
        "preprocessor_config.json": features | {"processor_class": "Wav2Vec2Processor"},
        "tokenizer.json": _fast(names, SPECIAL[:3], _decoder(steps, [mark] if mark else [])),
        "tokenizer_config.json": tokenizer,
        "vocab.json": names,
    }
    return Processor(files, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, decoding)


def sequence_decoding(symbols: Sequence[str], task: Mapping[str, Any], asked: str = "") -> str:
    """Name fairseq's `post_process` of a model with a decoder.

    The task has it as `eval_wer_post_process`, which says `letter` where nobody set it, and acts with `eval_wer` only:
    without, symbols with sentencepiece's mark are not taken for letters. `asked` is what the caller asks for in its place.
    """
    if asked:
        return asked
    if task.get("labels") in ("phn", "phones"):
        return "none"
    named = str(task.get("eval_wer_post_process") or "letter")
    if named == "letter" and not task.get("eval_wer") and any("▁" in symbol for symbol in symbols):
        return "sentencepiece"
    return named


def vocab(dictionary: Dictionary) -> dict[str, int]:
    """Return `vocab.json`: every symbol's id, the names of the blank and of the padding exchanged.

    Example:
        >>> vocab(Dictionary(("<s>", "<pad>", "</s>", "<unk>", "|", "E"), (1,) * 6))
        {'<pad>': 0, '<s>': 1, '</s>': 2, '<unk>': 3, '|': 4, 'E': 5}
    """
    names = unique(dictionary.symbols)
    if "<s>" in names and "<pad>" in names:
        blank, padding = names.index("<s>"), names.index("<pad>")
        names[blank], names[padding] = "<pad>", "<s>"
    return {name: index for index, name in enumerate(names)}


def unique(symbols: Sequence[str]) -> list[str]:
    """Give every id a name of its own: a dictionary's file may list a symbol again, with `#fairseq:overwrite`.

    To fairseq, the symbol then is its last id, and the others are read as it: they get a mark, which the decoder takes away.
    """
    mark, left = mark_of(symbols), Counter(symbols)
    names = []
    for symbol in symbols:
        left[symbol] -= 1
        names.append(symbol + mark * left[symbol])
    return names


def mark_of(symbols: Sequence[str]) -> str:
    """Choose the mark of `unique`: a character for private use that no symbol has; nothing where no symbol is repeated."""
    if len(set(symbols)) == len(symbols):
        return ""
    used = {letter for symbol in symbols for letter in symbol}
    return next(chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)


def labels_of(task: Mapping[str, Any]) -> str:
    """Name the kind of labels, such as `ltr`; some tasks have a list of one, and an old Namespace its text.

    Example:
        >>> labels_of({"labels": "phn"}), labels_of({"labels": ["phn"]}), labels_of({"labels": "['phn']"})
        ('phn', 'phn', 'phn')
    """
    return str(task.get("labels")).strip("[]'\" ")


def is_plain(dictionary: Dictionary) -> bool:
    """Whether joining symbols and replacing the symbol `|` gives what replacing characters of the joined text gives."""
    symbols = dictionary.symbols[len(dictionary.special) :]
    return not any(" " in symbol or ("|" in symbol and symbol != "|") for symbol in symbols)


def _decoder(steps: Steps, marks: Sequence[str], *first: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a `tokenizers` file that makes text of symbols.

    Args:
        steps: what `post_process` does; nothing where symbols are separated by spaces, and stay so.
        marks: what is taken away before; see `unique`.
        first: what is done to the symbols before.
    """
    if not steps:
        return None
    return {"type": "Sequence", "decoders": [*first, *(_replace(mark, "") for mark in marks), *steps]}


def tokenizer_file(vocabulary: Mapping[str, int], special: Sequence[str], **parts: Any) -> dict[str, Any]:
    """Make the content of `tokenizer.json` of its vocabulary, the special symbols in it, and the parts that do the work."""
    added = [
        {"id": vocabulary[name], "content": name, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for name in special
    ]
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))
    return {"version": "1.0", "added_tokens": added, **unused, **parts}


def _fast(vocabulary: Mapping[str, int], special: Sequence[str], decoder: dict[str, Any] | None) -> dict[str, Any]:
    """A `tokenizers` file of whole symbols, which are separated by spaces when text is read."""
    return tokenizer_file(
        vocabulary,
        special,
        pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
        decoder=decoder,
        model={"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": "<unk>"},
    )
