"""The options of an evaluation, which of them exclude each other, and the command line that repeats it."""

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
            hint = "name the recordings: --manifest FILE.tsv, --folder DIR or --dataset NAME"
            raise _usage(f"expected one of --manifest, --folder and --dataset, found {found}", hint)
        only = [name for name in ("config", "split", "revision", "text_column") if getattr(self, name) is not None]
        if only and self.dataset is None:
            option = f"--{only[0].replace('_', '-')}"
            raise _usage(f"{option} is for --dataset", f"leave {option} out, or name a dataset")
        if self.normalizer not in NORMALIZERS:
            raise _usage(f"unknown normalizer {self.normalizer!r}, expected one of {', '.join(NORMALIZERS)}")
        if self.reference not in (None, "fairseq"):
            raise _usage(f"unknown reference {self.reference!r}, expected fairseq")
        if self.checkpoint is None and self.reference is not None:
            raise _usage("--reference fairseq needs the checkpoint", "name it: --checkpoint SOURCE")
        for option, value in (("--checkpoint", self.checkpoint), ("--base", self.base)):
            if value is not None and self.reference is None:
                raise _usage(f"{option} is for --reference", f"leave {option} out, or add --reference fairseq")
        if self.batch_size < 1:
            raise _usage(f"batch size {self.batch_size}, expected at least 1")
        if self.manifest is not None and not self.manifest.is_file():
            hint = "name the FILE.tsv that fairseq's wav2vec_manifest.py wrote"
            raise ConvertError(f"{self.manifest.name}: no such file", code="no-file", key=self.manifest.name, hint=hint)

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


def _usage(message: str, hint: str = "") -> ConvertError:
    return ConvertError(message, code="usage", hint=hint)
