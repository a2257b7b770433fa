"""`S2TTransformerModel`: speech-to-text transformers."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from .building import outer
from .features import features
from .importing import CannotBuildError
from .numerics import crop, same, swap_first
from .reference import Reference
from .tokens import dictionary_of, forced_tokens, language_of


def build_speech_to_text(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `S2TTransformerModel`, whose settings are a Namespace."""
    from argparse import Namespace

    from fairseq.models.speech_to_text.s2t_transformer import S2TTransformerModel

    values = {key: value for key, value in outer(settings).items() if key != "_name"}
    values["load_pretrained_encoder_from"] = None  # it only initialised what is filled now
    patches.append("in float64: fairseq.utils.softmax computes in float64, to measure floors")
    task = types.SimpleNamespace(target_dictionary=dictionary_of(range(symbols)))
    return S2TTransformerModel.build_model(Namespace(**values), task)


class SpeechToTextReference(Reference):
    """fairseq's speech-to-text transformer. It takes features, which both sides make alike, and `forced_tokens`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True
        self.lending.unrounded = (self.model.encoder.embed_positions, self.model.decoder.embed_positions)
        self.latest: Any = None  # the features of the last run, and how many each utterance has

    def _hook(self) -> None:
        encoder, decoder = self.model.encoder, self.model.decoder
        for index, layer in enumerate(encoder.subsample.conv_layers):
            self._watch(layer, "conv.%d" % index, same)
        for index, layer in enumerate(encoder.transformer_layers):
            self._watch(layer, "layer.%d" % index, swap_first)
        self._watch(encoder.layer_norm, "encoder", swap_first)
        for index, layer in enumerate(decoder.layers):
            self._watch(layer, "decoder.layer.%d" % index, swap_first)
        self._watch(decoder.layer_norm, "decoder.norm", swap_first)
        self._watch(decoder.output_projection, "decoder.logits", same)

    def run(self, waveforms: Any, lengths: Any = None, multiple: Any = None) -> tuple[list[int], dict[str, Any]]:
        """Compute every stage, as for every model."""
        source, counts = features(waveforms, lengths, self.settings["model"]["input_feat_per_channel"])
        decoder = self.model.decoder
        tokens = forced_tokens(decoder.embed_tokens.num_embeddings, decoder.max_target_positions)
        self.latest, self.seen = (source, counts), {}
        with torch.no_grad(), self.lending.lent():
            self.model(
                source.to(self.device, self.lending.kind),
                counts.to(self.device),
                tokens.expand(len(source), -1).to(self.device),
            )
        frames = self.model.encoder.subsample.get_out_seq_lens_tensor(counts).tolist()
        stages = {name: crop(name, value, frames) for name, value in self.seen.items()}
        self.seen = {}
        return frames, stages

    def normalise(self, waveform: Any, rate: int) -> Any:
        """Leave a waveform as it is: `features` takes it so."""
        return torch.as_tensor(waveform).float()

    def paths(self, stages: Any, frames: list[int]) -> Any:
        """The tokens that fairseq generates with a beam of one, for each utterance of the last run."""
        return self._generate(1, 1.0)

    def beams(self) -> list[Any]:
        """What it generates with the recipe's beam: tokens and text, for each utterance of the last run."""
        beam = self.request["beam"]
        found = self._generate(beam, self.request["length_penalty"]) if beam > 1 else []
        return [[tokens.tolist(), self.transcribe(tokens.tolist())] for tokens in found]

    def _generate(self, beam: int, penalty: float) -> Any:
        from fairseq.sequence_generator import SequenceGenerator

        limits = dict(max_len_a=0, max_len_b=200, min_len=1)
        generator = SequenceGenerator([self.model], self.words(), beam_size=beam, len_penalty=penalty, **limits)
        language = language_of(self.request["symbols"])
        prefix = None if language is None else torch.tensor([[language]], device=self.device)
        found = []
        for source, count in zip(*self.latest):
            net_input = {"src_tokens": source[None, :count].to(self.device), "src_lengths": count[None].to(self.device)}
            with self.lending.lent():
                hypotheses = generator.generate([self.model], {"net_input": net_input}, prefix_tokens=prefix)[0]
            found.append(hypotheses[0]["tokens"])
        self.seen = {}
        return found

    def spell(self, language: str = "") -> str:
        """Write out every symbol of the dictionary that is not special, in order, twice."""
        ids = [i for i in range(len(self.request["symbols"])) if i not in self.request["special"]]
        return self.transcribe(ids * 2)

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Any:
        """As for every model; the tables of positions are not weights: what a half type did to them must not stay."""
        kept = [table.weights for table in self.lending.unrounded]
        try:
            with super().arithmetic(name):
                yield
        finally:
            for table, weights in zip(self.lending.unrounded, kept):
                table.weights = weights

    def transcribe(self, path: Any) -> str:
        """Turn tokens into text, as fairseq's sentencepiece does; special symbols and languages' tags are left out."""
        from fairseq.data import data_utils

        kept: Any = torch.as_tensor([index for index in path if index not in self.request["special"]])
        return str(data_utils.post_process(self.words().string(kept), "sentencepiece"))

    def recognize(self, waveform: Any, rate: int) -> str:
        """Say why this cannot be asked."""
        raise CannotBuildError("fairseq makes features with pykaldi or torchaudio, which this does not run")


SIZES = ("", "_xs", "_s", "_sp", "_m", "_mp", "_l", "_lp")
ARCHITECTURES = {"s2t_transformer%s" % size: (build_speech_to_text, SpeechToTextReference) for size in SIZES}
