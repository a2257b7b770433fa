"""data2vec audio 1.0: every variant against real fairseq, there and back again, and what is not the same is not taken for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import classification_models
import pytest
import torch
import transformers
from data2vec_models import BASE, REFUSED, RELEASED, VARIANTS, build, save
from data2vec_models import settings as settings_of
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2_classification import Wav2VecClassification
from fairseq_models import Variant, _Task, write
from faults import SILENT, reported, settings, weight_faults
from omegaconf import OmegaConf
from safetensors.torch import load_file
from verify_models import computed_once, few_inputs, short_inputs

import convert
from convert.errors import PlanError
from convert.mapping import infer_layout, map_state_dict, rename_key, table
from convert.verification import verify
from convert.verification.target import load

torch.serialization.add_safe_globals([Dictionary])  # fairseq's loader leaves torch.load at its default, weights only
TARGETS = {"ctc": "Data2VecAudioForCTC", "pretraining": "Data2VecAudioModel"}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs():
        yield


@pytest.fixture
def few() -> Iterator[None]:
    with few_inputs("quiet"):
        yield


def config(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return loaded


# --- there ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """To the bit, with an even and an odd number of frames, which fairseq is kept from padding."""
    variant, reference = VARIANTS[name], build(name)
    done = convert.convert(save(name, tmp_path / "m.pt", model=reference), tmp_path / "out")
    assert done.model.target == TARGETS[variant.kind]
    dropped = {drop.source for drop in done.model.plan.drops}
    assert dropped == ({"final_proj.weight", "final_proj.bias", "_ema"} if variant.kind == "pretraining" else set())
    assert done.model.plan.fills == ()
    made, depth = config(tmp_path / "out"), variant.encoder["pos_conv_depth"]
    assert (made["num_conv_pos_embeddings"], made["num_conv_pos_embedding_groups"]) == (depth, 4)
    assert made["conv_pos_kernel_size"] == max(3, variant.encoder["conv_pos"] // depth)
    assert made["mask_time_min_masks"] == 1
    twin = load(tmp_path / "out", "cpu").model
    encoder = reference.w2v_encoder.w2v_model if variant.kind == "ctc" else reference
    encoder.encoder.required_seq_len_multiple = 1
    for frames, samples in ((80, 3220), (79, 3180)):
        wave = torch.randn(1, samples)
        with torch.no_grad():
            if variant.kind == "ctc":
                expected = reference.get_logits(reference(source=wave, padding_mask=None)).transpose(0, 1)
                found = twin(wave).logits
            else:
                expected = reference(wave, mask=False, features_only=True)["x"]
                found = twin(wave).last_hidden_state
        assert found.shape[1] == frames
        if "blank" in name:  # a sum with the head's bias, which the conversion rounds
            assert torch.equal(expected[..., 1:], found[..., 1:])
        else:
            assert torch.equal(expected, found)


@pytest.mark.parametrize("name", ["ctc_blank_add", "ctc_depth_4", "pretrained"])
def test_it_is_proved(name: str, tmp_path: Path) -> None:
    path = save(name, tmp_path / "m.pt")
    convert.convert(path, tmp_path / "out")
    report = verify(path, tmp_path / "out", devices=["cpu"])
    assert report.problems == ()
    runs = {run["input"]: run for run in report.report["runs"]}
    single = {name: run for name, run in runs.items() if len(run["frames"]) == 1 and name != "speech-odd-as-built"}
    strict = "rounding" if "blank" in name else "identical"
    assert {run["require"] for run in single.values()} == {strict}
    assert {run["verdict"] for run in single.values()} <= {strict, "identical"}
    controls = {control["name"]: control["caught"] for control in report.report["controls"]}
    assert controls["two positional convolutions exchanged"] and all(controls.values())
    assert report.report["controls_without_place"] == {
        "the other norm placement": "Data2VecAudioModel has one",
        "weight_g of the positional convolution lost": "its positional convolutions have no weight norm",
    }
    stages = [row[0] for row in next(c for c in report.stages if c.kind == "run" and c.name == "speech-even").rows]
    assert {"conv.3", "feature_norm", "projection", "pos_conv", "layer.1", "encoder"} <= set(stages)


@pytest.mark.parametrize("layout", ["omegaconf", "interpolated"])
def test_every_layout_gives_the_same_model(layout: str, tmp_path: Path) -> None:
    model = build("ctc")
    for name, chosen in (("plain", "cfg"), ("other", layout)):
        convert.convert(save("ctc", tmp_path / f"{name}.pt", model=model, layout=chosen), tmp_path / name)
    for file in ("config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.usefixtures("few")
def test_the_files_as_they_were_released(tmp_path: Path) -> None:
    """Names and settings that fairseq's public code never had; its own loader does not take the file."""
    path = save("pretrained", tmp_path / "audio_base_ls.pt", released=True)
    with pytest.raises(RuntimeError, match=r"final_proj\.0\.weight"):
        checkpoint_utils.load_model_ensemble_and_task([str(path)])
    done = convert.convert(path, tmp_path / "out")
    assert {drop.source for drop in done.model.plan.drops} == {"final_proj.0.weight", "final_proj.0.bias", "_ema"}
    assert RELEASED.keys() <= done.model.training_only.keys()
    report = verify(path, tmp_path / "out", devices=["cpu"], write=False)
    assert report.problems == ()
    assert any("final_proj" in patch for patch in report.report["reference"]["patches"])
    convert.convert(save("pretrained", tmp_path / "today.pt"), tmp_path / "today")
    ours, todays = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "today"))
    assert ours.keys() == todays.keys() and all(torch.equal(ours[key], todays[key]) for key in ours)


def test_a_norm_that_is_left_out_is_missed(tmp_path: Path) -> None:
    """`conv_feature_no_norm_on_1d` is taken for harmless because a norm that it left out would be a missing tensor."""
    path = save("pretrained", tmp_path / "m.pt", released=True)
    state = torch.load(path, weights_only=False)
    del state["model"]["feature_extractor.conv_layers.2.2.1.weight"]
    torch.save(state, path)
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    assert ("missing-tensor", "feature_extractor.conv_layers.2.2.1.weight") in {
        (p.code, p.key) for p in raised.value.problems
    }


@pytest.mark.usefixtures("few")
def test_the_bare_encoder(tmp_path: Path) -> None:
    path = save("ctc", tmp_path / "m.pt")
    done = convert.convert(path, tmp_path / "out", head="encoder")
    assert done.model.target == "Data2VecAudioModel"
    assert verify(path, tmp_path / "out", devices=["cpu"], write=False).problems == ()


def test_every_value_of_the_settings_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("ctc", tmp_path / "m.pt"), tmp_path / "out")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    fresh = transformers.Data2VecAudioConfig()
    for key, value in config(tmp_path / "out").items():
        if key not in ("torch_dtype", "architectures"):
            assert hasattr(fresh, key) or key == "apply_spec_augment", (
                key
            )  # read by the model, in no configuration class
            found = getattr(loaded, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, key


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_twin_is_refused(name: str, tmp_path: Path) -> None:
    path = save(REFUSED[name], tmp_path / "model.pt", teacher=False)
    with pytest.raises(PlanError) as raised:
        convert.convert(path, tmp_path / "out")
    assert name in {problem.key for problem in raised.value.problems if problem.code == "unsupported-setting"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("kind", ["pretraining", "ctc"])
def test_data2vec_2_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = save("ctc" if kind == "ctc" else "pretrained", tmp_path / "m.pt")
    state = torch.load(path, weights_only=False)
    section = state["cfg"]["model"] if kind == "pretraining" else state["cfg"]["model"]["w2v_args"]["model"]
    section["_name"] = "data2vec_multi"
    torch.save(state, path)
    with pytest.raises(PlanError, match="data2vec_multi") as raised:
        convert.plan(path)
    assert raised.value.code == "unsupported-architecture"
    assert "data2vec 2.0" in str(raised.value)


def test_a_classifier_and_its_encoder(tmp_path: Path) -> None:
    pretrained = settings_of(VARIANTS["ctc"])["model"]["w2v_args"]
    classifier = classification_models.settings(classification_models.VARIANTS["classification_base"])
    classifier["model"] |= {"w2v_args": pretrained, "normalize": True}
    classifier["task"]["normalize"] = True
    labels = classification_models.dictionary()
    model = Wav2VecClassification.build_model(OmegaConf.create(classifier["model"]), _Task(labels))
    path = write(tmp_path / "m.pt", model, classifier, {"target_dictionary": labels})
    assert convert.plan(path).target == "Data2VecAudioForSequenceClassification"
    assert convert.plan(path, head="encoder").target == "Data2VecAudioModel"


def test_a_positional_convolution_more_than_there_is(tmp_path: Path) -> None:
    path = save("ctc", tmp_path / "m.pt")
    for depth, code in ((6, "missing-tensor"), (4, "unexpected-tensor"), (10**9, "bad-setting")):
        state = torch.load(path, weights_only=False)
        state["cfg"]["model"]["w2v_args"]["model"]["pos_conv_depth"] = depth
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(PlanError) as raised:
            convert.plan(tmp_path / "other.pt")
        assert code in {problem.code for problem in raised.value.problems}


def test_what_is_no_tensor_and_no_teacher(tmp_path: Path) -> None:
    path = save("ctc", tmp_path / "m.pt")
    state = torch.load(path, weights_only=False)
    state["model"]["_ema"] = {"mask_emb": torch.ones(1)}  # a fine-tuned model has no teacher
    torch.save(state, path)
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    assert [(problem.code, problem.key) for problem in raised.value.problems] == [("unexpected-tensor", "_ema")]


# --- back -----------------------------------------------------------------------------------------------------------


def restored(directory: Path, out: Path) -> torch.nn.Module:
    done = convert.restore(directory, out)
    assert bool(done.notes) == any("_ema" in note for note in done.notes)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(out)])
    return model.eval()


@pytest.mark.parametrize("name", ["ctc", "ctc_depth_4", "ctc_blank_add"])
def test_a_fine_tuned_model_there_and_back_again(name: str, tmp_path: Path) -> None:
    reference = build(name)
    convert.convert(save(name, tmp_path / "m.pt", model=reference), tmp_path / "out")
    before, after = reference.state_dict(), restored(tmp_path / "out", tmp_path / "back.pt").state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)


@pytest.mark.parametrize(
    ("released", "teacher", "whole"), [(False, True, False), (True, True, False), (False, False, True)]
)
def test_a_pretrained_model_there_and_back_again(released: bool, teacher: bool, whole: bool, tmp_path: Path) -> None:
    """The head comes from its file; the teacher is the model itself, as at the start of a pretraining."""
    own = {"ema_transformer_only": False, "ema_layers_only": False} if whole else {}
    variant = Variant("pretraining", BASE | own, normalize=True)
    reference = build(variant)
    tensors = {key: value.clone() for key, value in reference.state_dict().items()}
    path = save(variant, tmp_path / "m.pt", model=reference, released=released, teacher=teacher)
    convert.convert(path, tmp_path / "out", keep_final_proj=True)
    kept = load_file(tmp_path / "out/final_proj.safetensors")
    assert kept.keys() == {"final_proj.weight", "final_proj.bias"}
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)
    assert convert.compare_weights(path, tmp_path / "out") == []
    model = restored(tmp_path / "out", tmp_path / "back.pt")
    shared = model.ema.model.state_dict()
    after = model.state_dict()
    assert after.pop("_ema").keys() == shared.keys() and after.keys() == tensors.keys()
    assert all(after[key].numpy().tobytes() == tensors[key].numpy().tobytes() for key in tensors)
    assert all(torch.equal(shared[key], tensors[key if whole else f"encoder.{key}"]) for key in shared)
    assert model.train()(torch.randn(2, 6400))["losses"]["regression"].isfinite()
    assert (tmp_path / "back.pt").stat().st_size < 1.5 * sum(value.nbytes for value in tensors.values())  # stored once
    again = convert.convert(tmp_path / "back.pt", tmp_path / "again", keep_final_proj=True)
    assert {drop.source for drop in again.model.plan.drops} == {"final_proj.weight", "final_proj.bias", "_ema"}
    for file in ("model.safetensors", "final_proj.safetensors"):
        first, second = (load_file(tmp_path / folder / file) for folder in ("out", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_pretrained_model_without_its_head_has_no_way_back(tmp_path: Path) -> None:
    convert.convert(save("pretrained", tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(PlanError) as raised:
        convert.restore(tmp_path / "out", tmp_path / "back.pt")
    assert {problem.key for problem in raised.value.problems} == {"final_proj.weight", "final_proj.bias"}
    assert "--keep-final-proj" in raised.value.hint


def test_a_head_that_a_fine_tuned_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        convert.plan(save("ctc", tmp_path / "m.pt"), keep_final_proj=True)
    assert [problem.key for problem in raised.value.problems] == ["--keep-final-proj"]


# --- the names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_dict_of_real_fairseq_fits_the_class(name: str, tmp_path: Path) -> None:
    """Names and shapes against transformers' own model on the meta device."""
    state = build(name).state_dict()
    convert.convert(save(name, tmp_path / "m.pt", teacher=False), tmp_path / "out")
    moved = map_state_dict(state)
    with torch.device("meta"):
        made = transformers.Data2VecAudioConfig(**config(tmp_path / "out"))
        live = getattr(transformers, TARGETS[VARIANTS[name].kind])(made).state_dict()
    assert {key: value.shape for key, value in moved.items()} == {key: value.shape for key, value in live.items()}
    layout = infer_layout({key: value.shape for key, value in state.items()})
    assert layout.family == "data2vec_audio" and layout.own.depth == VARIANTS[name].encoder["pos_conv_depth"]
    back = table(layout).inverse.map_state_dict(moved)
    assert all(back[key] is state[key] for key in back)
    assert {key for key in state if key not in back} == {key for key in state if key.startswith("final_proj.")}


def test_keys_for_other_peoples_scripts() -> None:
    shapes = {key: tuple(value.shape) for key, value in build("ctc").state_dict().items()}
    prefix, target = "w2v_encoder.w2v_model.encoder.", "data2vec_audio.encoder."
    found = rename_key(f"{prefix}pos_conv.3.0.bias", shapes)
    assert found == f"{target}pos_conv_embed.layers.3.conv.bias"
    with pytest.raises(PlanError, match="not a data2vec audio"):
        infer_layout({"encoder.layers.0.fc1.weight": (4, 4)}, "data2vec_audio")


# --- faults ---------------------------------------------------------------------------------------------------------


def test_every_fault_is_reported(tmp_path: Path) -> None:
    """Every tensor perturbed, moved or swapped, and every value of the configuration that the class reads."""
    smallest = {"encoder_layers": 1, "conv_feature_layers": "[(32, 10, 5)] + [(32, 4, 4)]", "pos_conv_depth": 2}
    with few_inputs("quiet"), computed_once():
        path = save(Variant("ctc", BASE | smallest, normalize=True), tmp_path / "m.pt")
        pair = (path, convert.convert(path, tmp_path / "model").path)
        wrong: dict[str, Any] = {
            "num_conv_pos_embeddings": 3,
            "conv_pos_kernel_size": 6,
            "num_conv_pos_embedding_groups": 2,
            "hidden_act": "relu",
            "feat_extract_activation": "relu",
            "num_attention_heads": 2,
            "layer_norm_eps": 1e-3,
            "conv_stride": [5, 2],
            "conv_bias": True,
            "num_hidden_layers": 2,
            "architectures": ["Wav2Vec2ForCTC"],
        }
        faults = weight_faults(pair[1]) | {name: settings("config.json", **{name: wrong[name]}) for name in wrong}
        codes = {label: reported(pair, fault, tmp_path) for label, fault in faults.items()}
    of_weights = {label: found for label, found in codes.items() if label not in wrong}
    assert len(of_weights) > 50
    assert [label for label, found in of_weights.items() if "bytes" not in found] == []
    seen = {label: found for label, found in of_weights.items() if not any(part in label for part in SILENT)}
    assert [label for label, found in seen.items() if "different" not in found] == []  # the outputs, on their own
    wanted = {"different", "load", "missing-keys", "unexpected-keys", "mismatched-keys"}
    assert [label for label in wrong if not codes[label] & wanted] == []
    computed = {label for label in wrong if "different" in codes[label]}
    assert {"hidden_act", "layer_norm_eps", "num_attention_heads", "feat_extract_activation"} <= computed
