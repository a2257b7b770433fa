"""Reading a checkpoint with fairseq's loader."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .building import architectures, encoders


@contextlib.contextmanager
def _mapped_load() -> Any:
    """Let `torch.load` unpickle fairseq's objects (since torch 2.6 it refuses them), and map the file where it can."""
    original = torch.load

    def patched(file: Any, *_: Any, **__: Any) -> Any:
        path = getattr(file, "name", file)
        for options in ({"weights_only": False, "mmap": True}, {"weights_only": False}, {}):
            try:
                return original(path, map_location="cpu", **options)
            except (TypeError, RuntimeError, ValueError) as error:
                if not options:
                    raise
                if not any(word in str(error) for word in ("mmap", "weights_only", "keyword")):
                    raise
        raise AssertionError("unreachable")

    torch.load = patched  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _plain(value: Any) -> Any:
    """Turn omegaconf's containers and Namespaces into dicts and lists."""
    if type(value).__module__.split(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        return _plain(OmegaConf.to_container(value, resolve=True))
    if hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def _own_settings(state: Any) -> Any:
    """The settings as fairseq's own loader read them: `{"model", "task", "criterion"}`."""
    plain = _plain(state.get("cfg") or state.get("args"))
    if not isinstance(plain.get("model"), dict):
        names = {"model": plain.get("arch"), "task": plain.get("task"), "criterion": plain.get("criterion")}
        plain = {section: dict(plain, _name=name) for section, name in names.items()}
    inner = plain["model"].get("w2v_args")
    if isinstance(inner, dict) and not isinstance(inner.get("model"), dict):
        inner = {"model": dict(inner, _name=inner.get("arch") or "wav2vec2"), "task": dict(inner)}
        plain["model"] = dict(plain["model"], w2v_args=inner)
    pretrained = [*encoders(), *(name for name in architectures() if name.startswith("s2t_"))]
    if plain["model"]["_name"] not in pretrained and not isinstance(inner, dict):
        raise ValueError("w2v_args is empty")
    return plain


def read_checkpoint(path: str, settings: Any) -> tuple[Any, Any, str]:
    """Read a checkpoint with fairseq's loader, or where that fails, with torch's and the settings that were passed.

    Returns:
        The checkpoint's dict, its settings, and who read the settings.
    """
    from fairseq import checkpoint_utils

    with _mapped_load():
        try:
            state = checkpoint_utils.load_checkpoint_to_cpu(path)
            return state, _own_settings(state), "fairseq's loader"
        except Exception as error:
            reason = ("%s: %s" % (type(error).__name__, error)).split("\n")[0][:160].replace(path, "CHECKPOINT")
        return torch.load(path), settings, "fairseq-to-hf's reader, because fairseq's loader failed (%s)" % reason
