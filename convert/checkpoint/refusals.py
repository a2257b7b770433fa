"""Say of a file of tensors what it holds where a conversion cannot use it, and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.checkpoint.finding import State, is_module
from convert.checkpoint.stored import StoredTensor, Stub
from convert.errors import CheckpointError
from convert.report import fold

_SOME = 6  # names that are shown of a file's many
# keys of a file's top level -> who writes files with them
_WRITERS = {
    ("pytorch-lightning_version",): "PyTorch Lightning",
    ("task_cfg", "model_cfg", "model_weight"): "s3prl's converter",
    ("Downstream",): "s3prl's trainer",
    ("optimizer_history",): "fairseq's trainer",
}
# what stands in a key -> whose names these are, and what to do; the first that is found counts
_OTHERS = {
    "feature_aggregator.": (
        "wav2vec 1.0 or vq-wav2vec, which transformers has no class for",
        "wav2vec 2.0 is another model",
    ),
    "modality_encoders.": (
        "a model with an encoder for each modality, which transformers has no class for",
        "name the checkpoint of a model of audio alone",
    ),
    "encoder.transformer.layers.": ("torchaudio", "name the fairseq checkpoint that torchaudio imported"),
    ".feed_forward.intermediate_dense.": (
        "transformers",
        "load it with transformers; the way back to fairseq is `fairseq-to-hf restore MODEL_DIR CHECKPOINT.pt`",
    ),
}


def writer(top: Mapping[Any, object]) -> str:
    """Name the program that wrote a file, by the keys of its top level; empty, where they do not say."""
    for keys, name in _WRITERS.items():
        if top.keys() >= set(keys):
            version = top.get("pytorch-lightning_version")
            return f"{name} {version}" if isinstance(version, str) and len(version) < 20 else name
    return ""


def ambiguous(path: Path, models: Sequence[tuple[State, str]]) -> CheckpointError:
    """Make the error for a file with several models."""
    places = [state.named(prefix) for state, prefix in models]
    state, prefix = models[0]
    keys = "".join(f"[{part}]" if part.isdigit() else f'["{part}"]' for part in _parts(state))
    whole = f'torch.load("{path.name}", weights_only=True)' + keys
    one = f'{{k: v for k, v in {whole}.items() if k.startswith("{prefix}")}}' if prefix else whole
    return CheckpointError(
        f"{path.name} holds {len(places)} models: {'; '.join(places)}; nothing was written",
        code="ambiguous",
        key=path.name,
        hint=f'save one of them in a file of its own, in Python, and convert that: torch.save({one}, "one.pt")',
    )


def no_settings(path: Path, state: State, prefix: str, several: Sequence[str] = ()) -> CheckpointError:
    """Make the error for a model without its settings; `several`: where settings are of which it is not known whose."""
    what = f"is a pickled module of the class {state.module}, and holds" if state.module else "holds"
    lacks = "without its settings, such as the number of attention heads, which weights do not show"
    if several:
        listed = ", ".join(f"`{where}`" for where in several[:_SOME])
        lacks = f"and the settings of several models, of which none is said to be this one's: {listed}"
    return CheckpointError(
        f"{path.name} {what} the weights of a fairseq model {state.named(prefix)}, {lacks}; nothing was written",
        code="no-settings",
        key=path.name,
        hint="any checkpoint of the same architecture that fairseq's trainer wrote has the settings, such as the pretrained one "
        "that the model was made from (wav2vec_small.pt, xlsr2_300m.pt): --base CHECKPOINT.pt; for a model that writes text, its dictionary too: --dict dict.ltr.txt",
    )


def no_model(path: Path, value: object, states: Sequence[State]) -> CheckpointError:
    """Make the error for a file in which no model is found."""
    top = value if isinstance(value, dict) else {}
    by = f", written by {writer(top)}," if writer(top) else ""
    hint = "name a checkpoint of wav2vec 2.0 or another fairseq speech model"
    if states:
        state = max(states, key=lambda one: len(one.entries))
        names = [str(name) for name, entry in state.entries.items() if isinstance(entry, StoredTensor)]
        others = [meaning for mark, meaning in _OTHERS.items() if any(mark in name for name in names)]
        what = "no model with fairseq's names"
        if others:
            whose, hint = others[0]
            what = f"a model with the names of {whose}"
        elif "Downstream" in top:
            what = "what was trained on top of a speech model, and not that model"
            hint = "name the checkpoint of the upstream model"
        what += f"; {state.named('')} it has {len(names)} tensors: {_some(names)}"
    elif is_module(value):
        what = f"a pickled module of the class {value.type}, without tensors"
    elif isinstance(value, dict):
        what = f"a dict without tensors, with the keys {_some(value)}" if value else "an empty dict"
    elif isinstance(value, Stub):
        what = f"an object of the class {value.type}"
    elif isinstance(value, StoredTensor):
        what = "a single tensor"
    else:
        what = f"a {type(value).__name__}"
    message = f"{path.name}{by} holds {what}; nothing was written"
    return CheckpointError(message, code="foreign-file", key=path.name, hint=hint)


def _parts(state: State) -> list[str]:
    return [part for part in state.where.split(".") if part]


def _some(names: Iterable[object]) -> str:
    listed = [str(name) if str(name).isprintable() else ascii(name) for name in names]
    folded = fold(listed[:5000])
    more = f", and {len(folded) - _SOME} more" if len(folded) > _SOME else ""
    return ", ".join(name[:100] for name in folded[:_SOME]) + more
