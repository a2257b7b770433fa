"""The processor of a speech-to-text transformer: what the task's config.yaml says of features, subwords and generation.

Sources: `fairseq.data.audio.data_cfg.S2TDataConfig`, `fairseq.sequence_generator.SequenceGenerator`; and
`transformers.Speech2TextFeatureExtractor`, `Speech2TextTokenizer`.
"""

from __future__ import annotations

import re
from typing import Any

from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.checkpoint.sentencepiece import pieces
from convert.families.base import Sources
from convert.families.seq2seq import MAX_LENGTH, generation_config
from convert.families.settings import Limit, Reader, off, only, refuse_limited
from convert.families.tokenizers import SUBWORDS, Processor

LANGUAGE = re.compile(r"<lang:(.*)>")  # SpeechToTextDataset.LANG_TAG_TEMPLATE
# fmt: off
DATA_LIMITS = (
    Limit("input_channels",                      only(1), "Speech2TextFeatureExtractor makes one channel"),
    Limit("sample_rate",                         only(16000), "Speech2TextFeatureExtractor has windows for 16000 samples a second"),
    Limit("use_audio_input",                     off,     "Speech2TextForConditionalGeneration takes features, no waveform"),
    Limit("prepend_bos_and_append_tgt_lang_tag", off,     "generate() ends with </s>, not with a language's tag"),
    Limit("eos_token",                           off,     "generate() ends with </s>, not with another symbol"),
)
# fmt: on
# What config.yaml says for the processor, and what acts while training only
DATA_READ = {"bpe_tokenizer", "feature_transforms", "hub", "input_feat_per_channel", "pre_tokenizer"}
DATA_READ |= {"prepend_tgt_lang_tag", "transforms", "utterance_cmvn", "vocab_filename"}
# config.yaml's lists of transforms -> those that transformers has
TRANSFORMS = {"transforms": {"utterance_cmvn"}, "feature_transforms": {"utterance_cmvn"}}
TRANSFORMS |= {"waveform_transforms": set(), "dataset_transforms": set()}
DATA_TRAINING_ONLY = {"audio_root", "sampling_alpha", "shuffle", "specaugment", "speaker_set_filename"}
DATA_TRAINING_ONLY |= {"concataugment", "noiseaugment", "musicaugment", "babbleaugment", "sporadicnoiseaugment"}
DATA_TRAINING_ONLY |= {"noisyoverlapaugment", "backgroundnoiseaugment"}
DATA_TRAINING_ONLY |= {
    "delta_deltas",
    "global_cmvn",
}  # parameters of transforms, which are refused where they are named
DATA_TRAINING_ONLY |= {"standardize_audio", "use_sample_rate", "vocoder"}  # of models that take or make waveforms


def bins(sources: Sources) -> int:
    """The numbers of a frame: the task writes what its config.yaml says into the model's settings."""
    bins = sources.reader.count("input_feat_per_channel")
    data = sources.request.data_config
    stated = data.values.get("input_feat_per_channel", 80) if data else bins
    if stated != bins:
        sources.refuse("conflict", "input_feat_per_channel", f"the checkpoint says {bins}, config.yaml {stated!r}")
    return bins


def make_data_processor(sources: Sources) -> Processor:
    """The feature extractor, the tokenizer, and how to generate: what fairseq's config.yaml says."""
    config, dictionary = sources.request.data_config, sources.dictionary
    if config is None or dictionary is None:
        return Processor({}, {}, "")
    data = Reader(dict(config.values), dict.fromkeys(config.values, "config.yaml"), sources.problems)
    known = DATA_READ | DATA_TRAINING_ONLY | TRANSFORMS.keys() | {limit.field for limit in DATA_LIMITS}
    for name in sorted(data.values.keys() - known):
        if data.values[name]:
            detail = f"config.yaml: {str(data.values[name])[:60]!r}: no rule says what it does"
            sources.refuse("unknown-setting", name, detail)
    refuse_limited(data.values, DATA_LIMITS, sources.problems)
    _check_tokenizer(sources, data, dictionary, config.subwords)
    languages = [symbol for symbol in dictionary.symbols if LANGUAGE.fullmatch(symbol)]
    files = {
        "preprocessor_config.json": _features(sources, data),
        "vocab.json": {symbol: index for index, symbol in enumerate(dictionary.symbols)},
        SUBWORDS: config.subwords,
        "tokenizer_config.json": _tokenizer(languages),
        "generation_config.json": _generation(sources, data, dictionary, languages),
    }
    return Processor(files, {}, "sentencepiece")


def _features(sources: Sources, data: Reader) -> dict[str, Any]:
    normalised = "utterance_cmvn" in _transforms(sources, data)
    cmvn = data.get("utterance_cmvn", dict, {})
    return {
        "dither": 0.0,
        "do_ceptral_normalize": normalised,
        "feature_extractor_type": "Speech2TextFeatureExtractor",
        "feature_size": bins(sources),
        "normalize_means": bool(cmvn.get("norm_means", True)),
        "normalize_vars": bool(cmvn.get("norm_vars", True)),
        "num_mel_bins": bins(sources),
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "Speech2TextProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }


def _transforms(sources: Sources, data: Reader) -> list[str]:
    """What is done to features when no model is trained (`S2TDataConfig.get_transforms`)."""
    found: list[str] = []
    for name, known in TRANSFORMS.items():
        splits = data.get(name, dict, {})
        own = [split for split in splits if split not in ("*", "_eval", "_train") and not split.startswith("train")]
        if own:
            sources.refuse("unsupported-setting", name, f"config.yaml has transforms of its own for {', '.join(own)}")
        chosen = splits.get("_eval") or splits.get("*") or []
        if not isinstance(chosen, list) or not all(isinstance(transform, str) for transform in chosen):
            sources.refuse("bad-setting", name, f"config.yaml: names in a list expected, {str(chosen)[:60]!r} found")
            continue
        for other in [transform for transform in chosen if transform not in known]:
            detail = (
                f"config.yaml asks for {other}; Speech2TextFeatureExtractor normalises each utterance, nothing else"
            )
            sources.refuse("unsupported-setting", name, detail)
        found += chosen
    return found


def _check_tokenizer(sources: Sources, data: Reader, dictionary: Dictionary, subwords: bytes) -> None:
    tokenizer = data.get("bpe_tokenizer", dict, {})
    bpe = tokenizer.get("bpe")
    if bpe != "sentencepiece" or not tokenizer.get("sentencepiece_model"):
        bpe = f"{bpe}, and names no model" if bpe == "sentencepiece" else bpe
        detail = f"config.yaml says {bpe!r}; Speech2TextTokenizer needs a sentencepiece model"
        sources.refuse("unsupported-setting", "bpe_tokenizer", detail)
    first = data.get("pre_tokenizer", dict, {}).get("tokenizer")
    if first:
        detail = f"config.yaml says {first!r}; Speech2TextTokenizer has none before sentencepiece"
        sources.refuse("unsupported-setting", "pre_tokenizer", detail)
    if dictionary.symbols[: len(SPECIAL)] != SPECIAL or len(set(dictionary.symbols)) != len(dictionary):
        detail = f"{', '.join(SPECIAL)} must come first, and no symbol twice"
        sources.refuse("bad-dictionary", "dictionary", detail)
    made_up = re.compile(rf"{LANGUAGE.pattern}|madeupword\d+")  # symbols that need no piece
    pieces_of_it = set(pieces(subwords)) if subwords else set(dictionary.symbols)
    strange = [s for s in dictionary.symbols[len(SPECIAL) :] if s not in pieces_of_it and not made_up.fullmatch(s)]
    if strange:
        detail = f"is of another model: it lacks {len(strange)} symbols of the dictionary, such as {strange[0]!r}"
        sources.refuse("conflict", "sentencepiece_model", detail)


def _tokenizer(languages: list[str]) -> dict[str, Any]:
    """fairseq strips the languages' tags from what it generates, as transformers does with special tokens."""
    return {
        "additional_special_tokens": languages,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "do_upper_case": False,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "processor_class": "Speech2TextProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "Speech2TextTokenizer",
        "unk_token": "<unk>",
    }


def _beam(sources: Sources) -> dict[str, Any]:
    """The beam that the checkpoint's own section `generation` states, which ends as soon as it has as many texts."""
    stated = sources.checkpoint.generation
    beam, penalty = stated.get("beam", 1), 0.0 if stated.get("unnormalized") else stated.get("lenpen", 1.0)
    if not isinstance(beam, int) or not 0 < beam <= MAX_LENGTH or not isinstance(penalty, (int, float)):
        sources.refuse("bad-setting", "generation", f"beam {beam!r}, lenpen {penalty!r}: a number of each expected")
        return {}
    if beam == 1:
        return {}
    return {"num_beams": beam, "early_stopping": True} | ({} if penalty == 1 else {"length_penalty": float(penalty)})


def _generation(sources: Sources, data: Reader, dictionary: Dictionary, languages: list[str]) -> dict[str, Any]:
    """What `SequenceGenerator` does beside choosing the best: with it, `generate()` gives the same tokens."""
    longest = min(MAX_LENGTH, sources.reader.get("max_target_positions", int) - 1)
    made = generation_config(longest)
    made |= _beam(sources)
    if data.get("prepend_tgt_lang_tag", bool, False):
        language = sources.request.language or data.get("hub", dict, {}).get("tgt_lang")
        tag = f"<lang:{language}>" if language else languages[0] if len(languages) == 1 else ""
        if tag in languages:
            made["forced_bos_token_id"] = dictionary.symbols.index(tag)
        else:
            found = ", ".join(LANGUAGE.sub(r"\1", symbol) for symbol in languages) or "none"
            asked = f"{language!r} was asked for" if language else "none was named"
            detail = f"each text starts with its language's tag: {asked}, there are {found}"
            sources.refuse("no-language", "--lang", detail)
    return made
