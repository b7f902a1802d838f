"""Check requests before the page's framework handles them: host, address, files, size.

The framework would print a traceback for a forged request, answer to any host name, and keep uploads for an hour
however many they are.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import shutil
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

_API = "/gradio_api"
_POSTED = ("/upload", "/queue/join", "/reset", "/cancel")  # all that the page itself sends
_MOST_OF_A_REQUEST = 2**20  # bytes of one that is no upload
_FRAMING = 2**16  # bytes of an upload around its file


class Value(Enum):
    """What a function of the page takes: a file or none, a switch, a text, or a number."""

    FILE = auto()
    SWITCH = auto()
    TEXT = auto()
    NUMBER = auto()


_TYPES: Mapping[Value, type] = {Value.FILE: type(None), Value.SWITCH: bool, Value.TEXT: str, Value.NUMBER: int}


class Refused(Exception):
    """A request that is not let through: status code and a line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


class Guard:
    """ASGI middleware that lets through only what the page itself sends.

    Args:
        app: what it guards.
        host: the address that is listened on. Requests to another host are refused, so that no page of a stranger can
            reach this one under a name of its own (DNS rebinding). Where every address is listened on (``0.0.0.0``,
            ``::``), addresses in numbers and ``localhost`` are right.
        names: further host names by which the page is reached.
        uploads: the folder of the uploads.
        others: further folders that the page's own files lie in.
        functions: what each of the page's functions takes, by its number.
        most_file: bytes of an uploaded file. most: of all of them together; the oldest go for new ones.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        names: Collection[str] = (),
        uploads: Path,
        others: Collection[Path] = (),
        functions: Mapping[int, Sequence[Value]],
        most_file: int,
        most: int,
    ) -> None:
        self._app, self._host, self._names = app, host, {name.lower() for name in names}
        self._uploads, self._others = uploads, tuple(others)
        self._functions, self._most_file, self._most = dict(functions), most_file, most

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer or hand on a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if scope["type"] == "websocket":
                raise Refused(404, "There is nothing here.")
            self._check_host(headers.get("host", ""))
            if scope["method"] not in ("GET", "HEAD"):
                receive = await self._checked(scope, headers, receive)
        except Refused as refused:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await PlainTextResponse(refused.line, refused.status)(scope, receive, send)
            return
        await self._handed_on(scope, receive, send)

    async def _handed_on(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let the framework answer; what it fails at becomes one line in the log."""
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:  # the server would print a traceback
            reason = " ".join(str(error).split())[:200]
            log.warning("%s %.200r failed: %s (%s)", scope["method"], scope["path"], type(error).__name__, reason)
            if started:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await PlainTextResponse("The request failed.", 500)(scope, receive, send)

    def _check_host(self, header: str) -> None:
        name = host_name(header)
        if name == self._host.lower() or name in self._names:
            return
        here = _address(self._host)
        loopback = self._host == "localhost" or (here is not None and here.is_loopback)
        anywhere = here is not None and here.is_unspecified
        address = _address(name)
        if (loopback or anywhere) and (name == "localhost" or (address is not None and address.is_loopback)):
            return
        if anywhere and address is not None:
            return
        raise Refused(421, "This page is not served under that host name.")

    async def _checked(self, scope: MutableMapping[str, Any], headers: dict[str, str], receive: Receive) -> Receive:
        path = scope["path"].rstrip("/")
        if scope["method"] != "POST" or path not in [_API + posted for posted in _POSTED]:
            raise Refused(404, "There is nothing here.")
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "The length of the request has to be stated.")
        if path == f"{_API}/upload":
            if int(length) > self._most_file + _FRAMING:
                raise Refused(413, f"A file may have {self._most_file // 10**6} MB at most.")
            make_room(self._uploads, int(length), self._most)
            return receive
        if int(length) > _MOST_OF_A_REQUEST:
            raise Refused(413, "The request is too large.")
        body = await _body(receive)
        if path == f"{_API}/queue/join":
            self._check_call(body)
        return _again(body, receive)

    def _check_call(self, body: bytes) -> None:
        """Refuse what does not call one of the page's functions, with files from its own upload folder alone."""
        strange = Refused(400, "This is not a request of the page.")
        try:
            call = json.loads(body)
            kinds, values = self._functions[call["fn_index"]], call["data"]
            alike = isinstance(values, list) and len(values) == len(kinds)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise strange from None
        if not alike:
            raise strange
        for kind, value in zip(kinds, values, strict=True):
            if kind is Value.FILE and isinstance(value, dict):
                if not self._is_ours(value.get("path")):
                    raise Refused(403, "This file was not uploaded here.")
            elif not isinstance(value, _TYPES[kind]) or (kind is Value.NUMBER and isinstance(value, bool)):
                raise strange

    def _is_ours(self, path: object) -> bool:
        if not isinstance(path, str):
            return False
        try:
            real = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        return any(real.is_relative_to(folder.resolve()) for folder in (self._uploads, *self._others))


def host_name(header: str) -> str:
    """The name or address in a ``Host`` header, without port and brackets, in lower case.

    Examples:
        >>> host_name("[::1]:7860"), host_name("Localhost:7860")
        ('::1', 'localhost')
    """
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def make_room(folder: Path, needed: int, most: int) -> None:
    """Delete the oldest files of a folder until ``needed`` bytes more are at most ``most``.

    Raises:
        Refused: if that is not enough.
    """
    if needed > most:
        raise Refused(413, f"Files may have {most // 10**6} MB together.")
    files = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            if path.is_file():
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total + needed <= most:
            return
        with suppress(OSError):
            path.unlink()
        total -= size


def delete(folder: Path) -> None:
    """Delete a folder of uploads."""
    shutil.rmtree(folder, ignore_errors=True)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


async def _body(receive: Receive) -> bytes:
    """All of a request's body, of which the server has made sure that it is as long as stated."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "The request was cut off.")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that has been read once more, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
