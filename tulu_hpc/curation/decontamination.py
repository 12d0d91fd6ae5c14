"""Finding evaluation prompts in training data by exact n-gram overlap, by the rules of the Tulu 3 paper (section 3.2).

1. Only prompts (user turns) are compared, lower-cased and split at white space and punctuation.
2. A token of an evaluation instance matches if it lies in an n-gram (n = 8) that a training instance also has in one of
   its user turns.
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

from tulu_hpc.data.rows import NOT_TEXT, RecordError, is_text, iterate_rows, json_text, write_lines

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
            RecordError: a row is malformed, lacks one of the fields, or has no word in any of them.
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
                texts.append(tokenize("\n".join(_user_texts(row[key], key, file, line))))
            instances.append([tokens for tokens in texts if tokens])
            if not instances[-1]:
                raise RecordError("no word to compare", file=file, line=line, field=", ".join(fields))
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
    """What one training set and one evaluation have in common: `overlapping` of its `instances`, by `rows` of the set.

    `matches` counts pairs of an instance and a row; the report lists the first `MATCHES_KEPT` of them.
    """

    eval: str
    unseen: bool
    instances: int
    overlapping: int = 0
    rate: float = 0.0
    contaminated: bool = False
    rows: int = 0
    matches: int = 0
    action: str = "none"


@dataclass
class SourceResult:
    """What was found in one training set, and what became of it.

    `overlapping_rows` are all rows that overlap with an evaluation; JSON has their number by evaluation only.
    """

    name: str
    path: str
    rows: int = 0
    kept: int = 0
    removed: int = 0
    dropped: bool = False
    evals: list[Overlap] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    overlapping_rows: set[int] = field(default_factory=set)


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
        values = asdict(self)
        for source in values["sources"]:
            del source["overlapping_rows"]
        return values


class EvalIndex:
    """Every n-gram of the evaluation sets, and where it occurs."""

    def __init__(self, evals: Sequence[EvalSet], ngram: int = 8) -> None:
        self.evals = evals
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

    def match(self, turns: Sequence[Tokens]) -> Iterator[tuple[int, int, float, list[str]]]:
        """(evaluation, instance, score, shared spans) of every instance that shares anything with a row's turns."""
        starts: dict[int, list[int]] = defaultdict(list)
        for gram in self.grams.keys() & {gram for turn in turns for gram in _ngrams(turn, self.ngram)}:
            for position, start in self.grams[gram]:
                starts[position].append(start)
        whole = {position for turn in turns for position in self.short.get(turn, ())}
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
    key = next((key for key in ("messages", "prompt", "chosen") if row.get(key) is not None), None)
    if key is None:
        raise RecordError("no messages, prompt or chosen to compare", file=file, line=line, field="messages")
    return _user_texts(row[key], key, file, line)


def _user_texts(value: Any, key: str, file: str, line: int) -> list[str]:
    """The user's texts of a conversation, or the text itself."""
    turns = [value]
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        turns = [message.get("content") for message in value if message.get("role") == "user"]
    texts = [turn for turn in turns if isinstance(turn, str)]
    if not texts or len(texts) < len(turns):
        raise RecordError("has no user turn with text", file=file, line=line, field=key)
    if not all(map(is_text, texts)):
        raise RecordError(NOT_TEXT, file=file, line=line, field=key)
    return texts


def compare(
    train: TrainSet,
    index: EvalIndex,
    *,
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
        ValueError: the training set has no row.
    """
    evals = index.evals
    result = SourceResult(train.name, train.path)
    touched: list[set[int]] = [set() for _ in evals]  # instances of each evaluation
    rows: list[set[int]] = [set() for _ in evals]  # rows of the training set
    pairs = [0] * len(evals)  # of an instance and a row
    for file, line, row in iterate_rows(train.path):
        if isinstance(row, RecordError):
            raise row
        result.rows += 1
        for number, instance, score, spans in index.match([tokenize(turn) for turn in user_turns(row, file, line)]):
            if score <= match_threshold:
                continue
            touched[number].add(instance)
            rows[number].add(result.rows)
            pairs[number] += 1
            if pairs[number] <= MATCHES_KEPT:
                identity = str(row.get("id") or f"row {result.rows}")
                match = Match(evals[number].name, instance, result.rows, identity, round(score, 4), spans)
                result.matches.append(match)
    if not result.rows:
        raise ValueError(f"{train.path}: the training set {train.name!r} is empty")
    result.overlapping_rows = set().union(*rows)
    remove: set[int] = set()
    for number, each in enumerate(evals):
        overlap = Overlap(each.name, each.unseen, len(each.instances), len(touched[number]), rows=len(rows[number]))
        overlap.matches = pairs[number]
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
        RecordError: a malformed row, or one to be kept that JSON has no form for.
        ValueError: two training sets or two evaluations of one name, an empty training set, or a planted leak that is
            not in the sets.
    """
    for kind, names in (("training set", [each.name for each in train]), ("evaluation", [each.name for each in evals])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the {kind} {twice[0]!r} is given twice")
    index = EvalIndex(evals, ngram)
    report = Report(ngram, match_threshold, contamination_threshold, action, [])
    removed: dict[str, set[int]] = {}
    for source in train:
        result, remove = compare(
            source,
            index,
            match_threshold=match_threshold,
            contamination_threshold=contamination_threshold,
            action=action,
        )
        report.sources.append(result)
        removed[source.name] = remove
    if planted is not None:
        report.planted = score_planted(report, removed, planted)
    if output is not None and action != "report":
        for source in train:
            write_lines(output / f"{source.name}.jsonl", _lines_without(source.path, removed[source.name]))
    return report


def _lines_without(path: str, remove: set[int]) -> Iterator[str]:
    for number, (file, line, row) in enumerate(iterate_rows(path), 1):
        if isinstance(row, RecordError):
            raise row
        if number not in remove:
            try:
                yield json_text(row)
            except ValueError as error:
                raise RecordError(str(error), file=file, line=line, field=_unwritable(row)) from None


def _unwritable(row: Mapping[str, Any]) -> str:
    """The first field that JSON has no form for."""
    for key, value in row.items():
        try:
            json_text({key: value})
        except ValueError:
            return key if is_text(key) else ascii(key)
    return ""


def score_planted(
    report: Report, removed: Mapping[str, set[int]], planted: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare a report with leaks that are known.

    Args:
        removed: rows taken out of each training set.
        planted: one entry per leak with `source`, `line` (1-based row of the training set) and `edit`; `where` names
            the entry in messages.

    Returns:
        `planted` and `found` leaks, `recall`, both again by kind of edit, the leaks that were `removed`, and
        `false_drops`: rows removed that nobody planted, with their share of all rows that were not planted.

    Raises:
        ValueError: a leak is in no training set, or beyond its last row.
    """
    rows = {source.name: source.rows for source in report.sources}
    truth: dict[tuple[str, int], str] = {}
    for leak in planted:
        name, line, where = leak["source"], leak["line"], leak.get("where", "planted leak")
        if name not in rows:
            raise ValueError(f"{where}: source {name!r} is not among the training sets: {', '.join(rows)}")
        if not 1 <= line <= rows[name]:
            raise ValueError(f"{where}: line {line} of {name!r}, which has {rows[name]} rows")
        truth[name, line] = str(leak.get("edit", ""))
    found = {(source.name, row) for source in report.sources for row in source.overlapping_rows}
    gone = {(name, row) for name, rows in removed.items() for row in rows}
    by_edit = {
        edit: {
            "planted": sum(kind == edit for kind in truth.values()),
            "found": sum(kind == edit and place in found for place, kind in truth.items()),
        }
        for edit in sorted(set(truth.values()))
    }
    innocent = sum(rows.values()) - len(truth)
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
