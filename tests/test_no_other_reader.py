"""No code of the product lets another library open a checkpoint, and none evaluates or imports what a file says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from command_line import ROOT

PRODUCT = sorted((ROOT / "convert").rglob("*.py"))
# packages that unpickle, or run what they read
PACKAGES = {"_pickle", "cloudpickle", "code", "dill", "joblib", "marshal", "pickle", "pickle5", "runpy", "shelve"}
# functions of whatever object: fairseq's that open a checkpoint or import a user's module, torch's and numpy's, yaml's
FUNCTIONS = {"load_checkpoint_to_cpu", "load_model_ensemble", "load_model_ensemble_and_task", "import_user_module"}
FUNCTIONS |= {"load_pretrained_component_from_model", "load_state_dict_from_url", "load_url", "Unpickler"}
FUNCTIONS |= {"genfromtxt", "fromfile", "unsafe_load", "full_load", "read_pickle", "Loader", "UnsafeLoader", "hub"}
# of these, `load` and `loads` read text alone
TEXT = {"json", "tomllib"}
SAFE = {"allow_pickle": "False", "trust_remote_code": "False", "weights_only": "True"}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in node.bases]


def other_readers(source: str) -> list[str]:
    """Name every use of what opens, evaluates or imports by a file's word; `load` of anything but text and our own."""
    tree, found = ast.parse(source), []
    own = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.level or str(node.module).split(".")[0] == "convert")
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    safe = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and _bases(node) == ["yaml.SafeLoader"]
    }
    plain = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and {ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"} & safe
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES or alias.name == "torch.hub"
            ]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            taken = {alias.name for alias in node.names}
            module = str(node.module)
            strange = module.split(".")[0] in PACKAGES or (
                module.split(".")[0] in ("torch", "numpy") and "load" in taken
            )
            found += [module] if strange or (taken & FUNCTIONS and module.split(".")[0] != "convert") else []
        elif isinstance(node, ast.Attribute):
            root = node.value.id if isinstance(node.value, ast.Name) else ""
            loads = node.attr in ("load", "loads") and root not in TEXT | own and node not in plain
            if node.attr in FUNCTIONS or loads:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Name) and node.id in BUILTINS - own:
            found.append(node.id)
        elif isinstance(node, ast.keyword) and node.arg in SAFE and ast.unparse(node.value) != SAFE[node.arg]:
            found.append(node.arg)
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_reader(path: Path) -> None:
    assert other_readers(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import torch.hub",
            "from torch import load as read",
            "import joblib",
        ),
        *("torch.load(path)", "torch.load", "numpy.load(path)", "torch.jit.load(path)", "torch.hub.load('a', 'b')"),
        *(
            "from fairseq.checkpoint_utils import load_checkpoint_to_cpu",
            "checkpoint_utils.load_model_ensemble([path])",
        ),
        *(
            "eval(text)",
            "exec(text)",
            "__import__(text)",
            "getattr(torch, 'x'); checkpoint_utils.load_checkpoint_to_cpu(p)",
        ),
        *(
            "read(path, allow_pickle=True)",
            "from_pretrained(path, trust_remote_code=True)",
            "yaml.load(text, yaml.Loader)",
            "class A(yaml.Loader): ...\nyaml.load(text, Loader=A)",
        ),
        *(
            "numpy.fromfile(path)",
            "pandas.read_pickle(path)",
            "utils.import_user_module(args)",
            "f(path, weights_only=False)",
        ),
    ],
)
def test_it_would_be_seen(source: str) -> None:
    assert other_readers(source)


@pytest.mark.parametrize(
    "source", ["json.load(file)", "from convert.checkpoint.unpickle import load\nload(data)", "path.read_bytes()"]
)
def test_what_reads_text_is_left_alone(source: str) -> None:
    assert not other_readers(source)
