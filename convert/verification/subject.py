"""What is verified: the checkpoint as the reference needs to know it, and the model directory's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.dictionary import SPECIAL
from convert.errors import ConvertError
from convert.families import ARCHITECTURES, Conversion, Request, describe, family_of
from convert.families.adapters import choose, languages_of
from convert.families.encoder_settings import encoder_settings
from convert.families.settings import Reader
from convert.families.speech_to_text import ARCHITECTURES as SPEECH_TO_TEXT
from convert.families.speech_to_text import LANGUAGE
from convert.families.tokenizers import post_process_of, sequence_decoding
from convert.verification.handed import handed
from convert.verification.inputs import Geometry
from convert.verification.reference import Subject

BLANK = "<s>"  # the name of CTC's blank
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
    plan = describe(opened, request)
    if plan.fairseq in SPEECH_TO_TEXT:
        return _speech_to_text(opened, plan, _file(opened, sha256))
    settings = opened.settings
    fine_tuned = any(name.startswith(("w2v_encoder.", "encoder.w2v_model.")) for name in opened.tensors)
    reader = encoder_settings(opened) if fine_tuned else Reader(dict(settings["model"]), {})
    known = request.dictionary or opened.dictionary
    if known and request.dictionary and not ARCHITECTURES[plan.fairseq][1].text:
        known = known.labels
    found = languages_of(opened, reader.values, [])
    spoken = choose(found, request.language, opened.path.name) if found or request.language else None
    known = (spoken and spoken.dictionary) or known
    known = known if fine_tuned or ARCHITECTURES[plan.fairseq][1].symbols else None
    symbols, special = (known.symbols, known.special) if known else ((), ())
    decoder = "decoder.embed_tokens.weight" in opened.tensors
    subject = Subject(
        **_file(opened, sha256),
        handed=handed(opened, plan.fairseq, settings, plan.training_only, plan.plan.table.drops),
        symbols=symbols,
        special=tuple(index for index, symbol in enumerate(symbols) if symbol in special),
        blank=-1 if decoder else _last(symbols, BLANK),
        post_process=sequence_decoding(symbols, settings["task"], request.post_process)
        if decoder
        else post_process_of(settings["criterion"], settings["task"], request.post_process),
        rate=int(settings["task"].get("sample_rate") or 16000),
        normalize=bool(settings["task"].get("normalize", False)),
        language=spoken.name if spoken else "",
        languages={one.name: (one.dictionary.symbols, one.row) for one in found.values() if one.dictionary}
        if len(found) > 1
        else {},
    )
    family = family_of(opened, reader)
    convolutions = tuple((kernel, stride) for _, kernel, stride in family.convolutions(reader))
    multiple = reader.values.get("required_seq_len_multiple", 2) if family.pads else 1
    return subject, Geometry(convolutions, int(multiple or 1), family.splits_masks)


def _file(opened: Checkpoint, sha256: str) -> dict[str, Any]:
    name = opened.path.name.encode("utf-8", "backslashreplace").decode()
    return {"name": name, "size": opened.size, "sha256": sha256 or opened.sha256()}


def _speech_to_text(opened: Checkpoint, plan: Conversion, file: Mapping[str, Any]) -> tuple[Subject, Geometry]:
    """The same of a speech-to-text transformer: its windows of 25 ms every 10 ms, and its convolutions, each of half the frames."""
    symbols = plan.dictionary.symbols if plan.dictionary else ()
    kernels = str(opened.settings["model"]["conv_kernel_sizes"]).split(",")
    subject = Subject(
        **file,
        handed=handed(opened, plan.fairseq, opened.settings, plan.training_only),
        symbols=symbols,
        special=tuple(i for i, symbol in enumerate(symbols) if symbol in SPECIAL or LANGUAGE.fullmatch(symbol)),
        blank=-1,
        post_process="sentencepiece",
        rate=16000,
        normalize=False,
        **generating(plan.processor.files["generation_config.json"]),
    )
    return subject, Geometry(((400, 160), *((1, 2) for _ in kernels)), 1)


def generating(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Say which beam a plan's generation_config.json has, which is the checkpoint's own."""
    penalty = float(configuration.get("length_penalty", 1.0))
    return {"beam": int(configuration.get("num_beams", 1)), "length_penalty": penalty}


def _last(symbols: Sequence[str], symbol: str) -> int:
    """To fairseq, a symbol that is listed again is the last of its ids."""
    return max((index for index, one in enumerate(symbols) if one == symbol), default=0)


def half_type(directory: Any) -> tuple[str, str]:
    """Say which half type a model directory's weights have, and which the conversion rounded them to (each may be empty)."""
    stored = str(directory.config.get("torch_dtype") or directory.config.get("dtype") or "float32")
    rounded = directory.record.dtype
    half = stored if stored in HALVES else ""
    return half, half if rounded != "keep" else ""


def check_source(directory: Any, name: str, sha256: str) -> None:
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
