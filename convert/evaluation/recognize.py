"""Transcription with a model directory through plain transformers, independent of how recordings are batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError
from convert.evaluation.data import Utterance
from convert.families import of_class
from convert.families.planning import list_languages
from convert.loading import load, load_model, quiet, trying
from convert.reading import read_file
from convert.report import parse_json
from convert.verification.devices import without_tf32

if TYPE_CHECKING:
    import torch

    from convert.audio import Waveform

WINDOW = 16  # batches that are sorted by length together, and held in memory
# Padding changes logits by rounding, some units in the last place. A frame whose two best tokens are closer than
# this many of them is decided by the utterance alone.
NEAR_TIE = 1024


def open_recognizer(model_dir: Path, device: str, language: str = "") -> Recognizer:
    """Load the model of a directory: with a CTC head, or one that generates token by token.

    Args:
        model_dir: the model directory.
        device: as torch names it.
        language: the language to transcribe, for a model with an adapter for each of several; by default that of its weights.

    Raises:
        ConvertError: the directory has no model or no vocabulary, lacks the language, or its weights do not fit.
    """
    config = model_dir / "config.json"
    if not config.is_file():
        hint = "name a directory that `convert` or transformers' save_pretrained wrote"
        raise ConvertError(f"{model_dir.name}: no config.json in it", code="no-model", key=model_dir.name, hint=hint)
    says = parse_json(read_file(config), config.name)
    if not isinstance(says, dict):
        raise ConvertError(
            f"{model_dir.name}: its config.json is not a JSON object", code="no-model", key=model_dir.name
        )
    if not any((model_dir / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        message = f"{model_dir.name}: it has no vocabulary, so it writes no text and has no word error rate"
        hint = "`fairseq-to-hf verify` compares any model with fairseq's"
        raise ConvertError(message, code="no-vocabulary", hint=hint)
    if language:
        _check_language(model_dir, language)
    family = None
    match says.get("architectures"):
        case [str() as name]:
            family = of_class(name)
    with trying(model_dir.name, "transformers cannot use it"):
        return (Generator if family and family.generates else Recognizer)(model_dir, device, language)


class Recognizer:
    """A CTC model with its processor, evaluated in float32. The arguments are those of `open_recognizer`."""

    decoding = "greedy CTC"

    def __init__(self, model_dir: Path, device: str, language: str = "") -> None:
        model = load_model(self._class(model_dir), model_dir)
        if language:
            with quiet():
                model.load_adapter(language, local_files_only=True)
        self.extractor, self.tokenizer = self._processor(model_dir, language)
        self.device = device
        self.model = model.float().eval().to(device)
        self.rate = int(self.extractor.sampling_rate)
        # A group norm runs over all frames, padding too, and a model without a mask attends to it.
        layered = getattr(self.model.config, "feat_extract_norm", "") == "layer"
        self.may_pad = layered and bool(self.extractor.return_attention_mask)
        self.alone = 0  # utterances that a near tie sent through the model a second time

    def _class(self, model_dir: Path) -> Any:
        from transformers import AutoModelForCTC

        return AutoModelForCTC

    def _processor(self, model_dir: Path, language: str) -> tuple[Any, Any]:
        from transformers import AutoProcessor

        chosen: dict[str, Any] = {"target_lang": language} if language else {}
        processor = load(AutoProcessor, model_dir, **chosen)
        return processor.feature_extractor, processor.tokenizer

    def transcribe(self, utterances: Sequence[Utterance]) -> list[str]:
        """Transcribe utterances in one forward pass, each as if it were alone.

        Args:
            utterances: of equal length, unless `may_pad`.

        Raises:
            ConvertError: `too-short`: a recording is shorter than one frame.
        """
        for utterance in utterances:
            if self._frames([len(utterance.samples)])[0] < 1:
                message = f"{utterance.name}: {len(utterance.samples)} samples, too few for a frame of the model"
                raise ConvertError(message, code="too-short", key=utterance.name, hint="leave it out")
        texts = []
        for utterance, rows in zip(utterances, self.logits([one.samples for one in utterances]), strict=True):
            if len(utterances) > 1 and self._near_tie(rows):
                self.alone += 1
                rows = self.logits([utterance.samples])[0]
            texts.append(str(self.tokenizer.decode(rows.argmax(-1).tolist())))  # as `processor.batch_decode`
        return texts

    def logits(self, waveforms: Sequence[Waveform]) -> list[torch.Tensor]:
        """Run the model; return logits of shape (frames, vocabulary) for each waveform, without padded frames."""
        import torch

        # Each is normalised on its own and padded afterwards, so that padding never enters a mean.
        values = [self.extractor(wave, sampling_rate=self.rate).input_values[0] for wave in waveforms]
        mask = {"return_attention_mask": True} if self.extractor.return_attention_mask else {}
        batch = self.extractor.pad({"input_values": values}, padding=True, return_tensors="pt", **mask).to(self.device)
        with torch.inference_mode(), without_tf32():
            logits = self.model(**batch).logits
        counts = self._frames([len(value) for value in values])
        return [rows[:count].float().cpu() for rows, count in zip(logits, counts, strict=True)]

    def _frames(self, lengths: list[int]) -> list[int]:
        import torch

        counts: list[int] = self.model._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
        return counts

    def _near_tie(self, logits: torch.Tensor) -> bool:
        import torch

        best = logits.topk(2).values
        allowed = NEAR_TIE * torch.finfo(logits.dtype).eps * float(logits.abs().max())
        return bool((best[:, 0] - best[:, 1]).min() < allowed)


class Generator(Recognizer):
    """A model that generates token by token; each utterance alone, with a beam of one."""

    decoding = "a beam of one"

    def __init__(self, model_dir: Path, device: str, language: str = "") -> None:
        super().__init__(model_dir, device, language)
        self.may_pad = False

    def _class(self, model_dir: Path) -> Any:
        import transformers

        (name,) = load(transformers.AutoConfig, model_dir).architectures
        return getattr(transformers, name)

    def _processor(self, model_dir: Path, language: str) -> tuple[Any, Any]:
        from transformers import AutoFeatureExtractor, AutoTokenizer

        return load(AutoFeatureExtractor, model_dir), load(AutoTokenizer, model_dir)

    def transcribe(self, utterances: Sequence[Utterance]) -> list[str]:
        """Transcribe utterances one after the other."""
        return [self._generate(utterance.samples) for utterance in utterances]

    def _generate(self, waveform: Waveform) -> str:
        import torch

        inputs = self.extractor(waveform, sampling_rate=self.rate, return_tensors="pt").to(self.device)
        with torch.inference_mode(), without_tf32():
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


def _check_language(model_dir: Path, language: str) -> None:
    """Refuse a language before transformers does, which would look for its file on the Hub."""
    files = model_dir.glob("adapter.*.safetensors")
    known = [path.name.removeprefix("adapter.").removesuffix(".safetensors") for path in files]
    if language not in known:
        message = f"{model_dir.name} has no language {language!r}"
        raise ConvertError(message, code="unknown-language", key="--lang", hint=list_languages(known))
