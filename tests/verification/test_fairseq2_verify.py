"""What fairseq2 trained is verified against fairseq2's own classes, here, in another interpreter, and from a recording."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fairseq2_models as models
import pytest
from verify_models import edit, few_inputs, short_inputs

from convert.evaluation.fairseq_reference import FairseqReference
from convert.package import convert
from convert.verification import inputs, record, verify
from convert.verification.fairseq_side.fairseq2 import STUB

OTHER = Path(sys.prefix) / "fairseq2-0.6.0"


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with short_inputs():
        yield


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two shards, and what was made of it."""
    folder = tmp_path_factory.mktemp("sides")
    run = models.save_run("ctc_omnilingual", folder / "run", shards=2)
    return run, convert(run, folder / "model").path


def assert_passed(done: Any) -> None:
    assert done.passed, [str(problem) for problem in done.problems]
    assert {row["verdict"] for row in done.report["runs"]} == {"identical"}
    assert all(control["caught"] for control in done.report["controls"])
    assert {row["verdict"] for row in done.report["end_to_end"]} <= {"identical", "explained"}


def test_a_ctc_model(sides: tuple[Path, Path]) -> None:
    done = verify(*sides, devices=["cpu"])
    assert_passed(done)
    report = done.report
    assert {"padded-batch", "shortest", "silence"} <= {row["input"] for row in report["runs"]}
    assert report["reference"]["fairseq"] == "fairseq2 0.8.1" and STUB in report["reference"]["patches"]
    assert "1 attention heads instead of 2" in {one["name"] for one in report["controls"]}
    loud, quiet = report["end_to_end"]
    assert loud["fairseq_text"] == loud["hf_text"] != "" and loud["same_path"] == 1.0
    assert quiet["why"].startswith("fairseq adds 1e-05")  # transformers adds 1e-7


@pytest.mark.parametrize("name", ["ctc_base", "ctc_no_projection", "pretraining_base", "pretraining_large"])
def test_other_kinds(name: str, tmp_path: Path) -> None:
    run = models.save_run(name, tmp_path / "run")
    with few_inputs("speech-odd", "padded-batch", "quiet"):
        assert_passed(verify(run, convert(run, tmp_path / "model").path, devices=["cpu"]))


@pytest.mark.parametrize("head", ["encoder", None])
def test_half_types_and_the_encoder_alone(head: str | None, tmp_path: Path) -> None:
    run = models.save_run("ctc_base", tmp_path / "run")
    path = convert(run, tmp_path / "model", head=head, dtype="bfloat16").path
    with few_inputs("speech-odd", "quiet"):
        done = verify(run, path, devices=["cpu"])
    assert done.passed, [str(problem) for problem in done.problems]


def test_another_interpreter_with_another_fairseq2(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """0.6.0, which those who train Omnilingual ASR have; the interpreter has nothing of this project."""
    if not OTHER.is_dir():
        pytest.skip(f"{OTHER.name} is not in {sys.prefix}")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={OTHER} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with few_inputs("speech-odd", "padded-batch", "quiet"):
        done = verify(*sides, fairseq_python=str(python), devices=["cpu"])
    assert_passed(done)
    assert done.report["reference"]["kind"] == "interpreter"
    assert done.report["reference"]["fairseq"].startswith("fairseq2 0.6")


def test_a_recording(sides: tuple[Path, Path], tmp_path: Path) -> None:
    run, model = sides
    file = record(run, tmp_path / "reference.safetensors", long=False)
    assert_passed(verify(run, model, reference=file, devices=["cpu"], long=False))


def test_a_single_file_with_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was named to convert is in conversion.json, and need not be named again; to record, it does."""
    from convert.checkpoint import fairseq2_architectures

    tiny = models.flat("ctc_base")
    monkeypatch.setitem(fairseq2_architectures.ARCHITECTURES["wav2vec2_asr"], "tiny", tiny)
    path = models.save_file("ctc_base", tmp_path / "alone.pt")
    models.save_tokenizer(tmp_path / "tokenizer.model")
    model = convert(path, tmp_path / "model", arch="tiny", normalize=False).path
    assert json.loads((model / "conversion.json").read_text())["request"]["arch"] == "tiny"
    with few_inputs("speech-odd", "quiet"):
        assert_passed(verify(path, model, devices=["cpu"]))
        record(path, tmp_path / "reference.safetensors", long=False, arch="tiny", normalize=False)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_attention_heads": 1}, "different"),
        ({"do_stable_layer_norm": False}, "load"),
        ({"conv_stride": [5, 2, 2, 1]}, "different"),
        ({"layerdrop": 0.5}, "file"),
    ],
)
def test_a_wrong_configuration_is_found(
    change: dict[str, Any], code: str, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    run, model = sides
    wrong = tmp_path / "model"
    wrong.mkdir()
    for file in model.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    edit(wrong / "config.json", **change)
    with few_inputs("speech-odd", "quiet"):
        done = verify(run, wrong, devices=["cpu"])
    assert not done.passed and {"file", code} <= {problem.code for problem in done.problems} | {"load"}


def test_a_tokenizer_that_strips_is_found(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """As the tokenizers of hand-made conversions do; here with the hashes of conversion.json made to fit."""
    run, model = sides
    wrong = tmp_path / "model"
    wrong.mkdir()
    for file in model.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    content = json.loads((wrong / "tokenizer.json").read_text())
    content["decoder"]["decoders"].append({"type": "Replace", "pattern": {"Regex": r"^\s+|\s+$"}, "content": ""})
    (wrong / "tokenizer.json").write_text(json.dumps(content))
    with few_inputs("speech-odd", "quiet"):
        done = verify(run, wrong, devices=["cpu"])
    assert "spelling" in {problem.code for problem in done.problems}


def test_evaluation_asks_fairseq2(sides: tuple[Path, Path]) -> None:
    """`evaluate --reference fairseq` transcribes with fairseq2."""
    import torch
    import transformers

    run, model = sides
    reference = FairseqReference(run, "cpu")
    text = reference.transcribe(inputs.bundled())
    reference.close()
    processor = transformers.AutoProcessor.from_pretrained(model)
    ours = transformers.Wav2Vec2ForCTC.from_pretrained(model).eval()
    values = processor(inputs.bundled(), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        assert processor.tokenizer.decode(ours(values).logits[0].argmax(-1)) == text != ""
