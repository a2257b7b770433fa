"""Publish to a Hub whose answers make no sense, many times in one process: it succeeds, or ends in one error."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hub_server import Hub

TOKEN = "hf_" + "NobodyInParticular" * 2
REQUESTS = 200  # of one run, most of which make a dozen
DEEP = "[" * 3000 + "]" * 3000
VALUES = [
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "1" + "0" * 400,
    "9" * 5000,
    "NaN",
    '""',
    '"x"',
    '"\\ud800"',
    "[]",
    "{}",
    "[null]",
]
VALUES += ['{"a": 1}', "[[]]", DEEP, '"2020-99-99T00:00:00.000Z"', '"\\u001b[31m\\n"', "[1]", '["x"]', '[{"a": []}]']
MARK = "HERE"
# requests that a publication makes, and those of one that finds a repository, its card, and its own pull request
ROUTES = {
    "who": ("GET", "/whoami-v2$"),
    "create": ("POST", "/repos/create$"),
    "info": ("GET", "/api/models/alice/tiny$"),
    "head": ("GET", "/revision/"),
    "tree": ("GET", "/tree/"),
    "validate": ("POST", "/validate-yaml$"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch$"),
    "verify": ("POST", "/lfs/verify$"),
    "commit": ("POST", "/commit/"),
    "refs": ("GET", "/refs$"),
    "tag": ("POST", "/tag/"),
    "resolve": ("GET", "/resolve/"),
    "commits": ("GET", "/commits/"),
    "discussions": ("GET", "/discussions$"),
}
HEADERS = {
    "length": {"Content-Length": "9" * 5000},
    "length-negative": {"Content-Length": "-1"},
    "length-short": {"Content-Length": "1"},
    "encoding": {"Content-Encoding": "gzip"},
    "next": {"Link": '<{address}>; rel="next"'},
    "next-nonsense": {"Link": '<http://[::1>; rel="next"'},
    "location": {"status": "302", "Location": "http://[::1"},
    "location-loop": {"status": "302", "Location": "{address}"},
    "location-text": {"status": "307", "Location": "\x1b[31m"},
    "quota": {"status": "429", "RateLimit": '"api";r=0;t=999999999'},
    "quota-digits": {"status": "429", "RateLimit": '"api";r=0;t=' + "9" * 5000},
    "retry": {"status": "429", "Retry-After": "\xb2"},
    "retry-long": {"status": "503", "Retry-After": "9" * 20},
    "type": {"Content-Type": "text/html"},
    "error": {"status": "400", "X-Error-Message": "\x1b[31m", "X-Error-Code": "\xff"},
    "teapot": {"status": "299"},
}


def places(value: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the whole first."""
    found = [key]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inside:
        found += places(item, (*key, name))
    return found


def other_json(chance: random.Random, content: bytes) -> bytes:
    """Put another value, a missing or a doubled one, in some place of an answer."""
    try:
        value = json.loads(content)
    except ValueError:
        return chance.choice(VALUES).encode()
    place = chance.choice(places(value))
    if not place:
        return chance.choice([*VALUES, "", "{", "\xff"]).encode("latin-1")
    inner = value
    for part in place[:-1]:
        inner = inner[part]
    kind = chance.randrange(8)
    if kind == 0:
        del inner[place[-1]]
    elif kind == 1 and isinstance(inner, list):
        inner.extend(inner[:1] * 3)
    else:
        inner[place[-1]] = MARK
    return json.dumps(value).replace(f'"{MARK}"', chance.choice(VALUES)).encode()


def main(folder: str, cases: str) -> None:
    """Run the cases, and print how they ended."""
    hub = Hub()
    hub.store.users = {TOKEN: {"name": "alice", "role": "write", "orgs": ["lab"], "fine": {"scoped": [], "global": []}}}
    os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    from convert.errors import ConvertError
    from convert.publishing import hub as client
    from convert.publishing.run import publish

    client.PACE, client.MOST_PAGES, client.LONGEST_WAIT = 0.0, 60, 2.0
    patience = time.sleep
    time.sleep = lambda seconds: patience(min(seconds, 0.01))
    outcomes: Counter[str] = Counter()
    model = Path(folder)
    for case in range(int(cases)):
        chance = random.Random(case)
        name, (method, path) = chance.choice(list(ROUTES.items()))
        header = chance.choice([*HEADERS, *[""] * len(HEADERS)])
        hub.faults.clear()
        hub.store.repositories.clear()
        hub.store.objects.clear()
        if chance.random() < 0.6:  # a repository with a card and our pull request is there already
            (model / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
            hub.store.create("alice/tiny", True, "alice")
            hub.store.repositories["alice/tiny"].edit("README.md", b"---\nlicense: mit\n---\nTheirs.\n")
        else:
            (model / "README.md").unlink(missing_ok=True)
        options: dict[str, Any] = {"card": "hub"}
        options |= {"create_pr": True} if chance.random() < 0.3 else {}
        options |= {"dry_run": True} if chance.random() < 0.2 else {}

        def change(told: dict[str, str], content: bytes, chance: Any = chance, header: str = header) -> bytes:
            if not header:
                return other_json(chance, content)
            address = hub.seen[-1].path
            told |= {key: text.replace("{address}", hub.endpoint + address) for key, text in HEADERS[header].items()}
            return content

        fault = hub.fault(method, path, "change", change=change, times=chance.choice([1, 1, 100]))
        before = len(hub.seen)
        try:
            publish(model, "alice/tiny", timeout=5.0, **options)
            outcome = "published"
        except ConvertError as error:
            assert error.status in (1, 2) and error.code != "unexpected", error
            assert TOKEN not in f"{error}{error.hint}{error.problems}"
            outcome = error.code
        except BaseException:
            print(f"case {case}: {name}, {header or 'json'}", file=sys.stderr)
            raise
        assert len(hub.seen) - before < REQUESTS, f"case {case}: {name}, {header}: asked on and on"
        if "alice/tiny" in hub.store.repositories:  # what was sent was sent once
            titles = [commit.title for commit in hub.store.repositories["alice/tiny"].commits.values()]
            assert sum("Model converted" in title for title in titles) <= 1, f"case {case}: {name}, {header}: {titles}"
        outcomes[outcome if fault.seen.is_set() else "not asked"] += 1
    print(json.dumps(outcomes))
    hub.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
