"""A model of the released size and layout: 24 layers, 317M parameters, `args` of 2020, Adam's state beside the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT
from comparing import counterpart_outputs, load, outputs, write_dictionary
from environments import recorded_elsewhere
from fairseq_models import LETTERS, Variant, build, save
from many_models import make_models
from verify_models import few_inputs, short_inputs

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


@pytest.mark.slow
def test_a_released_size_as_fairseq_initialises_it_is_proved(tmp_path: Path) -> None:
    """Live, and with what another environment recorded: rounding grows with depth and width, and is measured."""
    make_models(tmp_path, "wav2vec2-large")
    checkpoint, model = tmp_path / "checkpoints/wav2vec2-large/model.pt", tmp_path / "models/wav2vec2-large"
    with short_inputs(), few_inputs("speech-even", "quiet", "padded-batch"):
        live = convert.verify(checkpoint, model, devices=["cpu"], write=False)
        recording = recorded_elsewhere(checkpoint, model)
        recorded = convert.verify(checkpoint, model, reference=recording, devices=["cpu"], write=False)
    assert (live.problems, recorded.problems) == ((), ())
    assert all(control["caught"] for done in (live, recorded) for control in done.report["controls"])
    runs = live.report["runs"] + recorded.report["runs"]
    assert max(one["float64_difference"] / one["float64_allowed"] for one in runs if one["float64_allowed"]) <= 0.25
