"""Converted models that write text token by token, with every stage visible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from convert.verification.compare import GENERATED
from convert.verification.fairseq_side.features import features
from convert.verification.fairseq_side.numerics import crop
from convert.verification.fairseq_side.tokens import PAD, forced_tokens, generated_length
from convert.verification.watched import Target, Visit

if TYPE_CHECKING:
    import torch


class EncoderDecoderTarget(Target):
    """A converted model with a decoder: run on the tokens that both sides are given, then left to generate by itself."""

    part = prefix = "encoder."

    @property
    def base(self) -> Any:
        """The encoder."""
        return self.model.encoder

    @property
    def output(self) -> str:
        """The stage that the model is there for."""
        return "decoder.logits"

    def _hook(self) -> None:
        model, decoder = self.model, self.model.decoder.model.decoder
        self._hook_encoder(self.base)
        if hasattr(model, "enc_to_dec_proj"):
            self._watch(model.enc_to_dec_proj, "enc_to_dec_proj")
        decoder.layers[0].register_forward_pre_hook(self._embedded)
        for index, layer in enumerate(decoder.layers):
            self._watch(layer, f"decoder.layer.{index}")
        if hasattr(decoder, "layer_norm"):
            self._watch(decoder.layer_norm, "decoder.norm")
        self._watch(model.decoder.get_output_embeddings(), "decoder.logits")
        self.stages += ["decoder.embedded", GENERATED]

    def _embedded(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        if self.visit is not None:
            self.visit("decoder.embedded", crop("decoder.embedded", given[0], []))

    def compute(self, source: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Run the encoder, the decoder on `forced_tokens`, and `generate` as the directory configures it."""
        import torch

        config = self.model.config.decoder
        tokens = forced_tokens(config.vocab_size, config.max_position_embeddings).to(self.device)
        self.model(source, attention_mask=mask, decoder_input_ids=tokens.expand(len(source), -1), use_cache=False)
        if source.dtype == torch.float64:  # measures rounding, and tokens have none
            return
        visit, self.visit = self.visit, None  # what the modules compute meanwhile is not compared
        found = self.model.generate(source, attention_mask=mask, num_beams=1, do_sample=False)[:, 1:].cpu()
        length = generated_length(config.max_position_embeddings)
        ids = torch.full((len(source), max(length, found.shape[1])), PAD)
        ids[:, : found.shape[1]] = found
        if visit is not None:
            visit(GENERATED, ids)


class SpeechToTextTarget(Target):
    """A converted speech-to-text transformer: it takes features, which both sides make alike, and `forced_tokens`."""

    def _hook(self) -> None:
        encoder, decoder = self.base.encoder, self.base.decoder
        for index, layer in enumerate(encoder.conv.conv_layers):
            self._watch(layer, f"conv.{index}")
        for index, layer in enumerate(encoder.layers):
            self._watch(layer, f"layer.{index}")
        self._watch(encoder.layer_norm, "encoder")
        for index, layer in enumerate(decoder.layers):
            self._watch(layer, f"decoder.layer.{index}")
        self._watch(decoder.layer_norm, "decoder.norm")
        self._watch(self.model.lm_head, "decoder.logits")

    @property
    def output(self) -> str:
        """The stage that the model is there for."""
        return "decoder.logits"

    def run(self, waveforms: torch.Tensor, lengths: list[int] | None, visit: Visit) -> list[int]:
        """Compute every stage, as for every target."""
        import torch

        config = self.model.config
        source, counts = features(waveforms, lengths, config.input_feat_per_channel)
        tokens = forced_tokens(config.vocab_size, config.max_target_positions).to(self.device)
        self.frames = [int(n) for n in self.model._get_feat_extract_output_lengths(counts)]
        mask = None if lengths is None else (torch.arange(source.shape[1])[None] < counts[:, None]).long()
        self.visit = visit
        try:
            with torch.no_grad(), self.lending.lent():
                self.model(
                    source.to(self.device, self.lending.kind),
                    attention_mask=None if mask is None else mask.to(self.device),
                    decoder_input_ids=tokens.expand(len(source), -1),
                    use_cache=False,
                )
        finally:
            self.visit = None
        return self.frames

    def generate(self, waveform: torch.Tensor, language: int | None, *, beam: bool = False) -> list[int]:
        """Generate the tokens of a waveform as the directory says, with transformers' own attention.

        Args:
            waveform: (samples,).
            language: the symbol to start with, where texts start with that of a language.
            beam: whether with the directory's beam, or with a beam of one.
        """
        forced: dict[str, Any] = {} if language is None else {"forced_bos_token_id": language}
        options: dict[str, Any] = forced if beam else {"num_beams": 1, "early_stopping": False, **forced}
        with self._eager(waveform) as source:
            made: list[int] = self.model.generate(source, **options)[0].tolist()
        return made

    def log_probabilities(self, waveform: torch.Tensor, tokens: list[int]) -> list[float]:
        """Compute the logarithm of the probability of each token, given those before it.

        Args:
            waveform: (samples,).
            tokens: as they are generated, without the one that generation starts with.
        """
        import torch

        given = torch.tensor([[self.model.generation_config.decoder_start_token_id, *tokens[:-1]]], device=self.device)
        with self._eager(waveform) as source:
            logits = self.model(source, decoder_input_ids=given, use_cache=False).logits[0]
        chosen = torch.tensor(tokens, device=self.device)[:, None]
        found: list[float] = logits.double().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
        return found

    @contextlib.contextmanager
    def _eager(self, waveform: torch.Tensor) -> Iterator[torch.Tensor]:
        """Turn to transformers' own attention, and make a waveform's features."""
        import torch

        source, _ = features(waveform[None], None, self.model.config.input_feat_per_channel)
        known = self.model.config._attn_implementation
        self.model.config._attn_implementation = "eager"
        try:
            with torch.no_grad(), self.lending.lent():
                yield source.to(self.device, self.lending.kind)
        finally:
            self.model.config._attn_implementation = known
