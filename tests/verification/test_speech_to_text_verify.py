"""The verification of speech-to-text transformers: the same bits, the same texts, every fault reported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import in_weights, outcomes, perturbed, reported, rolled, settings, swapped, transposed
from speech_to_text_models import save
from verify_models import computed_once, edit, few_inputs, short_inputs

from convert.errors import ConvertError
from convert.package import convert
from convert.verification import record, verify
from convert.verification.fairseq_side.features import features
from convert.verification.fairseq_side.tokens import language_of
from convert.verification.target import load

Fault = Callable[[Path], None]


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs():
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("to_many")
    checkpoint, _, _ = save("to_many", folder)
    return checkpoint, convert(checkpoint, folder / "out", data_config=folder / "config.yaml", language="de").path


def test_the_same_model_is_found_to_be_the_same(pair: tuple[Path, Path]) -> None:
    done = verify(*pair, devices=["cpu"])
    assert done.problems == ()
    runs = {run["input"]: run for run in done.report["runs"]}
    rounding = {"padded-batch", "speech-even, eager"}  # the latter is what users run who ask for no attention
    assert {name for name, run in runs.items() if run["require"] == "rounding"} == rounding
    assert {run["verdict"] for name, run in runs.items() if name not in rounding} == {"identical"}
    layers = ["layer.0", "layer.1", "encoder", *(f"decoder.layer.{index}" for index in range(3))]
    layers += ["decoder.norm", "decoder.logits"]
    assert load(pair[1], "cpu").stages == ["conv.0", "conv.1", *layers]  # none of which may be missing on either side
    assert done.report["controls"] and all(control["caught"] for control in done.report["controls"])
    assert {"<s> and <pad> exchanged", "the other scale of embeddings"} <= {c["name"] for c in done.report["controls"]}
    texts = [(one["verdict"], one["fairseq_text"] == one["hf_text"]) for one in done.report["end_to_end"]]
    assert texts and set(texts) == {("identical", True)}
    assert "filter banks" in done.report["skipped"]


def test_the_recipes_beam(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """fairseq's generator and transformers with the beam that the checkpoint states; another beam is found."""
    assert json.loads((pair[1] / "generation_config.json").read_text())["num_beams"] == 5
    rows = {one["input"]: one for one in verify(*pair, devices=["cpu"], write=False).report["end_to_end"]}
    assert [name for name in rows if "beam" in name] == ["speech, beam 5", "speech at -50 dBFS, beam 5"]
    assert all(one["verdict"] in ("identical", "explained") and one["fairseq_text"] for one in rows.values())
    copy = Path(shutil.copytree(pair[1], tmp_path / "copy"))
    edit(copy / "generation_config.json", num_beams=1, early_stopping=False)
    found = {(one.code, one.key) for one in verify(pair[0], copy, devices=["cpu"], write=False).problems}
    assert ("end-to-end", "speech, beam 5") in found


def test_a_free_end_at_the_greatest_length_is_named(tmp_path: Path) -> None:
    """transformers takes the end that it forces for certain, and may prefer a text that fairseq's score puts second."""
    checkpoint, _, _ = save("untied", tmp_path)
    model = convert(checkpoint, tmp_path / "out", data_config=tmp_path / "config.yaml").path
    done = verify(checkpoint, model, devices=["cpu"], write=False)
    assert done.problems == ()
    (row,) = (one for one in done.report["end_to_end"] if one["input"] == "speech, beam 5")
    assert row["verdict"] == "explained" and row["fairseq_text"] != row["hf_text"]
    said = r"transformers takes the end at the greatest length for certain: by that its text scores (\S+), fairseq's (\S+);"
    ours, theirs = re.match(said, row["why"]).groups()
    assert float(ours) >= float(theirs)


def test_a_recording_stands_for_fairseq(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as refused:  # as `convert` refuses it
        record(pair[0], tmp_path / "none.safetensors")
    assert "no-data-config" in {problem.code for problem in refused.value.problems} and refused.value.status == 1
    config = pair[0].with_name("config.yaml")
    made = record(pair[0], tmp_path / "made.safetensors", data_config=config, language="de")
    done = verify(*pair, reference=made, devices=["cpu"], write=False)
    assert done.problems == ()
    assert {one["hf_text"] for one in done.report["end_to_end"]} != {""}


def test_half_precision_is_judged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = convert(
        pair[0], tmp_path / "out", data_config=pair[0].with_name("config.yaml"), language="de", dtype="bfloat16"
    )
    with few_inputs("speech-even", "quiet"), computed_once():
        done = verify(pair[0], out.path, devices=["cpu"], write=False)
    assert done.problems == ()
    assert {run["dtype"] for run in done.report["runs"]} == {"float32 with bfloat16 weights", "bfloat16"}


def faults() -> dict[str, tuple[Fault, set[str]]]:
    """Each with the codes of which one must be reported."""
    encoder, decoder = "model.encoder.layers.1.", "model.decoder.layers.2."
    outputs, loading = {"different"}, {"different", "load", "missing-keys", "unexpected-keys", "mismatched-keys"}
    seen = [f"{encoder}self_attn.q_proj.weight", f"{encoder}fc1.bias", f"{encoder}final_layer_norm.weight"]
    seen += [f"{decoder}encoder_attn.v_proj.weight", f"{decoder}encoder_attn_layer_norm.bias", f"{decoder}fc2.weight"]
    seen += ["model.encoder.conv.conv_layers.1.weight", "model.encoder.conv.conv_layers.0.bias"]
    seen += ["model.encoder.layer_norm.bias", "model.decoder.layer_norm.weight"]
    made = {f"perturbed {name}": (perturbed(name), outputs) for name in seen}
    made |= {
        f"rolled {name}": (rolled(name), outputs) for name in ("lm_head.weight", "model.decoder.embed_tokens.weight")
    }
    made["transposed"] = (transposed(f"{encoder}self_attn.out_proj.weight"), outputs)
    for one, other in (("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.v_proj", "encoder_attn.v_proj")):
        names = (f"{decoder}{one}.weight", f"{decoder}{other}.weight")
        made[f"swapped {names}"] = (swapped(*names), outputs)
    wrong: dict[str, Any] = {"scale_embedding": False, "activation_function": "gelu", "encoder_attention_heads": 4}
    wrong |= {"decoder_attention_heads": 1, "conv_kernel_sizes": [5, 3], "decoder_layers": 2, "vocab_size": 20}
    wrong |= {"d_model": 16, "input_feat_per_channel": 40, "pad_token_id": 2}
    made |= {
        name: (settings("config.json", **{name: value}), loading | {"vocabulary"}) for name, value in wrong.items()
    }
    spoken = {"end-to-end", "vocabulary", "spelling", "load"}
    for name, value in {"decoder_start_token_id": 0, "suppress_tokens": [1, *range(4, 20)], "max_length": 4}.items():
        made[f"generation: {name}"] = (settings("generation_config.json", **{name: value}), spoken)
    made["another language"] = (settings("generation_config.json", forced_bos_token_id=5), {"file"})
    made["symbols exchanged"] = (settings("vocab.json", **{"▁t": 9, "s": 8}), spoken)
    made["padding"] = (settings("preprocessor_config.json", padding_value=1.0), {"padding"})
    made["means"] = (settings("preprocessor_config.json", normalize_means=False), {"file"})
    made["sampling rate"] = (settings("preprocessor_config.json", sampling_rate=8000), {"sampling-rate"})
    made["no sentencepiece model"] = (lambda model: (model / "sentencepiece.bpe.model").unlink(), spoken)
    return made


def test_every_fault_is_reported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with few_inputs("speech-even", "padded-batch", "quiet"), computed_once():
        found = {name: reported(pair, fault, tmp_path) for name, (fault, _) in faults().items()}
    assert len(found) >= 30
    assert {name: codes for name, codes in found.items() if not codes & faults()[name][1]} == {}
    assert all("bytes" in codes for name, codes in found.items() if name.startswith(("perturbed", "rolled", "swapped")))


def test_the_same_weights_in_another_place_are_no_fault(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with few_inputs("speech-even", "quiet"), computed_once():
        assert outcomes(pair, in_weights(lambda tensors: None), tmp_path) == [{"changed-file"}, {"changed-file"}]


def test_features_have_the_frames_and_the_scale_that_they_should() -> None:
    waves = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    made, counts = features(waves, [4000, 2000], 40)
    assert made.shape == (2, 23, 40) and counts.tolist() == [23, 11]
    assert abs(float(made[0].mean())) < 1e-6 and abs(float(made[0].std()) - 1) < 1e-2
    assert not made[1, 11:].any()
    alone, _ = features(waves[1:, :2000], None, 40)
    assert np.array_equal(alone[0], made[1, :11])


def test_the_language_is_that_of_the_first_tag() -> None:
    assert language_of(["<s>", "<pad>", "a", "<lang:de>", "<lang:fr>"]) == 3
    assert language_of(["<s>", "<pad>", "a"]) is None


def test_the_record_names_the_data_config(pair: tuple[Path, Path]) -> None:
    kept = json.loads((pair[1] / "conversion.json").read_text())["request"]
    assert kept["language"] == "de" and kept["data_config"]["prepend_tgt_lang_tag"] is True
    made = json.loads((pair[1] / "generation_config.json").read_text())
    vocabulary = json.loads((pair[1] / "vocab.json").read_text())
    assert made["forced_bos_token_id"] == vocabulary["<lang:de>"]
