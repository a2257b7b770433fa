"""The converted model as plain transformers loads it, with every stage of it visible."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import loading
from convert.errors import ConvertError
from convert.reading import read_file
from convert.verification.attention import NAME, register
from convert.verification.compare import GENERATED
from convert.verification.fairseq_side.features import features
from convert.verification.fairseq_side.numerics import NAMES, aligned, crop
from convert.verification.fairseq_side.tokens import PAD, forced_tokens, generated_length
from convert.verification.inputs import Geometry

if TYPE_CHECKING:
    import torch

Visit = Callable[[str, "torch.Tensor"], None]
# config.json's model_type -> the attention that does fairseq's arithmetic; sdpa where none is named
ATTENTION: dict[str, Any] = {"speech_to_text": NAME, "wav2vec2-conformer": "eager", "wavlm": "eager"}
ATTENTION["speech-encoder-decoder"] = {"encoder": "sdpa", "decoder": "eager"}  # TrOCR has no other


def attention_of(model_type: str) -> Any:
    """Name the attention that a verification loads a model with, that of each part where they differ."""
    attention = ATTENTION.get(model_type, "sdpa")
    return register() if attention == NAME else attention


def load(model_dir: Path, device: str) -> Target:
    """Load a model directory with plain transformers, in float32, strictly.

    Args:
        model_dir: the directory.
        device: such as `cpu` or `cuda`.

    Raises:
        MismatchError: `load`: a tensor is missing, unexpected or of another shape.
        ConvertError: `load`, status 1: transformers cannot load the directory.
    """
    import torch
    import transformers

    config = loading.load(transformers.AutoConfig, model_dir, status=1)
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        message = f"{model_dir.name}: transformers {transformers.__version__} has no class {name!r}"
        raise ConvertError(message, code="load", key=model_dir.name, status=1, hint="pip install -U transformers")
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {key: torch.float32, "attn_implementation": attention_of(config.model_type), "config": config}
    model = loading.load_model(getattr(transformers, name), model_dir, status=1, **options)
    target = TARGETS.get(name, Target)(model, device)
    target.spoken = target.native = language_of(model_dir)
    return target


def language_of(model_dir: Path) -> str:
    """Say which of several languages the weights speak, by the tokenizer's configuration; nothing where it names none."""
    try:
        found = json.loads(read_file(model_dir / "tokenizer_config.json")).get("target_lang")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(found or "")


class Target:
    """A converted model, watched: an encoder with or without a head. The base of all other kinds of model.

    Args:
        model: the transformers model, float32.
        device: where it runs.
    """

    def __init__(self, model: Any, device: str) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.visit: Visit | None = None
        self.frames: list[int] = []
        self.spoken = self.native = ""  # the language that is loaded, and the one that the weights speak
        self.stages: list[str] = []  # what it is compared at, in no order
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.data = aligned(parameter.data)
        self._hook()

    part = ""  # what stands before the encoder's values in the configuration

    @property
    def base(self) -> Any:
        """The encoder, without its head."""
        return self.model.base_model

    @property
    def rounds(self) -> str:
        """Why this model's sums are not fairseq's to the last bit; nothing where they are."""
        return ""

    @property
    def prefix(self) -> str:
        """What stands before the encoder's tensors."""
        return "" if self.base is self.model else f"{self.model.base_model_prefix}."

    @property
    def output(self) -> str:
        """The stage that the model is there for: its head's, or the encoder's."""
        heads = [name for name in ("logits", "project_hid") if name in self.stages]
        return heads[0] if heads else "encoder"

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        found: dict[str, torch.Tensor] = self.model.state_dict()
        return found

    def _hook(self) -> None:
        self._hook_encoder(self.base)
        model = self.model
        if hasattr(model, "lm_head"):
            self._watch(model.lm_head, "logits")
        if hasattr(model, "quantizer"):
            self._watch(model.quantizer.weight_proj, "quantizer")
            self._watch(model.project_q, "project_q")
            self._watch(model.project_hid, "project_hid")
            self.stages.append("codes")

    def _hook_encoder(self, base: Any) -> None:
        for index, layer in enumerate(base.feature_extractor.conv_layers):
            self._watch(layer, f"conv.{index}")
        self._watch(base.feature_projection.layer_norm, "feature_norm")
        self._watch(base.feature_projection.projection, "projection")
        self._watch(base.encoder.pos_conv_embed, "pos_conv")
        for index, layer in enumerate(base.encoder.layers):
            self._watch(layer, f"layer.{index}")
        self._watch(base.encoder, "encoder")

    def _watch(self, module: Any, name: str) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            if self.visit is None:
                return
            value = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            self.visit(name, crop(name, value, self.frames))
            if name == "quantizer":
                groups = self.model.config.num_codevector_groups
                value = crop(name, value, self.frames)
                self.visit("codes", value.reshape(*value.shape[:-1], groups, -1).argmax(-1))

        module.register_forward_hook(hook)
        self.stages += [name] if name not in self.stages else []

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Iterator[None]:
        """Compute in another floating point type; back to float32 is exact, as half types hold rounded weights only."""
        import torch

        self.model.to(NAMES[name])
        try:
            yield
        finally:
            self.model.to(torch.float32)

    def run(self, waveforms: torch.Tensor, lengths: list[int] | None, visit: Visit) -> list[int]:
        """Compute every stage, and show each to `visit` as it comes.

        Args:
            waveforms: (batch, samples), padded with zeros.
            lengths: the samples of each utterance; `None` for a single one, which then has no attention mask.
            visit: called with the stage's name and its numbers: (batch, channels, time) for `conv.*`, (batch, channels) for
                what is pooled over the frames, otherwise (valid frames of the whole batch, channels).

        Returns:
            The valid frames of each utterance.
        """
        import torch

        kind = next(self.model.parameters()).dtype
        source = waveforms.to(self.device).to(kind)
        mask = None
        counts = [source.shape[1]] * len(source) if lengths is None else lengths
        if lengths is not None:
            mask = (torch.arange(source.shape[1])[None] < torch.tensor(lengths)[:, None]).long().to(self.device)
        self.frames = [int(n) for n in self.base._get_feat_extract_output_lengths(torch.tensor(counts))]
        self.visit = visit
        try:
            with torch.no_grad():
                self.compute(source, mask)
        finally:
            self.visit = None
        return self.frames

    def speak(self, language: str) -> None:
        """Load the adapters and the head of a language as users do; of the one that the weights speak, if it is empty."""
        language = language or self.native
        if language == self.spoken:
            return
        before = self.model.lm_head
        try:
            self.model.load_adapter(language, local_files_only=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ConvertError(
                f"transformers cannot load the adapters of {language} ({reason})",
                code="load",
                key=f"adapter.{language}.safetensors",
                status=1,
                hint="convert the checkpoint again",
            ) from error
        self.spoken = language
        if self.model.lm_head is not before:
            self._watch(self.model.lm_head, "logits")
            self.model.lm_head.requires_grad_(False)

    def compute(self, source: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Run the model on (batch, samples), with its attention mask; what no hook sees is shown to `visit`."""
        self.model(source, attention_mask=mask)

    def samples(self, frames: list[int]) -> list[int]:
        """Count the fewest samples of utterances that make so many frames."""
        config = self.base.config
        geometry = Geometry(tuple(zip(config.conv_kernel, config.conv_stride, strict=True)))
        return [geometry.samples(count) for count in frames]

    def usual(self) -> Target | None:
        """Make the same model with the attention that transformers chooses when asked for none; `None` if this has it."""
        return None

    def like(self, changes: Mapping[str, Any]) -> Target:
        """Make the same model, on the same tensors, with other configuration values, such as `encoder.hidden_act`."""
        import copy

        import torch

        config = copy.deepcopy(self.model.config)
        for name, value in changes.items():
            part, _, field = name.rpartition(".")
            setattr(getattr(config, part) if part else config, field, value)
        config._attn_implementation = self.model.config._attn_implementation  # of all parts, but each has its own
        for part in config.sub_configs:
            getattr(config, part)._attn_implementation = getattr(self.model.config, part)._attn_implementation
        with torch.device("meta"):
            other = type(self.model)(config)
        other.load_state_dict(self.model.state_dict(), strict=True, assign=True)
        for module, twin in zip(other.modules(), self.model.modules(), strict=True):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:  # no part of the state_dict
                    setattr(module, name, twin.get_buffer(name))
        if hasattr(self.model, "generation_config"):
            other.generation_config = self.model.generation_config
        return type(self)(other, self.device)


class ConformerTarget(Target):
    """A model with conformer layers."""

    @property
    def rounds(self) -> str:
        """Of widths that are no power of 4 the root is no power of 2, and both what is done with it rounds."""
        width = self.model.config.hidden_size // self.model.config.num_attention_heads
        exact = width.bit_count() == 1 and width.bit_length() % 2 == 1
        return "" if exact else f"transformers multiplies scores by {width} ** -0.5, fairseq divides them by its root"

    def _hook_encoder(self, base: Any) -> None:
        super()._hook_encoder(base)
        self.stages.remove("pos_conv")  # it is there, and neither framework uses it

    def usual(self) -> Target | None:
        """The same with sdpa, which transformers 5 chooses, and 4 does not have for conformers."""
        if not getattr(self.model, "_supports_sdpa", False):
            return None
        other = self.like({})
        other.model.set_attn_implementation("sdpa")
        return other

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Iterator[None]:
        """As for every target; a table of positions is no weight: what a half type did to it must not stay."""
        positions = self.base.encoder.embed_positions
        kept = getattr(positions, "pe", None)
        try:
            with super().arithmetic(name):
                yield
        finally:
            if kept is not None:
                positions.pe = kept

    def compute(self, source: torch.Tensor, mask: torch.Tensor | None) -> None:
        """As for every target; a table kept from the last input may be of other frequencies, or of another type."""
        self.base.encoder.embed_positions.cached_sequence_length = None
        super().compute(source, mask)


class ClassificationTarget(Target):
    """A converted audio classifier: the class scores of each utterance are its logits."""

    def _hook(self) -> None:
        self._hook_encoder(self.base)
        self._watch(self.model.projector, "projector")
        self._watch(self.model.classifier, "logits")

        def pooled(_: Any, inputs: Any) -> None:
            if self.visit is not None:
                self.visit("pooled", inputs[0])

        self.model.classifier.register_forward_pre_hook(pooled)
        self.stages.append("pooled")


class Seq2SeqTarget(Target):
    """A converted model with a decoder: run on the tokens that both sides are given, then left to generate by itself."""

    part = prefix = "encoder."

    @property
    def rounds(self) -> str:
        """Why its decoder's sums are not fairseq's to the last bit."""
        return "fairseq's attention multiplies in another order than the decoders of transformers"

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

    def usual(self) -> Target | None:
        """The same with eager, which is all that transformers has for this class."""
        if self.model.config._attn_implementation == "eager":
            return None
        other = self.like({})
        other.model.config._attn_implementation = "eager"
        return other

    @property
    def rounds(self) -> str:
        """Without fairseq's order of sums in attention, the last bits are others."""
        known = self.model.config._attn_implementation == NAME
        return (
            ""
            if known
            else "this transformers takes no other attention than its own, which multiplies in another order"
        )

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

        config, kind = self.model.config, next(self.model.parameters()).dtype
        source, counts = features(waveforms, lengths, config.input_feat_per_channel)
        tokens = forced_tokens(config.vocab_size, config.max_target_positions).to(self.device)
        self.frames = [int(n) for n in self.model._get_feat_extract_output_lengths(counts)]
        mask = None if lengths is None else (torch.arange(source.shape[1])[None] < counts[:, None]).long()
        self.visit = visit
        try:
            with torch.no_grad():
                self.model(
                    source.to(self.device, kind),
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
        kind, known = next(self.model.parameters()).dtype, self.model.config._attn_implementation
        self.model.config._attn_implementation = "eager"
        try:
            with torch.no_grad():
                yield source.to(self.device, kind)
        finally:
            self.model.config._attn_implementation = known

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Iterator[None]:
        """As for every target; the tables of positions are no weights: what a half type did to them must not stay."""
        tables = [self.base.encoder.embed_positions, self.base.decoder.embed_positions]
        kept = [table.weights.clone() for table in tables]
        try:
            with super().arithmetic(name):
                yield
        finally:
            for table, weights in zip(tables, kept, strict=True):
                table.weights = weights


# transformers class -> what runs it, where `Target` does not
TARGETS: dict[str, type[Target]] = {
    "SpeechEncoderDecoderModel": Seq2SeqTarget,
    "Speech2TextForConditionalGeneration": SpeechToTextTarget,
    "Wav2Vec2ConformerForCTC": ConformerTarget,
    "Wav2Vec2ConformerForPreTraining": ConformerTarget,
    "Wav2Vec2ConformerModel": ConformerTarget,
    "Data2VecAudioForSequenceClassification": ClassificationTarget,
    "HubertForSequenceClassification": ClassificationTarget,
    "Wav2Vec2ForSequenceClassification": ClassificationTarget,
}
