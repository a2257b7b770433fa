"""An environment that holds what `pip install fairseq-to-hf` brings, and nothing else: no torch, transformers, safetensors."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from command_line import ROOT
from packaging.requirements import Requirement


def needed(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Collect a package and everything that it needs, without extras."""
    if name in found:
        return found
    try:
        found[name] = distribution(name)
    except PackageNotFoundError:  # needed on other systems or Pythons only
        return found
    for line in found[name].requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, found)
    return found


def make(folder: Path) -> dict[str, str]:
    """Link the packages into a folder; return the environment of `run`."""
    folder.mkdir()
    for name, package in needed("fairseq-to-hf", {}).items():
        for file in package.files or ():
            top = file.parts[0]
            place = Path(str(package.locate_file(top)))
            if top in ("..", "__pycache__") or (name == "fairseq-to-hf" and not top.endswith(".dist-info")):
                continue
            if not (folder / top).exists() and place.exists():
                (folder / top).symlink_to(place)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS"))}
    return kept | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}


def run(environment: dict[str, str], *words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python there: without `site`, and so without the packages of this environment."""
    line = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, **options)  # type: ignore[call-overload]
