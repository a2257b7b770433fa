"""Hundreds of single faults, each injected into a converted model, each reported; and correct conversions, none reported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from environments import recorded_elsewhere
from fairseq_models import VARIANTS
from faults import SILENT, config_faults, processor_faults, reported, weight_faults
from verify_models import computed_once, converted, few_inputs, short_inputs

from convert.verification import verify
from convert.verification.recording import Recorded

pytestmark = pytest.mark.slow  # two verifications for each of hundreds of faults
MODELS = ("ctc_base", "ctc_large", "pretrained_base")


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "quiet", "padded-batch"), computed_once():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {name: converted(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_fault_in_the_weights_is_reported(name: str, models: Any, tmp_path: Path) -> None:
    faults = weight_faults(models[name][1])
    missed, unseen = [], []
    for label, fault in faults.items():
        codes = reported(models[name], fault, tmp_path)
        if "bytes" not in codes:
            missed.append(label)
        if "different" not in codes and not any(part in label for part in SILENT):
            unseen.append(label)
    assert missed == []  # the bytes
    assert unseen == []  # the outputs, on their own


@pytest.mark.parametrize("name", MODELS)
def test_every_fault_in_the_configuration_is_reported(name: str, models: Any, tmp_path: Path) -> None:
    faults = config_faults(models[name][1])
    codes = {label: reported(models[name], fault, tmp_path) for label, fault in faults.items()}
    wanted = {"different", "vocabulary", "load", "missing-keys", "unexpected-keys", "mismatched-keys"}
    assert [label for label, found in codes.items() if not found & wanted] == []  # not by comparing the files alone
    computed = {label for label, found in codes.items() if "different" in found}
    assert {label.split(" =")[0] for label in computed} >= {"hidden_act", "layer_norm_eps", "num_attention_heads"}


@pytest.mark.parametrize("name", MODELS)
def test_every_fault_in_the_processor_is_reported(name: str, models: Any, tmp_path: Path) -> None:
    faults = processor_faults(models[name][1])
    codes = {label: reported(models[name], fault, tmp_path) for label, fault in faults.items()}
    wanted = {"vocabulary", "spelling", "end-to-end", "sampling-rate", "padding", "load"}
    assert [label for label, found in codes.items() if not found & wanted] == []


@pytest.mark.parametrize("name", MODELS)
def test_the_recordings_were_made_elsewhere(name: str, models: Any) -> None:
    unlike = Recorded(recorded_elsewhere(*models[name])).description.unlike
    if not unlike:
        pytest.skip("this processor computes the same bits under other instruction sets")
    assert unlike.startswith("this machine computes other bits than the one that recorded")


def test_there_are_as_many_faults_as_the_documentation_says(models: Any) -> None:
    made = [kind(model) for _, model in models.values() for kind in (weight_faults, config_faults, processor_faults)]
    assert f"injects {sum(map(len, made))} single faults" in (ROOT / "docs" / "verification.md").read_text()


def test_66_correct_conversions_are_not_reported(tmp_path: Path) -> None:
    cases = [(variant, seed) for seed in (1, 2, 3) for variant in VARIANTS]
    assert len(cases) == 66
    for variant, seed in cases:
        checkpoint, model = converted(variant, tmp_path, f"{variant}-{seed}", seed=seed)
        report = verify(checkpoint, model, devices=["cpu"], write=False)
        assert report.problems == (), (variant, seed)
        shutil.rmtree(model)
        checkpoint.unlink()
