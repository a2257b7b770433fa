"""HTTP within limits: an answer that trickles or makes no sense is an error, and no password is shown."""

from __future__ import annotations

import functools
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, InvalidURL
from typing import Any
from urllib import request
from urllib.error import HTTPError

from convert.errors import ConvertError
from convert.report import without_user

SLOWEST = 1000  # bytes a second, measured over the time-out
clock = time.monotonic


class InterruptedTransfer(Exception):  # noqa: N818
    """The network's fault: worth another attempt."""


def public_address(address: str) -> str:
    """Write an address without what may be a secret: user, password, and the query, which signs or holds a token.

    Example:
        >>> public_address("https://me:secret@example.org/model.pt?token=abc")
        'https://example.org/model.pt'
    """
    return without_user(address).partition("?")[0].partition("#")[0]


def ask(address: str, timeout: float, method: str = "GET", headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """Send a request, and follow redirects over HTTP.

    Args:
        address: where to.
        timeout: seconds without an answer or a byte, or with fewer than `SLOWEST` bytes each, after which it is given up.
        method: `GET` or `HEAD`.
        headers: those beside the name of this program.

    Raises:
        InterruptedTransfer: another attempt may bring it.
        ConvertError: `http`, none will.
    """
    made = request.Request(address, headers={"User-Agent": "fairseq-to-hf", **(headers or {})}, method=method)
    with network(address):
        answer: HTTPResponse = _opener().open(made, timeout=timeout)
        return answer


def declared_size(answer: HTTPResponse, address: str) -> int:
    """Return the size that an answer declares.

    Raises:
        ConvertError: `size`, when it declares none.
    """
    length = answer.headers["Content-Length"] or ""
    if not re.fullmatch("[0-9]{1,15}", length) or not int(length):
        key = public_address(address)
        raise ConvertError(f"{key}: the server does not say how large it is", code="size", key=key)
    return int(length)


@contextmanager
def network(address: str) -> Iterator[None]:
    """Tell what another attempt may mend from what it cannot."""
    key = public_address(address)
    try:
        yield
    except HTTPError as error:
        error.close()
        answer = f"the server answered {error.code} {without_user(str(error.reason))}"
        if error.code in (408, 416, 429) or error.code >= 500:
            raise InterruptedTransfer(answer) from None
        raise ConvertError(f"{key}: {answer}; nothing was written", code="http", key=key) from None
    except InvalidURL:  # its text would repeat a password
        raise ConvertError(f"{key}: not an address that can be fetched", code="http", key=key) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = without_user(str(getattr(error, "reason", error)))
        raise InterruptedTransfer(reason or type(error).__name__) from None


class Pace:
    """How quickly an answer comes: only time spent waiting counts, and the first byte may take the whole time-out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Expect another answer."""
        self.began, self.waited, self.count = False, 0.0, 0

    @contextmanager
    def waiting(self, window: float | None) -> Iterator[Callable[[int], None]]:
        """Measure one read.

        Args:
            window: seconds over which an answer has to bring `SLOWEST` bytes each.

        Yields:
            A function that is told how many bytes came.

        Raises:
            TimeoutError: it was too slow.
        """
        started, count = clock(), [0]
        yield count.append
        self.waited += clock() - started if self.began else 0.0
        self.began, self.count = True, self.count + sum(count)
        if window is not None and self.waited > window:
            if self.count < SLOWEST * self.waited:
                raise TimeoutError(f"fewer than {SLOWEST} bytes a second")
            self.waited, self.count = 0.0, 0


class _Paced(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, window: float | None) -> None:
        self.raw, self.window, self.pace = raw, window, Pace()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        with self.pace.waiting(self.window) as came:
            count = self.raw.readinto(buffer)
            came(count or 0)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Answer(HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp: Any = io.BufferedReader(_Paced(self.fp.detach(), sock.gettimeout()))


class _Connection(HTTPConnection):
    response_class = _Answer


class _SecureConnection(HTTPSConnection):
    response_class = _Answer


class _Handler(request.HTTPHandler):
    def http_open(self, asked: request.Request) -> Any:
        return self.do_open(_Connection, asked)


class _SecureHandler(request.HTTPSHandler):
    def https_open(self, asked: request.Request) -> Any:
        return self.do_open(_SecureConnection, asked)


class _Redirects(request.HTTPRedirectHandler):
    def redirect_request(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.read = bytes  # the page that comes with it is not read: it may have no end
        if req.type == "https" and not newurl.lower().startswith("https:"):
            key = public_address(req.full_url)
            message = (
                f"{key}: the server redirects to {public_address(newurl)}, which is not encrypted; nothing was fetched"
            )
            raise ConvertError(message, code="http", key=key)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@functools.cache
def _opener() -> request.OpenerDirector:
    made = request.OpenerDirector()
    handlers: list[type[request.BaseHandler]] = [request.ProxyHandler, request.UnknownHandler, _Handler, _SecureHandler]
    handlers += [request.HTTPDefaultErrorHandler, _Redirects, request.HTTPErrorProcessor]
    for handler in handlers:
        made.add_handler(handler())
    return made
