"""A page that shows what will be trained: samples with their label masks, and counts per source.

The marks are read from the target table of the pack that a trainer would get, not from the mask that went into it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tulu_hpc.data.loader import tokens_of
from tulu_hpc.data.packed_batch import Item, pack
from tulu_hpc.telemetry.html import Html, details, join, page, paragraph, section, table, tag

_MARKS = Html(
    "<style>.sample { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.6 ui-monospace, monospace; }"
    ".t { background: #1f8a4c33; border-bottom: 2px solid var(--good); } .sample span + span { border-left: 1px solid"
    " var(--line); }</style>"
)
_HALF_A_CHARACTER = "\ufffd"


def choose(items: Sequence[Item], rows: int, seed: int) -> list[Item]:
    """The longest, the shortest, then one of each source, then a random choice; in that order, each once."""
    if not items or rows < 1:
        return []
    order = list(range(len(items)))
    by_length = sorted(order, key=lambda i: (tokens_of(items[i]), i))
    random.Random(seed).shuffle(order)
    first_of_source = {items[i].source: i for i in reversed(order)}
    wanted = [by_length[-1], by_length[0], *first_of_source.values(), *order]
    return [items[i] for i in list(dict.fromkeys(wanted))[:rows]]


def preview_page(
    items: Sequence[Item],
    tokenizer: Any,
    *,
    title: str,
    rows: int,
    seed: int,
    summaries: Sequence[str] = (),
    readout: bool = False,
) -> str:
    """The whole HTML document.

    Args:
        rows: samples shown.
        summaries: lines about what was read, cut and left out.
        readout: the items are those of a scalar head (`data.readout`): marked is the token after which it is read.
    """
    word = "read out" if readout else "trained"
    shown = [_sample(item, tokenizer, word, readout=readout) for item in choose(items, rows, seed)]
    use = " tokens are predicted and scored; all others are read."
    if readout:
        use = ": after this token the scalar head gives the score of the answer; no token is predicted."
    legend = tag("p", tag("span", word, class_="t sample"), use)
    content = [
        _MARKS,
        tag("h1", title),
        join(paragraph(line) for line in summaries),
        _sources(items, word, readout=readout),
        section("samples", "Samples", legend, *shown),
    ]
    return page(title, join(content))


def _tokens(item: Item, *, readout: bool) -> int:
    """Tokens that the network reads or is asked for; the place of a read-out is neither."""
    return tokens_of(item) - readout * len(item.responses)


def _sources(items: Sequence[Item], word: str, *, readout: bool) -> Html:
    by_source: dict[str, list[Item]] = {}
    for item in items:
        by_source.setdefault(item.source, []).append(item)
    rows = []
    for source, own in [*sorted(by_source.items()), *([("all", list(items))] if len(by_source) > 1 else [])]:
        lengths = [_tokens(item, readout=readout) for item in own]
        tokens, trained, longest = sum(lengths), sum(map(_trained, own)), max(lengths)
        rows.append((source, len(own), f"{tokens:,}", f"{trained:,}", f"{100 * trained / tokens:.1f} %", longest))
    return table(("source", "samples", "tokens", word, "share", "longest"), rows, caption="What will be trained")


def _trained(item: Item) -> int:
    """Targets of an item, as `pack` makes them: the first token of a promptless sequence has nothing to predict it."""
    total = 0
    for response in item.responses:
        own = len(response) if response.mask is None else int(response.mask.sum())
        unread = not item.prompt.numel() and (response.mask is None or bool(response.mask[0]))
        total += own - unread
    return total


def _sample(item: Item, tokenizer: Any, word: str, *, readout: bool) -> Html:
    names = {"sequence": [""], "pair": ["chosen", "rejected"]}.get(item.kind, [])
    batch = pack([item], share=False)
    parts: list[Html] = []
    for index, response in enumerate(item.responses):
        scored = batch.hidden_row_K[batch.sequence_id_K == index].tolist()
        # Without sharing, sequences lie one after another, each without its last token.
        begin = int(batch.cu_seqlens[index]) if index < batch.cu_seqlens.numel() else 0
        # A scalar head is read at the row itself, log-probs are those of the token after it.
        marks = {row - begin + (not readout) for row in scored}
        whole = item.prompt.tolist() + response.tokens.tolist()
        if readout:
            whole = whole[:-1]
        title = names[index] if index < len(names) else f"response {index}"
        parts += [tag("h3", title)] if title else []
        parts.append(tag("div", *_spans(whole, marks, tokenizer), class_="sample"))
    count = f"{item.source or 'sample'} {item.id}: {_tokens(item, readout=readout)} tokens, {batch.num_targets} {word}"
    opened = details(count, *parts)
    return Html(opened.replace("<details>", "<details open>", 1))


def _spans(tokens: Sequence[int], marks: set[int], tokenizer: Any) -> list[Html]:
    """One span per token, or per few tokens that are one character together."""
    spans: list[Html] = []
    begin = 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[begin:end], skip_special_tokens=False)
        trained = (end - 1) in marks
        more = end < len(tokens) and end - begin < 4 and (end in marks) == trained
        if text.endswith(_HALF_A_CHARACTER) and more:
            continue
        shown = text.replace("\n", "\u21b5\n")
        ids = " ".join(map(str, tokens[begin:end]))
        spans.append(tag("span", shown, title=ids, **({"class_": "t"} if trained else {})))
        begin = end
    return spans
