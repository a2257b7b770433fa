"""Models of every family on the Hub: published, checked there, and used as their cards say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classification_models
import conformer_models
import data2vec_models
import hubert_models
import mms_models
import numpy as np
import pytest
import seq2seq_models
import soundfile
import speech_to_text_models
import yaml
from hub_fixtures import RUN, prove

from convert.package import convert


def _saved(module: Any, variant: str, **options: Any) -> Callable[[Path], dict[str, Any]]:
    def save(folder: Path) -> dict[str, Any]:
        module.save(variant, folder / "model.pt")
        return options

    return save


def _speech_to_text(folder: Path) -> dict[str, Any]:
    path, *_ = speech_to_text_models.save("tied", folder)
    path.replace(folder / "model.pt")
    return {"data_config": folder / "config.yaml"}


def _fairseq2(folder: Path) -> dict[str, Any]:
    import fairseq2_models  # skips this family where fairseq2 is not installed

    run = fairseq2_models.save_run("ctc_omnilingual", folder / "run")
    (run / "checkpoints/model.yaml").replace(folder / "model.yaml")
    (run / "tokenizer.model").replace(folder / "tokenizer.model")
    fairseq2_models.save_file("ctc_omnilingual", folder / "model.pt")
    return {"normalize": True}


HIDDEN = r"\{'last_hidden_state': \(1, \d+, 64\).*\}"
# family -> what writes its checkpoint and says how it is converted, the Hub's task, what the snippet prints
FAMILIES: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str]] = {
    "hubert": (_saved(hubert_models, "hubert_base", keep_final_proj=True), "feature-extraction", HIDDEN),
    "hubert-ctc": (_saved(hubert_models, "hubert_ctc_large"), "automatic-speech-recognition", r".*"),
    "data2vec": (_saved(data2vec_models, "pretrained", keep_final_proj=True), "feature-extraction", HIDDEN),
    "conformer": (_saved(conformer_models, "ctc_rotary"), "automatic-speech-recognition", r".*"),
    "mms": (_saved(mms_models, "mms"), "automatic-speech-recognition", r".*"),
    "classifier": (_saved(classification_models, "classification_large"), "audio-classification", r"\S+ 0\.\d+|\S+ 1\.0"),
    "seq2seq": (_saved(seq2seq_models, "learned"), "automatic-speech-recognition", r".*"),
    "speech-to-text": (_speech_to_text, "automatic-speech-recognition", r".*"),
    "fairseq2": (_fairseq2, "automatic-speech-recognition", r".*"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hub_has_the_same_model_and_its_card_runs(family, hub, publisher, tmp_path):
    save, task, printed = FAMILIES[family]
    model = tmp_path / family
    convert(tmp_path / "model.pt", model, **save(tmp_path))
    prove(model)
    answer = publisher.run(model, f"alice/{family}", "--check")
    files = hub.store.repositories[f"alice/{family}"].files("main")
    assert (
        {name for name, _, _ in answer["files"]}
        == {path.name for path in model.iterdir()}
        == set(files) - {".gitattributes"}
    )
    card = files["README.md"].content.decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["pipeline_tag"] == task and ("hf-asr-leaderboard" in data["tags"]) == ("speech-rec" in task)
    snippets = re.findall(r"```python\n", card)
    assert len(snippets) == (2 if family == "hubert" else 1)
    assert ("final_proj.safetensors" in card) == ("keep_final_proj" in str(save(tmp_path)))
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) / 10
    soundfile.write(tmp_path / "speech.wav", wave, 16000)
    (tmp_path / "card.md").write_text(card, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "card.md")],
        cwd=tmp_path,
        env=publisher.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("# ")]
    assert re.fullmatch(printed, "\n".join(lines), re.DOTALL), done.stdout


def test_another_model_on_the_hub_would_be_noticed(hub, publisher, tmp_path):
    """The control of `--check`: it runs the class that is there, whatever its output."""
    from convert.errors import MismatchError
    from convert.publishing.check import compute, same

    found = []
    for seed, name in enumerate(("one", "other")):
        seq2seq_models.save("learned", tmp_path / f"{name}.pt", seed=seed)
        convert(tmp_path / f"{name}.pt", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        found.append(compute(str(tmp_path / name), config["architectures"][0]))
    same(found[0], found[0], "me/one", "0" * 40)
    with pytest.raises(MismatchError, match="computes other"):
        same(found[0], found[1], "me/one", "0" * 40)
