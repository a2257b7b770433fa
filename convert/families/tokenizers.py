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
_DELIMITERS = {
    "letter": "|",
    "sentencepiece": "▁",
    "wordpiece": "_",
    "none": "",
}  # post_process -> what becomes a space


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
    dictionary: Dictionary | None, criterion: Mapping[str, Any], task: Reader, problems: list[Problem]
) -> Processor:
    """Make the processor's files.

    Args:
        dictionary: the target dictionary; `None` for a model without a vocabulary.
        criterion: the criterion's settings: `post_process`.
        task: the task's settings: `sample_rate`, `normalize`, `labels`.
        problems: what cannot be represented is added here.
    """
    features = {
        "do_normalize": task.get("normalize", bool),
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # transformers' own converter says false for group norm models; fairseq always masks the padding
        "return_attention_mask": True,
        "sampling_rate": task.count("sample_rate", 16000),
    }
    if dictionary is None:
        features["processor_class"] = "Wav2Vec2FeatureExtractor"  # or AutoProcessor looks for a tokenizer, and fails
        return Processor({"preprocessor_config.json": features}, {}, "")
    features["processor_class"] = "Wav2Vec2Processor"
    repeated = sorted(symbol for symbol, count in Counter(dictionary.symbols).items() if count > 1)
    if repeated or not set(dictionary.special) >= {"<s>", "<pad>"}:
        detail = f"symbols stand there twice: {repeated[:5]}" if repeated else "has no <s> and <pad>: no CTC vocabulary"
        problems.append(Problem("bad-dictionary", "dictionary", detail))
    vocabulary = vocab(dictionary)
    decoding = _decoding(criterion, task, problems)
    names = {symbol: index for symbol, index in vocabulary.items() if index < len(dictionary)}
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
    if decoding == "phonemes":
        tokenizer |= {
            "tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer",
            "do_phonemize": False,
            "phonemizer_lang": "en-us",
        }
        tokenizer |= {"phone_delimiter_token": " ", "word_delimiter_token": None}
    elif decoding == "letter" and is_plain(dictionary):
        tokenizer |= {"tokenizer_class": "Wav2Vec2CTCTokenizer", "replace_word_delimiter_char": " "}
        tokenizer["word_delimiter_token"] = "|" if "|" in names else None
    else:
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        special = ("<pad>", *(name for name in ("<s>", "</s>", "<unk>") if name in vocabulary))
        delimiter = "▁" if decoding == "sentencepiece" else "|"
        collapse = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": delimiter, "cleanup": False}
        files["tokenizer.json"] = _fast(vocabulary, special, _decoder(delimiter, collapse))
    files["tokenizer_config.json"] = tokenizer
    ids = {
        "pad_token_id": names.get("<pad>", 0),
        "bos_token_id": names.get("<s>", 1),
        "eos_token_id": names.get("</s>", 2),
    }
    return Processor(files, ids, decoding)


def make_sequence_processor(dictionary: Dictionary | None, task: Reader, problems: list[Problem]) -> Processor:
    """Make the processor's files of a model whose decoder writes the dictionary's symbols: none of them is a blank.

    Text is what `Dictionary.string` makes of ids: `<s>` and `</s>` are left out, `<unk>` is written.

    Args:
        dictionary: the target dictionary.
        task: the task's settings: `eval_wer`, `eval_wer_post_process`, `labels`, and those of `make_processor`.
        problems: what cannot be represented is added here.
    """
    features = make_processor(None, {}, task, problems).files["preprocessor_config.json"]
    if dictionary is None:
        return Processor({"preprocessor_config.json": features}, {}, "")
    if dictionary.symbols[:4] != SPECIAL or len(set(dictionary.symbols)) != len(dictionary):
        detail = f"{', '.join(SPECIAL)} must come first, and no symbol twice"
        problems.append(Problem("bad-dictionary", "dictionary", detail))
    decoding = sequence_decoding(dictionary.symbols, task.values)
    if decoding not in _DELIMITERS:
        detail = f"{decoding!r} has no counterpart among transformers' tokenizers; known: {', '.join(_DELIMITERS)}"
        problems.append(Problem("unsupported-setting", "eval_wer_post_process", detail))
    names = {symbol: index for index, symbol in enumerate(dictionary.symbols)}
    tokenizer = {"bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer |= {"processor_class": "Wav2Vec2Processor", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {
        "preprocessor_config.json": features | {"processor_class": "Wav2Vec2Processor"},
        "tokenizer.json": _fast(names, SPECIAL[:3], _decoder(_DELIMITERS.get(decoding, ""))),
        "tokenizer_config.json": tokenizer,
        "vocab.json": names,
    }
    return Processor(files, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, decoding)


def sequence_decoding(symbols: Sequence[str], task: Mapping[str, Any]) -> str:
    """Name fairseq's `post_process` of a model with a decoder.

    The task has it as `eval_wer_post_process`, which says `letter` where nobody set it, and acts with `eval_wer` only:
    without, symbols with sentencepiece's mark are not taken for letters.
    """
    if task.get("labels") in ("phn", "phones"):
        return "none"
    said = str(task.get("eval_wer_post_process") or "letter")
    if said == "letter" and not task.get("eval_wer") and any("▁" in symbol for symbol in symbols):
        return "sentencepiece"
    return said


def vocab(dictionary: Dictionary) -> dict[str, int]:
    """Return `vocab.json`: every symbol's id, the names of the blank and of the padding exchanged.

    Example:
        >>> vocab(Dictionary(("<s>", "<pad>", "</s>", "<unk>", "|", "E"), (1,) * 6))
        {'<pad>': 0, '<s>': 1, '</s>': 2, '<unk>': 3, '|': 4, 'E': 5}
    """
    symbols = list(dictionary.symbols)
    if symbols[:2] == ["<s>", "<pad>"]:
        symbols[0], symbols[1] = symbols[1], symbols[0]
    return {symbol: index for index, symbol in enumerate(symbols)}


def _decoding(criterion: Mapping[str, Any], task: Reader, problems: list[Problem]) -> str:
    """fairseq's `post_process`; symbols of phone labels stay separated by spaces."""
    value = criterion.get("post_process") or criterion.get("remove_bpe") or "letter"
    if labels_of(task.values) in ("phn", "phones"):
        return "phonemes"
    known = {"letter": "letter", "sentencepiece": "sentencepiece", "none": "phonemes"}
    if not isinstance(value, str) or value not in known:
        detail = f"{value!r} has no counterpart among transformers' tokenizers; known: {', '.join(known)}"
        problems.append(Problem("unsupported-setting", "criterion.post_process", detail))
    return known.get(value, "letter") if isinstance(value, str) else "letter"


def labels_of(task: Mapping[str, Any]) -> str:
    """Name the kind of labels, such as `ltr`; HuBERT's task has a list of one, and an old Namespace its text.

    Example:
        >>> labels_of({"labels": "phn"}), labels_of({"labels": ["phn"]}), labels_of({"labels": "['phn']"})
        ('phn', 'phn', 'phn')
    """
    return str(task.get("labels")).strip("[]'\" ")


def is_plain(dictionary: Dictionary) -> bool:
    """Whether joining symbols and replacing the symbol `|` gives what replacing characters of the joined text gives."""
    symbols = dictionary.symbols[len(dictionary.special) :]
    return not any(" " in symbol or ("|" in symbol and symbol != "|") for symbol in symbols)


def _decoder(delimiter: str, *first: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a `tokenizers` file that drops spaces, and replaces the delimiter wherever it is.

    Args:
        delimiter: what becomes a space; where it is empty, symbols are separated by spaces, and stay so.
        first: what is done to the symbols before.
    """
    if not delimiter:
        return None
    steps = [
        *first,
        {"type": "Fuse"},
        {"type": "Replace", "pattern": {"String": " "}, "content": ""},
        {"type": "Replace", "pattern": {"String": delimiter}, "content": " "},
        # not `Strip`, which panics where nothing is left to strip, as of silence
        {"type": "Replace", "pattern": {"Regex": r"^\s+|\s+$"}, "content": ""},
    ]
    return {"type": "Sequence", "decoders": steps}


def _fast(vocabulary: Mapping[str, int], special: Sequence[str], decoder: dict[str, Any] | None) -> dict[str, Any]:
    """A `tokenizers` file of whole symbols, which are separated by spaces when text is read."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[name], "content": name, "special": True, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
            for name in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": "<unk>"},
    }
