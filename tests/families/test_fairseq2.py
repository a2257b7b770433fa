"""fairseq2's wav2vec 2.0 becomes transformers': the same numbers, the same text, or refused with every reason."""

from __future__ import annotations

import json
import random
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fairseq2_models as models
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
import yaml
from fairseq2.nn import BatchLayout
from verify_models import few_inputs, short_inputs

from convert.checkpoint import Checkpoint
from convert.checkpoint.container import DTYPES
from convert.checkpoint.dictionary import Dictionary
from convert.checkpoint.fairseq2_architectures import ARCHITECTURES, ASR
from convert.checkpoint.stored import Storage, StoredTensor
from convert.errors import CheckpointError, PlanError
from convert.families import Request, describe
from convert.package import compare_weights, convert, plan
from convert.restoration import restore
from convert.verification import verify
from convert.verification.fairseq_side.building import no_random_numbers
from convert.verification.fairseq_side.fairseq2 import build_fairseq2

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Convert a variant, of two shards, once."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            run = models.save_run(name, folder / "run", shards=2)
            known[name] = run, convert(run, folder / "model").path
        return known[name]

    return make


def loaded(path: Path) -> Any:
    """Load a directory with the class that it names, strictly."""
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model, seen = getattr(transformers, name).from_pretrained(
        path, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not any(seen[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), seen
    return model.eval()


def encoded(model: Any, waves: torch.Tensor, lengths: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """fairseq2's normalised features and its encoder's output."""
    frontend = model.encoder_frontend
    features, layout, _ = frontend.extract_features(waves, BatchLayout.of(waves, lengths))
    return features, model.encoder(frontend.process_features(features, layout)[0], layout)


@pytest.mark.parametrize("name", models.VARIANTS)
def test_every_variant_computes_the_same_bits(name: str, converted: Any) -> None:
    run, path = converted(name)
    assert compare_weights(run, path) == []
    theirs, ours = models.build(name), loaded(path)
    lengths = [4000, 3333, 801]
    waves = torch.nn.utils.rnn.pad_sequence([torch.randn(count) for count in lengths], batch_first=True)
    mask = torch.arange(4000)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        for batch, counts, attention in ((waves[:1], None, None), (waves, lengths, mask.long())):
            features, hidden = encoded(theirs, batch, counts)
            valid = ours.base_model._get_feat_extract_output_lengths(torch.tensor(counts or [4000]))
            if name.startswith("ctc"):
                pairs = [(theirs.final_proj(hidden), ours(batch, attention_mask=attention).logits)]
            else:
                output = ours.wav2vec2(batch, attention_mask=attention)
                quantized = models.quantize(theirs, features)
                pairs = [
                    (theirs.final_proj(hidden), ours.project_hid(output.last_hidden_state)),
                    (theirs.final_target_proj(quantized), ours.project_q(ours.quantizer(output.extract_features)[0])),
                ]
            for theirs_, ours_ in pairs:
                for one, other, count in zip(theirs_, ours_, valid, strict=True):
                    assert torch.equal(one[:count], other[:count])


def test_the_configuration(converted: Any) -> None:
    _, path = converted("ctc_omnilingual")
    config = json.loads((path / "config.json").read_text())
    assert config == {
        "activation_dropout": 0.09,
        "apply_spec_augment": False,
        "architectures": ["Wav2Vec2ForCTC"],
        "attention_dropout": 0.08,
        "bos_token_id": 1,
        "conv_bias": True,
        "conv_dim": [32, 32, 32, 32],
        "conv_kernel": [10, 3, 3, 2],
        "conv_stride": [5, 2, 2, 2],
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        "do_stable_layer_norm": True,
        "eos_token_id": 2,
        "feat_extract_activation": "gelu",
        "feat_extract_norm": "layer",
        "feat_proj_dropout": 0.03,
        "final_dropout": 0.02,
        "hidden_act": "gelu",
        "hidden_dropout": 0.07,
        "hidden_size": 64,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-05,
        "layerdrop": 0.05,
        "mask_feature_length": 64,
        "mask_feature_min_masks": 2,
        "mask_feature_prob": 0.0,
        "mask_time_length": 10,
        "mask_time_min_masks": 2,
        "mask_time_prob": 0.0,
        "model_type": "wav2vec2",
        "num_attention_heads": 2,
        "num_conv_pos_embedding_groups": 4,
        "num_conv_pos_embeddings": 16,
        "num_feat_extract_layers": 4,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "vocab_size": len(models.SPECIAL) + len(models.LETTERS),
    }
    record = json.loads((path / "conversion.json").read_text())
    assert record["config"]["num_attention_heads"] == "model.yaml.num_encoder_attn_heads"
    assert record["source"]["name"] == "step_100"
    assert record["training_only"].keys() >= {"feature_grad_scale", "max_seq_len"}


def test_the_loss_is_the_same(converted: Any) -> None:
    """Blank 0, summed over a batch, endless losses left out: what fine-tuning goes on with."""
    _, path = converted("ctc_omnilingual")
    theirs, ours = models.build("ctc_omnilingual"), loaded(path)
    waves, labels = torch.randn(2, 4000), torch.tensor([[5, 5, 4, 9], [7, 8, 6, 4]])
    with torch.no_grad():
        meant = theirs(waves, BatchLayout.of(waves), labels, BatchLayout.of(labels))
        assert torch.equal(meant, ours(waves, labels=labels).loss)


@pytest.mark.parametrize(("name", "dropped"), [("ctc_base", 2), ("pretraining_large", 7)])
def test_the_encoder_alone(name: str, dropped: int, tmp_path: Path) -> None:
    run = models.save_run(name, tmp_path / "run", tokenizer=False)
    done = convert(run, tmp_path / "model", head="encoder")
    assert done.model.target == "Wav2Vec2Model" and len(done.model.plan.drops) == dropped
    wave = torch.randn(1, 4000)
    with torch.no_grad():
        _, hidden = encoded(models.build(name), wave, None)
        assert torch.equal(hidden, loaded(done.path)(wave).last_hidden_state)


# parameters that omnilingual-asr and fairseq2 state for released models, or that fairseq2's own classes have
PARAMETERS = {
    "300m": 325_494_996,
    "1b": 975_065_300,
    "3b": 3_080_423_636,
    "7b": 6_504_786_132,
    "300m_v2": 325_982_896,
    "base_10h": 94_396_320,
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in ARCHITECTURES for name in ARCHITECTURES[family]]
)
def test_every_registered_architecture_fits_its_class(family: str, name: str) -> None:
    """The geometry of released models, without their numbers: fairseq2's class, the plan, and transformers' class."""
    model: dict[str, Any] = {"_name": f"fairseq2.{family}"} | ARCHITECTURES[family][name]
    with torch.device("meta"), no_random_numbers():
        theirs = build_fairseq2({"model": model}, 0, [], [])
    if family == ASR and name in PARAMETERS:
        assert sum(one.numel() for one in theirs.parameters()) == PARAMETERS[name]
    pieces = [*models.SPECIAL, *(chr(0x4E00 + index) for index in range(model.get("target_vocab_size", 4) - 4))]
    tokenizer = {"kinds": {"0": 3, "1": 3, "2": 3, "3": 2}, "unk_surface": "", "dummy_prefix": False}
    kinds = {torch.float32: "FloatStorage", torch.int64: "LongStorage"}
    without_bytes: Any = types.SimpleNamespace(dtype=lambda tensor: (DTYPES[tensor.storage.type], 0), size=0)
    checkpoint = Checkpoint(
        path=Path(name),
        container=without_bytes,
        layout="fairseq2",
        settings={"model": model, "task": {"normalize": True, "tokenizer": tokenizer}, "criterion": {}},
        dictionary=Dictionary(tuple(pieces), (1,) * len(pieces)) if family == ASR else None,
        tensors={
            key: StoredTensor(Storage(key, kinds[one.dtype], one.numel()), 0, tuple(one.shape), one.stride())
            for key, one in theirs.state_dict().items()
        },
        others=(),
        parts={},
    )
    made = describe(checkpoint, Request())
    configuration = transformers.Wav2Vec2Config(**made.configuration)
    with torch.device("meta"):
        ours = getattr(transformers, made.target)(configuration)
    assert {key: tuple(one.shape) for key, one in ours.state_dict().items()} == {
        key: spec.shape for key, spec in made.plan.target.items()
    }
    assert configuration.num_attention_heads == theirs.encoder.layers[0].self_attn.num_heads


def test_there_is_no_way_back(converted: Any, tmp_path: Path) -> None:
    _, path = converted("pretraining_base")
    with pytest.raises(PlanError, match=r"was made from fairseq2\.wav2vec2, to which there is no way back"):
        restore(path, tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.slow
def test_the_released_size(tmp_path: Path) -> None:
    """omniASR-CTC-300M's geometry and vocabulary in two shards: converted, and verified on one short input."""
    run = models.save_released("300m", tmp_path / "run", shards=2)
    path = convert(run, tmp_path / "model").path
    with short_inputs(), few_inputs("speech-odd", "quiet"):
        done = verify(run, path, devices=["cpu"], long=False)
    assert done.passed, [str(problem) for problem in done.problems]
    assert done.report["runs"][0]["verdict"] == "identical" and done.report["weights"]["tensors"] == 423


# --- one file -------------------------------------------------------------------------------------------------------


def with_card(folder: Path, name: str) -> None:
    """Put a model.yaml beside a file, as people upload them, and its tokenizer."""
    run = models.save_run(name, folder / "run")
    (run / "checkpoints/model.yaml").rename(folder / "model.yaml")
    (run / "tokenizer.model").rename(folder / "tokenizer.model")


def test_files_of_every_kind(tmp_path: Path) -> None:
    with_card(tmp_path, "ctc_base")
    weights = models.build("ctc_base").state_dict()
    kinds: dict[str, Any] = {
        "bare": weights,
        "model": {"model": weights, "fs2": True},
        "key": {"my_model": weights, "model_key": "my_model"},
        "module": {"model": {f"module.{key}": value for key, value in weights.items()}},
    }
    digests = set()
    for name, content in kinds.items():
        torch.save(content, tmp_path / f"{name}.pt", pickle_protocol=2)
        done = convert(tmp_path / f"{name}.pt", tmp_path / name, normalize=True)
        digests.add(done.files["model.safetensors"]["sha256"])
    assert len(digests) == 1
    record = json.loads((tmp_path / "bare/conversion.json").read_text())
    assert record["settings"]["task"]["normalize_from"] == "--normalize"


def test_settings_and_tokenizer_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    with_card(tmp_path / "beside", "ctc_base")
    path = models.save_file("ctc_base", tmp_path / "alone.pt")
    model = plan(
        path, base=tmp_path / "beside/model.yaml", dictionary=tmp_path / "beside/tokenizer.model", normalize=False
    )
    assert model.target == "Wav2Vec2ForCTC"
    assert model.processor.files["preprocessor_config.json"]["do_normalize"] is False


def test_a_named_architecture_is_held_against_the_shapes(tmp_path: Path) -> None:
    path = models.save_file("ctc_base", tmp_path / "alone.pt")
    models.save_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(PlanError) as caught:
        plan(path, arch="300m")
    problems = {problem.key: problem for problem in caught.value.problems}
    assert problems["--dict"].detail == "has 27 pieces, the model's head 9812 rows"
    assert problems["final_proj.weight"].detail == "source (27, 64), the settings say (9812, 1024)"


# --- text -----------------------------------------------------------------------------------------------------------

SPACE = "▁"
MARKED = [SPACE, *"aɛbcde|-'ñ"]
TOKENIZERS: dict[str, dict[str, Any]] = {
    "omnilingual": {},
    "written": {"letters": [" ", *'AaBb,.?!"é漢한'], "normalizer": [(1, "nmt_nfkc"), (5, False)]},
    "marked": {"letters": MARKED, "normalizer": [(1, "identity")]},
    "marked, spaces kept": {"letters": MARKED, "normalizer": [(1, "identity"), (4, False)]},
    "marked, no prefix": {"letters": MARKED, "normalizer": [(1, "identity"), (3, False), (4, False)]},
    "another unknown": {"trainer": models._field(44, "<?>")},
    "user-defined space": {
        "letters": ["a", "b"],
        "pieces": models._field(1, models._field(1, " ") + models._field(3, 4)),
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_made_as_fairseq2_makes_it(name: str, tmp_path: Path) -> None:
    """Pieces of random paths, blanks, repetitions, unknown ones and double spaces among them, decoded by sentencepiece."""
    run = models.save_run("ctc_base", tmp_path / "run", tokenizer=False)
    file = models.save_tokenizer(run / "tokenizer.model", **TOKENIZERS[name])
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    models.resize(run, library.vocab_size())
    path = convert(run, tmp_path / "model").path
    tokenizer = transformers.AutoProcessor.from_pretrained(path).tokenizer
    assert len(tokenizer) == library.vocab_size()
    generator = random.Random(0)
    ids = range(library.vocab_size())
    spaces = [index for index in ids if library.id_to_piece(index) in (" ", SPACE)]
    for _ in range(300):
        frames = generator.choices([0, 0, 3, *spaces, *spaces, *ids], k=generator.randint(0, 20))
        frames = [index for index in frames for _ in range(generator.randint(1, 2))]
        runs = [one for index, one in enumerate(frames) if index == 0 or frames[index - 1] != one]
        meant = library.decode_pieces([library.id_to_piece(index) for index in runs]) if runs else ""
        assert tokenizer.decode(frames) == meant, frames
    if name != "written":  # whose text is normalised before it is split
        for _ in range(100):
            text = "".join(
                generator.choices([*map(library.id_to_piece, ids[4:]), " ", "ß"], k=generator.randint(0, 12))
            )
            text = text.replace(SPACE, " ")
            assert tokenizer(text).input_ids == library.encode(text), text


def test_the_pipeline_writes_what_fairseq2_writes(converted: Any) -> None:
    run, path = converted("ctc_omnilingual")
    recognizer = transformers.pipeline("automatic-speech-recognition", model=str(path), device="cpu")
    library = sentencepiece.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))
    theirs = models.build("ctc_omnilingual")
    for seed in range(3):
        wave = np.random.default_rng(seed).normal(size=16000).astype(np.float32)
        with torch.no_grad():
            normal = torch.nn.functional.layer_norm(torch.from_numpy(wave), wave.shape)[None]
            frames = theirs(normal, BatchLayout.of(normal))[0][0].argmax(-1).unique_consecutive().tolist()
        assert recognizer(wave)["text"] == library.decode_pieces([library.id_to_piece(index) for index in frames])


# --- refusals -------------------------------------------------------------------------------------------------------


def problems_of(path: Path, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(PlanError) as caught:
        plan(path, **options)
    return [(problem.code, problem.key) for problem in caught.value.problems]


@pytest.mark.parametrize("name", models.REFUSED)
def test_what_transformers_has_not_is_refused_by_its_setting(name: str, tmp_path: Path) -> None:
    setting = "layer_norm_features" if name == "norm_order" else name
    assert problems_of(models.save_run(name, tmp_path)) == [("unsupported-setting", setting)]


def changed(run: Path, **changes: Any) -> Path:
    """Change a run's model.yaml; `None` takes a setting out."""
    file = run / "checkpoints/model.yaml"
    card = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        inside = card["model_config"] if key in card["model_config"] else card["model_config"]["encoder_config"]
        inside.pop(key, None)
        inside.update({} if value is None else {key: value})
    file.write_text(yaml.safe_dump(card))
    return run


def test_every_reason_comes_at_once(tmp_path: Path) -> None:
    run = models.save_run("ctc_base", tmp_path, normalize=None, tokenizer=False)
    changed(
        run, num_encoder_attn_heads=None, pos_encoder_type="relative", new_setting=3, norm_order="PRE_WITH_NORMFORMER"
    )
    assert problems_of(run) == [
        ("missing-setting", "num_encoder_attn_heads"),
        ("no-dictionary", "--dict"),
        ("no-normalize", "--normalize"),
        ("unknown-setting", "new_setting"),
        ("unsupported-setting", "norm_order"),
        ("unsupported-setting", "pos_encoder_type"),
    ]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_encoder_attn_heads": 3}, "num_encoder_attn_heads"),
        ({"feature_dim": 33}, "feature_dim"),
        ({"feature_extractor_layer_descs": [[32, 10]]}, "feature_extractor_layer_descs"),
        ({"feature_extractor_layer_descs": "os.system('x')"}, "feature_extractor_layer_descs"),
        ({"num_encoder_layers": 10**9}, "num_encoder_layers"),
        ({"use_masking": "yes"}, "use_masking"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert ("bad-setting", key) in problems_of(changed(models.save_run("ctc_base", tmp_path), **changes))


def test_a_wrong_number_of_layers_is_found_in_the_tensors(tmp_path: Path) -> None:
    found = problems_of(changed(models.save_run("ctc_base", tmp_path), num_encoder_layers=1))
    assert ("unexpected-tensor", "encoder.layers.1.ffn.inner_proj.weight") in found and len(found) == 16


PIECES: dict[str, tuple[Sequence[str], str, str]] = {
    "too few": (models.LETTERS[:-1], "dictionary-size", "has 26 pieces, the model's head 27 rows"),
    "long": ([*models.LETTERS[:-1], "ab"], "unsupported-tokenizer", "1 pieces are longer than a character"),
}


@pytest.mark.parametrize("name", PIECES)
def test_tokenizers_that_do_not_fit(name: str, tmp_path: Path) -> None:
    letters, code, detail = PIECES[name]
    run = models.save_run("ctc_base", tmp_path)
    models.save_tokenizer(run / "tokenizer.model", letters)
    with pytest.raises(PlanError) as caught:
        plan(run)
    (problem,) = caught.value.problems
    assert problem.code == code and problem.detail.startswith(detail)


def test_pieces_for_bytes_and_another_blank(tmp_path: Path) -> None:
    run = models.save_run("ctc_base", tmp_path)
    byte = models._field(1, models._field(1, "<0x00>") + models._field(3, 6))
    models.save_tokenizer(run / "tokenizer.model", models.LETTERS[:-1], pieces=byte)
    assert problems_of(run) == [("unsupported-tokenizer", "--dict")]
    models.save_tokenizer(run / "tokenizer.model", special=["<pad>", "<s>", "</s>", "<unk>"])
    assert problems_of(run) == [("bad-dictionary", "--dict")]


def test_the_wrong_file_for_the_option(tmp_path: Path) -> None:
    run = models.save_run("ctc_base", tmp_path, tokenizer=False)
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(CheckpointError) as caught:
        plan(run, dictionary=tmp_path / "dict.txt")
    assert caught.value.code == "bad-dictionary" and "sentencepiece" in str(caught.value)
