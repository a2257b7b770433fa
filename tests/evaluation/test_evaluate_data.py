"""`evaluate` reads manifests, folders and datasets as they are, and refuses what does not fit together."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_fixtures import RATE, SENTENCES, letters, noise, run, write_audio, write_dataset, write_manifest

from convert.errors import ConvertError
from convert.evaluation.data import Source
from convert.evaluation.hub import hub_source
from convert.evaluation.local import folder_source, manifest_source
from convert.evaluation.options import Options

pytest.importorskip("soundfile")


def refusal(function: Any, *arguments: Any) -> ConvertError:
    """The error of a source that is refused when it is opened or read."""
    with pytest.raises(ConvertError) as caught:
        list(function(*arguments).utterances())
    assert caught.value.status == 2
    return caught.value


def asked(dataset: Any, config: str | None = "clean", **more: Any) -> Options:
    return Options(model_dir=Path("model"), dataset=str(dataset), config=config, **more)


def read(source: Source) -> list[tuple[str, str, int]]:
    return [(utterance.name, utterance.text, len(utterance.samples)) for utterance in source.utterances()]


def test_a_manifest_gives_its_recordings_in_order(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    source = manifest_source(manifest, RATE)
    assert (source.dataset.type, source.dataset.name, source.count, source.local) == (
        "fairseq-manifest",
        "set",
        5,
        True,
    )
    rows = read(source)
    assert [row[1] for row in rows] == list(SENTENCES)
    assert [row[0] for row in rows] == [f"clip-{index}.wav" for index in range(5)]
    assert [row[2] for row in rows] == [6000, 8740, 11480, 7370, 10110]


@pytest.mark.parametrize("root", ["audio", "/nowhere/else"])
def test_recordings_that_moved_with_their_manifest_are_found(tmp_path: Path, root: str) -> None:
    manifest = write_manifest(tmp_path, root=root)
    if root != "audio":
        for path in (tmp_path / "audio").iterdir():
            path.rename(tmp_path / path.name)
    assert len(read(manifest_source(manifest, RATE))) == 5


@pytest.mark.parametrize("kept", [".ltr", ".wrd"])
def test_either_kind_of_transcripts_is_enough(tmp_path: Path, kept: str) -> None:
    manifest = write_manifest(tmp_path)
    manifest.with_suffix({".ltr": ".wrd", ".wrd": ".ltr"}[kept]).unlink()
    assert [row[1] for row in read(manifest_source(manifest, RATE))] == list(SENTENCES)


def test_transcripts_that_contradict_each_other_are_all_listed(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    changed = [letters(sentence).replace("F O X", "B O X").replace("K I N G", "K I T") for sentence in SENTENCES]
    manifest.with_suffix(".ltr").write_text("\n".join(changed) + "\n")
    error = refusal(manifest_source, manifest, RATE)
    assert [(problem.key, problem.detail) for problem in error.problems] == [
        ("set.wrd:1", "'THE FOX', in set.ltr 'THE BOX'"),
        ("set.wrd:4", "'A KING', in set.ltr 'A KIT'"),
    ]


def test_a_manifest_without_transcripts_or_with_too_few_is_refused(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    manifest.with_suffix(".wrd").write_text("THE FOX\n")
    assert [str(problem) for problem in refusal(manifest_source, manifest, RATE).problems] == [
        "set.wrd: 1 lines for 5 recordings"
    ]
    manifest.with_suffix(".wrd").unlink()
    manifest.with_suffix(".ltr").unlink()
    error = refusal(manifest_source, manifest, RATE)
    assert error.code == "no-transcripts" and "libri_labels.py" in error.hint


def test_all_missing_recordings_are_listed(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    for index in (1, 3):
        (tmp_path / "audio" / f"clip-{index}.wav").unlink()
    error = refusal(manifest_source, manifest, RATE)
    assert error.message == "set.tsv: 2 of 5 recordings are missing"
    assert [problem.key for problem in error.problems] == ["clip-1.wav", "clip-3.wav"]


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    manifest.write_text("audio\nclip-0.wav 6000\nclip-1.wav\tmany\n")
    assert [problem.key for problem in refusal(manifest_source, manifest, RATE).problems] == ["set.tsv:2", "set.tsv:3"]
    manifest.write_text("audio\n")
    assert refusal(manifest_source, manifest, RATE).message == "set.tsv lists no recordings"
    manifest.write_bytes(b"\xff\xfe\n")
    error = refusal(manifest_source, manifest, RATE)
    assert (error.code, error.message) == ("text", "set.tsv: not UTF-8 text: byte 0 is 0xff") and "iconv" in error.hint


def test_a_recording_of_another_length_is_refused(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    write_audio(tmp_path / "audio" / "clip-2.wav", noise(11_481, 0))
    error = refusal(manifest_source, manifest, RATE)
    assert error.message == "clip-2.wav: 11481 samples, the manifest says 11480; it may be another recording"


def test_other_rates_and_channels_are_refused_not_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A\n")
    write_audio(tmp_path / "a.wav", noise(8000, 0), 8000)
    error = refusal(folder_source, tmp_path, RATE)
    assert error.message == "a.wav: its sampling rate is 8000 Hz, the model's is 16000 Hz; nothing was resampled"
    write_audio(tmp_path / "a.wav", np.stack([noise(8000, 0), noise(8000, 1)], 1))
    assert refusal(folder_source, tmp_path, RATE).message == "a.wav: 2 channels, expected 1; nothing was mixed"
    (tmp_path / "a.wav").write_text("not audio")
    error = refusal(folder_source, tmp_path, RATE)
    assert (error.code, error.message) == ("bad-audio", "a.wav: not a WAV or FLAC file")
    assert error.hint == "write it anew, for example: ffmpeg -i IN -ac 1 -ar 16000 OUT.wav"
    (tmp_path / "a.wav").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    assert refusal(folder_source, tmp_path, RATE).message == "a.wav: damaged: Error in WAV file. No 'data' chunk marker"


def test_a_folder_in_either_layout(tmp_path: Path) -> None:
    write_audio(tmp_path / "b.flac", noise(6000, 0))
    (tmp_path / "b.txt").write_text("THE FOX\n")
    write_audio(tmp_path / "61" / "70968" / "61-70968-0000.flac", noise(7000, 1))
    write_audio(tmp_path / "61" / "70968" / "61-70968-0001.flac", noise(8000, 2))
    lines = "61-70968-0000 HE BEGAN\n61-70968-0001 GIVE NOT\n"
    (tmp_path / "61" / "70968" / "61-70968.trans.txt").write_text(lines)
    assert read(folder_source(tmp_path, RATE)) == [
        ("61/70968/61-70968-0000.flac", "HE BEGAN", 7000),
        ("61/70968/61-70968-0001.flac", "GIVE NOT", 8000),
        ("b.flac", "THE FOX", 6000),
    ]


def test_a_folder_lacking_something_is_refused(tmp_path: Path) -> None:
    for place, code in ((tmp_path / "nowhere", "no-folder"), (tmp_path, "no-audio")):
        error = refusal(folder_source, place, RATE)
        assert (error.code, error.hint[:50]) == (code, "name a folder of .wav or .flac recordings, at any ")
    for name in ("a.wav", "b.wav", "c.wav"):
        write_audio(tmp_path / name, noise(6000, 0))
    (tmp_path / "b.txt").write_text("B")
    error = refusal(folder_source, tmp_path, RATE)
    assert [problem.key for problem in error.problems] == ["a.wav", "c.wav"]


def test_processes_share_a_source_without_overlap(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    shares = [[u.index for u in manifest_source(manifest, RATE).utterances(rank, 2)] for rank in (0, 1)]
    assert shares == [[0, 2, 4], [1, 3]]


def test_a_dataset_streams_its_own_bytes(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "speech")
    source = hub_source(asked(folder), RATE)
    assert read(source) == [(f"clip-{i}", text, 6000 + 500 * i) for i, text in enumerate(SENTENCES)]
    assert (source.dataset.type, source.dataset.name, source.local) == ("local", "speech", True)
    assert (source.dataset.config, source.dataset.split) == ("clean", "test")


def test_a_dataset_of_another_rate_is_refused_not_resampled(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "speech", rate=8000)
    assert refusal(hub_source, asked(folder), RATE).message.startswith("clip-0: its sampling rate is 8000 Hz")


def test_columns_are_not_guessed(tmp_path: Path) -> None:
    both = write_dataset(tmp_path / "both", columns=("text", "sentence"))
    error = refusal(hub_source, asked(both), RATE)
    assert (
        error.message
        == "both: expected one column of transcripts, found text, sentence among id, audio, text, sentence"
    )
    assert len(read(hub_source(asked(both, text_column="sentence"), RATE))) == 5
    other = write_dataset(tmp_path / "other", columns=("words",))
    assert refusal(hub_source, asked(other), RATE).code == "columns"
    assert refusal(hub_source, asked(other, text_column="wrods"), RATE).code == "columns"


def test_an_unknown_split_or_config_is_refused_without_a_path(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "speech")
    for config, split in (("clean", "dev"), ("muddy", "test")):
        error = refusal(hub_source, asked(folder, config, split=split), RATE)
        assert (error.code, error.problems[0].key) == ("dataset", "speech")
        assert str(tmp_path) not in error.message


def test_a_revision_is_resolved_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from convert.evaluation.hub import _commit

    commit = type("Info", (), {"sha": "c0ffee"})()
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: commit)
    assert _commit("speech", "main") == "c0ffee"

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "dataset_info", offline)
    assert _commit("speech", "v1") == "v1"


OPTIONS = {
    "none": (
        (),
        "expected one of --manifest, --folder and --dataset, found none\n\n"
        "hint: name the recordings: --manifest FILE.tsv, --folder DIR or --dataset NAME",
    ),
    "two": (
        ("--manifest", "m.tsv", "--dataset", "d"),
        "expected one of --manifest, --folder and --dataset, found --manifest and --dataset\n\n"
        "hint: name the recordings: --manifest FILE.tsv, --folder DIR or --dataset NAME",
    ),
    "split": (
        ("--folder", "f", "--split", "dev"),
        "--split is for --dataset\n\nhint: leave --split out, or name a dataset",
    ),
    "reference": (
        ("--folder", "f", "--reference", "fairseq"),
        "--reference fairseq needs the checkpoint\n\nhint: name it: --checkpoint SOURCE",
    ),
    "checkpoint": (
        ("--folder", "f", "--checkpoint", "c"),
        "--checkpoint is for --reference\n\nhint: leave --checkpoint out, or add --reference fairseq",
    ),
    "base": (
        ("--folder", "f", "--base", "c"),
        "--base is for --reference\n\nhint: leave --base out, or add --reference fairseq",
    ),
    "file": (
        ("--manifest", "nowhere.tsv"),
        "nowhere.tsv: no such file\n\nhint: name the FILE.tsv that fairseq's wav2vec_manifest.py wrote",
    ),
    "batch": (("--folder", "f", "--batch-size", "0"), "batch size 0, expected at least 1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_go_together(case: str) -> None:
    options, message = OPTIONS[case]
    status, out, err = run("evaluate", "model", *options)
    assert (status, out, err.strip()) == (2, "", f"error: {message}")


def test_a_folder_of_recordings_with_a_table_is_a_dataset_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "speech"
    for index in range(2):
        write_audio(folder / "test" / f"{index}.wav", noise(6000 + index, index))
    (folder / "test" / "metadata.csv").write_text("file_name,sentence\n0.wav,THE FOX\n1.wav,A DOG\n")
    if importlib.util.find_spec("torchcodec") or int(datasets.__version__.split(".")[0]) < 4:
        rows = read(hub_source(asked(folder, None), RATE))
        assert rows == [("0.wav", "THE FOX", 6000), ("1.wav", "A DOG", 6001)]
    else:
        error = refusal(hub_source, asked(folder, None), RATE)
        assert error.message == "datasets needs torchcodec for a dataset of this layout, and it is not installed"
