"""Tiny real fairseq speech-to-text models (`s2t_transformer*`) with random weights, saved as fairseq's trainer saves them.

A checkpoint of this task is not alone: `config.yaml`, the dictionary and the sentencepiece model lie beside it.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import yaml
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

for _noisy in ("fairseq", "hydra", "root"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "a tiny model of speech",
    "hello world",
)
SIZES = {
    "encoder-layers": 2,
    "encoder-embed-dim": 32,
    "encoder-ffn-embed-dim": 48,
    "encoder-attention-heads": 2,
    "decoder-layers": 3,
    "decoder-ffn-embed-dim": 40,
    "decoder-attention-heads": 2,
    "conv-channels": 24,
    "max-target-positions": 24,
    "dropout": 0.13,
    "attention-dropout": 0.07,
    "activation-dropout": 0.03,
}
CMVN = {"*": ["utterance_cmvn"], "_train": ["utterance_cmvn", "specaugment"]}


@dataclass(frozen=True)
class Variant:
    """One model.

    Args:
        options: options of `fairseq-train`, beside `SIZES`.
        settings: settings that no option of `fairseq-train` sets, as an architecture of the user's own does.
        data: what `config.yaml` says beside the usual.
        languages: target languages, each with a symbol `<lang:xx>`.
        relics: whether the file also has the buffers that fairseq saved until 2023.
    """

    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    arch: str = "s2t_transformer_s"
    relics: bool = False


VARIANTS: dict[str, Variant] = {
    "untied": Variant(),
    "tied": Variant({"share-decoder-input-output-embed": True}, relics=True),
    "gelu": Variant({"activation-fn": "gelu"}),
    "gelu_accurate": Variant({"activation-fn": "gelu_accurate"}),
    "tanh": Variant({"activation-fn": "tanh"}),
    "no_scale_embedding": Variant({"no-scale-embedding": True}),
    "three_convolutions": Variant({"conv-kernel-sizes": "3,5,7"}),
    "one_convolution": Variant({"conv-kernel-sizes": "3"}),
    "other_heads": Variant({"encoder-attention-heads": 4, "decoder-attention-heads": 8}, arch="s2t_transformer_m"),
    "ctc": Variant(settings={"ctc_weight": 0.3}),
    "no_cmvn": Variant(data={"transforms": {"_train": ["specaugment"]}}),
    "means_only": Variant(data={"utterance_cmvn": {"norm_means": True, "norm_vars": False}}),
    "forty_bins": Variant(data={"input_feat_per_channel": 40}),
    "translation": Variant({"ignore-prefix-size": 1}, data={"prepend_tgt_lang_tag": True}, languages=("de",)),
    "to_many": Variant(
        {"share-decoder-input-output-embed": True, "ignore-prefix-size": 1},
        data={"prepend_tgt_lang_tag": True, "hub": {"input_type": "fbank80_w_utt_cmvn", "tgt_lang": "fr"}},
        languages=("de", "fr", "nl"),
    ),
}
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Variant] = {
    "encoder_normalize_before": Variant(settings={"encoder_normalize_before": False}),
    "decoder_normalize_before": Variant(settings={"decoder_normalize_before": False}),
    "conv_version": Variant({"conv-version": "convtransformer"}),
    "decoder_embed_dim": Variant({"decoder-embed-dim": 16}),
    "decoder_output_dim": Variant(settings={"decoder_output_dim": 16}),
    "decoder_learned_pos": Variant(settings={"decoder_learned_pos": True}),
    "no_token_positional_embeddings": Variant(settings={"no_token_positional_embeddings": True}),
    "layernorm_embedding": Variant({"layernorm-embedding": True}),
    "no_decoder_final_norm": Variant(settings={"no_decoder_final_norm": True}),
    "quant_noise_pq": Variant(settings={"quant_noise_pq": 0.1}),
    "input_channels": Variant(data={"input_channels": 2}),
    "conv_kernel_sizes": Variant({"conv-kernel-sizes": "4,4"}),
}


@functools.cache
def subwords(languages: tuple[str, ...] = ()) -> bytes:
    """Train a sentencepiece model the way fairseq's `gen_vocab` does: the special symbols have fairseq's ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_writer=model,
        vocab_size=36 + len(languages),
        user_defined_symbols=[f"<lang:{language}>" for language in languages],
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def write_data(variant: Variant, folder: Path) -> Path:
    """Write `config.yaml`, `dict.txt` and `spm.model` as fairseq's preparation scripts do; return the folder."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=subwords(variant.languages))
    names = [pieces.IdToPiece(index) for index in range(4, pieces.GetPieceSize())]
    (folder / "spm.model").write_bytes(subwords(variant.languages))
    (folder / "dict.txt").write_text("".join(f"{name} 1\n" for name in names), "utf-8")
    data = {"vocab_filename": "dict.txt", "input_channels": 1, "input_feat_per_channel": 80, "transforms": CMVN}
    data["bpe_tokenizer"] = {"bpe": "sentencepiece", "sentencepiece_model": str(folder / "spm.model")}
    data["specaugment"] = {"freq_mask_F": 27, "freq_mask_N": 1, "time_mask_N": 1, "time_mask_T": 100}
    (folder / "config.yaml").write_text(yaml.safe_dump(data | variant.data), "utf-8")
    return folder


def settings(variant: Variant, folder: Path) -> Any:
    """The settings that `fairseq-train` makes of its command line: a DictConfig whose model and task are Namespaces."""
    chosen = {**SIZES, "optimizer": "adam", "lr": "1e-3", "max-tokens": 40000, **variant.options}
    line = [str(folder), "--task", "speech_to_text", "--arch", variant.arch]
    line += ["--criterion", "label_smoothed_cross_entropy"]
    for name, value in chosen.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = options.parse_args_and_arch(options.get_training_parser(), line)
        vars(arguments).update(variant.settings)
        return convert_namespace_to_omegaconf(arguments)


def build(variant: Variant | str, folder: Path, seed: int = 0) -> tuple[torch.nn.Module, Any, Any]:
    """Build the model in eval mode with every parameter random; return it, its task and the settings."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    configuration = settings(variant, write_data(variant, folder))
    task = tasks.setup_task(configuration.task)
    torch.manual_seed(seed)
    model = task.build_model(configuration.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), task, configuration


def save(
    variant: Variant | str, folder: Path, *, layout: str = "cfg", container: str = "zip", seed: int = 0
) -> tuple[Path, torch.nn.Module, Any]:
    """Write `model.pt` and what belongs to it into a folder; return its path, the model and the task.

    `layout`: `cfg` (a dict with Namespaces in it, today) or `namespace` (2020: one flat `args`).
    """
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    model, task, configuration = build(variant, folder, seed)
    weights = OrderedDict((key, value.detach().clone()) for key, value in model.state_dict().items())
    if variant.relics:
        weights["encoder.embed_positions._float_tensor"] = torch.zeros(1)
        weights["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    state: dict[str, Any] = {"args": None, "cfg": None, "model": weights, "criterion": None}
    state["optimizer_history"] = [
        {"criterion_name": "LabelSmoothedCrossEntropyCriterion", "optimizer_name": "FairseqAdam"}
        | {"lr_scheduler_state": {}, "num_updates": 7}
    ]
    state["task_state"] = task.state_dict()
    state["extra_state"] = {"metrics": [], "previous_training_time": 1.5, "train_iterator": {"epoch": 1}}
    state["last_optimizer_state"] = None
    if layout == "cfg":
        state["cfg"] = OmegaConf.to_container(configuration, resolve=True, enum_to_str=True)
    else:
        state["args"] = Namespace(**{key: value for key, value in vars(configuration.model).items() if key != "_name"})
        del state["cfg"], state["task_state"]
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=container == "zip")
    return folder / "model.pt", model, task
