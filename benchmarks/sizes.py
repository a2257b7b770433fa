"""Models of released sizes, one after the other: convert, compare every byte, restore (which reads back and compares what it wrote); time and peak memory of each.

`wav2vec2-2020` is wav2vec2-large in the layout of 2020 with Adam's state beside it; others are a family and a size of
`tests/support/full_size.py`, in fairseq's own class as it initialises it. `--verify` verifies them too, without 30 seconds of speech.
Usage: `python benchmarks/sizes.py [NAME ...] [--verify] [--directory DIR]` (needs 16 GB of memory, 16 GB of disk, and fairseq).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import ROOT, describe, run
from verify import measured

NAMES = ("wav2vec2-2020", "hubert-xlarge", "wav2vec2-xlarge", "data2vec-large", "conformer-large")
MAKE = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/support')!r}]; from pathlib import Path; import full_size; "
MAKE += "full_size.save(sys.argv[1], Path(sys.argv[2]))"
COMPARE = "import sys, convert; assert convert.compare_weights(sys.argv[1], sys.argv[2]) == []"


def measure(name: str, work: Path, verify: bool) -> None:
    """Print a row for each command on one checkpoint."""
    checkpoint, model, back = work / "model.pt", work / "model", work / "back.pt"
    options = ["--keep-final-proj"] if name.startswith("hubert") else []
    if name == "wav2vec2-2020":
        making = [str(ROOT / "benchmarks/large.py"), str(checkpoint), "--adam"]
        options = ["--dict", str(work / "model.dict.txt")]
    else:
        making = ["-c", MAKE, name, str(checkpoint)]
    subprocess.run([sys.executable, *making], check=True, capture_output=True)
    tool = [sys.executable, "-m", "convert"]
    steps = {
        "convert": [*tool, "convert", checkpoint, model, *options, "-q"],
        "compare bytes": [sys.executable, "-c", COMPARE, checkpoint, model],
        "restore": [*tool, "restore", model, back, "-q"],
    }
    print(f"{name}: {checkpoint.stat().st_size / 1e9:.2f} GB", flush=True)
    for step, words in steps.items():
        wall, processor, peak = run(*words, PYTHONPATH=str(ROOT))
        print(f"  {step:<28}{wall:7.1f} s {processor:7.1f} s CPU {peak:7.0f} MB resident", flush=True)
    if verify:
        ran = measured(*tool, "verify", checkpoint, model, "--device", "cpu", "--no-long")
        print(
            f"  {'verify':<28}{ran.seconds:7.1f} s {ran.processor:7.1f} s CPU {ran.peak / 1e6:7.0f} MB anonymous",
            flush=True,
        )


def main() -> None:
    """Measure each, in a directory of its own that is removed before the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    asked = parser.parse_args()
    print(describe(), flush=True)
    for name in asked.names:
        with tempfile.TemporaryDirectory(dir=asked.directory) as folder:
            measure(name, Path(folder), asked.verify)


if __name__ == "__main__":
    main()
