"""fairseq's side in other Pythons and with other fairseqs, and what makes its answers fairseq's own."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import BUNDLED
from fairseq_models import VARIANTS, build, save
from verify_models import converted, edit, short_inputs, subject_of

from convert.errors import ConvertError
from convert.package import convert
from convert.verification import controls, fairseq_side, inputs, record, verify
from convert.verification.fairseq_side.importing import hashable_dataclasses, numpy_aliases
from convert.verification.judge import compared, judge
from convert.verification.recording import Recorded
from convert.verification.reference import Live, tensor
from convert.verification.target import Target, load

SHIPPED = BUNDLED.with_suffix(".reference.safetensors")
SIDE = Path(fairseq_side.__path__[0])


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs():
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return converted("ctc_large", tmp_path_factory.mktemp("large"))


def live(checkpoint: Path) -> tuple[Live, torch.Tensor]:
    """A reference in this process, and a waveform of 60 frames."""
    subject, geometry = subject_of(checkpoint)
    waveform = torch.from_numpy(inputs.bundled()[: geometry.samples(60)])[None]
    return Live(subject, {inputs.SPEECH: inputs.bundled()}, "cpu"), waveform


# --- other Pythons, other fairseqs ----------------------------------------------------------------------------------


def test_fairseqs_side_imports_nothing_of_this_project() -> None:
    """Of its own it needs torch; fairseq where a model is built, and what holds another class for that class alone."""
    files = {path.name: ast.parse(path.read_text(), feature_version=(3, 7)) for path in sorted(SIDE.glob("*.py"))}
    own = {name.removesuffix(".py") for name in files}

    def imported(nodes: Iterable[ast.AST]) -> set[str]:
        found = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2 and (not node.level or node.module in own), ast.dump(node)
                found |= set() if node.level else {str(node.module).split(".")[0]}
        return found - set(sys.stdlib_module_names)

    assert {name for tree in files.values() for name in imported(tree.body)} == {"numpy", "torch"}
    known = {"fairseq", "numpy", "omegaconf", "torch"}
    others = {name: imported(ast.walk(tree)) - known for name, tree in files.items()}
    others = {name: found for name, found in others.items() if found}
    assert others == {"wavlm.py": {"s3prl"}, "fairseq2.py": {"fairseq2", "sentencepiece"}}
    assert not own & set(sys.stdlib_module_names)  # the folder is first on sys.path for an instant


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.9", "3.10", "3.12", "3.13"])
def test_fairseqs_side_compiles_in_other_pythons(version: str, tmp_path: Path) -> None:
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")) or [shutil.which(f"python{version}")]
    if found[0] is None:
        pytest.skip(f"there is no Python {version} here: fairseq's side was not compiled with it")
    copy = shutil.copytree(SIDE, tmp_path / "side")
    subprocess.run([str(found[0]), "-m", "compileall", "-q", str(copy)], check=True)


def test_the_folder_runs_by_itself_and_leaves_sys_path_alone(tmp_path: Path) -> None:
    """Neither the folder nor what stands beside it can be imported by name from what it runs."""
    copy = shutil.copytree(SIDE, tmp_path / "beside" / "fairseq_side")
    (copy / "recording.py").write_text(
        "import importlib.util, sys\n"
        "def main(path):\n"
        "    found = [name for name in ('intruder', 'numerics') if importlib.util.find_spec(name)]\n"
        "    sys.exit(repr((__name__, path, found)))\n"
    )
    (copy.parent / "intruder.py").touch()
    done = subprocess.run([sys.executable, str(copy), "request.json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.strip() == repr(("fairseq_side.recording", "request.json", []))


@pytest.mark.parametrize("variant", ["ctc_base", "pretrained_large"])
@pytest.mark.parametrize("version", ["0.12.2", "0.10.2"])
def test_other_fairseqs(version: str, variant: str, tmp_path: Path) -> None:
    name = "FAIRSEQ_" + version.replace(".", "_")
    if name not in os.environ:
        pytest.skip(f"fairseq {version} was not tried: {name} names no folder that holds its package")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{os.environ[name]}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = verify(*converted(variant, tmp_path), fairseq_python=str(python), devices=["cpu"])
    assert done.problems == ()
    assert done.report["reference"]["fairseq"].startswith(version)
    assert {run["verdict"] for run in done.report["runs"] if run["require"] == "identical"} == {"identical"}
    assert ("padded-batch" in done.report["skipped"]) == (version == "0.10.2")  # it counted padded frames otherwise
    if version == "0.12.2" and sys.version_info >= (3, 11):
        assert any("dataclasses made hashable" in patch for patch in done.report["reference"]["patches"])


def test_importing_an_old_fairseq_leaves_python_as_it_was() -> None:
    import numpy

    original = dataclasses.dataclass
    with numpy_aliases([]), hashable_dataclasses():
        assert "float" in vars(numpy)
        assert dataclasses.dataclass is not original
    assert dataclasses.dataclass is original
    assert "float" not in vars(numpy)


def test_hashable_dataclasses_let_python_take_fairseqs_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fairseq.made_up", "somebody.elses"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    source = (
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Inner:\n    size: int = 1\n"
        "@dataclass\nclass Outer:\n    inner: Inner = Inner()\n"
    )
    if sys.version_info >= (3, 11):
        with pytest.raises(ValueError, match="mutable default"):
            exec(source, {"__name__": "fairseq.made_up"})
    with hashable_dataclasses():
        exec(source, {"__name__": "fairseq.made_up"})
        if sys.version_info >= (3, 11):
            with pytest.raises(ValueError, match="mutable default"):  # nobody else's dataclasses change
                exec(source, {"__name__": "somebody.elses"})


# --- the reference is fairseq ---------------------------------------------------------------------------------------


def test_the_reference_answers_what_fairseqs_own_build_answers(tmp_path: Path) -> None:
    model = build("ctc_large")
    reference, waveform = live(save("ctc_large", tmp_path / "model.pt", model=model))
    with torch.no_grad():
        meant = model.get_logits(model(source=waveform, padding_mask=None)).transpose(0, 1)[0]
    assert torch.equal(reference.inner.run(waveform)[1]["logits"], meant)


def test_pretraining_outputs_are_those_of_fairseqs_forward(tmp_path: Path) -> None:
    """`x` and `y` of `Wav2Vec2Model.forward`, before it samples negatives."""
    model = build("pretrained_base")
    reference, waveform = live(save("pretrained_base", tmp_path / "model.pt", model=model))
    seen: dict[str, torch.Tensor] = {}
    model.final_proj.register_forward_hook(lambda *call: seen.setdefault("project_hid", call[2]))
    model.project_q.register_forward_hook(lambda *call: seen.setdefault("project_q", call[2]))
    with torch.no_grad():
        model(waveform, mask=False, features_only=False)
        codes = model.quantize(waveform)[1]
    stages = reference.inner.run(waveform)[1]
    assert torch.equal(stages["project_hid"], seen["project_hid"].reshape(stages["project_hid"].shape))
    assert torch.equal(stages["project_q"], seen["project_q"].reshape(stages["project_q"].shape))
    assert torch.equal(stages["codes"], codes[0])


def test_float64_is_float64_throughout(large: tuple[Path, Path]) -> None:
    """Without the lifted islands a float64 run keeps float32's error; afterwards nothing is left of the lifting."""
    reference, waveform = live(large[0])
    before = reference.inner.run(waveform)[1]["logits"]
    with reference.arithmetic("float64"):
        lifted = reference.inner.run(waveform)[1]["logits"]
    reference.inner.model.double()
    unlifted = reference.inner.run(waveform)[1]["logits"]
    reference.inner.model.float()
    assert lifted.dtype == torch.float64
    assert (lifted - unlifted).abs().max() > 1e-8
    assert torch.equal(reference.inner.run(waveform)[1]["logits"], before)


def test_an_odd_number_of_frames_is_padded_unless_it_is_patched(large: tuple[Path, Path]) -> None:
    reference, _ = live(large[0])
    waveform = torch.from_numpy(inputs.bundled()[: inputs.Geometry(((10, 5), (3, 2), (3, 2), (2, 2))).samples(59)])[
        None
    ]
    built, stages = reference.inner.run(waveform)
    patched, others = reference.inner.run(waveform, multiple=1)
    assert built == patched == [59]
    assert stages["encoder"].shape == others["encoder"].shape
    assert torch.equal(stages["pos_conv"], others["pos_conv"])  # what is padded comes after it
    assert reference.inner.run(waveform)[1]["logits"].equal(stages["logits"])  # the patch does not stay


# --- settings that fairseq could not load ---------------------------------------------------------------------------


def test_unknown_tasks_and_missing_folders_do_not_matter(tmp_path: Path) -> None:
    state = torch.load(save("pretrained_large", tmp_path / "plain.pt"), weights_only=False)
    state["cfg"]["task"] |= {
        "_name": "temp_sampled_audio_pretraining",
        "data": "/nowhere",
        "multiple_train_files": True,
    }
    torch.save(state, tmp_path / "model.pt")
    model = convert(tmp_path / "model.pt", tmp_path / "model").path
    assert verify(tmp_path / "model.pt", model, devices=["cpu"]).problems == ()


def test_a_setting_that_argparse_kept_as_text(tmp_path: Path) -> None:
    state = torch.load(save("ctc_large", tmp_path / "plain.pt", layout="namespace"), weights_only=False)
    state["args"].w2v_args.latent_temp = "(2.0, 0.1, 0.999995)"
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    symbols = tmp_path / "dict.ltr.txt"
    symbols.write_text("".join(f"{symbol} 1\n" for symbol in VARIANTS["ctc_large"].symbols))
    model = convert(tmp_path / "model.pt", tmp_path / "model", dictionary=symbols).path
    assert verify(tmp_path / "model.pt", model, dictionary=symbols, devices=["cpu"]).problems == ()


def test_a_fine_tuned_checkpoint_without_its_base(tmp_path: Path) -> None:
    base = save("pretrained_base", tmp_path / "base.pt")
    state = torch.load(save("ctc_base", tmp_path / "plain.pt"), weights_only=False)
    state["cfg"]["model"] |= {"w2v_args": None, "w2v_path": "/a/cluster/of/somebody/base.pt"}
    torch.save(state, tmp_path / "model.pt")
    model = convert(tmp_path / "model.pt", tmp_path / "model", base=base).path
    done = verify(tmp_path / "model.pt", model, base=base, devices=["cpu"])
    assert done.problems == ()
    with pytest.raises(ConvertError, match="w2v_args is empty"):
        verify(tmp_path / "model.pt", model)


# --- the recording that ships ---------------------------------------------------------------------------------------


def test_the_bundled_recording_proves_the_bundled_model(tmp_path: Path) -> None:
    model = convert(BUNDLED, tmp_path / "model").path
    done = verify(BUNDLED, model, reference=SHIPPED, devices=["cpu"])
    assert done.problems == ()
    spoken = done.report["end_to_end"][0]
    assert spoken["fairseq_text"] == spoken["hf_text"] == "THE FOX SITS BESIDE A SHIP"


def test_the_bundled_recording_is_what_fairseq_answers_today(tmp_path: Path) -> None:
    shipped = Recorded(SHIPPED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "bundled", lambda: shipped.clips[inputs.SPEECH])
        made = Recorded(record(BUNDLED, tmp_path / "made.safetensors", long=False))
    assert made.checkpoint == shipped.checkpoint
    assert made.probes() == shipped.probes()  # what a recording does not say of a probe is as it was
    raw = [[run.probe for run in recorded.about.runs if run.raw] for recorded in (made, shipped)]
    assert raw[0] == raw[1] and len(made.about.runs) == len(shipped.about.runs)
    same = (
        made.description.unlike == shipped.description.unlike == ""
    )  # this machine computes the bits of the one that recorded
    for one, other in zip(made.about.runs, shipped.about.runs, strict=True):
        assert (one.frames, one.texts) == (other.frames, other.texts)
        for mine, theirs in zip(one.stages, other.stages, strict=True):
            name, floor = f"run.{one.number}.{mine.name}", mine.floor + theirs.floor
            assert mine.sha256 == theirs.sha256 or not same
            assert abs(made.arrays[name] - shipped.arrays[name]).max() <= floor


# --- floors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*list(VARIANTS)[:3], "pretrained_base", "ctc_blank_add", "ctc_pos_conv_plain"])
def test_other_arithmetic_is_held_to_the_floor(variant: str, tmp_path: Path) -> None:
    """Answers of another number of threads differ in their last bits: they are rounding, and a mistake still is none."""
    checkpoint, model = converted(variant, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        path = record(checkpoint, tmp_path / "r.safetensors")
    finally:
        torch.set_num_threads(threads)
    done = verify(checkpoint, model, reference=path, devices=["cpu"])
    assert done.problems == ()
    unlike = done.report["reference"]["unlike"]
    assert unlike.startswith(
        "this machine computes other bits than the one that recorded (grouped convolutions; threads "
    )
    edit(model / "config.json", layer_norm_eps=1.001e-5)
    worse = verify(checkpoint, model, reference=path, devices=["cpu"])
    assert {run["verdict"] for run in worse.report["runs"] if run["input"] == "speech-even"} == {"different"}


def test_rounding_is_not_enough_where_identity_is_possible(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Target._hook

    def eager(self: Target) -> None:
        self.model.set_attn_implementation("eager")  # the same mathematics in another order
        plain(self)

    monkeypatch.setattr(Target, "_hook", eager)
    done = verify(*large, devices=["cpu"], write=False)
    assert "not-identical" in {problem.code for problem in done.problems}
    assert "different" not in {problem.code for problem in done.problems}
    relaxed = verify(*large, devices=["cpu"], write=False, require="rounding")
    assert {problem.code for problem in relaxed.problems} <= {"end-to-end"}


def test_a_mistake_that_float32_hides_is_seen_in_float64(tmp_path: Path) -> None:
    checkpoint, model = converted("ctc_large", tmp_path)
    edit(model / "config.json", layer_norm_eps=1.00001e-05)
    done = verify(checkpoint, model, devices=["cpu"], require="rounding")
    telling = next(run for run in done.report["runs"] if run["input"] == "speech-even")
    assert telling["verdict"] == "different"
    assert telling["max_abs_difference"] <= telling["allowed"]  # float32 alone would have been content
    assert telling["float64_difference"] > 1000 * telling["float64_allowed"]


@pytest.mark.parametrize("variant", ["ctc_base", "pretrained_large"])
def test_a_control_runs_what_is_behind_its_damage_and_leaves_the_model_as_it_was(variant: str, tmp_path: Path) -> None:
    checkpoint, model = converted(variant, tmp_path)
    subject, geometry = subject_of(checkpoint)
    clips = {inputs.SPEECH: inputs.bundled()}
    probe = inputs.probes(geometry, clips, rate=subject.rate)[0]
    reference, target = Live(subject, clips, "cpu"), load(model, "cpu")
    (clip,) = judge(reference, target, clips, [probe], normalize=subject.normalize, measured=probe.name)
    batch = tensor(clips, probe, subject.normalize)
    before = {name: value.clone() for name, value in target.weights.items()}
    skipped = {}
    for name, damage in controls._damages(target, ()).items():
        with controls.damaged(target, damage) as copy:
            whole = compared(copy, clip.reference, batch)[1]
            plain = {stage: layer.forward for stage, layer in copy.layers.items()}
            with copy.resumed(clip.layers, controls._changed(damage)):
                assert compared(copy, clip.reference, batch)[1] == whole
                skipped[name] = sum(layer.forward != plain[stage] for stage, layer in copy.layers.items())
            assert {stage: layer.forward for stage, layer in copy.layers.items()} == plain
        assert target.weights.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in target.weights.items()), name
    front, layers = len(geometry.convolutions), target.model.config.num_hidden_layers
    assert skipped.pop("weight_g of the positional convolution lost") == front
    assert skipped.pop(f"layers 0 and {layers - 1} exchanged") == front + 1
    assert skipped.pop(f"q and k of layer {layers // 2} swapped") == front + 1 + layers // 2
    assert skipped.pop("a bias set to zero") in (0, front + layers)  # that of a norm in no layer, or the last layer's
    assert not any(skipped.values())  # what changes more than tensors


def test_the_numbers_of_a_difference_are_told(large: tuple[Path, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(large[1], tmp_path / "copy"))
    edit(model / "config.json", num_attention_heads=8)
    done = verify(large[0], model, devices=["cpu"])
    line = next(problem for problem in done.problems if "speech-even" in problem.key)
    pattern = r"layer\.0: greatest absolute difference \d\.\de[-+]\d\d at \(\d+, \d+\), allowed \d\.\de-0\d"
    assert re.match(pattern, line.detail)
    assert json.loads((model / "verification.json").read_text())["passed"] is False


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["ctc_base", "ctc_large", "pretrained_base"])
def test_on_cuda(variant: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: outputs on CUDA were not compared")
    done = verify(*converted(variant, tmp_path), devices=["cuda"])
    assert done.problems == ()
    assert {run["device"] for run in done.report["runs"]} == {"cuda:0"}
    assert {run["verdict"] for run in done.report["runs"]} <= {"identical", "rounding"}


def test_a_control_that_float32_hides_is_caught_in_float64(tmp_path: Path) -> None:
    """Queries and keys of nearly nothing: attention is uniform, and swapping them is far below float32's rounding."""
    model = build("ctc_large")
    with torch.no_grad():
        for layer in model.w2v_encoder.w2v_model.encoder.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.mul_(1e-4)
                part.bias.mul_(1e-4)
    done = verify(*converted("ctc_large", tmp_path, model=model), devices=["cpu"])
    assert done.problems == ()
    hidden = [control["name"] for control in done.report["controls"] if control["by"] == "outputs, in float64"]
    assert "q and k of layer 1 swapped" in hidden
