"""Converted models compute what real fairseq models compute: every variant, layout, container and dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairseq_models
import pytest
import torch
import transformers
from command_line import ROOT
from comparing import (
    EVEN,
    ODD,
    config,
    counterpart_outputs,
    distance_from_float64,
    edited,
    load,
    outputs,
    write_dictionary,
)
from fairseq_models import REFUSED, VARIANTS, Variant, build, save
from safetensors.torch import load_file

import convert
from convert.errors import ConvertError, PlanError

# Where the two frameworks do not do the same sums: the norm of a weight-norm-removed convolution is taken anew, and
# fairseq adds blank_weight to the logit, the converted model has it in its bias.
ROUNDING = {"ctc_pos_conv_plain", "pretrained_pos_conv_plain", "ctc_blank_add"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit; at an odd number of frames once fairseq's padding to an even one is switched off.

    `required_seq_len_multiple` pads and masks, which changes the order of sums and nothing else; with it, and where the
    sums themselves differ, the difference stays within what float32 is off from float64.
    """
    reference = build(name)
    convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    twin = load(tmp_path / "out")
    encoder = (reference.w2v_encoder.w2v_model if name.startswith("ctc") else reference).encoder
    for samples in EVEN + ODD:
        wave = torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))
        ours = counterpart_outputs(twin, wave)
        assert ours[0].shape[1] % 2 == (samples in ODD)
        encoder.required_seq_len_multiple = 2
        padded, floor = outputs(reference, wave), distance_from_float64(reference, twin, wave)
        assert len(padded) == len(ours)
        for theirs, made in zip(padded, ours, strict=True):
            assert float((theirs - made).abs().max()) <= (floor if theirs.is_floating_point() else 0)
        encoder.required_seq_len_multiple = 1
        if name not in ROUNDING:
            assert all(torch.equal(a, b) for a, b in zip(outputs(reference, wave), ours, strict=True)), samples


def test_the_comparison_sees_a_mistake(tmp_path: Path) -> None:
    """The control of the test above: q and k of one layer exchanged."""
    reference = build("ctc_base")
    convert.convert(save("ctc_base", tmp_path / "model.pt", model=reference), tmp_path / "out")
    twin = load(tmp_path / "out")
    attention = twin.wav2vec2.encoder.layers[1].attention
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
    wave = torch.randn(1, EVEN[0])
    theirs, ours = outputs(reference, wave)[0], counterpart_outputs(twin, wave)[0]
    assert not torch.equal(theirs, ours)
    assert float((theirs - ours).abs().max()) > distance_from_float64(reference, twin, wave)


@pytest.mark.parametrize("layout", ["cfg", "omegaconf", "interpolated", "namespace"])
@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", ["ctc_large", "pretrained_base"])
def test_every_layout_and_container_gives_the_same_model(
    name: str, layout: str, container: str, tmp_path: Path
) -> None:
    model = build(name)
    path = save(name, tmp_path / "model.pt", layout=layout, container=container, adam=True, model=model)
    dictionary = write_dictionary(tmp_path / "dict.ltr.txt") if layout == "namespace" and name[0] == "c" else None
    convert.convert(path, tmp_path / "out", dictionary=dictionary)
    convert.convert(save(name, tmp_path / "plain.pt", model=model), tmp_path / "plain")
    ours, plain = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in plain)
    for file in sorted(path.name for path in (tmp_path / "plain").glob("*.json")):
        if file != "conversion.json":
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["ctc_base", "pretrained_large", "pretrained_base"])
def test_the_bare_encoder(name: str, tmp_path: Path) -> None:
    reference = build(name)
    done = convert.convert(save(name, tmp_path / "m.pt", model=reference), tmp_path / "out", head="encoder")
    assert done.model.target == "Wav2Vec2Model"
    assert {drop.reason for drop in done.model.plan.drops} == {
        "belongs to the head, and the bare encoder was asked for"
    }
    wave = torch.randn(1, EVEN[0])
    encoder = reference.w2v_encoder.w2v_model if name.startswith("ctc") else reference
    with torch.no_grad():
        expected = encoder.extract_features(source=wave, padding_mask=None)["x"]
    assert torch.equal(expected, counterpart_outputs(load(tmp_path / "out"), wave)[0])


@pytest.mark.parametrize("name", ["target_glu", "quantizer_depth", "quantize_targets"])
def test_the_encoder_of_what_has_no_twin_as_a_whole(name: str, tmp_path: Path) -> None:
    reference = build(REFUSED[name])
    convert.convert(save(REFUSED[name], tmp_path / "m.pt", model=reference), tmp_path / "out", head="encoder")
    wave = torch.randn(1, EVEN[0])
    with torch.no_grad():
        expected = reference.extract_features(source=wave, padding_mask=None)["x"]
    assert torch.equal(expected, counterpart_outputs(load(tmp_path / "out"), wave)[0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_twin_is_refused(name: str, tmp_path: Path) -> None:
    path = save(REFUSED[name], tmp_path / "model.pt")
    with pytest.raises(PlanError) as raised:
        convert.convert(path, tmp_path / "out")
    assert name in {problem.key for problem in raised.value.problems if problem.code == "unsupported-setting"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_all_reasons_at_once(tmp_path: Path) -> None:
    many = {"target_glu": True, "crop_seq_to_multiple": 4, "quantizer_depth": 2, "quantize_targets": True}
    path = save(Variant("pretraining", fairseq_models.BASE | many), tmp_path / "model.pt")
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    named = {problem.key for problem in raised.value.problems if problem.code == "unsupported-setting"}
    assert named == {"target_glu", "crop_seq_to_multiple", "quantizer_depth"}


@pytest.mark.parametrize(
    ("edit", "code", "key"),
    [
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(my_trick=True), "unknown-setting", "my_trick"),
        (lambda s: s["cfg"]["model"].update(another=0.5), "unknown-setting", "another"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(activation_fn="relu_squared"), "unsupported-setting", "activation_fn"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(extractor_mode="none"), "unsupported-setting", "extractor_mode"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].pop("layer_norm_first"), "missing-setting", "layer_norm_first"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(encoder_attention_heads=7), "bad-setting", "encoder_attention_heads"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(encoder_attention_heads=0), "bad-setting", "encoder_attention_heads"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(encoder_layers=3), "missing-tensor", "w2v_encoder.w2v_model.encoder.layers.2.fc1.bias"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(conv_bias=True), "missing-tensor", "w2v_encoder.w2v_model.feature_extractor.conv_layers.0.0.bias"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(encoder_ffn_embed_dim=100), "shape", "w2v_encoder.w2v_model.encoder.layers.0.fc1.bias"),
        (lambda s: s["cfg"]["model"]["w2v_args"]["model"].update(conv_feature_layers="__import__('os')"), "bad-setting", "conv_feature_layers"),
        (lambda s: s["cfg"]["model"].update(dropout=float("nan")), "bad-setting", "dropout"),
        (lambda s: s["cfg"]["task"].update(normalize=True), "conflict", "normalize"),
        (lambda s: s["cfg"]["task"].pop("normalize"), "missing-setting", "normalize"),
        (lambda s: s["cfg"]["task"].update(sample_rate=-1), "bad-setting", "sample_rate"),
        (lambda s: s["cfg"]["criterion"].update(post_process="byte_pairs"), "unsupported-setting", "criterion.post_process"),
        (lambda s: s["model"].update(extra=torch.zeros(1)), "unexpected-tensor", "extra"),
        (lambda s: s["model"].pop("w2v_encoder.proj.bias"), "missing-tensor", "w2v_encoder.proj.bias"),
        (lambda s: s.pop("task_state"), "no-dictionary", "--dict"),
    ],
)  # fmt: skip
def test_a_setting_is_carried_or_a_reason(edit: Callable[..., Any], code: str, key: str, tmp_path: Path) -> None:
    path = save("ctc_base", tmp_path / "model.pt")
    convert.plan(path)  # the control
    with pytest.raises(PlanError) as raised:
        convert.plan(edited(path, edit))
    assert (code, key) in {(problem.code, problem.key) for problem in raised.value.problems}


@pytest.mark.parametrize("name", ["unispeech", "unispeech_sat"])
def test_what_no_reference_can_prove_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = save("pretrained_base", tmp_path / "m.pt")
    with pytest.raises(PlanError, match=f"'{name}' is not supported .neither fairseq nor s3prl holds") as raised:
        convert.plan(edited(path, lambda state: state["cfg"]["model"].update(_name=name)))
    assert raised.value.code == "unsupported-architecture" and "wavlm" in raised.value.hint


def test_a_setting_that_the_caller_vouches_for(tmp_path: Path) -> None:
    path = edited(save("ctc_base", tmp_path / "m.pt"), lambda s: s["cfg"]["model"].update(my_trick=True))
    assert convert.plan(path, training_only=["my_trick"]).training_only["my_trick"] is True
    with pytest.raises(PlanError) as raised:
        convert.plan(path, training_only=["my_trick", "my_trck", "dropuot", "dropout"])
    assert [(problem.code, str(problem)) for problem in raised.value.problems] == [
        ("no-setting", "--training-only: the checkpoint has no setting called my_trck or dropuot")
    ]
    assert raised.value.hint == "`inspect --json` lists its settings: check the name, or leave it out"


def test_tensors_that_are_not_those_of_the_settings(tmp_path: Path) -> None:
    path = save("ctc_base", tmp_path / "m.pt")
    added = edited(path, lambda s: s["model"].update({f"new.{index}": torch.zeros(2) for index in range(11)}))
    with pytest.raises(PlanError) as raised:
        convert.plan(added)
    assert [problem.key for problem in raised.value.problems] == [f"new.{index}" for index in range(11)]
    assert raised.value.hint == "tensors that a fork added need rules of their own: docs/adding_a_family.md"
    edited(added, lambda s: s["model"].pop("w2v_encoder.w2v_model.encoder.layer_norm.bias"))
    with pytest.raises(PlanError) as raised:
        convert.plan(added)
    assert raised.value.hint == (
        "tensors and settings are not of the same model: convert the file as its trainer wrote it"
    )


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_an_error_of_a_base_names_the_option(content: bytes | None, tmp_path: Path) -> None:
    path = save("ctc_base", tmp_path / "m.pt")
    edited(path, lambda state: state["cfg"]["model"].update(w2v_args=None))
    if content is not None:
        (tmp_path / "base.pt").write_bytes(content)
    with pytest.raises(ConvertError, match=r"^--base: .*base\.pt") as raised:
        convert.plan(path, base=tmp_path / "base.pt")
    assert str(raised.value.problems[0]).count("--base: ") == 1


def test_dictionaries_that_disagree(tmp_path: Path) -> None:
    path = save("ctc_base", tmp_path / "model.pt")
    convert.plan(path, dictionary=write_dictionary(tmp_path / "same.txt"))
    with pytest.raises(PlanError, match="completely") as raised:
        convert.plan(path, dictionary=write_dictionary(tmp_path / "other.txt", ("a", "b")))
    assert "dictionary-conflict" in {problem.code for problem in raised.value.problems}


def test_rows_of_the_head_and_dictionary_disagree(tmp_path: Path) -> None:
    path = edited(save("ctc_base", tmp_path / "model.pt"), lambda state: state.pop("task_state"))
    with pytest.raises(PlanError) as raised:
        convert.plan(path, dictionary=write_dictionary(tmp_path / "short.txt", tuple("|ABC")))
    assert [str(p) for p in raised.value.problems] == ["dictionary: has 8 symbols, the model's head 32 rows"]
    assert "--dict" in raised.value.hint


def test_a_fine_tuned_model_without_its_pretrained_settings(tmp_path: Path) -> None:
    base = save(Variant("pretraining", fairseq_models.BASE), tmp_path / "base.pt")
    path = save("ctc_base", tmp_path / "model.pt")
    whole = convert.plan(path)
    edited(path, lambda state: state["cfg"]["model"].update(w2v_args=None))
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    assert raised.value.code == "no-base-settings" and "--base base.pt" in raised.value.hint
    edited(path, lambda state: state["cfg"]["model"].update(w2v_path="/runs/7/checkpoint_last.pt"))
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    assert raised.value.hint == "pass the pretrained checkpoint: --base PRETRAINED.pt"
    values = {value.name: value.value for value in convert.plan(path, base=base).config}
    assert values == {value.name: value.value for value in whole.config}


def test_every_value_of_the_settings_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("ctc_large", tmp_path / "m.pt"), tmp_path / "out")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    for key, value in config(tmp_path / "out").items():
        if key not in ("torch_dtype", "architectures"):
            found = getattr(loaded, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, key
    expected = {"hidden_dropout": 0.06, "layerdrop": 0.02, "mask_time_prob": 0.5, "mask_feature_prob": 0.1}
    expected |= {
        "final_dropout": 0.01,
        "ctc_zero_infinity": True,
        "do_stable_layer_norm": True,
        "apply_spec_augment": True,
    }
    assert expected.items() <= config(tmp_path / "out").items()


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_other_dtypes_round_as_torch_does(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    model = build("ctc_base")
    path = save("ctc_base", tmp_path / "m.pt", model=model)
    done = convert.convert(path, tmp_path / "out", dtype=dtype)
    weights, source = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    for key, target in done.model.plan.renames.items():
        assert torch.equal(weights[target], source[key].to(kind)), key
    assert convert.compare_weights(path, tmp_path / "out") == []
    assert load(tmp_path / "out").dtype == kind


def test_shards(tmp_path: Path) -> None:
    model = build("ctc_base")
    path = save("ctc_base", tmp_path / "m.pt", model=model)
    convert.convert(path, tmp_path / "out", max_shard_size="60 kB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    wave = torch.randn(1, EVEN[0])
    assert torch.equal(outputs(model, wave)[0], counterpart_outputs(load(tmp_path / "out"), wave)[0])
    assert convert.compare_weights(path, tmp_path / "out") == []


def test_sizes_of_shards_as_people_write_them(tmp_path: Path) -> None:
    path, shards = save("ctc_base", tmp_path / "m.pt"), {}
    for text in ("0.06MB", "60kb", "60000", "60000 B", "5GB"):
        convert.convert(path, tmp_path / text, max_shard_size=text)
        shards[text] = len(list((tmp_path / text).glob("model*.safetensors")))
    *small, whole = shards.values()
    assert whole == 1 < small[0] and len(set(small)) == 1
    for text in ("0", "-1", "5 GiB", "many", "1e3", ""):
        with pytest.raises(ConvertError, match="is not a size") as raised:
            convert.convert(path, tmp_path / "out", max_shard_size=text)
        assert (raised.value.code, raised.value.status) == ("usage", 2) and "such as 5GB" in raised.value.hint


def test_one_changed_bit_is_found(tmp_path: Path) -> None:
    path = save("ctc_base", tmp_path / "m.pt")
    convert.convert(path, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    (problem,) = convert.compare_weights(path, tmp_path / "out")
    assert problem.code == "bytes" and "in the checkpoint" in problem.detail


def test_the_same_input_gives_the_same_bytes_and_nothing_private(tmp_path: Path) -> None:
    def private(state: dict[str, Any]) -> None:
        state["cfg"]["task"]["data"] = "/home/someone/manifests/10m"
        state["cfg"]["model"]["w2v_path"] = "/home/someone/wav2vec.pt"

    path = edited(save("ctc_base", tmp_path / "m.pt"), private)
    for name in ("first", "second"):
        convert.convert(path, tmp_path / name)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
        assert b"someone" not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes()


def test_transformers_4_finds_its_files(tmp_path: Path) -> None:
    """Beside a processor_config.json, transformers 4 cannot load the feature extractor (see docs/design.md)."""
    convert.convert(save("ctc_base", tmp_path / "m.pt"), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {"config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"}
    assert names == expected | {"tokenizer_config.json", "vocab.json"}
    convert.convert(save("pretrained_base", tmp_path / "p.pt"), tmp_path / "pretrained")
    assert {file.name for file in (tmp_path / "pretrained").iterdir()} == expected
    loaded = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "pretrained")
    assert loaded.do_normalize is False and loaded.return_attention_mask is True


def test_the_shipped_checkpoint_transcribes(tmp_path: Path) -> None:
    """From the file that fairseq's trainer wrote to text, with plain transformers."""
    import soundfile

    convert.convert(ROOT / "checkpoints/espeak-wav2vec2-ctc.pt", tmp_path / "out")
    listen = transformers.pipeline("automatic-speech-recognition", str(tmp_path / "out"))
    heldout = ROOT / "checkpoints/heldout"
    words = (heldout / "heldout.wrd").read_text().splitlines()
    names = [line.split("\t")[0] for line in (heldout / "heldout.tsv").read_text().splitlines()[1:]]
    assert len(words) == len(names) == 8
    for name, expected in zip(names, words, strict=True):
        wave, rate = soundfile.read(heldout / name, dtype="float32")
        assert listen({"raw": wave, "sampling_rate": rate})["text"] == expected
