"""The pytest plugin as a repository of converted models uses it, and the picture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from verify_models import converted, edit, short_inputs

from convert.errors import ConvertError
from convert.verification import Verification, record, verify
from convert.verification.plot import check, plot

TEST = """
def test_my_model(assert_same_model):
    found = assert_same_model("model.pt", "model")
    assert found.report["reference"]["kind"] == "recording"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one converted model, with its recording and its test."""
    made = tmp_path_factory.mktemp("repository")
    with short_inputs():
        checkpoint, _ = converted("ctc_base", made)
        record(checkpoint, made / "reference.safetensors")
    (made / "test_model.py").write_text(TEST)
    return made


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "convert.verification.plugin", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment)


def test_a_repository_asserts_its_models(folder: Path) -> None:
    done = run_pytest(folder, "--fairseq-reference", "reference.safetensors", "--fairseq-device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert not (folder / "model" / "verification.json").exists()  # a test leaves the repository as it was


def test_a_wrong_model_fails_with_its_numbers(folder: Path) -> None:
    config = folder / "model" / "config.json"
    kept = config.read_bytes()
    edit(config, num_attention_heads=8)
    try:
        done = run_pytest(folder, "--fairseq-reference", "reference.safetensors")
    finally:
        config.write_bytes(kept)
    assert done.returncode == 1
    assert "layer.0: greatest absolute difference" in done.stdout and ", allowed " in done.stdout


def test_the_call_chooses_its_own_reference(folder: Path) -> None:
    test = TEST.replace('"model")', '"model", reference="reference.safetensors")')
    (folder / "test_other.py").write_text(test)
    done = run_pytest(folder, "test_other.py", "--fairseq-python", "/no/such/python")
    (folder / "test_other.py").unlink()
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_options_are_in_pytests_help(folder: Path) -> None:
    text = run_pytest(folder, "--help").stdout
    assert all(option in text for option in ("--fairseq-python", "--fairseq-reference", "--fairseq-device"))


@pytest.fixture(scope="module")
def done(folder: Path) -> Verification:
    return verify(folder / "model.pt", folder / "model", reference=folder / "reference.safetensors", write=False)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture(suffix: str, done: Verification, tmp_path: Path) -> None:
    path = tmp_path / f"proof{suffix}"
    plot(done, path)
    assert path.stat().st_size > 10_000
    if suffix == ".svg":
        assert b"the converted model" in path.read_bytes() or b"<path" in path.read_bytes()


def test_the_picture_shows_the_floor_the_model_and_every_mistake(
    done: Verification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.figure

    kept: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def keep(self: Any, *words: Any, **options: Any) -> None:
        kept.append(self)
        save(self, *words, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    plot(done, tmp_path / "proof.png")
    (axes,) = kept[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    controls = [control["name"] for control in done.report["controls"] if control["by"] == "outputs"]
    assert labels == ["rounding, as measured", *controls, "the converted model"] or set(labels) == {
        "rounding, as measured",
        "the converted model",
        *controls,
    }
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    floor = [row[2] for row in next(c for c in done.stages if c.name == "speech-even").rows]
    assert all(height <= allowed for height, allowed in zip(lines["the converted model"], floor, strict=True))
    for name in controls:
        assert max(lines[name]) > max(floor)
    assert "deliberate mistakes caught" in axes.get_title(loc="left")


def test_a_picture_that_cannot_be_drawn(done: Verification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConvertError, match=r"\.png, \.svg or \.pdf expected") as caught:
        check(tmp_path / "proof.txt")
    assert caught.value.status == 2
    with pytest.raises(ConvertError, match="no output was computed") as caught:
        plot(Verification(False, done.report), tmp_path / "proof.png")
    assert caught.value.status == 1
    monkeypatch.setattr("convert.verification.plot.find_spec", lambda name: None)
    with pytest.raises(ConvertError, match="needs matplotlib") as caught:
        check(tmp_path / "proof.png")
    assert (caught.value.code, caught.value.status) == ("no-matplotlib", 2)
    assert "fairseq-to-hf[plot]" in caught.value.hint
