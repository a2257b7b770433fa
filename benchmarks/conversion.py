"""Time and memory of whole commands on a 317M-parameter checkpoint, as ratios against a peer in the same run.

Every round runs each command once, in turn, as a process of its own, on a warm cache, with the disk settled before it;
printed are the least times of all rounds, which other work on the machine lengthened least, and the parts that every
conversion consists of, measured one by one.
Usage: `python benchmarks/conversion.py [--rounds N] [--directory DIR] [--small]` (needs 10 GB).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from machine import ROOT, Took, describe, run

NAIVE = """
import sys, torch
from safetensors.torch import save_file
from convert.mapping import map_state_dict
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
save_file({key: value.contiguous() for key, value in map_state_dict(state["model"]).items()}, sys.argv[2])
"""
PIECE = 1 << 20


def settled(*words: str | Path) -> Took:
    """Run a command when the disk has nothing left to do."""
    os.sync()
    time.sleep(0.5)  # deleted files are still being discarded
    return run(*words, PYTHONPATH=str(ROOT))


def main() -> None:
    """Make the checkpoints, run the rounds, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work, and where the checkpoints stay for the next run")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to see that this runs")
    asked = parser.parse_args()
    print(describe())
    with contextlib.nullcontext(asked.directory) if asked.directory else tempfile.TemporaryDirectory() as name:
        report(*measure(Path(name), asked.rounds, asked.small))


def measure(work: Path, rounds: int, small: bool) -> tuple[dict[str, list[Took]], list[dict[str, float]]]:
    """Run every command `rounds` times, alternating, and then the parts as often."""
    plain, adam, legacy = (work / f"{kind}.pt" for kind in ("plain", "adam", "legacy"))
    maker = [sys.executable, str(ROOT / "benchmarks/large.py"), *(["--small"] if small else [])]
    for path, flags in ((plain, []), (adam, ["--adam"]), (legacy, ["--legacy"])):
        if not path.exists():
            subprocess.run([*maker, str(path), *flags], check=True)
    letters, out, copy = plain.with_suffix(".dict.txt"), work / "out", work / "copy"
    tool = [sys.executable, "-m", "convert"]

    def convert(path: Path) -> Took:
        return settled(*tool, "convert", path, out, "--dict", letters, "-q")

    commands: dict[str, tuple[Path, Callable[[], Took]]] = {
        "cp and fsync": (plain, lambda: settled("sh", "-c", f"cp '{plain}' '{copy}' && sync '{copy}'")),
        "convert": (plain, lambda: convert(plain)),
        "sha256 with Adam": (adam, lambda: settled("openssl", "dgst", "-sha256", adam)),
        "convert with Adam": (adam, lambda: convert(adam)),
        "convert legacy": (legacy, lambda: convert(legacy)),
        "naive": (plain, lambda: settled(sys.executable, "-c", NAIVE, plain, copy)),
        "inspect with Adam": (adam, lambda: settled(*tool, "inspect", adam)),
        "convert bundled": (
            plain,
            lambda: settled(*tool, "convert", ROOT / "checkpoints/espeak-wav2vec2-ctc.pt", out, "-q"),
        ),
        "--help": (plain, lambda: settled(*tool, "--help")),
    }
    results: dict[str, list[Took]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (needed, command) in commands.items():
            warm(needed)
            results[name].append(command())
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
    return results, [parts(plain, copy) for _ in range(rounds)]


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def parts(source: Path, target: Path) -> dict[str, float]:
    """Do to every piece of a file what a conversion does to it, on one core; return the seconds that each part takes."""
    import numpy as np  # not before the commands: a new process counts the memory of the one that starts it

    meant, back = bytearray(PIECE), bytearray(PIECE)
    digest, crc, size = hashlib.sha256(), 0, source.stat().st_size
    seconds: dict[str, float] = {}

    def part(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    with source.open("rb") as ours, target.open("xb+") as theirs:
        os.posix_fallocate(theirs.fileno(), 0, size)
        for at in range(0, size, PIECE):
            part("read", lambda at=at: os.preadv(ours.fileno(), [meant], at))
            part("SHA-256 of the source", lambda: digest.update(meant))
            part("write", lambda at=at: os.pwrite(theirs.fileno(), meant, at))
            part("CRC-32", lambda: zlib.crc32(meant, crc))
            part("finite numbers", lambda: np.isfinite(np.frombuffer(meant, np.float32)).all())
            part("read back", lambda at=at: os.preadv(theirs.fileno(), [back], at))
            part("compare", lambda: meant.startswith(back))
            part("SHA-256 of the target", lambda: digest.update(back))
        part("fsync", lambda: os.fsync(theirs.fileno()))
    target.unlink()
    return seconds


def report(results: dict[str, list[Took]], taken: list[dict[str, float]]) -> None:
    """Print the least times, and the ratios that the project promises."""
    seconds = {name: min(took.wall for took in rows) for name, rows in results.items()}
    memory = {name: max(took.peak for took in rows) for name, rows in results.items()}
    for name, rows in results.items():
        median, processor = statistics.median(took.wall for took in rows), min(took.processor for took in rows)
        times = f"{seconds[name]:7.3f} s  (median {median:.3f})  {processor:6.2f} s CPU"
        print(f"{name:<18} {times}  peak {memory[name]:6.1f} MB")
    print()
    single = {name: min(each[name] for each in taken) for name in taken[0]}
    least = sum(single.values())
    print("parts of convert:  " + ", ".join(f"{name} {value:.2f} s" for name, value in single.items()))
    print()
    conversions = [name for name in results if name.startswith("convert")]
    for label, value, bound in (
        ("convert / (cp and fsync)", seconds["convert"] / seconds["cp and fsync"], "at most 1.6"),
        ("half of its parts / (cp and fsync)", least / 2 / seconds["cp and fsync"], "the least on two cores"),
        (
            "convert with Adam / openssl sha256",
            seconds["convert with Adam"] / seconds["sha256 with Adam"],
            "at most 1.2",
        ),
        ("convert legacy / convert", seconds["convert legacy"] / seconds["convert"], "at most 1.3"),
        ("naive script / convert", seconds["naive"] / seconds["convert"], ""),
        ("naive script's memory / convert's", memory["naive"] / memory["convert"], ""),
        ("peak memory of convert, MB", max(memory[name] for name in conversions), "at most 60"),
        ("inspect with Adam, s", seconds["inspect with Adam"], "at most 0.2"),
        ("convert of the bundled file, s", seconds["convert bundled"], "at most 0.4"),
        ("--help, s", seconds["--help"], "at most 0.1"),
    ):
        print(f"{label:<36} {value:6.2f}" + (f"   {bound}" if bound else ""))


if __name__ == "__main__":
    main()
