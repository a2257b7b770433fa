"""Sequence-to-sequence models: converted, held against real fairseq and its generator, proved, and taken back."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fairseq.data import Dictionary
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.sequence_generator import SequenceGenerator
from fairseq_models import dictionary
from faults import SILENT, Fault, perturbed, reported, swapped
from safetensors.numpy import load_file
from seq2seq_models import DECODER, REFUSED, VARIANTS, Seq2Seq, build, save
from verify_models import computed_once, edit, few_inputs, short_inputs

import convert
from convert.errors import PlanError
from convert.mapping import TensorSpec, infer_layout, map_state_dict
from convert.pieces import sinusoids
from convert.verification import verify
from convert.verification.fairseq_side.numerics import sinusoids as sinusoids_of_the_reference

torch.serialization.add_safe_globals([Dictionary])  # fairseq's loader leaves torch.load at its default, weights only
ENCODERS = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel"}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "quiet", "padded-batch"), computed_once():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("base")
    checkpoint = save("pre_norm_learned_shared", folder / "model.pt")
    return checkpoint, convert.convert(checkpoint, folder / "model").path


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load with plain transformers, each part with the attention it chooses itself."""
    model, seen = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {key: value for key, value in seen.items() if value}


def waves(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch padded with zeros, and where the padding is."""
    batch = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.randn(length, generator=torch.Generator().manual_seed(length))
    return batch, torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]


# --- against real fairseq -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_generated_tokens_are_fairseqs(name: str, tmp_path: Path) -> None:
    reference, variant = build(name), VARIANTS[name]
    made = convert.convert(save(name, tmp_path / "a.pt", model=reference), tmp_path / "out")
    model, wrong = load(tmp_path / "out")
    assert wrong == {} and made.model.target == "SpeechEncoderDecoderModel"
    assert type(model.encoder).__name__ == ENCODERS[variant.kind]
    pre_norm = variant.decoder.get("decoder_normalize_before", False)
    assert type(model.decoder).__name__ == ("BlenderbotForCausalLM" if pre_norm else "TrOCRForCausalLM")
    symbols = dictionary(variant.symbols)
    reference.encoder.w2v_model.encoder.required_seq_len_multiple = 1  # or fairseq adds a frame and masks it
    tokens = torch.randint(4, len(symbols), (1, 10), generator=torch.Generator().manual_seed(1))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        source, _ = waves([6480])
        encoded = reference.encoder(source=source, padding_mask=None)
        found = model(inputs=source, decoder_input_ids=tokens)
        assert torch.equal(found.encoder_last_hidden_state, encoded["encoder_out"].transpose(0, 1))
        expected, _ = reference.decoder(tokens, encoder_out=encoded)
        assert torch.allclose(found.logits, expected, rtol=0, atol=4 * _rounding(expected))
        generator = SequenceGenerator([reference], symbols, beam_size=1)
        batches = [([6480], False)] + [([8000, 6480, 3333], True)] * (variant.kind == "wav2vec2")
        for lengths, padded in batches:
            source, padding = waves(lengths)
            net_input = {"source": source, "padding_mask": padding if padded else None}
            texts = [
                hypotheses[0]["tokens"] for hypotheses in generator.generate([reference], {"net_input": net_input})
            ]
            ids = model.generate(source, attention_mask=(~padding).long() if padded else None, num_beams=1)
            assert [_ended(row[1:]) for row in ids.tolist()] == [row.tolist() for row in texts]
            decoded = processor.batch_decode(ids, skip_special_tokens=True)
            assert decoded == [symbols.string(row, made.model.processor.decoding) for row in texts]


def _rounding(values: torch.Tensor) -> float:
    return float(values.abs().max()) * 2**-22


def _ended(row: list[int]) -> list[int]:
    return row[: row.index(2) + 1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        convert.convert(save(REFUSED[name], tmp_path / "a.pt"), tmp_path / "out")
    assert name in {problem.key for problem in caught.value.problems}
    assert not (tmp_path / "out").exists()


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    checkpoint = save("sinusoidal", tmp_path / "a.pt")
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["model"] |= {"no_token_positional_embeddings": True, "invented": 1, "decoder_attention_heads": 5}
    del state["task_state"]
    torch.save(state, checkpoint)
    with pytest.raises(PlanError) as caught:
        convert.convert(checkpoint, tmp_path / "out")
    found = {(problem.code, problem.key) for problem in caught.value.problems}
    assert found == {
        ("bad-setting", "decoder_attention_heads"),
        ("no-dictionary", "--dict"),
        ("unknown-setting", "invented"),
        ("unsupported-setting", "no_token_positional_embeddings"),
    }


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [("model", {"layer_type": "conformer"}, "layer_type"), ("inner", {"_name": "data2vec_audio"}, "data2vec_audio")],
)
def test_encoders_without_a_reference(section: str, changes: dict[str, str], key: str, tmp_path: Path) -> None:
    checkpoint = save("sinusoidal", tmp_path / "a.pt")
    state = torch.load(checkpoint, weights_only=False)
    model = state["cfg"]["model"]
    (model if section == "model" else model["w2v_args"]["model"]).update(changes)
    torch.save(state, checkpoint)
    with pytest.raises(PlanError) as caught:
        convert.convert(checkpoint, tmp_path / "out")
    assert key in {caught.value.problems[0].key, *(problem.key for problem in caught.value.problems)}


def test_a_width_that_the_cross_attention_does_not_have(tmp_path: Path) -> None:
    """fairseq main builds 512 columns whatever the encoder's width; such a model cannot run, in fairseq either."""
    reference = build("sinusoidal")
    layer = reference.decoder.layers[0].encoder_attn
    layer.k_proj.weight = torch.nn.Parameter(torch.zeros(48, 512))
    with pytest.raises(PlanError) as caught:
        convert.convert(save("sinusoidal", tmp_path / "a.pt", model=reference), tmp_path / "out")
    key = "decoder.layers.0.encoder_attn.k_proj.weight"
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [("shape", key)]


def test_the_bare_encoder(tmp_path: Path) -> None:
    made = convert.convert(save("learned", tmp_path / "a.pt"), tmp_path / "out", head="encoder")
    assert made.model.target == "Wav2Vec2Model"
    assert verify(tmp_path / "a.pt", tmp_path / "out", devices=["cpu"], long=False).problems == ()


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 7, 48, 512])
def test_sinusoids_are_fairseqs(width: int) -> None:
    ours, theirs = sinusoids(42, width), SinusoidalPositionalEmbedding.get_embedding(42, width, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-6  # torch's exp may be off by one unit, times the position
    assert np.array_equal(ours == 0, theirs == 0) and not ours[1].any()
    assert np.array_equal(ours, sinusoids_of_the_reference(42, width).numpy())


def test_rows_of_learned_positions(tmp_path: Path) -> None:
    """Blenderbot's table begins with the first position, fairseq's with two rows for its special ids."""
    reference = build("pre_norm_learned_shared")
    checkpoint = save("pre_norm_learned_shared", tmp_path / "a.pt", model=reference)
    made = convert.convert(checkpoint, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["decoder.model.decoder.embed_positions.weight"]
    table = reference.decoder.embed_positions.weight.detach().numpy()
    assert np.array_equal(written, table[2:])
    kept = made.path / "conversion.json"
    assert bytes.fromhex(json.loads(kept.read_text())["left_rows"].popitem()[1]) == table[:2].tobytes()


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_without_a_checkpoint() -> None:
    reference = build("learned")
    mapped = map_state_dict(reference.state_dict())
    assert mapped["decoder.output_projection.weight"] is not None and "enc_to_dec_proj.bias" in mapped
    shapes = {key: TensorSpec(key, tuple(value.shape)) for key, value in reference.state_dict().items()}
    layout = infer_layout(shapes)
    assert (layout.family, layout.positions, layout.learned, layout.shared) == ("seq2seq", 12, True, False)
    with pytest.raises(PlanError, match="not a sequence-to-sequence"):
        infer_layout({"encoder.w2v_model.mask_emb": (64,)})


# --- text -----------------------------------------------------------------------------------------------------------

VOCABULARIES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "letters": (tuple("|ETAOIN'"), {}, "letter"),
    "sentencepiece": (("▁the", "▁", "s", "at"), {"eval_wer": True, "eval_wer_post_process": "sentencepiece"}, ""),
    "sentencepiece_unsaid": (("▁the", "▁", "s", "at"), {}, "sentencepiece"),
    "letters_said": (("▁the", "|", "s", "at"), {"eval_wer": True}, "letter"),
    "wordpiece": (("the_", "s_", "at"), {"eval_wer": True, "eval_wer_post_process": "wordpiece"}, ""),
    "subword_nmt": (("the", "c@@", "at", "s@@"), {"eval_wer": True, "eval_wer_post_process": "subword_nmt"}, ""),
    "silence": (("the", "<SIL>", "at"), {"eval_wer": True, "eval_wer_post_process": "silence"}, ""),
    "phonemes": (("aa", "b", "ch"), {"labels": "phn"}, "none"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_text_is_fairseqs(name: str, tmp_path: Path) -> None:
    symbols, task, decoding = VOCABULARIES[name]
    decoding = decoding or task["eval_wer_post_process"]
    variant = Seq2Seq("wav2vec2", VARIANTS["sinusoidal"].encoder, DECODER, task=task, symbols=symbols)
    convert.convert(save(variant, tmp_path / "a.pt"), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    target, chosen = dictionary(symbols), random.Random(7)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == target.symbols
    for length in (0, 1, 2, 30, 30, 30):
        ids = [2, *(chosen.choice([0, *range(3, len(target))]) for _ in range(length)), 2]
        assert tokenizer.decode(ids, skip_special_tokens=True) == target.string(torch.tensor(ids), decoding)
    line = " ".join(symbols)
    assert tokenizer(line).input_ids == target.encode_line(line, add_if_not_exist=False, append_eos=False).tolist()


# --- the proof ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinusoidal", "pre_norm_learned_shared", "hubert"])
def test_it_is_proved(name: str, tmp_path: Path) -> None:
    convert.convert(save(name, tmp_path / "a.pt"), tmp_path / "out")
    done = verify(tmp_path / "a.pt", tmp_path / "out", devices=["cpu"], long=False)
    assert done.problems == ()
    controls = {control["name"]: control["caught"] for control in done.report["controls"]}
    assert len(controls) == 15 and all(controls.values())
    assert {run["require"] for run in done.report["runs"]} == {"rounding"}
    single = [run for run in done.report["runs"] if run["input"] != "padded-batch"]
    for run in single:  # the encoder's bits are fairseq's; no token may differ
        assert {stage["stage"].partition(".")[0] for stage in run["stages"]} == {"decoder"}
    rows = next(one.rows for one in done.stages if one.kind == "run" and one.name == "speech-even")
    wanted = {"conv.0", "layer.1", "encoder", "decoder.embedded", "decoder.layer.1", "decoder.logits", "generated"}
    assert wanted <= {row[0] for row in rows}
    assert ("enc_to_dec_proj" in {row[0] for row in rows}) == (VARIANTS[name].decoder["decoder_embed_dim"] != 64)
    assert {one["fairseq_text"] == one["hf_text"] for one in done.report["end_to_end"]} == {True}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype: str, tmp_path: Path) -> None:
    seed = len(dtype)  # a model of its own: the reference rounds its weights, and is kept
    convert.convert(save("pre_norm", tmp_path / "a.pt", seed=seed), tmp_path / "out", dtype=dtype)
    assert verify(tmp_path / "a.pt", tmp_path / "out", devices=["cpu"], long=False).problems == ()


def test_a_recording(base: tuple[Path, Path], tmp_path: Path) -> None:
    from convert.verification import record

    record(base[0], tmp_path / "recording.safetensors")
    assert verify(*base, reference=tmp_path / "recording.safetensors", write=False).problems == ()


def test_both_sides_write_the_same_text_for_error_rates(base: tuple[Path, Path]) -> None:
    from convert.evaluation.data import Utterance
    from convert.evaluation.fairseq_reference import FairseqReference
    from convert.evaluation.recognize import open_recognizer

    samples = waves([6480])[0][0].numpy()
    theirs = FairseqReference(base[0], "cpu").transcribe(samples)
    ours = open_recognizer(base[1], "cpu").transcribe([Utterance(0, "a", samples, "")])
    assert ours == [theirs] and theirs


# --- the way back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinusoidal", "shared", "pre_norm_learned_shared", "width_512", "old_positions"])
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    reference = build(name)
    convert.convert(save(name, tmp_path / "a.pt", model=reference), tmp_path / "out")
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    before, after = reference.state_dict(), torch.load(tmp_path / "back.pt", weights_only=False)["model"]
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)


def test_fairseqs_loader_takes_it(tmp_path: Path) -> None:
    """Of a width of 512, which is what fairseq's decoder expects of an encoder; others its loader cannot build."""
    from fairseq import checkpoint_utils

    reference = build("width_512")
    convert.convert(save("width_512", tmp_path / "a.pt", model=reference), tmp_path / "out")
    convert.restore(tmp_path / "out", tmp_path / "back.pt")
    (restored,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "back.pt")])
    assert task.target_dictionary.symbols[4] == "|"
    source, _ = waves([6400])
    tokens = torch.tensor([[2, 5, 6]])
    with torch.no_grad():
        given = {"source": source, "padding_mask": None, "prev_output_tokens": tokens}
        assert torch.equal(reference(**given)[0], restored.eval()(**given)[0])


# --- faults ---------------------------------------------------------------------------------------------------------


def weight_faults(model: Path) -> dict[str, Fault]:
    """Perturb every weight of the decoder's last layer and around it, and swap neighbours of one shape in it."""
    tensors = load_file(model / "model.safetensors")
    tensors = {
        name: tensors[name]
        for name in tensors
        if name[:8] == "decoder." and name[-6:] == "weight" and ".layers.0." not in name
    }
    faults = {f"perturbed {name}": perturbed(name) for name in tensors}
    last = sorted(name for name in tensors if name.endswith("proj.weight"))
    for one, other in itertools.pairwise(last):
        if tensors[one].shape == tensors[other].shape:
            faults[f"swapped {one} and {other}"] = swapped(one, other)
    return faults


def nested(part: str, **changes: Any) -> Fault:
    def fault(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        edit(model / "config.json", **{part: content[part] | changes})

    return fault


def other_faults() -> dict[str, Fault]:
    """Values that change what is computed, generated or written, or whether it loads."""
    decoder: list[dict[str, Any]] = [{"activation_function": "gelu"}, {"scale_embedding": False}, {"d_model": 32}]
    decoder += [{"decoder_attention_heads": 2}, {"decoder_layers": 1}, {"max_position_embeddings": 14}]
    decoder += [{"model_type": "trocr"}, {"vocab_size": 31}]
    encoder: list[dict[str, Any]] = [{"do_stable_layer_norm": True}, {"num_attention_heads": 2}]
    faults = {f"decoder {changes}": nested("decoder", **changes) for changes in decoder}
    faults |= {f"encoder {changes}": nested("encoder", **changes) for changes in encoder}
    generation: list[dict[str, Any]] = [{"decoder_start_token_id": 5}, {"max_length": 5}, {"forced_eos_token_id": 7}]
    for changes in generation:
        faults[f"generation {changes}"] = lambda model, changes=changes: edit(
            model / "generation_config.json", **changes
        )
    for changes in ({"pad_token": "<s>"}, {"eos_token": "E"}):
        faults[f"tokenizer {changes}"] = lambda model, changes=changes: edit(model / "tokenizer_config.json", **changes)

    def exchanged(model: Path) -> None:
        content = json.loads((model / "tokenizer.json").read_text())
        names = content["model"]["vocab"]
        names["E"], names["T"] = names["T"], names["E"]
        edit(model / "tokenizer.json", model=content["model"])

    return faults | {"E and T exchanged": exchanged}


def test_every_fault_in_the_weights_is_reported(base: tuple[Path, Path], tmp_path: Path) -> None:
    faults = weight_faults(base[1])
    codes = {label: reported(base, fault, tmp_path) for label, fault in faults.items()}
    assert len(faults) > 20
    assert [label for label, found in codes.items() if "bytes" not in found] == []
    quiet = {label for label, found in codes.items() if "different" not in found}
    assert {label for label in quiet if not any(part in label for part in SILENT)} == set()


def test_every_other_fault_is_reported(base: tuple[Path, Path], tmp_path: Path) -> None:
    codes = {label: reported(base, fault, tmp_path) for label, fault in other_faults().items()}
    wanted = {"different", "vocabulary", "spelling", "load", "missing-keys", "unexpected-keys", "mismatched-keys"}
    assert [label for label, found in codes.items() if not found & wanted] == []
