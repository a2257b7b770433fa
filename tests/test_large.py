"""A model of the released size and layout: 24 layers, 317M parameters, `args` of 2020, Adam's state beside the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT
from comparing import counterpart_outputs, load, outputs, write_dictionary
from fairseq_models import LETTERS, Variant, build, save

import convert

LARGE = Variant(
    "ctc",
    {
        "extractor_mode": "layer_norm",
        "layer_norm_first": True,
        "conv_bias": True,
        "encoder_layers": 24,
        "encoder_embed_dim": 1024,
        "encoder_ffn_embed_dim": 4096,
        "encoder_attention_heads": 16,
        "conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "final_dim": 768,
        "quantize_targets": True,
        "mask_prob": 0.65,
    },
    normalize=True,
)


@pytest.mark.slow
def test_a_released_size(tmp_path: Path) -> None:
    reference = build(LARGE)
    path = save(LARGE, tmp_path / "large.pt", layout="namespace", container="legacy", adam=True, model=reference)
    assert path.stat().st_size > 3_700_000_000
    letters = write_dictionary(tmp_path / "dict.ltr.txt", tuple(LETTERS))
    line = [sys.executable, "-m", "convert", "convert", path, tmp_path / "out", "--dict", letters, "-q"]
    subprocess.run([str(word) for word in line], cwd=ROOT, check=True)
    assert convert.compare_weights(path, tmp_path / "out") == []
    wave = torch.randn(1, 16080, generator=torch.Generator().manual_seed(0))
    ours = counterpart_outputs(load(tmp_path / "out"), wave)
    assert ours[0].shape[1] % 2 == 0
    assert torch.equal(outputs(reference, wave)[0], ours[0])
