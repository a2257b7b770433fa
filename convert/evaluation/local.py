"""Finds speech and transcripts on this machine: a fairseq manifest, or a folder of recordings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, Problem
from convert.evaluation.data import Dataset, Item, Source, read_audio, refuse

AUDIO = (".flac", ".wav")
WORD_BOUNDARY = "|"  # of fairseq's letter labels, `fairseq.data.data_utils.post_process(..., "letter")`


def read_lines(path: Path) -> list[str]:
    """Read a UTF-8 text file's lines; only line feeds end a line, as in fairseq."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path.name}: is not UTF-8 text: {error}", code="text", key=path.name) from error
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def words_of_letters(line: str) -> str:
    """Join a line of fairseq's letter labels to words.

    Example:
        >>> words_of_letters("A | D O G |")
        'A DOG'
    """
    return line.replace(" ", "").replace(WORD_BOUNDARY, " ").strip()


def manifest_source(path: Path, rate: int) -> Source:
    """Open a fairseq manifest: `FILE.tsv` with `FILE.ltr` or `FILE.wrd` beside it.

    The manifest's first line is the recordings' folder. A relative one is looked for from the working folder, as
    fairseq does, then from the manifest's; when it is not there (the data were moved), the recordings are looked for
    beside the manifest.

    Raises:
        ConvertError: files are missing, or the manifest, the transcripts and the recordings do not agree.
    """
    lines = read_lines(path)
    rows = [line.split("\t") for line in lines[1:]]
    broken = [
        Problem("manifest", f"{path.name}:{number}", f"expected FILE<tab>SAMPLES, found {lines[number - 1]!r}")
        for number, row in enumerate(rows, start=2)
        if len(row) != 2 or not row[1].isdecimal()
    ]
    refuse(f"{path.name} is not a fairseq manifest", broken)
    if not rows:
        raise ConvertError(f"{path.name} lists no recordings", code="manifest", key=path.name)
    texts = _transcripts(path, len(rows))
    root = _root(path, lines[0], rows[0][0])
    missing = [
        Problem("missing-audio", name, "the recording is not there") for name, _ in rows if not (root / name).is_file()
    ]
    hint = "the first line of the manifest is the folder of its recordings: fairseq, this folder and the manifest's were tried"
    refuse(f"{path.name}: {len(missing)} of {len(rows)} recordings are missing", missing, hint)
    items = (
        Item(name, text, partial(_read_counted, name, root / name, rate, int(count)))
        for (name, count), text in zip(rows, texts, strict=True)
    )
    return Source(Dataset("fairseq-manifest", path.stem), items, len(rows), local=True)


def _transcripts(path: Path, count: int) -> list[str]:
    """The transcripts beside a manifest; letters come first, because they are what fairseq trains and scores with."""
    found = {suffix: path.with_suffix(suffix) for suffix in (".ltr", ".wrd") if path.with_suffix(suffix).is_file()}
    if not found:
        wanted = f"{path.stem}.ltr or {path.stem}.wrd"
        raise ConvertError(
            f"{path.name}: no transcripts beside it, expected {wanted}", code="no-transcripts", key=path.name
        )
    texts = {suffix: read_lines(file) for suffix, file in found.items()}
    refuse(
        f"{path.name} and its transcripts differ in length",
        [
            Problem("transcripts", found[suffix].name, f"{len(lines)} lines for {count} recordings")
            for suffix, lines in texts.items()
            if len(lines) != count
        ],
    )
    if ".ltr" not in texts:
        return [line.strip() for line in texts[".wrd"]]
    spelled = [words_of_letters(line) for line in texts[".ltr"]]
    words = [line.strip() for line in texts.get(".wrd", spelled)]
    differing = [
        Problem("transcripts", f"{path.stem}.wrd:{number}", f"{word!r}, in {path.stem}.ltr {letters!r}")
        for number, (word, letters) in enumerate(zip(words, spelled, strict=True), start=1)
        if word.split() != letters.split()
    ]
    refuse(f"{path.stem}.ltr and {path.stem}.wrd do not say the same", differing, "keep the one to measure with")
    return spelled


def _root(path: Path, stated: str, first: str) -> Path:
    """The folder that holds the first recording: the stated one, the stated one from the manifest's folder, or that folder."""
    candidates = (Path(stated), path.parent / stated, path.parent)
    return next((root for root in candidates if (root / first).is_file()), candidates[0])


def _read_counted(name: str, path: Path, rate: int, count: int) -> Any:
    samples = read_audio(name, path, rate)
    if len(samples) != count:
        raise ConvertError(
            f"{name}: {len(samples)} samples, the manifest says {count}; it may be another recording",
            code="samples",
            key=name,
        )
    return samples


def folder_source(folder: Path, rate: int) -> Source:
    """Open a folder of `.wav` and `.flac` recordings, at any depth, with their transcripts.

    The transcript of `A.wav` is `A.txt` beside it, or the line `A the words` of a `*.trans.txt` in the same folder,
    which is LibriSpeech's layout.

    Raises:
        ConvertError: no recordings, or recordings without a transcript (all of them are listed).
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder.name}: there is no such folder", code="no-folder", key=folder.name)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO and path.is_file())
    if not paths:
        raise ConvertError(f"{folder.name}: no .wav or .flac recordings in it", code="no-audio", key=folder.name)
    listed = {parent: _librispeech(parent) for parent in {path.parent for path in paths}}
    names = [path.relative_to(folder).as_posix() for path in paths]
    texts = [
        " ".join(read_lines(path.with_suffix(".txt"))).strip()
        if path.with_suffix(".txt").is_file()
        else listed[path.parent].get(path.stem)
        for path in paths
    ]
    missing = [
        Problem("no-transcript", name, "no .txt beside it and no line in a *.trans.txt")
        for name, text in zip(names, texts, strict=True)
        if text is None
    ]
    refuse(f"{folder.name}: {len(missing)} of {len(paths)} recordings have no transcript", missing)
    items = (
        Item(name, text or "", partial(read_audio, name, path, rate))
        for name, text, path in zip(names, texts, paths, strict=True)
    )
    return Source(Dataset("folder", folder.resolve().name), items, len(paths), local=True)


def _librispeech(folder: Path) -> dict[str, str]:
    lines = [line for path in sorted(folder.glob("*.trans.txt")) for line in read_lines(path) if line.strip()]
    pairs = (line.strip().partition(" ") for line in lines)
    return {name: text.strip() for name, _, text in pairs}
