"""fairseq's model with every stage of it visible: what all kinds share."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from .arithmetic import forget_positions, lifted, nothing
from .importing import CannotBuildError, import_fairseq
from .lending import Lending, release
from .numerics import NAMES, crop, same, swap_first, swap_last
from .shelf import shelved
from .tokens import dictionary_of


class Reference:
    """fairseq's model as it was pretrained, with every stage of it visible; the base of all other kinds of model.

    Stages have the shape (batch, channels, time) for `conv.*`, (batch, channels) for what is pooled over the frames, and
    (valid frames of the whole batch, channels) otherwise.
    """

    library = staticmethod(import_fairseq)  # imports what has the model
    version = "%s"  # how it is called in a report
    islands = "Fp32GroupNorm, Fp32LayerNorm and gelu"  # what computes in float32 whatever it is given
    prefix = ""  # of the encoder's tensors

    def __init__(self, model: Any, request: Any, weights: Any, info: Any) -> None:
        self.model = model
        self.lending = Lending(model)
        self.request = request
        self.settings = request["settings"]
        self.weights = weights  # the files
        self.info = info
        self.dictionary: Any = None
        self.device = torch.device(request.get("device", "cpu"))
        self.seen: dict[str, Any] = {}
        self.w2v = self.encoder()
        self.multiple = getattr(self.w2v.encoder, "required_seq_len_multiple", 1)
        self.masks_like_main = hasattr(self.w2v, "_get_feat_extract_output_lengths")
        self.magnitude: Any = None  # what a conversion makes of a positional convolution without weight norm
        self.exact_blank: Any = None  # blank_weight, once its sum with the head's bias has been rounded
        self.row = 0  # of the stacked adapters

    def encoder(self) -> Any:
        """The encoder that was pretrained, inside the model."""
        return self.model

    def fill(self, weights: Any) -> None:
        """Load the checkpoint's tensors, every one; what has no room of its own is made float32 when it is computed with."""
        plain = weights.get(self.prefix + "encoder.pos_conv.0.weight")
        if plain is not None and plain.dim() == 3:  # of one dimension, it is a batch norm's
            torch.nn.utils.remove_weight_norm(self.w2v.encoder.pos_conv[0])
            self.magnitude = plain.double().norm(dim=(0, 1), keepdim=True).float()
            self.info["patches"].append("weight norm removed from pos_conv: the checkpoint has the plain weight")
        if hasattr(self.model, "upgrade_state_dict"):
            self.model.upgrade_state_dict(weights)
        own = self.model.state_dict()
        absent = [name for name in self.request.get("absent", ()) if name in own and name not in weights]
        weights.update((name, torch.zeros(own[name].shape)) for name in absent)
        if absent:
            told = "zeros for what the checkpoint lacks, and no output that is compared depends on: %s"
            self.info["patches"].append(told % ", ".join(absent))
        try:
            torch.nn.Module.load_state_dict(self.model, weights, strict=True, assign=True)
        except TypeError:  # before torch 2.1
            torch.nn.Module.load_state_dict(self.model, weights, strict=True)
        if self.device.type != "cpu":  # in memory of its own, once for all
            self.model.float().to(self.device)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.dtype == torch.float64:  # a converted model is loaded as float32
                tensor.data = tensor.data.float()
        self.model.eval()
        self._filled(weights)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._hook()
        release()

    def _filled(self, weights: Any) -> None:
        """What is to be done once the tensors are in their places."""

    def adapter(self, source: Any) -> dict[str, Any]:
        """Which of its stacked adapters the model is to take, for each utterance of a batch; most models have none."""
        adapted = any(hasattr(layer, "adapter_layer") for layer in self.w2v.encoder.layers)
        return {"corpus_key": [self.row] * len(source)} if adapted else {}

    def set_language(self, language: str) -> None:
        """Turn to a language; to the one that the request names, if it is empty. Most models have none."""

    def round_weights(self, name: str) -> None:
        """Round every weight to float16 or bfloat16 before it is computed with, as a converted model of that type has it."""
        self.lending.rounded = kind = NAMES[name]
        if self.magnitude is not None:
            self.magnitude = self.magnitude.to(kind).float()
        forget_positions(self.w2v)

    @contextlib.contextmanager
    def as_converted(self) -> Any:
        """Give the model the numbers that a conversion has to round, so that in float64 both sides have the same weights.

        A positional convolution without weight norm gets its magnitude back. In float32 fairseq computes as it was built.
        """
        if self.magnitude is None:
            yield
            return
        convolution = self.w2v.encoder.pos_conv[0]
        weight = convolution.weight.data
        exact = self.lending.made(weight)
        scale = self.magnitude.to(weight.device).double() / exact.norm(dim=(0, 1), keepdim=True)
        convolution.weight.data = exact * scale
        try:
            yield
        finally:
            convolution.weight.data = weight

    def lifted(self) -> Any:
        """Let what computes in float32 whatever it is given compute in its input's type."""
        return lifted(self.w2v)

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Any:
        """Compute in another floating point type; float64 lifts the islands where fairseq computes in float32."""
        if name == "float32":
            yield
            return
        with self.lifted() if name == "float64" else nothing():
            self.lending.kind = NAMES[name]
            forget_positions(self.w2v)
            try:
                with self.as_converted() if name == "float64" else nothing():
                    yield
            finally:
                forget_positions(self.w2v)
                self.lending.kind = torch.float32

    def _watch(self, module: Any, name: str, shape: Any) -> None:
        def hook(_: Any, __: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            if name not in self.seen:
                value = shelved(value)
                self.seen[name] = shape(value)
            if name.startswith("layer.") and isinstance(output, tuple) and isinstance(output[-1], tuple):
                # fairseq holds every layer's to the end, and what its last residual is added to; all are the mapped numbers
                return value, (output[-1][0], value)
            return None

        module.register_forward_hook(hook)
        self.lending.watch(module, name)

    def _see(self, name: str, value: Any) -> None:
        """Keep what a stage computed first."""
        if name not in self.seen:
            self.seen[name] = shelved(value)

    def _hook(self) -> None:
        watch = self._watch
        for index, layer in enumerate(self.w2v.feature_extractor.conv_layers):
            watch(layer, "conv.%d" % index, same)
        watch(self.w2v.layer_norm, "feature_norm", same)
        if self.w2v.post_extract_proj is not None:
            watch(self.w2v.post_extract_proj, "projection", same)
        watch(self.w2v.encoder.pos_conv, "pos_conv", swap_last)  # not every encoder uses the one that it has
        for index, layer in enumerate(self.w2v.encoder.layers):
            watch(layer, "layer.%d" % index, swap_first)
        watch(self.w2v.encoder, "encoder", same)

    def run(self, waveforms: Any, lengths: Any = None, multiple: Any = None) -> tuple[list[int], dict[str, Any]]:
        """Compute every stage.

        Args:
            waveforms: (batch, samples), padded with zeros; what the model gets, normalised already.
            lengths: the samples of each utterance; `None` for a single one, which then has no padding mask.
            multiple: replaces fairseq's `required_seq_len_multiple`; `None` leaves it.

        Returns:
            The valid frames of each utterance, and the stages by name, in the order of their computation.
        """
        source = torch.as_tensor(waveforms).to(self.device).to(self.lending.kind)
        padding = None
        if lengths is not None:
            padding = torch.arange(source.shape[1])[None] >= torch.as_tensor(lengths)[:, None]
            padding = padding.to(self.device)
        if hasattr(self.w2v.encoder, "required_seq_len_multiple"):
            self.w2v.encoder.required_seq_len_multiple = self.multiple if multiple is None else multiple
        self.seen = {}
        with torch.no_grad(), self.lending.lent():
            mask = self.compute(source, padding)
            total = self.seen["feature_norm"].shape[1]
            frames = [total] * len(source) if mask is None else [int(n) for n in (total - mask.long().sum(1))]
        if "projection" not in self.seen:  # no projection: the features go on as they are
            self.seen["projection"] = self.seen["feature_norm"]
        stages = {name: crop(name, value, frames) for name, value in self.seen.items()}
        self.seen = {}
        return frames, stages

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model, and put what no hook sees into `seen`.

        Args:
            source: (batch, samples).
            padding: (batch, samples), true where there is padding; `None` for a single utterance.

        Returns:
            (batch, frames), true where there is padding, or `None`.
        """
        output = self.model(source, padding_mask=padding, mask=False, features_only=True, **self.adapter(source))
        return output["padding_mask"]

    def normalise(self, waveform: Any, rate: int) -> Any:
        """Prepare a waveform with `RawAudioDataset.postprocess`, as fairseq's tasks do."""
        from fairseq.data.audio.raw_audio_dataset import RawAudioDataset

        task = self.settings["task"]
        dataset = types.SimpleNamespace(sample_rate=rate, normalize=bool(task.get("normalize", False)))
        return RawAudioDataset.postprocess(dataset, torch.as_tensor(waveform).float(), rate)

    def paths(self, stages: Any, frames: list[int]) -> Any:
        """The best symbol of every frame, for each utterance; nothing without a vocabulary."""
        return stages["logits"].float().argmax(-1).split(frames) if "logits" in stages else ()

    @property
    def blank(self) -> int:
        """The id of CTC's blank; -1 where there is none."""
        return int(self.request["blank"])

    def beams(self) -> list[Any]:
        """What a decoder writes with the recipe's beam, tokens and text, for each utterance of the last run; most have none."""
        return []

    def spell(self, language: str = "") -> str:
        """Transcribe a path that holds every symbol of the dictionary that is not special, in order, twice."""
        self.set_language(language)
        blank, special = self.blank, self.request["special"]
        ids = [i for i in range(len(self.request["symbols"])) if i not in special]
        return self.transcribe([part for i in ids * 2 for part in (i, blank)]) if ids else ""

    def words(self) -> Any:
        """fairseq's dictionary of the symbols that were passed."""
        if self.dictionary is None:
            self.dictionary = dictionary_of(self.request["symbols"])
        return self.dictionary

    def recognize(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform as fairseq does when it counts errors.

        Args:
            waveform: (samples,), float32, as recorded.
            rate: its samples a second.

        Raises:
            CannotBuildError: the model writes no text.
        """
        raise CannotBuildError("%s writes no text" % type(self.model).__name__)

    def transcribe(self, path: Any) -> str:
        """Turn the best symbol of every frame, or what a decoder generated, into text; nothing without a vocabulary."""
        return ""


class HeadlessReference(Reference):
    """A model without the head of its pretraining, as in fine-tuning: no output depends on it."""

    head: tuple[str, ...] = ()  # how the names of its entries start

    def fill(self, weights: Any) -> None:
        """Load the checkpoint's tensors but for the pretraining head."""
        self.w2v.remove_pretraining_modules()
        head = tuple(self.prefix + start for start in self.head)
        left_out = [key for key in weights if key.startswith(head)]
        for key in left_out:
            del weights[key]
        if left_out:
            self.info["patches"].append("left out, as in fine-tuning: %s" % ", ".join(left_out))
        super().fill(weights)
