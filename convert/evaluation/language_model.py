"""Joins a model's vocabulary and a KenLM file to a `Wav2Vec2ProcessorWithLM` directory, and decodes with it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.evaluation.packages import require
from convert.evaluation.recognize import Recognizer
from convert.report import json_bytes

ALPHABET = "alphabet.json"  # pyctcdecode's name, and the mark of a directory that may be replaced
SETTINGS = ("preprocessor_config.json", "tokenizer_config.json")
VOCABULARY = ("vocab.json", "added_tokens.json", "special_tokens_map.json")
BOUNDARIES = {"<s>", "</s>", "<unk>"}


def write_processor(model_dir: Path, recognizer: Recognizer, kenlm: Path, target: Path) -> None:
    """Write a `Wav2Vec2ProcessorWithLM` directory: the model's processor, pyctcdecode's alphabet and the language model.

    Weights of the language model are pyctcdecode's defaults (alpha 0.5, beta 1.5); they stand in
    `language_model/attrs.json`.

    Args:
        model_dir: the model directory whose processor is copied.
        recognizer: the same model, loaded.
        kenlm: an n-gram model, as ARPA text (`.arpa`) or in KenLM's binary format.
        target: the directory to make; one that was made by this function is replaced.

    Raises:
        ConvertError: a package is missing, the language model cannot be read or cannot be spelled with the vocabulary,
            the vocabulary has no word boundary, or something else stands at `target`.
    """
    pyctcdecode = require("pyctcdecode", "lm")
    require("kenlm", "lm")
    if target.exists() and not (target / ALPHABET).is_file():
        message = f"{target.name}: is there, and is no processor with a language model; nothing was written"
        raise ConvertError(message, code="exists", key=target.name, hint="name another directory with --lm-dir")
    labels = alphabet(recognizer.tokenizer, recognizer.model.config.vocab_size)
    words = _words(kenlm) if kenlm.suffix == ".arpa" else None
    _spellable(kenlm, words, labels)
    try:
        with _quiet():
            decoder = pyctcdecode.build_ctcdecoder(labels, str(kenlm), sorted(words) if words else None)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error.__cause__ or error).rpartition("Exception.")[2].strip()
        message = f"{kenlm.name}: KenLM cannot read it: {reason}"
        raise ConvertError(message, code="language-model", key=kenlm.name) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        decoder.save_to_dir(str(made))
        for name in SETTINGS:
            settings = json.loads((model_dir / name).read_text("utf-8"))
            (made / name).write_bytes(json_bytes(settings | {"processor_class": "Wav2Vec2ProcessorWithLM"}))
        for name in VOCABULARY:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, made / name)
        made.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def alphabet(tokenizer: Any, size: int) -> list[str]:
    """Write the vocabulary in index order as pyctcdecode wants it: the blank empty, the word boundary a space.

    Args:
        tokenizer: the model's tokenizer.
        size: how many tokens the model has.

    Raises:
        ConvertError: the vocabulary has no word boundary, without which there are no words to score.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    delimiter = getattr(tokenizer, "word_delimiter_token", None)
    if delimiter is None or vocabulary.get(delimiter, size) >= size:  # transformers adds one that is not in the model
        raise ConvertError(
            "the vocabulary has no word boundary, so that a language model of words cannot be applied",
            code="no-word-boundary",
        )
    special = {tokenizer.pad_token: "", delimiter: " ", tokenizer.unk_token: "\u2047"}
    return [special.get(token, token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


class LanguageModel:
    """Beam search with a language model, read back from a `Wav2Vec2ProcessorWithLM` directory.

    Args:
        directory: what `write_processor` wrote.
    """

    def __init__(self, directory: Path) -> None:
        transformers = require("transformers")
        with _quiet():
            self.decoder = transformers.Wav2Vec2ProcessorWithLM.from_pretrained(str(directory)).decoder
        file = next(path for path in (directory / "language_model").iterdir() if path.suffix not in (".json", ".txt"))
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            while piece := stream.read(1 << 20):
                digest.update(piece)
        attributes = json.loads((directory / "language_model" / "attrs.json").read_text("utf-8"))
        weights = f"alpha {attributes['alpha']}, beta {attributes['beta']}"
        self.name = f"pyctcdecode with KenLM ({file.name} sha256:{digest.hexdigest()[:16]}, {weights})"

    def decode(self, logits: Any) -> str:
        """Decode logits of shape (frames, vocabulary) to the best text of the beam."""
        return str(self.decoder.decode(logits.numpy()))


def _words(arpa: Path) -> set[str]:
    """The words of an ARPA file; pyctcdecode's own reader overlooks those without a back-off weight."""
    words = set()
    inside = False
    with arpa.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("\\"):
                if inside:
                    break
                inside = line.strip() == "\\1-grams:"
            elif inside and len(fields := line.split()) > 1:
                words.add(fields[1])
    if not words:
        raise ConvertError(f"{arpa.name}: is no ARPA file: it lists no words", code="language-model", key=arpa.name)
    return words - BOUNDARIES


def _spellable(kenlm: Path, words: set[str] | None, labels: list[str]) -> None:
    letters = set(labels)
    if words and not any(set(word) <= letters for word in words):
        raise ConvertError(
            f"{kenlm.name}: none of its {len(words)} words can be spelled with the model's vocabulary",
            code="vocabulary",
            key=kenlm.name,
            hint="write the language model's words in the case of the vocabulary",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without both libraries' remarks on alphabets and small vocabularies, and KenLM's own bar on file descriptor 2."""
    loggers = [logging.getLogger(name) for name in ("pyctcdecode", "transformers")]
    before = [logger.level for logger in loggers]
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
