"""fairseq's side of a verification, in one file that any Python (3.7+) with torch (1.6+) and fairseq (0.10 to main) can run.

Imported, it offers `open_reference` and `Reference`. Run as `python fairseq_worker.py REQUEST.json`, it writes a recording:
a safetensors file with the waveforms, every stage of the model and its outputs, in float32 and as measured against float64.
It imports nothing of this project. The request is described at `record`.
"""

# ruff: noqa: UP031, C408, BLE001 - written for Python 3.7, and whatever an old fairseq raises is told
from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import sys
import types
from typing import Any

import numpy
import torch

SAMPLE = 512  # numbers kept of an inner stage in a recording, beside its SHA-256
WHOLE = {"logits", "pooled", "quantizer", "codes", "project_q", "project_hid"}  # outputs are kept entirely
WHOLE |= {"decoder.logits", "generated", "generated.second", "generated.margin"}
PAD = 1  # the id of fairseq's padding symbol
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class CannotBuildError(Exception):
    """fairseq is absent, or cannot build the model."""


# --- importing fairseq ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _numpy_aliases(patches: list[str]) -> Any:
    """`numpy.float` and its like left numpy in 1.24; fairseq 0.10 and 0.12 name them while they are imported."""
    gone = {"float": float, "int": int, "bool": bool, "object": object}
    added = [name for name in gone if name not in vars(numpy)]
    if added:
        patches.append("numpy.%s named while fairseq is imported" % ", numpy.".join(added))
    for name in added:
        setattr(numpy, name, gone[name])
    try:
        yield
    finally:
        for name in added:
            delattr(numpy, name)


@contextlib.contextmanager
def _hashable_dataclasses() -> Any:
    """Python 3.11 takes no unhashable default in a dataclass; fairseq 0.12's configurations are such defaults."""
    original = dataclasses.dataclass

    def patched(cls: Any = None, **options: Any) -> Any:
        def make(made: Any) -> Any:
            ours = made.__module__.split(".")[0] == "fairseq"
            return original(made, **(dict(options, unsafe_hash=True) if ours else options))

        return make if cls is None else make(cls)

    dataclasses.dataclass = patched
    try:
        yield
    finally:
        dataclasses.dataclass = original


def import_fairseq() -> tuple[Any, list[str]]:
    """Import fairseq; return it and the names of the patches it took.

    Raises:
        CannotBuildError: it cannot be imported, with the reason.
    """
    if "fairseq" in sys.modules:
        return sys.modules["fairseq"], []
    patches: list[str] = []
    try:
        with _numpy_aliases(patches):
            try:
                import fairseq
            except ValueError as error:
                if "mutable default" not in str(error):
                    raise
                for name in [name for name in sys.modules if name.split(".")[0] == "fairseq"]:
                    del sys.modules[name]
                with _hashable_dataclasses():
                    import fairseq
                patches.append("dataclasses made hashable while fairseq is imported: Python 3.11 refuses its defaults")
            import fairseq.models.wav2vec.wav2vec2_asr
            import fairseq.tasks.audio_pretraining
    except Exception as error:
        raise CannotBuildError("fairseq cannot be imported here: %s: %s" % (type(error).__name__, error))  # noqa: B904
    logging.getLogger("fairseq").setLevel(logging.ERROR)
    return fairseq, patches


# --- reading the checkpoint -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mapped_load() -> Any:
    """Let `torch.load` unpickle fairseq's objects (since torch 2.6 it refuses them), and map the file where it can."""
    original = torch.load

    def patched(file: Any, *_: Any, **__: Any) -> Any:
        path = getattr(file, "name", file)
        for options in ({"weights_only": False, "mmap": True}, {"weights_only": False}, {}):
            try:
                return original(path, map_location="cpu", **options)
            except (TypeError, RuntimeError, ValueError) as error:
                if not options:
                    raise
                if not any(word in str(error) for word in ("mmap", "weights_only", "keyword")):
                    raise
        raise AssertionError("unreachable")

    torch.load = patched  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _plain(value: Any) -> Any:
    """Turn omegaconf's containers and Namespaces into dicts and lists."""
    if type(value).__module__.split(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        return _plain(OmegaConf.to_container(value, resolve=True))
    if hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def _own_settings(state: Any) -> Any:
    """The settings as fairseq's own loader read them: `{"model", "task", "criterion"}`."""
    plain = _plain(state.get("cfg") or state.get("args"))
    if not isinstance(plain.get("model"), dict):
        names = {"model": plain.get("arch"), "task": plain.get("task"), "criterion": plain.get("criterion")}
        plain = {section: dict(plain, _name=name) for section, name in names.items()}
    inner = plain["model"].get("w2v_args")
    if isinstance(inner, dict) and not isinstance(inner.get("model"), dict):
        inner = {"model": dict(inner, _name=inner.get("arch") or "wav2vec2"), "task": dict(inner)}
        plain["model"] = dict(plain["model"], w2v_args=inner)
    if plain["model"]["_name"] not in (*ENCODERS, *SPEECH_TO_TEXT) and not isinstance(inner, dict):
        raise ValueError("w2v_args is empty")
    return plain


def read_checkpoint(path: str, settings: Any) -> tuple[Any, Any, str]:
    """Read a checkpoint with fairseq's loader, or where that fails, with torch's and the settings that were passed.

    Returns:
        The checkpoint's dict, its settings, and who read the settings.
    """
    from fairseq import checkpoint_utils

    with _mapped_load():
        try:
            state = checkpoint_utils.load_checkpoint_to_cpu(path)
            return state, _own_settings(state), "fairseq's loader"
        except Exception as error:
            reason = ("%s: %s" % (type(error).__name__, error)).split("\n")[0][:160].replace(path, "CHECKPOINT")
        return torch.load(path), settings, "fairseq-to-hf's reader, because fairseq's loader failed (%s)" % reason


# --- building the model ---------------------------------------------------------------------------------------------


def _complete(cls: Any, values: Any, ignored: list[str]) -> Any:
    """All fields of a fairseq configuration: the checkpoint's values, fairseq's defaults for the rest."""
    known = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if isinstance(default, str) and (default.startswith("${") or default == "???"):
            default = None
        known[field.name] = getattr(default, "value", default)
    ignored += sorted(
        "%s=%r" % (key, values[key]) for key in values if key not in known and key != "_name" and values[key]
    )
    return dict(known, **{key: _as(known[key], value) for key, value in values.items() if key in known})


def _as(default: Any, value: Any) -> Any:
    """Give a setting its field's type: argparse kept `latent_temp` as the text of a tuple until 2020."""
    is_text = isinstance(value, str) and isinstance(default, (list, tuple))
    return list(ast.literal_eval(value)) if is_text else value


def build(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build fairseq's model as `task.build_model` does, without the task's data.

    Args:
        settings: `{"model", "task"}`; a fine-tuned model's `model` holds the pretrained one's as `w2v_args`.
        symbols: the number of symbols in the dictionary.
        ignored: settings this fairseq does not know and that are set are added here.
        patches: the narrow fixes of fairseq's own mistakes that it took are added here.
    """
    builder, _ = ARCHITECTURES[settings["model"]["_name"]]
    with _conformers(patches):
        return builder(settings, symbols, ignored, patches)


@contextlib.contextmanager
def _conformers(patches: list[str]) -> Any:
    """Let fairseq main build and run a `ConformerEncoder`.

    Since there are adapter layers, `TransformerEncoder` hands `layer_idx` and `corpus_key`, which are for those alone, to
    methods that `ConformerEncoder` replaces with its own, which take neither. A class that ignores them stands in its place.
    """
    from fairseq.models.wav2vec import wav2vec2

    original = getattr(wav2vec2, "ConformerEncoder", None)
    if original is None:
        yield
        return
    patch = (
        "layer_idx and corpus_key, which are for adapter layers, ignored by ConformerEncoder: its methods take neither"
    )

    class ConformerEncoder(original):  # type: ignore[misc, valid-type]
        def build_encoder_layer(self, args: Any, layer_idx: Any = None) -> Any:
            if layer_idx is not None and patch not in patches:
                patches.append(patch)
            return super().build_encoder_layer(args)

        def extract_features(
            self, x: Any, padding_mask: Any = None, tgt_layer: Any = None, corpus_key: Any = None
        ) -> Any:
            return super().extract_features(x, padding_mask, tgt_layer)

    wav2vec2.ConformerEncoder = ConformerEncoder
    try:
        yield
    finally:
        wav2vec2.ConformerEncoder = original


def _classes(name: str) -> tuple[Any, Any]:
    """The configuration's class and the model's class of an encoder."""
    from importlib import import_module

    module, configuration, model = ENCODERS[name]
    found = import_module(module)
    return getattr(found, configuration, None), getattr(found, model)


def _outer(settings: Any) -> Any:
    return {key: value for key, value in settings["model"].items() if key not in ("flat", "w2v_args")}


def build_pretrained(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build an encoder as it was pretrained."""
    configuration, model = _classes(settings["model"]["_name"])
    normalize = bool(settings["task"].get("normalize", False))
    if configuration is None:  # 0.10: one flat Namespace
        return model.build_model(_flat(_outer(settings), normalize))
    from omegaconf import OmegaConf

    return model.build_model(OmegaConf.create(_complete(configuration, _outer(settings), ignored)), None)


def fine_tuned(settings: Any, cls: Any, ignored: list[str]) -> Any:
    """The configuration of a fine-tuned model, the pretrained one's inside.

    Args:
        settings: see `build`.
        cls: the dataclass of the fine-tuned model's configuration.
        ignored: see `build`.
    """
    from omegaconf import OmegaConf

    pretrained = settings["model"]["w2v_args"]["model"]
    name = pretrained.get("_name") or "wav2vec2"
    if "adp_num" not in {field.name for field in dataclasses.fields(cls)} and "trf_adp" in (
        settings["model"].get("layer_type"),
        pretrained.get("layer_type"),
    ):
        raise CannotBuildError("this fairseq has no adapters (layer_type trf_adp came in May 2023)")
    normalize = bool(settings["task"].get("normalize", False))
    made = _complete(_classes(name)[0], pretrained, ignored)
    own = _complete(cls, _outer(settings), [] if "flat" in settings["model"] else ignored)
    own = dict(own, data="", normalize=normalize, ddp_backend="legacy_ddp", w2v_path="")
    for field in ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"):
        own[field] = _outer(settings).get(
            field
        )  # fairseq main's defaults would replace those of older pretrained models
    task = {"_name": "audio_pretraining", "data": "", "normalize": normalize, "sample_rate": 16000}
    own["w2v_args"] = {"model": dict(made, _name=name), "task": task, "criterion": None, "lr_scheduler": None}
    return OmegaConf.create(own)


def build_ctc(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `Wav2VecCtc`."""
    from fairseq.models.wav2vec import wav2vec2_asr

    task = types.SimpleNamespace(target_dictionary=range(symbols))
    if not hasattr(wav2vec2_asr, "Wav2Vec2CtcConfig"):
        normalize = bool(settings["task"].get("normalize", False))
        arguments = _flat(_outer(settings), normalize)
        arguments.w2v_args = _flat(settings["model"]["w2v_args"]["model"], normalize)
        return wav2vec2_asr.Wav2VecCtc.build_model(arguments, task)
    return wav2vec2_asr.Wav2VecCtc.build_model(fine_tuned(settings, wav2vec2_asr.Wav2Vec2CtcConfig, ignored), task)


def build_hubert(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build HuBERT as for fine-tuning: without the dictionaries of its pretraining, whose head is left out."""
    from omegaconf import OmegaConf

    configuration, model = _classes("hubert")
    made = _complete(configuration, _outer(settings), ignored)
    task = types.SimpleNamespace(cfg=types.SimpleNamespace(sample_rate=16000), dictionaries=[None])
    return model.build_model(OmegaConf.create(dict(made, label_rate=made["label_rate"] or 50.0)), task)


def build_hubert_ctc(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `HubertCtc`."""
    from fairseq.models.hubert import hubert_asr

    made = _hubert(settings, hubert_asr.HubertCtcConfig, ignored, patches)
    if "autoregressive" not in made:
        made.autoregressive = False
        patches.append(
            "autoregressive=False given to HubertCtcConfig: HubertEncoder reads it, and there is no such field"
        )
    task = types.SimpleNamespace(target_dictionary=range(symbols), state_dict=lambda: {"dictionaries": [None]})
    return hubert_asr.HubertCtc.build_model(made, task)


def build_wavlm(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `WavLM` of Microsoft's unilm, which s3prl carries as it was released."""
    try:
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig
    except ImportError:
        raise ImportError("s3prl, which carries unilm's WavLM.py, is not here: pip install --no-deps s3prl")  # noqa: B904
    model = WavLM(WavLMConfig(_outer(settings)))
    for layer in model.encoder.layers:
        layer.self_attn.forward = _with_weights(layer.self_attn.forward)
    patches.append("torch asked for attention weights, as transformers asks for them: it multiplies otherwise then")
    return model


def _with_weights(forward: Any) -> Any:
    return lambda *arguments, **options: forward(*arguments, **dict(options, need_weights=True))


def build_classifier(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `Wav2VecClassification`, which fairseq has since May 2023."""
    from fairseq.models.wav2vec import wav2vec2_classification as module

    task = types.SimpleNamespace(target_dictionary=range(symbols))
    configuration = fine_tuned(settings, module.Wav2Vec2ClassificationConfig, ignored)
    return module.Wav2VecClassification.build_model(configuration, task)


def _hubert(settings: Any, cls: Any, ignored: list[str], patches: list[str]) -> Any:
    """The configuration of a fine-tuned HuBERT, for a task whose state has no dictionaries of the pretraining."""
    made = fine_tuned(settings, cls, ignored)
    made.w2v_args.task = {"_name": "hubert_pretraining", "data": "", "normalize": made.normalize, "sample_rate": 16000}
    made.w2v_args.model.label_rate = made.w2v_args.model.label_rate or 50.0
    patches.append("no dictionaries of the pretraining, which fairseq would look for in files beside the training data")
    return made


def build_seq2seq(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `Wav2Vec2Seq2SeqModel`."""
    from fairseq.models.wav2vec import wav2vec2_asr

    task = types.SimpleNamespace(source_dictionary=None, target_dictionary=_dictionary_of(range(symbols)))
    configuration = fine_tuned(settings, wav2vec2_asr.Wav2Vec2Seq2SeqConfig, ignored)
    configuration.autoregressive = True
    if configuration.decoder_embed_dim != 512:
        configuration.encoder_embed_dim = configuration.decoder_embed_dim
        patches.append("encoder_embed_dim set to decoder_embed_dim: cross-attention takes 512 where it is not set")
    return wav2vec2_asr.Wav2Vec2Seq2SeqModel.build_model(configuration, task)


def build_hubert_seq2seq(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `HubertSeq2SeqModel`."""
    from fairseq.models.hubert import hubert_asr

    configuration = _hubert(settings, hubert_asr.HubertSeq2SeqConfig, ignored, patches)
    configuration.autoregressive, configuration.seq2seq_path = True, ""
    task = types.SimpleNamespace(source_dictionary=None, target_dictionary=_dictionary_of(range(symbols)))
    task.state_dict = lambda: {"dictionaries": [None]}
    return hubert_asr.HubertSeq2SeqModel.build_model(configuration, task)


def build_speech_to_text(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `S2TTransformerModel`, whose settings are a Namespace."""
    from argparse import Namespace

    from fairseq.models.speech_to_text.s2t_transformer import S2TTransformerModel

    values = {key: value for key, value in _outer(settings).items() if key != "_name"}
    values["load_pretrained_encoder_from"] = None  # it only initialised what is filled now
    patches.append("in float64: fairseq.utils.softmax computes in float64, to measure floors")
    task = types.SimpleNamespace(target_dictionary=_dictionary_of(range(symbols)))
    return S2TTransformerModel.build_model(Namespace(**values), task)


def _flat(values: Any, normalize: bool) -> Any:
    """Settings as fairseq 0.10 wants them."""
    from argparse import Namespace

    made = {key: value for key, value in values.items() if key != "_name"}
    if not isinstance(made.get("latent_temp", ""), str):
        made["latent_temp"] = str(tuple(made["latent_temp"]))
    fixed = dict(arch="wav2vec2", task="audio_pretraining", criterion="wav2vec", data="", normalize=normalize)
    return Namespace(**dict(made, labels=None, enable_padding=False, **fixed))


def open_reference(request: Any) -> Reference:
    """Build fairseq's model from a checkpoint and fill it with the checkpoint's tensors, strictly.

    Args:
        request: `checkpoint` (a path), `architecture` (fairseq's name), `settings` (see `build`; used when fairseq cannot
            read its own), `symbols` (the dictionary, or an empty list), `post_process`, `device`; of a model with adapters
            `languages` (name -> index among them) and `language` (the one it speaks unless told otherwise).

    Raises:
        CannotBuildError: fairseq is absent, or cannot build this model.
    """
    fairseq, patches = import_fairseq()
    known = dict(request["settings"])  # omegaconf dropped the name for a time
    known["model"] = dict(known["model"], _name=request["architecture"])
    state, settings, reader = read_checkpoint(request["checkpoint"], known)
    ignored: list[str] = []
    symbols = len(request["symbols"])
    if state.get("adapter"):  # MMS: the model has a head of its own, that the language's replaces
        symbols = len(state["model"]["w2v_encoder.proj.bias"])
    try:
        with _no_random_numbers():
            model = build(settings, symbols, ignored, patches)
    except Exception as error:
        if settings is known:
            raise CannotBuildError("fairseq cannot build the model: %s: %s" % (type(error).__name__, error))  # noqa: B904
        settings, ignored = known, []
        reader = "fairseq-to-hf's reader, because fairseq could not use its own (%s)" % type(error).__name__
        with _no_random_numbers():
            model = build(settings, symbols, ignored, patches)
    reference: Reference = ARCHITECTURES[settings["model"]["_name"]][1](model, fairseq, request, settings)
    reference.info = {
        "fairseq": getattr(fairseq, "__version__", "unknown"),
        "settings": reader,
        "ignored_settings": ignored,
        "patches": patches,
    }
    patches.append("torch.load with weights_only=False while fairseq reads the checkpoint, whose globals were checked")
    patches.append("in float64: Fp32GroupNorm, Fp32LayerNorm and gelu compute in float64, to measure floors")
    reference.fill(state["model"])
    task_state = state.get("task_state")
    reference.dictionary = (task_state or {}).get("target_dictionary") if isinstance(task_state, dict) else None
    reference.adapters = state.get("adapter") or {}
    reference.speak("")
    return reference


@contextlib.contextmanager
def _no_random_numbers() -> Any:
    """Skip the random values of a new model: every one is replaced by `Reference.fill`, which misses none."""
    names = ("normal_", "uniform_")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    for name in names:
        setattr(torch.Tensor, name, lambda self, *_, **__: self)
    try:
        yield
    finally:
        for name in names:
            setattr(torch.Tensor, name, originals[name])


# --- running it -----------------------------------------------------------------------------------------------------


class Reference:
    """fairseq's model as it was pretrained, with every stage of it visible; the base of all other kinds of model.

    Stages have the shape (batch, channels, time) for `conv.*`, (batch, channels) for what is pooled over the frames, and
    (valid frames of the whole batch, channels) otherwise.
    """

    prefix = ""  # of the encoder's tensors

    def __init__(self, model: Any, fairseq: Any, request: Any, settings: Any) -> None:
        self.model = model
        self.fairseq = fairseq
        self.request = request
        self.settings = settings
        self.dictionary: Any = None
        self.info: Any = {}
        self.device = torch.device(request.get("device", "cpu"))
        self.seen: dict[str, Any] = {}
        self.w2v = self.encoder()
        self.multiple = getattr(self.w2v.encoder, "required_seq_len_multiple", 1)
        self.masks_like_main = hasattr(self.w2v, "_get_feat_extract_output_lengths")
        self.magnitude: Any = None  # what a conversion makes of a positional convolution without weight norm
        self.exact_blank: Any = None  # blank_weight, once its sum with the head's bias has been rounded
        self.row = 0  # of the stacked adapters
        self.adapters: Any = {}  # language -> its tensors and its dictionary, in files of MMS
        self.rounded = ""  # the type that the weights were rounded to

    def encoder(self) -> Any:
        """The encoder that was pretrained, inside the model."""
        return self.model

    def fill(self, weights: Any) -> None:
        """Load the checkpoint's tensors, every one, as float32."""
        plain = weights.get(self.prefix + "encoder.pos_conv.0.weight")
        if plain is not None and plain.dim() == 3:  # of one dimension, it is a batch norm's
            torch.nn.utils.remove_weight_norm(self.w2v.encoder.pos_conv[0])
            self.magnitude = plain.double().norm(dim=(0, 1), keepdim=True).float()
            self.info["patches"].append("weight norm removed from pos_conv: the checkpoint has the plain weight")
        if hasattr(self.model, "upgrade_state_dict"):
            self.model.upgrade_state_dict(weights)
        try:
            torch.nn.Module.load_state_dict(self.model, weights, strict=True, assign=True)
        except TypeError:  # before torch 2.1
            torch.nn.Module.load_state_dict(self.model, weights, strict=True)
        self.model.float().to(self.device).eval()
        self._filled(weights)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.data = aligned(parameter.data)
        self._hook()

    def _filled(self, weights: Any) -> None:
        """What is to be done once the tensors are in their places."""

    def adapter(self, source: Any) -> dict[str, Any]:
        """Which of its stacked adapters the model is to take, for each utterance of a batch; most models have none."""
        adapted = any(hasattr(layer, "adapter_layer") for layer in self.w2v.encoder.layers)
        return {"corpus_key": [self.row] * len(source)} if adapted else {}

    def speak(self, language: str) -> None:
        """Turn to a language; to the one that the request names, if it is empty. Most models have none."""

    def round_weights(self, name: str) -> None:
        """Round every weight to float16 or bfloat16, and keep it as float32, as a converted model of that type has it."""
        kind, self.rounded = NAMES[name], name
        if self.magnitude is not None:
            self.magnitude = self.magnitude.to(kind).float()
        self.model.to(kind).float()
        _forget_positions(self.w2v)

    @contextlib.contextmanager
    def _as_converted(self) -> Any:
        """Give the model the numbers that a conversion has to round, so that in float64 both sides have the same weights.

        A positional convolution without weight norm gets its magnitude back. In float32 fairseq computes as it was built.
        """
        if self.magnitude is None:
            yield
            return
        convolution = self.w2v.encoder.pos_conv[0]
        weight = convolution.weight.data
        scale = self.magnitude.to(weight.device).double() / weight.double().norm(dim=(0, 1), keepdim=True)
        convolution.weight.data = weight * scale.to(weight.dtype)
        try:
            yield
        finally:
            convolution.weight.data = weight

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Any:
        """Compute in another floating point type; float64 lifts the islands where fairseq computes in float32."""
        if name == "float32":
            yield
            return
        with _lifted(self.w2v) if name == "float64" else _nothing():
            self.model.to(NAMES[name])
            _forget_positions(self.w2v)
            try:
                with self._as_converted() if name == "float64" else _nothing():
                    yield
            finally:
                _forget_positions(self.w2v)
                self.model.float()  # exact: from float64 always, from a half type because the weights are rounded

    def _watch(self, module: Any, name: str, shape: Any) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            self._see(name, shape(output[0] if isinstance(output, tuple) else output))

        module.register_forward_hook(hook)

    def _see(self, name: str, value: Any) -> None:
        """Keep what a stage computed first."""
        self.seen.setdefault(name, value.clone())

    def _hook(self) -> None:
        watch = self._watch
        for index, layer in enumerate(self.w2v.feature_extractor.conv_layers):
            watch(layer, "conv.%d" % index, _same)
        watch(self.w2v.layer_norm, "feature_norm", _same)
        if self.w2v.post_extract_proj is not None:
            watch(self.w2v.post_extract_proj, "projection", _same)
        watch(self.w2v.encoder.pos_conv, "pos_conv", _swap_last)  # conformers have one and do not use it
        for index, layer in enumerate(self.w2v.encoder.layers):
            watch(layer, "layer.%d" % index, _swap_first)
        watch(self.w2v.encoder, "encoder", _same)
        if getattr(self.w2v, "quantizer", None) is not None:
            watch(self.w2v.quantizer.weight_proj, "quantizer", _same)

    def run(self, waveforms: Any, lengths: Any = None, multiple: Any = None) -> tuple[list[int], dict[str, Any]]:
        """Compute every stage.

        Args:
            waveforms: (batch, samples), padded with zeros; what the model gets, normalised already.
            lengths: the samples of each utterance; `None` for a single one, which then has no padding mask.
            multiple: replaces fairseq's `required_seq_len_multiple`; `None` leaves it.

        Returns:
            The valid frames of each utterance, and the stages by name, in the order of their computation.
        """
        kind = next(self.model.parameters()).dtype
        source = torch.as_tensor(waveforms).to(self.device).to(kind)
        padding = None
        if lengths is not None:
            padding = torch.arange(source.shape[1])[None] >= torch.as_tensor(lengths)[:, None]
            padding = padding.to(self.device)
        if hasattr(self.w2v.encoder, "required_seq_len_multiple"):
            self.w2v.encoder.required_seq_len_multiple = self.multiple if multiple is None else multiple
        self.seen = {}
        with torch.no_grad():
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
        if getattr(self.w2v, "quantizer", None) is not None:
            self._pretraining(output["x"])
        return output["padding_mask"]

    def _pretraining(self, x: Any) -> None:
        """What `Wav2Vec2Model.forward` computes after the encoder, for every frame instead of the masked ones."""
        features = self.seen["feature_norm"]
        quantized = self.model.quantizer(features, produce_targets=True)
        self.seen["quantizer"] = self.seen["quantizer"].reshape(features.shape[0], features.shape[1], -1)
        self.seen["codes"] = quantized["targets"]
        self.seen["project_q"] = self.model.project_q(quantized["x"])
        self.seen["project_hid"] = self.model.final_proj(x)

    def normalise(self, waveform: Any, rate: int) -> Any:
        """Prepare a waveform with `RawAudioDataset.postprocess`, as fairseq's tasks do."""
        from fairseq.data.audio.raw_audio_dataset import RawAudioDataset

        task = self.settings["task"]
        dataset = types.SimpleNamespace(sample_rate=rate, normalize=bool(task.get("normalize", False)))
        return RawAudioDataset.postprocess(dataset, torch.as_tensor(waveform).float(), rate)

    def paths(self, stages: Any, frames: list[int]) -> Any:
        """The best symbol of every frame, for each utterance; nothing without a vocabulary."""
        return stages["logits"].float().argmax(-1).split(frames) if "logits" in stages else ()

    def spell(self, language: str = "") -> str:
        """Transcribe a path that holds every symbol of the dictionary that is not special, in order, twice."""
        self.speak(language)
        special, blank = self.request["special"], self.request["blank"]
        ids = [i for i in range(len(self.request["symbols"])) if i not in special]
        return self.transcribe([part for i in ids * 2 for part in (i, blank)]) if ids else ""

    def words(self) -> Any:
        """fairseq's dictionary: the checkpoint's own, or one of the symbols that were passed."""
        if self.dictionary is None or not hasattr(self.dictionary, "string"):
            self.dictionary = _dictionary_of(self.request["symbols"])
        return self.dictionary

    def hear(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform as fairseq does when it counts errors.

        Args:
            waveform: (samples,), float32, as recorded.
            rate: its samples a second.

        Raises:
            CannotBuildError: the model writes no text.
        """
        raise CannotBuildError("%s writes no text" % type(self.model).__name__)

    def transcribe(self, path: Any) -> str:
        """Turn a greedy path (an id for each frame) into text, as `CtcCriterion` does; special symbols count as blank."""
        from fairseq.data import data_utils

        blank = self.request["blank"]
        ids: Any = torch.as_tensor([blank if i in self.request["special"] else i for i in path])
        kept = ids.unique_consecutive()
        return str(data_utils.post_process(self.words().string(kept[kept != blank]), self.request["post_process"]))


def aligned(value: Any) -> Any:
    """Give a tensor an address as torch gives its own: those of a mapped file start anywhere.

    For a single frame, the matrix kernels of x86 processors add in an order that depends on it.
    """
    return value.clone() if value.data_ptr() % 64 else value


class CtcReference(Reference):
    """fairseq's model with a CTC head."""

    prefix = "w2v_encoder.w2v_model."

    def encoder(self) -> Any:
        """The encoder that was pretrained, inside the model."""
        return self.model.w2v_encoder.w2v_model

    spoken = ""

    def speak(self, language: str) -> None:
        """Take another of the stacked adapters; or, in files of MMS, the tensors of the language instead of the model's own.

        The latter is what `examples/speech_recognition/new/infer.py` does.
        """
        language = language or self.request.get("language", "")
        if language == self.spoken:
            return
        self.spoken = language
        if language not in self.adapters:
            self.row = self.request["languages"].get(language, 0)
            return
        weights = self.adapters[language]["model"]
        self.dictionary = self.adapters[language]["task_state"]["target_dictionary"]
        self.request = dict(self.request, symbols=list(self.dictionary.symbols))
        parameter = next(self.model.parameters())
        rows, width = weights["w2v_encoder.proj.weight"].shape
        head = torch.nn.Linear(width, rows).to(parameter.device, parameter.dtype)
        self.model.w2v_encoder.proj = head.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            if name in weights:
                value = weights[name]
                parameter.copy_(value.to(NAMES[self.rounded]) if self.rounded else value)
        self._filled(weights)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model; the logits with the blank's weight."""
        output = self.model(source=source, padding_mask=padding, **self.adapter(source))
        logits = self.model.get_logits(output) if hasattr(self.model, "get_logits") else output["encoder_out"]
        self.seen["logits"] = logits.transpose(0, 1)
        return output["padding_mask"]

    def hear(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform as `CtcCriterion` does when it counts errors: the best symbol of every frame."""
        from fairseq.data import data_utils

        source = self.normalise(waveform, rate)[None].to(self.device)
        with torch.no_grad():
            output = self.model(source=source, padding_mask=None, **self.adapter(source))
            rows = self.model.get_normalized_probs(output, log_probs=True)[:, 0].float().cpu()
        self.seen = {}
        tokens = rows.argmax(-1).unique_consecutive()
        units = self.words().string(tokens[tokens != self.request["blank"]])
        return str(data_utils.post_process(units, self.request["post_process"]))

    def _filled(self, weights: Any) -> None:
        if getattr(self.model, "blank_weight", None) and self.model.blank_mode == "add":
            self.exact_blank = self._rounded_blank(weights["w2v_encoder.proj.bias"].dtype)

    def round_weights(self, name: str) -> None:
        """Round every weight to float16 or bfloat16, and keep it as float32, as a converted model of that type has it."""
        if self.exact_blank is not None:
            self.model.blank_weight = self.exact_blank = self._rounded_blank(NAMES[name])
        super().round_weights(name)

    def _rounded_blank(self, kind: Any) -> float:
        """What is left of `blank_weight` when its sum with the head's bias is rounded, as a conversion does."""
        bias = self.model.w2v_encoder.proj.bias.data[0].cpu().float()
        meant = (bias + torch.tensor(self.model.blank_weight, dtype=torch.float32)).to(kind)
        return float(meant.double() - bias.to(kind).double())

    @contextlib.contextmanager
    def _as_converted(self) -> Any:
        """In float64, `blank_weight` is what is left of it once it became part of the head's bias."""
        blank = self.model.__dict__.get("blank_weight")
        if self.exact_blank is not None:
            self.model.blank_weight = self.exact_blank
        try:
            with super()._as_converted():
                yield
        finally:
            if self.exact_blank is not None:
                self.model.blank_weight = blank


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


class HubertReference(HeadlessReference):
    """HuBERT as it was pretrained."""

    head = ("final_proj.", "label_embs_concat", "target_glu.")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True  # in every version it splits the mask evenly, and is asked where that agrees


class WavlmReference(Reference):
    """unilm's WavLM, an encoder alone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True  # it splits the mask evenly, and is asked where that agrees

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model."""
        _, mask = self.model.extract_features(source, padding_mask=padding)
        return mask


class HubertCtcReference(HubertReference, CtcReference):
    """HuBERT with a CTC head."""


class Data2VecReference(HeadlessReference):
    """data2vec audio as it was pretrained; its teacher is a dict of tensors."""

    head = ("final_proj.", "_ema")


class ClassificationReference(CtcReference):
    """fairseq's audio classifier: the class scores of each utterance are its logits."""

    def _hook(self) -> None:
        super()._hook()
        pooling = self.model.pooling_layer

        def keep(_: Any, inputs: Any, output: Any) -> None:
            self.seen["pooled"], self.seen["logits"] = inputs[0].clone(), output.clone()

        def frames(_: Any, __: Any, output: Any) -> None:
            self.seen["projector"] = output.transpose(0, 1).clone()

        def mask(_: Any, __: Any, output: Any) -> None:
            self.padding = output["padding_mask"]

        pooling.linear.register_forward_hook(frames)
        pooling.projection.register_forward_hook(keep)
        self.model.w2v_encoder.register_forward_hook(mask)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model."""
        self.model(source=source, padding_mask=padding, **self.adapter(source))
        return self.padding

    def paths(self, stages: Any, frames: list[int]) -> Any:
        """The best label of each utterance."""
        return stages["logits"].float().argmax(-1).split(1)

    def spell(self, language: str = "") -> str:
        """Name every label, in order."""
        return self.transcribe(range(len(self.request["symbols"])))

    def transcribe(self, path: Any) -> str:
        """Name labels, as fairseq's own dictionary does."""
        symbols = self.request["symbols"] if self.dictionary is None else self.dictionary.symbols
        return " ".join(symbols[index] for index in path)


class Seq2SeqReference(Reference):
    """fairseq's model with a decoder: run on tokens that both sides are given, then left to generate by itself."""

    prefix = "encoder.w2v_model."

    def __init__(self, *given: Any) -> None:
        self.table: Any = None  # what a conversion makes of sinusoidal positions
        super().__init__(*given)
        self.symbols = _dictionary_of(self.request["symbols"])

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
    def _as_converted(self) -> Any:
        """In float64, sinusoidal positions are those of the converted model."""
        positions = self.model.decoder.embed_positions
        kept = getattr(positions, "weights", None)
        if self.table is not None:
            positions.weights = self.table.to(kept)
        try:
            with super()._as_converted():
                yield
        finally:
            if self.table is not None:
                positions.weights = kept

    def _hook(self) -> None:
        super()._hook()
        encoder, decoder = self.model.encoder, self.model.decoder
        if encoder.proj is not None:
            self._watch(encoder.proj, "enc_to_dec_proj", _swap_first)
        decoder.layers[0].register_forward_pre_hook(
            lambda _, given: self._see("decoder.embedded", _swap_first(given[0]))
        )
        for index, layer in enumerate(decoder.layers):
            self._watch(layer, "decoder.layer.%d" % index, _swap_first)
        if decoder.layer_norm is not None:
            self._watch(decoder.layer_norm, "decoder.norm", _swap_first)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the encoder, the decoder on `forced_tokens`, and fairseq's generator with a beam of one."""
        decoder = self.model.decoder
        decoder._future_mask = None  # fairseq keeps it in the type that it was made in
        encoded = self.model.encoder(source=source, padding_mask=padding)
        tokens = forced_tokens(len(self.request["symbols"]), decoder.max_target_positions).to(self.device)
        self.seen["decoder.logits"] = decoder(tokens.expand(len(source), -1), encoder_out=encoded)[0]
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

    def hear(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform with fairseq's generator and a beam of one."""
        source = self.normalise(waveform, rate)[None].to(self.device)
        with torch.no_grad():
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


class HubertSeq2SeqReference(HubertReference, Seq2SeqReference):
    """HuBERT with a decoder."""


def _dictionary_of(symbols: Any) -> Any:
    """fairseq's dictionary of these symbols, special ones included."""
    from fairseq.data import Dictionary

    made = Dictionary()
    for symbol in symbols[len(made) :]:
        made.add_symbol(str(symbol))
    return made


def forced_tokens(symbols: int, positions: int) -> Any:
    """The tokens that decoders of both sides are given: the end of a sentence, as fairseq begins, then one after the other."""
    ordinary = [4 + (7 * index) % max(1, symbols - 4) for index in range(15)]
    return torch.tensor([[2, *ordinary][:positions]]).clamp(max=symbols - 1)


def generated_length(positions: int) -> int:
    """The most tokens that fairseq generates by default, the end of the sentence among them."""
    return min(200, positions - 1) + 1


def sinusoids(rows: int, width: int) -> Any:
    """The table of sinusoidal positions that a conversion writes: see `convert.transfer.sinusoids`."""
    half = width // 2
    step = numpy.float32(-(numpy.log(10000) / (half - 1)))
    frequencies = numpy.exp((numpy.arange(half, dtype=numpy.float32) * step).astype(numpy.float64)).astype(
        numpy.float32
    )
    angles = (numpy.arange(rows, dtype=numpy.float32)[:, None] * frequencies).astype(numpy.float64)
    table = numpy.zeros((rows, width), numpy.float32)
    table[:, :half], table[:, half : 2 * half] = numpy.sin(angles), numpy.cos(angles)
    table[1] = 0
    return torch.from_numpy(table)


class SpeechToTextReference(Reference):
    """fairseq's speech-to-text transformer. It takes features, which both sides make alike, and `forced_tokens`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True
        self.heard: Any = None  # the features of the last run, and how many each utterance has

    def _hook(self) -> None:
        encoder, decoder = self.model.encoder, self.model.decoder
        for index, layer in enumerate(encoder.subsample.conv_layers):
            self._watch(layer, "conv.%d" % index, _same)
        for index, layer in enumerate(encoder.transformer_layers):
            self._watch(layer, "layer.%d" % index, _swap_first)
        self._watch(encoder.layer_norm, "encoder", _swap_first)
        for index, layer in enumerate(decoder.layers):
            self._watch(layer, "decoder.layer.%d" % index, _swap_first)
        self._watch(decoder.layer_norm, "decoder.norm", _swap_first)
        self._watch(decoder.output_projection, "decoder.logits", _same)

    def run(self, waveforms: Any, lengths: Any = None, multiple: Any = None) -> tuple[list[int], dict[str, Any]]:
        """Compute every stage, as for every model."""
        source, counts = features(waveforms, lengths, self.settings["model"]["input_feat_per_channel"])
        decoder = self.model.decoder
        tokens = forced_tokens(decoder.embed_tokens.num_embeddings, decoder.max_target_positions)
        self.heard, self.seen = (source, counts), {}
        with torch.no_grad():
            kind = next(self.model.parameters()).dtype
            self.model(
                source.to(self.device, kind), counts.to(self.device), tokens.expand(len(source), -1).to(self.device)
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
        from fairseq.sequence_generator import SequenceGenerator

        generator = SequenceGenerator([self.model], self.words(), beam_size=1, max_len_a=0, max_len_b=200, min_len=1)
        language = language_of(self.request["symbols"])
        prefix = None if language is None else torch.tensor([[language]], device=self.device)
        found = []
        for source, count in zip(*self.heard):  # noqa: B905
            net_input = {"src_tokens": source[None, :count].to(self.device), "src_lengths": count[None].to(self.device)}
            found.append(
                generator.generate([self.model], {"net_input": net_input}, prefix_tokens=prefix)[0][0]["tokens"]
            )
        self.seen = {}
        return found

    def spell(self, language: str = "") -> str:
        """Write out every symbol of the dictionary that is not special, in order, twice."""
        ids = [i for i in range(len(self.request["symbols"])) if i not in self.request["special"]]
        return self.transcribe(ids * 2)

    @contextlib.contextmanager
    def arithmetic(self, name: str) -> Any:
        """As for every model; the tables of positions are no weights: what a half type did to them must not stay."""
        with self._positions(), super().arithmetic(name):
            yield

    def round_weights(self, name: str) -> None:
        """As for every model."""
        with self._positions():
            super().round_weights(name)

    @contextlib.contextmanager
    def _positions(self) -> Any:
        tables = [self.model.encoder.embed_positions, self.model.decoder.embed_positions]
        kept = [table.weights.clone() for table in tables]
        try:
            yield
        finally:
            for table, weights in zip(tables, kept):  # noqa: B905
                table.weights = weights

    def transcribe(self, path: Any) -> str:
        """Turn tokens into text, as fairseq's sentencepiece does; special symbols and languages' tags are left out."""
        from fairseq.data import data_utils

        kept: Any = torch.as_tensor([index for index in path if index not in self.request["special"]])
        return str(data_utils.post_process(self.words().string(kept), "sentencepiece"))

    def hear(self, waveform: Any, rate: int) -> str:
        """Say why this cannot be asked."""
        raise CannotBuildError("fairseq makes features with pykaldi or torchaudio, which this does not run")


def language_of(symbols: Any) -> Any:
    """The symbol that every text starts with where there are languages' tags: the first of them."""
    return next((index for index, symbol in enumerate(symbols) if symbol.startswith("<lang:")), None)


def features(waveforms: Any, lengths: Any, bins: int) -> tuple[Any, Any]:
    """Make the features of waveforms, (batch, samples) -> (batch, frames, bins) padded with zeros, and count the frames.

    They are an input and nothing else: the same numbers for both sides, whatever either would have extracted itself. They
    are made as Kaldi does (windows of 25 ms every 10 ms), each utterance with mean 0 and variance 1, in float64.
    """
    waveforms = torch.as_tensor(waveforms)
    lengths = [waveforms.shape[1]] * len(waveforms) if lengths is None else list(lengths)
    cut = [wave[:count].cpu().double().numpy() for wave, count in zip(waveforms, lengths)]  # noqa: B905
    made = [_log_mel(wave, bins) for wave in cut]
    counts = torch.tensor([len(value) for value in made])
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(value) for value in made], batch_first=True), counts


def _log_mel(waveform: Any, bins: int) -> Any:
    starts = numpy.arange(0, len(waveform) - 399, 160)
    windows = waveform[starts[:, None] + numpy.arange(400)] * 32768
    windows = windows - windows.mean(1, keepdims=True)
    windows = windows - 0.97 * numpy.concatenate([windows[:, :1], windows[:, :-1]], 1)
    power = numpy.abs(numpy.fft.rfft(windows * numpy.hanning(400) ** 0.85, 512)) ** 2
    mels = 1127 * numpy.log(1 + numpy.arange(257) * 31.25 / 700)
    edges = numpy.linspace(1127 * numpy.log(1 + 20 / 700), mels[-1], bins + 2)[:, None]
    rise, fall = (mels - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - mels) / (edges[2:] - edges[1:-1])
    made = numpy.log(numpy.maximum(power @ numpy.clip(numpy.minimum(rise, fall), 0, None).T, 1e-7))
    made = (made - made.mean(0)) / numpy.maximum(made.std(0), 1e-5)
    return made.astype(numpy.float32)


# fairseq's name of an encoder -> its module, its configuration's class, its model's class
ENCODERS = {
    "hubert": ("fairseq.models.hubert.hubert", "HubertConfig", "HubertModel"),
    "data2vec_audio": ("fairseq.examples.data2vec.models.data2vec_audio", "Data2VecAudioConfig", "Data2VecAudioModel"),
    "wav2vec2": ("fairseq.models.wav2vec.wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model"),
}

# fairseq's name of an architecture -> what builds its model, and what runs it
ARCHITECTURES = {
    "hubert": (build_hubert, HubertReference),
    "hubert_ctc": (build_hubert_ctc, HubertCtcReference),
    "data2vec_audio": (build_pretrained, Data2VecReference),
    "wavlm": (build_wavlm, WavlmReference),
    "wav2vec2": (build_pretrained, Reference),
    "wav2vec_classification": (build_classifier, ClassificationReference),
    "wav2vec_ctc": (build_ctc, CtcReference),
    "wav2vec_seq2seq": (build_seq2seq, Seq2SeqReference),
    "hubert_seq2seq": (build_hubert_seq2seq, HubertSeq2SeqReference),
}
SPEECH_TO_TEXT = ["s2t_transformer%s" % size for size in ("", "_xs", "_s", "_sp", "_m", "_mp", "_l", "_lp")]
ARCHITECTURES.update((name, (build_speech_to_text, SpeechToTextReference)) for name in SPEECH_TO_TEXT)


def crop(name: str, value: Any, frames: list[int]) -> Any:
    """Keep the valid frames of (batch, time, channels), one utterance after the other; what has no frames as it is."""
    if name.startswith("conv.") or value.dim() == 2:  # (batch, channels): pooled over the frames
        return value
    if name.startswith("decoder."):  # every row is a token's, and none is padding
        return value.reshape(-1, value.shape[-1])
    if name.startswith("generated"):
        return value
    return torch.cat([value[index, :count] for index, count in enumerate(frames)])


def _same(value: Any) -> Any:
    return value


def _swap_last(value: Any) -> Any:
    return value.transpose(1, 2)


def _swap_first(value: Any) -> Any:
    return value.transpose(0, 1)


@contextlib.contextmanager
def _nothing() -> Any:
    yield


def _forget_positions(w2v: Any) -> None:
    """Let conformers make their tables of positions anew: they keep them, whatever becomes of the model's type and weights."""
    for module in w2v.modules():
        if hasattr(module, "seq_len_cached"):
            module.seq_len_cached = 0
        elif type(module).__name__ == "RelPositionalEncoding":
            module.pe = None


@contextlib.contextmanager
def _lifted(w2v: Any) -> Any:
    """Let `Fp32GroupNorm`, `Fp32LayerNorm` and fairseq's `gelu`, which compute in float32, compute in their input's type."""
    lifted = []
    for module in w2v.modules():
        if type(module).__name__ in ("Fp32GroupNorm", "Fp32LayerNorm"):
            module.forward = types.MethodType(getattr(type(module).__mro__[1], "forward"), module)  # noqa: B009
            lifted.append((module, "forward", None))
        elif getattr(getattr(module, "activation_fn", None), "__name__", "") == "gelu":
            lifted.append((module, "activation_fn", module.activation_fn))
            module.activation_fn = torch.nn.functional.gelu
    from fairseq import utils

    softmax = utils.softmax
    utils.softmax = lambda x, dim, onnx_trace=False: torch.nn.functional.softmax(x, dim=dim)
    try:
        yield
    finally:
        utils.softmax = softmax
        for module, name, value in lifted:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


# --- recording ------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """SHA-256 of a tensor's numbers; -0.0 counts as 0.0."""
    value = value + 0 if value.is_floating_point() else value
    value = value.float() if value.dtype == torch.bfloat16 else value
    return hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest()


def step_of(name: str, count: int) -> int:
    """Every how many numbers one is kept: odd, so that it meets every channel."""
    return 1 if name in WHOLE else max(1, count // (SAMPLE * 8 if name == "encoder" else SAMPLE)) | 1


def distance(a: Any, b: Any) -> float:
    """The greatest absolute difference; infinite where a number is not finite."""
    if a.numel() == 0:
        return 0.0
    worst = (a.double() - b.double()).abs().max().item()
    return float(worst) if worst == worst else float("inf")


def environment() -> dict[str, Any]:
    """What bits depend on."""
    capability = "unknown"
    with contextlib.suppress(AttributeError):
        capability = torch.backends.cpu.get_cpu_capability()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": "%s %s" % (platform.machine(), capability),
    }


def record(request: Any, arrays: Any, reference: Any = None) -> None:
    """Run everything that is asked for and write the answers.

    Args:
        request: what `open_reference` takes, and `threads`, `rate`, `special` and `blank` (ids), `out` (the file to write),
            `description` (kept as it is), and `runs`: a list of `{"arrays": [names], "multiple": number or None,
            "padded": whether the arrays are a padded batch with a mask, "weights": "" or the type they are rounded to,
            "arithmetic": a type, "language": what the model is to speak, empty for its own, "raw": whether fairseq is to
            normalise them}`, whatever else they hold is kept.
        arrays: the waveforms by name, float32, one dimension each.
        reference: an opened reference; by default one is opened.
    """
    torch.set_num_threads(request["threads"])
    reference = reference or open_reference(request)
    tensors: dict[str, Any] = {"waveform." + name: value for name, value in arrays.items()}
    runs: list[Any] = []
    rounded = ""
    for number, wanted in sorted(enumerate(request["runs"]), key=lambda pair: pair[1]["weights"]):
        if wanted["weights"] != rounded:
            rounded = wanted["weights"]
            reference.round_weights(rounded)
        runs.append(dict(wanted, number=number, **_answer(reference, wanted, arrays, tensors, "run.%d." % number)))
    about = dict(reference.info, environment=environment(), multiple=reference.multiple, schema=1)
    about["padded_batches"] = reference.masks_like_main
    about["spelling"] = reference.spell()
    about["spellings"] = {}
    for language in sorted({wanted["language"] for wanted in request["runs"] if wanted["language"]}):
        about["spellings"][language] = reference.spell(language)
    about = dict(about, description=request["description"], runs=sorted(runs, key=lambda run: run["number"]))
    write(request["out"], tensors, json.dumps(about, sort_keys=True))


def _answer(reference: Any, wanted: Any, arrays: Any, tensors: Any, prefix: str) -> dict[str, Any]:
    signals = [torch.as_tensor(arrays[name]) for name in wanted["arrays"]]
    if wanted["raw"]:
        signals = [reference.normalise(signal, reference.request["rate"]) for signal in signals]
    batch = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
    reference.speak(wanted["language"])
    lengths = [len(signal) for signal in signals] if wanted["padded"] else None
    with reference.arithmetic(wanted["arithmetic"]):
        frames, stages = reference.run(batch, lengths, wanted["multiple"])
    with reference.arithmetic("float64"):
        _, exact = reference.run(batch, lengths, wanted["multiple"])
    kept = []
    for name, value in stages.items():
        outcomes = ("encoder", "logits", "project_hid", "decoder.logits", "generated")
        if wanted["raw"] and name not in outcomes:  # of a raw waveform, the outcome is kept
            continue
        step = step_of(name, value.numel())
        same = (stages["codes"] == exact["codes"]).all(-1) if name == "project_q" else slice(None)
        chosen = name == "codes" or name.startswith("generated")
        floor = None if chosen else distance(value[same], exact[name][same])
        kept.append({"name": name, "shape": list(value.shape), "sha256": digest(value), "step": step, "floor": floor})
        tensors[prefix + name] = value.reshape(-1)[::step].float().cpu().numpy()
        tensors[prefix + name + ".float64"] = exact[name].reshape(-1)[::step].double().cpu().numpy()
    answer: dict[str, Any] = {"frames": frames, "stages": kept}
    texts = [reference.transcribe(path.tolist()) for path in reference.paths(stages, frames)]
    return dict(answer, texts=texts) if texts else answer


def write(path: str, arrays: Any, about: str) -> None:
    """Write a safetensors file: eight bytes of length, a JSON header, the numbers."""
    kinds = {"float32": "F32", "float64": "F64", "int16": "I16"}
    header: dict[str, Any] = {"__metadata__": {"recording": about}}
    at = 0
    for name in sorted(arrays):
        end = at + arrays[name].nbytes
        header[name] = {
            "dtype": kinds[str(arrays[name].dtype)],
            "shape": list(arrays[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:  # noqa: PTH123 - also for old Pythons
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(arrays):
            file.write(numpy.ascontiguousarray(arrays[name]).tobytes())


def read(path: str) -> tuple[Any, str]:
    """Read a file that `write` wrote: the arrays by name, and the text."""
    kinds = {"F32": numpy.float32, "F64": numpy.float64, "I16": numpy.int16}
    with open(path, "rb") as file:  # noqa: PTH123
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    about = header.pop("__metadata__")["recording"]
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays[name] = numpy.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
    return arrays, about


def main(path: str) -> int:
    """Answer the request in a file, and say on stderr why not."""
    with open(path, "rb") as file:  # noqa: PTH123
        request = json.loads(file.read().decode())
    arrays, _ = read(request["waveforms"])
    try:
        record(request, arrays)
    except CannotBuildError as error:
        sys.stderr.write("%s\n" % error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
