"""Every variant that `convert` supports is proved against real fairseq, and what is not the same model is not."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_models import VARIANTS, build
from safetensors.numpy import load_file, save_file
from verify_models import converted, edit, short_inputs, subject_of

from convert.errors import ConvertError, MismatchError
from convert.verification import Verification, assert_identical, run, verify
from convert.verification.expected import differences
from convert.verification.inputs import bundled
from convert.verification.reference import Live
from convert.verification.target import load

# facts of a conversion that computes instead of copying: there the bits cannot be the same
COMPUTED = {
    "ctc_pos_conv_plain": "weight norm",
    "pretrained_pos_conv_plain": "weight norm",
    "ctc_blank_add": "added 1.5",
}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads wait for each other
    with short_inputs():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return converted("ctc_base", tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(base: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint, and a model directory that may be damaged."""
    return base[0], Path(shutil.copytree(base[1], tmp_path / "damaged"))


def codes(done: Verification) -> set[str]:
    return {problem.code for problem in done.problems}


@pytest.mark.parametrize("restored", [False, True])
def test_a_file_that_changes_meanwhile_is_no_proof(
    restored: bool, copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proved is what was hashed: not another file that was computed with, even if the first one is there again."""
    path = copy[1] / "model.safetensors"
    data = path.read_bytes()

    def changing(*arguments: Any, **named: Any) -> None:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if restored:
            path.write_bytes(data)

    monkeypatch.setattr(run, "on_device", changing)
    with pytest.raises(ConvertError) as caught:
        verify(*copy, devices=["cpu"])
    assert (caught.value.code, caught.value.status) == ("changed", 2)
    assert not (copy[1] / "verification.json").exists()


# --- every variant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_proved(variant: str, tmp_path: Path) -> None:
    done = verify(*converted(variant, tmp_path), devices=["cpu"])
    assert done.problems == ()
    runs = {run["input"]: run for run in done.report["runs"]}
    single = {name: run for name, run in runs.items() if run["reference"] != "as built" or len(run["frames"]) == 1}
    single.pop("speech-odd-as-built")  # fairseq adds a frame there, and masks it
    assert set(single) == {"speech-even", "speech-odd", "shortest", "silence", "quiet", "30-seconds"}
    if variant in COMPUTED:
        assert {run["require"] for run in single.values()} == {"rounding"}
        assert all(COMPUTED[variant] in run["why"] for run in single.values())
        assert {run["verdict"] for run in single.values()} <= {"identical", "rounding"}
    else:
        assert {(run["require"], run["verdict"]) for run in single.values()} == {("identical", "identical")}
    assert runs["padded-batch"]["verdict"] in ("identical", "rounding") and len(runs["padded-batch"]["frames"]) == 3
    assert runs["shortest"]["frames"] == [1]
    controls = {control["name"]: control["caught"] for control in done.report["controls"]}
    assert len(controls) == (9 if variant.startswith("ctc") else 10)
    assert all(controls.values())
    assert done.report["controls_without_place"] == {}
    stages = [row[0] for row in next(c for c in done.stages if c.kind == "run" and c.name == "speech-even").rows]
    assert stages[:4] == ["conv.0", "conv.1", "conv.2", "conv.3"] and "layer.0" in stages and "encoder" in stages
    assert ("logits" in stages) == variant.startswith("ctc")
    assert ({"codes", "project_q", "project_hid"} <= set(stages)) == variant.startswith("pretrained")
    of_controls = [curve for curve in done.stages if curve.kind == "control"]
    assert len(of_controls) == sum(control["by"] == "outputs" for control in done.report["controls"])
    assert all(any(not found <= allowed for _, found, allowed in curve.rows) for curve in of_controls)


@pytest.mark.parametrize("layout", ["omegaconf", "interpolated", "namespace"])
def test_every_layout(layout: str, tmp_path: Path) -> None:
    symbols = tmp_path / "dict.ltr.txt"
    symbols.write_text("".join(f"{symbol} 1\n" for symbol in VARIANTS["ctc_large"].symbols))
    given = {"dictionary": symbols} if layout == "namespace" else {}
    done = verify(*converted("ctc_large", tmp_path, layout=layout, **given))
    assert done.problems == ()
    assert done.report["reference"]["kind"] == "in-process"


@pytest.mark.parametrize("variant", ["ctc_large", "pretrained_base"])
def test_the_bare_encoder(variant: str, tmp_path: Path) -> None:
    done = verify(*converted(variant, tmp_path, head="encoder"))
    assert done.problems == ()
    assert {run["verdict"] for run in done.report["runs"] if run["require"] == "identical"} == {"identical"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "variant", ["ctc_base", "ctc_large", "ctc_blank_add", "ctc_pos_conv_plain", "pretrained_large"]
)
def test_half_types(variant: str, dtype: str, tmp_path: Path) -> None:
    checkpoint, model = converted(variant, tmp_path, dtype=dtype)
    done = verify(checkpoint, model, long=False)
    assert done.problems == ()
    runs = done.report["runs"]
    assert list(dict.fromkeys(run["dtype"] for run in runs)) == [f"float32 with {dtype} weights", dtype]
    assert {run["require"] for run in runs} == {"rounding"}
    against = [run for run in runs if run["input"].endswith("against float32")]
    assert against and all(0 < run["max_abs_difference"] <= run["allowed"] for run in against)
    assert done.report["skipped"] == {"30-seconds": "left out, as asked"}
    edit(model / "config.json", layer_norm_eps=1e-3)
    assert "different" in codes(verify(checkpoint, model, long=False))


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_file_is_stable_and_speaks_of_every_file(base: tuple[Path, Path]) -> None:
    done = verify(*base)
    written = (base[1] / "verification.json").read_bytes()
    assert json.loads(written) == done.report
    verify(*base)
    assert (base[1] / "verification.json").read_bytes() == written
    assert {path.name for path in base[1].iterdir()} == {*done.report["files"], "verification.json"}
    assert done.report["weights"] == {"tensors": 50, "problems": []}
    assert set(done.report["checkpoint"]) == {"name", "size", "sha256"}
    assert {"kind", "fairseq", "torch", "patches"} <= set(done.report["reference"])
    assert str(base[0].parent).encode() not in written
    assert done.report["missing"] == ([] if torch.cuda.is_available() else ["cuda"])
    assert str(done).endswith("verified: the same model")


def test_the_torch_flags_are_put_back(base: tuple[Path, Path]) -> None:
    filled = torch.utils.deterministic
    before = (torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), torch.load)
    before += (filled.fill_uninitialized_memory,)
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    assert verify(*base, write=False, long=False).report["environment"]["tf32"] is False
    after = (torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), torch.load)
    after += (filled.fill_uninitialized_memory,)
    assert after == before
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace


def test_both_sides_compute_on_aligned_memory(base: tuple[Path, Path], tmp_path: Path) -> None:
    """The weights of a mapped file start anywhere, and the bits of a single frame depend on where."""
    model = Path(shutil.copytree(base[1], tmp_path / "shifted"))
    data = (model / "model.safetensors").read_bytes()
    first = int.from_bytes(data[:8], "little")
    wider = (first // 64 + 1) * 64  # so that the tensors start 8 bytes after a multiple of 64
    header = data[8 : 8 + first].ljust(wider)
    (model / "model.safetensors").write_bytes(wider.to_bytes(8, "little") + header + data[8 + first :])
    reference, target = Live(subject_of(base[0])[0], {}, "cpu").inner, load(model, "cpu")
    kept = [parameter.data_ptr() % 64 for parameter in target.model.parameters()]
    assert set(kept) == {8}  # mapped as the file has them
    computing: list[int] = []
    for side in (reference.model, target.model):
        for module in side.modules():
            module.register_forward_pre_hook(
                lambda module, _: computing.extend(one.data_ptr() % 64 for one in module.parameters(recurse=False))
            )
    waveform = torch.from_numpy(bundled()[:4000])[None]
    reference.run(waveform)
    target.run(waveform, None, lambda stage, values: None)
    assert len(computing) > len(kept)
    assert set(computing) == {0}
    assert [parameter.data_ptr() % 64 for parameter in target.model.parameters()] == kept


def test_a_requirement_is_enforced(base: tuple[Path, Path], tmp_path: Path) -> None:
    pair = converted("ctc_blank_add", tmp_path)
    assert verify(*pair, write=False, long=False, require="rounding").passed
    strict = verify(*pair, write=False, long=False, require="identical")
    assert codes(strict) == {"not-identical"}
    with pytest.raises(ConvertError, match="neither identical nor rounding"):
        verify(*base, require="close")


# --- damage ---------------------------------------------------------------------------------------------------------


def test_the_first_differing_stage_is_named(copy: tuple[Path, Path]) -> None:
    edit(copy[1] / "config.json", num_attention_heads=8)
    (copy[1] / "verification.json").write_bytes(b"kept")
    with pytest.raises(MismatchError, match="num_attention_heads is 8, expected 4") as caught:
        assert_identical(*copy, long=False)
    assert isinstance(caught.value, AssertionError)
    line = next(str(one) for one in caught.value.problems if one.key == "cpu, float32, speech-even")
    assert "layer.0: greatest absolute difference" in line and "allowed" in line
    assert (copy[1] / "verification.json").read_bytes() == b"kept"  # assert_identical writes nothing by itself


def test_one_bit_of_one_weight(copy: tuple[Path, Path]) -> None:
    tensors = load_file(copy[1] / "model.safetensors")
    key = "wav2vec2.encoder.layers.1.feed_forward.output_dense.weight"
    tensors[key].view(np.uint32)[3, 4] ^= 1
    save_file(tensors, copy[1] / "model.safetensors", metadata={"format": "pt"})
    done = verify(*copy, write=False, long=False)
    assert {"bytes", "changed-file"} <= codes(done)
    assert any(key in text for text in done.report["weights"]["problems"])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.json", {"layerdrop": 0.5}, "layerdrop is 0.5"),
        ("config.json", {"invented": 1}, "invented is 1, expected nothing"),
        ("preprocessor_config.json", {"do_normalize": True}, "do_normalize is true, expected false"),
        ("preprocessor_config.json", {"return_attention_mask": False}, "return_attention_mask is false"),
        ("tokenizer_config.json", {"pad_token": "<s>"}, 'pad_token is "<s>", expected "<pad>"'),
        ("vocab.json", {"E": 6, "T": 5}, "E is 6, expected 5"),
    ],
)
def test_a_value_that_no_plan_writes(name: str, changes: dict[str, Any], said: str, copy: tuple[Path, Path]) -> None:
    edit(copy[1] / name, **changes)
    done = verify(*copy, write=False, long=False)
    assert not done.passed
    assert any(said in problem.detail for problem in done.problems if problem.key == name)


def test_values_are_compared_with_their_types() -> None:
    assert [*differences("config.json", {"a": 1, "b": [1.0]}, {"a": 1, "b": [1.0]})] == []
    assert [str(one) for one in differences("config.json", {"a": 1}, {"a": True})] == [
        "config.json: a is true, expected 1"
    ]
    assert [str(one) for one in differences("vocab.json", {"a": 1}, {})] == ["vocab.json: a is missing, expected 1"]


def test_a_directory_that_does_not_load(copy: tuple[Path, Path]) -> None:
    edit(copy[1] / "config.json", num_hidden_layers=3)
    done = verify(*copy, write=False, long=False)
    assert {"file", "missing-keys"} <= codes(done)
    assert done.report["runs"] == []


def test_nan_is_equal_to_nothing(tmp_path: Path) -> None:
    model = build("ctc_base")
    with torch.no_grad():
        model.w2v_encoder.w2v_model.encoder.layers[1].fc1.bias[0] = math.nan
    done = verify(*converted("ctc_base", tmp_path, model=model, allow_non_finite=True), long=False)
    assert {run["verdict"] for run in done.report["runs"]} == {"different"}
    assert {run["stage"] for run in done.report["runs"]} == {"layer.1"}


def test_blind_checks_fail(base: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from convert.verification import compare

    monkeypatch.setattr(
        "convert.verification.judge.compare", lambda name, *_: compare.Difference(name, equal=True, greatest=0.0)
    )
    monkeypatch.setattr("convert.verification.run.compare_opened", lambda *_, **__: [])
    monkeypatch.setattr("convert.verification.controls.check_tokens", lambda *_: [])
    monkeypatch.setattr("convert.verification.controls.differences", lambda *_: [])
    done = verify(*base, write=False, long=False)
    assert codes(done) == {"blind"}
    assert not any(control["caught"] for control in done.report["controls"])
