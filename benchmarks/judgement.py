"""How far verification can see in float64, from both ends, on models of every family.

Near: each model is recorded and verified, live and with a recording from another environment, in every environment of
`tests/support/environments.py`; printed is how near a correct model came to what is a mistake: at most 0.25 is promised. Far: one
number of one tensor is moved by one unit in float32's last place, many times; printed is which share of these faults stands
out in the outputs of one input (the byte comparison names every one). Usage: `python benchmarks/judgement.py [--faults N]
[--small | --large]`: two environments and few faults, to see that it runs; or faults in a model of 317M parameters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))


def main() -> None:
    """Make the models, run both ends, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=45)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="two environments, few faults")
    size.add_argument("--large", action="store_true", help="faults in a model of 317M parameters")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        work = Path(name)
        if asked.large:
            far(large_model(work), asked.faults)
            return
        from many_models import make_models

        make_models(work)
        near(work, 2 if asked.small else None)
        for model in sorted(path for path in (work / "models").iterdir() if path.is_dir()):
            far(model, 2 if asked.small else asked.faults)


def large_model(work: Path) -> Path:
    """Make a checkpoint of 317M parameters and convert it."""
    from large import dictionary, save

    from convert.package import convert

    checkpoint = save(work / "large.pt")
    return convert(checkpoint, work / "large", dictionary=dictionary(work / "large.txt")).path


def near(work: Path, count: int | None) -> None:
    """Print how near each model came, and where."""
    from environments import ENVIRONMENTS, run

    rows: list[tuple[str, dict[str, Any]]] = []
    before: tuple[str, ...] = ()
    for name in list(ENVIRONMENTS)[:count]:
        rows += [(name, row) for row in run(work, name, before) if row["model"]]
        before = (name,)
    blamed = [(name, row["model"], row["against"], row["problems"]) for name, row in rows if row["problems"]]
    print(
        f"{len(rows)} verifications of correct models in {len(list(ENVIRONMENTS)[:count])} environments, {len(blamed)} blamed"
    )
    for name, model, against, problems in blamed:
        print(f"  {model} in {name} against {against}: {problems[0]}")
    for model in sorted({row["model"] for _, row in rows}):
        worst = max((row["nearest"], name, row["against"]) for name, row in rows if row["model"] == model)
        (ratio, probe, stage), name, against = worst
        print(f"  {model:<36} {ratio:.3f} of what is allowed  ({probe}, {stage}; {name} against {against})")


def far(model: Path, faults: int) -> None:
    """Print which share of faults of one unit in the last place stands out in float64."""
    import numpy as np
    import torch

    from convert.directory import ModelDirectory
    from convert.request import request_again
    from convert.sources import open_source
    from convert.verification.compare import Difference
    from convert.verification.device_run import CLIP
    from convert.verification.inputs import SPEECH, bundled, probes
    from convert.verification.judge import compared, judge
    from convert.verification.reference import Live, tensor
    from convert.verification.subject import read_subject
    from convert.verification.target import load

    choice, directory = np.random.default_rng(0), ModelDirectory(model)
    checkpoint, letters = model.with_suffix(".pt"), model.with_suffix(".txt")
    options = {"dictionary": letters} if letters.exists() else {}
    with open_source(checkpoint, **options) as opened, torch.no_grad():
        subject, geometry = read_subject(opened, request_again(directory, opened))
        clips = {SPEECH: bundled()[:16000]}
        wanted = [probe for probe in probes(geometry, clips, rate=subject.rate) if probe.name == CLIP]
        target = load(model, "cpu")
        reference = Live(subject, clips, "cpu")
        (clip,) = judge(reference, target, clips, wanted, normalize=subject.normalize, measured=CLIP)
        allowed = {one.stage: one.exact_allowed for one in clip.differences if one.exact_allowed}
        floors = {one.stage: one.allowed for one in clip.differences}
        batch = tensor(clips, clip.probe, subject.normalize)
        silent = ("masked_spec_embed", "k_proj.bias", "linear_k.bias")  # no output depends on them
        names = sorted(
            name for name, value in target.weights.items() if value.is_floating_point() and not name.endswith(silent)
        )

        def moved(name: str, at: int) -> list[Difference]:
            flat = target.weights[name].reshape(-1)
            kept = float(flat[at])
            flat[at] = float(np.nextafter(np.float32(kept), np.float32(np.inf)))
            try:
                return compared(target, clip.exact, batch)[1]
            finally:
                flat[at] = kept

        seen, sizes = 0, []
        with target.arithmetic("float64"):
            for _ in range(faults):
                name = str(choice.choice(names))
                at = choice.choice(target.weights[name].reshape(-1).nonzero()[:, 0].numpy())
                found = moved(name, int(at))
                seen += any(one.greatest > allowed[one.stage] for one in found if one.stage in allowed)
                sizes.append(max(one.greatest / floors[one.stage] for one in found if floors.get(one.stage)))
    smallest, middle = (float(np.log2(max(value, 1e-30))) for value in (min(sizes), float(np.median(sizes))))
    print(
        f"  {model.name:<36} {seen} of {faults} one-unit faults stand out; they move outputs by 2^{smallest:.1f} of float32's "
        f"floor and more, the middle one by 2^{middle:.1f}"
    )


if __name__ == "__main__":
    main()
