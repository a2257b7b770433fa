"""The model card: this tool's metadata and one marked section, in a card whose other text stays as it is."""

from __future__ import annotations

import difflib
import re

from convert.errors import ConvertError
from convert.publishing import sections
from convert.publishing.facts import Facts
from convert.publishing.files import CARD
from convert.publishing.frontmatter import split
from convert.publishing.metadata import merge

BEGIN = (
    "<!-- fairseq-to-hf: begin. fairseq-to-hf publish writes what stands between these marks; the rest is yours. -->"
)
END = "<!-- fairseq-to-hf: end -->"
_SECTION = re.compile(r"<!-- fairseq-to-hf: begin\b[^>]*-->.*?<!-- fairseq-to-hf: end -->(\r\n|\n)?", re.DOTALL)
_MARK = re.compile(r"<!-- fairseq-to-hf: (begin|end)\b")
_WARNING = (
    "> **UNVERIFIED**: nobody has shown that this model computes what its fairseq checkpoint computes. "
    "Do not rely on it before `fairseq-to-hf verify` has passed."
)


def compose(facts: Facts, existing: bytes | None = None) -> bytes:
    """Write the card, or bring an existing one up to date.

    Only our metadata and the section between the two marks change; every other byte, line endings included, stays.
    The same facts and the same card give the same bytes.

    Args:
        facts: what is known about the model.
        existing: the present card.

    Raises:
        ConvertError: with status 1: the card cannot be edited without harm, or contradicts the facts.
    """
    try:
        text = (existing or b"").decode()
    except UnicodeDecodeError:
        raise _refusal("is not UTF-8 text", "save it as UTF-8") from None
    start, text = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    newline = "\r\n" if "\r\n" in text else "\n"
    before, block, after = split(text)
    if not before:
        before, after = f"---{newline}", f"---{newline}{newline * bool(text)}{after}"
    merged = merge(block, newline, facts)
    closing, rest = _closing(after, newline)
    return (start + before + merged + closing + _place(facts, rest, newline)).encode()


def diff(old: bytes | None, new: bytes) -> str:
    """Return what changes in the card as a unified diff; empty when nothing does."""
    before, after = ((content or b"").decode(errors="replace").splitlines() for content in (old, new))
    names = ("README.md on the Hub", "README.md to publish")
    return "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=2))


def _closing(after: str, newline: str) -> tuple[str, str]:
    line, found, rest = after.partition("\n")
    return (line + found, rest) if found else (line + newline, rest)


def _place(facts: Facts, rest: str, newline: str) -> str:
    marks = [found[1] for found in _MARK.finditer(rest)]
    if marks not in ([], ["begin", "end"]):
        raise _refusal(f"its marks are {' '.join(marks)}, expected one begin and one end", "restore the pair of marks")
    found = _SECTION.search(rest)
    before, after = (rest[: found.start()], rest[found.end() :]) if found else (rest, "")
    title = re.search(r"^(#+) ", found[0], re.MULTILINE) if found else None
    level = len(title[1]) if title else 2 if rest.strip() else 1  # kept, whatever people add around it
    body = sections.body(facts, level)
    if _MARK.search(body):  # what comes from files is escaped: no value can end the section
        raise _refusal("a value in it would end its section", "report this")
    section = "\n".join([BEGIN, *([] if facts.verified else [_WARNING, ""]), body, END])
    section = section.replace("\n", newline) + newline
    if not facts.verified:  # the warning is the first line of the card's text, wherever the section stood
        return section + (newline if before and not found else "") + before + after
    if found:
        return before + section + after
    if level == 1:
        return rest + section
    glue = "" if before.endswith("\n") else newline
    return before + glue + newline + section


def _refusal(reason: str, remedy: str) -> ConvertError:
    return ConvertError(
        f"README.md: {reason}; nothing was sent", code="card", key=CARD, status=1, hint=f"{remedy}, and publish again"
    )
