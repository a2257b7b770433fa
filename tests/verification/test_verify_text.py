"""What verification says of text: fairseq's own way from symbols to words, whatever this project believes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fairseq_models import BASE, LETTERS, Variant
from verify_models import converted, edit, few_inputs, short_inputs

from convert.errors import ConvertError
from convert.verification import record, run, verify
from convert.verification.fairseq_side.tensorfile import read, write

WITH_BLANK = Variant("ctc", BASE, symbols=(*LETTERS, "<ctc_blank>"))


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "quiet"):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return converted(WITH_BLANK, tmp_path_factory.mktemp("ctc_blank"))


def test_a_dictionary_with_ctc_blank(pair: tuple[Path, Path]) -> None:
    done = verify(*pair, write=False)
    assert done.problems == ()
    assert all(one["fairseq_text"] == one["hf_text"] != "" for one in done.report["end_to_end"])
    assert json.loads((pair[1] / "config.json").read_text())["pad_token_id"] == 0


@pytest.mark.parametrize("believed", [False, True])
def test_another_blank_is_found_whatever_is_believed(
    believed: bool, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory whose blank is `<ctc_blank>`, as converters took it to be; also with a verifier that thinks so too."""
    model = Path(shutil.copytree(pair[1], tmp_path / "model"))
    names = json.loads((model / "vocab.json").read_text())
    edit(model / "vocab.json", **{"<s>": names["<pad>"], "<pad>": names["<s>"]})
    edit(model / "tokenizer_config.json", pad_token="<ctc_blank>")
    edit(model / "config.json", pad_token_id=names["<ctc_blank>"])
    if believed:
        original = run.read_subject

        def belief(*arguments: Any, **options: Any) -> Any:
            subject, geometry = original(*arguments, **options)
            blank = subject.symbols.index("<ctc_blank>")
            return replace(subject, blank=blank, special=(*subject.special, blank)), geometry

        monkeypatch.setattr(run, "read_subject", belief)
    codes = {problem.code for problem in verify(pair[0], model, write=False).problems}
    assert {"vocabulary", "end-to-end"} <= codes


def test_a_recording_that_took_ctc_blank_for_the_blank(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = record(pair[0], tmp_path / "made.safetensors", long=False)
    assert verify(*pair, reference=made, write=False).problems == ()
    arrays, about = read(str(made))
    facts = json.loads(about)
    assert facts.pop("blank") == 0
    write(str(tmp_path / "old"), arrays, json.dumps(facts))
    with pytest.raises(ConvertError, match="took <ctc_blank> for the blank") as caught:
        verify(*pair, reference=tmp_path / "old")
    assert (caught.value.code, caught.value.status) == ("bad-recording", 2)


def test_other_words_for_the_same_symbols_are_an_error(tmp_path: Path) -> None:
    """Also where the outputs differ for a known reason, so that two texts may."""
    checkpoint, model = converted(replace(WITH_BLANK, normalize=True, symbols=tuple(LETTERS)), tmp_path)
    edit(model / "tokenizer_config.json", replace_word_delimiter_char="_")
    done = verify(checkpoint, model, write=False)
    assert "of the same symbols" in next(one.detail for one in done.problems if one.code == "end-to-end")
