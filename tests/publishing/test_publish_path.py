"""The whole path, as a user types it: convert, verify, evaluate, publish, load from the Hub, transcribe."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_fixtures import ROOT, prove

CHECKPOINT = ROOT / "checkpoints" / "espeak-wav2vec2-ctc.pt"
HELDOUT = ROOT / "checkpoints" / "heldout"
READ = """
import sys, soundfile, torch
from transformers import AutoProcessor, Wav2Vec2ForCTC
repository, revision, *paths = sys.argv[1:]
processor = AutoProcessor.from_pretrained(repository, revision=revision)
model = Wav2Vec2ForCTC.from_pretrained(repository, revision=revision).eval()
for path in paths:
    speech, rate = soundfile.read(path, dtype="float32")
    inputs = processor(speech, sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        print(processor.batch_decode(model(**inputs).logits.argmax(dim=-1))[0])
"""


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="the bundled checkpoint is not there")
def test_from_the_checkpoint_to_a_transcript_of_the_published_model(hub, publisher, tmp_path):
    model = tmp_path / "espeak"

    def run(*command: object) -> dict:
        line = [sys.executable, "-m", "convert", *map(str, command), "--json"]
        done = subprocess.run(
            line, env=publisher.environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    run("convert", CHECKPOINT, model)
    if importlib.util.find_spec("convert.commands.verify"):
        run("verify", CHECKPOINT, model)
    else:
        prove(model)
    rates = run("evaluate", model, "--manifest", HELDOUT / "heldout.tsv")["result"]["metrics"]
    done = publisher.run(model, "alice/espeak", "--language", "en", "--check")
    assert done["committed"] and done["checked"] and done["verified"]

    wavs = sorted(HELDOUT.glob("*.wav"))
    line = [sys.executable, "-c", READ, "alice/espeak", done["tag"], *map(str, wavs)]
    heard = subprocess.run(line, env=publisher.environment(), capture_output=True, text=True, timeout=120, check=True)
    spoken = [
        line.replace(" ", "").replace("|", " ").strip() for line in (HELDOUT / "heldout.ltr").read_text().splitlines()
    ]
    named = [line.split("\t")[0] for line in (HELDOUT / "heldout.tsv").read_text().splitlines()[1:]]
    expected = dict(zip(named, spoken, strict=True))
    texts = dict(zip([path.name for path in wavs], heard.stdout.splitlines(), strict=True))
    wrong = sum(texts[name] != expected[name] for name in named)
    assert (wrong == 0) == (rates["wer"] == 0) and wrong <= len(named) // 2

    card = (model / "README.md").read_text("utf-8")
    assert f"value: {round(100 * rates['wer'], 4)}" in card
    assert "fairseq-to-hf evaluate espeak --manifest heldout.tsv" in card
    for text in (str(ROOT), str(tmp_path), str(Path.home())):
        assert text not in card
