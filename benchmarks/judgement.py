"""How far verification can see in float64, from both ends, on models of every family.

Near: each model is recorded and verified, live and with a recording from another environment, in every environment of
`tests/support/environments.py`; printed is how near a correct model came to what is a mistake: at most 0.25 is promised.
Far: one number of one tensor is moved by one unit in float32's last place, many times; printed is which share of these
faults stands out in the outputs of one input (the byte comparison names every one).

Usage: `python benchmarks/judgement.py [NAME ...] [--environments N] [--faults N] [--directory DIR] [--small]`. NAME is one of
`tests/support/many_models.py`, by default one of each family and norm; `all` of them; or a family and a size, such as
`wav2vec2-large`, for a model of a released size as fairseq initialises it (`base`: 94M parameters, `large`: 317M). `--small`:
one model, two environments and two faults.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import ROOT, describe

sys.path.insert(0, str(ROOT / "tests/support"))


def main() -> None:
    """Make the models, run both ends, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--environments", type=int, help="how many, the most unlike first; by default all")
    parser.add_argument("--faults", type=int, default=45)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    parser.add_argument("--small", action="store_true", help="to see that it runs")
    asked = parser.parse_args()
    from many_models import FEW, MODELS, make_models

    names = asked.names or (["wav2vec2-ctc_base"] if asked.small else list(FEW))
    names = list(MODELS) if names == ["all"] else names
    with tempfile.TemporaryDirectory(dir=asked.directory) as folder:
        work = Path(folder)
        make_models(work, *names)
        near(work, 2 if asked.small else asked.environments)
        for name in names:
            far(work, name, 2 if asked.small else asked.faults)


def near(work: Path, count: int | None) -> None:
    """Print how near each model came, and where."""
    from environments import ENVIRONMENTS, run

    rows: list[tuple[str, dict[str, Any]]] = []
    before: tuple[str, ...] = ()
    for name in unlike(list(ENVIRONMENTS))[:count]:
        rows += [(name, row) for row in run(work, name, before) if row["model"]]
        before = (name,)
    blamed = [(name, row["model"], row["against"], row["problems"]) for name, row in rows if row["problems"]]
    environments = len({name for name, _ in rows})
    print(describe())
    print(f"{len(rows)} verifications of correct models in {environments} environments, {len(blamed)} blamed")
    for name, model, against, problems in blamed:
        print(f"  {model} in {name} against {against}: {problems[0]}")
    for model in sorted({row["model"] for _, row in rows}):
        worst = max((row["nearest"], name, row["against"]) for name, row in rows if row["model"] == model)
        (ratio, probe, stage), name, against = worst
        print(f"  {model:<36} {ratio:.3f} of what is allowed  ({probe}, {stage}; {name} against {against})", flush=True)


def unlike(names: Sequence[str]) -> list[str]:
    """Order the environments so that each is as unlike the one before as can be."""
    left, found = list(names[:-1]), [names[-1]]  # the last computes its products with another library's rules
    while left:
        before = found[-1].split("-")
        found.append(max(left, key=lambda name: sum(a != b for a, b in zip(name.split("-"), before, strict=False))))
        left.remove(found[-1])
    return found


def far(work: Path, name: str, faults: int) -> None:
    """Print which share of faults of one unit in the last place stands out in float64."""
    import numpy as np
    import torch

    from convert.directory import ModelDirectory
    from convert.request import request_again
    from convert.sources import dictionary_beside, open_source
    from convert.verification.compare import Difference
    from convert.verification.device_run import CLIP, LONG
    from convert.verification.inputs import SPEECH, bundled, probes
    from convert.verification.judge import compared, judge
    from convert.verification.reference import Live, tensor
    from convert.verification.subject import read_subject
    from convert.verification.target import load

    choice, model = random.Random(name), work / "models" / name
    directory, folder = ModelDirectory(model), work / "checkpoints" / name
    checkpoint = folder / "model.pt" if (folder / "model.pt").exists() else folder
    with open_source(checkpoint, **directory.record.asked.opening) as opened, torch.no_grad():
        request = request_again(directory, opened, dictionary=dictionary_beside(opened))
        subject, geometry = read_subject(opened, request)
        clips = {SPEECH: bundled()[:16000]}
        wanted = [probe for probe in probes(geometry, clips, rate=subject.rate) if probe.name != LONG]
        target = load(model, "cpu")
        judged = judge(Live(subject, clips, "cpu"), target, clips, wanted, normalize=subject.normalize, measured=CLIP)
        clip = next(one for one in judged if one.probe.name == CLIP)
        del judged
        allowed = {one.stage: one.exact_allowed for one in clip.differences if one.exact_allowed}
        floors = {one.stage: one.allowed for one in clip.differences}
        batch = tensor(clips, clip.probe, subject.normalize)
        silent = ["masked_spec_embed", "k_proj.bias", "linear_k.bias"]  # no output depends on them
        if "pos_conv" not in target.stages:  # conformers have one that neither side uses
            silent += [key for key in target.weights if "pos_conv_embed" in key]
        names = sorted(
            key
            for key, value in target.weights.items()
            if value.is_floating_point() and bool(value.any()) and not key.endswith(tuple(silent))
        )

        def moved(key: str, at: int) -> list[Difference]:
            flat = target.weights[key].reshape(-1)
            kept = float(flat[at])
            flat[at] = float(np.nextafter(np.float32(kept), np.float32(np.inf)))
            try:
                with target.resumed(layers, [key]):
                    found = compared(target, clip.exact, batch)[1]
            finally:
                flat[at] = kept
            return [one for one in found if not one.note]

        seen, sizes = 0, []
        with target.arithmetic("float64"):
            target.kept = layers = {}
            compared(target, clip.exact, batch)
            target.kept = None
            for _ in range(faults):
                key = choice.choice(names)
                at = choice.choice(target.weights[key].reshape(-1).nonzero()[:, 0].tolist())
                found = moved(key, at)
                seen += any(one.greatest > allowed[one.stage] for one in found if one.stage in allowed)
                sizes.append(max(one.greatest / floors[one.stage] for one in found if floors.get(one.stage)))
    smallest, middle = (float(np.log2(max(value, 1e-30))) for value in (min(sizes), float(np.median(sizes))))
    print(
        f"  {name:<36} {seen} of {faults} one-unit faults stand out; they move outputs by 2^{smallest:.1f} of float32's "
        f"floor and more, the middle one by 2^{middle:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
