"""The embedded engine: generation on the training model itself, in the training processes.

Every rank of a model replica calls `generate_batch` with equal requests and gets all completions; data-parallel
replicas generate on their own. Context-parallel ranks of a replica share the requests among them.
Shapes: B sequences decoded together (slots), V vocabulary, N most new tokens.
"""

from __future__ import annotations

import time
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

# Ended sequences are decoded along until this share of the slots is idle: moving the cache costs more than that.
_IDLE_SHARE = 0.25
_LENGTH_STEP = 64


class Detokenizer(Protocol):
    """The part of a tokenizer that is needed to look for stop strings."""

    def decode(self, token_ids: Any, /, **options: Any) -> Any: ...


@dataclass
class _Wave:
    """Requests decoded together, ordered so that those with the same prompt lie side by side."""

    order: list[int]  # positions in the caller's list
    prompts: list[Tensor]
    copies: list[int]


class EmbeddedEngine:
    """Batched generation with a key/value cache on the model that is being trained.

    Args:
        chunks: model chunks of this rank, wrapped by megatron or not; read at each call, so training updates are seen.
        groups: of this process.
        architecture: of the model.
        tokenizer: needed for stop strings only.
        max_sequences: decoded together; more requests are done in several waves.
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
            ValueError: an empty prompt, a token id outside the vocabulary, or stop strings without a tokenizer.
        """
        self._check(requests)
        started = time.perf_counter()
        groups = self.groups
        mine = list(range(len(requests)))
        if groups.cp_size > 1:
            mine = _share_by_prompt(requests, groups.cp_rank, groups.cp_size)
        results: dict[int, Completion] = {}
        for wave in self._waves(requests, mine):
            for index, completion in zip(wave.order, self._decode(requests, wave), strict=True):
                results[index] = completion
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
            if request.sampling.stop_strings and self.tokenizer is None:
                raise ValueError(f"request {request.id!r}: stop strings need a tokenizer")

    def _waves(self, requests: Sequence[Request], indices: Sequence[int]) -> list[_Wave]:
        """Batches of at most `max_sequences`, each prompt in as few of them as possible."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            by_prompt.setdefault(tuple(requests[index].token_ids), []).append(index)
        waves: list[_Wave] = []
        for prompt, members in by_prompt.items():
            tokens = torch.tensor(prompt, dtype=torch.int64)
            while members:
                if not waves or len(waves[-1].order) == self.max_sequences:
                    waves.append(_Wave([], [], []))
                wave = waves[-1]
                taken = members[: self.max_sequences - len(wave.order)]
                members = members[len(taken) :]
                wave.order += taken
                wave.prompts.append(tokens)
                wave.copies.append(len(taken))
        return waves

    def _decoder_for(self, sequences: int, length: int) -> Decoder:
        """A decoder with room for so many sequences of so many tokens; the last one is used again where it fits."""
        if self._decoder is None or self._capacity[0] < sequences or self._capacity[1] < length:
            length = -(-length // _LENGTH_STEP) * _LENGTH_STEP  # else every longer prompt would take new memory
            self._capacity = (max(sequences, self._capacity[0]), max(length, self._capacity[1]))
            self._decoder = None  # frees its memory before the next one takes more
            self._decoder = Decoder(self.chunks, self.groups, self.architecture, *self._capacity)
        return self._decoder

    def _decode(self, requests: Sequence[Request], wave: _Wave) -> list[Completion]:
        batch = [requests[index] for index in wave.order]
        limit = max(request.sampling.max_new_tokens for request in batch)
        decoder = self._decoder_for(len(batch), max(len(prompt) for prompt in wave.prompts) + limit)
        table = _SamplingTable(batch, limit, decoder.device)
        tokens_BN = torch.zeros(len(batch), limit, dtype=torch.int64)
        logprobs_BN = torch.zeros(len(batch), limit)
        length = torch.zeros(len(batch), dtype=torch.int64)
        stop: list[int | str | None] = [None] * len(batch)
        slots = torch.arange(len(batch))  # the sequence in each slot of the decoder
        live = torch.ones(len(batch), dtype=torch.bool)  # per slot
        logits_BV = decoder.prefill(wave.prompts, wave.copies)
        for position in range(limit):
            tokens_B, values_B = self._draw(logits_BV, table, slots, position)
            active = slots[live]
            tokens_BN[active, position] = tokens_B[live]
            logprobs_BN[active, position] = values_B[live]
            length[active] = position + 1
            ended = table.ended(slots, tokens_B, position)
            for slot in (ended & live).nonzero()[:, 0].tolist():
                sequence, token = int(slots[slot]), int(tokens_B[slot])
                stop[sequence] = token if token in batch[sequence].sampling.stop_token_ids else None
            if table.has_stop_strings:
                for slot in (live & ~ended).nonzero()[:, 0].tolist():
                    sequence = int(slots[slot])
                    stop[sequence] = self._stop_string(batch[sequence], tokens_BN[sequence, : position + 1])
                    ended[slot] = stop[sequence] is not None
            live &= ~ended
            self.stats.decode_steps += 1
            count = int(live.sum())
            if count == 0 or position + 1 == limit:
                break
            keep = None
            if count <= (1 - _IDLE_SHARE) * len(slots):
                keep = live.nonzero()[:, 0]
                slots, tokens_B, live = slots[keep], tokens_B[keep], live[keep]
            logits_BV = decoder.step(tokens_B, keep)
        return [
            Completion(
                token_ids=tokens_BN[i, : int(length[i])].tolist(),
                logprobs=logprobs_BN[i, : int(length[i])].tolist(),
                finish_reason="length" if stop[i] is None else "stop",
                stop_reason=stop[i],
                policy_version=self.version,
                id=request.id,
            )
            for i, request in enumerate(batch)
        ]

    def _draw(
        self, logits_BV: Tensor | None, table: _SamplingTable, slots: Tensor, position: int
    ) -> tuple[Tensor, Tensor]:
        """Sampled tokens and log-probs of all slots on the host, the same on all ranks that decode together.

        The last pipeline stage samples and the result is broadcast to the tensor- and pipeline-parallel ranks: two
        that drew different tokens from logits that differ in the last bit would go on with different sequences.
        """
        group = self.groups.pg.mp
        both = torch.empty(2, len(slots), dtype=torch.float64, device=table.device)
        if logits_BV is not None:
            tokens_B, logprobs_B = draw(logits_BV, *table.rows(slots, position))
            both[0], both[1] = tokens_B, logprobs_B  # token ids are exact in fp64
        if group.size() > 1:
            source = dist.get_process_group_ranks(group)[-self.groups.tp_size]
            dist.broadcast(both, src=source, group=group)
        both = both.cpu()
        return both[0].long(), both[1].float()

    def _stop_string(self, request: Request, tokens: Tensor) -> str | None:
        strings = request.sampling.stop_strings
        if not strings:
            return None
        assert self.tokenizer is not None
        # A string of n bytes spans at most n tokens, and it was not there before the last token.
        window = max(len(string.encode()) for string in strings) + 1
        text = self.tokenizer.decode(tokens[-window:].tolist(), skip_special_tokens=False)
        return next((string for string in strings if string in text), None)


class _SamplingTable:
    """Sampling parameters of a wave as tensors, and its random numbers."""

    def __init__(self, batch: Sequence[Request], limit: int, device: torch.device) -> None:
        self.device = device
        settings = [request.sampling for request in batch]
        self.temperature = torch.tensor([each.temperature for each in settings], dtype=torch.float32, device=device)
        self.top_p = torch.tensor([each.top_p for each in settings], dtype=torch.float32, device=device)
        random = any(each.temperature > 0 for each in settings)
        seeds = [request.seed for request in batch]
        numbers = uniform_numbers(seeds, limit) if random else torch.zeros(len(batch), limit, dtype=torch.float64)
        self.uniform = numbers.to(device)
        self.max_new = torch.tensor([each.max_new_tokens for each in settings])
        width = max((len(each.stop_token_ids) for each in settings), default=0)
        padded = [[*each.stop_token_ids, *[-1] * (width - len(each.stop_token_ids))] for each in settings]
        self.stop_ids = torch.tensor(padded, dtype=torch.int64).view(len(batch), width)
        self.has_stop_strings = any(each.stop_strings for each in settings)

    def rows(self, slots: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Temperature, top_p and uniform number of each slot."""
        if len(slots) == len(self.temperature):
            return self.temperature, self.top_p, self.uniform[:, position]
        index = slots.to(self.device)
        return self.temperature[index], self.top_p[index], self.uniform[index, position]

    def ended(self, slots: Tensor, tokens_B: Tensor, position: int) -> Tensor:
        """Slots whose sequence drew a stop token or has no tokens left."""
        return (self.stop_ids[slots] == tokens_B[:, None]).any(1) | (self.max_new[slots] <= position + 1)


def _share_by_prompt(requests: Sequence[Request], rank: int, size: int) -> list[int]:
    """Indices of this rank's requests: whole prompts, dealt in turn."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        index
        for index, request in enumerate(requests)
        if numbers.setdefault(tuple(request.token_ids), len(numbers)) % size == rank
    ]
