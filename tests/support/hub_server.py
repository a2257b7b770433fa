"""A Hub for tests: the endpoints that huggingface_hub and transformers use, over a real socket, with faults on demand.

The API answers as `127.0.0.1` and large objects live at `localhost`: two origins, so that a token that leaves the API
can be seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Blob, Refused, Repository, Store

PAGE = 4  # rows of a listing, few enough that it has pages
CHUNK = 150_000  # bytes of an upload's part, few enough that a tiny model has parts


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Args:
        method, path: the request's method and a pattern in its path.
        kind: "status" (instead of doing it), "drop" (the connection, before anything is done), "apply-drop" and
            "apply-status" (done, and the answer lost or wrong), "truncate" (half of the body is stored, and the
            connection dropped), "corrupt" (other bytes are stored), "hang" (no answer until `release`), "change" (done,
            and `change` makes another answer of its headers and its content), "trickle" (done, the answer byte by byte),
            "before".
        before: called before the request is handled, whatever the kind.
    """

    method: str
    path: str
    kind: str = "before"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    before: Callable[[], object] | None = None
    change: Callable[[dict[str, str], bytes], bytes] | None = None
    times: int = 1
    seen: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    host: str
    authorized: bool
    headers: str
    body: bytes


class Hub:
    """The running server; `store` is its memory, `seen` every request, `faults` what is to go wrong."""

    def __init__(self) -> None:
        self.store = Store()
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.multipart = True
        self.ticks = 0  # bytes that trickled
        self.xet = False
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str, kind: str = "before", **options) -> Fault:
        self.faults.append(Fault(method, path, kind, **options))
        return self.faults[-1]

    def take(self, method: str, path: str) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        return sum(row.method == method and bool(re.search(path, row.path)) for row in self.seen)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet an answer: two would wait for each other
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_arguments) -> None: ...

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        self.address = urlsplit(self.path)
        self.query = parse_qs(self.address.query)
        self.route = self.address.path
        self.body = self._body()
        headers, authorization = str(self.headers), self.headers.get("Authorization")
        self.user = self.hub.store.users.get((authorization or "").removeprefix("Bearer "))
        host = self.headers.get("Host", "")
        seen = Seen(self.command, self.path, host, authorization is not None, headers, self.body)
        self.hub.seen.append(seen)
        fault = self.hub.take(self.command, self.route)
        self.lost = False
        self.change = fault.change if fault else None
        self.trickle = bool(fault) and fault.kind == "trickle"
        if fault:
            if fault.before:
                fault.before()
            fault.seen.set()
            if fault.kind in ("drop", "hang"):
                fault.release.wait(30 if fault.kind == "hang" else 0)
                self.close_connection = True
                return
            if fault.kind == "status":
                self._error(fault.status, fault.message, headers=fault.headers)
                return
            if fault.kind == "truncate":
                self.body = self.body[: len(self.body) // 2]
            if fault.kind == "corrupt":
                self.body = bytes(len(self.body))
        self.lost = bool(fault) and fault.kind in ("apply-drop", "apply-status", "truncate")
        try:
            self._dispatch()
        except Refused as no:
            self._error(no.status, no.message, no.code)
        if self.lost:
            self.lost = False
            if fault.kind == "apply-status":
                self._error(fault.status, fault.message)
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _dispatch(self) -> None:
        from hub_routes import ROUTES

        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                function(self, *(unquote(part or "") for part in found.groups()))
                return
        self._error(404, f"no such address: {self.route}")

    # ------------------------------------------------------------------ answers

    def answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.lost:
            return
        told = {"Content-Type": "application/json"} | (headers or {})
        if self.change:
            content = self.change(told, content)
        self.send_response(int(told.pop("status", status)))
        told = {"Content-Length": str(len(content))} | told
        for name, text in told.items():
            self.send_header(name, text)
        if self.trickle:
            self._trickle(b"".join(self._headers_buffer) + b"\r\n" + content)
            return
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _trickle(self, content: bytes) -> None:
        for byte in content:
            try:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            except OSError:  # given up at the other end
                break
            self.hub.ticks += 1
            time.sleep(0.001)
        self._headers_buffer = []
        self.close_connection = True

    def _error(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer({"error": message}, status, more)

    def page(self, rows: list) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        more = {}
        if start + PAGE < len(rows):
            address = f"{self.hub.endpoint}{self.route}?cursor={start + PAGE}"
            kept = "".join(f"&{name}={self.query[name][0]}" for name in ("recursive", "expand") if name in self.query)
            more["Link"] = f'<{address}{kept}>; rel="next"'
        self.answer(rows[start : start + PAGE], headers=more)

    def bytes_with_range(self, content: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            self.answer(content, headers={"Accept-Ranges": "bytes", **headers})
            return
        first, last = int(found[1]), int(found[2] or len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"}
        self.answer(content[first : last + 1], 206, headers)

    # ------------------------------------------------------------------ who may what

    def needs_user(self) -> dict:
        if self.user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.user

    def repository(self, name: str) -> Repository:
        found = self.hub.store.repositories.get(name)
        owner = name.split("/")[0]
        if found is None or (found.private and (self.user is None or owner not in self.reach())):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return found

    def reach(self) -> list[str]:
        return [self.user["name"], *self.user.get("orgs", ())] if self.user else []

    def may_write(self, name: str, revision: str = "") -> dict:
        """The namespace's owners may write; the author of a pull request may write to it."""
        user = self.needs_user()
        for pull in self.hub.store.repositories[name].pulls if name in self.hub.store.repositories else ():
            if revision == f"refs/pr/{pull.num}" and pull.author == user["name"] and user["role"] != "read":
                return user
        if user["role"] == "read" or name.split("/")[0] not in self.reach():
            raise Refused(403, "you do not have write access to this repository")
        return user


def blob_of(store: Store, key: str, value: dict) -> Blob:
    if key == "file":
        content = base64.b64decode(value["content"])
        if len(content) > 10 << 20:
            raise Refused(400, "regular files may have 10 MiB")
        return Blob(content, None, len(content))
    if hashlib.sha256(store.objects.get(value["oid"], b"")).hexdigest() != value["oid"]:
        raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
    return Blob(None, value["oid"], value["size"])


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    """Wait until something is true; the limit only ends a test that would hang."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
