"""Runs every command with a pipe, a device or a directory where it expects a file, in a process that has nothing else in it.

`python irregular.py KIND FOLDER` prints how often each outcome was seen, as JSON, or the traceback of what should never be
seen. A limit of time ends what would wait for ever, and one of address space what would read for ever.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from evaluate_fixtures import write_audio, write_manifest
from fairseq_models import LETTERS, save
from verify_models import few_inputs, short_inputs

SECONDS = 120  # for one command, most of which take less than one
BYTES = 3_000_000_000  # beyond what the process has when it starts
KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": Path.mkdir,
}
OPTIONAL = {"LICENSE", "README.md", "evaluation.json", "verification.json", "sample.wav", "vocab.json"}


def setting(folder: Path) -> None:
    """Make everything that the commands below are given."""
    import numpy as np

    from convert.package import convert
    from convert.verification import record

    save("ctc_base", folder / "model.pt")
    record(folder / "model.pt", folder / "reference.safetensors", long=False)
    (folder / "dict.txt").write_text("".join(f"{letter} 1\n" for letter in LETTERS))
    save("pretrained_base", folder / "base.pt")
    convert(folder / "model.pt", folder / "model")
    for name in OPTIONAL - {"vocab.json", "sample.wav"}:
        (folder / "model" / name).write_text("{}")
    write_audio(folder / "model" / "sample.wav", np.zeros(800, "f4"))
    write_manifest(folder, ("THE FOX", "A DOG"))
    for name in ("recordings", "librispeech", "dataset"):
        write_audio(folder / name / "a.wav", np.zeros(8000, "f4"))
    (folder / "recordings" / "a.txt").write_text("A")
    (folder / "librispeech" / "x.trans.txt").write_text("a A\n")
    (folder / "dataset" / "metadata.csv").write_text("file_name,text\na.wav,A\n")
    (folder / "config.yaml").write_text("vocab_filename: dict.txt\n")
    (folder / "all").mkdir()
    shutil.copy(folder / "base.pt", folder / "all" / "base.pt")
    (folder / "fetched").mkdir()
    for suffix in ("pt", "dict.txt"):
        file = folder / "fetched" / f"wav2vec2-base-960h.{suffix}"
        file.write_bytes(b"a")
        record = {
            "name": "x",
            "address": "https://example.org/x",
            "size": 1,
            "sha256": hashlib.sha256(b"a").hexdigest(),
        }
        file.with_name(f"{file.name}.json").write_text(json.dumps(record | {"etag": None}))


def cases(folder: Path) -> list[tuple[str, str]]:
    """List (the file that is replaced, the command)."""
    model = sorted(path.name for path in (folder / "model").iterdir())
    planned = ["--dict dict.txt", "--base base.pt", "--data-config config.yaml"]
    listed = [
        ("model.pt", "inspect model.pt"),
        ("all/base.pt", "convert all made --all"),
        ("base.pt", "inspect model.pt --base base.pt"),
    ]
    for command in ("plan model.pt", "convert model.pt made", "record model.pt made --no-long"):
        listed += [("model.pt", command), *((option.split()[1], f"{command} {option}") for option in planned)]
    listed += [("dict.txt", "plan model.pt --data-config config.yaml"), ("made", "convert model.pt made")]
    listed += [
        ("made", f"{command} made{more}")
        for command in ("restore model", "record model.pt")
        for more in ("", " --overwrite")
    ]
    listed += [
        ("made", "convert model.pt made --overwrite"),
        ("python", "record model.pt made --fairseq-python ./python"),
    ]
    listed += [
        ("a.wav", "record model.pt made --audio a.wav"),
        ("recordings/a.wav", "record model.pt made --audio recordings"),
    ]
    proof = "verify model.pt model --reference reference.safetensors --device cpu --no-long"
    listed += [("model.pt", proof), ("reference.safetensors", proof), ("dict.txt", f"{proof} --dict dict.txt")]
    listed += [("base.pt", f"{proof} --base base.pt"), ("plot.png", f"{proof} --plot plot.png")]
    listed += [("python", "verify model.pt model --device cpu --fairseq-python ./python")]
    words = "evaluate model --device cpu"
    listed += [(f"set.{kind}", f"{words} --manifest set.tsv") for kind in ("tsv", "ltr", "wrd")]
    listed += [
        ("audio/clip-0.wav", f"{words} --manifest set.tsv"),
        ("t", f"{words} --manifest set.tsv --transcripts t"),
    ]
    listed += [("model.pt", f"{words} --manifest set.tsv --reference fairseq --checkpoint model.pt")]
    listed += [(f"recordings/a.{kind}", f"{words} --folder recordings") for kind in ("wav", "txt")]
    listed += [("librispeech/x.trans.txt", f"{words} --folder librispeech")]
    listed += [(f"dataset/{name}", f"{words} --dataset dataset --split train") for name in ("metadata.csv", "a.wav")]
    for name in model:
        commands = [proof, "restore model made", f"{words} --manifest set.tsv", "publish model me/model --dry-run"]
        listed += [(f"model/{name}", command) for command in commands]
    fetched = sorted(path.name for path in (folder / "fetched").iterdir())
    listed += [(f"fetched/{name}", "fetch wav2vec2-base-960h --directory fetched") for name in fetched]
    return listed


class _HangError(BaseException):
    pass


def _hang(*_: object) -> None:
    raise _HangError(f"more than {SECONDS} seconds")


def outcome(words: list[str]) -> tuple[int, str]:
    """Run one command; return its status and its first problem's code."""
    from convert.cli import main

    told, said = io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(told), redirect_stderr(said):
            main([*words, "--json"])
        raise AssertionError("it returned")
    except SystemExit as end:
        answer = json.loads(told.getvalue())
        codes = [problem["code"] for problem in answer["problems"]] or [""]
        assert end.code in (0, 1, 2) and answer["ok"] == (end.code == 0), end.code
        assert "Traceback" not in said.getvalue(), said.getvalue()
        assert not {"unexpected", "memory"} & {*codes}, answer
        return int(end.code), codes[0]
    finally:
        signal.alarm(0)


def main(kind: str, where: str) -> None:
    """Run all commands with files of one kind."""
    folder, outcomes = Path(where), Counter[str]()
    setting(folder)
    shutil.copytree(folder, folder.with_name("kept"))
    os.chdir(folder)
    signal.signal(signal.SIGALRM, _hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
    for name, command in cases(folder):
        victim = folder / name
        if victim.exists():
            victim.unlink()
        KINDS[kind](victim)
        try:
            status, code = outcome(command.split())
            optional = victim.name in OPTIONAL | {"base.pt"} or (kind == "directory" and victim.suffix in ("", ".wav"))
            assert status or optional, "it succeeded"
            assert sorted(folder.rglob(".fairseq-to-hf*")) == [], "left behind"
        except BaseException:
            print(f"{kind} as {name}: {command}", file=sys.stderr)
            raise
        outcomes[code] += 1
        os.chdir(folder.parent)
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("kept"), folder)
        os.chdir(folder)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    with short_inputs(), few_inputs("speech-even", "quiet"):
        main(*sys.argv[1:])
