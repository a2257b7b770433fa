"""The names that a pickle refers to: what other programs would do with each. None is imported here."""

from __future__ import annotations

import re
import sys

# What fairseq's trainers, all generations, are known to pickle: types of plain data, torch's and numpy's constructors, and
# classes that hold settings, symbols and counts
_USUAL = re.compile(
    r"(builtins|__builtin__)\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|long|object|set|slice|str|tuple|unicode)"
    r"|collections\.(Counter|OrderedDict|defaultdict)|argparse\.Namespace|_codecs\.encode|copy_?reg\._reconstructor"
    r"|enum\.Enum|pathlib\.(Pure)?(Posix)?Path|typing\.Any"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.(\w*Storage|Size|device|b?float\d+|int\d+)|torch\._utils\._rebuild_(parameter|parameter_with_state|tensor|tensor_v2)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|fairseq\.(data\.dictionary\.\w*Dictionary|(logging\.)?meters\.[A-Z]\w*Meter|dataclass\.(configs|constants)\.[A-Z]\w*"
    r"|(criterions|models|optim|tasks)\.[a-z0-9_.]+\.[A-Z]\w*Config)"
    r"|omegaconf\.(base\.(Container|ContainerMetadata|Metadata|Node)|dictconfig\.DictConfig|listconfig\.ListConfig"
    r"|nodes\.[A-Z]\w*Node)"
)
# modules of the standard library whose names stand for data
_DATA = {"argparse", "array", "collections", "dataclasses", "datetime", "decimal", "enum", "fractions", "ipaddress"}
_DATA |= {"numbers", "pathlib", "random", "re", "time", "typing", "uuid"}


def is_harmless(name: str) -> bool:
    """Say whether a pickle global is one that fairseq's trainers write.

    Example:
        >>> is_harmless("collections.OrderedDict"), is_harmless("os.system")
        (True, False)
    """
    return _USUAL.fullmatch(name) is not None


def is_harmful(name: str) -> bool:
    """Say whether a pickle global could do harm in another program: a function of the standard library, or one that loads.

    Nothing of it happens here, and no checkpoint needs it; a user should know such a file all the same.

    Example:
        >>> is_harmful("builtins.eval"), is_harmful("torch.load"), is_harmful("my_project.tasks.MyTask")
        (True, True, False)
    """
    module, _, last = name.rpartition(".")
    of_python = module.split(".")[0] in sys.stdlib_module_names - _DATA or module.startswith(
        ("__builtin__", "copy_reg")
    )
    return not is_harmless(name) and (of_python or last.lstrip("_").startswith("load"))
