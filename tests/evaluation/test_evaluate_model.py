"""`evaluate` on tiny random models: transcripts do not depend on the batch, on interruptions, or on how many processes share."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluate_fixtures import LONG, RATE, SENTENCES, noise, refused, run, write_audio, write_manifest, write_model

from convert.errors import ConvertError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("jiwer")

from convert.evaluation import evaluate  # noqa: E402
from convert.evaluation.data import Utterance  # noqa: E402
from convert.evaluation.recognize import Recognizer, batches  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fairseq-to-hf"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the utterances of every forward batch."""
    seen: list[list[str]] = []
    real = Recognizer.transcribe

    def spied(self: Recognizer, utterances: Any) -> list[str]:
        seen.append([utterance.name for utterance in utterances])
        return real(self, utterances)

    monkeypatch.setattr(Recognizer, "transcribe", spied)
    return seen


def utterances(*lengths: int) -> list[Utterance]:
    return [Utterance(index, f"u{index}", noise(length, index), "A") for index, length in enumerate(lengths)]


def test_batches_are_of_similar_length_and_lose_nothing() -> None:
    lengths = [500 + 37 * ((11 * index) % 40) for index in range(40)] + [500, 500, 500]
    for size in (1, 4, 8):
        for pad in (True, False):
            made = list(batches(iter(utterances(*lengths)), size, pad))
            assert sorted(u.index for batch in made for u in batch) == list(range(43))
            assert max(map(len, made)) <= size
            if not pad:
                assert all(len({len(u.samples) for u in batch}) == 1 for batch in made)
    grouped = next(batches(iter(utterances(*lengths)), 4, True))
    assert [len(u.samples) for u in grouped] == [500, 500, 500, 500]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_transcripts_do_not_depend_on_the_batch(tmp_path: Path, norm: str) -> None:
    recognizer = Recognizer(write_model(tmp_path / "model", norm=norm), "cpu")
    assert recognizer.may_pad == (norm == "layer")
    recordings = utterances(9000, 6001, 12_345, 6001, 8000, 9000, 12_000, 400)
    texts = {}
    for size in (1, 3, 8):
        done = [
            (u.index, t)
            for b in batches(iter(recordings), size, recognizer.may_pad)
            for u, t in zip(b, recognizer.transcribe(b), strict=True)
        ]
        texts[size] = sorted(done)
    assert texts[1] == texts[3] == texts[8]
    assert len({text for _, text in texts[1]}) > 5  # not all the same, or empty


def test_padding_is_harmless_exactly_where_it_is_used(tmp_path: Path) -> None:
    """The control of the test above: a group norm sees the padding, which is why such models are not padded."""
    short, long = noise(6000, 1), noise(16_000, 2)
    distance = {}
    for norm in ("layer", "group"):
        recognizer = Recognizer(write_model(tmp_path / norm, norm=norm), "cpu")
        distance[norm] = float((recognizer.logits([short, long])[0] - recognizer.logits([short])[0]).abs().max())
    assert distance["layer"] < 1e-4 < 1e-2 < distance["group"]


def test_a_near_tie_is_decided_without_padding(tmp_path: Path) -> None:
    recognizer = Recognizer(write_model(tmp_path / "model"), "cpu")
    recordings = utterances(9000, 6001, 8000)
    recognizer.transcribe(recordings)
    before = recognizer.alone
    with torch.no_grad():  # C and B differ by rounding only
        recognizer.model.lm_head.weight[7] = recognizer.model.lm_head.weight[6]
        recognizer.model.lm_head.bias[6:8] = recognizer.model.lm_head.bias[6] + 5
    batched = recognizer.transcribe(recordings)
    assert recognizer.alone - before == 3
    assert batched == [recognizer.transcribe([utterance])[0] for utterance in recordings]
    assert recognizer.alone - before == 3  # one at a time, there is nothing to decide


def test_it_is_what_plain_transformers_gives(tmp_path: Path) -> None:
    from transformers import AutoModelForCTC, AutoProcessor

    folder, wave = write_model(tmp_path / "model"), noise(9000, 3)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(wave, sampling_rate=RATE, return_tensors="pt")).logits
    expected = processor.batch_decode(logits.argmax(-1))
    assert Recognizer(folder, "cpu").transcribe([Utterance(0, "u", wave, "")]) == expected


def test_the_whole_command(tmp_path: Path) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data")
    status, out, err = run("evaluate", model, "--manifest", manifest, "--device", "cpu")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        r"set: 5 utterances, 14 words; greedy CTC; normalizer none\n"
        r"transformers  WER +[\d.]+%  CER +[\d.]+%\nwritten: evaluation.json\n",
        out,
    )
    first = (model / "evaluation.json").read_bytes()
    status, out, err = run("evaluate", model, "--manifest", manifest, "--batch-size", "1", "--json")
    assert (status, err) == (0, "")
    printed = json.loads(out)
    assert printed == {
        "schema": 1,
        "command": "evaluate",
        "ok": True,
        "problems": [],
        "result": json.loads(first)["results"][0],
        "differing": [],
        "hint": "",
    }
    assert printed["result"]["metrics"]["wer"] > 0
    assert printed["result"]["command"] == "fairseq-to-hf evaluate model --manifest set.tsv"
    assert run("evaluate", model, "--manifest", manifest, "-q") == (0, "", "")
    assert (model / "evaluation.json").read_bytes() == first
    assert str(tmp_path).encode() not in first and b"/" not in first
    assert not list((tmp_path / "cache" / "fairseq-to-hf").iterdir())


def test_a_bar_is_shown_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data")
    capsys.readouterr()
    evaluate(model, manifest=manifest, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate(model, manifest=manifest)
    assert capsys.readouterr().err == ""
    evaluate(model, manifest=manifest, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_every_source_gives_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from evaluate_fixtures import write_dataset

    model, dataset = write_model(tmp_path / "model"), write_dataset(tmp_path / "speech")
    for index, sentence in enumerate(SENTENCES):
        write_audio(tmp_path / "folder" / f"{index}.flac", noise(6000 + 500 * index, index))
        (tmp_path / "folder" / f"{index}.txt").write_text(sentence + "\n")
    one = evaluate(model, folder=tmp_path / "folder")
    other = evaluate(model, dataset=str(dataset), config="clean", progress=True)
    assert [row.hypothesis for row in one.rows] == [row.hypothesis for row in other.rows]
    assert one.scores == other.scores
    assert other.command == "fairseq-to-hf evaluate model --dataset speech --config clean --split test"
    assert len(json.loads((model / "evaluation.json").read_text())["results"]) == 2


def test_the_revision_of_own_data_follows_its_content(tmp_path: Path) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data")
    first = evaluate(model, manifest=manifest).dataset.revision
    assert first and re.fullmatch("sha256:[0-9a-f]{64}", first)
    manifest.with_suffix(".wrd").unlink()
    manifest.with_suffix(".ltr").write_text(manifest.with_suffix(".ltr").read_text().replace("F O X", "B O X"))
    assert evaluate(model, manifest=manifest).dataset.revision != first
    assert len(json.loads((model / "evaluation.json").read_text())["results"]) == 1


def test_an_interrupted_run_continues(
    tmp_path: Path, cache: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data", LONG)
    evaluate(model, manifest=manifest, batch_size=2)
    whole = (model / "evaluation.json").read_bytes()
    (model / "evaluation.json").unlink()
    calls.clear()
    real = Recognizer.transcribe

    def interrupted(self: Recognizer, batch: Any) -> list[str]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Recognizer, "transcribe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, manifest=manifest, batch_size=2)
    done = {name for batch in calls for name in batch}
    assert len(done) == 6 and not (model / "evaluation.json").exists()
    (kept,) = cache.iterdir()
    with kept.open("ab") as file:  # a power cut in the middle of a line
        file.write(b'{"key": "ab')
    calls.clear()
    evaluate(model, manifest=manifest, batch_size=2)
    assert sorted(name for batch in calls for name in batch) == sorted({f"clip-{i}.wav" for i in range(15)} - done)
    assert (model / "evaluation.json").read_bytes() == whole
    assert not list(cache.iterdir())


def test_stale_transcripts_are_not_used(tmp_path: Path, calls: list[list[str]]) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data")
    kept = tmp_path / "kept.jsonl"
    first = evaluate(model, manifest=manifest, transcripts=kept)
    assert {json.loads(line)["name"] for line in kept.read_text().splitlines()} == {row.name for row in first.rows}
    calls.clear()
    assert evaluate(model, manifest=manifest, transcripts=kept) == first and calls == []
    write_audio(tmp_path / "data" / "audio" / "clip-2.wav", noise(11_480, 99))  # the same name and length
    evaluate(model, manifest=manifest, transcripts=kept)
    assert calls == [["clip-2.wav"]]
    calls.clear()
    write_model(model, seed=1)
    second = evaluate(model, manifest=manifest, transcripts=kept)
    assert sorted(name for batch in calls for name in batch) == [row.name for row in first.rows]
    assert [row.hypothesis for row in second.rows] != [row.hypothesis for row in first.rows]
    calls.clear()
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    evaluate(model, manifest=manifest, transcripts=kept)
    assert len([name for batch in calls for name in batch]) == len(first.rows)


def test_an_error_rate_that_is_only_case_is_explained(tmp_path: Path) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data")
    written = [row.hypothesis for row in evaluate(model, manifest=manifest).rows]
    manifest.with_suffix(".ltr").unlink()
    manifest.with_suffix(".wrd").write_text("\n".join(text.lower() for text in written) + "\n")
    status, out, _ = run("evaluate", model, "--manifest", manifest)
    assert status == 0 and "WER 100.000%" in out
    assert "hint: the model writes upper case, the references lower case: without case the WER is 0.00%" in out
    status, out, _ = run("evaluate", model, "--manifest", manifest, "--normalizer", "lowercase")
    assert status == 0 and "WER   0.000%" in out and "hint" not in out


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    manifest, model = write_manifest(tmp_path / "data"), write_model(tmp_path / "model")
    refused("no-model", tmp_path, "--manifest", manifest)
    assert refused("no-device", model, "--manifest", manifest, "--device", "tpu").startswith("tpu: no such device here")
    refused("no-device", model, "--manifest", manifest, "--device", "cuda:99")
    write_audio(tmp_path / "short" / "a.wav", noise(399, 0))
    (tmp_path / "short" / "a.txt").write_text("A")
    assert refused("too-short", model, "--folder", tmp_path / "short").startswith("a.wav: 399 samples")
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "lm_head.weight"}, model / "model.safetensors", {"format": "pt"}
    )
    status, out, _ = run("evaluate", model, "--manifest", manifest, "--json")
    assert status == 2
    assert [(p["code"], p["key"]) for p in json.loads(out)["problems"]] == [("missing-keys", "lm_head.weight")]
    assert refused("unknown-language", model, "--manifest", manifest, "--lang", "deu") == "model has no language 'deu'"
    (model / "vocab.json").unlink()
    assert "writes no text" in refused("no-vocabulary", model, "--manifest", manifest)
    assert not (model / "evaluation.json").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: evaluation on CUDA was not tested")
def test_cuda_writes_what_the_cpu_writes(tmp_path: Path) -> None:
    model, manifest = write_model(tmp_path / "model"), write_manifest(tmp_path / "data", LONG)
    rows = [
        [row.hypothesis for row in evaluate(model, manifest=manifest, device=name).rows] for name in ("cpu", "cuda")
    ]
    assert rows[0] == rows[1]


def test_an_absent_device_is_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ConvertError, match="cuda: no such device here; there are cpu"):
        evaluate(write_model(tmp_path / "model"), manifest=write_manifest(tmp_path / "data"), device="cuda")
