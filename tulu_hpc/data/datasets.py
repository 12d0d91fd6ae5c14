"""Records to items: rendering, masks, tokenisation and truncation, with a count of everything cut or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import torch

from tulu_hpc.data.chat_template import (
    ChatTemplate,
    Conversation,
    MaskProofError,
    encode_conversations,
    encode_texts,
    render_prompt,
)
from tulu_hpc.data.packed_batch import Item, TokenSequence
from tulu_hpc.data.records import LabelledRecord, PreferenceRecord, RlvrRecord, SftRecord

OnError = Literal["raise", "skip"]
T = TypeVar("T")
WEIGHT, LABEL = "weight", "label"  # per-sequence columns; label: 1 desirable, 0 undesirable
CHUNK = 1024  # conversations encoded together: enough for the tokenizer's threads, little enough for memory


class Counted(list[T]):
    """A list with counts of what happened on the way: `rows`, `kept`, `cut`, and one count per reason of a drop."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter(rows=0, kept=0, cut=0)

    def summary(self) -> str:
        """One line: rows read, kept, cut, and the reasons for the rest."""
        rest = [f"{count} {name}" for name, count in self.counts.items() if name not in ("rows", "kept") and count]
        return f"{self.counts['kept']} of {self.counts['rows']} rows" + (f" ({', '.join(rest)})" if rest else "")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer: token ids ending with the generation prompt, and the record its verifier reads."""

    token_ids: list[int]
    record: RlvrRecord


def sft_items(
    records: Iterable[SftRecord],
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    *,
    on_error: OnError = "raise",
) -> Counted[Item]:
    """One ordinary sequence per conversation; all assistant turns are trained.

    As in Tulu 3, the first `max_length` tokens are kept and a row without any trained token is dropped. Tokens after
    the last trained one are left out: nothing reads them.

    Raises:
        MaskProofError: naming record and span, unless `on_error` is "skip" (counted as `unproven mask`).
    """
    items: Counted[Item] = Counted()
    for chunk in _chunks(records):
        conversations, tools = [r.messages for r in chunk], [r.tools for r in chunk]
        for record, result in zip(chunk, encode_conversations(tokenizer, template, conversations, tools), strict=True):
            items.counts["rows"] += 1
            if isinstance(result, MaskProofError):
                _refuse(items, record.id, record.source, result, on_error)
                continue
            if len(result.token_ids) > max_length:
                items.counts["cut"] += 1
            mask = torch.tensor(result.mask[:max_length])
            trained = mask.nonzero()
            if trained.numel() == 0:
                items.counts["without a trained token"] += 1
                continue
            length = int(trained[-1]) + 1
            tokens = torch.tensor(result.token_ids[:length], dtype=torch.int64)
            items.append(Item("sequence", [TokenSequence(tokens, mask[:length])], id=record.id, source=record.source))
    items.counts["kept"] = len(items)
    return items


def preference_items(
    records: Iterable[PreferenceRecord],
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    *,
    on_error: OnError = "raise",
) -> Counted[Item]:
    """One pair per record. The prompt is held once and never trained; of the answers, the assistant turns are trained.

    Each of prompt + chosen and prompt + rejected is cut to `max_length` tokens. A pair is dropped when the prompt
    leaves no room for a trained token of both answers, or when they are equal after the cut.

    Raises:
        MaskProofError: naming record and span, unless `on_error` is "skip" (counted as `unproven mask`).
    """
    items: Counted[Item] = Counted()
    for chunk in _chunks(records):
        both = [r.prompt + answer for r in chunk for answer in (r.chosen, r.rejected)]
        results = iter(encode_conversations(tokenizer, template, both, [r.tools for r in chunk for _ in range(2)]))
        for record in chunk:
            items.counts["rows"] += 1
            sides = [next(results), next(results)]
            error = next((side for side in sides if isinstance(side, MaskProofError)), None)
            if error is not None:
                _refuse(items, record.id, record.source, error, on_error)
                continue
            responses, prompt, cut = [], [], False
            for side in sides:
                assert not isinstance(side, MaskProofError)
                start = side.turn_starts[len(record.prompt)]
                prompt = side.token_ids[:start]
                cut |= len(side.token_ids) > max_length
                if (response := _response(side, start, max_length)) is not None:
                    responses.append(response)
            items.counts["cut"] += cut
            if len(responses) < 2:
                items.counts["without room for both answers"] += 1
            elif torch.equal(responses[0].tokens, responses[1].tokens):
                items.counts["with equal answers after the cut"] += 1
            else:
                tokens = torch.tensor(prompt, dtype=torch.int64)
                weight = {} if record.weight is None else {WEIGHT: [record.weight] * 2}
                items.append(
                    Item("pair", responses, prompt=tokens, per_sequence=weight, id=record.id, source=record.source)
                )
    items.counts["kept"] = len(items)
    return items


def labelled_items(
    records: Iterable[LabelledRecord],
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    *,
    on_error: OnError = "raise",
) -> Counted[Item]:
    """One ordinary sequence per record, with its prompt and the column `label`; masks and cuts as in pairs.

    A row whose prompt leaves no room for a trained token is dropped.

    Raises:
        MaskProofError: naming record and span, unless `on_error` is "skip" (counted as `unproven mask`).
    """
    items: Counted[Item] = Counted()
    for chunk in _chunks(records):
        conversations, tools = [r.prompt + r.completion for r in chunk], [r.tools for r in chunk]
        for record, result in zip(chunk, encode_conversations(tokenizer, template, conversations, tools), strict=True):
            items.counts["rows"] += 1
            if isinstance(result, MaskProofError):
                _refuse(items, record.id, record.source, result, on_error)
                continue
            items.counts["cut"] += len(result.token_ids) > max_length
            start = result.turn_starts[len(record.prompt)]
            response = _response(result, start, max_length)
            if response is None:
                items.counts["without room for the answer"] += 1
                continue
            columns = {LABEL: [float(record.label)]} | ({} if record.weight is None else {WEIGHT: [record.weight]})
            items.append(
                Item(
                    "sequence",
                    [response],
                    prompt=torch.tensor(result.token_ids[:start], dtype=torch.int64),
                    per_sequence=columns,
                    id=record.id,
                    source=record.source,
                )
            )
    items.counts["kept"] = len(items)
    return items


def _response(whole: Conversation, start: int, max_length: int) -> TokenSequence | None:
    """What follows the prompt of a conversation, up to its last trained token; None: there is no such token."""
    mask = torch.tensor(whole.mask[start:max_length], dtype=torch.bool)
    if not mask.any():
        return None
    length = int(mask.nonzero()[-1]) + 1
    return TokenSequence(torch.tensor(whole.token_ids[start : start + length], dtype=torch.int64), mask[:length])


def rlvr_prompts(
    records: Iterable[RlvrRecord],
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    *,
    on_error: OnError = "raise",
) -> Counted[Prompt]:
    """Prompts with their generation prompt; one of more than `max_length` tokens is dropped and counted, never cut.

    Raises:
        MaskProofError: naming record and span, unless `on_error` is "skip".
    """
    prompts: Counted[Prompt] = Counted()
    for chunk in _chunks(records):
        texts, rendered = [], []
        for record in chunk:
            prompts.counts["rows"] += 1
            try:
                texts.append(render_prompt(template, record.messages, record.tools))
                rendered.append(record)
            except MaskProofError as error:
                _refuse(prompts, record.id, record.source, error, on_error)
        for record, token_ids in zip(rendered, encode_texts(tokenizer, texts), strict=True):
            if len(token_ids) > max_length:
                prompts.counts["longer than data.max_length"] += 1
            else:
                prompts.append(Prompt(token_ids, record))
    prompts.counts["kept"] = len(prompts)
    return prompts


def _refuse(items: Counted[Any], record_id: str, source: str, error: MaskProofError, on_error: OnError) -> None:
    if on_error == "raise":
        raise MaskProofError(f"record {record_id} of {source}: {error}", error.span) from error
    items.counts["unproven mask"] += 1


def _chunks(records: Iterable[T]) -> Iterator[Sequence[T]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
