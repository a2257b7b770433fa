"""An HTTP server whose downloads are cut, changed, delayed or wrong, and `fetch` asked of it."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from convert.fetching import Entry

FIRST = random.Random(1).randbytes(300_000)


SECOND = random.Random(2).randbytes(300_000)


DICTIONARY = b"| 94802\nE 51860\n"


HALF = len(FIRST) // 2


MOVED = {"/nonsense.pt": "http://[::1", "/local.pt": "file:///etc/passwd", "/ftp.pt": "ftp://me:secret@127.0.0.1/x"}


MOVED |= {"/password.pt": "http://me:secret@127.0.0.1:9/x", "/unicode.pt": "http://a..b/", "/round.pt": "/round.pt"}


class Server(ThreadingHTTPServer):
    """Serves `/model.pt` and `/dict.txt`; each GET of the model takes the next of `faults`, if any is left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = FIRST, '"one"'
        self.faults: list[str] = []
        self.heads: list[str] = []  # faults of HEAD
        self.log: list[tuple[str, str, str | None, str | None]] = []
        self.release = threading.Event()
        self.ticks = 0  # the seconds that have passed, for a clock that runs with the bytes sent

    def change(self, etag: str = '"two"') -> None:
        self.content, self.etag = SECOND, etag

    @property
    def gets(self) -> list[tuple[str | None, str | None]]:
        """The Range and If-Range of every GET of the model."""
        return [entry[2:] for entry in self.log if entry[:2] == ("GET", "/model.pt")]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(self.server.heads.pop(0) if self.server.heads else "")

    def do_GET(self) -> None:
        self.answer(self.server.faults.pop(0) if self.server.faults and self.path == "/model.pt" else "")

    def answer(self, fault: str) -> None:
        server, asked, condition = self.server, self.headers["Range"], self.headers["If-Range"]
        self.path = self.path.partition("?")[0]
        server.log.append((self.command, self.path, asked, condition))
        if fault.isdigit():
            return self.send_error(int(fault))
        if self.path in MOVED:
            self.send_response(302)
            self.send_header("Location", MOVED[self.path])
            return self.end_headers()
        if self.path == "/paged.pt":  # a redirect with a page that is larger than any
            self.send_response(302)
            self.send_header("Location", "/model.pt")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(3000 if self.command == "GET" else 0):
                    self.wfile.write(bytes(100_000))
                    server.ticks += 100_000
            self.close_connection = True
            return None
        if self.path == "/moved.pt":
            self.send_response(302)
            self.send_header("Location", "/model.pt")
            return self.end_headers()
        if self.path not in ("/model.pt", "/dict.txt"):
            return self.send_error(404)
        if fault == "hang":
            server.release.wait(30)
            return None
        if fault.startswith("change"):
            server.change()
        body, etag = (server.content, server.etag) if self.path == "/model.pt" else (DICTIONARY, '"dictionary"')
        start, size = 0, len(body)
        if asked and fault != "no-ranges" and (condition == etag or fault.endswith("ignore-if-range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        shift = 1 if fault == "wrong-range" else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + shift}-{size - 1}/{size}")
        if etag and fault != "no-etag":
            self.send_header("ETag", etag)
        if fault != "no-length":
            odd = {"long-number": "9" * 5000, "signed": f"+{size}", "superscript": "²", "zero": "0"}
            length = size - start - (1000 if fault == "short-length" else 0)
            self.send_header("Content-Length", odd.get(fault, str(length)))
        if fault == "chunked":  # a length and an end of its own: more comes than was declared
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.command == "GET":
                for part in (body[start:], b"more"):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                self.wfile.write(b"0\r\n\r\n")
            return None
        self.end_headers()
        if self.command == "GET":
            if fault == "trickle":
                for at in range(start, size):
                    server.ticks += 1
                    self.wfile.write(body[at : at + 1])
                    self.wfile.flush()
                    if server.release.wait(0.002):
                        return None
            part = body[start:HALF] if fault in ("cut", "stall") else b"" if fault == "empty" else body[start:]
            self.wfile.write(part)
            if fault == "stall":
                self.wfile.flush()
                server.release.wait(30)
        return None


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.release.set()
    made.shutdown()
    thread.join()
    made.server_close()


def entry(server: Server, path: str = "/model.pt", dictionary: str | None = None) -> Entry:
    root = f"http://127.0.0.1:{server.server_port}"
    return Entry(
        "tiny", "Tiny", root + path, dictionary and root + dictionary, "", "MIT", None, ("en",), (), None, "1.1"
    )
