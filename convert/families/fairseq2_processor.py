"""The processor of a model of fairseq2: a tokenizer of single characters, out of the sentencepiece model beside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.checkpoint.dictionary import Dictionary
from convert.families.base import Sources
from convert.families.tokenizers import Processor, tokenizer_file, vocab, waveform_features

_SPACE = "\u2581"  # what sentencepiece writes for a space


def make_piece_processor(sources: Sources) -> Processor:
    """Make the processor's files."""
    task = sources.task
    if "normalize" not in task.values:
        sources.refuse(
            "no-normalize", "--normalize", "no config.yaml says whether the model was trained on normalised waveforms"
        )
    features = waveform_features(task.get("normalize", bool, False), 16000)
    if sources.head != "ctc":
        return Processor(
            {"preprocessor_config.json": features | {"processor_class": "Wav2Vec2FeatureExtractor"}}, {}, ""
        )
    dictionary = sources.dictionary = sources.checkpoint.dictionary or sources.request.dictionary
    tokenizer = task.values.get("tokenizer")
    if dictionary is None or not isinstance(tokenizer, Mapping):
        detail = "there is no tokenizer (a sentencepiece .model) next to the checkpoint"
        sources.refuse("no-dictionary", "--dict", detail, "pass the model's tokenizer: --dict tokenizer.model")
        return Processor({}, {}, "")
    _check_pieces(sources, dictionary, tokenizer)
    vocabulary = vocab(dictionary)
    files = {
        "preprocessor_config.json": features | {"processor_class": "Wav2Vec2Processor"},
        "tokenizer.json": _fast(vocabulary, tokenizer),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "processor_class": "Wav2Vec2Processor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "vocab.json": vocabulary,
    }
    named = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    ids = {name: vocabulary[piece] for name, piece in named.items() if piece in vocabulary}
    return Processor(files, ids, "sentencepiece characters")


def _check_pieces(sources: Sources, dictionary: Dictionary, tokenizer: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose decoding no tokenizer of transformers has."""
    pieces, kinds = dictionary.symbols, tokenizer["kinds"]
    rows = sources.reader.get("target_vocab_size", int)
    if len(pieces) != rows:
        sources.refuse("dictionary-size", "--dict", f"has {len(pieces)} pieces, the model's head {rows} rows")
    repeated = sorted({piece for piece in pieces if pieces.count(piece) > 1}) if len(set(pieces)) < len(pieces) else []
    if repeated:
        sources.refuse("bad-dictionary", "--dict", f"pieces are repeated: {repeated[:5]}")
    long = [piece for index, piece in enumerate(pieces) if str(index) not in kinds and len(piece) != 1]
    if long:
        detail = f"{len(long)} pieces are longer than a character, such as {long[:3]}: no character tokenizer"
        sources.refuse("unsupported-tokenizer", "--dict", detail)
    if 6 in kinds.values():
        sources.refuse("unsupported-tokenizer", "--dict", "has pieces for bytes")
    if pieces[:2] != ("<s>", "<pad>") or kinds.get("0") != 3 or kinds.get("1") != 3:
        detail = f"its first pieces are {list(pieces[:2])}, <s> (the blank) and <pad> were expected"
        sources.refuse("bad-dictionary", "--dict", detail)


def _fast(vocabulary: Mapping[str, int], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A `tokenizers` file of single characters that decodes as sentencepiece does: nothing is stripped but what it strips."""
    kinds = {int(index): kind for index, kind in tokenizer["kinds"].items()}
    names = {index: name for name, index in vocabulary.items()}
    control = [names[index] for index, kind in sorted(kinds.items()) if kind == 3]
    unknown = [names[index] for index, kind in sorted(kinds.items()) if kind == 2]
    steps: list[dict[str, Any]] = [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "<pad>", "cleanup": False},
        *({"type": "Replace", "pattern": {"String": name}, "content": tokenizer["unk_surface"]} for name in unknown),
        *({"type": "Replace", "pattern": {"String": name}, "content": ""} for name in control if name != "<pad>"),
        {"type": "Fuse"},
    ]
    if _SPACE in vocabulary:
        if tokenizer["extra_whitespace"] or tokenizer["dummy_prefix"]:
            leading = f"^{_SPACE}+" if tokenizer["extra_whitespace"] else f"^{_SPACE}"
            steps.append({"type": "Replace", "pattern": {"Regex": leading}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"String": _SPACE}, "content": " "})
    # without merges, single characters; unlike WordLevel it makes one unknown piece of several, as sentencepiece does
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": dict(vocabulary),
        "merges": [],
        "unk_token": unknown[0] if unknown else None,
    }
    return tokenizer_file(
        vocabulary,
        [name for name in control if name in ("<s>", "<pad>", "</s>")],
        normalizer=_normalizer(vocabulary, tokenizer),
        decoder={"type": "Sequence", "decoders": steps},
        model=model | {"fuse_unk": True},
    )


def _normalizer(vocabulary: Mapping[str, int], tokenizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is done to a text before it is split, where spaces are sentencepiece's marks."""
    if _SPACE not in vocabulary:
        return None
    steps: list[dict[str, Any]] = []
    if tokenizer["extra_whitespace"]:
        steps.append({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    if tokenizer["dummy_prefix"]:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}
