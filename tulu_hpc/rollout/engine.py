"""What a rollout engine is, whether it lives in the trainer's processes or in a server of its own.

Token ids in, token ids out: text is never tokenised again, so the trainer scores exactly what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor


class EngineError(RuntimeError):
    """The engine cannot serve requests (dead, unreachable, or between two weight versions)."""


class ServersLostError(EngineError):
    """No server is left that serves.

    Attributes:
        completions: those that came before, by the place of their request.
    """

    def __init__(self, message: str, completions: dict[int, Completion]) -> None:
        super().__init__(message)
        self.completions = completions


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: tokens are drawn from the smallest set that holds this much probability.
        max_new_tokens: completions end here with finish reason "length".
        stop_token_ids: each ends a completion and is its last token.
        stop_strings: each ends a completion once its text contains it; the tokens that complete it are kept.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got "
                f"{self.max_new_tokens}, {self.temperature}, {self.top_p}"
            )


@dataclass(frozen=True)
class Request:
    """One completion to make. Requests with the same prompt share its prefill.

    Attributes:
        token_ids: prompt.
        seed: of this completion alone; the sample does not depend on what else is in the batch.
        id: handed back with the completion.
    """

    token_ids: Sequence[int]
    sampling: Sampling
    seed: int = 0
    id: str = ""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `start` to `end` (exclusive) of a completion were drawn by the weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        token_ids: sampled tokens, the stop token included.
        logprobs: of each token under the policy that drew it: full vocabulary, at the sampling temperature (at
            temperature 1 if greedy), fp32. With top_p < 1 this is not renormalised over the nucleus.
        finish_reason: "stop" (a stop token or string) or "length".
        stop_reason: the token id or string that ended it, None for "length".
        policy_version: of the weights that drew the first token, as given to `update_weights`.
        version_spans: which weights drew which tokens; empty: all of them policy_version.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    policy_version: int
    id: str = ""
    version_spans: tuple[VersionSpan, ...] = ()


class RolloutEngine(Protocol):
    """The interface that stages program against."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests."""
        ...

    async def update_weights(self, tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Make the named tensors (Hugging Face names) the policy, as `version`."""
        ...

    async def health(self) -> dict[str, Any]:
        """Facts about the engine.

        Raises:
            EngineError: it does not serve.
        """
        ...


@dataclass
class GenerationStats:
    """Counts of one or more calls of an engine.

    Attributes:
        prompt_tokens: of all requests' prompts.
        prefill_tokens: of the prompts that were computed; requests with the same prompt share one (embedded only).
        decode_steps: forward passes that add one token to each live sequence (embedded only).
        slot_steps: live sequences, summed over those passes (embedded only).
    """

    sequences: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    slot_steps: int = 0
    seconds: float = 0.0
