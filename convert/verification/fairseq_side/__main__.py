"""Run the folder by itself: `python fairseq_side REQUEST.json`. Neither the folder nor its parent stays on `sys.path`."""

import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != FOLDER]

import importlib  # noqa: E402
import types  # noqa: E402

if __name__ == "__main__":
    package = types.ModuleType("fairseq_side")
    package.__path__ = [FOLDER]
    sys.modules[package.__name__] = package
    sys.exit(importlib.import_module("fairseq_side.recording").main(sys.argv[1]))
