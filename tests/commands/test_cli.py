"""The command line: outcomes, exit statuses, one JSON object, silence, and help that keeps its word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import fairseq_models
import pytest
from click.testing import CliRunner
from command_line import BUNDLED, ROOT, Ran
from fairseq_models import save

from convert import cli
from convert.cli import COMMANDS, Outcome
from convert.errors import ConvertError

Command = Callable[..., Ran]


def test_inspect(command: Command) -> None:
    done = command("inspect", BUNDLED)
    assert done.status == 0
    assert "wav2vec_ctc (4 layers, 128 wide, 4 heads)" in done.text
    assert "31 symbols: <s> <pad> </s> <unk> |" in done.text and "all known to be harmless" in done.text
    assert done.data["parameters"] == 1_026_207 and done.data["architecture"] == "wav2vec_ctc"
    assert done.data["tensors"]["w2v_encoder.proj.bias"] == {"shape": [31], "dtype": "F32"}


def test_plan(command: Command) -> None:
    done = command("plan", BUNDLED)
    assert done.status == 0
    assert "w2v_encoder.proj.weight -> lm_head.weight" in done.text
    assert "encoder.layers.{0...3}.fc1.weight" in done.text
    assert done.data["config"]["do_stable_layer_norm"]["value"] is True
    assert done.data["drops"] == done.data["fills"] == done.data["edits"] == []


def test_quiet_json_is_json() -> None:
    for line, status in (("plan -q --json", 0), ("plan --head classification -q --json", 1), ("fetch -q --json", 2)):
        done = CliRunner().invoke(cli.main, [*line.split(), *([str(BUNDLED)] if "plan" in line else [])])
        assert (done.exit_code, json.loads(done.stdout)["ok"]) == (status, status == 0)


def test_a_refused_plan_lists_every_reason(command: Command, tmp_path: Path) -> None:
    path = save(fairseq_models.REFUSED["target_glu"], tmp_path / "model.pt")
    done = command("plan", path)
    assert done.status == 1 and done.text == ""
    assert {problem["code"] for problem in done.data["problems"]} == {"unexpected-tensor", "unsupported-setting"}
    assert done.error.splitlines() == [
        "error: model.pt cannot be converted completely; nothing was written",
        "  unexpected-tensor: target_glu.0.bias: has no place in the model; its shape is (48,)",
        "  unexpected-tensor: target_glu.0.weight: has no place in the model; its shape is (48, 24)",
        "  unsupported-setting: target_glu: is True: Wav2Vec2ForPreTraining has no gated linear unit on its targets",
    ]


def test_convert_and_restore(command: Command, tmp_path: Path) -> None:
    done = command("convert", BUNDLED, "out", "--overwrite")
    assert done.status == 0 and "each byte read back and compared" in done.text
    assert done.data["class"] == "Wav2Vec2ForCTC" and "model.safetensors" in done.data["files"]
    assert command("restore", "out", "back.pt", "--overwrite").status == 0
    existing = command("convert", BUNDLED, "out")
    assert existing.status == 2 and "--overwrite" in existing.error and existing.data["problems"][0]["code"] == "exists"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back.pt", "out"]


def test_fetch_lists_and_refuses(command: Command) -> None:
    assert len(command("fetch", "--list").data["entries"]) > 50
    assert command("fetch", "wav2vec2-bse").status == 2


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "absent.pt"],
        ["plan", "absent.pt"],
        ["convert", "absent.pt", "out"],
        ["restore", "absent", "back.pt"],
    ],
)
def test_what_is_not_there_is_exit_2(words: list[str], command: Command) -> None:
    assert command(*words).status == 2


def plain(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "convert", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def test_usage_errors_are_exit_2() -> None:
    for words in (["nonsense"], ["convert"], ["convert", "a", "b", "--dtype", "int3"]):
        done = plain(*words)
        assert done.returncode == 2 and done.stdout == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_three_real_commands(name: str) -> None:
    done = plain(name, "--help")
    assert done.returncode == 0
    examples = re.findall(rf"^ *fairseq-to-hf {name} .+$", done.stdout, re.MULTILINE)
    assert len(examples) >= 3
    assert done.stdout.rstrip().splitlines()[-1].strip() == examples[-1].strip()
    for example in examples:  # every option of an example is one that the command has
        for option in re.findall(r" (--?[a-z-]+)", example):
            assert re.search(rf"(^|[\s,]){option}\b", done.stdout.split("Options:")[1].split("Examples:")[0]), option


def test_what_help_and_inspect_import() -> None:
    code = (
        "from convert.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    # half of the time of these commands is imports: a standard module here takes 2 to 20 ms, a room of the product as much
    slow = {
        "asyncio",
        "concurrent",
        "email",
        "http",
        "importlib.metadata",
        "logging",
        "random",
        "socket",
        "ssl",
        "tempfile",
    }
    unneeded = (
        "conversion",
        "directory",
        "fetching",
        "network",
        "package",
        "publishing",
        "restoration",
        "transfer",
        "verification",
    )
    for words in (["--help"], ["inspect", str(BUNDLED)]):
        command = [sys.executable, "-c", f"import sys; before = set(sys.modules); {code}", *words]
        names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stderr.split()
        others = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert others == {"click", "convert"}
        assert [
            name for name in names if name in slow or name.startswith(tuple(f"convert.{room}" for room in unneeded))
        ] == []
        if words == ["--help"]:
            modules = {name for name in names if name.startswith("convert.")}
            assert modules == {"convert.cli", "convert.errors", "convert.interrupts", "convert.report"}


def test_verbose_keeps_the_status_and_the_hint() -> None:
    done = plain("plan", "absent.pt", "-v")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback") and "hint: " in done.stderr.splitlines()[-1]


def test_usage_errors_are_json_too() -> None:
    for words in (["convert", "--json"], ["plan", "x.pt", "--head", "tail", "--json"]):
        done = plain(*words)
        assert done.returncode == 2
        assert json.loads(done.stdout)["problems"][0]["code"] == "usage"


def test_overwrite_removes_nothing_of_ones_own(tmp_path: Path) -> None:
    assert plain("convert", str(BUNDLED), str(tmp_path / "out")).returncode == 0
    (tmp_path / "out/notes.txt").write_text("mine")
    done = plain("convert", str(BUNDLED), str(tmp_path / "out"), "--overwrite")
    assert done.returncode == 2 and "notes.txt" in done.stderr
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_json_is_one_object_on_failure_too(tmp_path: Path) -> None:
    done = plain("convert", str(tmp_path / "absent.pt"), str(tmp_path / "out"), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"][0]["code"] == "missing-file"


# what a command's function raises -> exit status, code, a part of the message, and of the hint
RAISED: dict[str, tuple[Exception, int, str, str, str]] = {
    "no": (ConvertError("no", code="no", status=1), 1, "no", "no", ""),
    "package": (
        ModuleNotFoundError("No module", name="torch.nn"),
        2,
        "missing-package",
        "verify needs torch",
        "[verify]",
    ),
    "drawing": (ModuleNotFoundError("No module", name="matplotlib"), 2, "missing-package", "matplotlib", "[plot]"),
    "broken": (ImportError("libx.so: \x1b[1m", name="torch"), 2, "missing-package", "imported: libx.so: \\x1b[1m", ""),
    "file": (FileNotFoundError(2, "No such file", "a\nb"), 2, "system", "a\\nb: No such file", ""),
    "disk": (OSError(28, "No space left", "a"), 2, "system", "a: No space left", "free some space"),
    "memory": (MemoryError(), 2, "memory", "not enough memory", ""),
    "depth": (RecursionError("maximum recursion depth exceeded"), 2, "too-deep", "nested too deeply", ""),
    "text": (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        2,
        "unexpected",
        "UnicodeDecodeError: 'utf-8'",
        "report",
    ),
    "fault": (KeyError("https://me:secret@x/\nmore"), 2, "unexpected", "KeyError: 'https://x/", "please report it"),
    "silent": (ValueError(), 2, "unexpected", "ValueError: without a message", "please report it"),
}


@pytest.mark.parametrize("name", RAISED)
def test_whatever_is_raised_is_one_error(name: str) -> None:
    raised, status, code, message, hint = RAISED[name]

    def function() -> Outcome:
        raise raised

    made = cli.command("verify", "example")(function)
    text, as_json, verbose = (CliRunner().invoke(made, words) for words in ([], ["--json"], ["-v"]))
    assert (text.exit_code, as_json.exit_code, verbose.exit_code) == (status, status, status)
    data = json.loads(as_json.stdout)
    assert not data["ok"] and data["problems"][0]["code"] == code and hint in data["hint"]
    assert text.stdout == "" and text.stderr.startswith("error: ") and message in text.stderr
    assert "Traceback" in verbose.stderr and "Traceback" not in text.stderr and "\x1b" not in verbose.stderr
    assert "secret" not in text.stderr + as_json.stdout


def test_a_command_may_end_itself() -> None:
    def function() -> Outcome:
        click.get_current_context().exit(1)

    assert CliRunner().invoke(cli.command("verify", "example")(function), []).exit_code == 1


def test_names_from_the_command_line_are_shown() -> None:
    for words in (["inspect", "\x07.pt"], ["\x07"], ["inspect", "a.pt", "\x07"]):
        done = plain(*words)
        assert done.returncode == 2 and "\\x07" in done.stderr and "\x07" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_and_always_utf_8_in_json(encoding: str, tmp_path: Path) -> None:
    name = str(tmp_path / "é→.pt")
    for words in (["inspect", name], ["inspect", "--json", name]):
        line = [sys.executable, "-m", "convert", *words]
        done = subprocess.run(line, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 2 and b"Traceback" not in done.stderr
        if "--json" in words:
            assert json.loads(done.stdout.decode())["problems"][0]["key"] == "é→.pt"
        else:
            assert done.stderr.startswith(b"error: ")
