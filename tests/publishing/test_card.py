"""The model card: it says what is known, everything the well-known card of the same model says, and it runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import io
import json
import random
import re
import subprocess
import sys

import pytest
import yaml
from hub_fixtures import CHECKPOINT, RUN, evaluate, facts_of, prove, write

from convert.errors import ConvertError
from convert.fetching import catalogue
from convert.publishing.card import BEGIN, END, compose
from convert.publishing.facts import Features, papers
from convert.publishing.frontmatter import split

SELF = "wav2vec2-large-lv60-10m-self"


def metadata(card: bytes) -> dict:
    return yaml.safe_load(split(card.decode())[1])


# ---------------------------------------------------------------- what it says


def test_holds_everything_of_the_well_known_card(model):
    card = compose(facts_of(model, catalogue=SELF)).decode()
    data = metadata(card.encode())
    # metadata of the hand-written card, and what it lacks or has wrong
    assert data["language"] == ["en"] and data["datasets"] == ["openslr/librispeech_asr"]
    assert {"speech", "audio", "automatic-speech-recognition", "hf-asr-leaderboard"} <= set(data["tags"])
    assert data["license"] == "mit"  # fairseq's own license for its released models; that card says apache-2.0
    assert data["pipeline_tag"] == "automatic-speech-recognition" and data["library_name"] == "transformers"
    assert data["base_model"] == "facebook/wav2vec2-large-lv60"
    assert "model-index" not in data  # that card's holds a word error rate of "None"
    for part in (
        "10 minutes of labels",
        "self-train",
        "direct state_dict transfer from fairseq",
        "the weights are identical",
        "Libri-Light",
        "LibriSpeech",
        "16 kHz",
        "https://ai.facebook.com/blog/wav2vec-20",
        "https://arxiv.org/abs/2010.11430",
        "https://arxiv.org/abs/2006.11477",
        "Alexei Baevski, Henry Zhou, Abdelrahman Mohamed, Michael Auli",
        "1.8/3.3",
        "4.8/8.2",
        "53k hours",
        "100 times less labeled data",
        "contrastive task",
        "quantiz",
        "semi-supervised",
        "facebookresearch/fairseq/tree/main/examples/wav2vec#wav2vec-20",
        "https://dl.fbaipublicfiles.com/fairseq/wav2vec/wav2vec_vox_10m_pl.pt",
        CHECKPOINT,
        'for part in ("clean", "other")',
        "| not measured | not measured |",
        "2 of 2 caught",
        "4.2e-07 | 1.1e-06",
        "-50 dBFS",
        "attention_mask",
        "| `model.layer_norm_first` | `False` |",
        "@article{baevski2020",
    ):
        assert part in card, part


def test_says_nothing_that_nobody_knows(model):
    facts = facts_of(model)
    card = compose(facts).decode()
    assert facts.unknown == ("license", "language", "datasets", "base_model")
    assert set(metadata(card.encode())) == {"library_name", "pipeline_tag", "tags"}
    for invented in ("More Information", "LibriSpeech", "Libri-Light", "None", "librispeech"):
        assert invented not in card.replace("LibriSpeech test-clean/test-other", "").replace("on LibriSpeech", ""), (
            invented
        )
    assert "No evaluation of this model has been made" in card and "checkpoint_best.pt" in card


def test_says_who_trained_it_and_what_its_features_are(model):
    """Control: each of these words is missing from the card of a wav2vec 2.0 model."""
    facts = facts_of(model)
    wavlm = compose(dataclasses.replace(facts, class_name="WavLMModel")).decode()
    name = "Speech2TextForConditionalGeneration"
    speech = compose(dataclasses.replace(facts, class_name=name, features=Features(num_mel_bins=80))).decode()
    parts = [(wavlm, "transfer from unilm"), (wavlm, "github.com/microsoft/unilm"), (speech, "80 log-mel features")]
    for card, part in [*parts, (speech, "Silence"), (speech, "model.generate(**inputs)")]:
        assert part in card and part not in compose(facts).decode()
    assert "do_normalize" not in speech


def test_what_a_person_states_wins(model):
    stated = {"license": "cc-by-4.0", "language": ("de", "no"), "datasets": ("a/b",), "base_model": "c/d"}
    card = compose(facts_of(model, catalogue=SELF, **stated))
    data = metadata(card)
    assert {key: data[key] for key in stated} == {**stated, "language": ["de", "no"], "datasets": ["a/b"]}
    assert b"- 'no'" in card  # YAML reads a bare no as false


def test_the_catalogue_is_asked_by_name_or_hash_and_never_by_file_name(model):
    conversion = json.loads((model / "conversion.json").read_text())
    conversion["source"]["name"] = "wav2vec_vox_10m_pl.pt"
    write(model / "conversion.json", conversion)
    assert facts_of(model).entry is None
    assert facts_of(model, catalogue=SELF).entry == catalogue()[SELF]
    with pytest.raises(ConvertError, match="no released checkpoint is called 'nonsense'"):
        facts_of(model, catalogue="nonsense")


def test_every_released_checkpoint_has_a_card_and_its_paper(model):
    for name, entry in catalogue().items():
        data = metadata(compose(facts_of(model, catalogue=name)))
        assert entry.citation in papers()
        assert data.get("license") == (entry.license and entry.license.lower())
        assert data.get("base_model") == entry.base_model
        assert data.get("datasets") == (list(entry.datasets) or None)


def test_measured_rates_stand_in_percent_with_all_that_made_them(model):
    evaluate(model)
    card = compose(facts_of(model, catalogue=SELF))
    (entry,) = metadata(card)["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "tiny"
    assert result["task"] == {"type": "automatic-speech-recognition", "name": "Automatic Speech Recognition"}
    assert result["dataset"] == {
        "type": "openslr/librispeech_asr",
        "name": "LibriSpeech",
        "config": "clean",
        "split": "test",
        "revision": "a1b2",
    }
    assert result["metrics"] == [
        {"type": "wer", "value": 3.45, "name": "Test WER (decoder: greedy, normalizer: none)"},
        {"type": "cer", "value": 1.23, "name": "Test CER (decoder: greedy, normalizer: none)"},
    ]
    assert metadata(card)["metrics"] == ["wer", "cer"]
    assert "| LibriSpeech, clean, test at `a1b2` | 3.45 | 1.23 | 2620 | greedy | none |" in card.decode()
    assert "fairseq-to-hf evaluate my-model --dataset …" in card.decode()


def test_what_was_left_out_filled_in_or_changed_is_named(model):
    conversion = json.loads((model / "conversion.json").read_text())
    conversion["fills"] = [{"key": "projection.weight", "rule": "identity", "reason": "fairseq has none here"}]
    conversion["edits"] = [{"key": "lm_head.bias", "row": 0, "rule": "add", "value": 1.5, "reason": "blank_weight"}]
    write(model / "conversion.json", conversion | {"dtype": "float16"})
    card = compose(facts_of(model)).decode()
    assert "- Left out: `w2v_encoder.w2v_model.quantizer.vars`: pretraining only\n" in card
    assert "- Filled in: `projection.weight`: fairseq has none here\n" in card
    assert "- Changed: `lm_head.bias`: blank_weight\n" in card
    assert "the checkpoint's rounded to float16, except for what is listed as changed above." in card


def test_where_the_model_and_its_settings_come_from(model):
    conversion = json.loads((model / "conversion.json").read_text())
    conversion["source"] |= {"where": "state_dict", "prefix": "ssl.model.", "address": "hf://me/models@a1b2/x.ckpt"}
    conversion["base"] = {"name": "hubert base.pt", "sha256": "ab" * 32, "whole": True}
    conversion["request"] = {"head": "encoder", "ema": True, "normalize": False, "language": "a b"}
    write(model / "conversion.json", conversion)
    card = compose(facts_of(model)).decode()
    assert (
        ", fetched from `hf://me/models@a1b2/x.ckpt`\n- The model is in `state_dict`, under the prefix `ssl.model.`\n"
        in card
    )
    shapes = "The geometry was checked against the tensors' shapes, which do not show the number of attention heads, the strides and the normalisation of waveforms"
    assert f"- Settings: from `hubert base.pt`, sha256 `{'ab' * 32}`; the checkpoint has none. {shapes}\n" in card
    assert (
        "`fairseq-to-hf convert hf://me/models@a1b2/x.ckpt tiny --base 'hubert base.pt' --ema --no-normalize --head encoder --lang 'a b'`"
        in card
    )
    conversion["base"]["whole"] = False
    verification = json.loads((model / "verification.json").read_text())
    verification["skipped"] = {"conversion.json: base.name": "hubert base.pt, which is called base.pt now"}
    write(model / "conversion.json", conversion)
    write(model / "verification.json", verification)
    card = compose(facts_of(model)).decode()
    assert f"- Settings of the pretrained model: from sha256 `{'ab' * 32}`; the checkpoint has none. {shapes}\n" in card
    assert "hubert base.pt" not in card  # nobody compared the name


def test_a_name_of_the_catalogue_counts_once_it_was_verified(model):
    conversion = json.loads((model / "conversion.json").read_text())
    address = catalogue()[SELF].address
    conversion["source"] |= {"catalogue": SELF, "address": address}
    write(model / "conversion.json", conversion)
    assert facts_of(model).entry == catalogue()[SELF]
    card = compose(facts_of(model)).decode()
    assert f"]({address})" in card and "fetched from" not in card
    assert f"`fairseq-to-hf convert {SELF} tiny --head ctc`" in card
    assert facts_of(model, verified=False).entry is None
    conversion["source"]["catalogue"] = "a-name-of-tomorrow"
    write(model / "conversion.json", conversion)
    assert facts_of(model).entry is None


def test_a_sample_becomes_the_widget(model):
    (model / "sample.wav").write_bytes(b"RIFF")
    assert metadata(compose(facts_of(model)))["widget"] == [{"src": "sample.wav", "example_title": "Sample"}]


def test_the_same_facts_give_the_same_bytes(model):
    facts = facts_of(model, catalogue=SELF)
    assert compose(facts) == compose(facts) == compose(facts, compose(facts))
    assert compose(facts_of(model, verified=False)) != compose(facts_of(model))


# ---------------------------------------------------------------- other people's text

PEOPLE = """\
---
# chosen with care
license: mit   # as fairseq's
tags:
  - mine        # keep
  - audio

"quoted key":   [a,   b]
language: en
widget:
- src: https://example.org/a.wav
  example_title: "Ours: best"
extra: |
  # not a comment
  text

# last words
---

# My model ☺

Text of mine.
"""


def test_people_keep_every_byte_of_theirs(model):
    facts = facts_of(model, license="mit", language=("en",), datasets=("a/b",))
    card = compose(facts, PEOPLE.encode())
    before, after = PEOPLE.split("\n"), card.decode().split("\n")
    position = 0
    for line in before:  # every line is there, in order, unchanged
        position = after.index(line, position) + 1
    assert card.decode().split(BEGIN)[0].endswith("Text of mine.\n\n")
    assert f"{BEGIN}\n## tiny\n" in card.decode()
    data = metadata(card)
    assert data["tags"] == [
        "mine",
        "audio",
        "automatic-speech-recognition",
        "speech",
        "wav2vec2",
        "fairseq",
        "hf-asr-leaderboard",
    ]
    assert data["widget"][0]["src"] == "https://example.org/a.wav" and data["extra"] == "# not a comment\ntext\n"
    assert compose(facts, card) == card


def test_line_endings_marks_and_the_byte_order_mark_stay(model):
    facts = facts_of(model, license="mit")
    windows = PEOPLE.replace("\n", "\r\n").encode()
    card = compose(facts, windows)
    assert b"\n" not in card.replace(b"\r\n", b"")
    assert card.startswith(windows[:60]) and compose(facts, card) == card
    marked = b"\xef\xbb\xbf" + PEOPLE.encode()
    assert compose(facts, marked).startswith(b"\xef\xbb\xbf---\n")


def test_text_around_the_section_stays_when_the_section_changes(model):
    first = compose(facts_of(model, catalogue=SELF))
    edited = first.replace(BEGIN.encode(), b"# Mine\n\nAbove.\n" + BEGIN.encode()) + b"\nBelow, without a line end"
    second = compose(facts_of(model, catalogue=SELF, pin="v2"), edited)
    assert b"# Mine\n\nAbove.\n<!--" in second and second.endswith(END.encode() + b"\n\nBelow, without a line end")
    assert b'revision = "v2"' in second and b'revision = "v1"' not in second
    third = compose(facts_of(model, catalogue=SELF, verified=False), second)  # the warning goes to the top
    body = third.decode().split("---\n", 2)[2]
    assert body.startswith(f"{BEGIN}\n> **UNVERIFIED**") and "# Mine\n\nAbove.\n" in body
    assert compose(facts_of(model, catalogue=SELF, verified=False), third) == third


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("tags: [mine, 'b: c']\n", "tags: [mine, 'b: c', audio, automatic-speech-recognition, speech, "),
        ("tags: mine\n", "tags:\n- mine\n- audio\n"),
        ("tags:\n", "tags:\n- audio\n"),
        ("tags: []\n", "tags:\n- audio\n"),
        ("tags:\n- mine\n# a comment\nother: 1\n", "tags:\n- mine\n- audio\n"),
        ("other: {a: 1}\ntags:\n    - mine\n", "tags:\n    - mine\n    - audio\n    - automatic"),
        ("license: mit", "license: mit\nlibrary_name: transformers\n"),
        ("license: [mit]\n", "license: [mit]\n"),
        ("", "license: mit\n"),
        ("library_name: fairseq\n", "library_name: fairseq\n"),
    ],
)
def test_yaml_as_people_write_it(model, block, expected):
    end = "" if block.endswith("\n") or not block else "\n"
    card = compose(facts_of(model, license="mit"), f"---\n{block}{end}---\ntext\n".encode())
    assert expected in card.decode()
    old = yaml.safe_load(block) or {}
    assert all(metadata(card)[key] == value for key, value in old.items() if key != "tags")


def test_two_hundred_cards_lose_nothing(model):
    evaluate(model)
    facts = facts_of(model, license="mit", datasets=("a/b",), language=("en",))
    pieces = [
        "license: mit\n",
        "license: 'mit' # x\n",
        "tags: [a, b]\n",
        "tags:\n- a\n- b # x\n",
        "tags:\n  # why\n  - a\n",
        "datasets: c/d\n",
        "language:\n- fr\n",
        "language: fr\n",
        "# alone\n",
        "\n",
        "free: {a: [1, 2]}\n",
        "long: >\n  folded\n  text\n",
        'text: "a\\nb"\n',
        "model-index:\n- name: mine\n  results:\n  - task: {type: x}\n    dataset: {type: y, name: z}\n"
        "    metrics:\n    - {type: wer, value: 3} # by hand\n",
        "model-index:\n- name: mine\n  results: []\n",
    ]
    chance = random.Random(0)
    for _ in range(200):
        chosen, keys = [], set()
        for piece in chance.sample(pieces, chance.randint(0, 8)):
            key = piece.split(":")[0] if piece[0] not in "#\n" else ""
            if key not in keys or not key:
                chosen.append(piece)
                keys.add(key)
        newline = chance.choice(["\n", "\r\n"])
        body = chance.choice(["", "# T\n", "text", "\n\na\n"])
        text = ("---\n" + "".join(chosen) + "---\n" + body).replace("\n", newline)
        card = compose(facts, text.encode())
        kept, old = metadata(card), yaml.safe_load("".join(chosen)) or {}
        for key, value in old.items():
            if key == "model-index":
                assert kept[key][0]["name"] == "mine"
                assert kept[key][0]["results"][: len(value[0]["results"])] == value[0]["results"]
                assert len(kept[key][0]["results"]) == len(value[0]["results"]) + 1
            elif key in ("tags", "datasets", "language"):
                items = value if isinstance(value, list) else [value]
                assert kept[key][: len(items)] == items
            else:
                assert kept[key] == value
        for comment in re.findall(r"#.*", "".join(chosen)):
            assert comment in card.decode()
        assert body.replace("\n", newline) in card.decode() and compose(facts, card) == card


def test_results_are_added_and_ours_brought_up_to_date(model):
    theirs = (
        "---\nmodel-index:\n- name: mine\n  results:\n  - task:\n      type: automatic-speech-recognition\n"
        "    dataset:   # theirs\n      type: common_voice\n      name: Common Voice\n    metrics:\n    - type: wer\n"
        "      value: 9.9\nlicense: mit\n---\ntext\n"
    )
    evaluate(model, wer=0.05)
    first = compose(facts_of(model), theirs.encode())
    evaluate(model, wer=0.04)
    second = compose(facts_of(model), first)
    results = metadata(second)["model-index"][0]["results"]
    assert [row["metrics"][0]["value"] for row in results] == [9.9, 4.0]
    assert b"    dataset:   # theirs\n" in second
    evaluate(model, wer=0.08, config="other")
    third = compose(facts_of(model), second)
    values = [row["metrics"][0]["value"] for row in metadata(third)["model-index"][0]["results"]]
    assert values == [9.9, 4.0, 8.0]


@pytest.mark.parametrize("key", ["license", "base_model"])
def test_a_conflict_is_not_decided_by_us(model, key):
    card = f"---\n{key}: someone/else\n---\n".encode()
    with pytest.raises(ConvertError, match="disagrees") as caught:
        compose(facts_of(model, catalogue=SELF), card)
    assert caught.value.status == 1
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [("card-conflict", key)]
    told = compose(facts_of(model, catalogue=SELF, **{key: "mit"}), card)
    assert metadata(told)[key] == "mit"


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [mit\n---\n",
        b"---\n{license: mit}\n---\n",
        b"---\n- license\n---\n",
        b"---\nmodel-index: mine\n---\n",
        b"\xff\xfe",
        f"text\n{BEGIN}\n".encode(),
        f"{END}\n{BEGIN}\n".encode(),
        f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n".encode(),
        b"---\ntags: &a [x]\nother: *a\n---\n",
    ],
)
def test_what_cannot_be_edited_is_left_alone(model, card):
    evaluate(model)
    with pytest.raises(ConvertError, match=r"README\.md") as caught:
        compose(facts_of(model), card)
    assert caught.value.status == 1 and caught.value.hint


# ---------------------------------------------------------------- two places


def test_the_card_of_the_hub_and_the_one_of_the_directory(hub, publisher, model):
    publisher.run(model, "alice/tiny")
    repository = hub.store.repositories["alice/tiny"]
    published = (model / "README.md").read_bytes()
    repository.edit("README.md", published + b"\nOn the Hub.\n")
    # the directory's is what the Hub had before: it is old, and no edit
    publisher.run(model, "alice/tiny")
    assert (model / "README.md").read_bytes() == published + b"\nOn the Hub.\n"
    # both were edited
    repository.edit("README.md", published + b"\nOn the Hub, again.\n")
    (model / "README.md").write_bytes(published + b"\nHere.\n")
    answer = publisher.run(model, "alice/tiny", status=1)
    assert answer["problems"][0]["code"] == "card-conflict" and "--card local" in answer["hint"]
    publisher.run(model, "alice/tiny", "--card", "local")
    assert repository.files("main")["README.md"].content == published + b"\nHere.\n"


# ---------------------------------------------------------------- it runs


def test_the_snippets_run_as_they_stand(hub, publisher, model, tmp_path):
    """The data sets are directories of the same names, so that not a letter of the card is changed."""
    datasets, numpy = pytest.importorskip("datasets"), pytest.importorskip("numpy")
    import soundfile

    def data(name: str, configs: dict[str, str]) -> None:
        texts, sounds = ["A SENTENCE", "AND ANOTHER ONE"], []
        for number in range(2):
            file = io.BytesIO()
            wave = numpy.random.default_rng(number).standard_normal(16000 + 4000 * number) / 10
            soundfile.write(file, wave.astype("float32"), 16000, format="FLAC")
            sounds.append({"bytes": file.getvalue(), "path": f"{number}.flac"})
        folder = tmp_path / "work" / name
        folder.mkdir(parents=True)
        datasets.Dataset.from_dict({"audio": sounds, "text": texts}).to_parquet(folder / "rows.parquet")
        rows = [
            {"config_name": config, "data_files": [{"split": part, "path": "rows.parquet"}]}
            for config, part in configs.items()
        ]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': rows})}---\n")

    data("openslr/librispeech_asr", {"clean": "test", "other": "test"})
    data("hf-internal-testing/librispeech_asr_dummy", {"clean": "validation"})
    work = tmp_path / "work"
    soundfile.write(work / "speech.wav", numpy.zeros(16000, "float32"), 16000)
    publisher.run(model, "alice/tiny", "--catalogue", SELF)
    encoder = tmp_path / "encoder"
    make_encoder(model, encoder)
    publisher.run(encoder, "alice/encoder", "--catalogue", "wav2vec2-base")
    cards = [str(directory / "README.md") for directory in (model, encoder)]
    process = subprocess.run(
        [sys.executable, "-c", RUN, *cards],
        cwd=work,
        env=publisher.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line for line in lines if line[:1] == "#"] == [f"# {cards[0]}"] * 2 + [f"# {cards[1]}"]
    assert re.fullmatch(r"\S.*", lines[1])
    rates = [line for line in lines if re.fullmatch(r"(clean|other) WER \d+\.\d\d % CER \d+\.\d\d %", line)]
    assert [line.split()[0] for line in rates] == ["clean", "other"]
    assert lines[-1] == "{'last_hidden_state': (1, 99, 48), 'extract_features': (1, 99, 32)}"


def make_encoder(source, directory) -> None:
    from transformers import Wav2Vec2Model

    Wav2Vec2Model.from_pretrained(source).save_pretrained(directory)
    for name in ("preprocessor_config.json", "conversion.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    prove(directory)


def test_an_encoder_has_no_text(model, tmp_path):
    make_encoder(model, tmp_path / "encoder")
    card = compose(facts_of(tmp_path / "encoder")).decode()
    data = metadata(card.encode())
    assert data["pipeline_tag"] == "feature-extraction" and "hf-asr-leaderboard" not in data["tags"]
    assert "no vocabulary" in card and "batch_decode" not in card and "greedy" not in card


@pytest.mark.parametrize("name", ["files", "frontmatter", "facts", "run"])
def test_the_examples_in_the_docstrings(name):
    module = importlib.import_module(f"convert.publishing.{name}")
    assert doctest.testmod(module).failed == 0
