"""The same verdict on every machine: models recorded in one environment, verified in others, live and with recordings."""

from __future__ import annotations

import itertools
from pathlib import Path

import environments
import pytest
from many_models import FEW, make_models

CHAIN = ("default-SSE41-1", list(environments.ENVIRONMENTS)[-2], "other-products")


@pytest.mark.slow
def test_no_correct_model_is_blamed(tmp_path: Path) -> None:
    """Each of these computes other bits than the one before, and takes what that one recorded.

    Left to `benchmarks/judgement.py all`: every one of `environments.ENVIRONMENTS` and of `many_models.MODELS`.
    """
    make_models(tmp_path, *FEW)
    found = {name: environments.run(tmp_path, name, CHAIN[max(0, at - 1) : at]) for at, name in enumerate(CHAIN)}
    rows = [row for name in CHAIN for row in found[name] if row["model"]]
    assert {row["model"] for row in rows} == set(FEW)
    assert [(row["model"], row["against"], row["problems"]) for row in rows if row["problems"]] == []
    # the margin: in float64 no correct model comes nearer to what is a mistake than a quarter
    assert max(row["nearest"] for row in rows)[0] <= 0.25
    bits = [found[name][0]["bits"] for name in CHAIN]
    for at, (one, other) in enumerate(itertools.pairwise(bits), 1):
        taken = [row for row in found[CHAIN[at]] if row.get("against") == CHAIN[at - 1]]
        assert {"identical" in row["required"] for row in taken} == {False} or one == other
    if len({str(digest) for digest in bits}) == 1:
        pytest.skip("this processor computes the same bits in every one of these environments")
