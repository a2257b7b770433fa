"""What was asked for: options that do not go together, the data they name, and the command line that says it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from convert.errors import ConvertError
from convert.evaluation.data import Source
from convert.evaluation.hub import hub_source
from convert.evaluation.local import folder_source, manifest_source
from convert.evaluation.score import NORMALIZERS

SPLIT = "test"  # what results are reported on, when nothing else is asked for


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of `convert.evaluation.run.evaluate` that decide its result; their meaning is told there.

    Raises:
        ConvertError: they do not go together.
    """

    model_dir: Path
    manifest: Path | None
    folder: Path | None
    dataset: str | None
    config: str | None
    split: str | None
    revision: str | None
    text_column: str | None
    normalizer: str
    reference: str | None
    checkpoint: Path | None
    spoken: str | None

    def __post_init__(self) -> None:
        chosen = [name for name in ("manifest", "folder", "dataset") if getattr(self, name) is not None]
        if len(chosen) != 1:
            found = " and ".join(f"--{name}" for name in chosen) or "none"
            _refuse(f"expected one of --manifest, --folder and --dataset, found {found}")
        only = [name for name in ("config", "split", "revision", "text_column") if getattr(self, name) is not None]
        if only and self.dataset is None:
            _refuse(f"--{only[0].replace('_', '-')} is about a --dataset, and none is given")
        if self.normalizer not in NORMALIZERS:
            _refuse(f"unknown normalizer {self.normalizer!r}, expected one of {', '.join(NORMALIZERS)}")
        if self.reference not in (None, "fairseq"):
            _refuse(f"unknown reference {self.reference!r}, expected fairseq")
        if (self.reference is None) != (self.checkpoint is None):
            _refuse("--reference fairseq and --checkpoint FILE need each other")
        for path in (self.manifest, self.checkpoint):
            if path is not None and not path.is_file():
                raise ConvertError(f"{path.name}: there is no such file", code="no-file", key=path.name)

    def source(self, rate: int) -> Source:
        """Open the data, for a model of this sampling rate in Hz."""
        if self.manifest:
            return manifest_source(self.manifest, rate)
        if self.folder:
            return folder_source(self.folder, rate)
        return hub_source(str(self.dataset), self.config, self.split or SPLIT, self.revision, self.text_column, rate)

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
            pairs = {"--config": self.config, "--split": self.split or SPLIT}
            pairs |= {"--revision": None if local else revision, "--text-column": self.text_column}
            words += [word for flag, value in pairs.items() if value for word in (flag, value)]
        words += ["--normalizer", self.normalizer] if self.normalizer != "none" else []
        words += ["--lang", self.spoken] if self.spoken else []
        return shlex.join(words)


def _refuse(message: str) -> None:
    raise ConvertError(message, code="usage")
