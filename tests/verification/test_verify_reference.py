"""fairseq in this process, in another interpreter, and from a recording; what is refused; and the commands."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from command_line import ROOT, Ran
from fairseq_models import save
from verify_models import converted, edit, short_inputs

from convert.checkpoint import open_checkpoint
from convert.errors import ConvertError
from convert.package import convert
from convert.verification import Verification, inputs, record, verify
from convert.verification.fairseq_side.tensorfile import read, write
from convert.verification.recording import Recorded
from convert.verification.reference import answering


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads wait for each other
    with short_inputs(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return converted("ctc_base", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def recording(base: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(base[0], tmp_path_factory.mktemp("recording") / "reference.safetensors")


@pytest.fixture
def copy(base: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint, and a model directory that may be damaged."""
    return base[0], Path(shutil.copytree(base[1], tmp_path / "damaged"))


def codes(done: Verification) -> set[str]:
    return {problem.code for problem in done.problems}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_absent_device_is_no_skip(base: tuple[Path, Path]) -> None:
    with pytest.raises(ConvertError, match="cuda:99") as caught:
        verify(*base, devices=["cuda:99"])
    assert (caught.value.code, caught.value.status) == ("no-device", 2)


class Unknown:
    """A class that no trainer of fairseq pickles."""


def test_a_pickle_with_a_class_of_the_users_own(tmp_path: Path) -> None:
    checkpoint = save("ctc_base", tmp_path / "model.pt")
    state = torch.load(checkpoint, weights_only=False)
    state["extra_state"]["mine"] = Unknown()
    torch.save(state, checkpoint)
    model = convert(checkpoint, tmp_path / "converted").path
    assert verify(checkpoint, model, long=False).passed
    assert record(checkpoint, tmp_path / "reference.safetensors", long=False).is_file()


def test_a_damaged_tensor_is_not_recorded(tmp_path: Path) -> None:
    """As `convert` refuses it: torch itself does not look."""
    path = save("ctc_base", tmp_path / "model.pt")
    data = bytearray(path.read_bytes())
    with open_checkpoint(path) as opened:
        where = opened.container.storages[opened.tensors["w2v_encoder.proj.weight"].storage.key]
    data[where.start + 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=False)
    with pytest.raises(ConvertError) as refused:
        record(path, tmp_path / "recording")
    assert (refused.value.code, refused.value.status) == ("corrupted-entry", 2)
    assert not (tmp_path / "recording").exists()


def test_a_directory_of_another_checkpoint(base: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="was made from") as caught:
        verify(save("ctc_base", tmp_path / "other.pt", seed=5), base[1])
    assert (caught.value.code, caught.value.status) == ("other-checkpoint", 1)


def test_the_users_recordings(base: tuple[Path, Path], tmp_path: Path) -> None:
    speech = inputs.bundled()
    soundfile.write(tmp_path / "mine.flac", speech[:5000], 16000)
    soundfile.write(tmp_path / "other.wav", speech[:6001], 16000)
    done = verify(*base, audio=[tmp_path], write=False, long=False)
    named = {run["input"]: run["verdict"] for run in done.report["runs"]}
    assert named["mine.flac"] == named["other.wav"] == "identical"
    assert done.passed
    soundfile.write(tmp_path / "fast.wav", speech, 44100)
    with pytest.raises(ConvertError, match=r"fast\.wav: its sampling rate is 44100 Hz") as caught:
        verify(*base, audio=[tmp_path])
    assert (caught.value.code, caught.value.status) == ("bad-audio", 2)


def test_the_normalisation_explains_only_what_it_can(tmp_path: Path) -> None:
    checkpoint, model = converted("ctc_large", tmp_path)
    told = [{one["verdict"] for one in verify(checkpoint, model, long=False, write=False).report["end_to_end"]}]
    edit(model / "config.json", layer_norm_eps=1e-3)
    done = verify(checkpoint, model, long=False, write=False)
    assert [*told, {one["verdict"] for one in done.report["end_to_end"]}] == [{"explained"}, {"different"}]
    assert {one["why"] for one in done.report["end_to_end"]} == {"the models differ on equal inputs too"}


# --- recordings and other interpreters ------------------------------------------------------------------------------

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "fairseq":
            raise ImportError("fairseq is blocked")
sys.meta_path.insert(0, Block())
from convert.verification import assert_identical, verify
from convert.errors import ConvertError
try:
    verify(sys.argv[1], sys.argv[2], write=False)
    raise SystemExit("fairseq was there")
except ConvertError as error:
    assert (error.code, error.status) == ("no-fairseq", 2), error
done = assert_identical(sys.argv[1], sys.argv[2], reference=sys.argv[3])
assert done.report["reference"]["kind"] == "recording"
print(sorted({run["verdict"] for run in done.report["runs"] if run["require"] == "identical"}))
"""


def test_a_recording_needs_no_fairseq(base: tuple[Path, Path], recording: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", BLOCKED, *map(str, (*base, recording))]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['identical']"  # the same environment: bit for bit


def test_a_recording_is_the_live_answer(base: tuple[Path, Path], recording: Path) -> None:
    live, recorded = verify(*base, write=False), verify(*base, reference=recording, write=False)
    keys = ("input", "verdict", "require", "frames")
    assert [[run[key] for key in keys] for run in live.report["runs"]] == [
        [run[key] for key in keys] for run in recorded.report["runs"]
    ]
    assert recorded.passed and all(control["caught"] for control in recorded.report["controls"])


def test_a_recording_from_elsewhere_needs_rounding_only(
    base: tuple[Path, Path], recording: Path, tmp_path: Path
) -> None:
    arrays, about = read(str(recording))
    facts = json.loads(about)
    facts["bits"]["norms"] = 64 * "0"
    facts["environment"]["torch"] = "1.6.0"
    write(str(tmp_path / "elsewhere"), arrays, json.dumps(facts))
    done = verify(*base, reference=tmp_path / "elsewhere", write=False)
    assert done.passed
    assert {run["require"] for run in done.report["runs"]} == {"rounding"}
    other = "this machine computes other bits than the one that recorded (norms; torch 1.6.0 there, "
    assert any(run["why"].startswith(other) for run in done.report["runs"])


def test_names_of_the_environment_decide_nothing(base: tuple[Path, Path], recording: Path, tmp_path: Path) -> None:
    """Where the digest is the same, identity is required; where an old recording has none, it is not."""
    arrays, about = read(str(recording))
    facts = json.loads(about)
    facts["environment"] |= {"torch": "1.6.0", "threads": 64, "cpu": "unknown"}
    write(str(tmp_path / "renamed"), arrays, json.dumps(facts))
    done = verify(*base, reference=tmp_path / "renamed", write=False)
    assert done.passed and {run["verdict"] for run in done.report["runs"] if not run["why"]} == {"identical"}
    old = json.loads(about)
    for name in ("bits", "blank"):
        del old[name]
    write(str(tmp_path / "old"), arrays, json.dumps(old))
    done = verify(*base, reference=tmp_path / "old", write=False)
    assert done.passed and {run["require"] for run in done.report["runs"]} == {"rounding"}
    assert done.report["reference"]["unlike"] == "the recording has no digest of the bits that its machine computes"


def test_a_changed_recording_fails(base: tuple[Path, Path], recording: Path, tmp_path: Path) -> None:
    arrays, about = read(str(recording))
    key = next(key for key in arrays if key.endswith(".logits"))
    arrays[key][7] += np.float32(0.001)
    write(str(tmp_path / "changed"), arrays, about)
    done = verify(*base, reference=tmp_path / "changed", write=False)
    assert "different" in codes(done)


def test_a_recording_that_is_none(base: tuple[Path, Path], recording: Path, tmp_path: Path) -> None:
    other = save("ctc_base", tmp_path / "other.pt", seed=5)
    model = convert(other, tmp_path / "converted").path
    with pytest.raises(ConvertError, match=r"is a recording of model\.pt .* not of other\.pt") as caught:
        verify(other, model, reference=recording)
    assert (caught.value.code, caught.value.status) == ("other-checkpoint", 2)
    (tmp_path / "cut").write_bytes(recording.read_bytes()[:5000])
    with pytest.raises(ConvertError, match="damaged") as caught:
        verify(*base, reference=tmp_path / "cut")
    assert (caught.value.code, caught.value.status) == ("bad-recording", 2)
    with pytest.raises(ConvertError, match="leave --audio out"):
        verify(*base, reference=recording, audio=[tmp_path])


def test_a_recording_for_half_types(tmp_path: Path) -> None:
    checkpoint, model = converted("ctc_base", tmp_path, dtype="float16")
    kept = record(checkpoint, tmp_path / "reference.safetensors", dtype="float16", long=False)
    assert verify(checkpoint, model, reference=kept).problems == ()
    plain = record(checkpoint, tmp_path / "plain.safetensors", long=False)
    with pytest.raises(ConvertError, match="no answers for weights rounded to float16"):
        verify(checkpoint, model, reference=plain)


def test_another_interpreter(base: tuple[Path, Path]) -> None:
    done = verify(*base, fairseq_python=sys.executable, write=False)
    assert done.problems == ()
    assert done.report["reference"]["kind"] == "interpreter"
    assert {run["verdict"] for run in done.report["runs"] if run["require"] == "identical"} == {"identical"}


def test_an_interpreter_without_fairseq(base: tuple[Path, Path], tmp_path: Path) -> None:
    for python in ("/bin/false", str(tmp_path / "none")):
        with pytest.raises(ConvertError) as caught:
            verify(*base, fairseq_python=python)
        assert (caught.value.code, caught.value.status) == ("no-fairseq", 2)


@pytest.mark.skipif(
    "FAIRSEQ_PYTHON" not in os.environ, reason="FAIRSEQ_PYTHON names no interpreter with official fairseq"
)
def test_official_fairseq(tmp_path: Path) -> None:
    for variant in ("ctc_base", "ctc_large", "pretrained_base"):
        folder = tmp_path / variant
        folder.mkdir()
        done = verify(*converted(variant, folder), fairseq_python=os.environ["FAIRSEQ_PYTHON"], write=False)
        assert done.problems == ()


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_commands(base: tuple[Path, Path], recording: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    done = command("verify", *base, "--reference", recording, "--device", "cpu")
    assert done.status == 0
    assert "deliberate mistakes   9 of 9 caught" in done.text
    for one in (*done.data["runs"], *done.data["end_to_end"]):  # what the table's words mean stands below it
        assert f"\n  {one['verdict']:<12}" in done.text
    assert done.data["passed"] is True and done.data["reference"]["kind"] == "recording"
    assert {run["verdict"] for run in done.data["runs"] if run["require"] == "identical"} == {"identical"}
    live = {}
    for words in (["record", base[0], tmp_path / "new"], ["verify", *base]):
        line = [sys.executable, "-m", "convert", *map(str, words), "--no-long", "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        made = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert (made.returncode, made.stderr) == (0, "")  # nothing of what fairseq says while it is imported
        live[words[0]] = json.loads(made.stdout)
    assert live["verify"]["reference"]["kind"] == "in-process"
    assert "speech-even" in live["record"]["inputs"] and (tmp_path / "new").is_file()


def test_a_recording_is_replaced_only_when_asked(base: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "reference.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(ConvertError, match="exists already") as caught:
        record(base[0], out)
    assert (caught.value.code, caught.value.status, out.read_bytes()) == ("exists", 2, b"mine")
    record(base[0], out, long=False, overwrite=True)
    assert Recorded(out).probes()
    with pytest.raises(ConvertError, match="is not a directory") as caught:
        record(base[0], tmp_path / "none" / "reference.safetensors")
    assert caught.value.code == "no-parent"
    assert [entry.name for entry in tmp_path.iterdir()] == [out.name]


def test_the_command_says_no(copy: tuple[Path, Path], recording: Path, command: Callable[..., Ran]) -> None:
    edit(copy[1] / "config.json", do_stable_layer_norm=True)
    done = command("verify", *copy, "--reference", recording)
    assert done.status == 1
    reasons = [line.strip() for line in done.text.split("NOT the same, or not proved:\n")[1].splitlines()]
    assert [reason.split(": ")[0] for reason in reasons] == ["file", "changed-file", "different", "end-to-end"]
    assert "layer.0: greatest absolute difference" in reasons[2] and reasons[2].endswith("and 7 more of these inputs")
    assert {problem["code"] for problem in done.data["problems"]} >= {"different", "file"}
    assert json.loads((copy[1] / "verification.json").read_text())["passed"] is False


def test_the_command_cannot_say(base: tuple[Path, Path], command: Callable[..., Ran]) -> None:
    done = command("verify", *base, "--device", "cuda:99")
    assert done.status == 2 and "cuda:99" in done.error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_not_fairseq_s_fault(number: int) -> None:
    with pytest.raises(OSError, match="full") as full, answering():
        raise OSError(number, "full")
    assert full.value.errno == number
    with pytest.raises(ConvertError, match="fairseq cannot run the model"), answering():
        raise OSError(errno.ENOENT, "missing")
