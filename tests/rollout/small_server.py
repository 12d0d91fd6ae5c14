"""A small HTTP server in the place of vLLM, which answers, hangs, lies and dies as a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tulu_hpc.rollout.http import Address

Handler = Callable[["SmallServer", str, Any], Awaitable[Any]]


class Raw:
    """Bytes to send as they are, after which the connection is closed."""

    def __init__(self, content: bytes) -> None:
        self.content = content


class Status:
    """An answer with another status than 200."""

    def __init__(self, code: int, body: Any = None) -> None:
        self.code, self.body = code, body


def answer_bytes(body: Any, code: int = 200) -> bytes:
    payload = json.dumps(body).encode()
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (code, len(payload)) + payload


def completion(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A proper answer of /inference/v1/generate: as many tokens as asked for, their values from the prompt and seed."""
    sampling = body["sampling_params"]
    tokens = [(body["token_ids"][0] + sampling["seed"] + place) % 50 for place in range(sampling["max_tokens"])]
    choice = {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in tokens]},
        "finish_reason": "length",
        "stop_reason": None,
        "weight_versions": [{"version": "7", "start": 0, "end": len(tokens)}],
    }
    return {"request_id": f"generate-tokens-{body['request_id']}", "choices": [choice | changes]}


class Events:
    """A stream of events, each sent when it comes; `end` is sent after the last (a proper end by default)."""

    def __init__(self, events: AsyncIterator[Any], end: bytes = b"data: [DONE]\n\n") -> None:
        self.events, self.end = events, end


def chunk(content: bytes) -> bytes:
    return b"%x\r\n" % len(content) + content + b"\r\n"


class SmallServer:
    """Use as `async with`; `requests` are (path, body) in the order of their arrival."""

    def __init__(self, generate: Handler | None = None, **others: Any) -> None:
        self.generate, self.others = generate, others
        self.requests: list[tuple[str, Any]] = []
        self.open, self.most_open = 0, 0  # generation requests
        self.hung_up = 0  # connections that the client closed before their answer

    async def __aenter__(self) -> SmallServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = Address("127.0.0.1", self._server.sockets[0].getsockname()[1])
        self._connections: set[asyncio.StreamWriter] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Refuse connections and break those that are open."""
        self._server.close()
        for writer in self._connections:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            _, path, _ = head.split(" ", 2)
            length = int(head.lower().split("content-length:")[1].split()[0])
            content = await reader.readexactly(length)
            body = json.loads(content) if content else None
            self.requests.append((path, body))
            handling = asyncio.create_task(self._answer(path, body))
            gone = asyncio.create_task(reader.read(1))
            await asyncio.wait({handling, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not handling.done():
                self.hung_up += 1
                handling.cancel()
                return
            found = handling.result()
            if isinstance(found, Raw):
                writer.write(found.content)
            elif isinstance(found, Events):
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                async for event in found.events:
                    writer.write(chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
                    await writer.drain()
                writer.write((chunk(found.end) if found.end else b"") + b"0\r\n\r\n")
            elif isinstance(found, Status):
                writer.write(answer_bytes(found.body, found.code))
            else:
                writer.write(answer_bytes(found))
            await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, path: str, body: Any) -> Any:
        if path == "/inference/v1/generate":
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            try:
                return await self.generate(self, path, body) if self.generate else completion(body)
            finally:
                self.open -= 1
        found = self.others.get(path.strip("/").split("?")[0].replace("/", "_"))
        if found is not None:
            return await found(self, path, body) if callable(found) else found
        return {"is_paused": False} if path == "/is_paused" else Status(404)
