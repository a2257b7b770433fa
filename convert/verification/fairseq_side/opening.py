"""Opening a reference: fairseq's model, built from settings and filled with a checkpoint's tensors."""

from __future__ import annotations

from typing import Any

from .building import architectures, build, no_random_numbers
from .importing import CannotBuildError, import_fairseq
from .reading import read_checkpoint
from .reference import Reference


def open_reference(request: Any) -> Reference:
    """Build fairseq's model from a checkpoint and fill it with the checkpoint's tensors, strictly.

    Args:
        request: `checkpoint` (a path), `architecture` (fairseq's name), `settings` (see `build`; used when fairseq cannot
            read its own), `symbols` (the dictionary, or an empty list), `post_process`, `device`; of a model with adapters
            `languages` (name -> index among them) and `language` (the one it speaks unless told otherwise).

    Raises:
        CannotBuildError: fairseq is absent, or cannot build this model.
    """
    fairseq, patches = import_fairseq()
    known = dict(request["settings"])  # omegaconf dropped the name for a time
    known["model"] = dict(known["model"], _name=request["architecture"])
    state, settings, reader = read_checkpoint(request["checkpoint"], known)
    ignored: list[str] = []
    symbols = len(request["symbols"])
    if state.get("adapter"):  # MMS: the model has a head of its own, that the language's replaces
        symbols = len(state["model"]["w2v_encoder.proj.bias"])
    try:
        with no_random_numbers():
            model = build(settings, symbols, ignored, patches)
    except Exception as error:
        if settings is known:
            raise CannotBuildError("fairseq cannot build the model: %s: %s" % (type(error).__name__, error))
        settings, ignored = known, []
        reader = "fairseq-to-hf's reader, because fairseq could not use its own (%s)" % type(error).__name__
        with no_random_numbers():
            model = build(settings, symbols, ignored, patches)
    reference: Reference = architectures()[settings["model"]["_name"]][1](model, fairseq, request, settings)
    reference.info = {
        "fairseq": getattr(fairseq, "__version__", "unknown"),
        "settings": reader,
        "ignored_settings": ignored,
        "patches": patches,
    }
    patches.append("torch.load with weights_only=False while fairseq reads the checkpoint, whose globals were checked")
    patches.append("in float64: Fp32GroupNorm, Fp32LayerNorm and gelu compute in float64, to measure floors")
    reference.fill(state["model"])
    task_state = state.get("task_state")
    reference.dictionary = (task_state or {}).get("target_dictionary") if isinstance(task_state, dict) else None
    reference.adapters = state.get("adapter") or {}
    reference.speak("")
    return reference
