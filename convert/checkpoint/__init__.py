"""Read a fairseq checkpoint without fairseq, without torch, and without executing anything in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint.container import Container, open_container, tensors_in
from convert.checkpoint.dictionary import Dictionary, from_pickle
from convert.checkpoint.settings import read_settings
from convert.checkpoint.stacks import is_unstacked, stacked, unstack
from convert.checkpoint.unpickle import StoredTensor, Stub
from convert.errors import CheckpointError
from convert.rules import TensorSpec

__all__ = ["Checkpoint", "is_harmful", "is_harmless", "open_checkpoint"]

# What fairseq's trainers, all generations, are known to pickle. Everything here is inert even for `torch.load`.
_HARMLESS = {
    "__builtin__": {"bytearray", "complex", "dict", "frozenset", "list", "long", "object"}
    | {"set", "slice", "tuple", "unicode"},
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"}
    | {"set", "slice", "str", "tuple"},
    "collections": {"Counter", "OrderedDict", "defaultdict"},
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    "enum": {"Enum"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device", "float16", "float32", "float64", "bfloat16", "int32", "int64"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_tensor", "_rebuild_tensor_v2"},
    "torch.nn.parameter": {"Parameter"},
    "typing": {"Any"},
}
# Classes that hold data. Not all of fairseq: `fairseq.checkpoint_utils.load_checkpoint_to_cpu` would open another pickle.
_HARMLESS_CLASSES = re.compile(
    r"fairseq\.(data\.dictionary\.\w*Dictionary|(logging\.)?meters\.[A-Z]\w*Meter|dataclass\.(configs|constants)\.[A-Z]\w*"
    r"|(criterions|models|optim|tasks)\.[a-z0-9_.]+\.[A-Z]\w*Config)"
    r"|omegaconf\.(base\.(Container|ContainerMetadata|Metadata|Node)|dictconfig\.DictConfig|listconfig\.ListConfig"
    r"|nodes\.[A-Z]\w*Node)"
)
# No checkpoint needs these, and `torch.load` would run them.
_HARMFUL = {
    *(
        "_pickle",
        "_posixsubprocess",
        "asyncio",
        "atexit",
        "bdb",
        "cProfile",
        "cloudpickle",
        "code",
        "codeop",
        "commands",
    ),
    *(
        "copyreg",
        "copy_reg",
        "ctypes",
        "dill",
        "distutils",
        "functools",
        "http",
        "importlib",
        "inspect",
        "io",
        "itertools",
    ),
    *("joblib", "marshal", "multiprocessing", "nt", "operator", "os", "pdb", "pickle", "pip", "pkgutil", "platform"),
    *("popen2", "posix", "posixpath", "profile", "pty", "pydoc", "requests", "runpy", "shelve", "shutil", "signal"),
    *("site", "smtplib", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "timeit", "trace", "types"),
    *("urllib", "urllib2", "venv", "webbrowser", "xmlrpc", "zipimport", "builtins", "__builtin__", "_io", "_codecs"),
    *("ast", "cgitb", "codecs", "doctest", "ensurepip", "ftplib", "gc", "idlelib", "imaplib", "imp", "logging"),
    *("pandas", "poplib", "setuptools", "sqlite3", "tarfile", "telnetlib", "turtle", "unittest", "zipfile"),
}
_SLACK = 64_000_000  # bytes that the views of a small file may need beyond the file's size
_TENSOR, _TENSORS = 64, 1000  # bytes of a file for each tensor in it, of which there may be some more
_HARMFUL_NAMES = {"torch.load", "torch.hub.load", "torch.storage._load_from_bytes", "torch.serialization.load"}
_HARMFUL_NAMES |= {"torch.jit.load", "numpy.load", "numpy.loads", "numpy.testing._private.utils.runstring"}


def is_harmless(name: str) -> bool:
    """Say whether a pickle global is one that fairseq's trainers write.

    Example:
        >>> is_harmless("collections.OrderedDict"), is_harmless("os.system")
        (True, False)
    """
    module, _, last = name.rpartition(".")
    if module == "torch" and last.endswith("Storage"):
        return True
    return last in _HARMLESS.get(module, ()) or _HARMLESS_CLASSES.fullmatch(name) is not None


def is_harmful(name: str) -> bool:
    """Say whether a pickle global is one that could do harm where a real unpickler met it.

    Example:
        >>> is_harmful("builtins.eval"), is_harmful("my_project.tasks.MyTask")
        (True, False)
    """
    module = name.rpartition(".")[0]
    return not is_harmless(name) and (module.split(".")[0] in _HARMFUL or name in _HARMFUL_NAMES)


@dataclass(frozen=True, slots=True)
class Group:
    """Further tensors of a checkpoint, such as one language's adapter of an MMS file.

    Args:
        tensors: where each tensor is.
        dictionary: the target dictionary that belongs to them, or `None`.
    """

    tensors: dict[str, StoredTensor]
    dictionary: Dictionary | None


@dataclass(slots=True)
class Checkpoint:
    """An opened fairseq checkpoint: everything but the tensors' bytes. Use it as a context manager.

    Args:
        path: the file.
        container: the mapped file.
        layout: how its settings are kept: `cfg` (plain dict), `omegaconf`, `args` (a flat Namespace), or `unilm` (WavLM's).
        settings: the sections `model`, `task` and `criterion` as plain dicts.
        dictionary: the target dictionary of `task_state`, or `None`.
        tensors: where each tensor of `model` is.
        others: entries of `model` that are no tensors, such as data2vec's `_ema`.
        parts: the bytes of the tensors beside the model, by top-level key, such as the optimizer's state.
        groups: the adapters of MMS files by language.
        dictionaries: those of HuBERT's pretraining, whose symbols are the numbers of clusters.
    """

    path: Path
    container: Container
    layout: str
    settings: dict[str, Any]
    dictionary: Dictionary | None
    tensors: dict[str, StoredTensor]
    others: tuple[str, ...]
    parts: dict[str, int]
    groups: dict[str, Group] = field(default_factory=dict)
    dictionaries: tuple[Dictionary, ...] = ()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    @property
    def size(self) -> int:
        """The size of its files in bytes."""
        return self.container.size

    @property
    def globals(self) -> tuple[str, ...]:
        """Every global that the file's pickle names, sorted."""
        return tuple(sorted(map(str, self.container.globals)))

    @property
    def inventory(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every tensor of the model."""
        return self.inventory_of("")

    def tensors_of(self, group: str) -> dict[str, StoredTensor]:
        """Return where the tensors of a group are; of the model, if the name is empty."""
        return self.groups[group].tensors if group else self.tensors

    def over(self, group: str) -> dict[str, StoredTensor]:
        """Return where the model's tensors are once those of a group have replaced their namesakes."""
        return self.tensors | self.groups[group].tensors if group else self.tensors

    def inventory_of(self, group: str) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every tensor of a group."""
        return {
            name: TensorSpec(name, tensor.shape, self.container.dtype(tensor)[0])
            for name, tensor in self.tensors_of(group).items()
        }

    def sha256(self) -> str:
        """Hash its files, through the mapping."""
        from convert.transfer import sha256_of_all

        return sha256_of_all(self.container)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint that fairseq's trainer wrote, of any generation.

    Args:
        path: the `.pt` file.

    Returns:
        The checkpoint, mapped; no tensor byte is read. Close it, or use it in a `with` statement.

    Raises:
        CheckpointError: the file cannot be read, is something else, or tries to do something on loading.

    Example:
        >>> with open_checkpoint("checkpoints/espeak-wav2vec2-ctc.pt") as checkpoint:
        ...     checkpoint.settings["model"]["_name"]
        'wav2vec_ctc'
    """
    path = Path(path)
    container = open_container(path)
    try:
        return _read(path, container)
    except BaseException:
        container.close()
        raise


def _read(path: Path, container: Container) -> Checkpoint:
    # a name with dots walks attributes, `torch` and `os.system`; trainers name classes of modules only
    harmful = sorted(str(name) for name in container.globals if is_harmful(str(name)) or "." in name.name)
    if harmful:
        raise CheckpointError(
            f"{path.name}: its pickle wants to call {', '.join(harmful[:5])}; it was not executed, and nothing was written",
            code="hostile-pickle",
            key=harmful[0],
            hint="do not open this file with torch.load or fairseq; get the checkpoint from its author again",
        )
    top = container.value
    if isinstance(top, dict) and "model" not in top:
        raise _foreign(path, top)
    if not isinstance(top, dict) or not isinstance(top["model"], dict):
        raise CheckpointError(
            f"{path.name} holds no fairseq checkpoint but {_kind(top)}; nothing was written",
            code="foreign-file",
            key=path.name,
            hint="name the checkpoint that fairseq's trainer wrote, such as checkpoint_best.pt",
        )
    if "shard_metadata" in top or top.get("fsdp_metadata"):
        raise CheckpointError(
            f"{path.name} is one shard of a model that was trained fully sharded; its tensors are flattened pieces",
            code="shard",
            key=path.name,
            hint="join the shards with fairseq's scripts/consolidate_fsdp_shards.py, then convert the result",
        )
    model: dict[str, Any] = top["model"]
    strange = [name for name in model if not isinstance(name, str) or not name.isprintable()]
    if strange:
        raise CheckpointError(
            f"{path.name}: its model names a tensor {ascii(strange[0])[:60]}, which is no text; nothing was written",
            code="corrupted-model",
            key=path.name,
        )
    room = _Room(path.name, len(container.data) // _TENSOR + _TENSORS, len(container.data))
    tensors = _tensors(model, room)
    if not tensors:
        raise CheckpointError(f"{path.name}: its model holds no tensor", code="no-tensors", key=path.name)
    groups = _groups(top, room)
    found = [*tensors.values(), *(tensor for group in groups.values() for tensor in group.tensors.values())]
    total = sum(math.prod(tensor.shape) * container.dtype(tensor)[1] for tensor in found)
    if total > 2 * len(container.data) + _SLACK:  # a view with stride 0 repeats one number as often as its shape says
        raise CheckpointError(
            f"{path.name}: its tensors would take {total} bytes, and the file has {len(container.data)}; nothing was written",
            code="size-bomb",
            key=path.name,
            hint="get the checkpoint from its author again: no trainer writes such views",
        )
    layout, settings = read_settings(top, path.name)
    parts = {_printable(key): _bytes_in(container, value) for key, value in top.items() if key != "model"}
    return Checkpoint(
        path=path,
        container=container,
        layout=layout,
        settings=settings,
        dictionary=_dictionary(top, room),
        tensors=tensors,
        others=tuple(name for name, value in model.items() if not isinstance(value, StoredTensor)),
        parts={key: count for key, count in parts.items() if count},
        groups=groups,
        dictionaries=_dictionaries(top, room),
    )


@dataclass(slots=True)
class _Room:
    """How much a file of its size can hold: what stands in a pickle once may be named in it a million times.

    Args:
        name: the file's name, for errors.
        tensors: how many more tensors, adapters that are stacked counted one by one.
        letters: how many more letters of dictionaries.
    """

    name: str
    tensors: int
    letters: int

    def take(self, tensors: int = 0, letters: int = 0) -> None:
        """Use some of it.

        Raises:
            CheckpointError: `size-bomb`, when there is not so much.
        """
        self.tensors -= tensors
        self.letters -= letters
        if self.tensors < 0 or self.letters < 0:
            what = "tensors" if self.tensors < 0 else "symbols"
            raise CheckpointError(
                f"{self.name}: it names more {what} than a file of its size holds; nothing was written",
                code="size-bomb",
                key=self.name,
                hint="get the checkpoint from its author again: no trainer writes such files",
            )


def _tensors(model: dict[Any, Any], room: _Room) -> dict[str, StoredTensor]:
    """Take the tensors; adapters that are stacked for several languages one by one."""
    found = {name: value for name, value in model.items() if isinstance(value, StoredTensor)}
    room.take(tensors=sum(max(1, stacked(name, tensor.shape)) for name, tensor in found.items()))
    strange = next((name for name in found if is_unstacked(name)), None)
    if strange is not None:
        raise CheckpointError(
            f"{room.name}: its model names a tensor {strange}, as only an adapter out of a stack is called here",
            code="corrupted-model",
            key=strange,
        )
    return unstack(found, lambda tensor: tensor.shape, _row)


def _row(tensor: StoredTensor, index: int) -> StoredTensor:
    offset = tensor.offset + index * tensor.stride[0]
    return replace(tensor, offset=offset, shape=tensor.shape[1:], stride=tensor.stride[1:])


def _groups(top: dict[str, Any], room: _Room) -> dict[str, Group]:
    """Read `adapter`, which the MMS files hold: language -> its tensors and its dictionary."""
    found = top.get("adapter")
    if not isinstance(found, dict):
        return {}
    groups = {}
    for language, part in found.items():
        model = part.get("model") if isinstance(part, dict) else None
        strange = not isinstance(language, str) or not re.fullmatch(r"[\w-]{1,80}", language, re.ASCII)
        if strange or not isinstance(model, dict) or not all(map(_is_tensor, model.items())):
            raise CheckpointError(
                f"{room.name}: its adapter of {ascii(language)[:60]} is no language's tensors; nothing was written",
                code="corrupted-model",
                key=room.name,
            )
        groups[language] = Group(_tensors(model, room), _dictionary(part, room))
    return groups


def _is_tensor(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and entry[0].isprintable() and isinstance(entry[1], StoredTensor)


def _bytes_in(container: Container, value: Any) -> int:
    storages = {tensor.storage.key: container.dtype(tensor)[1] for tensor in tensors_in(value, container.path.name)}
    return sum(container.storages[key].count for key in storages)


def _dictionary(top: dict[str, Any], room: _Room) -> Dictionary | None:
    state = top.get("task_state")
    if not isinstance(state, dict):
        return None
    return _symbols(state.get("target_dictionary"), room)


def _dictionaries(top: dict[str, Any], room: _Room) -> tuple[Dictionary, ...]:
    state = top.get("task_state")
    listed = state.get("dictionaries") if isinstance(state, dict) else None
    found = [_symbols(value, room) for value in listed] if isinstance(listed, list) else []
    whole = [dictionary for dictionary in found if dictionary is not None]
    return tuple(whole) if len(whole) == len(found) else ()


def _symbols(value: Any, room: _Room) -> Dictionary | None:
    state = value.state if isinstance(value, Stub) and isinstance(value.state, dict) else {}
    symbols = state.get("symbols")
    if isinstance(symbols, list):
        room.take(letters=sum(1 + len(symbol) if isinstance(symbol, str) else 1 for symbol in symbols))
    return from_pickle(value, room.name)


def _printable(key: Any) -> str:
    return str(key) if str(key).isprintable() else ascii(key)


def _kind(value: Any) -> str:
    return "a module or object" if not isinstance(value, (list, tuple, str, int)) else f"a {type(value).__name__}"


def _foreign(path: Path, top: dict[Any, Any]) -> CheckpointError:
    keys: Iterator[str] = (_printable(key) for key, value in top.items() if isinstance(value, StoredTensor))
    first = next(keys, "")
    what = "a dict without a `model`"
    hint = "name the checkpoint that fairseq's trainer wrote, such as checkpoint_best.pt"
    if first.startswith(("wav2vec2.", "hubert.", "data2vec_audio.", "wavlm.", "lm_head", "masked_spec_embed")):
        what, hint = "a transformers state_dict, which is a Hugging Face model already", "load it with transformers"
    elif first:
        what = f"a bare state_dict (first tensor: {first}) without settings"
    return CheckpointError(
        f"{path.name} holds {what}; nothing was written", code="foreign-file", key=path.name, hint=hint
    )
