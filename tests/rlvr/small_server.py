"""A small deterministic engine behind vLLM's endpoints, in a process of its own: `small_server.py STOP VOCABULARY`.

Its tokens are a function of the request's seed, the position, and the bytes of the weights it holds (a checkpoint read
through /update_weights), so a run that trains other weights, or asks in another order of updates, gets other samples.
It knows pauses and weight versions per token as vLLM does. Its log-probs are those of no model: only what lies around
the engine can be tested with it. It prints its port.

POST /tempo {"seconds": s} sets the time of a token; {"hold": n} lets n more requests finish and holds the others;
{"broken": true}: token ids that do not exist. What is not given is off.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path
from typing import Any


class Engine:
    def __init__(self, stop: int, vocabulary: int) -> None:
        self.stop, self.vocabulary = stop, vocabulary
        self.weights, self.version, self.incoming = b"first", "0", b""
        self.running = asyncio.Event()
        self.running.set()
        self.tempo, self.hold, self.broken = 0.0, -1, False
        self.answered = 0

    async def answer(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        path = path.partition("?")[0]
        if path == "/inference/v1/generate":
            return await self.generate(body)
        if path == "/pause":
            self.running.clear()
        elif path == "/resume":
            self.running.set()
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/start_weight_update":
            self.incoming = b""
        elif path == "/update_weights":
            self.incoming += Path(body["update_info"]["path"]).read_bytes()
        elif path == "/finish_weight_update":
            self.weights, self.version = hashlib.sha256(self.incoming).digest(), body["weight_version"]
        elif path == "/tempo":
            self.tempo, self.hold, self.broken = body.get("seconds", 0.0), body.get("hold", -1), "broken" in body
            self.answered = 0
        elif path == "/is_paused":
            return {"is_paused": not self.running.is_set()}
        elif path == "/weight_info":
            return {"weight_version": self.version}
        else:
            return None
        return {}

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        if "prompt_logprobs" in sampling:
            return {"prompt_logprobs": [{str(token): {"logprob": -1.0}} for token in body["token_ids"]]}
        tokens: list[int] = []
        spans: list[dict[str, Any]] = []
        while len(tokens) < sampling["max_tokens"]:
            await asyncio.sleep(self.tempo)
            await self.running.wait()
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": len(tokens), "end": len(tokens)})
            text = f"{sampling['seed']} {len(tokens)}".encode() + self.weights
            number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
            tokens.append(self.stop if number % 5 == 0 else number // 5 % self.vocabulary)
            spans[-1]["end"] = len(tokens)
            if tokens[-1] == self.stop:
                break
        while self.hold >= 0 and self.answered >= self.hold:
            await asyncio.sleep(0.005)
        self.answered += 1
        ended = tokens[-1] == self.stop
        choice = {
            "token_ids": [-1] if self.broken else tokens,
            "logprobs": {"content": [{"token_id": token, "logprob": -token / 97 - 0.1} for token in tokens]},
            "finish_reason": "stop" if ended else "length",
            "stop_reason": self.stop if ended else None,
            "weight_versions": spans,
        }
        return {"choices": [choice]}


async def main(stop: int, vocabulary: int) -> None:
    engine = Engine(stop, vocabulary)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            length = next(int(line[15:]) for line in head if line.lower().startswith("content-length:"))
            body = json.loads(await reader.readexactly(length) or b"{}")
            found = await engine.answer(method, path, body)
            payload = json.dumps(found or {}).encode()
            status = "404 Not Found" if found is None else "200 OK"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
            await writer.drain()
        except (ConnectionError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
