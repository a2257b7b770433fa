"""Where the result goes: whatever happens, there is the old directory, the new one, or nothing; no thread, no buffer."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT
from fairseq_models import save
from torch_files import entries

from convert import transfer
from convert.errors import ConvertError
from convert.package import compare_weights, convert
from convert.workspace import workspace


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints: what stands there already, and what replaces it."""
    folder = tmp_path_factory.mktemp("two")
    return save("ctc_base", folder / "old.pt", seed=1), save("ctc_base", folder / "new.pt", seed=2)


def state(out: Path, two: tuple[Path, Path]) -> str:
    """Say which of the two models stands there, whole, or that nothing does."""
    if not os.path.lexists(out):
        return "nothing"
    source = json.loads((out / "conversion.json").read_bytes())["source"]["name"]
    path = {path.name: path for path in two}[source]
    assert compare_weights(path, out) == []
    return path.stem


def _file(out: Path) -> None:
    out.write_bytes(b"mine")


def _folder(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_bytes(b"mine")


def _link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to("elsewhere")


def _dangling(out: Path) -> None:
    out.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_file, _folder, _link, _dangling])
@pytest.mark.parametrize(("overwrite", "code"), [(False, "exists"), (True, "not-ours")])
def test_something_else_is_never_replaced(
    make: Callable[[Path], None], overwrite: bool, code: str, two: tuple[Path, Path], tmp_path: Path
) -> None:
    make(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConvertError) as raised:
        convert(two[1], tmp_path / "model", overwrite=overwrite)
    assert (raised.value.code, raised.value.status) == (code, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_model_is_replaced_only_when_asked(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "model"
    convert(two[0], out)
    with pytest.raises(ConvertError) as raised:
        convert(two[1], out)
    assert raised.value.code == "exists"
    assert state(out, two) == "old"
    convert(two[1], out, overwrite=True)
    assert state(out, two) == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_empty_directory_is_taken(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    convert(two[1], tmp_path / "model")
    assert state(tmp_path / "model", two) == "new"


@pytest.mark.parametrize(("out", "code"), [("missing/model", "no-parent"), (".", "usage"), ("..", "usage")])
def test_impossible_place(
    out: str, code: str, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvertError) as raised:
        convert(two[1], out)
    assert raised.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_directory_that_holds_the_checkpoint_is_not_replaced(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "model"
    convert(two[0], out)
    (out / "new.pt").write_bytes(two[1].read_bytes())
    with pytest.raises(ConvertError) as raised:
        convert(out / "new.pt", out, overwrite=True)
    assert raised.value.code == "not-ours"
    assert (out / "new.pt").exists()


def command(two: tuple[Path, Path], *options: str) -> list[str]:
    """The command line that makes `model` of the new checkpoint."""
    return [sys.executable, "-m", "convert", "convert", str(two[1]), "model", *options]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("limit", [100, 20_000, 300_000])
def test_disk_full(limit: int, old: bool, two: tuple[Path, Path], tmp_path: Path) -> None:
    if old:
        convert(two[0], tmp_path / "model")
    done = subprocess.run(
        command(two, "--json", *(["--overwrite"] if old else [])),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert [problem["code"] for problem in json.loads(done.stdout)["problems"]] == ["system"]
    assert state(tmp_path / "model", two) == ("old" if old else "nothing")
    assert len(list(tmp_path.iterdir())) == int(old)


# Imports once; for each number that it reads, a fork converts and is killed at that call.
KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from convert import package, transfer
from convert.cli import main
import numpy
def arm(last):
    calls = []
    def stop(name):
        call = getattr(os, name)
        def stopped(*arguments, **named):
            calls.append(name)
            if len(calls) == last:
                os.kill(os.getpid(), signal.{signal})
            return call(*arguments, **named)
        setattr(os, name, stopped)
    for name in ("fsync", "posix_fallocate", "rename", "mkdir", "rmdir", "chmod", "unlink"):
        stop(name)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        arm(int(line))
        main({line!r}, prog_name="fairseq-to-hf")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM"])
def test_killed_at_every_step(kind: str, old: bool, two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "model"
    line = ["convert", str(two[1]), "model", "-q", *(["--overwrite"] if old else [])]
    program = [sys.executable, "-c", KILLED.format(signal=kind, line=line)]
    pipe = subprocess.PIPE
    seen = []
    with subprocess.Popen(
        program, cwd=tmp_path, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        for last in itertools.count(1):
            if old:
                convert(two[0], out, overwrite=True)
            print(last, file=process.stdin, flush=True)
            status = int(process.stdout.readline())
            seen.append((status, state(out, two)))
            if kind == "SIGTERM":  # time to clean up
                assert {entry.name for entry in tmp_path.iterdir()} <= {"model"}
            if status == 0:
                break
            convert(two[1], out, overwrite=True)  # a second run cleans up what the killed one left
            assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
            assert state(out, two) == "new"
            if not old:
                for path in sorted(out.iterdir()):
                    path.unlink()
                out.rmdir()
        process.stdin.close()
        assert "Traceback" not in process.stderr.read()
    assert len(seen) > 5
    assert {status for status, _ in seen[:-1]} == {-9 if kind == "SIGKILL" else 128 + getattr(signal, kind)}
    assert seen[0][1] == ("old" if old else "nothing")
    assert seen[-1] == (0, "new")
    assert {where for _, where in seen} == {"old" if old else "nothing", "new"}


@pytest.mark.parametrize("old", [False, True])
def test_killed_at_any_moment(old: bool, two: tuple[Path, Path], tmp_path: Path) -> None:
    rng = random.Random(old)
    for _ in range(10):
        if old:
            convert(two[0], tmp_path / "model", overwrite=True)
        process = subprocess.Popen(
            command(two, "--overwrite"), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.02, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state(tmp_path / "model", two) in (("old", "new") if old else ("nothing", "new"))
    convert(two[1], tmp_path / "model", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_leftover_of_a_living_process_stays(two: tuple[Path, Path], tmp_path: Path) -> None:
    with workspace(tmp_path / "model") as work:
        convert(two[1], tmp_path / "model")
        assert work.is_dir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def _damaged(path: Path, entry: str) -> None:
    data, piece = bytearray(path.read_bytes()), entries(path)[entry]
    data[data.index(piece) + len(piece) // 2] ^= 1
    path.write_bytes(data)


def _infinite(path: Path) -> None:
    state = torch.load(path, weights_only=False)
    next(reversed(state["model"].values())).fill_(torch.inf)
    torch.save(state, path)


def _interrupt(*_: int) -> None:
    raise KeyboardInterrupt


def _shorten(path: Path) -> Callable[[int, int], None]:
    return lambda *_: os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("adam", [False, True], ids=["model", "adam"])  # with it, a second thread hashes the source
@pytest.mark.parametrize(
    "how", ["first entry", "an entry", "infinite", "interrupted", "shortened", "one shard of many"]
)
def test_nothing_stays_in_the_process(how: str, adam: bool, tmp_path: Path) -> None:
    """Each thread and each set of buffers that a refusal left would stay for the life of the process."""
    path = save("ctc_base", tmp_path / "checkpoint.pt", adam=adam)
    options: dict[str, Any] = {}
    if how in ("first entry", "an entry"):
        _damaged(path, "data/0" if how == "first entry" else "data/20")
    elif how == "infinite":
        _infinite(path)
    elif how == "one shard of many":
        _damaged(path, "data/20")
        options["max_shard_size"] = 20_000
    else:
        options["progress"] = _interrupt if how == "interrupted" else _shorten(path)
    threads = threading.active_count()
    gc.collect()
    gc.disable()  # a cycle would keep the buffers until a collection, which a process with many objects rarely makes
    try:
        for _ in range(5):
            with pytest.raises((ConvertError, KeyboardInterrupt)):
                convert(path, tmp_path / "model", **options)
        assert threading.active_count() == threads
        assert [found for found in gc.get_objects() if isinstance(found, transfer.Transfer)] == []
    finally:
        gc.enable()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("which", ["_Prover", "ThreadPoolExecutor"])
def test_no_thread_to_be_had(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("ctc_base", tmp_path / "checkpoint.pt", adam=True)
    threads, size, made = threading.active_count(), threading.stack_size(), getattr(transfer, which)

    def without_memory(*arguments: Any) -> Any:
        threading.stack_size(1 << 62)  # no machine has the memory for this stack
        return made(*arguments)

    monkeypatch.setattr(transfer, which, without_memory)
    try:
        with pytest.raises(ConvertError) as raised:
            convert(path, tmp_path / "model")
    finally:
        threading.stack_size(size)
    assert (raised.value.code, raised.value.status) == ("threads", 2)
    assert raised.value.message == "can't start new thread; nothing was written"
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_another_interpreter_ends_with_the_command(
    number: signal.Signals, two: tuple[Path, Path], tmp_path: Path
) -> None:
    python, told, temporary = tmp_path / "python", tmp_path / "told", tmp_path / "temporary"
    python.write_text(f"#!/bin/sh\necho $$ > {told}.new; mv {told}.new {told}; exec sleep 600\n")
    python.chmod(0o755)
    temporary.mkdir()
    line = [sys.executable, "-m", "convert", "record", str(two[0]), "out", "--json", "--fairseq-python", str(python)]
    with subprocess.Popen(
        line,
        cwd=tmp_path,
        env=ENVIRONMENT | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        deadline = time.monotonic() + 600
        while not told.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child = int(told.read_text())
        os.kill(child, 0)  # the control: it lives
        process.send_signal(number)
        text, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + number, b"")
    assert [problem["code"] for problem in json.loads(text)["problems"]] == ["interrupted"]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "temporary", "told"]
