"""Speech-to-text transformers: real fairseq models against transformers, bit for bit and token for token; and what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from command_line import ROOT
from fairseq import checkpoint_utils
from fairseq.data import encoders
from fairseq.data.audio.feature_transforms.utterance_cmvn import UtteranceCMVN
from safetensors.torch import load_file
from speech_to_text_models import REFUSED, VARIANTS, Variant, save

import convert
from convert.checkpoint.data_config import read_data_config
from convert.checkpoint.sentencepiece import pieces
from convert.errors import ConvertError, PlanError
from convert.mapping import infer_layout, table
from convert.restoration import restore
from convert.verification.attention import NAME, register
from convert.verification.inputs import bundled

EOS, PAD = 2, 1
FRAMES = (1, 64, 131)


def converted(variant: Variant | str, folder: Path, **saving: Any) -> tuple[Path, torch.nn.Module, Any]:
    """Save a model and convert it; return the model directory, fairseq's model and its task."""
    path, model, task = save(variant, folder, **saving)
    return convert.convert(path, folder / "out", data_config=folder / "config.yaml").path, model, task


def load(directory: Path, attention: str = "eager") -> Any:
    """Load with plain transformers, strictly; `fairseq` is the attention with fairseq's order of sums."""
    register()
    model, info = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
        directory, output_loading_info=True, attn_implementation=attention
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def features(model: Any, frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, frames, model.config.input_feat_per_channel, generator=generator)


def forced(count: int, vocabulary: int) -> torch.Tensor:
    """What the decoder is fed with: its start, and then any symbols but the padding."""
    drawn = torch.randint(3, vocabulary, (1, count), generator=torch.Generator().manual_seed(count))
    drawn[0, 0] = EOS
    return drawn


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Every bit of the logits once attention is computed in fairseq's order, and every token of a beam of one."""
    directory, reference, task = converted(name, tmp_path)
    twin = load(directory, NAME)
    vocabulary = len(task.target_dictionary)
    for frames in FRAMES:
        source = features(twin, frames)
        tokens = forced(7, vocabulary)
        theirs, _ = reference(source, torch.tensor([frames]), tokens)
        assert torch.equal(theirs, twin(source, decoder_input_ids=tokens).logits), frames
    lengths, counts = torch.tensor([131, 90, 33]), torch.tensor([8, 5, 3])
    source = torch.cat([features(twin, 131, seed) for seed in range(3)])
    tokens = torch.cat([forced(8, vocabulary)] * 3)
    source[torch.arange(131)[None] >= lengths[:, None]] = 0.0
    tokens[torch.arange(8)[None] >= counts[:, None]] = PAD
    theirs, _ = reference(source, lengths, tokens)
    mask = (torch.arange(131)[None] < lengths[:, None]).long()
    ours = twin(source, attention_mask=mask, decoder_input_ids=tokens).logits
    assert torch.equal(theirs[tokens != PAD], ours[tokens != PAD])


def generated(reference: torch.nn.Module, task: Any, source: torch.Tensor, language: int | None) -> list[int]:
    """fairseq's beam of one, as fairseq-generate asks for it."""
    prefix = None if language is None else torch.tensor([[language]])
    asked = Namespace(beam=1, max_len_a=0, max_len_b=200, min_len=1, prefix_size=0 if language is None else 1)
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.tensor([source.shape[1]])}}
    tokens = task.build_generator([reference], asked).generate([reference], sample, prefix_tokens=prefix)
    return list(tokens[0][0]["tokens"].tolist())


GREEDY = {"num_beams": 1, "early_stopping": False}


@pytest.mark.parametrize(
    ("name", "language"), [("untied", None), ("tied", None), ("translation", "<lang:de>"), ("to_many", "<lang:fr>")]
)
def test_generation_gives_the_same_tokens_and_the_same_text(name: str, language: str | None, tmp_path: Path) -> None:
    """With a beam of one, transformers' own attention, its processor."""
    seen = set()
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        directory, reference, task = converted(name, folder, seed=seed)
        twin, dictionary = load(directory), task.target_dictionary
        tag = None if language is None else dictionary.index(language)
        processor = transformers.AutoProcessor.from_pretrained(directory)
        bpe = encoders.build_bpe(Namespace(**task.data_cfg.bpe_tokenizer))
        for frames in (40, 131):
            source = features(twin, frames, seed) * 3
            theirs = generated(reference, task, source, tag)
            ours = twin.generate(source, **GREEDY)[0].tolist()
            assert ours == [EOS, *theirs]
            assert PAD not in theirs and (tag is None or theirs[0] == tag)
            ignored = {index for index, symbol in enumerate(dictionary.symbols) if symbol.startswith("<lang:")}
            text = bpe.decode(dictionary.string(theirs, extra_symbols_to_ignore=ignored | {dictionary.unk()}))
            assert processor.decode(ours, skip_special_tokens=True) == text
            seen.add(len(theirs) == twin.config.max_target_positions)
            if tag is not None:  # control: without the tag, the first token is another one
                twin.generation_config.forced_bos_token_id = None
                assert twin.generate(source, **GREEDY)[0].tolist() != ours
                twin.generation_config.forced_bos_token_id = tag
    assert True in seen  # the greatest length, where both sides end the text, is among them


@pytest.mark.parametrize("layout", ["cfg", "namespace"])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_every_layout_converts_to_the_same_files(layout: str, container: str, tmp_path: Path) -> None:
    usual, given = tmp_path / "usual", tmp_path / "given"
    usual.mkdir()
    given.mkdir()
    one, _, _ = converted("tied", usual)
    other, _, _ = converted("tied", given, layout=layout, container=container)
    for file in sorted(path.name for path in one.iterdir() if path.name != "conversion.json"):
        if file.endswith(".safetensors"):  # the tensors lie in the order in which the checkpoint has them
            tensors = load_file(other / file)
            assert all(torch.equal(value, tensors.pop(key)) for key, value in load_file(one / file).items())
            assert tensors == {}
            continue
        kept, made = (one / file).read_bytes(), (other / file).read_bytes()
        if file == "generation_config.json" and layout == "namespace":  # which says nothing of a beam
            kept = json.loads(kept)
            assert (kept.pop("num_beams"), kept.pop("early_stopping")) == (5, True)
            made = json.loads(made)
        assert kept == made, file


@pytest.mark.parametrize("name", ["untied", "no_cmvn", "means_only", "forty_bins"])
def test_the_feature_extractor_normalises_as_the_task_says(name: str, tmp_path: Path) -> None:
    """fairseq's own transforms on the same filter banks; what float32 rounds away is measured in float64."""
    directory, _, task = converted(name, tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    plain = transformers.AutoFeatureExtractor.from_pretrained(directory, do_ceptral_normalize=False)
    banks = plain(bundled(), sampling_rate=16000)["input_features"][0]
    assert banks.shape[1] == task.data_cfg.input_feat_per_channel
    transforms = task.data_cfg.get_feature_transforms("test", False)
    meant = lambda values: values  # noqa: E731
    if transforms["feature_transforms"]:
        assert transforms["feature_transforms"] == ["utterance_cmvn"]
        meant = UtteranceCMVN.from_config_dict(transforms.get("utterance_cmvn"))
    theirs, exact = meant(banks), meant(banks.astype(np.float64))
    found = extractor(bundled(), sampling_rate=16000)["input_features"][0]
    ours = extractor.utterance_cmvn(
        banks.astype(np.float64), len(banks), extractor.normalize_means, extractor.normalize_vars
    )
    ours = ours if extractor.do_ceptral_normalize else banks
    allowed = np.abs(theirs - exact).max() + np.abs(ours - exact).max()
    assert np.abs(found - theirs).max() <= allowed
    assert (name == "no_cmvn") == np.array_equal(found, banks)  # control: the normalisation is seen


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_cannot_represent_is_refused(name: str, tmp_path: Path) -> None:
    path, _, _ = save(REFUSED[name], tmp_path)
    with pytest.raises(PlanError) as caught:
        convert.convert(path, tmp_path / "out", data_config=tmp_path / "config.yaml")
    assert ("unsupported-setting", name) in {(problem.code, problem.key) for problem in caught.value.problems}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "code", "key"),
    [
        ({"transforms": {"*": ["global_cmvn"]}}, "unsupported-setting", "transforms"),
        ({"transforms": {"*": ["utterance_cmvn", "delta_deltas"]}}, "unsupported-setting", "transforms"),
        ({"feature_transforms": {"_eval": ["specaugment"]}}, "unsupported-setting", "feature_transforms"),
        ({"waveform_transforms": {"*": ["noiseaugment"]}}, "unsupported-setting", "waveform_transforms"),
        ({"transforms": {"dev": ["utterance_cmvn"]}}, "unsupported-setting", "transforms"),
        ({"transforms": ["utterance_cmvn"]}, "bad-setting", "transforms"),
        ({"utterance_cmvn": True}, "bad-setting", "utterance_cmvn"),
        ({"use_audio_input": True}, "unsupported-setting", "use_audio_input"),
        ({"sample_rate": 8000}, "unsupported-setting", "sample_rate"),
        ({"eos_token": "<lang:de>"}, "unsupported-setting", "eos_token"),
        (
            {"prepend_bos_and_append_tgt_lang_tag": True},
            "unsupported-setting",
            "prepend_bos_and_append_tgt_lang_tag",
        ),
        ({"prepend_tgt_lang_tag": True}, "no-language", "--lang"),
        ({"pre_tokenizer": {"tokenizer": "moses"}}, "unsupported-setting", "pre_tokenizer"),
        ({"bpe_tokenizer": {"bpe": "characters"}}, "unsupported-setting", "bpe_tokenizer"),
        ({"bpe_tokenizer": None}, "unsupported-setting", "bpe_tokenizer"),
        ({"input_feat_per_channel": 40}, "conflict", "input_feat_per_channel"),
        ({"a_new_setting": 1}, "unknown-setting", "a_new_setting"),
    ],
)
def test_what_the_task_says_and_transformers_cannot_do_is_refused(
    data: dict[str, Any], code: str, key: str, tmp_path: Path
) -> None:
    path, _, _ = save("untied", tmp_path)
    said = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said | data))
    with pytest.raises(PlanError) as caught:
        convert.plan(path, data_config=tmp_path / "config.yaml")
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [(code, key)]


def test_the_data_config_is_asked_for(tmp_path: Path) -> None:
    path, _, _ = save("untied", tmp_path)
    with pytest.raises(PlanError, match="cannot be converted") as caught:
        convert.plan(path)
    assert "--data-config" in caught.value.hint
    assert {problem.code for problem in caught.value.problems} == {"no-data-config", "no-dictionary"}


@pytest.mark.parametrize("lost", ["config.yaml", "dict.txt", "spm.model"])
def test_a_missing_file_is_named(lost: str, tmp_path: Path) -> None:
    path, _, _ = save("untied", tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ConvertError, match=lost) as caught:
        convert.plan(path, data_config=tmp_path / "config.yaml")
    assert caught.value.status == 2


@pytest.mark.parametrize(
    "content", [b"", b"- a\n- b\n", b"a: [", b"\xff\xfe", b"&a [*a]", b"a: &a [1]\nb: [*a, *a]\nc: \xff"]
)
def test_what_is_no_config_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConvertError) as caught:
        read_data_config(tmp_path / "config.yaml")
    assert caught.value.code == "bad-data-config"


def test_the_sentencepiece_model_of_another_dictionary_is_refused(tmp_path: Path) -> None:
    path, _, _ = save("untied", tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    save("to_many", other)
    names = (tmp_path / "dict.txt").read_text().replace("▁t 1", "▁zz 1")
    (tmp_path / "dict.txt").write_text(names)
    with pytest.raises(PlanError, match="") as caught:
        convert.plan(path, data_config=tmp_path / "config.yaml")
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [("conflict", "sentencepiece_model")]
    assert "<lang:fr>" in set(pieces((other / "spm.model").read_bytes()))


def test_a_data_config_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ConvertError):
        convert.plan(ROOT / "checkpoints" / "espeak-wav2vec2-ctc.pt", data_config=ROOT / "pyproject.toml")


@pytest.mark.parametrize("layout", ["cfg", "namespace"])
def test_the_way_back_is_what_fairseq_loads(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, reference, _ = converted("tied", tmp_path, layout=layout)
    restore(directory, tmp_path / "back.pt")
    loading = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loading(*a, **{**k, "weights_only": False}))
    before, after = torch.load(tmp_path / "model.pt")["model"], torch.load(tmp_path / "back.pt")["model"]
    assert before.keys() == after.keys()  # the relics too
    assert all(torch.equal(before[key], after[key]) for key in before)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "back.pt")], arg_overrides={"data": str(tmp_path)}
    )
    source, tokens = torch.randn(1, 50, 80), forced(5, len(task.target_dictionary))
    with torch.no_grad():
        theirs, _ = reference(source, torch.tensor([50]), tokens)
        ours, _ = models[0].eval()(source, torch.tensor([50]), tokens)
    assert torch.equal(theirs, ours)


def test_a_dropped_projection_has_no_way_back(tmp_path: Path) -> None:
    directory, _, _ = converted("ctc", tmp_path)
    with pytest.raises(PlanError) as caught:
        restore(directory, tmp_path / "back.pt")
    assert {problem.key for problem in caught.value.problems} == {"encoder.ctc_proj.bias", "encoder.ctc_proj.weight"}


def test_nothing_but_what_is_stated_is_dropped(tmp_path: Path) -> None:
    directory, _, _ = converted("untied", tmp_path)
    record = json.loads((directory / "conversion.json").read_text())
    assert [drop["key"] for drop in record["drops"]] == ["decoder.version"]
    assert record["fills"] == [] and record["request"]["data_config"]["vocab_filename"] == "dict.txt"
    assert str(tmp_path) not in (directory / "conversion.json").read_text()


def test_the_table_leads_both_ways(tmp_path: Path) -> None:
    _, model, _ = save("three_convolutions", tmp_path)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    made = table(infer_layout(shapes))
    there = made.map_state_dict(shapes)
    assert made.inverse.map_state_dict(there) == {key: value for key, value in shapes.items() if "version" not in key}
    with pytest.raises(PlanError, match="converted whole"):
        table(infer_layout(shapes), "encoder")
