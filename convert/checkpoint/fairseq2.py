"""What lies beside a checkpoint of fairseq2: its settings and its tokenizer.

A file of fairseq2 holds tensors alone. The settings are in `model.yaml`, in an asset card, or in the architecture that a
card names; the tokenizer is a sentencepiece model; whether waveforms were normalised is in the run's `config.yaml`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint.beside import read_beside, read_yaml
from convert.checkpoint.dictionary import Dictionary, of_pieces
from convert.checkpoint.fairseq2_architectures import ARCHITECTURES, ASR, NORMALISED
from convert.checkpoint.fairseq2_files import Run, unusable
from convert.checkpoint.sentencepiece import NORMAL, SentencePieceModel, read_model
from convert.errors import CheckpointError

_RENAMED = {"feature_gradient_scale": "feature_grad_scale"}  # 0.4 -> 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What a user says of a checkpoint whose folder does not.

    Args:
        card: a `model.yaml` or an asset card.
        architecture: the name of a registered architecture.
        tokenizer: a sentencepiece model.
        normalize: whether waveforms were normalised.
    """

    card: Path | None = None
    architecture: str = ""
    tokenizer: Path | None = None
    normalize: bool | None = None


# --- settings -------------------------------------------------------------------------------------------------------


def read_settings(run: Run, family: str, options: Options) -> tuple[dict[str, Any], Path | None]:
    """Read what belongs to a checkpoint, in the sections that fairseq's settings have.

    Args:
        run: where it is.
        family: fairseq2's name of its family.
        options: what the user asked for.

    Returns:
        `model` with every field of fairseq2's configuration, those of the encoder among them; `task` with `normalize` where
        it is known, and where everything came from; an empty `criterion`. And the file that `model` is from, if any.

    Raises:
        CheckpointError: `no-settings`, when there are none; `bad-settings`.
    """
    fields, origin, architecture, file = _fields(run, family, options)
    task: dict[str, Any] = {"_name": "fairseq2", "sample_rate": 16000, "settings_from": origin}
    normalize, stated_by = _normalize(run, family, architecture, options)
    if normalize is not None:
        task |= {"normalize": normalize, "normalize_from": stated_by}
    return {"model": {"_name": f"fairseq2.{family}"} | fields, "task": task, "criterion": {}}, file


def _fields(run: Run, family: str, options: Options) -> tuple[dict[str, Any], str, str, Path | None]:
    """The fields, where they are from, the architecture's name where one was named, and the file where there is one."""
    card, file = None, options.card
    if file is None and not options.architecture:
        file = next((one for folder in run.folders if (one := folder / "model.yaml").is_file()), None)
        file = file or next(iter(_cards(run)), None)
    if file is not None:
        card = _card(file, family, run)
    if card is None and not options.architecture:
        raise CheckpointError(
            f"{run.path.name} holds tensors without settings, and there is no model.yaml next to it: heads and strides are unknown; "
            "nothing was written",
            code="no-settings",
            key=run.path.name,
            hint="name its model.yaml or asset card with --base FILE, or its architecture with --arch NAME, such as "
            + ("300m" if family == ASR else "large_lv60k"),
        )
    architecture = options.architecture or (card or {}).get("model_arch") or ""
    fields: dict[str, Any] = {}
    if architecture:
        fields = dict(
            _architecture(architecture, family, "--arch" if options.architecture else file.name if file else "")
        )
    stated = _configuration((card or {}).get("model_config"), file)
    origin = " over ".join(
        ([file.name] if file and stated else []) + ([f"architecture {architecture}"] if architecture else [])
    )
    return fields | stated, origin or (file.name if file else ""), str(architecture), file


def _cards(run: Run) -> Iterator[Path]:
    """The asset cards beside a file: YAML files that name a family of models."""
    for file in sorted(run.folders[0].glob("*.y*ml")) if run.files == (run.path,) else ():
        if file.name != "config.yaml" and any("model_family" in one for one in _documents(file)):
            yield file


def _documents(file: Path) -> list[dict[str, Any]]:
    found = read_yaml(file, lambda what: unusable(file, f"{file.name} {what}", "bad-settings"))
    return [one for one in found if isinstance(one, dict)]


def _card(file: Path, family: str, run: Run) -> dict[str, Any]:
    """Choose the card of a checkpoint in a file of cards, with what it takes from the cards that it is based on."""
    known = {str(one.get("name")).partition("@")[0]: one for one in _documents(file)}
    whole = {name: _based(name, known) for name in known}
    fitting = {name: card for name, card in whole.items() if card.get("model_family") == family}
    if len(fitting) > 1:
        mine = {name: card for name, card in fitting.items() if _last(card.get("checkpoint")) == run.path.name}
        fitting = mine or fitting
    if len(fitting) != 1:
        others = sorted({str(card.get("model_family")) for card in whole.values() if card.get("model_family")})
        what = f"names {len(fitting)} models of {family}: {', '.join(sorted(fitting))[:200]}"
        what = (
            what
            if fitting
            else f"names no model of {family}" + (f", but of {', '.join(others)[:200]}" if others else "")
        )
        raise unusable(
            file, f"{file.name} {what}", "bad-settings", "leave the card of this checkpoint alone in the file"
        )
    return next(iter(fitting.values()))


def _based(name: str, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    seen: set[str] = set()
    while name in known and name not in seen:
        seen.add(name)
        made = known[name] | made
        name = str(known[name].get("base")).partition("@")[0]
    return made


def _architecture(name: object, family: str, key: str) -> Mapping[str, Any]:
    found = ARCHITECTURES[family].get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"{str(name)[:60]!r} is not an architecture of {family}; nothing was written",
            code="unknown-architecture",
            key=key,
            hint=f"known: {', '.join(ARCHITECTURES[family])}; or name the model.yaml of the run with --base FILE",
        )
    return found


def _configuration(value: object, file: Path | None) -> dict[str, Any]:
    """Give a `model_config` of any version the fields of today's, those of the encoder beside the others."""
    value = value if value is not None else {}
    if isinstance(value, dict) and isinstance(value.get("_set_"), dict):
        value = value["_set_"] | {key: one for key, one in value.items() if key != "_set_"}
    inner = value.get("encoder_config", {}) if isinstance(value, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("_set_"), dict):
        inner = inner["_set_"] | {key: one for key, one in inner.items() if key != "_set_"}
    if not isinstance(value, dict) or not isinstance(inner, dict):
        name = file.name if file else "model.yaml"
        raise CheckpointError(f"{name}: its model_config is not a mapping", code="bad-settings", key=name)
    fields = {key: one for key, one in (value | inner).items() if key not in ("encoder_config", "vocab_info")}
    if isinstance(value.get("vocab_info"), dict):  # 0.4
        fields.setdefault("target_vocab_size", value["vocab_info"].get("size"))
    return {_RENAMED.get(key, key): one for key, one in fields.items()}


def _normalize(run: Run, family: str, architecture: str, options: Options) -> tuple[bool | None, str]:
    if options.normalize is not None:
        return options.normalize, "--normalize" if options.normalize else "--no-normalize"
    for folder in run.folders:
        file = folder / "config.yaml"
        for document in _documents(file) if file.is_file() else ():
            for path in (("dataset", "asr_task_config"), ("dataset", "ssl_task_config"), ("dataset",)):
                inside: Any = document
                for key in path:
                    inside = inside.get(key) if isinstance(inside, dict) else None
                if isinstance(inside, dict) and isinstance(inside.get("normalize_audio"), bool):
                    return inside["normalize_audio"], f"config.yaml: {'.'.join(path)}.normalize_audio"
    if architecture in NORMALISED[family]:
        return True, f"architecture {architecture}: omnilingual-asr always normalises"
    return None, ""


# --- the tokenizer --------------------------------------------------------------------------------------------------


def find_tokenizer(run: Run, options: Options) -> Path | None:
    """Find the sentencepiece model of a checkpoint: the one that was named, or the only one beside it.

    Raises:
        CheckpointError: `several-tokenizers`.
    """
    if options.tokenizer is not None:
        return options.tokenizer
    for folder in run.folders:
        found = sorted(folder.glob("*.model"))
        if len(found) > 1:
            listed = ", ".join(one.name for one in found)[:200]
            raise unusable(found[0], f"{folder.name} holds several tokenizers: {listed}", "several-tokenizers", _DICT)
        if found:
            return found[0]
    return None


def read_tokenizer(path: Path) -> tuple[Dictionary, dict[str, Any], bytes]:
    """Read a tokenizer: its pieces, and what decides how they become text.

    Args:
        path: the `.model` file.

    Returns:
        A dictionary of the pieces, settings as plain data, and the file as it is.

    Raises:
        CheckpointError: `bad-dictionary`: it is not a sentencepiece model.
    """
    data = read_beside(
        path, "sentencepiece model", lambda what: unusable(path, f"{path.name} {what}", "bad-dictionary", _DICT)
    )
    model = read_model(data)
    return of_pieces(model, path), _decoding(path, model, data), data


_DICT = "name the tokenizer's .model with --dict FILE"


def _decoding(path: Path, model: SentencePieceModel, data: bytes) -> dict[str, Any]:
    return {
        "name": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "kinds": {str(index): kind for index, kind in enumerate(model.kinds) if kind != NORMAL},
        "ids": dict(model.ids),
        "unk_surface": model.unk_surface,
        "dummy_prefix": model.dummy_prefix,
        "extra_whitespace": model.extra_whitespace,
    }


def _last(path: object) -> str:
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2]
