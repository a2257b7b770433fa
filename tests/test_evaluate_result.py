"""`evaluate` counts as jiwer and fairseq count, remembers finished utterances, and writes stable results."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from convert.errors import ConvertError
from convert.evaluation.data import Dataset
from convert.evaluation.journal import Journal, default_path, key_of
from convert.evaluation.packages import require
from convert.evaluation.result import FILE, Evaluation, Row, read_results, write_result
from convert.evaluation.score import Scores, case_hint, score

jiwer = pytest.importorskip("jiwer")

SAID = ["THE FOX JUMPS", "A DOG", "", "NOW"]
HEARD = ["THE BOX JUMPS OVER", "DOG", "", "NOW"]


def test_rates_are_sums_of_errors_over_sums_of_words() -> None:
    scores = score(SAID, HEARD)
    assert (scores.word_errors, scores.words) == (3, 6)
    assert scores.wer == 3 / 6 == jiwer.wer(SAID, HEARD)
    assert scores.cer == jiwer.cer(SAID, HEARD)
    assert score(SAID, SAID) == Scores(0.0, 0.0, 0, 6)
    assert score(["A"], ["B C D"]).wer == 3.0


def test_case_is_kept_unless_asked() -> None:
    lower = [text.lower() for text in SAID]
    strict = score(lower, SAID)
    assert strict.wer == 1.0
    assert score(lower, SAID, "lowercase").wer == 0.0
    assert case_hint(lower, SAID, strict, "none") == (
        "the model writes upper case, the references lower case: without case the WER is 0.00%; "
        "texts are compared as they stand unless --normalizer lowercase is given"
    )
    assert case_hint(SAID, ["X"] * 4, score(SAID, ["X"] * 4), "none") == ""  # wrong, and not for its case
    assert case_hint(SAID, HEARD, score(SAID, HEARD), "none") == ""


def test_no_words_are_no_rate() -> None:
    with pytest.raises(ConvertError, match="hold no word"):
        score(["", " "], ["A", ""])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("jiwer"):
            raise ModuleNotFoundError("No module named 'jiwer'", name="jiwer")
        return real(name, *arguments, **named)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ConvertError) as caught:
        score(SAID, HEARD)
    assert caught.value.message == "jiwer is not installed; evaluation needs it"
    assert caught.value.hint == "pip install 'fairseq-to-hf[evaluate]'"


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConvertError, match="nowhere_to_be_found is not installed"):
        require("half_installed")


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
def test_somebody_elses_file_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConvertError) as caught:
        write_result(tmp_path, entry())
    assert caught.value.code == "result"
    assert (tmp_path / FILE).read_text() == content


def record(key: str, hypothesis: str) -> dict[str, str]:
    return {"key": key, "name": "clip", "hypothesis": hypothesis}


def test_a_journal_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path)
    journal.add([record("a", "THE FOX"), record("b", "ÄÖ")])
    journal.close()
    again = Journal(path)
    assert (again.find("a"), again.find("b"), again.find("c")) == ("THE FOX", "ÄÖ", None)
    again.close(remove=True)
    assert not path.exists()


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_skipped_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add([record("a", "ONE")])
    journal.add([record("b", "TWO")])
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Journal(path)
    whole = "TWO" if cut == 1 else None  # only the line feed is gone
    assert (torn.find("a"), torn.find("b")) == ("ONE", whole)
    torn.add([record("c", "THREE")])
    torn.close()
    last = Journal(path)
    assert (last.find("a"), last.find("b"), last.find("c")) == ("ONE", whole, "THREE")
    last.close()


def test_two_processes_may_append_to_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first, second = Journal(path), Journal(path)
    for index in range(20):
        (first if index % 2 else second).add([record(str(index), f"TEXT {index}")])
    first.close()
    second.close()
    both = Journal(path)
    assert [both.find(str(index)) for index in range(20)] == [f"TEXT {index}" for index in range(20)]
    both.close()


def test_lines_of_something_else_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('7\n"a"\n{"key": "a"}\n{"key": "b", "hypothesis": 3}\n\xff\n')
    journal = Journal(path)
    assert [journal.find(key) for key in "ab"] == [None, None]
    journal.close()


def test_a_journal_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError) as caught:
        Journal(tmp_path / "file" / "journal.jsonl")
    assert caught.value.hint == "name a file that can be written: --transcripts FILE.jsonl"


def test_keys_and_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert key_of("a", "b") != key_of("ab") != key_of("a", "b", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path(key_of("a")).parent == tmp_path / "fairseq-to-hf"
