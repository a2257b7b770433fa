"""Models are loaded quietly, completely, and without code from their directory."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
from evaluate_fixtures import write_model

from convert.errors import ConvertError, MismatchError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert.loading import load, load_model, quiet  # noqa: E402


def test_a_model_is_loaded_completely_or_not_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "model")
    capfd.readouterr()
    assert type(load_model(transformers.AutoModelForCTC, folder)).__name__ == "Wav2Vec2ForCTC"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"] = weights["lm_head.bias"][:-1].clone()
    weights["extra"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        load_model(transformers.AutoModelForCTC, folder)
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [
        ("mismatched-keys", "lm_head.bias"),
        ("missing-keys", "lm_head.weight"),
        ("unexpected-keys", "extra"),
    ]
    assert caught.value.problems[0].detail == "shape: weights file (30,), model (31,)"
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConvertError, match="model: AutoModelForCTC cannot load it") as refused:
        load_model(transformers.AutoModelForCTC, folder, status=1)
    assert (refused.value.code, refused.value.status) == ("load", 1)
    assert capfd.readouterr() == ("", "")


def test_code_in_the_directory_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "stranger", "auto_map": {"AutoConfig": "code.Stranger"}})
    )
    code = "from transformers import PretrainedConfig\nopen({!r}, 'w').close()\nclass Stranger(PretrainedConfig):\n    model_type = 'stranger'\n"
    (tmp_path / "model" / "code.py").write_text(code.format(str(mark)))
    with pytest.raises(ConvertError, match="AutoConfig cannot load it"):
        load(transformers.AutoConfig, tmp_path / "model")
    assert not mark.exists()
    transformers.AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)  # the control
    assert mark.exists()


def test_what_libraries_say_stays_inside(capsys: pytest.CaptureFixture[str]) -> None:
    before = (logging.root.level, list(logging.root.handlers))
    with quiet():
        print("a progress bar", file=sys.stderr)
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("some.library").warning("a remark")
        logging.basicConfig(level=logging.DEBUG, force=True)
    assert capsys.readouterr().err == ""
    assert (logging.root.level, logging.root.handlers) == before
    logging.getLogger("some.library").warning("after it")
    print("after it", file=sys.stderr)
    assert "after it" in capsys.readouterr().err
