"""Verifies many models in one process, in the environment that it was started with.

`python tests/support/environments.py WORK NAME [OTHER ...]` verifies every model of WORK with live fairseq and with the recordings
that were made under each OTHER, records the answers as NAME, and writes what it found to WORK/NAME.json.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from command_line import ROOT

# what people's machines have, as far as this one can compute like another; without the instructions, a process would die
LEVELS = {"AVX512": ("default", "avx2", "avx512"), "AVX2": ("default", "avx2")}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    f"{level}-{isa}-{threads}": {"ATEN_CPU_CAPABILITY": level, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": threads}
    for level in LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    for isa in ("SSE41", "AVX2", "AVX512_CORE", "ALL")
    for threads in ("1", "2")
}
ENVIRONMENTS["other-products"] = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}


def run(work: Path, name: str, others: Sequence[str] = (), **variables: str) -> list[dict[str, Any]]:
    """Run this file in one of `ENVIRONMENTS`, or in one of one's own, and return what it found."""
    unset = {key for environment in ENVIRONMENTS.values() for key in environment}
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    # threads that wait asleep compute the same, and leave a busy machine to the others
    patient = {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    environment = {**kept, **patient, **ENVIRONMENTS.get(name, {}), **variables}
    line = [sys.executable, __file__, str(work), name, *others]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads((work / f"{name}.json").read_text())
    return found


@contextmanager
def _noting(nearest: list[Any]) -> Iterator[None]:
    """Note how near each stage of each input comes to what is allowed in float64."""
    from convert.verification import device_run

    original = device_run.judge

    def judge(*arguments: Any, **options: Any) -> Any:
        made = original(*arguments, **options)
        for one in made:
            for stage in one.differences:
                if stage.exact and stage.exact_allowed:
                    nearest.append([stage.exact / stage.exact_allowed, one.probe.name, stage.stage])
        return made

    device_run.judge = judge
    try:
        yield
    finally:
        device_run.judge = original


def _verify(name: str, checkpoint: Path, model: Path, against: str, **options: Any) -> dict[str, Any]:
    from convert.verification import verify

    nearest: list[Any] = [[0.0, "", ""]]
    with _noting(nearest):
        done = verify(checkpoint, model, devices=["cpu"], write=False, **options)
    required = {run["require"] for run in done.report["runs"]}
    problems = [f"{problem.code}: {problem.key}: {problem.detail}" for problem in done.problems]
    return {
        "model": name,
        "against": against,
        "problems": problems,
        "nearest": max(nearest),
        "required": sorted(required),
    }


def main(work: Path, name: str, others: Sequence[str]) -> None:
    """Verify every model of a folder: `NAME.pt` or what it links to, and the directory `NAME`."""
    from verify_models import short_inputs

    from convert.verification import record
    from convert.verification.fairseq_side.machine import bits

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: list[Mapping[str, Any]] = [{"model": "", "bits": bits()}]
    recordings = work / "recordings" / name
    recordings.mkdir(parents=True, exist_ok=True)
    with short_inputs():
        for model in sorted(path for path in (work / "models").iterdir() if path.is_dir()):
            checkpoint = model.with_suffix(".pt")
            found.append(_verify(model.name, checkpoint, model, "live"))
            for other in others:
                reference = work / "recordings" / other / model.name
                found.append(_verify(model.name, checkpoint, model, other, reference=reference))
            options = {"data_config": model.with_suffix(".yaml")} if model.with_suffix(".yaml").exists() else {}
            record(checkpoint, recordings / model.name, long=False, overwrite=True, **options)
    (work / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
