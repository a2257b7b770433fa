"""Conformers: converted, verified and restored against real fairseq, and refused where transformers has no equivalent."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conformer_models import REFUSED, VARIANTS, build, buildable, save
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from faults import Fault, in_weights, reported, settings
from faults import weight_faults as every_weight_fault
from verify_models import computed_once, few_inputs, short_inputs

import convert
from convert.errors import PlanError
from convert.mapping import infer_layout, map_state_dict, table
from convert.publishing.card import compose
from convert.publishing.facts import Stated, gather
from convert.publishing.files import read
from convert.publishing.verified import Verified
from convert.verification import record, verify
from convert.verification.fairseq_side.arithmetic import lifted

torch.serialization.add_safe_globals([Dictionary])
SAMPLES = (4120, 4160, 16040)  # 102, 103 and 400 frames
WITHOUT_PLACE = {
    "weight_g of the positional convolution lost": "Wav2Vec2ConformerModel does not use its positional convolution",
    "the other norm placement": "Wav2Vec2ConformerModel has one",
}


def load(directory: Path) -> torch.nn.Module:
    """Load with plain transformers, strictly, and with the attention that is written as fairseq's is."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, name)
    model, info = cls.from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
@buildable()
def outputs(model: torch.nn.Module, wave: torch.Tensor, padding: torch.Tensor | None = None) -> list[torch.Tensor]:
    """fairseq's logits, or hidden states and both projections."""
    if hasattr(model, "w2v_encoder"):
        made = model(source=wave, padding_mask=padding)
        return [model.get_logits(made).transpose(0, 1)]
    features = model.extract_features(source=wave, padding_mask=padding)
    codes = model.quantizer(features["features"], produce_targets=True)
    return [features["x"], model.project_q(codes["x"]), model.final_proj(features["x"])]


@torch.no_grad()
def counterpart_outputs(
    model: torch.nn.Module, wave: torch.Tensor, mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The same of transformers' model."""
    if isinstance(model, transformers.Wav2Vec2ConformerForCTC):
        return [model(wave, attention_mask=mask).logits]
    if isinstance(model, transformers.Wav2Vec2ConformerModel):
        return [model(wave, attention_mask=mask).last_hidden_state]
    made = model.wav2vec2_conformer(wave, attention_mask=mask)
    quantized, _ = model.quantizer(made.extract_features)
    return [made.last_hidden_state, model.project_q(quantized), model.project_hid(made.last_hidden_state)]


def waves(samples: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, samples, generator=torch.Generator().manual_seed(samples))


def furthest(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit where the scale of attention is a power of 2, else within what float32 is off from float64."""
    reference = build(name)
    convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    twin = load(tmp_path / "out")
    for samples in SAMPLES:
        wave = waves(samples)
        theirs, ours = outputs(reference, wave), counterpart_outputs(twin, wave)
        if "head" not in name:
            assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True)), samples
            continue
        with lifted(reference.double()):  # each side measured against itself
            exact = (
                outputs(reference, wave.double()),
                counterpart_outputs(load(tmp_path / "out").double(), wave.double()),
            )
        reference = build(name)  # anew: its table of positions was made in float64
        assert 0 < furthest(theirs, ours) <= furthest(theirs, exact[0]) + furthest(ours, exact[1])


@pytest.mark.parametrize("name", ["pretrained_relative", "pretrained_rotary"])
def test_a_padded_batch(name: str, tmp_path: Path) -> None:
    reference = build(name)
    convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    lengths = torch.tensor([16040, 9000, 5000])
    mask = torch.arange(16040)[None] < lengths[:, None]
    wave = waves(16040, 3) * mask
    theirs = outputs(reference, wave, ~mask)[0]
    twin = load(tmp_path / "out")
    ours, unmasked = counterpart_outputs(twin, wave, mask.long())[0], counterpart_outputs(twin, wave)[0]
    frames = [int(count) for count in twin._get_feat_extract_output_lengths(lengths)]
    assert all(torch.equal(theirs[i, :count], ours[i, :count]) for i, count in enumerate(frames))
    assert not torch.equal(theirs[2, : frames[2]], unmasked[2, : frames[2]])  # the control


@pytest.mark.parametrize("name", ["ctc_rotary", "pretrained_relative"])
def test_the_bare_encoder(name: str, tmp_path: Path) -> None:
    reference = build(name)
    done = convert.convert(save(name, tmp_path / "m.pt", model=reference), tmp_path / "out", head="encoder")
    assert done.model.target == "Wav2Vec2ConformerModel"
    encoder = reference.w2v_encoder.w2v_model if name.startswith("ctc") else reference
    wave = waves(SAMPLES[0])
    with torch.no_grad(), buildable():
        expected = encoder.extract_features(source=wave, padding_mask=None)["x"]
    assert torch.equal(expected, counterpart_outputs(load(tmp_path / "out"), wave)[0])


@pytest.mark.parametrize("name", ["ctc_relative", "ctc_rotary", "pretrained_rotary"])
def test_the_table_fits_the_class(name: str) -> None:
    """Names, shapes and types against transformers' own model; what is dropped is in every other layer, too."""
    state = build(name).state_dict()
    made = table(infer_layout({key: value.shape for key, value in state.items()}))
    moved = made.map_state_dict(state)
    assert map_state_dict(state).keys() == moved.keys()
    assert {state[key].dtype for key, kind in made.inverse.dtypes.items() if kind == "I64"} == {torch.int64}
    assert all(torch.equal(state[key], state[drop.repeats]) for key, drop in made.drops.items())
    returned = made.inverse.map_state_dict(moved)
    assert returned.keys() == state.keys() - made.drops.keys()
    assert all(returned[key] is state[key] for key in returned)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_twin_is_refused(name: str, tmp_path: Path) -> None:
    path = save(REFUSED[name], tmp_path / "model.pt")
    with pytest.raises(PlanError) as raised:
        convert.convert(path, tmp_path / "out")
    assert {problem.key for problem in raised.value.problems if problem.code == "unsupported-setting"} == {name}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)
    return path


PREFIX = "w2v_encoder.w2v_model.encoder.layers."


@pytest.mark.parametrize(
    ("edit", "code", "key"),
    [
        (lambda s: s["model"][f"{PREFIX}2.self_attn.rotary_emb.inv_freq"].mul_(1.000001), "not-repeated", f"{PREFIX}2.self_attn.rotary_emb.inv_freq"),
        (lambda s: s["model"].pop(f"{PREFIX}1.self_attn.rotary_emb.inv_freq"), "missing-tensor", f"{PREFIX}1.self_attn.rotary_emb.inv_freq"),
        (lambda s: s["model"].update({f"{PREFIX}1.conv_module.batch_norm.num_batches_tracked": torch.tensor(1.0)}), "dtype", f"{PREFIX}1.conv_module.batch_norm.num_batches_tracked"),
        (lambda s: s["model"].update({f"{PREFIX}1.conv_module.batch_norm.running_var": torch.ones(64).long()}), "dtype", f"{PREFIX}1.conv_module.batch_norm.running_var"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(depthwise_conv_kernel_size=9), "shape", f"{PREFIX}0.conv_module.depthwise_conv.weight"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(encoder_attention_heads=2), "shape", f"{PREFIX}0.self_attn.rotary_emb.inv_freq"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(pos_enc_type="rel_pos"), "missing-tensor", f"{PREFIX}0.self_attn.pos_bias_u"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].pop("pos_enc_type"), "unsupported-setting", "pos_enc_type"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].pop("attn_type"), "unsupported-setting", "attn_type"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].pop("layer_norm_first"), "unsupported-setting", "layer_norm_first"),
        (lambda s: s["cfg"]["model"].update(layer_type="transformer"), "missing-tensor", f"{PREFIX}0.fc1.weight"),
    ],
)  # fmt: skip
def test_a_tensor_or_setting_that_does_not_fit(edit: Callable[..., Any], code: str, key: str, tmp_path: Path) -> None:
    path = save("ctc_rotary", tmp_path / "model.pt")
    convert.plan(path)  # the control
    with pytest.raises(PlanError) as raised:
        convert.plan(edited(path, edit))
    assert (code, key) in {(problem.code, problem.key) for problem in raised.value.problems}


def test_every_value_of_the_settings_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("ctc_rotary", tmp_path / "m.pt"), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    for key, value in written.items():
        if key not in ("torch_dtype", "architectures"):
            found = getattr(loaded, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, key
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "conformer_conv_dropout")
    assert [written[name] for name in dropouts] == [0.06] * 4  # fairseq's layers have one for all
    expected = {"layerdrop": 0.02, "hidden_act": "swish", "position_embeddings_type": "rotary"}
    expected |= {"conv_depthwise_kernel_size": 7, "final_dropout": 0.01, "model_type": "wav2vec2-conformer"}
    assert expected.items() <= written.items()
    assert "do_stable_layer_norm" not in written


def older(state: dict[str, Any]) -> None:
    """What fairseq 0.12.2 writes: nothing of layers among the settings of fine-tuning."""
    for name in ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"):
        state["cfg"]["model"].pop(name)


@pytest.mark.parametrize("name", ["ctc_relative", "ctc_rotary", "pretrained_rotary", "older"])
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    """Every byte comes back, repeated ones too, in a file that fairseq's own loader takes."""
    variant = "ctc_rotary" if name == "older" else name
    reference = build(variant)
    path = save(variant, tmp_path / "first.pt", model=reference)
    convert.convert(edited(path, older) if name == "older" else path, tmp_path / "out")
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    with buildable():
        (restored,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "back.pt")])
    before, after = reference.state_dict(), restored.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs():
        yield


@pytest.mark.parametrize("name", ["ctc_relative", "ctc_rotary", "pretrained_rotary", "ctc_relative_head_8", "older"])
def test_verify(name: str, tmp_path: Path) -> None:
    """Identical, or within the floor where the scale of attention rounds; every mistake caught, or told to have no place."""
    path = save("ctc_relative" if name == "older" else name, tmp_path / "model.pt")
    convert.convert(edited(path, older) if name == "older" else path, tmp_path / "out")
    done = verify(path, tmp_path / "out", devices=["cpu"], write=False, long=False)
    assert done.problems == ()
    verdicts = {run["input"]: run["verdict"] for run in done.report["runs"]}
    assert verdicts.pop("speech-even, sdpa") == "rounding"
    single = {verdict for given, verdict in verdicts.items() if given not in ("padded-batch", "shortest")}
    assert single == {"rounding" if "head" in name else "identical"}
    assert done.report["environment"]["attention"] == "eager"
    caught = {control["name"] for control in done.report["controls"] if control["caught"]}
    rotary = "rotary" in name
    own = "frequencies of the positions reversed" if rotary else "pos_bias_u and pos_bias_v swapped"
    assert {"q and k of layer 1 swapped", "a running variance lost", "gelu instead of swish", own} <= caught
    assert len(caught) == len(done.report["controls"])
    absent = dict(done.report["controls_without_place"])
    heads = next(reason for mistake, reason in absent.items() if "attention heads" in mistake)
    assert ("inv_freq" if rotary else "pos_bias_u") in heads
    assert WITHOUT_PLACE.items() <= absent.items() and len(absent) == len(WITHOUT_PLACE) + 1
    assert done.report["reference"]["patches"][0].startswith("layer_idx and corpus_key, which are for adapter layers")


@pytest.mark.parametrize(("name", "dtype"), [("ctc_rotary", "float16"), ("pretrained_relative", "bfloat16")])
def test_half_precision(name: str, dtype: str, tmp_path: Path) -> None:
    """Counters stay whole; and with rounded weights both sides are the same again, tables of positions included."""
    path = save(name, tmp_path / "model.pt")
    convert.convert(path, tmp_path / "out", dtype=dtype)
    done = verify(path, tmp_path / "out", devices=["cpu"], write=False, long=False)
    assert done.problems == ()
    runs = [run for run in done.report["runs"] if run["dtype"] == f"float32 with {dtype} weights"]
    assert {run["verdict"] for run in runs if run["input"] != "padded-batch"} == {"identical"}
    tensors = load(tmp_path / "out").state_dict()
    counts = [value for key, value in tensors.items() if key.endswith("num_batches_tracked")]
    assert counts == [value for key, value in build(name).state_dict().items() if key.endswith("num_batches_tracked")]


@pytest.mark.parametrize("name", ["ctc_relative", "ctc_rotary", "pretrained_rotary"])
def test_fairseq_0_12_2_needs_no_patch_and_agrees(name: str, tmp_path: Path) -> None:
    """The version that conformers were made with: the proof that the patch of today's changes nothing."""
    if "FAIRSEQ_0_12_2" not in os.environ:
        pytest.skip("fairseq 0.12.2 was not tried: FAIRSEQ_0_12_2 names no folder that holds its package")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{os.environ["FAIRSEQ_0_12_2"]}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    path = save(name, tmp_path / "model.pt")
    convert.convert(edited(path, older) if name.startswith("ctc") else path, tmp_path / "out")
    done = verify(path, tmp_path / "out", fairseq_python=str(python), devices=["cpu"], write=False, long=False)
    assert done.problems == ()
    assert {run["verdict"] for run in done.report["runs"] if run["require"] == "identical"} == {"identical"}
    assert not any("ConformerEncoder" in patch for patch in done.report["reference"]["patches"])


def test_a_recording(tmp_path: Path) -> None:
    path = save("ctc_rotary", tmp_path / "model.pt")
    convert.convert(path, tmp_path / "out")
    record(path, tmp_path / "recording.safetensors", long=False)
    done = verify(path, tmp_path / "out", reference=tmp_path / "recording.safetensors", devices=["cpu"], long=False)
    assert done.problems == ()
    card = compose(
        gather(read(tmp_path / "out"), "me/tiny", verification=Verified.of(done.report), pin="v1", stated=Stated())
    ).decode()
    assert "Wav2Vec2ConformerForCTC.from_pretrained" in card and 'attn_implementation="eager"' in card
    assert "- wav2vec2-conformer" in card


# Faults that outputs cannot show: what neither framework computes with, and a bias on all keys alike
SILENT = ("masked_spec_embed", "linear_k.bias", "pos_conv_embed", "num_batches_tracked")


def weight_faults(model: Path) -> dict[str, Fault]:
    """Every tensor of the last layer perturbed, and all faults of its attention."""
    faults = {
        name: fault
        for name, fault in every_weight_fault(model).items()
        if ".layers.1.self_attn." in name or ("perturbed" in name and ".encoder.layers.1." in name)
    }
    counters = [name for name in faults if "num_batches_tracked" in name]
    for name in counters:
        del faults[name]
    counter = counters[0].removeprefix("perturbed ")
    return faults | {f"counted {counter}": in_weights(lambda tensors: tensors.update({counter: tensors[counter] + 1}))}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    made = {}
    for name in ("ctc_relative", "ctc_rotary_base"):
        folder = tmp_path_factory.mktemp(name)
        made[name] = (save(name, folder / "model.pt"), convert.convert(folder / "model.pt", folder / "out").path)
    return made


def test_every_fault_in_the_weights_is_reported(pairs: Any, tmp_path: Path) -> None:
    faults = weight_faults(pairs["ctc_relative"][1])
    assert len(faults) > 40
    with few_inputs("speech-even", "quiet"), computed_once():
        codes = {name: reported(pairs["ctc_relative"], fault, tmp_path) for name, fault in faults.items()}
    assert [name for name, found in codes.items() if "bytes" not in found] == []
    unseen = [name for name, found in codes.items() if "different" not in found]
    assert [name for name in unseen if not any(part in name for part in SILENT)] == []
    assert any("num_batches_tracked" in name for name in unseen)


# Another value of each setting that changes what the model computes, or whether it loads.
WRONG: dict[str, Any] = {
    "architectures": ["Wav2Vec2ConformerModel"],
    "conv_bias": True,
    "conv_depthwise_kernel_size": 9,
    "conv_dim": [32, 32, 32, 16],
    "conv_kernel": [10, 3, 2, 2],
    "conv_stride": [5, 2, 2, 1],
    "feat_extract_activation": "relu",
    "feat_extract_norm": "layer",
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-3,
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 17,
    "num_feat_extract_layers": 5,
    "num_hidden_layers": 1,
    "pad_token_id": 1,
    "position_embeddings_type": "relative",
    "torch_dtype": "float16",  # transformers 5 loads in this type
    "vocab_size": 31,
}
# Another word where only the files' comparison can tell.
WORDS = {"ctc_loss_reduction": "mean", "model_type": "wav2vec2"}
SEEN = {"different", "vocabulary", "load", "missing-keys", "unexpected-keys", "mismatched-keys"}


def test_every_setting_counts_where_it_should(pairs: Any, tmp_path: Path) -> None:
    """Every value of config.json is changed in turn: each change is reported, and these by more than the files' comparison."""
    config = json.loads((pairs["ctc_rotary_base"][1] / "config.json").read_text())
    changes = {name: other(value) for name, value in config.items()} | WRONG | WORDS
    assert changes.keys() == config.keys() and all(changes[name] != config[name] for name in config)
    with few_inputs("speech-even", "quiet"), computed_once():
        codes = {
            name: reported(pairs["ctc_rotary_base"], settings("config.json", **{name: value}), tmp_path)
            for name, value in changes.items()
        }
    assert [name for name, found in codes.items() if not found] == []
    assert {name for name, found in codes.items() if found & SEEN} == WRONG.keys()


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return (value + 1) / 2  # a probability stays one
    return value + 1 if isinstance(value, int) else value
