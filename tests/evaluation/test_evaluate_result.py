"""`evaluate` counts as jiwer and fairseq count, keeps finished transcripts, and writes stable results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.errors import ConvertError
from convert.evaluation.data import Dataset, Utterance
from convert.evaluation.result import FILE, Evaluation, Row, read_results, write_result
from convert.evaluation.score import Scores, case_hint, score
from convert.evaluation.transcripts import Transcripts, default_path, key_of

jiwer = pytest.importorskip("jiwer")

REFERENCES = ["THE FOX JUMPS", "A DOG", "", "NOW"]
HYPOTHESES = ["THE BOX JUMPS OVER", "DOG", "", "NOW"]


def test_rates_are_sums_of_errors_over_sums_of_words() -> None:
    scores = score(REFERENCES, HYPOTHESES)
    assert (scores.word_errors, scores.words) == (3, 6)
    assert scores.wer == 3 / 6 == jiwer.wer(REFERENCES, HYPOTHESES)
    assert scores.cer == jiwer.cer(REFERENCES, HYPOTHESES)
    assert score(REFERENCES, REFERENCES) == Scores(0.0, 0.0, 0, 6)
    assert score(["A"], ["B C D"]).wer == 3.0


def test_case_is_kept_unless_asked() -> None:
    lower = [text.lower() for text in REFERENCES]
    strict = score(lower, REFERENCES)
    assert strict.wer == 1.0
    assert score(lower, REFERENCES, "lowercase").wer == 0.0
    assert case_hint(lower, REFERENCES, strict, "none") == (
        "the model writes upper case, the references lower case: without case the WER is 0.00%; "
        "texts are compared as they are unless --normalizer lowercase is given"
    )
    assert case_hint(REFERENCES, ["X"] * 4, score(REFERENCES, ["X"] * 4), "none") == ""  # wrong, and not for its case
    assert case_hint(REFERENCES, HYPOTHESES, score(REFERENCES, HYPOTHESES), "none") == ""


def test_references_without_words_are_refused() -> None:
    with pytest.raises(ConvertError, match="have no words"):
        score(["", " "], ["A", ""])


def entry(name: str = "set", wer: float = 0.5, decoder: str = "greedy CTC", revision: str = "a") -> dict[str, Any]:
    scores = Scores(wer, wer / 4, 1, 2)
    row = Row(0, "clip", "digest", "A B", "A C", None)
    dataset = Dataset("folder", name, revision=revision)
    return Evaluation(
        dataset, scores, None, (row,), "none", decoder, f"fairseq-to-hf evaluate m --folder {name}", ""
    ).entry()


def test_the_file_has_the_agreed_form(tmp_path: Path) -> None:
    write_result(tmp_path, entry())
    assert json.loads((tmp_path / FILE).read_text()) == {
        "schema": 1,
        "results": [
            {
                "dataset": {"type": "folder", "name": "set", "config": None, "split": None, "revision": "a"},
                "metrics": {"wer": 0.5, "cer": 0.125},
                "utterances": 1,
                "words": 2,
                "normalizer": "none",
                "decoder": "greedy CTC",
                "command": "fairseq-to-hf evaluate m --folder set",
            }
        ],
    }
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_second_evaluation_replaces_its_entry_and_order_does_not_matter(tmp_path: Path) -> None:
    for folder, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        (tmp_path / folder).mkdir()
        for name in order:
            write_result(tmp_path / folder, entry(name, wer=0.9, revision="old"))
        for name in order:
            write_result(tmp_path / folder, entry(name, wer=0.25, revision="new"))
        write_result(tmp_path / folder, entry("x", wer=0.125, decoder="beam"))
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    results = read_results(tmp_path / "a")
    assert [(row["dataset"]["name"], row["decoder"], row["metrics"]["wer"]) for row in results] == [
        ("x", "beam", 0.125),
        ("x", "greedy CTC", 0.25),
        ("y", "greedy CTC", 0.25),
    ]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 1}', '{"schema": 2, "results": []}', '{"schema":1,"results":[1]}']
)
def test_a_file_of_another_program_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConvertError) as caught:
        write_result(tmp_path, entry())
    assert caught.value.code == "result"
    assert (tmp_path / FILE).read_text() == content


def kept(path: Path, *utterances: Utterance) -> tuple[list[str], list[str]]:
    """The texts of utterances through a file of transcripts, and the names of those that were transcribed anew."""
    new: list[str] = []

    def transcribe(batch: Sequence[Utterance]) -> list[str]:
        new.extend(one.name for one in batch)
        return [f"TEXT {one.name} Ä" for one in batch]

    transcripts = Transcripts(path)
    texts = transcripts.of(transcribe, framework="transformers", model="m")(utterances)
    transcripts.close()
    return list(texts), new


ONE, TWO, THREE = (Utterance(index, str(index), np.full(9, index, np.float32), "TEXT") for index in range(3))


def test_transcripts_are_read_back_and_belong_to_samples_and_model(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kept.jsonl"
    first = kept(path, ONE, TWO)
    assert first[1] == ["0", "1"]
    assert kept(path, TWO, ONE) == (first[0][::-1], [])
    assert kept(path, ONE, THREE)[1] == ["2"]
    other = Transcripts(path)
    calls: list[int] = []
    for framework, model in (("fairseq", "m"), ("transformers", "n"), ("transformers", "m")):
        other.of(lambda batch: calls.append(len(batch)) or ["X"], framework=framework, model=model)([ONE])  # type: ignore[func-returns-value]
    assert len(calls) == 2  # only the last is known
    other.close(remove=True)
    assert not path.exists()


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_skipped_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path, ONE)
    kept(path, TWO)
    path.write_bytes(path.read_bytes()[:-cut])
    assert kept(path, ONE, TWO, THREE)[1] == (["2"] if cut == 1 else ["1", "2"])  # 1: only the line feed is gone
    assert kept(path, ONE, TWO, THREE)[1] == []


def test_two_processes_may_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    both = [Transcripts(path), Transcripts(path)]
    for index in range(20):
        utterance = Utterance(index, str(index), np.full(9, index, np.float32), "")
        both[index % 2].of(lambda batch: ["X"], framework="transformers", model="m")([utterance])
    assert len({json.loads(line)["key"] for line in path.read_text().splitlines()}) == 20


def test_lines_of_something_else_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text('7\n"a"\n{"key": "a"}\n{"key": "b", "hypothesis": 3}\n\xff\n')
    assert kept(path, ONE)[1] == ["0"]
    assert kept(path, ONE)[1] == []


def test_transcripts_that_cannot_be_written_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError) as caught:
        Transcripts(tmp_path / "file" / "kept.jsonl")
    assert caught.value.hint == "name a file that can be written: --transcripts FILE.jsonl"


def test_keys_and_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert key_of("a", "b") != key_of("ab") != key_of("a", "b", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path(key_of("a")).parent == tmp_path / "fairseq-to-hf"
