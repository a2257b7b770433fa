"""Audio classifiers: converted ones compute what real fairseq ones compute, and what has no equivalent is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classification_models import EMOTIONS, LANGUAGES, LINEAR, REFUSED, VARIANTS, Variant, build, dictionary, save
from comparing import EVEN, ODD, config, edited, load
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq_models import BASE
from faults import SILENT, reported, settings, weight_faults
from hub_fixtures import facts_of
from safetensors.numpy import load_file, save_file
from verify_models import computed_once, edit, few_inputs, short_inputs

import convert
from convert.errors import PlanError
from convert.publishing import metadata
from convert.publishing.card import compose
from convert.restoration import restore
from convert.verification import record, verify
from convert.verification.fairseq_side.arithmetic import lifted

LENGTHS = (4160, 3000, 2000)


def converted(name: str, folder: Path, **how: Any) -> tuple[Path, Path]:
    checkpoint = save(name, folder / "m.pt")
    return checkpoint, convert.convert(checkpoint, folder / "out", **how).path


def wave_of(samples: int) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))


@torch.no_grad()
def sides(
    reference: torch.nn.Module, twin: torch.nn.Module, wave: torch.Tensor, mask: Any = None
) -> list[torch.Tensor]:
    """fairseq's class scores, and transformers'."""
    given = {} if mask is None else {"attention_mask": mask.long()}
    return [reference(source=wave, padding_mask=None if mask is None else ~mask), twin(wave, **given).logits]


def rounding_only(reference: torch.nn.Module, twin: torch.nn.Module, wave: torch.Tensor, mask: Any = None) -> bool:
    """Whether two sides are as close as each is to itself in float64: nothing but rounding can keep them apart then."""
    theirs, ours = sides(reference, twin, wave, mask)
    with lifted(reference.double()):
        exact = sides(reference, twin.double(), wave.double(), mask)
    reference.float(), twin.float()
    floor = sum(float((side - best).abs().max()) for side, best in zip((theirs, ours), exact, strict=True))
    return float((theirs.double() - ours.double()).abs().max()) <= floor + 1e-12  # float64's own rounding


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit for single utterances, at odd numbers of frames once fairseq pads none; batches within rounding."""
    reference = build(name)
    done = convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    assert (done.model.target, done.model.plan.drops) == ("Wav2Vec2ForSequenceClassification", ())
    twin = load(tmp_path / "out")
    assert tuple(twin.config.id2label[i] for i in range(twin.config.num_labels)) == VARIANTS[name].labels
    encoder = reference.w2v_encoder.w2v_model.encoder
    for samples in EVEN + ODD:
        encoder.required_seq_len_multiple = 2
        assert rounding_only(reference, twin, wave_of(samples)), samples
        encoder.required_seq_len_multiple = 1
        theirs, ours = sides(reference, twin, wave_of(samples))
        assert theirs.shape == (1, len(VARIANTS[name].labels)) and torch.equal(theirs, ours), samples
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    batch = torch.randn(len(LENGTHS), max(LENGTHS)) * mask
    assert rounding_only(reference, twin, batch, mask)
    twin._get_feature_vector_attention_mask = lambda frames, _: torch.ones(len(batch), frames, dtype=torch.bool)
    assert not rounding_only(reference, twin, batch, mask)  # the control: the padding is pooled too


def test_the_comparison_sees_a_mistake(tmp_path: Path) -> None:
    reference = build("classification_latent")
    convert.convert(save("classification_latent", tmp_path / "m.pt", model=reference), tmp_path / "out")
    twin = load(tmp_path / "out")
    assert torch.equal(*sides(reference, twin, wave_of(EVEN[0])))
    with torch.no_grad():
        twin.projector.bias[0] += 1e-4
    assert not torch.equal(*sides(reference, twin, wave_of(EVEN[0])))


@pytest.mark.parametrize("key", REFUSED)
def test_a_pooling_without_a_twin_is_refused_and_its_encoder_is_not(key: str, tmp_path: Path) -> None:
    for number, variant in enumerate(REFUSED[key]):
        reference = build(variant)
        path = save(variant, tmp_path / f"{number}.pt", model=reference)
        with pytest.raises(PlanError) as raised:
            convert.convert(path, tmp_path / "out")
        (problem,) = [p for p in raised.value.problems if p.code == "unsupported-setting"]
        assert (
            problem.key == key
            and repr(variant.fine_tuned[key]) in problem.detail
            and "--head encoder" in problem.detail
        )
        out = convert.convert(path, tmp_path / f"{number}", head="encoder").path
        encoder = reference.w2v_encoder.w2v_model
        with torch.no_grad():
            expected = encoder.extract_features(source=wave_of(EVEN[0]), padding_mask=None)["x"]
            assert torch.equal(expected, load(out)(wave_of(EVEN[0])).last_hidden_state)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pooling", "activation_fn"])
def test_what_fairseq_assumes_where_the_settings_are_silent_is_refused(name: str, tmp_path: Path) -> None:
    path = edited(save("classification_base", tmp_path / "m.pt"), lambda state: state["cfg"]["model"].pop(name))
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    default = {"pooling": "first_token", "activation_fn": "gelu"}[name]
    assert [p.key for p in raised.value.problems] == [name] and repr(default) in raised.value.problems[0].detail


@pytest.mark.parametrize(
    ("edit", "code", "key"),
    [
        (lambda s: s["cfg"]["model"].update(latent_embed_dim=25), "shape", "pooling_layer.linear.weight"),
        (lambda s: s["cfg"]["model"].update(latent_embed_dim=None), "shape", "pooling_layer.linear.weight"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(_name="data2vec_multi"), "unsupported-architecture", "data2vec_multi"),
        (lambda s: s["cfg"]["model"].update(new_pooling=3), "unknown-setting", "new_pooling"),
        (lambda s: s["model"].update({"pooling_layer.weights": torch.ones(3)}), "unexpected-tensor", "pooling_layer.weights"),
        (lambda s: s["model"].pop("pooling_layer.projection.bias"), "missing-tensor", "pooling_layer.projection.bias"),
        (lambda s: s["task_state"].update(target_dictionary=dictionary(LANGUAGES)), "dictionary-size", "dictionary"),
        (lambda s: s["task_state"]["target_dictionary"].symbols.__setitem__(0, "joy"), "bad-dictionary", "dictionary"),
        (lambda s: s.pop("task_state"), "no-dictionary", "--dict"),
    ],
)  # fmt: skip
def test_a_setting_is_carried_or_a_reason(edit: Callable[..., Any], code: str, key: str, tmp_path: Path) -> None:
    path = save("classification_latent", tmp_path / "m.pt")
    convert.plan(path)  # the control
    with pytest.raises(PlanError) as raised:
        convert.plan(edited(path, edit))
    assert (code, key) in {(problem.code, problem.key) for problem in raised.value.problems}


def test_labels_from_a_file_have_no_special_symbols(tmp_path: Path) -> None:
    path = save("classification_latent", tmp_path / "m.pt")
    convert.convert(path, tmp_path / "inside")
    labels = tmp_path / "dict.lang.txt"
    labels.write_text("".join(f"{label} 1\n" for label in EMOTIONS))
    edited(path, lambda state: state.pop("task_state"))
    convert.convert(path, tmp_path / "given", dictionary=labels)
    assert config(tmp_path / "inside") == config(tmp_path / "given")
    assert config(tmp_path / "given")["id2label"] == dict(zip("012", EMOTIONS, strict=True))


def test_every_value_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("classification_latent", tmp_path / "m.pt"), tmp_path / "out")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    expected = {"classifier_proj_size": 24, "num_labels": 3, "final_dropout": 0.01, "use_weighted_layer_sum": False}
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert loaded.label2id == {label: index for index, label in enumerate(EMOTIONS)}


def test_the_activation_of_the_pooling_is_not_the_encoders(tmp_path: Path) -> None:
    variant = Variant(BASE | {"activation_fn": "relu"}, LINEAR)
    convert.convert(save(variant, tmp_path / "m.pt"), tmp_path / "out")
    assert config(tmp_path / "out")["hidden_act"] == "relu"


def test_plain_transformers_uses_it(tmp_path: Path) -> None:
    """The pipeline names fairseq's best label; AutoProcessor is the feature extractor, there being no tokenizer."""
    reference = build("classification_large")
    convert.convert(save("classification_large", tmp_path / "m.pt", model=reference), tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"}
    wave = wave_of(16000)[0]
    with torch.no_grad():
        scores = reference(source=torch.nn.functional.layer_norm(wave, wave.shape)[None], padding_mask=None)[0]
    best = [LANGUAGES[index] for index in scores.argsort(descending=True)]
    classify = transformers.pipeline("audio-classification", str(tmp_path / "out"))
    assert [answer["label"] for answer in classify(wave.numpy(), top_k=5)] == best
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "Wav2Vec2FeatureExtractor"
    assert set(processor(np.zeros(800), sampling_rate=16000)) == {"input_values", "attention_mask"}


@pytest.mark.parametrize("name", ["classification_base", "classification_latent", "classification_one_label"])
def test_every_variant_is_proved(name: str, tmp_path: Path) -> None:
    checkpoint, model = converted(name, tmp_path)
    with short_inputs():
        done = verify(checkpoint, model, devices=["cpu"])
    assert done.problems == ()
    runs = {run["input"]: run for run in done.report["runs"]}
    assert {run["verdict"] for run in runs.values() if run["require"] == "identical"} == {"identical"}
    assert {run["input"] for run in runs.values() if run["require"] == "rounding"} == {
        "speech-odd-as-built",
        "padded-batch",
    }
    assert len(runs["padded-batch"]["frames"]) == 3 and runs["padded-batch"]["verdict"] in ("identical", "rounding")
    assert {"layer.0", "encoder", "projector", "pooled", "logits"} <= {row[0] for row in done.stages[0].rows}
    controls = {control["name"]: control["caught"] for control in done.report["controls"]}
    many = len(VARIANTS[name].labels) > 1
    heads = {"a bias of the projector changed"} | (
        {"the classes moved by one", "two labels exchanged"} if many else set()
    )
    assert all(controls.values()) and heads <= controls.keys() and len(controls) == (11 if many else 9)
    assert set(done.report["controls_without_place"]) == (
        set() if many else {"the classes moved by one", "two labels exchanged"}
    )
    speech = done.report["end_to_end"][0]
    assert speech["fairseq_text"] == speech["hf_text"] in VARIANTS[name].labels and speech["same_path"] is None


def test_other_labels_and_half_types(tmp_path: Path) -> None:
    checkpoint, model = converted("classification_latent", tmp_path, dtype="bfloat16")
    with short_inputs():
        assert verify(checkpoint, model, devices=["cpu"], long=False).problems == ()
        names = {"0": "fear", "1": "anger", "2": "joy"}
        edit(model / "config.json", id2label=names, label2id={name: int(index) for index, name in names.items()})
        done = verify(checkpoint, model, devices=["cpu"], long=False)
    assert {problem.key for problem in done.problems if problem.code == "labels"} == {"class 0", "class 1"}


def test_a_recording_answers_later(tmp_path: Path) -> None:
    checkpoint, model = converted("classification_latent", tmp_path)
    with short_inputs():
        record(checkpoint, tmp_path / "recording", long=False)
        assert verify(checkpoint, model, reference=tmp_path / "recording", devices=["cpu"]).problems == ()
        tensors = load_file(model / "model.safetensors")
        tensors["projector.bias"][3] += 1e-4
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        done = verify(checkpoint, model, reference=tmp_path / "recording", devices=["cpu"], write=False)
    assert {run["stage"] for run in done.report["runs"]} == {"projector"}


@pytest.mark.parametrize("given", [False, True])
def test_back_to_fairseq_and_into_its_own_loader(given: bool, tmp_path: Path) -> None:
    """The same bytes and settings; fairseq's task wants the labels as a file too, whatever the checkpoint holds."""
    model = build("classification_latent")
    checkpoint = save("classification_latent", tmp_path / "m.pt", model=model)
    labels = tmp_path / "dict.lang.txt"
    labels.write_text("".join(f"{label} 1\n" for label in EMOTIONS))
    if given:
        edited(checkpoint, lambda state: state.pop("task_state"))
    convert.convert(checkpoint, tmp_path / "out", dictionary=labels if given else None)
    restored = restore(tmp_path / "out", tmp_path / "back.pt").path
    assert convert.compare_weights(restored, tmp_path / "out") == []
    original = torch.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: original(*a, **(k | {"weights_only": False})))
        (loaded,), _, task = load_model_ensemble_and_task(
            [str(restored)], arg_overrides={"task": {"data": str(tmp_path)}}
        )
    assert task.target_dictionary.symbols == list(EMOTIONS) and task.target_dictionary[9] == "<unk>"
    assert not hasattr(task.target_dictionary, "bos_index")
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    wave = wave_of(4120)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(source=wave, padding_mask=None), model(source=wave, padding_mask=None))
    again = convert.convert(restored, tmp_path / "again").path
    assert (again / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_every_fault_is_reported(tmp_path: Path) -> None:
    """Every tensor perturbed, moved or swapped, and every value that decides the classes or their names."""
    smallest = {"encoder_layers": 1, "conv_feature_layers": "[(32, 10, 5)] + [(32, 4, 4)]"}
    variant = Variant(BASE | smallest, LINEAR | {"latent_embed_dim": 24}, EMOTIONS)
    with short_inputs(), few_inputs("quiet", "padded-batch"), computed_once():
        path = save(variant, tmp_path / "m.pt")
        pair = (path, convert.convert(path, tmp_path / "model").path)
        wrong: dict[str, Any] = {
            "hidden_act": "relu",
            "num_attention_heads": 2,
            "classifier_proj_size": 12,
            "use_weighted_layer_sum": True,
            "id2label": {"0": "fear", "1": "anger", "2": "joy"},
            "architectures": ["Wav2Vec2ForXVector"],
        }
        faults = weight_faults(pair[1]) | {name: settings("config.json", **{name: wrong[name]}) for name in wrong}
        faults["unnamed"] = settings("config.json", id2label={str(i): f"LABEL_{i}" for i in range(3)})
        codes = {label: reported(pair, fault, tmp_path) for label, fault in faults.items()}
    of_weights = {label: found for label, found in codes.items() if label not in {*wrong, "unnamed"}}
    assert any("classifier" in label for label in of_weights) and any("projector" in label for label in of_weights)
    assert [label for label, found in of_weights.items() if "bytes" not in found] == []
    seen = {label: found for label, found in of_weights.items() if not any(part in label for part in SILENT)}
    assert [label for label, found in seen.items() if "different" not in found] == []  # the outputs, on their own
    wanted = {"different", "load", "labels", "missing-keys", "unexpected-keys", "mismatched-keys"}
    assert [label for label in (*wrong, "unnamed") if not codes[label] & wanted] == []
    assert "labels" in codes["id2label"] & codes["unnamed"]


def test_the_card_says_what_it_gives(tmp_path: Path) -> None:
    _, model = converted("classification_latent", tmp_path)
    facts = facts_of(model, verified=False)
    assert (facts.output, metadata.wanted(facts)["pipeline_tag"]) == ("labels", "audio-classification")
    card = compose(facts).decode()
    assert "model.config.id2label" in card and "no word error rate" in card and "AutoFeatureExtractor" in card
