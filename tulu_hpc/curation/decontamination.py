"""Finding evaluation prompts in training data by exact n-gram overlap, by the rules of the Tulu 3 paper (section 3.2).

1. Only prompts (user turns) are compared, lower-cased and split at white space and punctuation.
2. A token of an evaluation instance matches if it lies in an n-gram (n = 8) that a training instance also has.
3. An instance overlaps if more than half of its tokens match the same training instance; several fields are averaged.
4. A training set is contaminated by an evaluation if it overlaps with more than 2 % of its instances.

The paper searches an Elasticsearch index of the training data and sees at most the best hits of each n-gram. Here the
n-grams of the (small) evaluation sets are in a hash table and the training data streams past it once, so nothing is
missed, memory does not grow with the training data, and no server is needed. A field of fewer than n tokens, which has
no n-gram, matches only a turn that is equal to it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tulu_hpc.data.records import RecordError, iterate_rows, write_jsonl

Action = Literal["report", "drop_rows", "paper"]
Tokens = tuple[str, ...]
SEPARATORS = re.compile(r"[\s,.?!:;()\"\\-]+")
MATCHES_KEPT = 1000  # of each pair of sets, in the report; the counts are of all


def tokenize(text: str) -> Tokens:
    """Lower-case words and numbers, as the paper's tool splits them."""
    return tuple(token for token in SEPARATORS.split(text.lower()) if token)


@dataclass(frozen=True)
class EvalSet:
    """The prompts of one evaluation: for each instance the tokens of its non-empty fields."""

    name: str
    instances: list[list[Tokens]]
    unseen: bool = False

    @classmethod
    def read(cls, name: str, path: str, fields: Sequence[str], *, unseen: bool = False) -> EvalSet:
        """Read the prompt fields of every row.

        Raises:
            RecordError: a row is malformed, or lacks all of the fields or one of them.
            ValueError: the file has no row.
        """
        instances = []
        for file, line, row in iterate_rows(path):
            if isinstance(row, RecordError):
                raise row
            texts = []
            for key in fields:
                if key not in row:
                    raise RecordError("is missing", file=file, line=line, field=key)
                text = (
                    row[key] if isinstance(row[key], str) else "\n".join(user_turns({"messages": row[key]}, file, line))
                )
                texts.append(tokenize(text))
            instances.append([tokens for tokens in texts if tokens])
        if not instances:
            raise ValueError(f"{path}: the evaluation set {name!r} is empty")
        return cls(name, instances, unseen)


@dataclass(frozen=True)
class TrainSet:
    """A training source: records of any schema with `messages`, `prompt` or `chosen`."""

    name: str
    path: str


@dataclass
class Match:
    """One training row that overlaps with one evaluation instance, and the words they share."""

    eval: str
    instance: int
    row: int
    id: str
    score: float
    spans: list[str]


@dataclass
class Overlap:
    """What one training set and one evaluation have in common."""

    eval: str
    unseen: bool
    instances: int
    overlapping: int = 0
    rate: float = 0.0
    contaminated: bool = False
    rows: int = 0
    action: str = "none"


@dataclass
class SourceResult:
    """What was found in one training set, and what became of it."""

    name: str
    path: str
    rows: int = 0
    kept: int = 0
    removed: int = 0
    dropped: bool = False
    evals: list[Overlap] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)


@dataclass
class Report:
    """The whole comparison; `planted` compares it with leaks that are known (see `score_planted`)."""

    ngram: int
    match_threshold: float
    contamination_threshold: float
    action: Action
    sources: list[SourceResult]
    planted: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Index:
    """Every n-gram of the evaluation sets, and where it occurs."""

    def __init__(self, evals: Sequence[EvalSet], ngram: int) -> None:
        self.ngram = ngram
        self.fields: list[tuple[int, int, Tokens]] = []  # (evaluation, instance, tokens)
        self.field_count: Counter[tuple[int, int]] = Counter()
        self.grams: dict[Tokens, list[tuple[int, int]]] = defaultdict(list)  # -> (field, first token)
        self.short: dict[Tokens, list[int]] = defaultdict(list)  # -> field
        for number, each in enumerate(evals):
            for instance, texts in enumerate(each.instances):
                self.field_count[number, instance] = len(texts)
                for tokens in texts:
                    self._add(len(self.fields), tokens)
                    self.fields.append((number, instance, tokens))

    def _add(self, position: int, tokens: Tokens) -> None:
        if len(tokens) < self.ngram:
            self.short[tokens].append(position)
        for start, gram in enumerate(_ngrams(tokens, self.ngram)):
            self.grams[gram].append((position, start))

    def match(self, tokens: Tokens) -> Iterator[tuple[int, int, float, list[str]]]:
        """(evaluation, instance, score, shared spans) of every instance that shares anything with a training turn."""
        starts: dict[int, list[int]] = defaultdict(list)
        for gram in self.grams.keys() & set(_ngrams(tokens, self.ngram)):
            for position, start in self.grams[gram]:
                starts[position].append(start)
        whole = set(self.short.get(tokens, ()))
        scores: dict[tuple[int, int], float] = defaultdict(float)
        spans: dict[tuple[int, int], list[str]] = defaultdict(list)
        for position in sorted(starts.keys() | whole):
            number, instance, text = self.fields[position]
            ranges = [(0, len(text))] if position in whole else _merge(sorted(starts[position]), self.ngram)
            matched = sum(end - begin for begin, end in ranges)
            scores[number, instance] += matched / len(text) / self.field_count[number, instance]
            spans[number, instance] += [" ".join(text[begin:end]) for begin, end in ranges]
        for (number, instance), score in scores.items():
            yield number, instance, score, spans[number, instance]


def _ngrams(tokens: Tokens, n: int) -> Iterable[Tokens]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _merge(starts: list[int], length: int) -> list[tuple[int, int]]:
    """Token ranges covered by windows of `length` at ascending `starts`."""
    ranges: list[tuple[int, int]] = []
    for start in starts:
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], start + length)
        else:
            ranges.append((start, start + length))
    return ranges


def user_turns(row: Mapping[str, Any], file: str, line: int) -> list[str]:
    """The user's texts of a record of any schema.

    Raises:
        RecordError: the row has no prompt to compare.
    """
    value, key = next(((row[k], k) for k in ("messages", "prompt", "chosen") if row.get(k) is not None), (None, ""))
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise RecordError("no messages, prompt or chosen to compare", file=file, line=line, field=key or "messages")
    turns = [message.get("content") for message in value if message.get("role") == "user"]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise RecordError("has no user turn with text", file=file, line=line, field=key)
    return [str(turn) for turn in turns]


def compare(
    train: TrainSet,
    evals: Sequence[EvalSet],
    *,
    ngram: int = 8,
    match_threshold: float = 0.5,
    contamination_threshold: float = 0.02,
    action: Action = "paper",
) -> tuple[SourceResult, set[int]]:
    """Compare one training set with all evaluations and decide what to remove.

    Args:
        action: "report" removes nothing; "drop_rows" removes every overlapping row; "paper" looks at contaminated
            pairs of sets only, and drops the whole set if the evaluation is unseen, else the overlapping rows.

    Returns:
        The result, and the 1-based rows to remove.

    Raises:
        RecordError: a training row is malformed.
    """
    index = _Index(evals, ngram)
    result = SourceResult(train.name, train.path)
    touched: list[set[int]] = [set() for _ in evals]  # instances of each evaluation
    rows: list[set[int]] = [set() for _ in evals]  # rows of the training set
    for file, line, row in iterate_rows(train.path):
        if isinstance(row, RecordError):
            raise row
        result.rows += 1
        for turn in user_turns(row, file, line):
            for number, instance, score, spans in index.match(tokenize(turn)):
                if score <= match_threshold:
                    continue
                touched[number].add(instance)
                rows[number].add(result.rows)
                if len(result.matches) < MATCHES_KEPT * len(evals):
                    identity = str(row.get("id") or f"row {result.rows}")
                    result.matches.append(
                        Match(evals[number].name, instance, result.rows, identity, round(score, 4), spans)
                    )
    remove: set[int] = set()
    for number, each in enumerate(evals):
        overlap = Overlap(each.name, each.unseen, len(each.instances), len(touched[number]), rows=len(rows[number]))
        overlap.rate = overlap.overlapping / overlap.instances
        overlap.contaminated = overlap.rate > contamination_threshold
        if action == "paper" and overlap.contaminated and each.unseen:
            overlap.action, result.dropped = "drop set", True
        elif rows[number] and (action == "drop_rows" or (action == "paper" and overlap.contaminated)):
            overlap.action = "drop rows"
            remove |= rows[number]
        result.evals.append(overlap)
    if result.dropped:
        remove = set(range(1, result.rows + 1))
    result.removed, result.kept = len(remove), result.rows - len(remove)
    return result, remove


def decontaminate(
    train: Sequence[TrainSet],
    evals: Sequence[EvalSet],
    output: Path | None,
    *,
    ngram: int = 8,
    match_threshold: float = 0.5,
    contamination_threshold: float = 0.02,
    action: Action = "paper",
    planted: Sequence[Mapping[str, Any]] | None = None,
) -> Report:
    """Compare all training sets with all evaluations; write `output`/<set>.jsonl with what is left of each.

    With `action` "report", or without `output`, nothing is written. `planted`: see `score_planted`.

    Raises:
        RecordError: a malformed row.
        ValueError: two training sets of one name, or one that would be overwritten.
    """
    names = [each.name for each in train]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the training set {twice[0]!r} is given twice")
    for source in train:
        if output is not None and (output / f"{source.name}.jsonl").resolve() == Path(source.path).resolve():
            raise ValueError(f"{source.path}: the cleaned file would replace its source; give another output")
    report = Report(ngram, match_threshold, contamination_threshold, action, [])
    removed: dict[str, set[int]] = {}
    for source in train:
        result, remove = compare(
            source,
            evals,
            ngram=ngram,
            match_threshold=match_threshold,
            contamination_threshold=contamination_threshold,
            action=action,
        )
        report.sources.append(result)
        removed[source.name] = remove
        if output is not None and action != "report":
            write_jsonl(output / f"{source.name}.jsonl", _rows_without(source.path, remove))
    if planted is not None:
        report.planted = score_planted(report, removed, planted)
    return report


def _rows_without(path: str, remove: set[int]) -> Iterator[dict[str, Any]]:
    for number, (_, _, row) in enumerate(iterate_rows(path), 1):
        if isinstance(row, RecordError):
            raise row
        if number not in remove:
            yield row


def score_planted(
    report: Report, removed: Mapping[str, set[int]], planted: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare a report with leaks that are known.

    Args:
        removed: rows taken out of each training set.
        planted: one entry per leak with `source`, `line` (1-based row of the training set) and `edit`.

    Returns:
        `planted` and `found` leaks, `recall`, both again by kind of edit, the leaks that were `removed`, and
        `false_drops`: rows removed that nobody planted, with their share of all rows that were not planted.
    """
    truth = {(str(leak["source"]), int(leak["line"])): str(leak.get("edit", "")) for leak in planted}
    found = {(source.name, match.row) for source in report.sources for match in source.matches}
    gone = {(name, row) for name, rows in removed.items() for row in rows}
    by_edit = {
        edit: {
            "planted": sum(kind == edit for kind in truth.values()),
            "found": sum(kind == edit and place in found for place, kind in truth.items()),
        }
        for edit in sorted(set(truth.values()))
    }
    innocent = sum(source.rows for source in report.sources) - len(truth)
    false_drops = len(gone - truth.keys())
    return {
        "planted": len(truth),
        "found": len(found & truth.keys()),
        "recall": len(found & truth.keys()) / len(truth) if truth else None,
        "removed": len(gone & truth.keys()),
        "by_edit": by_edit,
        "false_drops": false_drops,
        "false_drop_share": false_drops / innocent if innocent else 0.0,
    }
