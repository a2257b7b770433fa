"""What is verified: the checkpoint as the reference needs to know it, and what the model directory says of itself."""

from __future__ import annotations

from dataclasses import fields

from convert.checkpoint import Checkpoint
from convert.directory import ModelDirectory
from convert.errors import ConvertError
from convert.families import Request, describe, interface_of
from convert.verification.handed import handed
from convert.verification.inputs import Geometry
from convert.verification.reference import Subject

HALVES = ("float16", "bfloat16")


def read_subject(opened: Checkpoint, request: Request, sha256: str = "") -> tuple[Subject, Geometry]:
    """Read what a reference has to know of a checkpoint.

    Args:
        opened: the checkpoint.
        request: what its conversion was or would be asked for.
        sha256: of the file, where it is known.

    Raises:
        PlanError: it cannot be converted so; what `convert` refuses is not verified either.
    """
    made = describe(opened, request)
    around = interface_of(opened, request, made)
    subject = Subject(
        **{name.name: getattr(around, name.name) for name in fields(around)},
        name=opened.path.name.encode("utf-8", "backslashreplace").decode(),
        size=opened.size,
        sha256=sha256 or opened.sha256(),
        handed=handed(opened, made.fairseq, opened.settings, made.training_only, made.plan.table.drops),
    )
    return subject, Geometry(around.convolutions, around.multiple, around.splits)


def half_type(directory: ModelDirectory) -> tuple[str, str]:
    """Say which half type a model directory's weights have, and which the conversion rounded them to (each may be empty)."""
    stored = str(directory.config.get("torch_dtype") or directory.config.get("dtype") or "float32")
    rounded = directory.record.dtype
    half = stored if stored in HALVES else ""
    return half, half if rounded != "keep" else ""


def check_source(directory: ModelDirectory, name: str, sha256: str) -> None:
    """Refuse a model directory that was made from another checkpoint than the one with this name and hash.

    Raises:
        ConvertError: `other-checkpoint`, status 1.
    """
    source = directory.record.source
    if source.sha256 != sha256:
        raise ConvertError(
            f"{directory.path.name} was made from {source.name} ({source.sha256[:12]}…), "
            f"not from {name} ({sha256[:12]}…)",
            code="other-checkpoint",
            key=name,
            status=1,
            hint="name the checkpoint that it was made from, or convert this one",
        )
