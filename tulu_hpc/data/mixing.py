"""Mixing sources into one training set: counts, fractions, a seed, and what came of them. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tulu_hpc.data.records import (
    AnyRecord,
    LabelledRecord,
    Message,
    PreferenceRecord,
    RecordKind,
    SftRecord,
    message_dicts,
    read_records,
)


@dataclass(frozen=True)
class Source:
    """A source and how much of it to take: `count` rows, `fraction` of its rows (above 1: repeated), or all."""

    name: str
    path: str
    count: int | None = None
    fraction: float | None = None


@dataclass
class SourceStatistics:
    """What one source gave. `repeated` rows were taken more than once; `missing` ones were asked for but not there."""

    name: str
    path: str
    available: int
    skipped: int
    taken: int
    repeated: int
    missing: int
    share: float = 0.0
    turns_mean: float = 0.0
    characters_mean: float = 0.0


@dataclass
class MixResult:
    """Rows of the mixture in their final order, the statistics of each source, and the reasons of skipped rows."""

    rows: list[dict[str, Any]]
    statistics: list[SourceStatistics]
    skipped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"rows": len(self.rows), "sources": [asdict(s) for s in self.statistics], "skipped": self.skipped}


def mix(
    sources: Sequence[Source],
    kind: RecordKind,
    seed: int,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    weight_field: str | None = None,
) -> MixResult:
    """Draw from each source and shuffle everything together.

    Each source is drawn with a generator of its own (seed and name), so that adding or resizing a source leaves the
    rows drawn from the others as they were. A fraction above 1 repeats the whole source and draws the rest.

    Args:
        weight_field: of preference and labelled rows, the field with their weight, which the mixture keeps.

    Raises:
        RecordError: a malformed row, unless `on_error` is "skip".
        ValueError: two sources of one name, both a count and a fraction, or no row at all.
    """
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"mix.sources: the name {twice[0]!r} is given twice")
    rows: list[dict[str, Any]] = []
    statistics: list[SourceStatistics] = []
    skipped: list[str] = []
    for source in sources:
        if source.count is not None and source.fraction is not None:
            raise ValueError(f"mix.sources: {source.name!r} has both a count and a fraction")
        records = read_records(source.path, kind, on_error=on_error, weight_field=weight_field)
        order = list(range(len(records)))
        random.Random(f"{seed}/{source.name}").shuffle(order)
        wanted = len(records)
        if source.count is not None:
            wanted = source.count
        if source.fraction is not None:
            wanted = round(source.fraction * len(records))
        available = wanted if source.fraction is not None else min(wanted, len(records))
        taken = [records[order[i % len(order)]] for i in range(available)]
        rows += [to_row(record, source.name, weight_field) for record in taken]
        skipped += records.skipped
        statistics.append(
            SourceStatistics(
                name=source.name,
                path=source.path,
                available=len(records),
                skipped=len(records.skipped),
                taken=len(taken),
                repeated=max(0, len(taken) - len(records)),
                missing=wanted - len(taken),
                **_lengths(taken),
            )
        )
    if not rows:
        taken_of = ", ".join(f"{each.name} 0 of {each.available}" for each in statistics)
        raise ValueError(f"mix.sources: no row is taken ({taken_of}); raise the fractions")
    for each in statistics:
        each.share = each.taken / len(rows)
    random.Random(f"{seed}/all").shuffle(rows)
    return MixResult(rows, statistics, skipped)


def to_row(record: AnyRecord, source: str, weight_field: str | None = None) -> dict[str, Any]:
    """The JSON object of a record, in the schema it was read from; its weight under `weight_field`."""
    if isinstance(record, SftRecord):
        body: dict[str, Any] = {"messages": message_dicts(record.messages)}
    elif isinstance(record, PreferenceRecord):
        body = {
            "prompt": message_dicts(record.prompt),
            "chosen": message_dicts(record.chosen),
            "rejected": message_dicts(record.rejected),
        }
    elif isinstance(record, LabelledRecord):
        body = {
            "prompt": message_dicts(record.prompt),
            "completion": message_dicts(record.completion),
            "label": record.label,
        }
    else:
        body = {"messages": message_dicts(record.messages)}
        plain = len(record.dataset) == 1 and not isinstance(record.ground_truth[0], list)
        body["ground_truth"] = record.ground_truth[0] if plain else record.ground_truth
        body["dataset"] = record.dataset[0] if plain else record.dataset
    if record.tools:
        body["tools"] = list(record.tools)
    if weight_field is not None and isinstance(record, PreferenceRecord | LabelledRecord):
        body[weight_field] = record.weight
    return {**body, "source": source, "id": record.id}


def _lengths(records: Sequence[AnyRecord]) -> dict[str, float]:
    conversations = [_conversation(record) for record in records]
    count = max(1, len(conversations))
    return {
        "turns_mean": sum(map(len, conversations)) / count,
        "characters_mean": sum(len(message.content) for messages in conversations for message in messages) / count,
    }


def _conversation(record: AnyRecord) -> list[Message]:
    if isinstance(record, PreferenceRecord):
        return record.prompt + record.chosen
    return record.prompt + record.completion if isinstance(record, LabelledRecord) else record.messages
