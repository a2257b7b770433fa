"""`accelerate launch` over two processes gives exactly the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from evaluate_fixtures import LONG, write_manifest, write_model

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("jiwer")
pytest.importorskip("accelerate", reason="accelerate is not installed: several processes were not tested")

from convert.evaluation import evaluate

SHARE = """
import json, os, sys
from convert.evaluation import evaluate
from convert.evaluation.recognize import Recognizer

transcribed, real = [], Recognizer.transcribe
Recognizer.transcribe = lambda self, batch: transcribed.extend(u.name for u in batch) or real(self, batch)
model, manifest, out = sys.argv[1:]
result = evaluate(model, manifest=manifest, device="cpu", batch_size=3)
mine = {"processes": int(os.environ["WORLD_SIZE"]), "transcribed": transcribed, "entry": result.entry(), "rows": [r.hypothesis for r in result.rows]}
open(f"{out}/rank-{os.environ['RANK']}.json", "w").write(json.dumps(mine))
"""


def launch(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Start two processes as `accelerate launch` starts them; `--multi_gpu` means several processes, on a CPU too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    port = ("--main_process_port", "0")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        *port,
        *arguments,
    ]
    return subprocess.run(
        list(map(str, command)), env=environment, cwd=cwd, capture_output=True, text=True, timeout=200
    )


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data", LONG)
    alone = evaluate(model, manifest=manifest)
    single = (model / "evaluation.json").read_bytes()
    (model / "evaluation.json").unlink()
    (tmp_path / "share.py").write_text(SHARE)
    done = launch(tmp_path / "share.py", model, manifest, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [part["processes"] for part in ranks] == [2, 2]
    assert [sorted(part["transcribed"]) for part in ranks] == [
        sorted(f"clip-{index}.wav" for index in range(rank, 15, 2)) for rank in (0, 1)
    ]
    assert all(part["entry"] == alone.entry() for part in ranks)
    assert all(part["rows"] == [row.hypothesis for row in alone.rows] for part in ranks)
    assert (model / "evaluation.json").read_bytes() == single
    printed = launch("-m", "convert", "evaluate", model, "--manifest", manifest, "--json", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr[-3000:]
    assert json.loads(printed.stdout)["result"] == alone.entry()  # one object
