"""Evaluation tasks: how a row of a public schema becomes a prompt, and what its answer is checked against."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tulu_hpc.data.records import Message, content_id
from tulu_hpc.data.rows import NOT_TEXT, RecordError, is_text, iterate_rows, json_text
from tulu_hpc.verifiers import check_record
from tulu_hpc.verifiers.gsm8k import reference_answer
from tulu_hpc.verifiers.ifeval import parse_instructions

Prompting = Literal["chat", "multiturn", "completion"]


class EvalError(ValueError):
    """A task, a file or a row that cannot be evaluated."""


@dataclass(frozen=True)
class Instance:
    """One question.

    Attributes:
        question: what the user says.
        record: what the verifier reads (`dataset`, `ground_truth`).
        kind: class for the breakdown of scores.
        demonstration: the answer to show when the row serves as an example; None if the schema has none.
    """

    id: str
    question: str
    record: dict[str, Any]
    kind: str
    demonstration: str | None = None


@dataclass(frozen=True)
class EvalTask:
    """A way to evaluate rows of one schema.

    Attributes:
        parse: one row to an instance; raises ValueError saying what is wrong with it.
        metric: "score" for the verifier's score, else the name of one of its metrics.
        question_format, answer_prefix: the question as the model sees it, and text that its answer starts with.
        stop: strings that end an answer, for prompts without a chat template too.
        shows_working: whether the share of answers that show a calculation is of interest.
    """

    name: str
    parse: Callable[[Mapping[str, Any]], Instance]
    metric: str = "score"
    question_format: str = "{question}"
    answer_prefix: str = ""
    stop: tuple[str, ...] = ()
    shows_working: bool = False


@dataclass(frozen=True)
class Prompt:
    """What is put to the model: messages for the chat template, or plain text (`messages` is then empty)."""

    messages: list[Message] = field(default_factory=list)
    text: str = ""  # the whole prompt without template, else what follows the generation prompt


def read_instances(task: EvalTask, path: str | Path, *, limit: int | None = None) -> list[Instance]:
    """Instances of a file of any form that records may have.

    Raises:
        EvalError: naming file and line; also where a row, or its id, is there twice (both lines are named).
    """
    instances: list[Instance] = []
    seen: dict[tuple[str, str], str] = {}
    try:
        for file, line, row in iterate_rows(path):
            if limit is not None and len(instances) == limit:
                break
            if isinstance(row, RecordError):
                raise row
            try:
                instance = _instance(task, row)
                row_text = json_text([instance.question, instance.record])
                for what, key in (("id", instance.id), ("question and answer", row_text)):
                    first = seen.setdefault((what, key), f"{file}:{line}")
                    if first != f"{file}:{line}":
                        raise ValueError(f"the same {what} as {first}")
            except ValueError as error:
                raise RecordError(str(error), file=file, line=line) from None
            instances.append(instance)
    except (RecordError, FileNotFoundError) as error:
        raise EvalError(str(error)) from None
    if not instances:
        raise EvalError(f"{path}: holds no row")
    return instances


def _instance(task: EvalTask, row: Mapping[str, Any]) -> Instance:
    instance = task.parse(row)
    check_record(instance.record)
    for text in (instance.id, instance.question, instance.kind, instance.demonstration or ""):
        if not is_text(text):
            raise ValueError(f"{text!r:.60} {NOT_TEXT}")
    return instance


def build_prompt(task: EvalTask, instance: Instance, examples: Sequence[Instance], prompting: Prompting) -> Prompt:
    """The prompt of one instance with its examples before it.

    `multiturn` gives each example a user and an assistant turn, `chat` puts all into one user turn, `completion` has no
    chat template at all.

    Raises:
        EvalError: an example has no demonstration.
    """
    asked = task.question_format.format(question=instance.question)
    prefix = task.answer_prefix
    shots: list[tuple[str, str]] = []
    for example in examples:
        if example.demonstration is None:
            raise EvalError(f"task {task.name!r}: row {example.id} has no answer that could serve as an example")
        answer = f"{prefix} {example.demonstration}" if prefix else example.demonstration
        shots.append((task.question_format.format(question=example.question), answer))
    if prompting == "multiturn":
        turns = [Message(role, text) for shot in shots for role, text in zip(("user", "assistant"), shot, strict=True)]
        return Prompt([*turns, Message("user", asked)], prefix)
    lead = "".join(f"{question}\n{answer}\n\n" for question, answer in shots)
    if prompting == "chat":
        return Prompt([Message("user", lead + asked)], prefix)
    return Prompt([], f"{lead}{asked}\n{prefix}")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a text that is not empty, got {value!r:.60}")
    return value


def parse_gsm8k(row: Mapping[str, Any]) -> Instance:
    """`{"question": ..., "answer": "... #### 18"}`; `kind` is the number of calculations shown, or the row's own."""
    question, answer = _text(row, "question"), _text(row, "answer")
    truth = reference_answer(answer)
    working = answer.rpartition("####")[0].strip()
    shown = re.sub(r"<<.*?>>", "", working)  # calculator annotations are not for readers
    count = working.count("=") - len(re.findall(r"<<[^>]*=", working))
    kind = str(row.get("kind") or f"{count} {'step' if count == 1 else 'steps'}")
    demonstration = f"{shown}\nThe answer is {truth}.".strip()
    record = {"dataset": "gsm8k", "ground_truth": truth}
    return Instance(content_id("gsm8k", question), question, record, kind, demonstration)


def parse_ifeval(row: Mapping[str, Any]) -> Instance:
    """`{"key": ..., "prompt": ..., "instruction_id_list": [...], "kwargs": [...]}`; `kind` names the instructions."""
    prompt = _text(row, "prompt")
    truth = {"instruction_id": row.get("instruction_id_list"), "kwargs": row.get("kwargs")}
    names = [name for name, _ in parse_instructions(truth)]
    kind = str(row.get("kind") or " + ".join(name.split(":")[1] for name in names if not name.startswith("content:")))
    key = content_id("ifeval", prompt) if row.get("key") is None else str(row["key"])
    return Instance(key, prompt, {"dataset": "ifeval", "ground_truth": truth}, kind)


GSM8K = EvalTask("gsm8k", parse_gsm8k, shows_working=True)
# The prompt of the paper's evaluation (gsm8k::tulu of OLMES), meant for 8 multiturn examples.
GSM8K_TULU = EvalTask(
    "gsm8k::tulu",
    parse_gsm8k,
    question_format="Question: {question}",
    answer_prefix="Answer:",
    stop=("Question:", "</s>", "<|im_end|>"),
    shows_working=True,
)
# Prompt-level loose accuracy is what the paper reports; the strict one is among the metrics of either task.
IFEVAL = EvalTask("ifeval", parse_ifeval, metric="loose")
IFEVAL_STRICT = EvalTask("ifeval::strict", parse_ifeval)
