"""The embedded engine: generation on the training model itself, in the training processes.

Every rank of a model replica calls `generate_batch` with equal requests and gets all completions; data-parallel
replicas generate on their own. Context-parallel ranks of a replica share the requests among them.
Shapes: B sequences decoded together (slots), V vocabulary, N most new tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.decode import Decoder
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.rollout.engine import Completion, EngineError, GenerationStats, Request
from tulu_hpc.rollout.sampling import draw, uniform_numbers

_LENGTH_STEP = 64


class Detokenizer(Protocol):
    """The part of a tokenizer that is needed to look for stop strings."""

    def decode(self, token_ids: Any, /, **options: Any) -> Any: ...


class EmbeddedEngine:
    """Continuous batching with a shared-prefix key/value cache on the model that is being trained.

    A finished sequence's slot is taken by the next waiting request before the next step; a prompt is read once and
    stored once for all requests that have it, and forgotten with the last of them. The cache holds at most
    `max_sequences` sequences and their prompts. A request's tokens do not depend on the others'; its log-probs differ
    by rounding (about 1e-6 in fp32), as matrix products of another size may add in another order.

    Args:
        chunks: model chunks of this rank, wrapped by megatron or not; read at each call, so training updates are seen.
        groups: of this process.
        architecture: of the model.
        tokenizer: needed for stop strings only.
        max_sequences: decoded together; further requests wait for a slot.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        architecture: Architecture,
        tokenizer: Detokenizer | None,
        max_sequences: int,
    ) -> None:
        if max_sequences < 1:
            raise ValueError(f"max_sequences is {max_sequences}, need at least 1")
        self.chunks, self.groups, self.architecture = list(chunks), groups, architecture
        self.tokenizer, self.max_sequences = tokenizer, max_sequences
        self.version = 0
        self.stats = GenerationStats()
        self._decoder: Decoder | None = None
        self._capacity = (0, 0)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `generate_batch`; collective, so every rank of the replica awaits it at the same point."""
        return self.generate_batch(requests)

    async def update_weights(self, tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take note of the policy's version; the weights are the training model's, so none are accepted.

        Raises:
            EngineError: tensors were given.
        """
        if tensors is not None:
            raise EngineError("the embedded engine shares the trainer's weights: give tensors=None")
        self.version = version

    async def health(self) -> dict[str, Any]:
        """Always serving: the engine lives and dies with this process."""
        return {"engine": "embedded", "policy_version": self.version, "sequences": self.stats.sequences}

    def release(self) -> None:
        """Give the cache's memory back; the next call takes it again."""
        self._decoder, self._capacity = None, (0, 0)

    def generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests, on every rank of the replica.

        Raises:
            ValueError: an empty or too long prompt, a token id outside the vocabulary, or stop strings without a
                tokenizer.
        """
        self._check(requests)
        started = time.perf_counter()
        groups = self.groups
        mine = list(range(len(requests)))
        if groups.cp_size > 1:
            mine = _share_by_prompt(requests, groups.cp_rank, groups.cp_size)
        results = self._decode(requests, mine) if mine else {}
        if groups.cp_size > 1:
            parts: list[Any] = [None] * groups.cp_size
            dist.all_gather_object(parts, results, group=groups.pg.cp)
            results = {index: completion for part in parts for index, completion in part.items()}
        completions = [results[index] for index in range(len(requests))]
        self.stats.sequences += len(completions)
        self.stats.prompt_tokens += sum(len(request.token_ids) for request in requests)
        self.stats.new_tokens += sum(len(completion.token_ids) for completion in completions)
        self.stats.seconds += time.perf_counter() - started
        return completions

    def _check(self, requests: Sequence[Request]) -> None:
        vocabulary = self.architecture.vocab_size
        for request in requests:
            if not request.token_ids:
                raise ValueError(f"request {request.id!r}: the prompt is empty")
            if min(request.token_ids) < 0 or max(request.token_ids) >= vocabulary:
                raise ValueError(f"request {request.id!r}: a token id is outside the vocabulary of {vocabulary}")
            if len(request.token_ids) >= self.architecture.max_position_embeddings:
                raise ValueError(
                    f"request {request.id!r}: a prompt of {len(request.token_ids)} tokens, but the model has "
                    f"{self.architecture.max_position_embeddings} positions"
                )
            if request.sampling.stop_strings and self.tokenizer is None:
                raise ValueError(f"request {request.id!r}: stop strings need a tokenizer")

    def _decoder_for(self, sequences: int, length: int) -> Decoder:
        """A decoder with room for so many sequences of so many tokens; the last one is used again where it fits."""
        if self._decoder is None or self._capacity[0] < sequences or self._capacity[1] < length:
            length = -(-length // _LENGTH_STEP) * _LENGTH_STEP  # else every longer prompt would take new memory
            self._capacity = (max(sequences, self._capacity[0]), max(length, self._capacity[1]))
            self._decoder = None  # frees its memory before the next one takes more
            self._decoder = Decoder(self.chunks, self.groups, self.architecture, *self._capacity)
        return self._decoder

    def _decode(self, requests: Sequence[Request], indices: Sequence[int]) -> dict[int, Completion]:
        """The completions of the requests `indices`, by index."""
        longest = max(len(requests[i].token_ids) + requests[i].sampling.max_new_tokens for i in indices)
        slots = min(self.max_sequences, len(indices))
        decoder = self._decoder_for(slots, longest)
        decoder.cache.clear()
        waiting = _by_prompt(requests, indices)
        live: list[_Sequence] = []  # in the order of the decoder's slots
        results: dict[int, Completion] = {}
        while waiting or live:
            while waiting and len(live) < slots:  # also after first tokens that end their sequences at once
                new, logits_BV = self._open(decoder, requests, waiting, slots - len(live))
                live += new
                self._append(new, logits_BV, decoder.device)
                live = self._close(decoder, live, results)
            if live:
                logits_BV = decoder.step(torch.tensor([sequence.token_ids[-1] for sequence in live]))
                self.stats.decode_steps += 1
                self.stats.slot_steps += len(live)
                self._append(live, logits_BV, decoder.device)
                live = self._close(decoder, live, results)
        return results

    def _open(
        self, decoder: Decoder, requests: Sequence[Request], waiting: deque[_Prompt], free: int
    ) -> tuple[list[_Sequence], Tensor | None]:
        """Sequences for the free slots and the logits of their first tokens; prompts not read yet are read."""
        chosen: list[tuple[_Prompt, int]] = []  # with the number of sequences
        while waiting and free:
            prompt = waiting[0]
            count = min(free, len(prompt.indices))
            chosen.append((prompt, count))
            free -= count
            if count < len(prompt.indices):
                break
            waiting.popleft()
        unread = [prompt for prompt, _ in chosen if prompt.place is None]
        if unread:
            places, logits_PV = decoder.read([p.token_ids for p in unread], [len(p.indices) for p in unread])
            self.stats.prefill_tokens += sum(len(prompt.token_ids) for prompt in unread)
            for row, (prompt, place) in enumerate(zip(unread, places, strict=True)):
                prompt.place, prompt.logits_V = place, None if logits_PV is None else logits_PV[row]
        new, rows = [], []
        for prompt, count in chosen:
            assert prompt.place is not None
            decoder.cache.open([prompt.place] * count)
            new += [_Sequence(index, requests[index]) for index in prompt.indices[:count]]
            rows += [prompt.logits_V] * count
            prompt.indices = prompt.indices[count:]
        on_last_stage = [row for row in rows if row is not None]
        return new, torch.stack(on_last_stage) if on_last_stage else None

    def _append(self, sequences: Sequence[_Sequence], logits_BV: Tensor | None, device: torch.device) -> None:
        """Draw the next token of each sequence and see which end with it."""
        tokens_B, logprobs_B = self._draw(logits_BV, sequences, device)
        for sequence, token, logprob in zip(sequences, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sampling = sequence.request.sampling
            if token in sampling.stop_token_ids:
                sequence.ended, sequence.stop = True, token
            elif len(sequence.token_ids) == sampling.max_new_tokens:
                sequence.stop = self._stop_string(sequence)
                sequence.ended = True
            elif sampling.stop_strings:
                sequence.stop = self._stop_string(sequence)
                sequence.ended = sequence.stop is not None

    def _close(self, decoder: Decoder, live: list[_Sequence], results: dict[int, Completion]) -> list[_Sequence]:
        """Hand over what has ended; the last sequences move into the slots that it leaves. Returns the others."""
        count = sum(not sequence.ended for sequence in live)
        if count == len(live):
            return live
        for sequence in live:
            if sequence.ended:
                results[sequence.index] = sequence.completion(self.version)
        movers = iter([slot for slot in range(count, len(live)) if not live[slot].ended])
        keep = [next(movers) if live[slot].ended else slot for slot in range(count)]
        decoder.cache.keep(torch.tensor(keep, dtype=torch.int64))
        return [live[slot] for slot in keep]

    def _draw(
        self, logits_BV: Tensor | None, sequences: Sequence[_Sequence], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Sampled tokens and log-probs on the host, the same on all ranks that decode together.

        The last pipeline stage samples and the result is broadcast to the tensor- and pipeline-parallel ranks: two
        that drew different tokens from logits that differ in the last bit would go on with different sequences.
        """
        group = self.groups.pg.mp
        both = torch.empty(2, len(sequences), dtype=torch.float64, device=device)
        if logits_BV is not None:
            settings = [sequence.request.sampling for sequence in sequences]
            temperature = torch.tensor([each.temperature for each in settings], dtype=torch.float32, device=device)
            top_p = torch.tensor([each.top_p for each in settings], dtype=torch.float32, device=device)
            uniform = torch.tensor([sequence.uniform() for sequence in sequences], dtype=torch.float64, device=device)
            both[0], both[1] = draw(logits_BV, temperature, top_p, uniform)  # token ids are exact in fp64
        if group.size() > 1:
            source = dist.get_process_group_ranks(group)[-self.groups.tp_size]
            dist.broadcast(both, src=source, group=group)
        both = both.cpu()
        return both[0].long(), both[1].float()

    def _stop_string(self, sequence: _Sequence) -> str | None:
        strings = sequence.request.sampling.stop_strings
        if not strings:
            return None
        assert self.tokenizer is not None
        # A string of n bytes spans at most n tokens, and it was not there before the last token.
        window = max(len(string.encode()) for string in strings) + 1
        text = self.tokenizer.decode(sequence.token_ids[-window:], skip_special_tokens=False)
        return next((string for string in strings if string in text), None)


@dataclass
class _Prompt:
    """A prompt and the requests for it that have no slot yet.

    Attributes:
        place: in the cache; None before it was read.
        logits_V: of the token after it, on the last pipeline stage.
    """

    token_ids: Tensor
    indices: list[int]
    place: int | None = None
    logits_V: Tensor | None = None


class _Sequence:
    """A request in a slot."""

    def __init__(self, index: int, request: Request) -> None:
        self.index, self.request = index, request
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ended = False
        self.stop: int | str | None = None
        sampling = request.sampling
        random = sampling.temperature > 0
        self._uniform = uniform_numbers([request.seed], sampling.max_new_tokens)[0].tolist() if random else None

    def uniform(self) -> float:
        """The random number of the next token."""
        return 0.0 if self._uniform is None else self._uniform[len(self.token_ids)]

    def completion(self, version: int) -> Completion:
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason="length" if self.stop is None else "stop",
            stop_reason=self.stop,
            policy_version=version,
            id=self.request.id,
        )


def _by_prompt(requests: Sequence[Request], indices: Sequence[int]) -> deque[_Prompt]:
    """Requests with the same prompt side by side, so that few prompts are in the cache at a time."""
    found: dict[tuple[int, ...], _Prompt] = {}
    for index in indices:
        ids = tuple(requests[index].token_ids)
        if ids not in found:
            found[ids] = _Prompt(torch.tensor(ids, dtype=torch.int64), [])
        found[ids].indices.append(index)
    return deque(found.values())


def _share_by_prompt(requests: Sequence[Request], rank: int, size: int) -> list[int]:
    """Indices of this rank's requests: whole prompts, dealt in turn."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        index
        for index, request in enumerate(requests)
        if numbers.setdefault(tuple(request.token_ids), len(numbers)) % size == rank
    ]
