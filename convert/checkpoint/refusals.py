"""Say of a file of tensors what it holds where a conversion cannot use it, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.checkpoint.finding import State, is_module
from convert.checkpoint.unpickle import StoredTensor, Stub
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
# what stands in a key -> whose model it is. Each is looked for as it stands here.
_OTHERS = {
    "feature_aggregator.conv_layers.": "wav2vec 1.0 or vq-wav2vec, for which transformers has no class",
    "wav2vec_predictions.": "wav2vec 1.0 or vq-wav2vec, for which transformers has no class",
    "encoder_frontend.feature_extractor.": "fairseq2",
    "modality_encoders.": "data2vec 2.0, for which transformers has no class",
    ".feed_forward.intermediate_dense.": "transformers",
    "encoder.transformer.layers.": "torchaudio",
}


def writer(top: Mapping[Any, Any]) -> str:
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
    inside = "".join(f"[{part!r}]" for part in state.where.split(".") if part)
    save = f'state = torch.load("{path.name}", weights_only=True){inside}; '
    save += f'torch.save({{k: v for k, v in state.items() if k.startswith("{prefix}")}}, "one.pt")'
    return CheckpointError(
        f"{path.name} holds {len(places)} models: {'; '.join(places)}; nothing was written",
        code="ambiguous",
        key=path.name,
        hint=f"save the one that is meant in a file of its own, and convert that with --base: {save}",
    )


def no_settings(path: Path, state: State, prefix: str) -> CheckpointError:
    """Make the error for a model without its settings."""
    return CheckpointError(
        f"{path.name} holds a model with fairseq's names {state.named(prefix)}, and not its settings: heads, strides and the "
        "place of norms are not in the weights; nothing was written",
        code="no-settings",
        key=path.name,
        hint="pass the pretrained checkpoint that it was made from, whose settings it shares: --base PRETRAINED.pt",
    )


def no_model(path: Path, value: Any, states: Sequence[State]) -> CheckpointError:
    """Make the error for a file in which no model is found."""
    top = value if isinstance(value, dict) else {}
    by = writer(top)
    by = f", written by {by}" if by else ""
    code, hint = "foreign-file", "name a checkpoint of wav2vec 2.0, HuBERT or another model that fairseq made"
    if states:
        state = states[0]
        names = [name for name, entry in state.entries.items() if isinstance(entry, StoredTensor)]
        whose = {text: name for text, name in _OTHERS.items() if any(text in str(key) for key in names)}
        what = f"tensors with the names of {next(iter(whose.values()))}" if whose else "no model with fairseq's names"
        what += f"; {state.named('')} it has {len(names)} tensors: {_some(names)}"
        if "transformers" in whose.values():
            hint = "load it with transformers: it needs no conversion"
        elif "Downstream" in top:
            what += "; the model below it is not in the file"
            hint = "name the checkpoint of the upstream model that it was trained on"
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
    return CheckpointError(f"{path.name}{by} holds {what}; nothing was written", code=code, key=path.name, hint=hint)


def _some(names: Any) -> str:
    listed = [str(name) if str(name).isprintable() else ascii(name) for name in names]
    folded = fold(listed[:5000])
    more = f", and {len(folded) - _SOME} more" if len(folded) > _SOME else ""
    return ", ".join(name[:100] for name in folded[:_SOME]) + more
