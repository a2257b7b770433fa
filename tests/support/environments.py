"""Verifies and records in other environments: in processes of other instruction sets, libraries and threads.

`python environments.py verify WORK NAME [OTHER ...]` verifies every model of WORK with live fairseq and with the recordings
that were made under each OTHER, records the answers as NAME, and writes what it found to WORK/NAME.json.
`python environments.py record CHECKPOINT FILE OPTIONS [INPUT ...]` records a checkpoint with options in JSON.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
HEADS = ("speech-even", "speech-odd", "padded-batch", "quiet", "silence")  # for models that differ in their heads
ENVIRONMENTS["other-products"] = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}


def run(work: Path, name: str, others: Sequence[str] = (), **variables: str) -> list[dict[str, Any]]:
    """Verify the models of a folder in one of `ENVIRONMENTS`, or in one of one's own, and return what was found."""
    _start(ENVIRONMENTS.get(name, {}) | variables, "verify", work, name, *others)
    found: list[dict[str, Any]] = json.loads((work / f"{name}.json").read_text())
    return found


@functools.cache
def recorded_elsewhere(checkpoint: Path, model: Path) -> Path:
    """Record a checkpoint, as it was converted, in an environment that computes other bits than this process."""
    from verify_models import KEPT

    level = torch.backends.cpu.get_cpu_capability().lower()
    other = next(name for name in reversed(ENVIRONMENTS) if not name.startswith((level, "other")))
    options: dict[str, Any] = {}
    if checkpoint.with_name("config.yaml").exists():
        language = json.loads((model / "conversion.json").read_text())["request"].get("language")
        options = {"data_config": str(checkpoint.with_name("config.yaml")), "language": language}
    made = model.with_name(f"{model.name}.elsewhere.safetensors")
    _start(ENVIRONMENTS[other], "record", checkpoint, made, json.dumps(options), *KEPT.get("names", ()))
    return made


def _start(variables: Mapping[str, str], *arguments: Any) -> None:
    """Run this file in an environment."""
    unset = {key for environment in ENVIRONMENTS.values() for key in environment}
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    # threads that wait asleep compute the same, and leave a busy machine to the others
    patient = {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(line, env={**kept, **patient, **variables}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variables}: {done.stderr[-2000:]}")


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


def verify_all(work: Path, name: str, *others: str) -> None:
    """Verify every model of `many_models.make_models`."""
    from verify_models import computed_once, few_inputs, short_inputs

    from convert.verification import record
    from convert.verification.fairseq_side.machine import bits

    found: list[Mapping[str, Any]] = [{"model": "", "bits": bits()}]
    recordings = work / "recordings" / name
    recordings.mkdir(parents=True, exist_ok=True)
    for model in sorted(path for path in (work / "models").iterdir() if path.is_dir()):
        folder = work / "checkpoints" / model.name
        checkpoint = folder / "model.pt" if (folder / "model.pt").exists() else folder
        options: dict[str, Any] = {}
        if model.name.startswith("speech_to_text"):
            asked = json.loads((model / "conversion.json").read_text())["request"]
            options = {"data_config": folder / "config.yaml", "language": asked.get("language")}
        few = few_inputs(*HEADS) if model.name.startswith("head-") else nullcontext()
        with short_inputs(), few, computed_once():
            found.append(_verify(model.name, checkpoint, model, "live"))
            for other in others:
                reference = work / "recordings" / other / model.name
                found.append(_verify(model.name, checkpoint, model, other, reference=reference))
            record(checkpoint, recordings / model.name, long=False, overwrite=True, **options)
    (work / f"{name}.json").write_text(json.dumps(found))


def record_one(checkpoint: str, out: str, options: str, *names: str) -> None:
    """Record one checkpoint, with some of the inputs or all."""
    from verify_models import few_inputs, short_inputs

    from convert.verification import record

    with short_inputs(), few_inputs(*names) if names else nullcontext():
        record(checkpoint, out, long=False, **json.loads(options))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if sys.argv[1] == "verify":
        verify_all(Path(sys.argv[2]), *sys.argv[3:])
    else:
        record_one(*sys.argv[2:])
