"""HuBERT, pretrained and fine-tuned: converted, proved, brought back, and its pretraining head kept where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hubert_models
import pytest
import torch
import transformers
from comparing import EVEN, ODD, edited, fairseq_loads, load
from hub_fixtures import facts_of
from hubert_models import BASE, REFUSED, VARIANTS, Variant, build, save
from safetensors.torch import load_file
from verify_models import converted, short_inputs

import convert
from convert.errors import PlanError
from convert.mapping import infer_layout, table
from convert.publishing.card import compose
from convert.verification import inputs, target, verify
from convert.verification.fairseq_side.arithmetic import lifted
from convert.verification.inputs import Geometry

COMPUTED = {"hubert_pos_conv_plain"}  # a conversion has to compute the norm that was removed


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs():
        yield


@torch.no_grad()
def output(model: Any, wave: torch.Tensor, **options: Any) -> torch.Tensor:
    """fairseq's hidden states, or its logits."""
    if hasattr(model, "w2v_encoder"):
        return model.get_logits(model(source=wave, padding_mask=None)).transpose(0, 1)
    return model.extract_features(wave, **options)[0]


@torch.no_grad()
def twin_output(model: Any, wave: torch.Tensor) -> torch.Tensor:
    """The same of transformers' model."""
    made = model(wave)
    return made.logits if "logits" in made else made.last_hidden_state


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit; at an odd number of frames once fairseq's padding to an even one is switched off."""
    reference = build(name)
    done = convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    fine_tuned = "ctc" in name
    assert done.model.target == ("HubertForCTC" if fine_tuned else "HubertModel")
    twin = load(tmp_path / "out")
    (reference.w2v_encoder.w2v_model if fine_tuned else reference).encoder.required_seq_len_multiple = 1
    for samples in (EVEN[0], ODD[0]):
        wave = torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))
        expected, found = output(reference, wave), twin_output(twin, wave)
        if name in COMPUTED:
            with lifted(reference.double()):  # each side measured against itself
                exact = output(reference, wave.double()), twin_output(twin.double(), wave.double())
            reference.float(), twin.float()
            floor = sum(float((side - best).abs().max()) for side, best in zip((expected, found), exact, strict=True))
            assert float((expected - found).abs().max()) <= floor
        else:
            assert torch.equal(expected, found), samples


@pytest.mark.parametrize("name", ["hubert_base", "hubert_large_batch_norm", "hubert_ctc_large"])
def test_a_state_dict_of_real_fairseq_fits_the_class(name: str, tmp_path: Path) -> None:
    """Names and shapes against transformers' own model on the meta device."""
    state = build(name).state_dict()
    done = convert.convert(save(name, tmp_path / "m.pt"), tmp_path / "out")
    made = table(infer_layout({key: tuple(value.shape) for key, value in state.items()}, "hubert"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    with torch.device("meta"):
        live = getattr(transformers, done.model.target)(config).state_dict()
    assert {key: spec.shape for key, spec in made.target.items()} == {k: tuple(v.shape) for k, v in live.items()}
    assert made.digest == done.model.plan.table.digest


def test_every_value_of_the_settings_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("hubert_ctc_batch_norm", tmp_path / "m.pt"), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    for key in written.keys() - {"torch_dtype", "architectures"}:
        found = getattr(loaded, key)
        assert (list(found) if isinstance(found, tuple) else found) == written[key], key
    known = set(transformers.HubertConfig().to_dict())
    assert written.keys() - {"torch_dtype"} <= known  # nothing that HubertConfig would only carry along
    expected = {"hidden_dropout": 0.06, "layerdrop": 0.02, "mask_time_prob": 0.5, "mask_feature_prob": 0.1}
    expected |= {"final_dropout": 0.01, "ctc_zero_infinity": True, "conv_pos_batch_norm": True, "vocab_size": 32}
    assert expected.items() <= written.items()
    assert json.loads((tmp_path / "out/vocab.json").read_text())["<pad>"] == 0 == written["pad_token_id"]


def test_phone_labels_stay_apart(tmp_path: Path) -> None:
    """HuBERT's task has a list of labels."""
    convert.convert(save("hubert_ctc_phones", tmp_path / "m.pt"), tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.decode([5, 5, 0, 6, 7]) == "AA B CH"


@pytest.mark.parametrize(
    ("name", "layout"),
    [("hubert_base", "namespace"), *(("hubert_ctc_large", old) for old in ("interpolated", "namespace"))],
)
def test_every_layout_gives_the_same_model(name: str, layout: str, tmp_path: Path) -> None:
    model = build(name)
    convert.convert(save(name, tmp_path / "plain.pt", model=model), tmp_path / "plain")
    path = save(name, tmp_path / "old.pt", model=model, layout=layout, container="legacy", adam=True)
    letters = tmp_path / "dict.ltr.txt"
    letters.write_text("".join(f"{symbol} 1\n" for symbol in VARIANTS[name].symbols))
    given = letters if layout == "namespace" and "ctc" in name else None
    convert.convert(path, tmp_path / "out", dictionary=given)
    for file in (tmp_path / "plain").iterdir():
        if file.name not in ("conversion.json", "model.safetensors"):
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    ours, plain = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "plain"))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in ours)


@pytest.mark.parametrize("name", ["hubert_base", "hubert_ctc_base"])
def test_settings_without_a_name(name: str, tmp_path: Path) -> None:
    """omegaconf dropped `_name` for a time: the tensors tell then."""

    def nameless(state: dict[str, Any]) -> None:
        model = state["cfg"]["model"]
        del model["_name"]
        if model.get("w2v_args"):
            del model["w2v_args"]["model"]["_name"]

    path = edited(save(name, tmp_path / "m.pt"), nameless)
    assert convert.plan(path).fairseq == name.removesuffix("_base")


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_twin_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        convert.convert(save(REFUSED[name], tmp_path / "m.pt"), tmp_path / "out")
    assert name in {problem.key for problem in raised.value.problems if problem.code == "unsupported-setting"}


@pytest.mark.parametrize(
    ("edit", "code", "key"),
    [
        (lambda s: s["cfg"]["model"].update(my_trick=True), "unknown-setting", "my_trick"),
        (lambda s: s["cfg"]["model"].update(pos_conv_depth=5), "unsupported-setting", "pos_conv_depth"),
        (lambda s: s["cfg"]["model"].update(final_dim=32), "shape", "final_proj.bias"),
        (lambda s: s["cfg"]["model"].update(conv_pos_batch_norm=True), "missing-tensor", "encoder.pos_conv.1.weight"),
        (lambda s: s["model"].update(extra=torch.zeros(1)), "unexpected-tensor", "extra"),
    ],
)
def test_a_setting_is_carried_or_a_reason(edit: Any, code: str, key: str, tmp_path: Path) -> None:
    path = save("hubert_base", tmp_path / "m.pt")
    convert.plan(path)  # the control
    with pytest.raises(PlanError) as raised:
        convert.plan(edited(path, edit))
    assert (code, key) in {(problem.code, problem.key) for problem in raised.value.problems}


@pytest.mark.parametrize("name", ["multires_hubert", "av_hubert"])
def test_what_is_built_on_hubert_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = edited(save("hubert_base", tmp_path / "m.pt"), lambda state: state["cfg"]["model"].update(_name=name))
    with pytest.raises(PlanError, match=rf"architecture '{name}' is not supported \(") as raised:
        convert.plan(path)
    assert "hubert, " in raised.value.hint


def test_blank_weight_is_not_hubert_s(tmp_path: Path) -> None:
    path = edited(save("hubert_ctc_base", tmp_path / "m.pt"), lambda s: s["cfg"]["model"].update(blank_weight=1.5))
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    assert [(p.code, p.key) for p in raised.value.problems] == [("unknown-setting", "blank_weight")]


def test_inspect_tells_of_the_dictionaries(command: Any, tmp_path: Path) -> None:
    done = command("inspect", save("hubert_two_dictionaries", tmp_path / "m.pt"))
    assert "dictionary    20 symbols of the pretraining and 12 symbols of the pretraining" in done.text
    assert [len(symbols) for symbols in done.data["pretraining_dictionaries"]] == [20, 12]


# --- the pretraining head -------------------------------------------------------------------------------------------


class HubertModelWithFinalProj(transformers.HubertModel):
    """As voice conversion projects declare it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.final_proj = torch.nn.Linear(config.hidden_size, config.classifier_proj_size)


def test_the_pretraining_head_is_dropped_with_a_reason(tmp_path: Path) -> None:
    done = convert.convert(save("hubert_base", tmp_path / "m.pt"), tmp_path / "out")
    assert [drop.source for drop in done.model.plan.drops] == [
        "final_proj.weight",
        "final_proj.bias",
        "label_embs_concat",
    ]
    assert all("transformers has no class for" in drop.reason for drop in done.model.plan.drops)
    assert "classifier_proj_size" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("name", ["hubert_base", "hubert_large", "hubert_two_dictionaries"])
def test_the_kept_head_computes_the_same(name: str, tmp_path: Path) -> None:
    """Features of an inner layer through `final_proj`, as ContentVec's users take them."""
    reference = build(name)
    path = save(name, tmp_path / "m.pt", model=reference)
    done = convert.convert(path, tmp_path / "out", keep_final_proj=True)
    assert done.model.plan.drops and not done.model.dropped  # nothing is called dropped that is kept
    assert done.model.kept == ["kept beside the model: 3 tensors in final_proj.safetensors"]
    assert convert.compare_weights(path, tmp_path / "out") == []
    model = HubertModelWithFinalProj.from_pretrained(tmp_path / "out", attn_implementation="sdpa").eval()
    head = load_file(tmp_path / "out" / "final_proj.safetensors")
    assert set(head) == {"final_proj.weight", "final_proj.bias", "label_embs_concat"}
    left = model.load_state_dict(head, strict=False)
    assert left.unexpected_keys == ["label_embs_concat"]
    wave = torch.randn(1, EVEN[0])
    with torch.no_grad():
        expected = reference.final_proj(output(reference, wave, output_layer=2))
        found = model.final_proj(model(wave, output_hidden_states=True).hidden_states[2])
    assert torch.equal(expected, found)
    assert torch.equal(reference.label_embs_concat, head["label_embs_concat"])


def test_a_change_of_the_kept_head_is_found(tmp_path: Path) -> None:
    path = save("hubert_base", tmp_path / "m.pt")
    convert.convert(path, tmp_path / "out", keep_final_proj=True)
    kept = tmp_path / "out" / "final_proj.safetensors"
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    assert [problem.code for problem in convert.compare_weights(path, tmp_path / "out")] == ["bytes"]


def test_a_head_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    path = save("hubert_ctc_no_label_embeddings", tmp_path / "m.pt")
    assert convert.plan(path).plan.drops == ()
    with pytest.raises(PlanError) as raised:
        convert.plan(path, keep_final_proj=True)
    assert [(p.code, p.key) for p in raised.value.problems] == [("no-head", "--keep-final-proj")]


# --- the way back ---------------------------------------------------------------------------------------------------


def same_bytes(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    alike = (value.numpy().tobytes() == other[key].numpy().tobytes() for key, value in state.items())
    return state.keys() == other.keys() and all(alike)


@pytest.mark.parametrize(
    "name",
    ["hubert_base", "hubert_large_batch_norm", "hubert_two_dictionaries", "hubert_target_glu", "hubert_other_task"],
)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    """Through fairseq's own loader, with the dictionaries of the pretraining."""
    reference = build(name)
    path = save(name, tmp_path / "first.pt", model=reference)
    convert.convert(path, tmp_path / "out", keep_final_proj=True)
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    restored, task = fairseq_loads(tmp_path / "back.pt")
    assert same_bytes(reference.state_dict(), restored.state_dict())
    assert [d.symbols for d in task.dictionaries] == [d.symbols for d in hubert_models.clusters(VARIANTS[name])]


@pytest.mark.parametrize("name", ["hubert_ctc_large", "hubert_ctc_batch_norm", "hubert_ctc_no_label_embeddings"])
def test_a_fine_tuned_model_there_and_back_again(name: str, tmp_path: Path) -> None:
    """fairseq's loader takes no fine-tuned HuBERT (see docs/design.md); the file has all that it had."""
    reference = build(name)
    path = save(name, tmp_path / "first.pt", model=reference)
    convert.convert(path, tmp_path / "out", keep_final_proj="label" not in name)
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    first, back = (torch.load(tmp_path / file, weights_only=False) for file in ("first.pt", "back.pt"))
    assert same_bytes(first["model"], back["model"])
    assert back["task_state"]["target_dictionary"].symbols == first["task_state"]["target_dictionary"].symbols
    convert.convert(tmp_path / "back.pt", tmp_path / "again", keep_final_proj="label" not in name)
    for file in (tmp_path / "out").iterdir():
        if file.suffix == ".json" and file.name != "conversion.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_an_old_layout_comes_back_as_todays(tmp_path: Path) -> None:
    """A Namespace holds the list of labels as text."""
    reference = build("hubert_base")
    plain = hubert_models.settings(VARIANTS["hubert_base"])
    plain["task"]["labels"] = "['layer6.km20']"
    state = hubert_models.task_state(VARIANTS["hubert_base"])
    path = hubert_models.write(tmp_path / "old.pt", reference, plain, {}, layout="namespace", container="legacy")
    convert.convert(edited(path, lambda old: old.update(task_state=state)), tmp_path / "out", keep_final_proj=True)
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    restored, task = fairseq_loads(tmp_path / "back.pt")
    assert same_bytes(reference.state_dict(), restored.state_dict())
    assert task.cfg.labels == ["layer6.km20"]


@pytest.mark.parametrize("name", ["hubert_base", "hubert_ctc_base"])
def test_what_was_dropped_does_not_come_back(name: str, tmp_path: Path) -> None:
    convert.convert(save(name, tmp_path / "first.pt"), tmp_path / "out")
    with pytest.raises(PlanError, match="lacks tensors that fairseq's model needs") as raised:
        convert.restore(tmp_path / "out", tmp_path / "back.pt")
    dropped = {problem.key.rpartition("w2v_model.")[2] for problem in raised.value.problems}
    assert dropped - {"final_proj.weight", "final_proj.bias"} == {"label_embs_concat"}
    assert "--keep-final-proj" in raised.value.hint and not (tmp_path / "back.pt").exists()


# --- the proof ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hubert_base", "hubert_large_batch_norm", "hubert_ctc_base", "hubert_pos_conv_plain"])
def test_a_variant_is_proved(name: str, tmp_path: Path) -> None:
    done = verify(*converted(name, tmp_path, write=save), devices=["cpu"])
    assert done.problems == ()
    runs = {run["input"]: run for run in done.report["runs"]}
    batches = {runs.pop(batch)["verdict"] for batch in ("padded-batch", "padded-batch-any-lengths")}
    assert batches <= {"identical", "rounding"}
    runs.pop("speech-odd-as-built")
    if name in COMPUTED:
        assert {run["require"] for run in runs.values()} == {"rounding"}
    else:
        assert {(run["require"], run["verdict"]) for run in runs.values()} == {("identical", "identical")}
    controls = {control["name"]: control["caught"] for control in done.report["controls"]}
    assert all(controls.values()) and len(controls) == (9 if "ctc" in name else 8)
    assert ("running_var of the positional convolution lost" in controls) == ("batch_norm" in name)
    (padding,) = done.report["padding"]
    assert padding["fairseq_frames"] != padding["transformers_frames"] and padding["max_abs_difference"] > 0.01
    assert "counts 78, 53, 27 frames, and transformers 78, 52, 26" in str(done)
    left_out = [patch for patch in done.report["reference"]["patches"] if "label_embs_concat" in patch]
    assert len(left_out) == 1
    fixed = [patch for patch in done.report["reference"]["patches"] if "autoregressive" in patch]
    assert len(fixed) == ("ctc" in name)


def test_an_old_layout_is_proved(tmp_path: Path) -> None:
    """`args` of 2020: fairseq's own reader takes the settings that are nested in it, or ours does."""
    letters = tmp_path / "dict.ltr.txt"
    letters.write_text("".join(f"{symbol} 1\n" for symbol in VARIANTS["hubert_ctc_base"].symbols))
    made = converted("hubert_ctc_base", tmp_path, write=save, layout="namespace", dictionary=letters)
    assert verify(*made, devices=["cpu"], dictionary=letters).problems == ()


@pytest.mark.parametrize("name", ["hubert_base", "hubert_ctc_base"])
def test_the_card_tells_of_the_kept_head_and_of_padding(name: str, tmp_path: Path) -> None:
    made = converted(name, tmp_path, write=save, keep_final_proj=True)
    verify(*made, devices=["cpu"])
    card = compose(facts_of(made[1])).decode()
    assert ("class HubertModelWithFinalProj(HubertModel):" in card) == (name == "hubert_base")
    assert "of 3140, 2100, 1060 samples fairseq counts 78, 53, 27 frames" in card
    assert "HuBERT: Self-Supervised" in card


def test_padded_batches_are_compared_where_the_frames_agree() -> None:
    """The search for lengths, for the released convolutions and for those of the tests."""
    released = Geometry(((10, 5), *((3, 2),) * 4, *((2, 2),) * 2), 2)
    assert released.agreeing(1500) == (127759, 76560, 25680)
    for geometry, frames in ((released, 1500), (released, 200), (Geometry(((10, 5), (3, 2), (3, 2), (2, 2))), 158)):
        longest, *shorter = geometry.agreeing(frames)
        for samples in shorter:
            mask = torch.arange(longest)[None] >= samples
            pieces = hubert_models.HubertModel.forward_padding_mask(
                None, torch.zeros(1, geometry.frames(longest), 1), mask
            )
            assert int((~pieces).sum()) == geometry.frames(samples)


def test_frames_that_are_counted_otherwise_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of both padded batches: at lengths where the frames differ, and with a mask that follows nothing."""
    checkpoint, model = converted("hubert_large", tmp_path, write=save)
    monkeypatch.setattr(inputs.Geometry, "agreeing", lambda self, frames: (4001, 2500))
    monkeypatch.setattr(target.Target, "samples", lambda self, frames: [4001, 2500, 1300])
    done = verify(checkpoint, model, devices=["cpu"])
    wrong = {problem.key.rpartition(", ")[2] for problem in done.problems if problem.code == "different"}
    assert wrong == {"padded-batch", "padded-batch-any-lengths"}


# --- the released size ----------------------------------------------------------------------------------------------

RELEASED = Variant(
    "hubert",
    BASE
    | {
        "encoder_layers": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12,
        "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "final_dim": 256,
    },
    clusters=(504,),
)


@pytest.mark.slow
def test_the_released_size(tmp_path: Path) -> None:
    """HuBERT base: 95M parameters, 500 clusters."""
    reference = build(RELEASED)
    path = save(RELEASED, tmp_path / "hubert_base.pt", model=reference)
    convert.convert(path, tmp_path / "out", keep_final_proj=True)
    assert convert.compare_weights(path, tmp_path / "out") == []
    twin = load(tmp_path / "out")
    assert sum(parameter.numel() for parameter in twin.parameters()) == 94_371_712
    wave = torch.randn(1, 16080, generator=torch.Generator().manual_seed(0))
    expected, found = output(reference, wave), twin_output(twin, wave)
    assert expected.shape == (1, 50, 768) and torch.equal(expected, found)
