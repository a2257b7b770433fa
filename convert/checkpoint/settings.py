"""Turn the settings of any fairseq generation into one plain dict: `{"model": ..., "task": ..., "criterion": ...}`.

fairseq has kept them as an `argparse.Namespace` (until 2020, everything flat), as a pickled omegaconf `DictConfig`
(2.0 and 2.1 layouts, with unresolved `${...}`), and as a plain dict (since May 2021). Microsoft's unilm released models
with the settings of the model alone.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from convert.checkpoint.stored import Global, StoredTensor, Stub
from convert.errors import CheckpointError

SECTIONS = ("model", "task", "criterion")
_DEPTH, _NODES = 60, 200_000
_TRAIL, _TEXT = 16, 4_000_000  # references that lead to one another; characters, and those that references expand to
_GEOMETRY = {"conv_feature_layers", "encoder_attention_heads", "encoder_embed_dim", "encoder_layers"}
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")


class TooLargeError(Exception):
    """Settings are deeper or larger than any trainer writes."""


def read_settings(top: Mapping[Any, Any], name: str) -> tuple[str, dict[str, Any]] | None:
    """Read the settings that stand beside a state_dict.

    Args:
        top: what holds it: with `cfg` (fairseq since 2020-11), `args` (before), or `model_cfg` and `task_cfg` (s3prl).
        name: the file's name, for errors.

    Returns:
        The layout (`cfg`, `omegaconf`, `args`, `unilm` or `s3prl`), and the settings with the sections `model`, `task` and
        `criterion`; `None`, when there are none, or those of another program.
        `settings["model"]["w2v_args"]`, where a fine-tuned model has it, is a dict of the same sections, or `None`.

    Raises:
        CheckpointError: `corrupted-settings`, when they are not plain data.
    """
    for key in ("cfg", "args"):
        found = None if top.get(key) is None else read_any(top[key], name)
        if found is not None:
            return (key if key == "args" and found[0] != "unilm" else found[0]), found[1]
    if isinstance(top.get("model_cfg"), (dict, Stub)):
        with _bounded(name):
            return "s3prl", _sections({part: plain_data(top.get(f"{part}_cfg")) for part in SECTIONS})
    return None


def read_any(value: object, name: str) -> tuple[str, dict[str, Any]] | None:
    """Read settings as `read_settings` does, wherever they stand: `None`, when they are those of another program."""
    with _bounded(name):
        plain = _resolved(plain_data(value))
        if _is_unilms(plain):
            return "unilm", _unilm(plain)
        settings = _sections(plain)
        if _is_fairseqs(plain, settings["model"]):
            return "omegaconf" if isinstance(value, Stub) else "cfg", settings
    return None


@contextlib.contextmanager
def _bounded(name: str) -> Iterator[None]:
    try:
        yield
    except (TooLargeError, RecursionError):
        raise CheckpointError(
            f"{name}: its settings are deeper or larger than any trainer writes; nothing was written",
            code="corrupted-settings",
            key=name,
        ) from None


def might_be_settings(parts: Mapping[Any, Any]) -> bool:
    """Say whether a part of a file may be settings of a fairseq model, by its keys alone."""
    model = parts.get("model")
    inside = content_of(model) if isinstance(model, Stub) else model
    return any(isinstance(one, dict) and _is_model(one) for one in (parts, inside))


def _is_model(model: Mapping[Any, Any]) -> bool:
    """Say whether settings are those of a model: it is fine-tuned from another one, or they say how large its encoder is."""
    return bool({"w2v_args", "w2v_path"} & model.keys()) or len(_GEOMETRY & model.keys()) > 1


def read_generation(top: Mapping[Any, Any]) -> dict[str, Any]:
    """Read how fairseq generates unless it is told otherwise: the section `generation`; empty where there is none."""
    with contextlib.suppress(TooLargeError, RecursionError):
        plain = plain_data(top.get("cfg"))
        section = plain.get("generation") if isinstance(plain, dict) else None
        return section if isinstance(section, dict) else {}
    return {}


def _is_fairseqs(plain: Any, model: Mapping[str, Any]) -> bool:
    """Say whether settings are those of a fairseq model: another program's `args` lie beside a state_dict, too."""
    named = isinstance(model.get("_name"), str) and ("task" in plain or "criterion" in plain)
    return named or _is_model(model)


def _sections(plain: Any) -> dict[str, Any]:
    """Give a flat Namespace the sections that hydra's settings have; nested `w2v_args` likewise."""
    if not isinstance(plain, dict):
        return {"model": {}, "task": {}, "criterion": {}}
    if isinstance(plain.get("model"), dict):
        settings = {section: dict(plain.get(section) or {}) for section in SECTIONS if _is_section(plain.get(section))}
        settings = {section: settings.get(section, {}) for section in SECTIONS}
        if "arch" in settings["model"]:  # a Namespace inside of `cfg`: a model without a dataclass in fairseq
            settings["model"]["flat"] = True
    elif "_name" in plain and "arch" not in plain and not isinstance(plain.get("task"), str):  # of the model alone
        settings = {"model": dict(plain), "task": {}, "criterion": {}}
    else:
        flat = {key: value for key, value in plain.items() if key not in ("arch", "task", "criterion", "_name")}
        names = {"model": plain.get("arch") or plain.get("_name"), "task": plain.get("task")}
        names["criterion"] = plain.get("criterion")
        settings = {section: {"_name": names[section]} | flat for section in SECTIONS}
        settings["model"]["flat"] = True
    inner = settings["model"].get("w2v_args")
    if isinstance(inner, str):
        with contextlib.suppress(ValueError):  # of JSON; another text says nothing
            settings["model"]["w2v_args"] = inner = _resolved(plain_data(json.loads(inner)))
    if isinstance(inner, dict):
        settings["model"]["w2v_args"] = _sections(inner)
    return settings


def _is_unilms(plain: object) -> bool:
    return isinstance(plain, dict) and not {"model", "_name", "arch"} & plain.keys() and "gru_rel_pos" in plain


def _unilm(plain: dict[str, Any]) -> dict[str, Any]:
    """Give unilm's settings sections: they do not name the model, and say themselves whether its input is normalised."""
    task = {"normalize": plain.get("normalize", False)}  # as unilm's class says where a file is silent
    return {"model": plain, "task": task, "criterion": {}}


def _is_section(value: object) -> bool:
    return value is None or isinstance(value, dict)


def plain_data(value: object) -> Any:
    """Turn what a pickle or a YAML file held into dicts, lists, texts and numbers.

    Raises:
        TooLargeError: it is deeper or larger than any trainer writes.
    """
    nodes, letters = [_NODES], [_TEXT]

    def walk(item: object, depth: int) -> Any:
        nodes[0] -= 1
        letters[0] -= len(item) if isinstance(item, (str, bytes)) else 0  # one text may stand there many times
        if depth > _DEPTH or nodes[0] < 0 or letters[0] < 0:
            raise TooLargeError
        if isinstance(item, dict):
            return {str(walk(key, depth + 1)): walk(child, depth + 1) for key, child in item.items()}
        if isinstance(item, (list, tuple)):
            return [walk(child, depth + 1) for child in item]
        if isinstance(item, Stub):
            return walk(content_of(item), depth + 1)
        if isinstance(item, str):  # Python keeps a byte that is no UTF-8 as a lone surrogate, which JSON cannot hold
            return item if item.isascii() else item.encode("utf-8", "replace").decode()
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise TooLargeError
        if item is None or isinstance(item, (bool, int, float)):
            return item
        if isinstance(item, bytes):
            return item.decode("latin1")
        if isinstance(item, (Global, StoredTensor)):
            return str(item) if isinstance(item, Global) else None
        return sorted(map(str, item)) if isinstance(item, set) else str(item)

    return walk(value, 0)


def content_of(stub: Stub) -> Any:
    """Return what an object of a class that was not imported stands for."""
    state = stub.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = (state[0] or {}) | state[1] if isinstance(state[0], (dict, type(None))) else state[1]  # slots
    if stub.type.module.startswith("omegaconf"):
        if isinstance(state, dict):
            if "_content" in state:  # DictConfig, ListConfig (a dict, a list, None or '${...}')
                return state["_content"]
            if "content" in state:  # omegaconf 1
                return state["content"]
            if "_val" in state:  # AnyNode and its children
                return state["_val"]
        return stub.items or None
    if stub.items:  # of a class derived from dict or list
        pairs = all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in stub.items)
        return dict(stub.items) if pairs else stub.items
    if isinstance(state, dict):  # argparse.Namespace, and settings that are dataclass instances
        return state
    if len(stub.args) == 1 and state is None:  # an enum member: Class(value); pathlib's paths
        return stub.args[0]
    return stub.args[-1] if stub.args else None


def _resolved(root: Any) -> Any:
    """Resolve `${section.key}` against the root, as omegaconf does; what cannot be resolved stays as it stands."""
    left = [_TEXT]

    def spend(letters: int) -> None:
        left[0] -= letters
        if left[0] < 0:
            raise TooLargeError

    def find(path: str, trail: tuple[str, ...]) -> Any:
        value: Any = root
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                raise KeyError(path)
            value = value[part]
        return resolve(value, (*trail, path))

    def text(path: str, trail: tuple[str, ...]) -> str:
        found = find(path, trail)
        if isinstance(found, (dict, list)):  # omegaconf refuses it too
            raise KeyError(path)
        spend(len(str(found)))
        return str(found)

    def resolve(value: Any, trail: tuple[str, ...]) -> Any:
        if not isinstance(value, str) or "${" not in value or len(trail) > _TRAIL:
            return value
        spend(len(value))
        whole = _REFERENCE.fullmatch(value)
        try:
            if whole:
                return value if whole[1] in trail else find(whole[1], trail)
            return _REFERENCE.sub(lambda match: text(match[1], (*trail, match[1])), value)
        except (KeyError, RecursionError):
            return value

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(child) for key, child in value.items()}
        if isinstance(value, list):
            return [walk(child) for child in value]
        return resolve(value, ())

    if (
        isinstance(root, dict)
        and isinstance(root.get("model"), dict)
        and isinstance(root["model"].get("w2v_args"), dict)
    ):
        # the pretrained model's settings are a tree of their own: their references start at their own root
        own = _resolved(root["model"]["w2v_args"])
        resolved = walk({**root, "model": {k: v for k, v in root["model"].items() if k != "w2v_args"}})
        resolved["model"]["w2v_args"] = own
        return resolved
    return walk(root)
