"""Single faults in converted HuBERT models, each injected and each reported, as for wav2vec 2.0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import SILENT, config_faults, in_weights, reported, settings, weight_faults
from hubert_models import BASE, Variant, save
from verify_models import computed_once, converted, few_inputs, short_inputs

COUNTER = "encoder.pos_conv_embed.batch_norm.num_batches_tracked"  # for training, and no number that a fraction fits


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with (
        short_inputs(),
        few_inputs("speech-even", "quiet", "padded-batch"),
        computed_once(),
    ):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    small = Variant("hubert", BASE | {"conv_pos_batch_norm": True, "encoder_layers": 1})
    return converted(small, tmp_path_factory.mktemp("model"), write=save, keep_final_proj=True)


def test_every_fault_in_the_weights_is_reported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    every = {label: fault for label, fault in weight_faults(pair[1]).items() if COUNTER not in label}
    faults = {label: fault for label, fault in every.items() if "perturbed" in label or "pos_conv_embed" in label}
    assert len(faults) > 30
    codes = {label: reported(pair, fault, tmp_path) for label, fault in faults.items()}
    assert [label for label, found in codes.items() if "bytes" not in found] == []
    unseen = [label for label, found in codes.items() if "different" not in found]
    assert [label for label in unseen if not any(part in label for part in SILENT)] == []
    counted = in_weights(lambda tensors: tensors.update({COUNTER: tensors[COUNTER] + 1}))
    assert reported(pair, counted, tmp_path) >= {"bytes"}


def test_every_fault_in_the_kept_head_is_reported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def damage(at: int) -> Any:
        def fault(model: Path) -> None:
            data = bytearray((model / "final_proj.safetensors").read_bytes())
            data[at] ^= 1
            (model / "final_proj.safetensors").write_bytes(data)

        return fault

    assert "bytes" in reported(pair, damage(-1), tmp_path)
    assert "missing-file" in reported(pair, lambda model: (model / "final_proj.safetensors").unlink(), tmp_path)
    wrong = settings("config.json", classifier_proj_size=256)
    assert "file" in reported(pair, wrong, tmp_path)


def test_every_fault_in_the_configuration_is_reported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    faults = {
        label: fault
        for label, fault in config_faults(pair[1]).items()
        if not label.startswith(("codevector", "num_codevector", "proj_codevector", "add_adapter"))
    }
    faults |= {
        f"{name} = {value}": settings("config.json", **{name: value})
        for name, value in (("conv_pos_batch_norm", False), ("feat_proj_layer_norm", False))
    }
    codes = {label: reported(pair, fault, tmp_path) for label, fault in faults.items()}
    wanted = {"different", "load", "missing-keys", "unexpected-keys", "mismatched-keys"}
    assert [label for label, found in codes.items() if not found & wanted] == []  # not by comparing the files alone
    computed = {label.split(" =")[0] for label, found in codes.items() if "different" in found}
    assert computed >= {"hidden_act", "layer_norm_eps", "num_attention_heads"}
