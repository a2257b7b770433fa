"""Transcribe the held-out recordings with plain transformers: `python checkpoints/transcribe.py MODEL_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import soundfile
import torch
from transformers import AutoProcessor, Wav2Vec2ForCTC

HELDOUT = Path(__file__).parent / "heldout"


def main(model_dir: str) -> int:
    """Print what the model hears beside what was said; return how many recordings differ."""
    processor = AutoProcessor.from_pretrained(model_dir)
    model = Wav2Vec2ForCTC.from_pretrained(model_dir).eval()
    names = [line.split("\t")[0] for line in (HELDOUT / "heldout.tsv").read_text().splitlines()[1:]]
    wrong = 0
    for name, said in zip(names, (HELDOUT / "heldout.wrd").read_text().splitlines(), strict=True):
        wave, rate = soundfile.read(HELDOUT / name, dtype="float32")
        inputs = processor(wave, sampling_rate=rate, return_tensors="pt")
        with torch.no_grad():
            heard = processor.batch_decode(model(**inputs).logits.argmax(-1))[0]
        wrong += heard != said
        print(f"{name}  {heard}" + ("" if heard == said else f"   (said: {said})"))
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1]), 1))
