"""The Hub's client with time-outs, and its errors as one sentence each with the next step."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from convert.errors import ConvertError
from convert.network import Pace
from convert.report import size, without_user

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
ATTEMPTS = 4
PACE = 1.0  # of our own pauses; the tests go faster
MOST_PAGES = 5000  # requests for answers, in one run
LARGEST = 100_000_000  # bytes of one answer, unpacked; a list of files has 1 MB a page
LONGEST_WAIT = 300.0  # seconds; a quota that asks for more ends the run instead
_SECRETS = re.compile(r"hf_[A-Za-z0-9]+|(?<=\?)\S+")
_TALKERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")


@contextmanager
def client(timeout: float, progress: bool) -> Iterator[HfApi]:
    """Give the client a time limit for every answer, and put back what it had before.

    Args:
        timeout: seconds without a byte after which a request is given up; the client itself waits for ever
            (`huggingface_hub.utils._http.default_client_factory`).
        progress: show the client's progress bars.
    """
    try:
        from huggingface_hub import HfApi, set_client_factory

        utils = hub_utils()
    except ImportError:
        message = "publish needs huggingface_hub 1.0 or newer"
        raise ConvertError(message, code="no-client", hint='pip install -U "huggingface_hub>=1.0"') from None
    previous = utils._http._GLOBAL_CLIENT_FACTORY

    def limited() -> Any:
        made = utils._http.default_client_factory()  # it carries the hook that refuses requests when offline
        made.timeout = http_library().Timeout(timeout, connect=min(timeout, 10.0))
        hooks: dict[str, list[Callable[..., Any]]] = {"request": [_patience()], "response": [_bounded, _no_long_wait]}
        made.event_hooks = {name: [*made.event_hooks.get(name, ()), *more] for name, more in hooks.items()}
        for transport in (made._transport, *made._mounts.values()):
            pool: Any = getattr(transport, "_pool", None)
            if hasattr(pool, "_network_backend"):
                pool._network_backend = _PacedBackend(pool._network_backend)
        return made

    # The client's warnings name signed addresses: whoever has one may write to the storage.
    levels = {name: logging.getLogger(name).level for name in _TALKERS}
    bars = not utils.are_progress_bars_disabled()
    set_client_factory(limited)
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not progress:
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the Hub's remarks on a card: `validate` returns them
            yield HfApi()
    finally:
        set_client_factory(previous)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            utils.enable_progress_bars()


class _PacedBackend:
    """Opens connections whose answers may not trickle: the client's time-out starts anew with every byte."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def connect_tcp(self, *args: Any, **options: Any) -> _PacedStream:
        return _PacedStream(self._backend.connect_tcp(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _PacedStream:
    def __init__(self, stream: Any) -> None:
        self._stream, self._pace = stream, Pace()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._pace.waiting(timeout) as came:
            piece: bytes = self._stream.read(max_bytes, timeout)
            came(len(piece))
        return piece

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._pace.restart()
        self._stream.write(buffer, timeout)

    def start_tls(self, *args: Any, **options: Any) -> _PacedStream:
        return _PacedStream(self._stream.start_tls(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _bounded(response: Any) -> None:
    """A hook that ends an answer that is too large, unpacked: of a file, where its size was not declared."""
    pieces = response.iter_bytes
    declared = "Content-Length" in response.headers and "Content-Encoding" not in response.headers

    def counted(chunk_size: int | None = None) -> Iterator[bytes]:
        count = 0
        for piece in pieces(chunk_size):
            count += len(piece)
            if count > LARGEST:
                raise _nonsense(f"an answer of more than {size(LARGEST)}")
            yield piece

    def read() -> bytes:
        if not hasattr(response, "_content"):
            response._content = b"".join(counted())
        content: bytes = response._content
        return content

    response.read = read
    if not declared:
        response.iter_bytes = counted


def _no_long_wait(response: Any) -> None:
    """A hook that ends what the client would wait for: it sleeps as long as the Hub asks it to."""
    asked = re.findall(
        r"(?:;\s*t=|^)([0-9]+)", response.headers.get("RateLimit", response.headers.get("Retry-After", ""))
    )
    if response.status_code == 429 and any(len(seconds) > 9 or int(seconds) > LONGEST_WAIT for seconds in asked):
        response.read()
        hub_utils().hf_raise_for_status(response)


def _patience() -> Callable[[Any], None]:
    """A hook that ends what the client repeats without end.

    `HfApi.create_repo` asks again without a pause while another one is running, and lists go on as long as the Hub names a
    next page.
    """
    asked, pages = itertools.count(), itertools.count()

    def hook(request: Any) -> None:
        if request.method == "GET" and next(pages) > MOST_PAGES:
            raise _nonsense("its lists have no end")
        if request.method == "POST" and request.url.path.endswith("/api/repos/create"):
            number = next(asked)
            if number > 6:
                message = "the Hub is still busy with another operation on this account; nothing was committed"
                raise ConvertError(message, code="busy", hint="run it again in a minute")
            rest(min(number, 4) * 0.5)

    return hook


def ask(call: Callable[[], T], what: str, repo_id: str, *, repeat: bool = True) -> T:
    """Ask the Hub something; repeat a question that got no answer, and explain an error that stays.

    The raised error has no context: the client's own frames hold the token.

    Args:
        call: the question.
        what: what it is for, to follow "could not": `read USER/REPO`.
        repo_id: the repository.
        repeat: whether asking twice does no harm.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except ConvertError:
            raise
        except recoverable() as error:
            wait = waiting_time(error, attempt)
            failure = explain(error, what, repo_id)
        if wait is None or not repeat or attempt == ATTEMPTS - 1:
            break
        rest(wait)
    raise failure


def rest(seconds: float) -> None:
    """Wait before asking again."""
    time.sleep(seconds * PACE)


def hub_utils() -> Any:
    """Return `huggingface_hub.utils`."""
    return importlib.import_module("huggingface_hub.utils")


def http_library() -> Any:
    """Return what the client sends requests with: httpx in huggingface_hub 1.x, httpx2 in 2.x."""
    return getattr(hub_utils(), "httpx", None) or importlib.import_module("httpx")


def recoverable() -> tuple[type[Exception], ...]:
    """Return what the client raises: the same failure has different faces in uploads, in xet and in the API."""
    http = http_library()
    # of answers that make no sense: LookupError, TypeError, AttributeError
    return (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, http.HTTPError, http.InvalidURL)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or of what caused it; `None` when no answer came."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def unanswered(error: BaseException) -> bool:
    """Whether the Hub may have done what was asked all the same: no answer, one that makes no sense, an error behind it."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status == 408
    http = http_library()
    return (
        makes_no_sense(error)
        or isinstance(error, TimeoutError)
        or (isinstance(error, http.TransportError) and not isinstance(error, http.ConnectError))
    )


def makes_no_sense(error: BaseException) -> bool:
    """Whether an error comes from reading an answer: the client expects the types and the forms that the Hub documents."""
    from huggingface_hub.errors import HFValidationError

    ours = isinstance(error, (OSError, HFValidationError)) or (
        isinstance(error, ValueError) and "metadata" in str(error)
    )
    return isinstance(error, (LookupError, TypeError, AttributeError, ValueError, RecursionError)) and not ours


def waiting_time(error: BaseException, attempt: int) -> float | None:
    """Return how many seconds to wait before asking again, `None` when that is of no use."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status == 429:
        asked = _retry_after(error)
        return None if asked and asked > LONGEST_WAIT else (asked if asked is not None else 2.0**attempt)
    if status is not None:
        return 0.5 * 2.0**attempt if status >= 500 or status == 408 else None
    if isinstance(error, OfflineModeIsEnabled):
        return None
    return 0.5 * 2.0**attempt if isinstance(error, http_library().TransportError) else None


def _retry_after(error: BaseException | None) -> float | None:
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            value = response.headers.get("Retry-After", "")
            return float(value) if re.fullmatch("[0-9]{1,9}", value) else None
        error = error.__cause__
    return None


def explain(error: BaseException, what: str, repo_id: str) -> ConvertError:
    """Turn an error of the client into one sentence with the next step; status 2, but 1 for a conflict."""
    from huggingface_hub import errors

    answer = _SECRETS.sub("…", without_user(_answer_of(error).strip().split("\n")[0]))
    tail = f": {answer}" if answer else ""
    status = status_of(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        code, text, hint = "offline", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    elif isinstance(error, errors.LocalTokenNotFoundError):
        code, text, hint = "no-token", "there is no Hub token", "hf auth login, or set HF_TOKEN"
    elif status == 401:
        code, text = "token", "the Hub does not accept the token"
        hint = "hf auth login --force, or set HF_TOKEN to a valid token with write permission"
    elif status == 403:
        code, text = "forbidden", f"the token may not do that{tail}"
        hint = f"use a token with write permission for {repo_id.split('/')[0]}, or propose the change with --create-pr"
    elif status == 404:
        code, text, hint = "not-found", f"the Hub has no such thing{tail}", f"check the name {repo_id} and the token"
    elif status in (409, 412):
        code, text = "conflict", f"somebody else changed the repository meanwhile{tail}"
        hint = "look at the repository, and run it again"
    elif status == 429:
        wait = _retry_after(error)
        code, text = "quota", "the Hub's quota is used up"
        hint = f"run it again in {wait:.0f} seconds" if wait else "run it again in an hour"
    elif status is not None and status >= 500:
        code, text, hint = "server", f"the Hub answered {status}", "run it again; it continues where it stopped"
    elif status is not None:
        code, text, hint = "refused", f"the Hub answered {status}{tail}", "correct what it names, and run it again"
    elif isinstance(error, http_library().TimeoutException):
        code, text, hint = "timeout", "the Hub did not answer in time", "run it again, or give it more --timeout"
    elif lacks_xet(error):
        code, text, hint = "xet", "this Hub has no xet storage", "set HF_HUB_DISABLE_XET=1"
    elif isinstance(error, errors.HFValidationError):
        code, text, hint = "name", _SECRETS.sub("…", " ".join(str(error).split())), "USER/REPO"
    elif isinstance(error, ValueError) and "metadata" in str(error):
        code, text, hint = "card", _SECRETS.sub("…", " ".join(str(error).split())), "correct README.md"
    elif makes_no_sense(error):
        return _nonsense(f"its answer cannot be read ({type(error).__name__})", what, repo_id)
    else:
        endpoint = without_user(os.environ.get("HF_ENDPOINT", "the Hub"))
        code, text = "network", f"{endpoint} cannot be reached or broke the connection ({type(error).__name__})"
        hint = "check the connection, and run it again; it continues where it stopped"
    return ConvertError(
        f"could not {what}: {text}", code=code, key=repo_id, hint=hint, status=1 if code == "conflict" else 2
    )


def _nonsense(reason: str, what: str = "publish", repo_id: str = "") -> ConvertError:
    endpoint = without_user(os.environ.get("HF_ENDPOINT", "the Hub"))
    hint = "check HF_ENDPOINT, or update: pip install -U huggingface_hub"
    message = f"could not {what}: {endpoint} makes no sense: {reason}"
    return ConvertError(message, code="nonsense", key=repo_id, hint=hint)


def text_of(value: object) -> str:
    """Return a text of the Hub's.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError("a text was expected")
    return value


def _answer_of(error: BaseException | None) -> str:
    while error is not None:
        if getattr(error, "server_message", None):
            return str(error.server_message)  # type: ignore[attr-defined]
        error = error.__cause__
    return ""


def lacks_xet(error: BaseException) -> bool:
    """Whether an upload failed because the Hub has no xet: since huggingface_hub 1.20 the client does not ask before."""
    return isinstance(error, ConnectionError) and "xet-write-token" in str(error) and "404" in str(error)
