"""The HTTP client against servers that answer, answer badly, or do not answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.rollout.small_server import Raw, SmallServer, Status
from tulu_hpc.rollout.http import Address, HttpError, request
from tulu_hpc.rollout.server import free_port


def ask(answer: Any, seconds: float = 5.0) -> Any:
    async def exchange() -> Any:
        async with SmallServer(answer=answer) as server:
            return await request(server.address, "POST", "/answer", {"a": 1}, seconds=seconds)

    return asyncio.run(exchange())


def test_json_both_ways() -> None:
    async def echo(server: SmallServer, path: str, body: Any) -> Any:
        return {"got": body}

    assert ask(echo) == {"got": {"a": 1}}


def test_chunks_and_an_early_answer() -> None:
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert ask(Raw(head + b'4;x=y\r\n{"b"\r\n3\r\n: 2\r\n1\r\n}\r\n0\r\nTrailer: z\r\n\r\n')) == {"b": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes read"),
        (b"hello\r\n\r\n", "not an HTTP answer"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a"', "4 bytes read on a total of 9"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}', "without Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "invalid literal"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n", "-4 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{a}", "not JSON"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}x", "bytes read"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n", "longer than it says"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 17) + b"\r\n\r\n", "limit"),
    ],
)
def test_broken_answers(content: bytes, words: str) -> None:
    with pytest.raises(HttpError, match=words) as caught:
        ask(Raw(content))
    assert "/answer" in str(caught.value)


def test_status() -> None:
    with pytest.raises(HttpError, match=r"status 503.*busy") as caught:
        ask(Status(503, {"error": "busy"}))
    assert caught.value.status == 503


def test_deadline() -> None:
    async def never(server: SmallServer, path: str, body: Any) -> Any:
        await asyncio.Event().wait()

    started = time.perf_counter()
    with pytest.raises(HttpError, match=r"no complete answer within 0\.2 s"):
        ask(never, seconds=0.2)
    assert time.perf_counter() - started < 4


def test_nobody_there() -> None:
    with pytest.raises(HttpError, match="Connect call failed"):
        asyncio.run(request(Address("127.0.0.1", free_port("127.0.0.1")), "GET", "/", seconds=5))


@pytest.mark.parametrize("url", ["https://a:1", "http://a", "http://a:1/v1", "a:1", "http://:5", "http://a:99999"])
def test_not_a_server(url: str) -> None:
    with pytest.raises(ValueError, match="not a server"):
        Address.parse(url)


def test_addresses() -> None:
    assert Address.parse("http://10.0.0.3:8000/") == Address("10.0.0.3", 8000)
    assert str(Address.parse("http://[::1]:80")) == "http://[::1]:80"
