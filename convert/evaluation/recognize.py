"""Transcribes with a model directory through plain transformers, in batches whose result does not depend on the batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, Problem
from convert.evaluation.data import Utterance
from convert.evaluation.packages import require, silence
from convert.evaluation.processes import exact

WINDOW = 16  # batches that are sorted by length at once: what is in memory of a dataset
# Padding changes logits by rounding, some units in the last place. A frame whose two best tokens are closer than
# this many of them is decided by the utterance alone.
NEAR_TIE = 1024

# Whose bytes decide what the model writes; weights are added.
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
)

GENERATING = ("SpeechEncoderDecoderModel", "Speech2TextForConditionalGeneration")


def _has(model_dir: Path, language: str) -> None:
    """Refuse a language before transformers does, which looks for its file on the Hub and says so."""
    names = sorted(path.name.split(".", 1)[1] for path in model_dir.glob("adapter.*.safetensors"))
    names = [name.removesuffix(".safetensors") for name in names]
    if language in names:
        return
    if names:
        detail, hint = f"{model_dir.name} has no language {language!r}", f"it has: {', '.join(names)}"
    else:
        detail, hint = f"{model_dir.name} has no languages to choose from", "leave --lang out"
    raise ConvertError(detail, code="no-language", key=language, hint=hint)


def open_recognizer(model_dir: Path, device: str, language: str = "") -> Recognizer:
    """Load the model of a directory as its class asks for it: with a CTC head, or one that generates token by token.

    Raises:
        ConvertError: as `Recognizer`.
    """
    config = model_dir / "config.json"
    classes = json.loads(config.read_text("utf-8")).get("architectures") if config.is_file() else None
    return (Generator if set(classes or ()) & set(GENERATING) else Recognizer)(model_dir, device, language)


class Recognizer:
    """A converted CTC model with its processor, evaluated in float32.

    Args:
        model_dir: the model directory.
        device: `cpu` or `cuda`, with an index where there are several.
        language: what it is to speak, of several languages; by default what its weights do.

    Raises:
        ConvertError: no model directory, weights missing or left over, no vocabulary, or no such device.
    """

    loader = "AutoModelForCTC"
    decoding = "greedy CTC"  # how it chooses symbols

    def __init__(self, model_dir: Path, device: str, language: str = "") -> None:
        self.torch, transformers = require("torch"), require("transformers")
        if not (model_dir / "config.json").is_file():
            raise ConvertError(f"{model_dir.name}: no config.json in it", code="no-model", key=model_dir.name)
        if not any((model_dir / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            message = f"{model_dir.name}: writes no text (it has no vocabulary), so that no words can be counted"
            hint = "evaluate is for models that write text; `fairseq-to-hf verify` compares any model with fairseq's"
            raise ConvertError(message, code="no-vocabulary", hint=hint)
        if language:
            _has(model_dir, language)
        try:
            with silence():
                self.model, loading = getattr(transformers, self.loader).from_pretrained(
                    model_dir, local_files_only=True, output_loading_info=True
                )
                if language:
                    self.model.load_adapter(language, local_files_only=True)
                self.extractor, self.tokenizer = self._processor(transformers, model_dir, language)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConvertError(f"{model_dir.name}: transformers cannot load it: {reason}", code="load") from error
        _complete(model_dir.name, loading)
        self.device = device
        self.model = self.model.float().eval().to(device)
        self.rate = int(self.extractor.sampling_rate)
        # A group norm runs over all frames, padding too, and a model without a mask attends to it.
        layered = getattr(self.model.config, "feat_extract_norm", "") == "layer"
        self.may_pad = layered and bool(self.extractor.return_attention_mask)
        self.alone = 0  # utterances that a near tie sent through the model a second time

    def _processor(self, transformers: Any, model_dir: Path, language: str) -> tuple[Any, Any]:
        chosen = {"target_lang": language} if language else {}
        processor = transformers.AutoProcessor.from_pretrained(model_dir, local_files_only=True, **chosen)
        return processor.feature_extractor, processor.tokenizer

    def greedy(self, logits: Any) -> str:
        """Decode logits of shape (frames, vocabulary) as `processor.batch_decode` does: the best token of every frame."""
        return str(self.tokenizer.decode(logits.argmax(-1).tolist()))

    def transcribe(self, utterances: Sequence[Utterance]) -> list[str]:
        """Transcribe utterances in one forward pass.

        Args:
            utterances: of equal length, unless `may_pad`.

        Returns:
            One text an utterance: the same that each gives alone.

        Raises:
            ConvertError: a recording is shorter than one frame.
        """
        for utterance in utterances:
            if self._frames([len(utterance.samples)])[0] < 1:
                message = f"{utterance.name}: {len(utterance.samples)} samples, too few for a frame of the model"
                raise ConvertError(message, code="too-short", key=utterance.name, hint="leave it out")
        logits = self.logits([utterance.samples for utterance in utterances])
        texts = []
        for utterance, rows in zip(utterances, logits, strict=True):
            if len(utterances) > 1 and self._near_tie(rows):
                self.alone += 1
                rows = self.logits([utterance.samples])[0]
            texts.append(self.greedy(rows))
        return texts

    def logits(self, waveforms: Sequence[Any]) -> list[Any]:
        """Run the model; return logits of shape (frames, vocabulary) for each waveform, without padded frames."""
        # Each is normalised on its own and padded afterwards, so that padding never enters a mean.
        values = [self.extractor(wave, sampling_rate=self.rate).input_values[0] for wave in waveforms]
        lengths = [len(value) for value in values]
        mask = {"return_attention_mask": True} if self.extractor.return_attention_mask else {}
        batch = self.extractor.pad({"input_values": values}, padding=True, return_tensors="pt", **mask)
        with self.torch.inference_mode(), exact():
            logits = self.model(**{name: value.to(self.device) for name, value in batch.items()}).logits
        return [rows[:count].float().cpu() for rows, count in zip(logits, self._frames(lengths), strict=True)]

    def _frames(self, lengths: list[int]) -> list[int]:
        counts: list[int] = self.model._get_feat_extract_output_lengths(self.torch.tensor(lengths)).tolist()
        return counts

    def _near_tie(self, logits: Any) -> bool:
        best = logits.topk(2).values
        allowed = NEAR_TIE * self.torch.finfo(logits.dtype).eps * float(logits.abs().max())
        return bool((best[:, 0] - best[:, 1]).min() < allowed)


class Generator(Recognizer):
    """A converted model that writes token by token; each utterance is generated alone, with a beam of one."""

    loader = "AutoModelForSpeechSeq2Seq"
    decoding = "a beam of one"

    def __init__(self, model_dir: Path, device: str, language: str = "") -> None:
        super().__init__(model_dir, device, language)
        self.may_pad = False

    def _processor(self, transformers: Any, model_dir: Path, language: str) -> tuple[Any, Any]:
        parts = (transformers.AutoFeatureExtractor, transformers.AutoTokenizer)
        extractor, tokenizer = (part.from_pretrained(model_dir, local_files_only=True) for part in parts)
        return extractor, tokenizer

    def transcribe(self, utterances: Sequence[Utterance]) -> list[str]:
        """Transcribe utterances, one after the other."""
        return [self._generate(utterance.samples) for utterance in utterances]

    def _generate(self, waveform: Any) -> str:
        inputs = self.extractor(waveform, sampling_rate=self.rate, return_tensors="pt").to(self.device)
        with self.torch.inference_mode(), exact():
            tokens = self.model.generate(**inputs, num_beams=1, do_sample=False)
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))


def batches(utterances: Iterator[Utterance], size: int, pad: bool) -> Iterator[list[Utterance]]:
    """Group utterances of similar length, a window at a time; without padding only those of equal length."""
    while window := list(islice(utterances, WINDOW * size)):
        window.sort(key=lambda utterance: len(utterance.samples))
        batch: list[Utterance] = []
        for utterance in window:
            if batch and (len(batch) == size or (not pad and len(batch[0].samples) != len(utterance.samples))):
                yield batch
                batch = []
            batch.append(utterance)
        yield batch


def model_digest(model_dir: Path) -> str:
    """The SHA-256 over every file that decides what the model writes."""
    paths = [model_dir / name for name in FILES] + sorted(model_dir.glob("*.safetensors*"))
    total = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                found = hashlib.sha256()
                while piece := file.read(1 << 20):
                    found.update(piece)
            total.update(f"{path.name} {found.hexdigest()}\n".encode())
    return total.hexdigest()


def _complete(name: str, loading: dict[str, Any]) -> None:
    """Refuse a model that transformers would fill with random numbers, as it does with a warning only."""
    codes = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "shape"}
    problems = [
        Problem(
            code,
            str(key[0] if isinstance(key, tuple) else key),
            "in the model's class and the weights file differently",
        )
        for field, code in codes.items()
        for key in sorted(loading.get(field, ()), key=str)
    ]
    if problems:
        raise ConvertError(
            f"{name}: its weights are not those of a complete CTC model; nothing was measured",
            code="incomplete",
            problems=problems,
            hint="evaluation needs a model with a CTC head: a pretrained model has none",
        )
