"""What people and programs read: text that may come from a file, addresses, and JSON both ways."""

from __future__ import annotations

import json
import math

import pytest

from convert.errors import ConvertError, Problem
from convert.report import envelope, error_text, fold, json_bytes, parse_json, shown, without_user

ODD = {
    "\x1b[31mred": "\\x1b[31mred",
    "\x9b2J": "\\x9b2J",
    "one\ntwo\r": "one\\ntwo\\r",
    "\u202egnp.exe\u2066": "\\u202egnp.exe\\u2066",
    "\u2028\u200b\ufeff": "\\u2028\\u200b\\ufeff",
    "\udcff.pt": "\\udcff.pt",
    "\U000e0041": "\\U000e0041",
}
PLAIN = "Grüße, 你好, क्षि, 😀, \\x1b |<b>`"


@pytest.mark.parametrize("text", ODD)
def test_what_does_not_print_is_shown(text: str) -> None:
    assert shown(text) == ODD[text]
    assert shown(text).isprintable()


def test_what_prints_stays() -> None:
    assert shown(PLAIN) == PLAIN
    assert shown("a\n\x1b", keep="\n") == "a\n\\x1b"


@pytest.mark.parametrize("text", ODD)
def test_an_error_shows_what_it_names(text: str) -> None:
    problems = [Problem(f"code{text}", f"key{text}", f"detail{text}"), Problem("other", "", "")]
    error = ConvertError(f"{text}: wrong", code="code", key=text, hint=f"rename {text}", problems=problems)
    printed = error_text(error)
    assert shown(printed, keep="\n") == printed
    assert len(printed.splitlines()) == 5  # the sentence, two problems, an empty line and the hint
    assert shown(str(error), keep="\n") == str(error) and shown(str(problems[0])) == str(problems[0])
    assert error.message == f"{text}: wrong"  # data stays what it was
    assert json.loads(envelope("x", False, error.problems))["problems"][0]["key"] == f"key{text}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@example.org/a", "https://example.org/a"),
        ("https://hf_abc@example.org", "https://example.org"),
        ("http://me:a@b@example.org/c@d: timed out", "http://example.org/c@d: timed out"),
        ("https://me:se/cret@example.org/a", "https://example.org/a"),
        ("https://example.org/a@b", "https://example.org/a@b"),
        ("https://example.org:80/a@b", "https://example.org:80/a@b"),
        ("http://[::1]/a@b", "http://[::1]/a@b"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_user_and_password_leave_an_address(text: str, expected: str) -> None:
    assert without_user(text) == expected


def test_no_error_shows_a_user_and_a_password() -> None:
    secret = "https://me:secret@example.org/a"
    error = ConvertError(f"{secret}: no", code="x", key=secret, hint=f"try {secret}")
    several = ConvertError("no", code="x", problems=[Problem("x", secret, f"{secret!r}", f"try {secret}")])
    for one in (error, several):
        assert "secret" not in error_text(one) + str(one) + envelope("x", False, one.problems, hint=one.hint)
        assert one.problems[0].key == "https://example.org/a"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have(value: float) -> None:
    name = {True: "NaN"}.get(math.isnan(value)) or ("Infinity" if value > 0 else "-Infinity")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for text in (
        json_bytes({"a": [value, {"b": value}], "c": 1.5}),
        envelope("x", True, a=[value, {"b": value}], c=1.5),
    ):
        found = json.loads(text, parse_constant=refuse)
        assert (found["a"], found["c"]) == ([name, {"b": name}], 1.5)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000, b"1" * 5000, b'{"a": 1} x', b"", b"\0"]
)
def test_what_is_not_json_is_one_error(content: bytes) -> None:
    with pytest.raises(ConvertError, match=r"^a\.json: not JSON: ") as caught:
        parse_json(content, "a.json")
    assert (caught.value.code, caught.value.status) == ("not-json", 2)


def test_json_is_read() -> None:
    assert parse_json('{"a": "ü"}'.encode(), "a.json") == {"a": "ü"}


def test_numbers_of_thousands_of_digits_are_not_folded() -> None:
    keys = [f"a.{'1' * 5000}.b", "a.007.b"]
    assert fold(keys) == keys
