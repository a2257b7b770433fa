"""`evaluate --kenlm` joins a model's vocabulary and a language model to a processor, and decodes with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluate_fixtures import SENTENCES, refused, write_arpa, write_manifest, write_model

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("jiwer")
pytest.importorskip("pyctcdecode", reason="pyctcdecode is not installed: decoding with a language model was not tested")
pytest.importorskip("kenlm", reason="kenlm is not installed: decoding with a language model was not tested")

from convert.evaluation import evaluate
from convert.evaluation.recognize import Recognizer


@pytest.fixture
def kenlm_model(tmp_path: Path) -> tuple[Path, Path, Path]:
    return (
        write_model(tmp_path / "model"),
        write_manifest(tmp_path / "data"),
        write_arpa(tmp_path / "lm.arpa", SENTENCES),
    )


def test_a_language_model_gets_a_processor_of_its_own(kenlm_model: tuple[Path, Path, Path]) -> None:
    from transformers import AutoProcessor, Wav2Vec2ProcessorWithLM

    model, manifest, arpa = kenlm_model
    greedy = evaluate(model, manifest=manifest)
    result = evaluate(model, manifest=manifest, kenlm=arpa)
    assert re.fullmatch(r"pyctcdecode with KenLM \(lm.arpa sha256:[0-9a-f]{16}, alpha 0.5, beta 1.5\)", result.decoder)
    assert result.command == "fairseq-to-hf evaluate model --manifest set.tsv --kenlm lm.arpa"
    assert [row.hypothesis for row in result.rows] != [row.hypothesis for row in greedy.rows]
    assert len(json.loads((model / "evaluation.json").read_text())["results"]) == 2
    directory = model.with_name("model-lm")
    processor = AutoProcessor.from_pretrained(directory)
    assert isinstance(processor, Wav2Vec2ProcessorWithLM)
    words = {word for sentence in SENTENCES for word in sentence.split()}
    assert set((directory / "language_model" / "unigrams.txt").read_text().split()) == words
    recognizer = Recognizer(model, "cpu")
    import soundfile

    for row in result.rows:
        wave = soundfile.read(manifest.parent / "audio" / row.name, dtype="float32")[0]
        logits = recognizer.logits([np.asarray(wave)])[0].numpy()
        assert processor.decode(logits).text == row.hypothesis
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    evaluate(model, manifest=manifest, kenlm=arpa)  # its own directory is replaced, with the same bytes
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_language_model_that_does_not_fit_is_refused(kenlm_model: tuple[Path, Path, Path]) -> None:
    model, manifest, arpa = kenlm_model
    write_arpa(arpa, [sentence.lower() for sentence in SENTENCES])
    asked = (model, "--manifest", manifest, "--kenlm", arpa)
    assert refused("vocabulary", *asked) == "lm.arpa: none of its 11 words can be spelled with the model's vocabulary"
    arpa.write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\t<unk>\n-1\tFOX\n\n\\end\\\n")
    assert "assumes at least a bigram model" in refused("language-model", *asked)
    arpa.write_text("some text")
    assert refused("language-model", *asked) == "lm.arpa: is no ARPA file: it lists no words"
    write_arpa(arpa, SENTENCES)
    model.with_name("model-lm").mkdir()
    refused("exists", *asked)
    undivided = write_model(model.with_name("undivided"), delimiter=False)
    refused("no-word-boundary", undivided, "--manifest", manifest, "--kenlm", arpa)
