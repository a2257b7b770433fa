"""Recordings with transcripts on this machine: a fairseq manifest, or a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from convert.audio import SUFFIXES, Waveform, bad_audio, read_audio
from convert.errors import ConvertError, Problem
from convert.evaluation.data import Dataset, Item, Source, refuse
from convert.reading import LISTS, read_file

_RECORDINGS = "name a folder of .wav or .flac recordings, at any depth, with their transcripts"


def manifest_source(path: Path, rate: int) -> Source:
    """Open a fairseq manifest: `FILE.tsv` with `FILE.ltr` or `FILE.wrd` beside it.

    The manifest's first line is the recordings' folder. A relative one is looked for from the working folder, as
    fairseq does, then from the manifest's; where neither exists, the recordings are looked for beside the manifest.

    Raises:
        ConvertError: files are missing, or the manifest, the transcripts and the recordings do not agree.
    """
    lines = _lines(path)
    rows = [line.split("\t") for line in lines[1:]]
    broken = [
        Problem("manifest", f"{path.name}:{number}", f"expected FILE<tab>SAMPLES, found {lines[number - 1]!r}")
        for number, row in enumerate(rows, start=2)
        if len(row) != 2 or not row[1].isdecimal()
    ]
    hint = "below its first line, the folder of the recordings, each line is FILE<tab>SAMPLES, as wav2vec_manifest.py writes"
    refuse(f"{path.name} is not a fairseq manifest", broken, hint)
    if not rows:
        raise ConvertError(f"{path.name} lists no recordings", code="manifest", key=path.name, hint=hint)
    texts = _transcripts(path, len(rows))
    candidates = (Path(lines[0]), path.parent / lines[0], path.parent)
    root = next((root for root in candidates if (root / rows[0][0]).is_file()), candidates[0])
    missing = [Problem("missing-audio", name, "no such file") for name, _ in rows if not (root / name).is_file()]
    hint = "the first line of the manifest is the folder of its recordings: it was looked for from here and from the manifest"
    refuse(f"{path.name}: {len(missing)} of {len(rows)} recordings are missing", missing, hint)
    items = (
        Item(name, text, partial(_read_counted, name, root / name, rate, int(count)))
        for (name, count), text in zip(rows, texts, strict=True)
    )
    return Source(Dataset("fairseq-manifest", path.stem), items, len(rows), local=True)


def folder_source(folder: Path, rate: int) -> Source:
    """Open a folder of `.wav` and `.flac` recordings, at any depth, with their transcripts.

    The transcript of `A.wav` is `A.txt` beside it, or the line `A the words` of a `*.trans.txt` in the same folder
    (LibriSpeech's layout).

    Raises:
        ConvertError: there are no recordings, or some have no transcript (all of them are listed).
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder.name}: no such folder", code="no-folder", key=folder.name, hint=_RECORDINGS)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        message = f"{folder.name}: no .wav or .flac recordings in it"
        raise ConvertError(message, code="no-audio", key=folder.name, hint=_RECORDINGS)
    listed = {parent: _librispeech(parent) for parent in {path.parent for path in paths}}
    names = [path.relative_to(folder).as_posix() for path in paths]
    texts = [
        " ".join(_lines(path.with_suffix(".txt"))).strip()
        if path.with_suffix(".txt").is_file()
        else listed[path.parent].get(path.stem)
        for path in paths
    ]
    missing = [
        Problem("no-transcript", name, "no .txt beside it and no line in a *.trans.txt")
        for name, text in zip(names, texts, strict=True)
        if text is None
    ]
    hint = "write the text of A.wav into A.txt beside it, or take the recording out of the folder"
    refuse(f"{folder.name}: {len(missing)} of {len(paths)} recordings have no transcript", missing, hint)
    items = (
        Item(name, text or "", partial(read_audio, path, rate, name=name))
        for name, text, path in zip(names, texts, paths, strict=True)
    )
    return Source(Dataset("folder", folder.resolve().name), items, len(paths), local=True)


def words_of_letters(line: str) -> str:
    """Join a line of fairseq's letter labels to words, as `fairseq.data.data_utils.post_process(line, "letter")` does.

    Example:
        >>> words_of_letters("A | D O G |")
        'A DOG'
    """
    return line.replace(" ", "").replace("|", " ").strip()


def _lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text file; only line feeds end a line, as in fairseq."""
    try:
        lines = read_file(path, LISTS).decode().split("\n")
    except UnicodeDecodeError as error:
        message = f"{path.name}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        hint = "write it as UTF-8, for example: iconv -f latin1 -t utf-8 IN > OUT"
        raise ConvertError(message, code="text", key=path.name, hint=hint) from error
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _transcripts(path: Path, count: int) -> list[str]:
    """Read the transcripts beside a manifest; letters first, because fairseq trains and scores with them."""
    found = {suffix: path.with_suffix(suffix) for suffix in (".ltr", ".wrd") if path.with_suffix(suffix).is_file()}
    if not found:
        detail = f"{path.name}: no transcripts beside it, expected {path.stem}.ltr or {path.stem}.wrd"
        hint = "write them with fairseq's libri_labels.py, or give --folder recordings with .txt files beside them"
        raise ConvertError(detail, code="no-transcripts", key=path.name, hint=hint)
    texts = {suffix: _lines(file) for suffix, file in found.items()}
    lengths = [
        Problem("transcripts", found[suffix].name, f"{len(lines)} lines for {count} recordings")
        for suffix, lines in texts.items()
        if len(lines) != count
    ]
    hint = "write them anew, with one line for each recording of the manifest"
    refuse(f"{path.name} and its transcripts differ in length", lengths, hint)
    if ".ltr" not in texts:
        return [line.strip() for line in texts[".wrd"]]
    letters = [words_of_letters(line) for line in texts[".ltr"]]
    words = [line.strip() for line in texts.get(".wrd", letters)]
    differing = [
        Problem("transcripts", f"{path.stem}.wrd:{number}", f"{word!r}, in {path.stem}.ltr {spelled!r}")
        for number, (word, spelled) in enumerate(zip(words, letters, strict=True), start=1)
        if word.split() != spelled.split()
    ]
    refuse(f"{path.stem}.ltr and {path.stem}.wrd differ", differing, "remove the one that is wrong")
    return letters


def _read_counted(name: str, path: Path, rate: int, count: int) -> Waveform:
    samples = read_audio(path, rate, name=name)
    if len(samples) != count:
        detail = f"{len(samples)} samples, the manifest says {count}; it may be another recording"
        raise bad_audio(name, detail, "write the manifest again")
    return samples


def _librispeech(folder: Path) -> dict[str, str]:
    lines = [line for path in sorted(folder.glob("*.trans.txt")) for line in _lines(path) if line.strip()]
    pairs = (line.strip().partition(" ") for line in lines)
    return {name: text.strip() for name, _, text in pairs}
