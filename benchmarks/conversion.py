"""Time and memory of whole commands on a 317M-parameter checkpoint, as ratios against a peer in the same run.

Every round runs each command once, in turn, as a process of its own, on a warm cache, with the disk settled before it;
printed are medians over the rounds. Usage: `python benchmarks/conversion.py [--rounds N] [--directory DIR] [--small]` (needs 10 GB).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NAIVE = """
import sys, torch
from safetensors.torch import save_file
from convert.mapping import map_state_dict
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
save_file({key: value.contiguous() for key, value in map_state_dict(state["model"]).items()}, sys.argv[2])
"""


def run(*words: str | Path) -> tuple[float, int]:
    """Run a command; return its wall time in seconds and its peak memory in bytes."""
    os.sync()
    time.sleep(0.5)  # deleted files are still being discarded
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - started
    if status:
        sys.exit(f"failed: {' '.join(map(str, words))}")
    return taken, usage.ru_maxrss * 1024


def main() -> None:
    """Make the checkpoints, run the rounds, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to see that this runs")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        work = Path(name)
        report(measure(work, asked.rounds, asked.small), work)


def measure(work: Path, rounds: int, small: bool) -> dict[str, list[tuple[float, int]]]:
    """Run every command `rounds` times, alternating."""
    plain, adam, legacy = (work / f"{kind}.pt" for kind in ("plain", "adam", "legacy"))
    maker = [sys.executable, str(Path(__file__).with_name("large.py")), *(["--small"] if small else [])]
    for path, flags in ((plain, []), (adam, ["--adam"]), (legacy, ["--legacy"])):
        subprocess.run([*maker, str(path), *flags], check=True)
    letters, out, copy = plain.with_suffix(".dict.txt"), work / "out", work / "copy"
    tool = [sys.executable, "-m", "convert"]

    def convert(path: Path) -> tuple[float, int]:
        return run(*tool, "convert", path, out, "--dict", letters, "-q")

    commands: dict[str, Callable[[], tuple[float, int]]] = {
        "cp and fsync": lambda: run("sh", "-c", f"cp '{plain}' '{copy}' && sync '{copy}'"),
        "convert": lambda: convert(plain),
        "sha256 with Adam": lambda: run("openssl", "dgst", "-sha256", adam),
        "convert with Adam": lambda: convert(adam),
        "convert legacy": lambda: convert(legacy),
        "inspect with Adam": lambda: run(*tool, "inspect", adam),
        "--help": lambda: run(*tool, "--help"),
        "naive": lambda: run(sys.executable, "-c", NAIVE, plain, copy),
    }
    needs = {"sha256 with Adam": adam, "convert with Adam": adam, "convert legacy": legacy, "inspect with Adam": adam}
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            warm(needs.get(name, plain))
            results[name].append(command())
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
    return results


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def report(results: dict[str, list[tuple[float, int]]], work: Path) -> None:
    """Print medians, and the ratios that the project promises."""
    seconds = {name: statistics.median(taken for taken, _ in rows) for name, rows in results.items()}
    memory = {name: max(peak for _, peak in rows) for name, rows in results.items()}
    for name in results:
        spread = [taken for taken, _ in results[name]]
        print(
            f"{name:<18} {seconds[name]:7.3f} s  ({min(spread):.3f} to {max(spread):.3f})  peak {memory[name] / 1e6:7.1f} MB"
        )
    print()
    for label, value, bound in (
        ("convert / (cp and fsync)", seconds["convert"] / seconds["cp and fsync"], "2"),
        ("convert with Adam / openssl sha256", seconds["convert with Adam"] / seconds["sha256 with Adam"], "1.2"),
        ("convert legacy / convert", seconds["convert legacy"] / seconds["convert"], "1.3"),
        ("naive script / convert", seconds["naive"] / seconds["convert"], ""),
        ("naive script's memory / convert's", memory["naive"] / memory["convert"], ""),
    ):
        print(f"{label:<36} {value:6.2f}" + (f"   aim: at most {bound}" if bound else ""))
    peak = max(memory["convert"], memory["convert with Adam"], memory["convert legacy"]) / 1e6
    print(f"{'peak memory of convert':<36} {peak:6.1f} MB   aim: at most 100")
    print(f"{'inspect of the file with Adam':<36} {seconds['inspect with Adam']:6.3f} s    aim: at most 0.3")
    print(f"{'--help':<36} {seconds['--help']:6.3f} s    aim: at most 0.15")


if __name__ == "__main__":
    main()
