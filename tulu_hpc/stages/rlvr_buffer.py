"""The buffer of finished samples: generated, verified, and on disk before anything is trained on them.

    {run.dir}/buffer/step_3.replica_0.journal    header, then one line per sample; append-only
    {run.dir}/buffer/trained.jsonl               one line per step: the samples that it trained on

A line is the xxh3-64 of its content in hex, a space, the content as JSON. Lines are synced to disk before the trainer
hears of their samples, so what a step has trained on is there after any kill. A kill in the middle of a write leaves a
broken last line; it is cut off at the next start, and its sample generated again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from tulu_hpc.config.loader import flatten
from tulu_hpc.config.run_directory import MAY_DIFFER
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.records import content_id
from tulu_hpc.models.safetensors_files import sync_to_disk
from tulu_hpc.rollout.engine import Completion, VersionSpan

FORMAT = 1
TRAINED = "trained.jsonl"
_DIGEST_CHARACTERS = 16


class JournalError(ValueError):
    """A journal is damaged, or of another run; says which file and what to do."""


class SampleKey(NamedTuple):
    """Which sample of a run: `extra_round` of dynamic sampling, `number` of the prompt in the step, `sample` of it."""

    step: int
    extra_round: int
    number: int
    sample: int

    def __str__(self) -> str:
        extra = f", round {self.extra_round}" if self.extra_round else ""
        return f"step {self.step}{extra}, prompt {self.number}, sample {self.sample}"


@dataclass(frozen=True)
class Sample:
    """A finished sample.

    Attributes:
        prompt: id of the prompt's record.
        score: of the verdict. reason: of the verdict.
    """

    key: SampleKey
    prompt: str
    completion: Completion
    score: float
    reason: str = ""

    def content(self) -> dict[str, Any]:
        """As JSON; log-probs keep every bit."""
        found = self.completion
        return {
            "key": list(self.key),
            "prompt": self.prompt,
            "tokens": found.token_ids,
            "logprobs": found.logprobs,
            "finish": [found.finish_reason, found.stop_reason],
            "version": found.policy_version,
            "spans": [[span.version, span.start, span.end] for span in found.version_spans],
            "score": self.score,
            "reason": self.reason,
        }

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Sample:
        reason, stop = content["finish"]
        key = SampleKey(*content["key"])
        completion = Completion(
            token_ids=content["tokens"],
            logprobs=content["logprobs"],
            finish_reason=reason,
            stop_reason=stop,
            policy_version=content["version"],
            id=str(key),
            version_spans=tuple(VersionSpan(*span) for span in content["spans"]),
        )
        return cls(key, content["prompt"], completion, content["score"], content["reason"])

    def digest(self) -> str:
        """Of everything in it."""
        return xxhash.xxh3_64_hexdigest(_json(self.content()))


def identity(config: RlvrConfig, prompts: str) -> str:
    """Hash of what the samples of a run depend on: every key that a resumed run must have the same, and the prompts.

    Args:
        prompts: their fingerprint.
    """
    keys = {
        key: value
        for key, value in flatten(config.model_dump(mode="json"))
        if not any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)
    }
    return content_id(keys, prompts)


class Journal:
    """The files of one replica's finished samples, and those that earlier processes left.

    Args:
        directory: shared by all replicas.
        replica: number in the names of the files that this one writes.
        identity: of the run; files of another are refused.
    """

    def __init__(self, directory: Path, replica: int, identity: str) -> None:
        self.directory, self.replica, self.identity = directory, replica, identity
        self._files: dict[int, IO[bytes]] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def replay(self, after: int) -> dict[SampleKey, Sample]:
        """Finished samples of the steps after `after`, of all replicas; a broken last line of a file is left out.

        Call it before any replica appends (a replica cuts the broken line off when it appends to its own file).

        Raises:
            JournalError: a file is damaged elsewhere, of another run, or has a sample twice.
        """
        found: dict[SampleKey, Sample] = {}
        for path in journals(self.directory):
            step = step_of(path)
            if step <= after:
                continue
            for sample in read_journal(path, self.identity, step)[0]:
                if sample.key in found:
                    raise JournalError(f"{path}: {sample.key} is in the buffer twice")
                found[sample.key] = sample
        return found

    def append(self, samples: Iterable[Sample]) -> None:
        """Add finished samples; they are on disk when this returns."""
        self._write([(sample.key.step, {"sample": sample.content()}) for sample in samples])

    def drop(self, keys: Iterable[SampleKey]) -> None:
        """Take samples of this replica back: they will be generated again."""
        self._write([(key.step, {"dropped": list(key)}) for key in keys])

    def _write(self, entries: Sequence[tuple[int, dict[str, Any]]]) -> None:
        for step in sorted({step for step, _ in entries}):
            file = self._file(step)
            file.write(b"".join(_line(content) for of, content in entries if of == step))
            file.flush()
            os.fsync(file.fileno())

    def _file(self, step: int) -> IO[bytes]:
        if step not in self._files:
            path = self.directory / f"step_{step}.replica_{self.replica}.journal"
            if path.exists():
                os.truncate(path, read_journal(path, self.identity, step)[1])
            file = path.open("ab")
            if file.tell() == 0:
                file.write(_line({"format": FORMAT, "identity": self.identity, "step": step}))
                file.flush()
                sync_to_disk(self.directory)
            self._files[step] = file
        return self._files[step]

    def close(self, up_to: int | None = None) -> None:
        """Close the files (those of steps up to `up_to`); a later append opens them again."""
        for step in [step for step in self._files if up_to is None or step <= up_to]:
            self._files.pop(step).close()


def journals(directory: Path) -> list[Path]:
    """All files of a buffer, by step."""
    return sorted(directory.glob("step_*.replica_*.journal"), key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """The step whose samples a file holds."""
    return int(path.name.removeprefix("step_").partition(".")[0])


def prune(directory: Path, covered: int) -> None:
    """Delete the files of all steps up to `covered`: checkpoints hold what was learned from them."""
    for path in journals(directory):
        if step_of(path) <= covered:
            path.unlink()


def read_journal(path: Path, identity: str, step: int) -> tuple[list[Sample], int]:
    """The samples of a file, and the bytes of its intact lines; a broken last line is not among them.

    Raises:
        JournalError: naming file and line: a broken line before the last, another run or format, a sample twice.
    """
    samples: dict[SampleKey, Sample] = {}
    intact = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        content = _content(line)
        if content is None:
            if number < len(lines):
                raise JournalError(
                    f"{path}:{number}: damaged (its checksum does not fit); delete the file to generate its samples "
                    "again"
                )
            break
        intact += len(line)
        if number == 1:
            _check_header(path, content, identity, step)
        elif "dropped" in content:
            samples.pop(SampleKey(*content["dropped"]), None)
        else:
            sample = Sample.from_content(content["sample"])
            if sample.key in samples:
                raise JournalError(f"{path}:{number}: {sample.key} is in the buffer twice")
            samples[sample.key] = sample
    return list(samples.values()), intact


def _check_header(path: Path, header: dict[str, Any], identity: str, step: int) -> None:
    if header.get("format") != FORMAT:
        raise JournalError(f"{path}: format {header.get('format')}, this version reads {FORMAT}")
    if header.get("identity") != identity or header.get("step") != step:
        raise JournalError(
            f"{path}: its samples were made with other prompts or another configuration; move {path.parent} away to "
            "generate them again"
        )


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()


def _line(content: Any) -> bytes:
    body = _json(content)
    return xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"


def _content(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is broken."""
    digest, body = line[:_DIGEST_CHARACTERS], line[_DIGEST_CHARACTERS + 1 : -1]
    if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(body).encode() != digest:
        return None
    return dict(json.loads(body))
