"""conversion.json: read once and key by key, quick at a thousand languages, and compared as a whole by `verify`."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import mms_models
import pytest
from fairseq_models import save

from convert import conversion
from convert.checkpoint import open_checkpoint
from convert.conversion import Record
from convert.directory import ModelDirectory
from convert.errors import ConvertError
from convert.package import convert
from convert.report import json_bytes
from convert.typed import Misfit, read
from convert.verification import expected


@dataclass
class Row:
    key: str
    count: int = 0
    rate: float = 0.0
    on: bool = False
    word: Annotated[str, re.compile("[a-z]*")] = ""
    inner: Row | None = None
    rows: tuple[Row, ...] = ()
    named: dict[str, int] = field(default_factory=dict)


Row.__annotations__["named"] = "conversion.Mapping[str, int]"

RIGHT = {"key": "a", "count": -1, "rate": 1, "on": True, "word": "ab", "inner": {"key": "b"}, "rows": [{"key": "c"}]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"rows": [{"key": "c"}, {}]}, "rows[1].key"),
    "number for a text": ({"key": 1}, "key"),
    "truth for a number": ({"count": True}, "count"),
    "fraction for a count": ({"count": 1.0}, "count"),
    "huge": ({"count": 2**63}, "count"),
    "huge rate": ({"rate": 10**400}, "rate"),
    "text for a rate": ({"rate": "1"}, "rate"),
    "number for a truth": ({"on": 0}, "on"),
    "pattern": ({"word": "aB"}, "word"),
    "null": ({"key": None}, "key"),
    "list for an object": ({"inner": []}, "inner"),
    "object for a list": ({"rows": {}}, "rows"),
    "deep": ({"inner": {"key": "b", "inner": {"key": []}}}, "inner.inner.key"),
    "value of a mapping": ({"named": {"x": 1, "y": "z"}}, "named.y"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_named(name: str) -> None:
    change, key = WRONG[name]
    assert read(Row, RIGHT).inner == Row("b")
    with pytest.raises(Misfit) as caught:
        read(Row, RIGHT | change)
    assert str(caught.value) == key


def test_absent_and_unknown_keys() -> None:
    assert read(Row, {"key": "a", "new": 1}) == Row("a")
    with pytest.raises(Misfit, match=r"^request\.new$"):
        read(conversion.Asked, {"new": 1}, "request")


# ---- the record of a model with several languages


@pytest.fixture(scope="module")
def mms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mms")
    path = mms_models.save(mms_models.VARIANTS["mms"], folder / "mms.pt")
    return path, convert(path, folder / "model").path


def test_further_languages_cost_the_same(mms: tuple[Path, Path]) -> None:
    values = json.loads((mms[1] / conversion.NAME).read_bytes())
    dictionary = {"symbols": [f"s{n}" for n in range(100)], "counts": [1] * 100, "special": []}
    tensors = {f"wav2vec2.encoder.layers.{n}.adapter_layer.linear_1.weight": f"layers.{n}.W_a" for n in range(150)}

    def calls(count: int) -> int:
        """Count the calls that reading takes, of Python's functions and of C's: what a slow machine does not change."""
        names = [f"l{n}" for n in range(count)]
        values["languages"] = dict.fromkeys(names, dictionary)
        values["sidecars"] = {f"adapter.{name}.safetensors": {"group": name, "tensors": tensors} for name in names}
        content, seen = json_bytes(values), []
        sys.setprofile(lambda frame, event, arg: seen.append(1) if event in ("call", "c_call") else None)
        try:
            made = Record.of(content)
        finally:
            sys.setprofile(None)
        assert len(made.languages) == len(made.sidecars) == count
        return len(seen)

    calls(1)
    few, some, many = calls(10), calls(20), calls(80)
    assert many - few <= 1.01 * 7 * (some - few)
    assert (some - few) / 10 < 12 * 350  # of a language with 350 values; nine each, as measured


def test_it_is_read_once(mms: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = conversion.parse_json
    monkeypatch.setattr(conversion, "parse_json", lambda *words: calls.append(1) or right(*words))
    directory = ModelDirectory(mms[1])
    for _ in range(3):
        assert directory.record.languages and directory.record.sidecars and directory.count
    assert calls == [1]


def test_it_is_bounded(mms: tuple[Path, Path]) -> None:
    values = json.loads((mms[1] / conversion.NAME).read_bytes())
    for name in ("settings", "request"):
        changed = copy.deepcopy(values)
        deep: Any = "x"
        for _ in range(100):
            deep = [deep]
        changed[name] = changed[name] | ({"data_config": {"a": deep}} if name == "request" else {"task": {"a": deep}})
        with pytest.raises(ConvertError, match=rf"^conversion\.json: {name}.*: not what a conversion writes$"):
            Record.of(json_bytes(changed))


# ---- compared as a whole


def keys(value: Any, name: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of an object, and of those inside; of lists and of many alike, the first."""
    if isinstance(value, dict):
        for key in sorted(value)[: 3 if len(value) > 40 else None]:
            yield (*name, key)
            yield from keys(value[key], (*name, key))
    elif isinstance(value, list) and value:
        yield (*name, 0)
        yield from keys(value[0], (*name, 0))


@pytest.fixture(scope="module", params=["mms", "ctc_blank_add"])
def compared(
    request: pytest.FixtureRequest, mms: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelDirectory, expected.Expected]:
    path, model = mms
    if request.param != "mms":
        folder = tmp_path_factory.mktemp("other")
        path = save(request.param, folder / "model.pt")
        model = convert(path, folder / "model").path
    directory = ModelDirectory(model)
    with open_checkpoint(path) as opened:
        return directory, expected.expect(opened, directory, opened.sha256(), None)


def changed(directory: ModelDirectory, change: Callable[[dict[str, Any]], Any]) -> ModelDirectory:
    """The same directory, with another conversion.json."""
    values = copy.deepcopy(directory.record.values)
    change(values)
    made = copy.copy(directory)
    made.__dict__["record"] = Record.of(json_bytes(values))
    return made


def at(values: Any, key: tuple[Any, ...]) -> Any:
    for part in key[:-1]:
        values = values[part]
    return values


def test_nothing_is_wrong_with_what_was_converted(compared: tuple[ModelDirectory, expected.Expected]) -> None:
    assert expected.compare_records(*compared) == ([], {})
    assert expected.compare_files(compared[0], compared[1].files) == []


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return "0" * len(value) if value and set(value) <= set("123456789abcdef") else f"{value}x"
    return {**value, "more": 1} if isinstance(value, dict) else [*value, 1] if isinstance(value, list) else "x"


def test_every_value_is_compared(compared: tuple[ModelDirectory, expected.Expected]) -> None:
    """Each value of conversion.json changed, and each deleted: the one is wrong, or the reader refuses it."""
    directory, meant = compared
    allowed = {("source", "name"), ("tool", "version")}
    seen = 0
    for key in keys(directory.record.values):
        for change in (
            lambda values, key=key: at(values, key).__setitem__(key[-1], other(at(values, key)[key[-1]])),
            lambda values, key=key: at(values, key).__delitem__(key[-1]),
        ):
            try:
                wrong, noted = expected.compare_records(changed(directory, change), meant)
            except ConvertError as error:
                assert error.code == "not-a-model"
                continue
            seen += 1
            assert wrong or noted, key
            if not wrong:
                absent = key[-1] not in at(changed(directory, change).record.values, key)
                empty = absent and not directory.record.values[key[0]]
                assert key in allowed or empty, key
    assert seen > 50


def test_other_words_of_another_version_are_noted(compared: tuple[ModelDirectory, expected.Expected]) -> None:
    directory, meant = compared

    def reword(values: dict[str, Any]) -> None:
        for key in ("drops", "fills", "edits"):
            for row in values[key]:
                row["reason"] = "other words"
        values["config"] = dict.fromkeys(values["config"], "elsewhere")

    assert expected.compare_records(changed(directory, reword), meant)[0]  # of this version, they are wrong
    older = changed(directory, lambda values: (reword(values), values["tool"].update(version="0.0.1")))
    wrong, noted = expected.compare_records(older, meant)
    assert wrong == []
    assert noted["conversion.json: tool.version"] == "made by version 0.0.1"
    assert noted["conversion.json: config"] == "worded by version 0.0.1"
    forged = changed(older, lambda values: values["settings"]["model"].update(activation_fn="relu"))
    (problem,) = expected.compare_records(forged, meant)[0]
    assert str(problem).startswith('conversion.json: settings.model.activation_fn is "relu", expected ')


def test_an_origin_that_nobody_knows_is_refused(compared: tuple[ModelDirectory, expected.Expected]) -> None:
    forged = changed(compared[0], lambda values: values["source"].update(catalogue="wav2vec2-base-960h"))
    (problem,) = expected.compare_records(forged, compared[1])[0]
    detail = (
        "source.catalogue is 'wav2vec2-base-960h', and this file was not fetched there: name that as the checkpoint"
    )
    assert str(problem) == f"conversion.json: {detail}"
    directory, meant = compared
    fetched = replace(
        meant, record=meant.record | {"source": meant.record["source"] | {"address": "https://a.org/b.pt"}}
    )
    wrong, noted = expected.compare_records(directory, fetched)  # converted from a file, verified from an address
    assert wrong == [] and "conversion.json: source.address" in noted
