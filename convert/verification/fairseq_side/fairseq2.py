"""fairseq2's wav2vec 2.0, pretrained (`wav2vec2`) and with a CTC head (`wav2vec2_asr`), of fairseq2 0.5.2 and later."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import logging
import sys
import types
from typing import Any

import torch

from .importing import CannotBuildError
from .numerics import same, swap_last
from .reference import Reference

STUB = "fairseq2n, fairseq2's native part, stubbed as for its documentation (DOC_MODE): it reads audio and text, no model uses it"
HINT = "pip install --no-deps fairseq2 importlib_resources ruamel.yaml"


def import_fairseq2() -> tuple[Any, list[str]]:
    """Import fairseq2, without its native part where that is not here; return it and the names of the patches it took.

    Raises:
        CannotBuildError: it cannot be imported, with the reason.
    """
    patches: list[str] = []
    try:
        importlib.import_module("fairseq2n")
    except Exception:  # absent, or built for another torch, which it says by whatever its libraries raise
        stub: Any = types.ModuleType("fairseq2n")
        stub.DOC_MODE, stub.__version__, stub.STUB = True, "stub", STUB
        sys.modules["fairseq2n"] = stub
    if hasattr(sys.modules["fairseq2n"], "STUB"):
        patches.append(STUB)
    try:
        fairseq2 = importlib.import_module("fairseq2")
        importlib.import_module("fairseq2.models.wav2vec2.asr")
        importlib.import_module("fairseq2.nn").BatchLayout  # noqa: B018 - 0.4 and earlier have none
    except Exception as error:
        raise CannotBuildError(
            "fairseq2 0.5.2 or later cannot be imported here: %s: %s (%s)" % (type(error).__name__, error, HINT)
        )
    logging.getLogger("fairseq2").setLevel(logging.ERROR)
    return fairseq2, patches


def build_fairseq2(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build a model with fairseq2's own reading of its configuration."""
    from fairseq2.models import wav2vec2
    from fairseq2.models.wav2vec2 import asr
    from fairseq2.utils.structured import StandardValueConverter

    values = {key: value for key, value in settings["model"].items() if key != "_name"}
    inner = {field.name for field in dataclasses.fields(wav2vec2.Wav2Vec2EncoderConfig)}
    values["encoder_config"] = {key: values.pop(key) for key in list(values) if key in inner}
    if settings["model"]["_name"] == ASR:
        configuration, create = asr.Wav2Vec2AsrConfig, asr.create_wav2vec2_asr_model
    else:
        configuration, create = wav2vec2.Wav2Vec2Config, wav2vec2.create_wav2vec2_model
    with one_process():
        return create(StandardValueConverter().structure(values, configuration))


@contextlib.contextmanager
def one_process() -> Any:
    """Answer what fairseq2's modules ask since 0.7 while they are built: on which device, shared by how many processes.

    fairseq2's own answer loads all of its library first, and what that needs.
    """
    from fairseq2 import gang
    from fairseq2.runtime import dependency

    class Resolver:
        def resolve(self, _: Any) -> Any:
            return self

        def get_current_device(self) -> Any:
            return torch.empty(()).device

        def get_current_gangs(self, _: Any = None) -> Any:
            return gang.create_fake_gangs(torch.device("cpu"))

    original = dependency._resolver
    dependency._resolver = original or Resolver()
    try:
        yield
    finally:
        dependency._resolver = original


class Fairseq2Reference(Reference):
    """fairseq2's model as it was pretrained."""

    library = staticmethod(import_fairseq2)
    version = "fairseq2 %s"
    islands = "the norms of the convolutions"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True

    def _hook(self) -> None:
        frontend, watch = self.model.encoder_frontend, self._watch
        for index, layer in enumerate(frontend.feature_extractor.layers):
            watch(layer, "conv.%d" % index, same)
        watch(frontend.post_extract_layer_norm, "feature_norm", same)
        if frontend.model_dim_proj is not None:
            watch(frontend.model_dim_proj, "projection", same)
        watch(frontend.pos_encoder.activation, "pos_conv", swap_last)
        for index, layer in enumerate(self.model.encoder.layers):
            watch(layer, "layer.%d" % index, same)
        watch(self.model.encoder, "encoder", same)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the encoder without masking, and what pretraining computes after it, for every frame."""
        from fairseq2.nn import BatchLayout

        frontend = self.model.encoder_frontend
        lengths = None if padding is None else (~padding).sum(1).tolist()
        features, layout, _ = frontend.extract_features(source, BatchLayout.of(source, lengths))
        encoded = self.model.encoder(frontend.process_features(features, layout)[0], layout)
        self._after(features, encoded)
        if padding is None:
            return None
        return torch.arange(features.shape[1])[None] >= torch.as_tensor(list(layout.seq_lens))[:, None]

    def _after(self, features: Any, encoded: Any) -> None:
        quantizer = self.model.quantizer
        entries = quantizer.entry_proj(features)
        self._see("quantizer", entries)
        self._see("codes", entries.reshape(*features.shape[:2], quantizer.num_codebooks, -1).argmax(-1))
        with uncompiled():
            quantized = quantizer(features).quantized_vectors
        self._see("project_q", self.model.final_target_proj(quantized))
        self._see("project_hid", self.model.final_proj(encoded))

    @contextlib.contextmanager
    def lifted(self) -> Any:
        """Let the convolutions' norms, which compute in float32, compute in their input's type."""
        lifted: list[Any] = []
        for module in self.model.modules():
            if getattr(module, "cast_fp32", False):
                module.cast_fp32 = False
                lifted.append((module, "cast_fp32", True))
            elif type(module).__name__ == "Float32GroupNorm":
                module.forward = types.MethodType(torch.nn.GroupNorm.forward, module)
                lifted.append((module, "forward", None))
        try:
            yield
        finally:
            for module, name, value in lifted:
                if value is None:
                    delattr(module, name)
                else:
                    setattr(module, name, value)

    def normalise(self, waveform: Any, rate: int) -> Any:
        """Prepare a waveform as the recipes do: one layer norm over all of it, where they were told to normalise."""
        signal = torch.as_tensor(waveform).float()
        if not self.settings["task"].get("normalize", False):
            return signal
        return torch.nn.functional.layer_norm(signal, signal.shape)

    def words(self) -> Any:
        """The tokenizer's sentencepiece model, read by the library that fairseq2's native part wraps."""
        from sentencepiece import SentencePieceProcessor

        if self.dictionary is None:
            self.dictionary = SentencePieceProcessor(model_proto=base64.b64decode(self.request["tokenizer"]))
        return self.dictionary

    def transcribe(self, path: Any) -> str:
        """Turn a greedy path into text: runs are merged, pieces are joined; control pieces, the blank among them, print nothing."""
        ids: Any = torch.as_tensor(path)
        pieces = [self.words().id_to_piece(index) for index in ids.unique_consecutive().tolist()]
        return str(self.words().decode_pieces(pieces))


class AsrReference(Fairseq2Reference):
    """fairseq2's model with a CTC head."""

    def _after(self, features: Any, encoded: Any) -> None:
        self._see("logits", self.model.final_proj(encoded))

    def recognize(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform: the best piece of every frame."""
        frames, stages = self.run(self.normalise(waveform, rate)[None])
        return self.transcribe(self.paths(stages, frames)[0].tolist())


@contextlib.contextmanager
def uncompiled() -> Any:
    """Let the quantizer, which compiles a sum while it runs, run without a compiler."""
    original = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


PRETRAINED, ASR = "fairseq2.wav2vec2", "fairseq2.wav2vec2_asr"
ARCHITECTURES = {PRETRAINED: (build_fairseq2, Fairseq2Reference), ASR: (build_fairseq2, AsrReference)}
