"""Time and memory of a whole `verify`, against the least that its passes take; by default of a 317M-parameter model.

The bare process imports fairseq and transformers, loads both models, and runs each as often as `verify` did, in the same
types and at the same lengths: what is counted while `verify` runs, without the passes that `verify` makes only in part. It
compares nothing. Every round runs `verify` and the bare process once, in turn, as processes of their own; printed are medians. Memory is the peak of anonymous memory, all processes of a
command together: what is mapped from files can be given up at any time. With `--xlsr`, a model of XLS-R 2B's size is verified
once, and memory alone is measured: the bare process would need 26 GB.
Usage: `python benchmarks/verify.py [--rounds N] [--directory DIR] [--small] [--xlsr] [--no-long]` (Linux; needs 3 GB of disk and
7 GB of memory, with `--xlsr` 18 and 4 GB; fairseq).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from conversion import warm
from machine import describe

AIM = 1.5  # times the bare process
COUNTED = """
import json, sys
from pathlib import Path
from convert.cli import main
from convert.verification.fairseq_side.reference import Reference
from convert.verification.watched import Target
passes = []
def in_part(self):  # a control, whose first layers return what is known
    return any(layer.forward.__name__ == "<lambda>" for layer in getattr(self, "layers", {}).values())
def counted(side, kind):
    run = kind.run
    def runs(self, waveforms, lengths=None, *rest):
        more = {} if lengths is None else {"lengths": list(lengths)}
        passes.append({"side": side + " in part" * in_part(self), "type": str(self.lending.kind), "shape": list(waveforms.shape), **more})
        return run(self, waveforms, lengths, *rest)
    kind.run = runs
counted("fairseq", Reference)
counted("transformers", Target)
try:
    main(sys.argv[2:])
finally:
    Path(sys.argv[1]).write_text(json.dumps(passes))
"""
BARE = """
import json, sys
from pathlib import Path
import torch
from convert.directory import ModelDirectory
from convert.request import request_again
from convert.sources import open_source
from convert.verification.reference import Live
from convert.verification.subject import read_subject
from convert.verification.target import load
passes, checkpoint, directory = json.loads(Path(sys.argv[1]).read_text()), *map(Path, sys.argv[2:4])
def masked(one, valid):
    if "lengths" not in one:
        return None
    found = torch.arange(one["shape"][1])[None] < torch.tensor(one["lengths"])[:, None]
    return found.long() if valid else ~found
def run(side, call):
    for kind in ("torch.float32", "torch.float64"):
        model = sides[side].float() if kind == "torch.float32" else sides[side].double()
        for one in passes:
            if (one["side"], one["type"]) == (side, kind):
                call(model, torch.randn(one["shape"]).to(model.dtype if hasattr(model, "dtype") else next(model.parameters()).dtype), one)
    del sides[side]
with open_source(checkpoint) as opened, torch.no_grad():
    subject, _ = read_subject(opened, request_again(ModelDirectory(directory), opened))
    sides = {"fairseq": Live(subject, {}, "cpu").inner.model, "transformers": load(directory, "cpu").model}
    run("fairseq", lambda model, batch, one: model(source=batch, padding_mask=masked(one, False)))
    run("transformers", lambda model, batch, one: model(batch, attention_mask=masked(one, True)))
"""


class Ran(NamedTuple):
    """A process: its wall time and its processor time in seconds, and its peak of anonymous memory in bytes."""

    seconds: float
    processor: float
    peak: int


def measured(*words: str | Path, **environment: str) -> Ran:
    """Run a command, and sum up the anonymous memory of it and its children every 20 ms."""
    before, started = os.times(), time.perf_counter()
    command = [str(word) for word in words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(anonymous, family_of(process.pid))))
        time.sleep(0.02)
    taken, after = time.perf_counter() - started, os.times()
    if process.returncode:
        sys.exit(f"failed: {' '.join(map(str, words))}")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Ran(taken, processor, peak)


def family_of(process: int) -> list[int]:
    """List a process and all that it started."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return [process]
    return [process, *(other for child in children for other in family_of(child))]


def anonymous(process: int) -> int:
    """Return the anonymous memory of a process in bytes; 0 of one that has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """Make the checkpoint, convert it, run the rounds, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to see that this runs")
    parser.add_argument("--xlsr", action="store_true", help="a model of XLS-R 2B's size; memory alone")
    parser.add_argument("--no-long", action="store_true", help="as of `verify`: without 30 seconds of speech")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        work = Path(name)
        checkpoint, model, passes = work / "model.pt", work / "model", work / "passes.json"
        maker = [
            sys.executable,
            str(Path(__file__).with_name("xlsr.py" if asked.xlsr else "large.py")),
            str(checkpoint),
        ]
        subprocess.run([*maker, *(["--small"] if asked.small else [])], check=True)
        letters = [] if asked.xlsr else ["--dict", str(checkpoint.with_suffix(".dict.txt"))]
        subprocess.run([sys.executable, "-m", "convert", "convert", checkpoint, model, *letters, "-q"], check=True)
        whole, bare = [], []
        for _ in range(1 if asked.xlsr else asked.rounds):
            warm(checkpoint)
            for weights in model.glob("*.safetensors"):
                warm(weights)
            line = ("verify", checkpoint, model, "--device", "cpu", "-q", *(["--no-long"] if asked.no_long else []))
            whole.append(measured(sys.executable, "-c", COUNTED, passes, *line))
            if not asked.xlsr:
                bare.append(measured(sys.executable, "-c", BARE, passes, checkpoint, model))
        report(json.loads(passes.read_text()), {"verify": whole, "bare process": bare})


def report(passes: list[dict[str, object]], processes: dict[str, list[Ran]]) -> None:
    """Print what ran, medians and the ratio."""
    counts = collections.Counter(f"{one['side']} in {str(one['type']).removeprefix('torch.')}" for one in passes)
    print(describe())
    print("passes: " + ", ".join(f"{count} of {side}" for side, count in sorted(counts.items())))
    for name, rows in processes.items():
        if rows:
            seconds = [row.seconds for row in rows]
            print(
                f"{name:<16} {statistics.median(seconds):7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f}), processor "
                f"{statistics.median(row.processor for row in rows):7.2f} s, anonymous memory {max(row.peak for row in rows) / 1e6:5.0f} MB"
            )
    if processes["bare process"]:
        print()
        for label, field in (("verify / bare process", "seconds"), ("the same, processor time", "processor")):
            one, other = (statistics.median(getattr(row, field) for row in rows) for rows in processes.values())
            print(f"{label:<34} {one / other:6.2f}   aim: at most {AIM}")


if __name__ == "__main__":
    main()
