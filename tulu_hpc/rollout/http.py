"""A small asynchronous HTTP/1.1 client: one connection per request, a deadline for each, strict about what comes back,
whole or as a stream of events.

One connection per request, because then a dead server is seen at once, and closing it tells the server to give up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0
_MAX_HEADER_BYTES = 1 << 16
_MAX_BODY_BYTES = 1 << 30


class HttpError(RuntimeError):
    """A request failed; `status` is None when no complete answer came (refused, reset, late or malformed)."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Address:
    """Host and port of a server."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """From `http://host:port`.

        Raises:
            ValueError: another scheme, a path, or no host or port.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not a server: {error}") from None
        if parts.scheme != "http" or not parts.hostname or port is None or parts.path.strip("/") or parts.query:
            raise ValueError(f"{url!r} is not a server: need http://host:port")
        return cls(parts.hostname, port)

    def __str__(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


async def request(address: Address, method: str, path: str, body: Any = None, *, seconds: float) -> Any:
    """The JSON answer of a server (None if it is empty).

    Args:
        body: sent as JSON; None for no body.
        seconds: for the whole exchange.

    Raises:
        HttpError: naming server and path: no answer in time, a broken one, or a status other than 2xx.
    """
    pieces: list[bytes] = []
    where = await _exchange(address, method, path, body, pieces.append, seconds)
    payload = b"".join(pieces)
    return _json(where, payload) if payload else None


async def stream(address: Address, path: str, body: Any, on_event: Callable[[Any], None], *, seconds: float) -> None:
    """Server-sent events in answer to a POST, each given to `on_event` as JSON when it arrives, up to [DONE].

    Whether the last event was the last one meant to come is for the caller to see.

    Raises:
        HttpError: as `request`; also a stream that breaks off, or that holds an error.
    """
    where, rest, done = f"POST {address}{path}", b"", False

    def take(piece: bytes) -> None:
        nonlocal rest, done
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.strip().partition(b":")
            done = done or (name == b"data" and value.strip() == b"[DONE]")
            if name == b"data" and not done:
                event = _json(where, value)
                if isinstance(event, dict) and event.get("error") is not None:
                    raise HttpError(f"{where}: error in the stream: {str(event['error'])[:500]}")
                on_event(event)

    await _exchange(address, "POST", path, body, take, seconds)
    if rest.strip():
        raise HttpError(f"{where}: the stream ended inside a line: {rest[:200]!r}")


def _json(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise HttpError(f"{where}: the answer is not JSON: {text[:200].decode(errors='replace')!r}") from None


async def _exchange(
    address: Address, method: str, path: str, body: Any, take: Callable[[bytes], None], seconds: float
) -> str:
    """Ask, and give the pieces of a good answer to `take`; what was asked where, for messages."""
    where = f"{method} {address}{path}"
    failed: list[bytes] = []
    try:
        async with asyncio.timeout(seconds):
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(address.host, address.port, limit=_MAX_HEADER_BYTES)
            try:
                writer.write(_message(address, method, path, body))
                await writer.drain()
                status, headers = await _read_head(reader)
                while 100 <= status < 200:
                    status, headers = await _read_head(reader)
                good = 200 <= status < 300
                await _read_body(reader, headers, take if good else failed.append)
            finally:
                # Nothing is waited for here: a cancellation that arrived meanwhile would be lost.
                writer.transport.abort()
    except TimeoutError:
        raise HttpError(f"{where}: no complete answer within {seconds:g} s") from None
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise HttpError(f"{where}: {error or type(error).__name__}") from error
    if not good:
        raise HttpError(f"{where}: status {status}: {b''.join(failed)[:500].decode(errors='replace')}", status)
    return where


def _message(address: Address, method: str, path: str, body: Any) -> bytes:
    payload = b"" if body is None else json.dumps(body).encode()
    host = f"[{address.host}]" if ":" in address.host else address.host
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}:{address.port}\r\nConnection: close\r\nAccept: application/json\r\n"
    )
    if body is not None:
        head += "Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode("ascii") + payload


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str], take: Callable[[bytes], None]) -> None:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        await _read_chunks(reader, take)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        if not 0 <= length <= _MAX_BODY_BYTES:
            raise ValueError(f"an answer of {length} bytes")
        take(await reader.readexactly(length))
    else:  # without a length a body that was cut off looks whole
        raise ValueError("an answer without Content-Length")


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    first = lines[0].split(" ", 2)
    if len(first) < 2 or not first[0].startswith("HTTP/1.") or not first[1].isdigit():
        raise ValueError(f"not an HTTP answer: {lines[0][:100]!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return int(first[1]), headers


async def _read_chunks(reader: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
    total = 0
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        total += size
        if size < 0 or total > _MAX_BODY_BYTES:
            raise ValueError(f"an answer of more than {_MAX_BODY_BYTES} bytes")
        if size == 0:
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
            return
        take(await reader.readexactly(size))
        if await reader.readexactly(2) != b"\r\n":
            raise ValueError("a chunk that is longer than it says")
