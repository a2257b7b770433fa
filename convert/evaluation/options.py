"""The options of an evaluation, what of them excludes what, and the command line that repeats it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from convert.errors import ConvertError
from convert.evaluation.score import NORMALIZERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `convert.evaluate`, which documents them.

    Raises:
        ConvertError: `usage`: they exclude each other; `no-file`: a file is missing.
    """

    model_dir: Path
    manifest: Path | None = None
    folder: Path | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    text_column: str | None = None
    normalizer: str = "none"
    reference: str | None = None
    checkpoint: str | Path | None = None
    base: str | Path | None = None
    language: str = ""
    device: str | None = None
    batch_size: int = 8
    transcripts: Path | None = None

    def __post_init__(self) -> None:
        chosen = [f"--{name}" for name in ("manifest", "folder", "dataset") if getattr(self, name) is not None]
        if len(chosen) != 1:
            found = " and ".join(chosen) or "none"
            _refuse(f"expected one of --manifest, --folder and --dataset, found {found}")
        only = [name for name in ("config", "split", "revision", "text_column") if getattr(self, name) is not None]
        if only and self.dataset is None:
            _refuse(f"--{only[0].replace('_', '-')} needs --dataset")
        if self.normalizer not in NORMALIZERS:
            _refuse(f"unknown normalizer {self.normalizer!r}, expected one of {', '.join(NORMALIZERS)}")
        if self.reference not in (None, "fairseq"):
            _refuse(f"unknown reference {self.reference!r}, expected fairseq")
        if (self.reference is None) != (self.checkpoint is None):
            _refuse("--reference fairseq and --checkpoint SOURCE need each other")
        if self.base is not None and self.checkpoint is None:
            _refuse("--base needs --checkpoint")
        if self.batch_size < 1:
            _refuse(f"batch size {self.batch_size}, expected at least 1")
        if self.manifest is not None and not self.manifest.is_file():
            raise ConvertError(f"{self.manifest.name}: no such file", code="no-file", key=self.manifest.name)

    def command(self, revision: str | None) -> str:
        """Write the command line that measures the same, without folders and without what changes no number.

        Args:
            revision: the commit that a dataset's revision was resolved to.
        """
        words = ["fairseq-to-hf", "evaluate", self.model_dir.resolve().name]
        if self.manifest:
            words += ["--manifest", self.manifest.name]
        elif self.folder:
            words += ["--folder", self.folder.resolve().name]
        elif self.dataset:
            local = Path(self.dataset).is_dir()
            words += ["--dataset", Path(self.dataset).resolve().name if local else self.dataset]
            pairs = {"--config": self.config, "--split": self.split or "test"}
            pairs |= {"--revision": None if local else revision, "--text-column": self.text_column}
            words += [word for flag, value in pairs.items() if value for word in (flag, value)]
        words += ["--normalizer", self.normalizer] if self.normalizer != "none" else []
        words += ["--lang", self.language] if self.language else []
        return shlex.join(words)


def _refuse(message: str) -> None:
    raise ConvertError(message, code="usage")
