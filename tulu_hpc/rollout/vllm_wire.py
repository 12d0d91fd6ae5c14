"""Requests and answers of vLLM: token ids and log-probs, checked one by one.

`/inference/v1/generate` says which weights drew which token. `/v1/completions` (servers without it) does not: it is
read as a stream, and each token is of the weights that the server had when it came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tulu_hpc.rollout.engine import Completion, Request, Sampling, VersionSpan

COMPLETIONS = "/v1/completions"
_SEED_MASK = (1 << 63) - 1  # vLLM's seeds are signed


class MalformedError(RuntimeError):
    """An answer is not what the request asked for."""


class UnknownWeightsError(MalformedError):
    """An answer of weights that nobody sent: the server was started again, or an update of it broke off."""


def generate_body(request: Request) -> dict[str, Any]:
    """Body of /inference/v1/generate."""
    return {
        "model": "policy",
        "token_ids": list(request.token_ids),
        "sampling_params": _sampling(request),
        "stream": False,
    }


def completions_body(request: Request) -> dict[str, Any]:
    """Body of /v1/completions."""
    return {
        "model": "policy",
        "prompt": list(request.token_ids),
        "return_token_ids": True,
        "stream": True,
        **_sampling(request),
    }


def _sampling(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    values: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed & _SEED_MASK,
        "n": 1,
        "logprobs": 0,  # of the sampled token only
        "ignore_eos": True,  # what ends an answer is said by the request, not by the model's files
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.stop_strings:
        values["stop"] = list(sampling.stop_strings)
    return values


def parse_generate(answer: Any, request: Request, vocab_size: int, version: int | None) -> Completion:
    """The completion of an answer of /inference/v1/generate.

    Args:
        version: of the server's weights, for servers that do not report it; None if unknown.

    Raises:
        MalformedError: naming what is wrong.
    """
    choice = _only_choice(answer)
    tokens = _tokens(choice.get("token_ids"), request.sampling, vocab_size)
    logprobs = choice.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list) or len(entries) != len(tokens):
        raise MalformedError(
            f"{len(tokens)} tokens, but {len(entries) if isinstance(entries, list) else 'no'} log-probs"
        )
    for token, entry in zip(tokens, entries, strict=True):
        if not isinstance(entry, dict) or entry.get("token_id", token) != token:
            raise MalformedError(f"the log-prob {str(entry)[:100]} is not of token {token}")
    values = _logprobs([entry.get("logprob") for entry in entries])
    spans = _spans(choice.get("weight_versions"), len(tokens), version)
    return _completion(choice, request, tokens, values, spans)


class StreamedAnswer:
    """An answer of /v1/completions, event by event."""

    def __init__(self) -> None:
        self._tokens: list[Any] = []
        self._logprobs: list[Any] = []
        self._versions: list[int | None] = []  # of each token
        self._end: dict[str, Any] | None = None

    def add(self, event: Any, version: int | None) -> None:
        """Take what came while the server had the weights `version`.

        Raises:
            MalformedError: it is no part of an answer.
        """
        choice = _only_choice(event)
        tokens = choice.get("token_ids") or []
        logprobs = choice.get("logprobs")
        values = (logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None) or []
        if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
            raise MalformedError(f"not as many log-probs as tokens: {str(choice)[:200]}")
        if self._end is not None:
            raise MalformedError(f"more after the end of the answer: {str(choice)[:200]}")
        self._tokens += tokens
        self._logprobs += values
        self._versions += [version] * len(tokens)
        if choice.get("finish_reason") is not None:
            self._end = choice

    def completion(self, request: Request, vocab_size: int) -> Completion:
        """The completion, when the stream has ended.

        Raises:
            MalformedError: it ended without a finish reason, however properly, or is not what was asked for.
        """
        if self._end is None:
            raise MalformedError(f"the stream ended after {len(self._tokens)} tokens without a finish_reason")
        tokens = _tokens(self._tokens, request.sampling, vocab_size)
        return _completion(self._end, request, tokens, _logprobs(self._logprobs), _spans_of(self._versions))


def _spans_of(versions: Sequence[int | None]) -> tuple[VersionSpan, ...]:
    spans: list[VersionSpan] = []
    for place, version in enumerate(versions):
        if version is None:
            raise UnknownWeightsError("the server does not say which weights it has, and none were sent to it")
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].start, place + 1)
        else:
            spans.append(VersionSpan(version, place, place + 1))
    return tuple(spans)


def _only_choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise MalformedError(f"not one choice: {str(answer)[:200]}")
    return choices[0]


def _tokens(found: Any, sampling: Sampling, vocab_size: int) -> list[int]:
    if not isinstance(found, list) or not found:
        raise MalformedError("no token_ids")
    if not all(type(token) is int and 0 <= token < vocab_size for token in found):
        raise MalformedError(f"a token id outside the vocabulary of {vocab_size}")
    if len(found) > sampling.max_new_tokens:
        raise MalformedError(f"{len(found)} tokens where at most {sampling.max_new_tokens} were asked for")
    return found


def _logprobs(found: Sequence[Any]) -> list[float]:
    for value in found:
        # A little above 0 is rounding; -9999 is how vLLM writes minus infinity.
        if not isinstance(value, (int, float)) or not -9000 < value < 1e-3 or math.isnan(value):
            raise MalformedError(f"a log-prob of {value!r} for a sampled token")
    return [float(value) for value in found]


def _spans(found: Any, count: int, version: int | None) -> tuple[VersionSpan, ...]:
    if found is None:
        return _spans_of([version] * count)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise MalformedError(f"weight versions that are none: {str(found)[:200]}")
    spans: list[VersionSpan] = []
    end = 0
    for entry in found:
        start, stop = entry.get("start"), entry.get("end")
        if type(start) is not int or type(stop) is not int or start != end or stop <= start:
            raise MalformedError(f"weight versions with gaps: {str(found)[:200]}")
        try:
            spans.append(VersionSpan(int(entry["version"]), start, stop))
        except (TypeError, KeyError, ValueError):
            raise UnknownWeightsError(f"weights {entry.get('version')!r}, which nobody sent, drew tokens") from None
        end = stop
    if end != count:
        raise MalformedError(f"weight versions of {end} tokens, but there are {count}")
    return tuple(spans)


def _completion(
    choice: dict[str, Any], request: Request, tokens: list[int], logprobs: list[float], spans: tuple[VersionSpan, ...]
) -> Completion:
    sampling, reason, stopped_by = request.sampling, choice.get("finish_reason"), choice.get("stop_reason")
    if reason == "length":
        if len(tokens) != sampling.max_new_tokens:
            raise MalformedError(
                f"cut at {len(tokens)} of {sampling.max_new_tokens} tokens: max_model_len is too small"
            )
        stopped_by = None
    elif reason == "stop":
        if tokens[-1] in sampling.stop_token_ids and not isinstance(stopped_by, str):
            stopped_by = tokens[-1]
        elif stopped_by not in sampling.stop_strings:
            raise MalformedError(f"stopped by {stopped_by!r}, which the request does not name")
    else:
        raise MalformedError(f"finish_reason {reason!r}: the answer is not finished")
    return Completion(
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason="stop" if reason == "stop" else "length",
        stop_reason=stopped_by,
        policy_version=spans[0].version,
        id=request.id,
        version_spans=spans,
    )
