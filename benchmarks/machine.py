"""What the benchmarks share: the machine they run on in one line, and a command's time and memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def describe() -> str:
    """Describe the machine: processor, cores, memory, kernel, Python, and the packages that compute."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"
        ]
        processor = named[0] if named else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [processor, f"{os.cpu_count()} cores", f"{memory:.0f} GB", f"{platform.system()} {platform.release()}"]
    parts.append(f"Python {platform.python_version()}")
    for package in ("torch", "transformers"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)


class Took(NamedTuple):
    """What a command took: wall time and processor time in seconds, and its peak of resident memory in MB."""

    wall: float
    processor: float
    peak: float


def run(*words: str | Path, **environment: str) -> Took:
    """Run a command, which may keep its bytecode as an installed one does, and end if it fails."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [str(word) for word in words]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=kept | environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return Took(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)
