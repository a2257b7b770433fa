"""Make a checkpoint of XLS-R 2B's size in fairseq's own class: 48 layers, 1,920 channels, 2.2 billion parameters, random.

The numbers lie in a scratch file beside the checkpoint until they are saved, so that it takes no memory of the model's size.
Usage: `python benchmarks/xlsr.py FILE.pt [--small]` (needs 18 GB of disk while it runs, and fairseq).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

ENCODER: dict[str, Any] = {
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": True,
    "encoder_layers": 48,
    "encoder_embed_dim": 1920,
    "encoder_ffn_embed_dim": 7680,
    "encoder_attention_heads": 16,
    "final_dim": 1024,
    "latent_vars": 320,
    "latent_groups": 2,
    "latent_dim": 0,
    "quantize_targets": True,
    "conv_pos": 128,
    "conv_pos_groups": 16,
}
SMALL = {"encoder_layers": 2, "encoder_embed_dim": 96, "encoder_ffn_embed_dim": 192, "final_dim": 32}


def save(path: Path, encoder: dict[str, Any]) -> Path:
    """Write a checkpoint of a pretrained model with these settings."""
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Model
    from fairseq_models import Variant, settings
    from omegaconf import OmegaConf

    from convert.verification.fairseq_side.building import no_random_numbers

    known = settings(Variant("pretraining", encoder, normalize=True))
    with no_random_numbers():
        model = Wav2Vec2Model.build_model(OmegaConf.create(known["model"]))
    scratch = path.with_suffix(".scratch")
    count = sum(parameter.numel() for parameter in model.parameters())
    numbers = torch.from_file(str(scratch), shared=True, size=count, dtype=torch.float32)
    try:
        at, block = 0, torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
        for name, parameter in model.named_parameters():
            value = numbers[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
            for start in range(0, value.numel(), len(block)):
                piece = value.view(-1)[start : start + len(block)]
                piece.copy_(block.roll(at)[: len(piece)] * 0.02)
            if name.endswith("weight_g"):
                value += 2
            elif value.dim() == 1 and name.endswith("weight"):
                value += 1
            elif value.dim() == 3 and "conv_layers" in name:
                value *= 25 / (value.shape[1] * value.shape[2]) ** 0.5
            parameter.data = value.clone() if value.numel() < 1 << 16 else value
        tensors = {name: _own(value) for name, value in model.state_dict().items()}
        torch.save({"args": None, "cfg": known, "model": tensors}, path)
    finally:
        scratch.unlink()
    return path


def _own(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the scratch file in a storage of its own, as every tensor of a trained model has: else all is saved with each."""
    part = value.untyped_storage()[value.storage_offset() * 4 : (value.storage_offset() + value.numel()) * 4]
    return torch.empty(0).set_(part, 0, value.shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--small", action="store_true", help="two layers of 96 channels")
    asked = parser.parse_args()
    save(asked.file, ENCODER | SMALL if asked.small else ENCODER)
