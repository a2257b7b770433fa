"""verification.json and evaluation.json as far as publishing repeats them, read key by key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from convert.errors import ConvertError
from convert.typed import Misfit, read

VERIFICATION, EVALUATION = "verification.json", "evaluation.json"
T = TypeVar("T")
Sha256 = Annotated[str, re.compile("[0-9a-f]{64}")]


@dataclass(frozen=True, slots=True)
class Run:
    """One input on one device."""

    device: str
    dtype: str
    input: str
    verdict: str
    max_abs_difference: float | None = None
    allowed: float | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """A deliberate mistake, and whether it was caught."""

    name: str
    caught: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The checkpoint that the model was compared with."""

    sha256: Sha256
    name: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """fairseq's side."""

    fairseq: str = ""


@dataclass(frozen=True, slots=True)
class Padding:
    """What a padded batch differs by, where frames are counted otherwise."""

    fairseq_frames: tuple[int, ...]
    transformers_frames: tuple[int, ...]
    samples: tuple[int, ...]
    stage: str
    max_abs_difference: float


@dataclass(frozen=True, slots=True)
class Verified:
    """The report of a verification; docs/verification.md explains its fields.

    Args:
        skipped: what was not compared, with the reason.
    """

    schema: int
    passed: bool
    checkpoint: Checkpoint
    files: Mapping[str, Sha256]
    runs: tuple[Run, ...]
    controls: tuple[Control, ...]
    reference: Reference = Reference()
    environment: Mapping[str, Any] = field(default_factory=dict)
    padding: tuple[Padding, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object) -> Verified:
        """Read the value of verification.json.

        Raises:
            ConvertError: with status 1: it is not what `verify` writes.
        """
        return _of(cls, value, VERIFICATION, "fairseq-to-hf verify CHECKPOINT MODEL_DIR")


@dataclass(frozen=True, slots=True)
class Dataset:
    """What was measured on."""

    type: str
    name: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement; error rates are fractions."""

    dataset: Dataset
    metrics: Mapping[str, float]
    utterances: int | None = None
    decoder: str | None = None
    normalizer: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        if not self.dataset.type:
            raise ValueError("dataset.type")
        if "wer" not in self.metrics or not all(map(math.isfinite, self.metrics.values())):
            raise ValueError("metrics")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The content of evaluation.json."""

    results: tuple[Result, ...] = ()

    @classmethod
    def of(cls, value: object) -> Evaluated:
        """Read the value of evaluation.json.

        Raises:
            ConvertError: it is not what `evaluate` writes.
        """
        return _of(cls, value, EVALUATION, "fairseq-to-hf evaluate MODEL_DIR", status=2)


def _of(kind: type[T], value: object, name: str, hint: str, status: int = 1) -> T:
    try:
        return read(kind, value)
    except Misfit as error:
        message = f"{name}: {error}: not what fairseq-to-hf writes; nothing was sent"
        code = name.removesuffix(".json")
        raise ConvertError(message, code=code, key=name, status=status, hint=hint) from None
