"""What is verified: the checkpoint as the reference needs to know it, and the model directory's own words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.dictionary import SPECIAL, Dictionary, from_file
from convert.errors import ConvertError
from convert.families import ARCHITECTURES, architecture_of
from convert.families.adapters import choose, languages_of
from convert.families.encoder_settings import encoder_settings
from convert.families.settings import Reader
from convert.families.speech_to_text import ARCHITECTURES as SPEECH_TO_TEXT
from convert.families.speech_to_text import LANGUAGE
from convert.families.tokenizers import labels_of, sequence_decoding
from convert.sources import dictionary_beside, open_source
from convert.verification.inputs import Geometry
from convert.verification.reference import Subject, check_pickle

SPLIT_MASKS = ("hubert", "wavlm")  # fairseq's encoders that cut the mask of a padded batch into equal pieces
HALVES = ("float16", "bfloat16")


def read_subject(
    source: str | Path,
    *,
    dictionary: Path | None = None,
    base: str | Path | None = None,
    ema: bool = False,
    kept: Dictionary | None = None,
    trusted: bool = False,
    language: str = "",
) -> tuple[Subject, Geometry]:
    """Read what a reference has to know of a checkpoint.

    Args:
        source: the checkpoint, as for `convert.plan`.
        dictionary, base, ema: as for `convert.package.plan`.
        kept: the dictionary that a model directory keeps, for checkpoints that carry none.
        trusted: whether its pickle may name what no trainer writes.
        language: the one language that a conversion was asked for, of a checkpoint with several.

    Raises:
        CheckpointError: it cannot be read.
        ConvertError: `unsafe-pickle`.
        PlanError: it was fine-tuned, and its pretrained model's settings are missing; it has no such language.
    """
    with open_source(source, base=base, ema=ema) as opened:
        dictionary = dictionary or dictionary_beside(opened)
        check_pickle(opened, trusted)
        if architecture_of(opened) in SPEECH_TO_TEXT:
            return _speech_to_text(opened, from_file(dictionary) if dictionary else kept)
        settings: dict[str, Any] = {key: dict(value) for key, value in opened.settings.items()}
        fine_tuned = any(name.startswith(("w2v_encoder.", "encoder.w2v_model.")) for name in opened.tensors)
        reader = encoder_settings(opened) if fine_tuned else Reader(dict(settings["model"]), {})
        architecture = architecture_of(opened)
        known = from_file(dictionary) if dictionary else opened.dictionary or kept
        if known and dictionary and architecture in ARCHITECTURES and not ARCHITECTURES[architecture][1].text:
            known = known.labels
        found = languages_of(opened, reader.values, [])
        spoken = choose(found, language, opened.path.name) if found or language else None
        known = (spoken and spoken.dictionary) or known
        symbols = known.symbols if known and fine_tuned else ()
        decoder = "decoder.embed_tokens.weight" in opened.tensors
        subject = Subject(
            path=opened.path,
            name=opened.path.name.encode("utf-8", "backslashreplace").decode(),
            size=opened.size,
            sha256=opened.sha256(),
            architecture=architecture,
            settings=settings,
            symbols=symbols,
            special=tuple(index for index, symbol in enumerate(symbols) if symbol in SPECIAL),
            blank=-1 if decoder else 0,
            post_process=sequence_decoding(symbols, settings["task"]) if decoder else _post_process(settings),
            rate=int(settings["task"].get("sample_rate") or 16000),
            normalize=bool(settings["task"].get("normalize", False)),
            language=spoken.name if spoken else "",
            languages={one.name: (one.dictionary.symbols, one.row) for one in found.values() if one.dictionary}
            if len(found) > 1
            else {},
        )
        convolutions = tuple((kernel, stride) for _, kernel, stride in reader.convolutions("conv_feature_layers"))
    pads = reader.values.get("layer_type") != "conformer" and reader.values.get("_name") != "wavlm"
    multiple = 1 if not pads else reader.values.get("required_seq_len_multiple", 2)
    return subject, Geometry(convolutions, int(multiple or 1), reader.values.get("_name") in SPLIT_MASKS)


def _speech_to_text(opened: Checkpoint, known: Dictionary | None) -> tuple[Subject, Geometry]:
    """The same of a speech-to-text transformer: its windows of 25 ms every 10 ms, and its convolutions, each of half the frames."""
    if known is None:
        raise ConvertError(
            f"{opened.path.name} carries no dictionary, and fairseq writes no text without one",
            code="no-dictionary",
            key="--dict",
            hint="pass the dictionary that its config.yaml names: --dict dict.txt",
        )
    kernels = str(opened.settings["model"].get("conv_kernel_sizes") or "").split(",")
    subject = Subject(
        path=opened.path,
        name=opened.path.name.encode("utf-8", "backslashreplace").decode(),
        size=opened.size,
        sha256=opened.sha256(),
        architecture=architecture_of(opened),
        settings={key: dict(value) for key, value in opened.settings.items()},
        symbols=known.symbols,
        special=tuple(i for i, symbol in enumerate(known.symbols) if symbol in SPECIAL or LANGUAGE.fullmatch(symbol)),
        blank=-1,
        post_process="sentencepiece",
        rate=16000,
        normalize=False,
    )
    return subject, Geometry(((400, 160), *((1, 2) for _ in kernels)), 1)


def _post_process(settings: Mapping[str, Any]) -> str:
    """fairseq's `post_process`; the symbols of phone labels stay apart, as `convert.families.tokenizers` keeps them."""
    if labels_of(settings["task"]) in ("phn", "phones"):
        return "none"
    criterion = settings["criterion"]
    return str(criterion.get("post_process") or criterion.get("remove_bpe") or "letter")


def half_type(directory: Any) -> tuple[str, str]:
    """Say which half type a model directory's weights have, and which the conversion rounded them to (each may be empty)."""
    stored = str(directory.config.get("torch_dtype") or directory.config.get("dtype") or "float32")
    rounded = directory.record.dtype
    half = stored if stored in HALVES else ""
    return half, half if rounded != "keep" else ""


def check_source(directory: Any, subject: Subject) -> None:
    """Refuse a model directory that was made from another checkpoint.

    Raises:
        ConvertError: `other-checkpoint`, status 1.
    """
    source = directory.record.source
    if source.sha256 != subject.sha256:
        raise ConvertError(
            f"{directory.path.name} was made from {source.name} ({source.sha256[:12]}…), "
            f"not from {subject.name} ({subject.sha256[:12]}…)",
            code="other-checkpoint",
            key=subject.name,
            status=1,
            hint="name the checkpoint that it was made from, or convert this one",
        )
