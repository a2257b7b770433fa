"""verification.json: nothing of the machine that it was made on."""

from __future__ import annotations

import json
from pathlib import Path

from convert.verification.report import NAME, write


def test_no_path_of_the_machine_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    detail = f"{folder}/config.json: cannot be read, see {Path.home()}/notes and https://example.org/a/b"
    report = {
        "problems": [{"code": "load", "key": str(folder), "detail": detail}],
        "runs": [{"input": "/a/ b", "allowed": 1.5}],
    }
    write(folder, report)
    text = (folder / NAME).read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text and f"{Path.home()}/" not in text
    assert found["problems"][0]["key"] == "model"
    assert found["problems"][0]["detail"] == "model/config.json: cannot be read, see notes and https://example.org/a/b"
    assert found["runs"] == report["runs"]  # the control: what is no such path stays
