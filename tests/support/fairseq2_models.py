"""Tiny real fairseq2 models with random weights, saved by fairseq2's own checkpoint manager, and their tokenizers.

Run as a program, one rank of a real FSDP run: `python fairseq2_models.py VARIANT FOLDER VERSION RANK SIZE`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path[:0] = [str(Path(__file__).parents[2])] if __name__ == "__main__" else []
from convert.checkpoint.fairseq2_architectures import ARCHITECTURES  # noqa: E402
from convert.verification.fairseq_side.fairseq2 import import_fairseq2, one_process, uncompiled  # noqa: E402
from convert.verification.fairseq_side.importing import CannotBuildError  # noqa: E402

try:
    fairseq2, _ = import_fairseq2()
except CannotBuildError as error:
    pytest.skip(str(error), allow_module_level=True)

from fairseq2 import checkpoint, file_system, io  # noqa: E402
from fairseq2.gang import FakeGang, Gangs, ProcessGroupGang, create_parallel_gangs  # noqa: E402
from fairseq2.models import wav2vec2  # noqa: E402
from fairseq2.models.transformer import TransformerNormOrder  # noqa: E402
from fairseq2.models.wav2vec2 import asr  # noqa: E402
from fairseq2.utils.structured import StandardValueConverter  # noqa: E402
from fairseq2.utils.yaml import RuamelYamlDumper  # noqa: E402

CPU = torch.device("cpu")
# a literal space is id 4, as in Omnilingual ASR's vocabularies; letters of many scripts, combining marks and the `|`
LETTERS = [" ", *"aɛbcde|-'", "ñ", "\u0301", "\u200d", "\u00ad", *"абв", *"अआि", *"中文", "ء"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
ENCODER: dict[str, Any] = {
    "model_dim": 64,
    "feature_dim": 32,
    "num_encoder_layers": 2,
    "num_encoder_attn_heads": 2,
    "ffn_inner_dim": 96,
    "feature_extractor_layer_descs": [(32, 10, 5), (32, 3, 2), (32, 3, 2), (32, 2, 2)],
    "pos_conv_kernel_size": 16,
    "num_pos_conv_groups": 4,
    "dropout_p": 0.07,
    "attn_dropout_p": 0.08,
    "ffn_inner_dropout_p": 0.09,
    "first_pass_dropout_p": 0.03,
    "layer_drop_p": 0.05,
}
PRE = ENCODER | {
    "norm_order": TransformerNormOrder.PRE,
    "layer_norm_features": False,
    "feature_extractor_bias": True,
    "feature_extractor_layer_norm_convs": True,
    "num_encoder_layers": 3,
}
CTC: dict[str, Any] = {"target_vocab_size": len(SPECIAL) + len(LETTERS), "final_dropout_p": 0.02}
OMNILINGUAL = CTC | {"use_masking": False, "max_temporal_mask_prob": 0.0, "max_spatial_mask_prob": 0.0}
PRETRAINING = {"final_dim": 24, "quantized_dim": 16, "num_codebooks": 2, "num_codebook_entries": 10}
# name -> family, encoder, the rest
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ctc_omnilingual": ("wav2vec2_asr", PRE, OMNILINGUAL),
    "ctc_base": ("wav2vec2_asr", ENCODER, CTC),
    "ctc_large": ("wav2vec2_asr", PRE, CTC),
    "ctc_post_layer_norm": ("wav2vec2_asr", ENCODER | {"feature_extractor_layer_norm_convs": True}, CTC),
    "ctc_odd_positions": ("wav2vec2_asr", PRE | {"pos_conv_kernel_size": 15}, CTC),
    "ctc_no_projection": ("wav2vec2_asr", ENCODER | {"model_dim": 32}, CTC),
    "pretraining_base": ("wav2vec2", ENCODER, PRETRAINING),
    "pretraining_large": ("wav2vec2", PRE, PRETRAINING | {"final_proj_bias": False}),
}
# what transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "layer_norm_features": ("wav2vec2_asr", PRE | {"layer_norm_features": True}, CTC),
    "norm_order": ("wav2vec2_asr", ENCODER | {"layer_norm_features": False}, CTC),
    "pos_encoder_depth": ("wav2vec2_asr", ENCODER | {"pos_encoder_depth": 2}, CTC),
    "pos_encoder_type": ("wav2vec2_asr", ENCODER | {"pos_encoder_type": "rotary"}, CTC),
    "use_conformer": ("wav2vec2_asr", ENCODER | {"use_conformer": True, "depthwise_conv_kernel_size": 3}, CTC),
    "use_fbank": ("wav2vec2_asr", ENCODER | {"use_fbank": True, "num_fbank_channels": 16, "fbank_stride": 2}, CTC),
}


def config(name: str) -> tuple[str, Any]:
    """Return a variant's family and fairseq2's configuration of it."""
    family, encoder, rest = (VARIANTS | REFUSED)[name]
    cls = {"wav2vec2": wav2vec2.Wav2Vec2Config, "wav2vec2_asr": asr.Wav2Vec2AsrConfig}[family]
    return family, cls(encoder_config=wav2vec2.Wav2Vec2EncoderConfig(**encoder), **rest)


def flat(made: Any) -> dict[str, Any]:
    """A configuration, or a variant's, as model.yaml has it, the encoder's fields beside the others."""
    fields = dataclasses.asdict(config(made)[1] if isinstance(made, str) else made)
    fields |= fields.pop("encoder_config")
    fields["norm_order"] = fields["norm_order"].name
    listed = {key: value for key, value in fields.items() if isinstance(value, (list, tuple))}
    plain = {key: [list(one) if isinstance(one, tuple) else one for one in value] for key, value in listed.items()}
    return fields | plain


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """Build a variant in eval mode, every parameter random."""
    family, made = config(name)
    torch.manual_seed(seed)
    factory = {"wav2vec2": wav2vec2.create_wav2vec2_model, "wav2vec2_asr": asr.create_wav2vec2_asr_model}[family]
    with one_process():
        model: torch.nn.Module = factory(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for buffer in model.buffers():
            buffer.add_(1234)
    return model.eval()


def save_run(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    scores: Sequence[float | None] = (None,),
    normalize: bool | None = True,
    tokenizer: bool = True,
) -> Path:
    """Write a run's folder as a recipe does: steps 100, 200, ..., each with another model, and their scores."""
    family, made = config(name)
    for index, score in enumerate(scores):
        weights = build(name, seed + index).state_dict()
        _save(folder, 100 * (index + 1), [shard(weights, rank, shards) for rank in range(shards)])
        if score is not None:
            _manager(folder, fake_gangs(0, 1)).save_score(100 * (index + 1), score)
    _metadata(folder, family, made)
    if normalize is not None:
        recipe = {"dataset": {"asr_task_config": {"normalize_audio": normalize}}, "tokenizer": {"name": "mine"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    if tokenizer and family == "wav2vec2_asr":
        save_tokenizer(folder / "tokenizer.model")
    return folder


def resize(folder: Path, symbols: int) -> None:
    """Give a run's head another number of rows."""
    (file,) = folder.rglob("sdp_00.pt")
    weights = torch.load(file)
    for key in ("final_proj.weight", "final_proj.bias"):
        weights[key] = torch.randn(symbols, *weights[key].shape[1:])
    torch.save(weights, file, pickle_protocol=2)
    card = yaml.safe_load((folder / "checkpoints/model.yaml").read_text())
    card["model_config"]["target_vocab_size"] = symbols
    (folder / "checkpoints/model.yaml").write_text(yaml.safe_dump(card))


def quantize(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Quantize features with a pretraining model's codebooks, without a compiler."""
    with uncompiled():
        quantized: torch.Tensor = model.quantizer(features).quantized_vectors
    return quantized


def save_released(architecture: str, folder: Path, *, shards: int) -> Path:
    """Write a run of a released model's size, every number random, with a tokenizer of as many pieces."""
    values = dict(ARCHITECTURES["wav2vec2_asr"][architecture])
    values["norm_order"] = TransformerNormOrder[values["norm_order"]]
    inner = {field.name for field in dataclasses.fields(wav2vec2.Wav2Vec2EncoderConfig)}
    encoder = wav2vec2.Wav2Vec2EncoderConfig(**{key: values.pop(key) for key in list(values) if key in inner})
    made = asr.Wav2Vec2AsrConfig(encoder_config=encoder, **values)
    torch.manual_seed(0)
    with one_process():
        weights = asr.create_wav2vec2_asr_model(made).state_dict()
    for value in weights.values():
        value.add_(torch.randn_like(value) * 0.02)
    _save(folder, 100, [shard(weights, rank, shards) for rank in range(shards)])
    _metadata(folder, "wav2vec2_asr", made)
    (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": {"normalize_audio": True}}), "utf-8")
    letters = [" ", *(chr(0x4E00 + index) for index in range(made.target_vocab_size - 5))]
    save_tokenizer(folder / "tokenizer.model", letters)
    return folder


def save_file(name: str, path: Path, *, seed: int = 0, wrap: str = "model") -> Path:
    """Write one `.pt` as models are released, or with `wrap=""` a bare state_dict."""
    weights = build(name, seed).state_dict()
    torch.save({wrap: weights} if wrap else weights, path, pickle_protocol=2)
    return path


def shard(weights: dict[str, torch.Tensor], rank: int, shards: int) -> dict[str, torch.Tensor]:
    """Cut a state_dict as FSDP2 does: rows, the last ranks' in storages as large as the first's, buffers whole."""
    cut = {}
    for key, tensor in weights.items():
        if tensor.dim() == 0 or shards == 1:
            cut[key] = tensor.clone()
            continue
        rows = -(-len(tensor) // shards)
        mine = tensor[rows * rank : rows * (rank + 1)]
        room = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype)
        room[: len(mine)] = mine
        cut[key] = room[: len(mine)]
    return cut


def fake_gangs(rank: int, size: int) -> Gangs:
    """The gangs of one process of several that are not there."""
    one, sharded = FakeGang(CPU), FakeGang(CPU, rank=rank, size=size)
    return Gangs(root=sharded, dp=sharded, rdp=one, sdp=sharded, tp=one, pp=one)


def _of(module: Any, *names: str) -> Any:
    """A class of fairseq2 0.8 or 0.6, by its names there."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _files() -> Any:
    return _of(file_system, "NativeLocalFileSystem", "LocalFileSystem")()


def _manager(folder: Path, gangs: Gangs) -> Any:
    files = _files()
    loader = _of(io, "_TorchTensorFileLoader", "TorchTensorLoader")(files)
    dumper = _of(io, "_TorchTensorFileDumper", "TorchTensorDumper")(files)
    return checkpoint.StandardCheckpointManager(folder, gangs, files, loader, dumper, None)


def _metadata(folder: Path, family: str, made: Any) -> None:
    files = _files()
    dumper = checkpoint.StandardModelMetadataDumper(files, RuamelYamlDumper(files), StandardValueConverter())
    dumper.dump(folder / "checkpoints", family, made)


class _State:
    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return self.value


def _save(folder: Path, step: int, ranks: Sequence[dict[str, torch.Tensor]]) -> None:
    """Save a step: rank 0 makes its folder and gives it its name, the others write into it before that."""
    done = folder / "checkpoints" / f"step_{step}"
    for rank, weights in enumerate(ranks):
        _manager(folder, fake_gangs(rank, len(ranks))).save_model_only(step, _State(weights), blocking=True)
        if rank == 0:
            done.rename(done.with_suffix(".tmp"))
    done.with_suffix(".tmp").rename(done)


def run_fsdp(name: str, folder: Path, version: str, rank: int, size: int) -> None:
    """Be one rank of a real FSDP run that saves a checkpoint; rank 0 writes the whole state_dict beside it."""
    from fairseq2.models.wav2vec2.asr.fsdp import apply_fsdp_to_wav2vec2_asr
    from fairseq2.models.wav2vec2.fsdp import apply_fsdp_to_wav2vec2
    from fairseq2.nn import fsdp

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}
    root = ProcessGroupGang.create_default_process_group(CPU)
    gangs = create_parallel_gangs(root)
    gangs = Gangs(root=root, dp=gangs.dp, rdp=FakeGang(CPU), sdp=gangs.dp, tp=gangs.tp, pp=gangs.pp)
    family, made = config(name)
    model = build(name)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    apply = apply_fsdp_to_wav2vec2 if family == "wav2vec2" else apply_fsdp_to_wav2vec2_asr
    wrapped = fsdp.to_fsdp(model, gangs, lambda module, wrapper: apply(module, "layer", wrapper), version=version)

    class Local:
        def state_dict(self) -> dict[str, Any]:
            return fsdp.fsdp_local_state_dict(wrapped)

    _manager(folder, gangs).save_model_only(100, Local(), blocking=True)
    if rank == 0:
        _metadata(folder, family, made)
        torch.save(whole, folder / "whole.pt")
    root.close()


def _field(number: int, value: bytes | str | int | bool) -> bytes:
    """One field of a protocol buffer."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def save_tokenizer(
    path: Path,
    letters: Sequence[str] = LETTERS,
    *,
    special: Sequence[str] = SPECIAL,
    trainer: bytes = b"",
    normalizer: Sequence[tuple[int, Any]] = ((1, "identity"), (3, False), (4, False), (5, False)),
    pieces: bytes = b"",
) -> Path:
    """Write a sentencepiece model of single characters.

    Args:
        path: the `.model` file.
        letters: what comes after the special pieces.
        special: the control pieces, and `<unk>`.
        trainer, normalizer, pieces: further fields of sentencepiece's `TrainerSpec`, `NormalizerSpec` and `ModelProto`.
    """
    kinds = {"<unk>": 2}
    model = b"".join(_field(1, _field(1, piece) + _field(3, kinds.get(piece, 3))) for piece in special)
    model += b"".join(_field(1, _field(1, letter) + _field(3, 1)) for letter in letters) + pieces
    ids = {"<unk>": 40, "<s>": 41, "</s>": 42, "<pad>": 43}
    spec = _field(3, 4) + b"".join(_field(ids[piece], index) for index, piece in enumerate(special) if piece in ids)
    model += _field(2, spec + trainer) + _field(3, b"".join(_field(number, value) for number, value in normalizer))
    path.write_bytes(model)
    return path


if __name__ == "__main__":
    run_fsdp(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
