"""One attempt at one request: by /inference/v1/generate, or as a stream of /v1/completions where that is absent.

Every attempt has an id of its own, which the server hands back with the answer. An answer to another attempt (a proxy
that repeats one, a server that comes back from the dead) is dropped.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

from tulu_hpc.rollout import vllm_wire as wire
from tulu_hpc.rollout.engine import Completion, Request
from tulu_hpc.rollout.http import HttpError, request, stream
from tulu_hpc.rollout.server import GENERATE
from tulu_hpc.rollout.vllm_pool import Remote

_ABSENT = (403, 404, 405)  # the endpoint is not there
_MARK = "tulu-"
_NAME_LENGTH = 80


class OtherAnswerError(wire.MalformedError):
    """The answer is to another attempt."""


@dataclass(frozen=True)
class Attempt:
    """An attempt at a request.

    Attributes:
        id: `tulu-NAME-UNIQUE-NUMBER`; in the server's log, and in its answer.
    """

    request: Request
    id: str

    def check_id(self, found: Any) -> None:
        """Compare with the id of an answer. Servers put something before it; some may name requests themselves.

        Raises:
            OtherAnswerError: it names another attempt of a client of this kind.
        """
        if isinstance(found, str) and _MARK in found and not found.endswith(self.id):
            raise OtherAnswerError(f"an answer to {found[-160:]!r} instead of {self.id!r}")


class Attempts:
    """Numbers the attempts at one request.

    Attributes:
        name: of the request in messages: its id, else its place in the call.
    """

    def __init__(self, request: Request, place: int) -> None:
        self.request, self.name, self._made = request, request.id or str(place), 0
        name = re.sub(r"[^A-Za-z0-9_.:#-]", "_", self.name)[:_NAME_LENGTH]
        self._base = f"{_MARK}{name}-{uuid.uuid4().hex[:12]}"

    def next(self) -> Attempt:
        """Another one."""
        self._made += 1
        return Attempt(self.request, f"{self._base}-{self._made}")


async def exchange(remote: Remote, attempt: Attempt, vocab_size: int, seconds: float) -> Completion:
    """The completion, or what is wrong.

    Raises:
        HttpError: naming the server: no complete answer within `seconds`, or another status than 2xx.
        MalformedError: naming the server: an answer that is not what was asked for.
        OtherAnswerError, UnknownWeightsError: kinds of these.
    """
    try:
        if remote.has_generate:
            try:
                return await _generate(remote, attempt, vocab_size, seconds)
            except HttpError as error:
                if error.status not in _ABSENT:
                    raise
                remote.has_generate = False
        return await _completions(remote, attempt, vocab_size, seconds)
    except wire.MalformedError as error:
        raise type(error)(f"{remote.address}: {error}") from None


async def score(remote: Remote, attempt: Attempt, *, seconds: float) -> list[float]:
    """Log-probs of the request's tokens, all but the first, at temperature 1.

    Raises:
        HttpError, MalformedError: as `exchange`.
    """
    tokens = list(attempt.request.token_ids)
    body = {
        "request_id": attempt.id,
        "token_ids": tokens,
        "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0},
    }
    answer = await request(remote.address, "POST", GENERATE, body, seconds=seconds)
    try:
        attempt.check_id(answer.get("request_id"))
        entries = answer["prompt_logprobs"][1:]
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(tokens[1:], entries, strict=True)]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise wire.MalformedError(f"{remote.address}: no log-probs of a prompt: {error!r}") from None


async def _generate(remote: Remote, attempt: Attempt, vocab_size: int, seconds: float) -> Completion:
    body = {"request_id": attempt.id, **wire.generate_body(attempt.request)}
    answer = await request(remote.address, "POST", GENERATE, body, seconds=seconds)
    attempt.check_id(answer.get("request_id") if isinstance(answer, dict) else None)
    return wire.parse_generate(answer, attempt.request, vocab_size, remote.version)


async def _completions(remote: Remote, attempt: Attempt, vocab_size: int, seconds: float) -> Completion:
    """As a stream: while a server is paused for an update no token comes, so the version that this client knows at the
    arrival of a token is that of the weights that drew it."""
    answer = wire.StreamedAnswer()
    reports = remote.reports

    def take(event: Any) -> None:
        attempt.check_id(event.get("id") if isinstance(event, dict) else None)
        answer.add(event, remote.version)

    body = {"request_id": attempt.id, **wire.completions_body(attempt.request)}
    await stream(remote.address, wire.COMPLETIONS, body, take, seconds=seconds)
    if remote.reports != reports:
        raise wire.MalformedError("its weights changed meanwhile, and it does not say which tokens are of which")
    return answer.completion(attempt.request, vocab_size)
