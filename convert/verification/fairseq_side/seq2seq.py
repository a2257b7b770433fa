"""`Wav2Vec2Seq2SeqModel`: an encoder with a decoder."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from .building import fine_tuned
from .numerics import NAMES, sinusoids, swap_first
from .reference import Reference
from .tokens import PAD, dictionary_of, forced_tokens, generated_length


def build_seq2seq(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `Wav2Vec2Seq2SeqModel`."""
    from fairseq.models.wav2vec import wav2vec2_asr

    task = types.SimpleNamespace(source_dictionary=None, target_dictionary=dictionary_of(range(symbols)))
    configuration = fine_tuned(settings, wav2vec2_asr.Wav2Vec2Seq2SeqConfig, ignored, autoregressive=True)
    if configuration.decoder_embed_dim != 512:
        configuration.encoder_embed_dim = configuration.decoder_embed_dim
        patches.append("encoder_embed_dim set to decoder_embed_dim: cross-attention takes 512 where it is not set")
    return wav2vec2_asr.Wav2Vec2Seq2SeqModel.build_model(configuration, task)


class Seq2SeqReference(Reference):
    """fairseq's model with a decoder: run on tokens that both sides are given, then left to generate by itself."""

    prefix = "encoder.w2v_model."

    def __init__(self, *given: Any) -> None:
        self.table: Any = None  # what a conversion makes of sinusoidal positions
        super().__init__(*given)
        self.symbols = dictionary_of(self.request["symbols"])

    def encoder(self) -> Any:
        """The encoder that was pretrained, inside the model."""
        return self.model.encoder.w2v_model

    def _filled(self, weights: Any) -> None:
        positions = self.model.decoder.embed_positions
        if hasattr(positions, "weights"):
            self.table = sinusoids(*positions.weights.shape)
        self.info["patches"].append("in float64: fairseq.utils.softmax computes in float64, to measure floors")

    def round_weights(self, name: str) -> None:
        """Round every weight to float16 or bfloat16, and keep it as float32, as a converted model of that type has it."""
        if self.table is not None:
            self.table = self.table.to(NAMES[name]).float()
        super().round_weights(name)

    @contextlib.contextmanager
    def as_converted(self) -> Any:
        """In float64, sinusoidal positions are those of the converted model."""
        positions = self.model.decoder.embed_positions
        kept = getattr(positions, "weights", None)
        if self.table is not None:
            positions.weights = self.table.to(kept)
        try:
            with super().as_converted():
                yield
        finally:
            if self.table is not None:
                positions.weights = kept

    def _hook(self) -> None:
        super()._hook()
        encoder, decoder = self.model.encoder, self.model.decoder
        if encoder.proj is not None:
            self._watch(encoder.proj, "enc_to_dec_proj", swap_first)
        decoder.layers[0].register_forward_pre_hook(
            lambda _, given: self._see("decoder.embedded", swap_first(given[0]))
        )
        for index, layer in enumerate(decoder.layers):
            self._watch(layer, "decoder.layer.%d" % index, swap_first)
        if decoder.layer_norm is not None:
            self._watch(decoder.layer_norm, "decoder.norm", swap_first)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the encoder, the decoder on `forced_tokens`, and fairseq's generator with a beam of one."""
        decoder = self.model.decoder
        decoder._future_mask = None  # fairseq keeps it in the type that it was made in
        encoded = self.model.encoder(source=source, padding_mask=padding)
        tokens = forced_tokens(len(self.request["symbols"]), decoder.max_target_positions).to(self.device)
        self.seen["decoder.logits"] = decoder(tokens.expand(len(source), -1), encoder_out=encoded)[0]
        if self.lending.kind != torch.float64:  # measures rounding, and tokens have none
            self._generate(source, padding)
        return encoded["padding_mask"]

    def _generate(self, source: Any, padding: Any) -> None:
        """Generate, and note how close the second choice came at each step: fairseq rounds its running sum of scores."""
        from fairseq.sequence_generator import SequenceGenerator

        generator = SequenceGenerator([self.model], self.symbols, beam_size=1)
        shape = (len(source), generated_length(self.model.decoder.max_target_positions))
        ids, second = torch.full(shape, PAD), torch.full(shape, PAD)
        margin = torch.zeros(shape)
        plain = generator.search.step

        def step(at: Any, lprobs: Any, scores: Any, tokens: Any, rows: Any) -> Any:
            best, indices, beams = plain(at, lprobs, scores, tokens, rows)
            rows = rows.cpu()
            second[rows, at] = indices[:, 1].cpu()
            apart = best[:, 0] - best[:, 1] - 2 * torch.finfo(torch.float32).eps * best[:, 0].abs()
            margin[rows, at] = apart.clamp(0, 1e4).float().cpu()
            return best, indices, beams

        generator.search.step = step
        found = generator.generate([self.model], {"net_input": {"source": source, "padding_mask": padding}})
        for row, hypotheses in enumerate(found):
            tokens = hypotheses[0]["tokens"]
            ids[row, : len(tokens)] = tokens.cpu()
        self.seen.update({"generated": ids, "generated.second": second, "generated.margin": margin})

    def recognize(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform with fairseq's generator and a beam of one."""
        source = self.normalise(waveform, rate)[None].to(self.device)
        with torch.no_grad(), self.lending.lent():
            self._generate(source, None)
        path = self.seen["generated"][0].tolist()
        self.seen = {}
        return self.transcribe(path)

    def paths(self, stages: Any, frames: list[int]) -> Any:
        """The tokens that were generated, for each utterance."""
        return stages["generated"]

    def spell(self, language: str = "") -> str:
        """Write out every symbol of the dictionary that is not special, in order, twice."""
        ids = [i for i in range(len(self.request["symbols"])) if i not in self.request["special"]]
        return self.transcribe(ids * 2)

    def transcribe(self, path: Any) -> str:
        """Turn generated ids into text, as fairseq's tasks do."""
        ids = torch.as_tensor([i for i in path if i != PAD])
        return str(self.symbols.string(ids, self.request["post_process"]))


ARCHITECTURES = {"wav2vec_seq2seq": (build_seq2seq, Seq2SeqReference)}
