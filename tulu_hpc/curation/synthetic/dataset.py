"""The quickstart's files: training sources with planted leaks, and evaluation sets disjoint from everything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tulu_hpc.curation.synthetic import instructions, word_problems
from tulu_hpc.curation.synthetic.instructions import Request
from tulu_hpc.curation.synthetic.word_problems import NAMES, WordProblem
from tulu_hpc.data.records import parse_record

Task = WordProblem | Request
EVAL_SEED = 2024  # the evaluation sets are the same for every run, so that runs can be compared
EVALS = ("math_dev", "if_dev", "math_unseen", "if_unseen")
SOURCES = ("sft_math", "sft_instructions", "preference_prompts", "rlvr")
EDITS = ("verbatim", "case_and_punctuation", "extra_sentence", "other_name")


@dataclass(frozen=True)
class Sizes:
    """Rows of each file, and how demonstrations behave."""

    sft_math: int
    sft_instructions: int
    preference_prompts: int
    rlvr: int
    eval_rows: int
    leaks: int
    show_working: float
    follow_constraint: float


@dataclass
class SyntheticData:
    """Rows of each training source and each evaluation set, and the leaks planted in the sources."""

    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evals: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    leaks: list[dict[str, Any]] = field(default_factory=list)


def generate(sizes: Sizes, seed: int) -> SyntheticData:
    """Make all files. Everything but the evaluation sets depends on the seed.

    Training and evaluation draw from disjoint parts of the problem space: a hash of the equations (math) or of
    category, wording and constraint (instructions) decides the part; names do not matter. The unseen sets hold pairs
    of events, and pairs of constraints, that training never shows. Only the leaks break this, on purpose.

    Raises:
        ValueError: more evaluation rows are asked for than there are distinct ones.
    """
    evals = eval_tasks(sizes.eval_rows)
    data = SyntheticData()
    for name in EVALS:
        data.evals[name] = [
            word_problems.gsm8k_row(task) if isinstance(task, WordProblem) else instructions.ifeval_row(task, key)
            for key, task in enumerate(evals[name])
        ]
    math_share = sizes.sft_math / (sizes.sft_math + sizes.sft_instructions)
    makers: dict[str, Callable[[Random], dict[str, Any]]] = {
        "sft_math": lambda rng: sft_row(word_problems.draw(rng, evaluation=False), rng, sizes),
        "sft_instructions": lambda rng: sft_row(instructions.draw(rng, evaluation=False), rng, sizes),
        "preference_prompts": lambda rng: rlvr_row(_draw_any(rng, math_share)),
        "rlvr": lambda rng: rlvr_row(_draw_any(rng, math_share)),
    }
    for name in SOURCES:
        rng = Random(f"{seed}/{name}")
        data.sources[name] = [makers[name](rng) for _ in range(getattr(sizes, name))]
    _plant_leaks(data, evals, sizes, Random(f"{seed}/leaks"))
    for name, rows in data.sources.items():
        kind: Any = "sft" if name.startswith("sft") else "rlvr"
        for line, row in enumerate(rows, 1):
            row["source"] = name
            row["id"] = parse_record(row, kind, file=f"{name}.jsonl", line=line).id
    for leak in data.leaks:
        leak["id"] = data.sources[leak["source"]][leak["line"] - 1]["id"]
    return data


def eval_tasks(rows: int) -> dict[str, list[Task]]:
    """The evaluation sets: `rows` distinct prompts for dev, half as many for unseen.

    Raises:
        ValueError: a set cannot be filled with distinct prompts.
    """
    makers: dict[str, Callable[[Random], Task]] = {
        "math_dev": lambda rng: word_problems.draw(rng, evaluation=True),
        "if_dev": lambda rng: instructions.draw(rng, evaluation=True),
        "math_unseen": lambda rng: word_problems.draw(rng, evaluation=True, unseen=True),
        "if_unseen": lambda rng: instructions.draw(rng, evaluation=True, constraints=2),
    }
    tasks: dict[str, list[Task]] = {}
    for name, make in makers.items():
        wanted = rows if name.endswith("dev") else rows // 2
        rng = Random(f"{EVAL_SEED}/{name}")
        found: dict[str, Task] = {}
        for _ in range(100 * wanted):
            task = make(rng)
            found.setdefault(prompt_of(task), task)
            if len(found) == wanted:
                break
        else:
            raise ValueError(f"eval_rows {rows}: only {len(found)} distinct prompts found for {name}")
        tasks[name] = list(found.values())
    return tasks


def prompt_of(task: Task) -> str:
    return task.question if isinstance(task, WordProblem) else task.prompt


def sft_row(task: Task, rng: Random, sizes: Sizes) -> dict[str, Any]:
    """A demonstration of the task as an SFT record."""
    if isinstance(task, WordProblem):
        response = word_problems.demonstrate(task, show_working=rng.random() < sizes.show_working)
    else:
        response = instructions.demonstrate(task, rng, follow=rng.random() < sizes.follow_constraint)
    return {"messages": [_message("user", prompt_of(task)), _message("assistant", response)]}


def rlvr_row(task: Task) -> dict[str, Any]:
    """The task as an RLVR record."""
    messages = [_message("user", prompt_of(task))]
    if isinstance(task, WordProblem):
        return {"messages": messages, "ground_truth": task.answer, "dataset": "gsm8k"}
    return {"messages": messages, "ground_truth": instructions.ground_truth(task), "dataset": "ifeval"}


def _draw_any(rng: Random, math_share: float) -> Task:
    if rng.random() < math_share:
        return word_problems.draw(rng, evaluation=False)
    return instructions.draw(rng, evaluation=False)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _plant_leaks(data: SyntheticData, evals: dict[str, list[Task]], sizes: Sizes, rng: Random) -> None:
    """Put evaluation prompts, some of them edited, at random places of the sources; sources and edits take turns."""
    planted: dict[str, list[dict[str, Any]]] = {source: [] for source in SOURCES}
    places: dict[str, list[int]] = {source: [] for source in SOURCES}
    for number in range(sizes.leaks):
        source = SOURCES[number % len(SOURCES)]
        fitting = {"sft_math": ("math_dev", "math_unseen"), "sft_instructions": ("if_dev", "if_unseen")}
        name = rng.choice(fitting.get(source, EVALS))
        index = rng.randrange(len(evals[name]))
        task = evals[name][index]
        row = sft_row(task, rng, sizes) if source.startswith("sft") else rlvr_row(task)
        edit = EDITS[(number // len(SOURCES)) % len(EDITS)]
        row["messages"][0]["content"] = _edit(prompt_of(task), edit, rng)
        places[source].append(rng.randint(1, len(data.sources[source]) + len(planted[source]) + 1))
        planted[source].append(row)
        data.leaks.append({"source": source, "line": 0, "eval": name, "eval_row": index, "edit": edit})
    for source, rows in data.sources.items():
        lines = _final_lines(places[source], len(rows))
        for leak, line in zip((leak for leak in data.leaks if leak["source"] == source), lines, strict=True):
            leak["line"] = line
        planted_at, others = dict(zip(lines, planted[source], strict=True)), iter(rows)
        total = len(rows) + len(lines)
        data.sources[source] = [planted_at[n] if n in planted_at else next(others) for n in range(1, total + 1)]


def _final_lines(places: list[int], rows: int) -> list[int]:
    """The lines that insertions end up on: each was put at its place (from 1) of the file as the earlier ones left it.

    From the last one back, an insertion is on the `place`-th line that no later one has. A Fenwick tree counts the
    free lines, so a place takes a logarithm and no line is moved.
    """
    total = rows + len(places)
    free = [n & -n for n in range(total + 1)]  # free[n]: free lines among the n & -n that end at line n
    lines = []
    for place in reversed(places):
        line, step = 0, 1 << total.bit_length()
        while step := step >> 1:
            if line + step <= total and free[line + step] < place:
                line += step
                place -= free[line]
        lines.append(line + 1)
        taken = line + 1
        while taken <= total:
            free[taken] -= 1
            taken += taken & -taken
    return lines[::-1]


def _edit(text: str, edit: str, rng: Random) -> str:
    """A leak as it may look in the wild. `other_name` swaps one name once, which an 8-gram search may well miss."""
    if edit == "case_and_punctuation":
        return text.upper().replace(". ", "! ")
    if edit == "extra_sentence":
        return f"Please help me with this one. {text}"
    if edit == "other_name":
        found = re.search(r"\b(" + "|".join(NAMES) + r")\b", text)
        if found:
            other = rng.choice([name for name in NAMES if name not in text])
            return text[: found.start()] + other + text[found.end() :]
    return text
