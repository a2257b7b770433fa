"""Whatever stands in a model directory's files, a card shows it as text: no markup, no HTML, no mark of its own."""

from __future__ import annotations

import copy
import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_fixtures import evaluate, write

from convert.errors import ConvertError
from convert.publishing.card import BEGIN, END, compose
from convert.publishing.facts import Stated, gather
from convert.publishing.files import read
from convert.publishing.frontmatter import split
from convert.publishing.text import code, text
from convert.publishing.verified import Verified
from convert.report import shown

EVIL = (
    f"x\n\n# Title\n{END}\n{BEGIN}\n```\n<script>a()</script> | ` [a](javascript:b) ![c](d) **e** _f_ &lt; \\ ~g~ "
    "\x1b[31m\u202e\r\n---\nlicense: mit\n---\n"
)
PIECES = [
    "`",
    "``",
    "|",
    "<",
    ">",
    "&",
    "&#60;",
    "\\",
    "*",
    "_",
    "[",
    "](",
    "\n",
    "\r",
    "#",
    "~",
    "$",
    "!",
    "a",
    " ",
    "é",
    "\x1b",
]
PIECES += ["<!--", "-->", "fairseq-to-hf: end", "\u2028", "\u202e", "http://x"]


def read_back(markdown: str) -> str:
    """What a reader of Markdown shows of a value: code and references read, nothing else may be there."""
    if markdown.startswith("`"):
        assert markdown[1:-1].count("`") == 0 and markdown.endswith("`")
        return markdown[1:-1]
    inner = markdown.removeprefix("<code>").removesuffix("</code>")
    assert not re.search(r"[`*\[\]<>|~$\\]|&(?!#\d+;)", inner), inner
    assert "\n" not in inner
    return html.unescape(inner)


@pytest.mark.parametrize("write_it", [text, code])
def test_every_value_is_shown_and_nothing_else(write_it: Any) -> None:
    chance = random.Random(0)
    values = [
        EVIL,
        "",
        "plain",
        "w2v_encoder.proj.weight",
        "[(512, 10, 5)] + [(512, 3, 2)] * 4",
        "_x_",
        "a_b",
        1.5,
        None,
    ]
    values += ["".join(chance.choices(PIECES, k=chance.randint(0, 12))) for _ in range(2000)]
    for value in values:
        expected = " ".join(shown(value, keep="\t\n\r").split())
        assert read_back(write_it(value)) == expected, (value, write_it(value))


def test_plain_values_stay_as_they_are() -> None:
    assert code("encoder.layers.{0...11}.fc1.weight") == "`encoder.layers.{0...11}.fc1.weight`"
    assert text("pretraining only: fairseq's mask_emb (1.5)") == "pretraining only: fairseq's mask_emb (1.5)"


# ---- the card as a whole


def strings(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for name in list(value)[:30]:
            yield (*key, name)
            yield from strings(value[name], (*key, name))
    elif isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from strings(value[index], (*key, index))
    elif isinstance(value, str):
        yield key


def skeleton(card: str) -> dict[str, Any]:
    """What a reader of Markdown takes for structure."""
    lines, blocks, fenced = [], [], ""
    for line in card.splitlines():
        fence = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence and (not fenced or line.strip() == fenced):
            fenced = "" if fenced else fence[1]
            blocks.append(line)
        elif not fenced:
            lines.append(line)
    body = "\n".join(lines)
    return {
        "headings": [line for line in lines if re.match(r" {0,3}#", line)],
        "blocks": blocks,
        "open": fenced,
        "marks": re.findall(r"<!--.*", card),
        "rules": [line for line in lines if re.fullmatch(r"\s*(-{3,}|={3,}|\*{3,})\s*", line)],
        "tags": sorted(set(re.findall(r"<[/!a-zA-Z][^>\n]*", re.sub(r"<!--.*|</?code", "", body)))),
        "columns": [line.count("|") for line in lines if line.startswith("| ---")],
        "rows": {line.count("|") for line in lines if line.startswith("|")},
        "links": re.findall(r"\]\([^)]*\)", re.sub(r"`[^`\n]*`", "", body)),
    }


def card_of(folder: Path, verified: bool) -> str:
    inventory = read(folder)
    proof = Verified.of(inventory.json("verification.json")) if verified else None
    facts = gather(inventory, "me/tiny", verification=proof, pin="v1", stated=Stated())
    before, block, rest = split(compose(facts).decode())
    assert isinstance(yaml.safe_load(block), dict) and before == "---\n" and rest.startswith("---\n")
    return rest


@pytest.mark.parametrize("name", ["conversion.json", "verification.json", "evaluation.json", "config.json"])
def test_no_value_of_a_file_becomes_markup(name: str, model: Path) -> None:
    evaluate(model)
    value = json.loads((model / "conversion.json").read_text())
    value["fills"] = [{"key": "projection.weight", "rule": "identity", "reason": "fairseq has none"}]
    value["edits"] = [{"key": "lm_head.bias", "row": 0, "rule": "add", "value": 1.5, "reason": "blank_weight"}]
    value["source"] |= {"address": "hf://me/a@b/x.pt", "where": "state_dict", "prefix": "ssl.model."}
    value["base"] = {"name": "base.pt", "sha256": "0" * 64, "whole": True}
    write(model / "conversion.json", value)
    plain = {verified: skeleton(card_of(model, verified)) for verified in (True, False)}
    original = json.loads((model / name).read_text())
    seen = refused = 0
    for key in strings(original):
        changed = copy.deepcopy(original)
        inner = changed
        for part in key[:-1]:
            inner = inner[part]
        if isinstance(inner, list) or not isinstance(inner[key[-1]], (dict, list)):
            inner[key[-1]] = EVIL
        else:
            inner[EVIL] = inner.pop(key[-1])
        write(model / name, changed)
        for verified in (True, False):
            try:
                card = card_of(model, verified)
            except ConvertError as error:
                refused += 1
                assert shown(str(error)) == str(error)
                continue
            seen += 1
            found = skeleton(card)
            for part, expected in plain[verified].items():
                if part not in ("blocks", "columns", "links", "rows"):
                    assert found[part] == expected, (key, part)
            assert len(found["blocks"]) <= len(plain[verified]["blocks"]), key
            assert set(found["links"]) <= set(plain[verified]["links"]), key
            assert {*found["columns"]} <= {*plain[verified]["columns"]}
            assert found["rows"] <= plain[verified]["rows"], key
            assert card.count(BEGIN) == card.count(END) == 1  # the next publish finds its section again
            assert not {"\x1b", "\u202e"} & {*card}, key
    assert seen > 10 and (refused or name == "evaluation.json")


def test_control_a_value_that_is_not_escaped_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = skeleton(card_of(model, False))
    value = json.loads((model / "conversion.json").read_text())
    value["drops"][0]["reason"] = "x\n\n# Title <b>"
    write(model / "conversion.json", value)
    assert skeleton(card_of(model, False)) == plain
    monkeypatch.setattr("convert.publishing.sections.text", str)
    found = skeleton(card_of(model, False))
    assert found["headings"] != plain["headings"] and found["tags"] != plain["tags"]
    value["drops"][0]["reason"] = END
    write(model / "conversion.json", value)
    with pytest.raises(ConvertError, match="a value in it would end its section"):
        card_of(model, False)
