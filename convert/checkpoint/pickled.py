"""The names that a pickle refers to: those that fairseq's trainers write, and those that would do harm elsewhere."""

from __future__ import annotations

import re

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
