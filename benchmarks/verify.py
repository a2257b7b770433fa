"""Time and memory of a whole `verify` on a 317M-parameter model, as ratios against the bare forward passes of both models.

The bare process does the least that any comparison must do: it imports fairseq and transformers, loads both models, and
runs both once on the same inputs, comparing nothing. `verify` is a whole command with all its proofs: every byte, every
stage, the controls, floors and noise in float64. Every round runs each once, in turn, as a process of its own; printed
are medians. Usage: `python benchmarks/verify.py [--rounds N] [--directory DIR] [--small]` (needs 3 GB of disk, fairseq, and memory
for both models and one of them in float64).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from conversion import run, warm

BARE = """
import json, sys, time
from pathlib import Path
import torch
from convert.directory import ModelDirectory
from convert.request import request_again
from convert.sources import open_source
from convert.verification.inputs import SPEECH, bundled, probes
from convert.verification.reference import Live, tensor
from convert.verification.subject import read_subject
from convert.verification.target import load
checkpoint, model, letters = map(Path, sys.argv[1:4])
with open_source(checkpoint, dictionary=letters) as opened:
    subject, geometry = read_subject(opened, request_again(ModelDirectory(model), opened, dictionary=letters))
    clips = {SPEECH: bundled()}
    reference, target = Live(subject, clips, "cpu"), load(model, "cpu")
    started = time.perf_counter()
    with torch.no_grad():
        for probe in probes(geometry, clips, rate=subject.rate):
            batch, lengths = tensor(clips, probe, subject.normalize)
            reference.inner.run(batch, lengths, probe.multiple)
            mask = None if lengths is None else (torch.arange(batch.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
            target.model(batch, attention_mask=mask)
    Path(sys.argv[4]).write_text(json.dumps(time.perf_counter() - started))
"""


def main() -> None:
    """Make the checkpoint, convert it, run the rounds, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to see that this runs")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        work = Path(name)
        checkpoint, model = work / "large.pt", work / "model"
        maker = [sys.executable, str(Path(__file__).with_name("large.py")), str(checkpoint)]
        subprocess.run([*maker, *(["--small"] if asked.small else [])], check=True)
        letters = checkpoint.with_suffix(".dict.txt")
        tool = [sys.executable, "-m", "convert"]
        subprocess.run([*tool, "convert", str(checkpoint), str(model), "--dict", str(letters), "-q"], check=True)
        size = (model / "model.safetensors").stat().st_size
        forward, bare, whole = [], [], []
        for _ in range(asked.rounds):
            warm(checkpoint)
            warm(model / "model.safetensors")
            bare.append(run(sys.executable, "-c", BARE, checkpoint, model, letters, work / "seconds"))
            forward.append(float(json.loads((work / "seconds").read_text())))
            whole.append(run(*tool, "verify", checkpoint, model, "--device", "cpu", "-q"))
        report(forward, bare, whole, size)


def report(forward: list[float], bare: list[tuple[float, int]], whole: list[tuple[float, int]], size: int) -> None:
    """Print medians and ratios."""
    passes = statistics.median(forward)
    processes = {"bare process": bare, "verify": whole}
    print(f"{'forward passes':<16} {passes:7.2f} s  ({min(forward):.2f} to {max(forward):.2f})")
    for name, rows in processes.items():
        seconds = [taken for taken, _ in rows]
        peak = max(memory for _, memory in rows) / 1e9
        print(
            f"{name:<16} {statistics.median(seconds):7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  peak {peak:.2f} GB"
        )
    verify = statistics.median(taken for taken, _ in whole)
    print()
    print(f"{'verify / bare process':<34} {verify / statistics.median(taken for taken, _ in bare):6.2f}")
    print(f"{'verify / forward passes':<34} {verify / passes:6.2f}")
    print(f"{'peak memory of verify / two models':<34} {max(memory for _, memory in whole) / (2 * size):6.2f}")


if __name__ == "__main__":
    main()
