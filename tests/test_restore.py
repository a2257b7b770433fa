"""The way back: fairseq's own loader takes what `restore` writes, and no byte is lost on the round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparing import fairseq_loads
from fairseq_models import VARIANTS, build, save
from safetensors.torch import load_file, save_file

import convert
from convert.errors import ConvertError, PlanError


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("name", [name for name in VARIANTS if "plain" not in name])
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    reference = build(name)
    convert.convert(save(name, tmp_path / "first.pt", model=reference), tmp_path / "out")
    done = convert.restore(tmp_path / "out", tmp_path / "back.pt")
    restored, task = fairseq_loads(tmp_path / "back.pt")
    before, after = tensors(reference), tensors(restored)
    assert before.keys() == after.keys() and done.tensors == len(before)
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)
    if name.startswith("ctc"):
        assert task.target_dictionary.symbols[:5] == ["<s>", "<pad>", "</s>", "<unk>", "|"]
        wave = torch.randn(1, 8000)
        with torch.no_grad():
            expected, found = (m.get_logits(m(source=wave, padding_mask=None)) for m in (reference, restored))
        assert torch.equal(expected, found)


def test_a_weight_norm_removed_model_keeps_its_bytes(tmp_path: Path) -> None:
    """fairseq always builds the norm, so that its loader takes no such model; the file has all it had."""
    reference = build("ctc_pos_conv_plain")
    convert.convert(save("ctc_pos_conv_plain", tmp_path / "a.pt", model=reference), tmp_path / "out")
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    state = torch.load(tmp_path / "back.pt")["model"]
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


@pytest.mark.parametrize("layout", ["omegaconf", "namespace"])
def test_old_layouts_come_back_as_todays(layout: str, tmp_path: Path) -> None:
    reference = build("ctc_large")
    path = save("ctc_large", tmp_path / "first.pt", layout=layout, container="legacy", model=reference)
    letters = tmp_path / "dict.ltr.txt"
    letters.write_text("".join(f"{symbol} 1\n" for symbol in VARIANTS["ctc_large"].symbols))
    convert.convert(path, tmp_path / "out", dictionary=letters if layout == "namespace" else None)
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    restored, _ = fairseq_loads(tmp_path / "back.pt")
    assert all(torch.equal(value, tensors(restored)[key]) for key, value in tensors(reference).items())
    convert.convert(tmp_path / "back.pt", tmp_path / "again")
    for name in ("config.json", "vocab.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_restored_checkpoint_converts_to_the_same_model(tmp_path: Path) -> None:
    convert.convert(save("ctc_large", tmp_path / "a.pt"), tmp_path / "first")
    convert.restore(tmp_path / "first", tmp_path / "back.pt")
    convert.convert(tmp_path / "back.pt", tmp_path / "second")
    for name in ("config.json", "vocab.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def config(large: bool, **changes: Any) -> transformers.Wav2Vec2Config:
    kind = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True} if large else {}
    return transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        num_codevectors_per_group=6,
        codevector_dim=8,
        proj_codevector_dim=12,
        **kind | changes,
    )


def save_with_transformers(directory: Path, made: transformers.Wav2Vec2Config, vocabulary: dict[str, int]) -> Any:
    torch.manual_seed(1)
    model = transformers.Wav2Vec2ForCTC(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(directory)
    return model


ORDERED = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}
TUTORIAL = {"a": 1, "b": 2, "|": 0, "[UNK]": 3, "[PAD]": 4}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_a_model_that_transformers_trained(large: bool, masked: bool, tmp_path: Path) -> None:
    made = config(large, vocab_size=7, pad_token_id=0, **({} if masked else {"mask_time_prob": 0.0}))
    model = save_with_transformers(tmp_path / "hf", made, ORDERED)
    done = convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    assert any("mask_emb" in note for note in done.notes) is not masked
    restored, task = fairseq_loads(tmp_path / "back.pt")
    assert task.target_dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"]
    wave = torch.randn(1, 4120)
    restored.w2v_encoder.w2v_model.encoder.required_seq_len_multiple = 1
    with torch.no_grad():
        found = restored.get_logits(restored(source=wave, padding_mask=None)).transpose(0, 1)
        assert torch.equal(model(wave).logits, found)


def test_a_vocabulary_in_another_order(tmp_path: Path) -> None:
    """The blank must be fairseq's first symbol; what the model lacks gets a row that is never chosen."""
    model = save_with_transformers(tmp_path / "hf", config(False, vocab_size=5, pad_token_id=4), TUTORIAL)
    convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    restored, task = fairseq_loads(tmp_path / "back.pt")
    assert task.target_dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "a", "b"]
    wave = torch.randn(1, 4120)
    restored.w2v_encoder.w2v_model.encoder.required_seq_len_multiple = 1
    with torch.no_grad():
        expected = torch.log_softmax(model(wave).logits, -1)[0]
        found = torch.log_softmax(restored.get_logits(restored(source=wave, padding_mask=None)), -1)[:, 0]
    order = [0, 5, 6, 3, 4]  # where fairseq has the blank, a, b, <unk> and |
    moved = found[:, [order[4], order[1], order[2], order[3], order[0]]]
    exact = torch.log_softmax(model.double()(wave.double()).logits, -1)[0]
    assert (moved - expected).abs().max() <= 2 * (expected - exact).abs().max()
    assert (found[:, [1, 2]] < -1000).all()


def test_what_fairseq_does_not_have_is_refused(tmp_path: Path) -> None:
    changes = {"hidden_act": "silu", "add_adapter": True, "layer_norm_eps": 1e-6}
    save_with_transformers(tmp_path / "hf", config(False, vocab_size=7, **changes), ORDERED)
    with pytest.raises(PlanError) as raised:
        convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    assert {problem.key for problem in raised.value.problems} == changes.keys()
    assert not (tmp_path / "back.pt").exists()


def test_a_bare_encoder_lacks_the_rest(tmp_path: Path) -> None:
    convert.convert(save("pretrained_base", tmp_path / "m.pt"), tmp_path / "out", head="encoder")
    with pytest.raises(PlanError) as raised:
        convert.restore(tmp_path / "out", tmp_path / "back.pt")
    assert "quantizer.vars" in {problem.key for problem in raised.value.problems}
    assert "--head pretraining" in raised.value.hint


def test_a_directory_that_was_changed(tmp_path: Path) -> None:
    convert.convert(save("ctc_base", tmp_path / "m.pt"), tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    weights.pop("lm_head.bias")
    save_file(weights, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="was changed since its conversion"):
        convert.restore(tmp_path / "out", tmp_path / "back.pt")


def test_changed_settings_are_refused_and_changed_weights_noted(tmp_path: Path) -> None:
    convert.convert(save("ctc_base", tmp_path / "m.pt"), tmp_path / "out")
    assert convert.restore(tmp_path / "out", tmp_path / "whole.pt").notes == ()
    weights = load_file(tmp_path / "out/model.safetensors")
    weights["lm_head.bias"] += 1
    save_file(weights, tmp_path / "out/model.safetensors", {"format": "pt"})
    (note,) = convert.restore(tmp_path / "out", tmp_path / "tuned.pt").notes
    assert "model.safetensors is not what the conversion wrote" in note
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    with pytest.raises(PlanError) as raised:
        convert.restore(tmp_path / "out", tmp_path / "back.pt")
    assert [problem.key for problem in raised.value.problems] == ["config.json"]


def test_an_existing_file_stays(tmp_path: Path) -> None:
    convert.convert(save("ctc_base", tmp_path / "m.pt"), tmp_path / "out")
    (tmp_path / "back.pt").write_text("mine")
    with pytest.raises(ConvertError, match="exists already"):
        convert.restore(tmp_path / "out", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_text() == "mine"
    convert.restore(tmp_path / "out", tmp_path / "back.pt", overwrite=True)
    assert fairseq_loads(tmp_path / "back.pt")
    assert {entry.name for entry in tmp_path.iterdir()} == {"m.pt", "out", "back.pt"}


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(ConvertError) as raised:
            convert.restore(tmp_path / name, tmp_path / "back.pt")
        assert raised.value.code == "not-a-model" and raised.value.status == 2


# what is changed in the settings of conversion.json -> the code of a problem, and its key
CHANGED_SETTINGS: dict[str, tuple[tuple[str, ...], Any, str, str]] = {
    "code": (("model", "w2v_args", "model", "conv_feature_layers"), "__import__('os').system('x')", "bad-setting", ""),
    "layers": (("model", "w2v_args", "model", "conv_feature_layers"), "[(16, 10, 5)] + [(16, 3, 2)]", "", ""),
    "activation": (("model", "w2v_args", "model", "activation_fn"), "relu", "file", "hidden_act"),
    "nothing known": (("model", "w2v_args", "model", "unheard_of"), 1, "unknown-setting", "unheard_of"),
    "normalize": (("task", "normalize"), "yes", "bad-setting", "normalize"),
    "heads": (("model", "w2v_args", "model", "encoder_attention_heads"), 2, "file", "num_attention_heads"),
    "dropout": (("model", "final_dropout"), 0.5, "file", "final_dropout"),
}


@pytest.mark.parametrize("name", CHANGED_SETTINGS)
def test_settings_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    keys, value, code, word = CHANGED_SETTINGS[name]
    convert.convert(save("ctc_large", tmp_path / "a.pt"), tmp_path / "out")
    convert.restore(tmp_path / "out", tmp_path / "back.pt")  # the control: as it was converted
    (tmp_path / "back.pt").unlink()
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    inner = record["settings"]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / "out/conversion.json").write_text(json.dumps(record))
    with pytest.raises(ConvertError) as caught:
        convert.restore(tmp_path / "out", tmp_path / "back.pt")
    assert caught.value.status == 1
    assert any(code in problem.code and word in str(problem) for problem in caught.value.problems), str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "out"]
