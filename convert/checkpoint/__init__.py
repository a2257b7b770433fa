"""Read a fairseq checkpoint without fairseq, without torch, and without executing anything in it.

In: a file, whoever wrote it. `layouts` finds the bytes, `unpickle` reads the index as data, `finding` looks in it for a
state_dict, settings and dictionaries, `opening` puts them together. Out: a `Checkpoint`, under fairseq's own names.
"""

from convert.checkpoint.contents import Group
from convert.checkpoint.finding import Anchor
from convert.checkpoint.opened import Base, Checkpoint, Origin
from convert.checkpoint.opening import open_checkpoint
from convert.checkpoint.pickled import is_harmful, is_harmless

__all__ = ["Anchor", "Base", "Checkpoint", "Group", "Origin", "is_harmful", "is_harmless", "open_checkpoint"]
