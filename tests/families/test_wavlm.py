"""WavLM, in unilm's files: converted models compute what unilm's own class computes, which s3prl carries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparing import EVEN, ODD, config, edited
from safetensors.torch import load_file
from verify_models import converted, edit, short_inputs
from wavlm_models import BASE, REFUSED, VARIANTS, build, save, unilm

import convert
from convert.errors import PlanError
from convert.restoration import restore
from convert.verification import verify
from convert.verification.fairseq_side.arithmetic import lifted
from convert.verification.fairseq_side.wavlm import with_weights


def wave_of(samples: int) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))


def load(directory: Path) -> torch.nn.Module:
    """Load strictly: nothing missing, unexpected or mismatched."""
    model, info = transformers.WavLMModel.from_pretrained(directory, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def sides(reference: torch.nn.Module, twin: torch.nn.Module, wave: torch.Tensor) -> list[torch.Tensor]:
    return [reference.extract_features(wave)[0], twin(wave).last_hidden_state]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit, once unilm's attention asks torch for its weights, as transformers does; without, within rounding."""
    reference = build(name)
    done = convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    assert (done.model.fairseq, done.model.target, done.model.plan.drops) == ("wavlm", "WavLMModel", ())
    twin = load(tmp_path / "out")
    theirs, ours = sides(reference, twin, wave_of(EVEN[0]))
    with lifted(reference.double()):
        exact = sides(reference, twin.double(), wave_of(EVEN[0]).double())
    reference.float(), twin.float()
    floor = sum(float((side - best).abs().max()) for side, best in zip((theirs, ours), exact, strict=True))
    assert float((theirs.double() - ours.double()).abs().max()) <= floor + 1e-12
    for layer in reference.encoder.layers:
        layer.self_attn.forward = with_weights(layer.self_attn.forward)
    for samples in (EVEN[0], ODD[0]):
        assert torch.equal(*sides(reference, twin, wave_of(samples))), samples
    with torch.no_grad():  # the control
        twin.encoder.layers[1].attention.gru_rel_pos_const[0, 0] += 1e-3
    assert not torch.equal(*sides(reference, twin, wave_of(EVEN[0])))


def test_every_value_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("wavlm_base", tmp_path / "m.pt"), tmp_path / "out")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    expected = {"num_buckets": 32, "max_bucket_distance": 80, "layerdrop": 0.05, "mask_time_prob": 0.8}
    expected |= {"do_stable_layer_norm": False, "feat_extract_norm": "group", "hidden_dropout": 0.07}
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["do_normalize"] is False
    large = convert.convert(save("wavlm_large", tmp_path / "l.pt"), tmp_path / "large").path
    assert json.loads((large / "preprocessor_config.json").read_text())["do_normalize"] is True
    assert config(large)["do_stable_layer_norm"] is True


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_twin_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        convert.convert(save(name, tmp_path / "m.pt"), tmp_path / "out")
    assert name in {problem.key for problem in raised.value.problems if problem.code == "unsupported-setting"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        (lambda s: s["cfg"].update(my_trick=True), "unknown-setting", "my_trick"),
        (lambda s: s["cfg"].update(expand_attention_head_size=64), "unsupported-setting", "expand_attention_head_size"),
        (lambda s: s["cfg"].pop("max_distance"), "missing-setting", "max_distance"),
        (lambda s: s["cfg"].update(num_buckets=64), "shape", "encoder.layers.0.self_attn.relative_attention_bias.weight"),
        (lambda s: s["cfg"].update(encoder_attention_heads=2), "shape", "encoder.layers.0.self_attn.grep_a"),
        (lambda s: s["model"].pop("encoder.layers.1.self_attn.grep_a"), "missing-tensor", "encoder.layers.1.self_attn.grep_a"),
        (lambda s: s["model"].update(final_proj=torch.ones(2)), "unexpected-tensor", "final_proj"),
    ],
)  # fmt: skip
def test_a_setting_is_carried_or_a_reason(change: Callable[..., Any], code: str, key: str, tmp_path: Path) -> None:
    path = save("wavlm_base", tmp_path / "m.pt")
    convert.plan(path)  # the control
    with pytest.raises(PlanError) as raised:
        convert.plan(edited(path, change))
    assert (code, key) in {(problem.code, problem.key) for problem in raised.value.problems}


@pytest.mark.parametrize("name", ["wavlm_base", "wavlm_large"])
def test_it_is_proved(name: str, tmp_path: Path) -> None:
    checkpoint, model = converted(name, tmp_path, write=save)
    with short_inputs():
        done = verify(checkpoint, model, devices=["cpu"])
        assert done.problems == ()
        runs = {run["input"]: run for run in done.report["runs"]}
        assert {run["verdict"] for run in runs.values() if run["require"] == "identical"} == {"identical"}
        assert {run["input"] for run in runs.values() if run["require"] == "rounding"} == {
            "padded-batch",
            "padded-batch-any-lengths",
        }
        controls = {control["name"]: control["caught"] for control in done.report["controls"]}
        assert (
            all(controls.values())
            and {
                "the gate of the positions lost",
                "half as far in the same buckets",
            }
            <= controls.keys()
        )
        assert list(done.report["controls_without_place"]) == ["2 attention heads instead of 4"]
        assert any("attention weights" in patch for patch in done.report["reference"]["patches"])
        edit(model / "config.json", max_bucket_distance=81)
        assert "different" in {problem.code for problem in verify(checkpoint, model, long=False, write=False).problems}


def test_back_to_unilm(tmp_path: Path) -> None:
    """The same file to unilm's class: its settings, its keys, its bytes."""
    checkpoint, model = converted("wavlm_large", tmp_path, write=save)
    restored = restore(model, tmp_path / "back.pt").path
    ours, theirs = torch.load(restored, weights_only=False), torch.load(checkpoint, weights_only=False)
    assert ours.keys() == theirs.keys() == {"cfg", "model"} and ours["cfg"] == theirs["cfg"]
    loaded = unilm.WavLM(unilm.WavLMConfig(ours["cfg"]))
    loaded.load_state_dict(ours["model"], strict=True)
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    again = convert.convert(restored, tmp_path / "again").path
    assert all(
        torch.equal(value, load_file(model / "model.safetensors")[key])
        for key, value in load_file(again / "model.safetensors").items()
    )


def test_the_tables_names_are_the_settings() -> None:
    assert set(BASE) <= {*vars(unilm.WavLMConfig()), "expand_attention_head_size"}
