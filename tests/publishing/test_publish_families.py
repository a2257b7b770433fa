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
from hub_fixtures import RUN, Publisher, prove

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


@pytest.fixture(scope="module")
def published(session_hub, tmp_path_factory):
    """Publish and check one of each family in one process, and run their cards in another, which has plain transformers.

    Each family's answer, what its card is and printed, and how it was converted; or why it was left out.
    """
    folder, asked, left_out = tmp_path_factory.mktemp("families"), {}, {}
    for family, (save, _, _) in FAMILIES.items():
        (folder / "of" / family).mkdir(parents=True)
        try:
            asked[family] = save(folder / "of" / family)
        except pytest.skip.Exception as reason:  # what it needs is not installed
            left_out[family] = str(reason)
            continue
        convert(folder / "of" / family / "model.pt", folder / family, **asked[family])
        prove(folder / family)
    publisher = Publisher(session_hub, folder / "home")
    lines = [[str(folder / family), f"alice/{family}", "--check"] for family in asked]
    answers = dict(zip(asked, publisher.run_all(lines), strict=True))
    publisher.told_nobody()
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) / 10
    soundfile.write(folder / "speech.wav", wave, 16000)
    cards = {}
    for family in asked:
        cards[family] = session_hub.store.repositories[f"alice/{family}"].files("main")["README.md"].content.decode()
        (folder / f"{family}.md").write_text(cards[family], "utf-8")
    run = [sys.executable, "-c", RUN, *(f"{family}.md" for family in asked)]
    done = subprocess.run(
        run, cwd=folder, env=publisher.environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    texts = dict.fromkeys(asked, "")
    for line in done.stdout.splitlines(keepends=True):
        if line.startswith("# "):
            family = line[2:].strip().removesuffix(".md")
        else:
            texts[family] += line
    made = {family: (folder / family, answers[family], cards[family], texts[family], asked[family]) for family in asked}
    return made | left_out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hub_has_the_same_model_and_its_card_runs(family, session_hub, published):
    if isinstance(published[family], str):
        pytest.skip(published[family])
    _, task, printed = FAMILIES[family]
    model, answer, card, text, asked = published[family]
    assert answer["ok"]
    files = session_hub.store.repositories[f"alice/{family}"].files("main")
    assert (
        {name for name, _, _ in answer["files"]}
        == {path.name for path in model.iterdir()}
        == set(files) - {".gitattributes"}
    )
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["pipeline_tag"] == task and ("hf-asr-leaderboard" in data["tags"]) == ("speech-rec" in task)
    snippets = re.findall(r"```python\n", card)
    assert len(snippets) == (2 if family == "hubert" else 1)
    assert ("final_proj.safetensors" in card) == ("keep_final_proj" in asked)
    assert re.fullmatch(printed, text.rstrip("\n"), re.DOTALL), text


def test_another_model_on_the_hub_would_be_noticed(tmp_path):
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
    with pytest.raises(MismatchError, match="computes different"):
        same(found[0], found[1], "me/one", "0" * 40)
