"""A converted model, with every stage of it visible: an encoder with or without a head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError
from convert.families import of_class
from convert.families.base import Running
from convert.verification.fairseq_side.lending import Lending
from convert.verification.fairseq_side.numerics import NAMES, crop
from convert.verification.inputs import Geometry

if TYPE_CHECKING:
    import torch

Visit = Callable[[str, "torch.Tensor"], None]
ENCODER = ("conv.", "pos_conv", "layer.")  # the stages of its layers, each of which runs once on an input


class Target:
    """A converted model, watched: an encoder with or without a head. The base of all other kinds of model.

    Args:
        model: the transformers model, float32.
        device: where it runs.
    """

    def __init__(self, model: Any, device: str) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.lending = Lending(self.model)
        self.device = device
        self.running = running_of(type(model).__name__)
        self.visit: Visit | None = None
        self.frames: list[int] = []
        self.current = self.native = ""  # the language that is loaded, and that of the weights
        self.stages: list[str] = []  # what it is compared at, in no order
        self.layers: dict[str, Any] = {}  # the encoder's, by stage
        self.kept: dict[str, Any] | None = None  # what they returned, in the order of the run
        self._hook()
        self.stages = [name for name in self.stages if name not in self.running.unused]

    part = ""  # what stands before the encoder's values in the configuration

    @property
    def base(self) -> Any:
        """The encoder, without its head."""
        return self.model.base_model

    @property
    def rounds(self) -> str:
        """Why this model's sums are not fairseq's to the last bit; nothing where they are."""
        return self.running.rounds(self.model.config)

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
            if self.kept is not None and name.startswith(ENCODER):
                self.kept.setdefault(name, output)
            value = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            self.visit(name, crop(name, value, self.frames))
            if name == "quantizer":
                groups = self.model.config.num_codevector_groups
                value = crop(name, value, self.frames)
                self.visit("codes", value.reshape(*value.shape[:-1], groups, -1).argmax(-1))

        module.register_forward_hook(hook)
        self.lending.watch(module, name)
        self.layers[name] = module
        self.stages += [name] if name not in self.stages else []

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Iterator[None]:
        """Compute in another floating point type."""
        before, self.lending.kind = self.lending.kind, NAMES[name]
        try:
            yield
        finally:
            self.lending.kind = before

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

        source = waveforms.to(self.device).to(self.lending.kind)
        mask = None
        counts = [source.shape[1]] * len(source) if lengths is None else lengths
        if lengths is not None:
            mask = (torch.arange(source.shape[1])[None] < torch.tensor(lengths)[:, None]).long().to(self.device)
        self.frames = [int(n) for n in self.base._get_feat_extract_output_lengths(torch.tensor(counts))]
        self.visit = visit
        try:
            with torch.no_grad(), self.lending.lent(), _without_tables(self.model):
                self.compute(source, mask)
        finally:
            self.visit = None
        return self.frames

    @contextlib.contextmanager
    def resumed(self, kept: Mapping[str, Any], changed: Collection[str]) -> Iterator[None]:
        """Let the layers before the first with a changed tensor return what they returned on the same input.

        Args:
            kept: what they returned, in the order of that run.
            changed: names of tensors; where one is in no layer, every layer runs.
        """
        weights = self.weights
        places = {weights[name].data_ptr() for name in changed}
        inside = {name: {one.data_ptr() for one in self.layers[name].state_dict().values()} for name in kept}
        first = (
            next((name for name in kept if places & inside[name]), "")
            if places <= set().union(*inside.values())
            else ""
        )
        before = list(kept)[: list(kept).index(first)] if first else []
        plain = {name: self.layers[name].forward for name in before}
        for name in before:
            self.layers[name].forward = lambda *_, output=kept[name], **__: output
        try:
            yield
        finally:
            for name, forward in plain.items():
                self.layers[name].forward = forward

    def set_language(self, language: str) -> None:
        """Load the adapters and the head of a language as users do; of that of the weights, if it is empty."""
        language = language or self.native
        if language == self.current:
            return
        before = self.model.lm_head
        try:
            self.model.load_adapter(language, local_files_only=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ConvertError(
                f"transformers cannot load the adapters of {language}: {reason}",
                code="load",
                key=f"adapter.{language}.safetensors",
                status=1,
                hint="convert the checkpoint again",
            ) from error
        self.current = language
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
        name, config = self.running.usual, self.model.config
        if name in ("", config._attn_implementation) or (
            name == "sdpa" and not getattr(self.model, "_supports_sdpa", 0)
        ):
            return None
        other = self.like({})
        other.model.config._attn_implementation = name
        return other

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
        for module, own in zip(other.modules(), self.model.modules(), strict=True):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:  # no part of the state_dict
                    setattr(module, name, own.get_buffer(name))
        if hasattr(self.model, "generation_config"):
            other.generation_config = self.model.generation_config
        made = type(self)(other, self.device)
        made.lending.kind = self.lending.kind
        return made


def running_of(name: str) -> Running:
    """Say how a class of transformers is run so that it does fairseq's sums."""
    family = of_class(name)
    return family.running if family else Running()


@contextlib.contextmanager
def _without_tables(model: Any) -> Iterator[None]:
    """Let a model make its tables of positions for each input: one that is kept may be of other frequencies, or of another type."""
    tables = [(module, module.pe) for module in model.modules() if getattr(module, "pe", None) is not None]
    for module in model.modules():
        if hasattr(module, "cached_sequence_length"):
            module.cached_sequence_length = None
    try:
        yield
    finally:
        for module, table in tables:
            module.pe = table


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
