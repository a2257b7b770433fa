"""`fairseq-to-hf inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from convert.checkpoint import is_harmless, open_checkpoint
from convert.cli import Outcome
from convert.cli import command as make
from convert.report import fold, size
from convert.transfer import product


@make(
    "inspect",
    "fairseq-to-hf inspect checkpoint_best.pt",
    "fairseq-to-hf inspect -v checkpoint_best.pt",
    "fairseq-to-hf inspect --json checkpoint_best.pt",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
def command(checkpoint: Path) -> Outcome:
    """Say what a checkpoint is, without reading its tensors.

    Names the architecture, its size, the task, the dictionary, the training state beside the model, and every global of
    the pickle. Nothing in the file is executed.
    """
    with open_checkpoint(checkpoint) as opened:
        count = sum(product(spec.shape) for spec in opened.inventory.values())
        model, task = opened.settings["model"], opened.settings["task"]
        dtypes = sorted({spec.dtype for spec in opened.inventory.values()})
        data: dict[str, Any] = {
            "file": {"name": opened.path.name, "size": opened.size, "container": opened.container.kind},
            "layout": opened.layout,
            "architecture": model.get("_name"),
            "task": task.get("_name"),
            "parameters": count,
            "dtypes": dtypes,
            "dictionary": list(opened.dictionary.symbols) if opened.dictionary else None,
            "pretraining_dictionaries": [list(dictionary.symbols) for dictionary in opened.dictionaries],
            "languages": sorted(opened.groups) or _stacked(model, task),
            "training_state": opened.parts,
            "globals": [{"name": name, "known_harmless": is_harmless(name)} for name in opened.globals],
            "settings": opened.settings,
            "tensors": {name: {"shape": spec.shape, "dtype": spec.dtype} for name, spec in opened.inventory.items()},
        }
    return Outcome(True, _text(data), data)


def _stacked(model: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """The languages whose adapters stand in one tensor, by their order there."""
    keys, count = task.get("multi_corpus_keys"), model.get("adp_num")
    names = [key.strip() for key in keys.split(",")] if isinstance(keys, str) else []
    return names if isinstance(count, int) and len(names) == count > 1 else []


def _text(data: dict[str, Any]) -> list[str]:
    symbols = data["dictionary"]
    inner = data["settings"]["model"].get("w2v_args")
    model = (inner if isinstance(inner, dict) else data["settings"])["model"]
    shape = [f"{model[key]} {word}" for key, word in _SHAPE.items() if key in model]
    unknown = [row["name"] for row in data["globals"] if not row["known_harmless"]]
    rows = {
        "file": f"{data['file']['name']}, {size(data['file']['size'])}, {data['file']['container']} container",
        "settings": f"{data['layout']} layout",
        "architecture": f"{data['architecture']} ({', '.join(shape)})",
        "task": str(data["task"]),
        "normalize": str(data["settings"]["task"].get("normalize")),
        "parameters": f"{data['parameters']:,} in {len(data['tensors'])} tensors, {', '.join(data['dtypes'])}",
        "dictionary": f"{len(symbols)} symbols: {' '.join(symbols[:12])}{' ...' if len(symbols) > 12 else ''}"
        if symbols
        else " and ".join(f"{len(one)} symbols of the pretraining" for one in data["pretraining_dictionaries"])
        or "none in the file",
        "beside it": ", ".join(f"{key} {size(count)}" for key, count in data["training_state"].items()) or "nothing",
        "globals": f"{len(data['globals'])}, "
        + (f"unknown: {', '.join(unknown)}" if unknown else "all known to be harmless"),
    }
    if data["languages"]:
        rows["languages"] = f"{len(data['languages'])}: {' '.join(data['languages'])}"
    context = click.get_current_context(silent=True)
    lines = [f"{key:<13} {value}" for key, value in rows.items()]
    if context is not None and context.obj and context.obj.verbose:
        tensors = [f"  {line}" for line in fold(data["tensors"])]
        lines += ["", "tensors", *tensors, "", "globals", *(f"  {row['name']}" for row in data["globals"])]
    return lines


_SHAPE = {
    "encoder_layers": "layers",
    "encoder_embed_dim": "wide",
    "encoder_attention_heads": "heads",
}
